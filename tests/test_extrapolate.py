"""ExPO is th_1 + a (th_1 - th_0) for adapters of any ranks and for whole models, whatever form the weights have."""

import json

import pytest
import torch

from irpo_utils.extras.expo import extrapolate
from irpo_utils.files import ConfigError, MissingArtefact
from irpo_utils.model import load, tokens
from irpo_utils.run.driver import main

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
    [("four", "six", 10), ("six", "four", 10), ("four", "five", 8), ("four", None, 4), ("whole", "other", 0), ("whole", None, 0)],
)  # fmt: skip
def test_logits_are_those_of_the_weights_merged_by_hand(config, policies, tmp_path, th_1, th_0, rank, a):
    th_1, th_0 = policies[th_1], policies.get(th_0)
    extrapolate(config.model, th_1, th_0, a, tmp_path / "new")
    got, wanted = logits(load.load_policy(config.model, tmp_path / "new")), by_hand(config, th_1, th_0, a)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - logits(load.load_policy(config.model, th_1))).abs().max() > 0.1
    if rank:
        facts = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
        assert (facts["r"], facts["base_model_name_or_path"]) == (rank, str(tokens.SEED_MODEL))
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
    refused("on the base .*seed_model, .*on my/other", policies["four"], changed("elsewhere", base_model_name_or_path="my/other"))  # fmt: skip
    refused("not a plain LoRA adapter", changed("dora", use_dora=True), None)
    from safetensors.torch import load_file, save_file

    fewer = changed("fewer")
    weights = load_file(fewer / "adapter_model.safetensors")
    save_file({n: w for n, w in weights.items() if "layers.0.mlp.up_proj" not in n}, fewer / "adapter_model.safetensors")  # fmt: skip
    refused(r"layers.0.mlp.up_proj.lora_A.weight is \(128,\) in .*four but none", policies["four"], fewer)
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "small")
    refused("lm_head.weight is .50, 64. in .*small but none in the base", tmp_path / "small", None)


def test_the_command(policies, tmp_path, capsys):
    four, target = str(policies["four"]), str(tmp_path / "new")
    assert main(["extrapolate", four, "base", target, "a=0.5"]) == 0
    assert load.is_adapter(tmp_path / "new")
    assert main(["extrapolate", four, "base", target]) == 2  # not empty
    assert "is not empty" in capsys.readouterr().err
    assert main(["extrapolate", four, "base"]) == 2
    assert "used as extrapolate TH1" in capsys.readouterr().err
    assert main(["extrapolate", four, "base", f"{target}2", "a=x"]) == 2
    assert main(["extrapolate", four, "nowhere", f"{target}2"]) == 2
    assert "holds no policy" in capsys.readouterr().err
