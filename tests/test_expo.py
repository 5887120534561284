"""ExPO is th_1 + a (th_1 - th_0) for adapters of any ranks and for whole models, whatever form the weights have."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from irpo_utils.extras import expo
from irpo_utils.extras.expo import extrapolate, extrapolated
from irpo_utils.files import ConfigError, MissingArtefact
from irpo_utils.model import load, packaged
from irpo_utils.report.publish import extrapolate as main
from irpo_utils.settings import ModelConfig

IDS = torch.tensor([[1, 5, 9, 13, 22, 7, 40, 3]])


@pytest.fixture(scope="module")
def policies(config, tmp_path_factory):
    """Folders: adapters of rank 4 (twice) and 6, and two whole models, each moved away from the base."""
    found = {}
    kinds = {
        "four": {"lora_r": 4, "lora_alpha": 8},
        "five": {"lora_r": 4, "lora_alpha": 5},
        "six": {"lora_r": 6, "lora_alpha": 64},
    }
    for seed, (name, kind) in enumerate((kinds | {"whole": {"tuning": "full"}, "other": {"tuning": "full"}}).items()):
        model = load.load_policy(config.model.but(**kind), trainable=True, seed=seed, threads=1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.02 * torch.randn(p.shape, generator=generator)
        found[name] = tmp_path_factory.mktemp("policies") / name
        model.save_pretrained(found[name])
    return found


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def by_hand(config, th_1, th_0, a):
    """The same on merged weights, one by one."""
    model, before = load.load_policy(config.model, th_1), load.load_policy(config.model, th_0)
    with torch.no_grad():
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            p += a * (p - q)
    return logits(model)


@pytest.mark.parametrize("a", [0.3, -0.4, 1.7])
@pytest.mark.parametrize(
    ("th_1", "th_0", "rank"),
    [
        ("four", "six", 10),
        ("six", "four", 10),
        ("four", "five", 8),
        ("four", None, 4),
        ("whole", "other", 0),
        ("whole", None, 0),
    ],
)
def test_logits_are_those_of_the_weights_merged_by_hand(config, policies, tmp_path, th_1, th_0, rank, a):
    th_1, th_0 = policies[th_1], policies.get(th_0)
    extrapolate(config.model, th_1, th_0, a, tmp_path / "new")
    got, wanted = logits(load.load_policy(config.model, tmp_path / "new")), by_hand(config, th_1, th_0, a)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - logits(load.load_policy(config.model, th_1))).abs().max() > 0.1
    if rank:
        facts = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
        assert (facts["r"], facts["base_model_name_or_path"]) == (rank, str(packaged.SEED_MODEL))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("th_1", "th_0"), [("four", "six"), ("six", None), ("whole", "other")])
def test_a_of_0_is_th_1_and_of_minus_1_is_th_0(config, policies, tmp_path, th_1, th_0):
    for a, name in ((0.0, th_1), (-1.0, th_0)):
        extrapolate(config.model, policies[th_1], policies.get(th_0), a, tmp_path / str(a))
        got = logits(load.load_policy(config.model, tmp_path / str(a)))
        assert torch.allclose(got, logits(load.load_policy(config.model, policies.get(name))), atol=1e-4)


def test_the_result_trains_on(config, policies, tmp_path):
    extrapolate(config.model, policies["four"], policies["six"], 0.5, tmp_path / "new")
    model = load.load_policy(config.model, tmp_path / "new", trainable=True)
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n and p.requires_grad} == {10}


def test_what_does_not_fit_together_is_named(config, policies, tmp_path):
    def refused(match, th_1, th_0, error=ConfigError):
        with pytest.raises(error, match=match):
            extrapolate(config.model, th_1, th_0, 0.3, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def changed(name, **facts):
        copy = tmp_path / name
        copy.mkdir()
        was = json.loads((policies["six"] / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(was | facts))
        (copy / "adapter_model.safetensors").write_bytes((policies["six"] / "adapter_model.safetensors").read_bytes())
        return copy

    refused("an adapter and a whole model", policies["four"], policies["whole"])
    refused("holds no policy", policies["four"], tmp_path, MissingArtefact)
    elsewhere = changed("elsewhere", base_model_name_or_path="my/other")
    refused("on the base .*seed_model, .*on my/other", policies["four"], elsewhere)
    refused("not a plain LoRA adapter", changed("dora", use_dora=True), None)
    fewer = changed("fewer")
    weights = load_file(fewer / "adapter_model.safetensors")
    kept = {n: w for n, w in weights.items() if "layers.0.mlp.up_proj" not in n}
    save_file(kept, fewer / "adapter_model.safetensors")
    refused(r"layers.0.mlp.up_proj.lora_A.weight is \(128,\) in .*four but none", policies["four"], fewer)
    small = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "small")
    refused("lm_head.weight is .50, 64. in .*small but none in the base", tmp_path / "small", None)


def test_the_part_of_a_round_replaces_what_a_killed_one_left(config, policies, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "adapter_model.safetensors").write_text("cut off")
    facts = extrapolated(config.model, (policies["four"], policies["six"]), 0.3, tmp_path / "new")
    assert facts == {"a": 0.3, "trained_tokens": 0, "best_step": 0}
    again = extrapolated(config.model, (policies["four"], policies["six"]), 0.3, tmp_path / "again")
    assert again == facts
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_command(policies, tmp_path, capsys):
    four, target = str(policies["four"]), str(tmp_path / "new")
    assert main([four, "base", target, "a=0.5"]) == 0
    assert load.is_adapter(tmp_path / "new")
    assert capsys.readouterr().out == f"{target}: {four} + 0.5 ({four} - base)\n"

    def refused(match, *arguments, error=ConfigError):
        with pytest.raises(error, match=match):
            main(list(arguments))

    refused("is not empty", four, "base", target)
    refused("used as extrapolate TH1", four, "base")
    refused("used as extrapolate TH1", four, "base", f"{target}2", "train.lr=1")
    refused("extrapolate: a: could not convert string to float: 'x'", four, "base", f"{target}2", "a=x")
    refused("expected a finite number, got inf", four, "base", f"{target}2", "a=inf")
    refused("holds no policy", four, "nowhere", f"{target}2", error=MissingArtefact)


def test_the_command_s_settings_of_the_model(monkeypatch):
    def read(texts):
        """The model's section that the command passes on."""
        found = []
        monkeypatch.setattr(expo, "extrapolate", lambda config, *others: found.append(config))
        assert main(["th_1", "base", "nowhere", *(f"model.{name}={text}" for name, text in texts.items())]) == 0
        return found[0]

    assert read({}) == ModelConfig()
    given = read({"path": "some/model", "tuning": "full", "trust_remote_code": "true", "lora_r": "8"})
    assert given == ModelConfig(path="some/model", tuning="full", trust_remote_code=True, lora_r=8)
    for cuda, cpu, dtype, quantize in (
        (True, "avx2", "bfloat16", "nf4"),
        (False, "avx2", "float32", "none"),
        (False, "amx_bf16", "bfloat16", "none"),
        (False, "avx512_bf16", "bfloat16", "none"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: {"amx_bf16": False, cpu: True})
        found = read({"dtype": "auto", "quantize": "auto"})
        assert (found.dtype, found.quantize) == (dtype, quantize)

    def refused(match, **texts):
        with pytest.raises(ConfigError, match=match):
            read(texts)

    refused("no parameter is called 'model.pth'; did you mean 'model.path'[?]", pth="x")
    refused("model.dtype: one of float32, bfloat16, auto, got 'half'", dtype="half")
    refused("model.lora_r: expected a whole number, got 'x'", lora_r="x")
    refused("4-bit weights cannot be trained; set model.tuning=lora", quantize="nf4", tuning="full")


def test_the_command_line_reaches_it(policies, tmp_path, capsys):
    from irpo_utils.__main__ import main as command_line

    four, target = str(policies["four"]), str(tmp_path / "new")
    assert command_line(["extrapolate", four, "base", target, "a=0.5"]) == 0
    assert load.is_adapter(tmp_path / "new")
    assert command_line(["extrapolate", four, "base", target]) == 2  # not empty
    assert "is not empty" in capsys.readouterr().err
    assert command_line(["extrapolate", four, "base"]) == 2
    assert "used as extrapolate TH1" in capsys.readouterr().err
    assert command_line(["extrapolate", four, "base", f"{target}2", "a=x"]) == 2
    assert command_line(["extrapolate", four, "nowhere", f"{target}2"]) == 2
    assert "holds no policy" in capsys.readouterr().err
