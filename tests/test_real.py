"""Real records through real code paths: three architectures, with and without NF4, sample to evaluate.

The weights are random and small, so no accuracy is asserted: what is, is that the same loop runs on them, trains on the
very tokens that were sampled, and that the function that samples is the function that is trained.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import DATA, ROOT, drive, remove_run
from small_models import FAMILIES, build
from transformers import AutoModelForCausalLM

from irpo_utils.files import read_jsonl
from irpo_utils.model import load, logprobs, sampling, training
from irpo_utils.model.losses import dpo_nll
from irpo_utils.model.prompts import encode_prompts, stop_ids
from irpo_utils.model.records import Pair
from irpo_utils.run.config import dump
from irpo_utils.run.driver import check_inputs
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import EvaluateStage, PairsStage, RewardStage, SampleStage, TrainStage, plan
from irpo_utils.tasks import get_task

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark records are not at {DATA}")
FILES = {
    "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "math": ("math_train_4500.jsonl", "math_test_500.jsonl"),
    "arc_challenge": ("arc_challenge_validation.jsonl", "arc_challenge_validation.jsonl"),
    "mbpp": ("mbpp.jsonl", "mbpp.jsonl"),
}


def settings(task: str, folder, **more) -> list[str]:
    train, test = FILES[task]
    chosen = {
        "task.train": DATA / train, "task.test": DATA / test,
        "task.train_size": 12, "task.dev_size": 3, "task.test_size": 4,
        "model.path": folder, "model.dtype": "float32",
        "sampling.n": 12, "sampling.max_rows": 48, "sampling.max_new_tokens": 48, "sampling.temperature": 1.5,
        "pairs.gold": "true", "pairs.k": 2, "pairs.max_tokens": 4096,
        "train.max_steps": 3, "train.batch": 4, "train.micro_batch": 2, "train.eval_every": 2,
        "evaluation.samples": 4, "iterations": 1, "threads": 1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (chosen | more).items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    task = get_task(load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", "unused")).task)
    texts = [p.question + p.solution for p in task.problems("train")] * 4
    return {family: build(family, tmp_path_factory.mktemp(family), texts) for family in FAMILIES}


def write_run(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    return folder


@pytest.mark.parametrize(
    ("family", "quantize", "method", "rounds"), [("gemma2", "nf4", "sipf", 2), ("llama", "none", "self_rewarding", 1)]
)
def test_the_family_goes_through_its_rounds_on_real_records(family, quantize, method, rounds, folders, tmp_path):
    """Step labels, reward model and judge with chat templates, and a second round that begins from M_0."""
    more = {
        "model.quantize": quantize,
        "model.dtype": "float32",
        "methods": method,
        "iterations": rounds,
        "pairs.eta": 1e-6,
    }
    more |= {"process.continuations": 2, "process.max_steps": 3, "judge.read": "scores", "sampling.n": 24}
    config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", folders[family], **more))
    run = write_run(tmp_path / "run", config)
    for stage in plan(config, run, method, 0):
        if stage.name != "04_evaluate":
            stage.begin().run()
            stage.finish()
    facts = json.loads(RewardStage(run, method, 0, rounds).path("reward.json").read_text())
    rewarded = read_jsonl(RewardStage(run, method, 0, rounds).path("rewarded.jsonl"))
    assert len(rewarded) == 12 * 24 and facts["drawn_tokens"] > 0
    assert all(0 <= r["reward"] <= (1 if method == "sipf" else 5) for r in rewarded)
    assert read_jsonl(PairsStage(run, method, 0, rounds).path("pairs.jsonl"))


@pytest.mark.parametrize(
    ("family", "task", "quantize", "dtype"),
    [
        ("llama", "gsm8k", "none", "float32"),
        ("llama", "gsm8k", "nf4", "bfloat16"),  # what the presets do where CUDA is
        ("qwen2", "math", "none", "bfloat16"),
        ("qwen2", "gsm8k", "nf4", "float32"),
        ("qwen2", "mbpp", "none", "float32"),
        ("gemma2", "gsm8k", "nf4", "float32"),
    ],
)
def test_architectures_go_through_the_loop(family, task, quantize, dtype, folders, execution, tmp_path):
    more = {"train.retrain_with_dev": "true"} if family == "llama" else {}
    if task == "mbpp":
        more = {"task.dev": DATA / "mbpp.jsonl", "task.execution": execution}
    if task == "math":  # prompts of 2,000 tokens
        more = {"task.train_size": 6, "train.max_steps": 2, "train.batch": 2, "evaluation.samples": 1}
    config = load_preset(
        f"{task}-qwen2.5-0.5b",
        settings(task, folders[family], **{"model.quantize": quantize, "model.dtype": dtype, **more}),
    )
    run = write_run(tmp_path / "run", config)
    stage = SampleStage(run).begin()
    samples = stage.run()
    stage.finish()
    tokenizer = load.load_tokenizer(config.model)
    stops = stop_ids(config.model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(stops[0]) == FAMILIES[family][2]
    assert len(samples) == 12 * (15 if family == "llama" else config.task.train_size)
    assert any(s.finished for s in samples)
    stage = PairsStage(run).begin()
    pairs, audit = stage.run()
    stage.finish()
    assert audit["pairs"] == len(pairs) > 3
    sampled = {(s.problem, s.token_ids) for s in samples}
    for pair in pairs:
        assert pair.prompt_ids.count(tokenizer.bos_token_id) <= 1
        assert pair.chosen_ids[-1] == stops[0] and pair.rejected_ids[-1] in stops
        assert (pair.problem, pair.rejected_ids) in sampled
    stage = TrainStage(run).begin()
    facts = stage.run(show=lambda line: None)
    stage.finish()
    near = 1e-3 if dtype == "float32" else 5e-2
    assert facts["dpo_at_start"] == pytest.approx(training.LN2, abs=near)
    assert facts["sampler_gap"] < near
    if family == "llama":  # trained again, with the pairs of the dev problems too
        assert {p.problem for p in pairs} & {p.id for p in get_task(config.task).problems("dev")}
        assert facts["retrained_with_dev"]
    stage = EvaluateStage(run).begin()
    summary, responses = stage.run()
    stage.finish()
    assert summary["test"]["problems"] == 4 and len(responses) == 7
    assert summary["test"]["greedy_flexible"] >= summary["test"]["greedy"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_sampling_is_generate(family, folders):
    """Padding, grouped heads, soft-capped attention and several stop tokens make no difference."""
    config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", folders[family]))
    task, tokenizer = get_task(config.task), load.load_tokenizer(config.model)
    model = load.load_policy(config.model, threads=1)
    prompts = encode_prompts(task, tokenizer, task.problems("train")[:4])
    stops = stop_ids(config.model, tokenizer)
    for batch in sampling.sample(model, prompts, n=1, temperature=0, seed=0, eos_id=stops, max_new_tokens=24):
        for name, (completion,) in batch.items():
            ids = torch.tensor([prompts[name]])
            wanted = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=stops
            )
            assert wanted[0, len(prompts[name]) :].tolist() == completion.token_ids


def test_more_samples_than_rows_are_drawn_in_parts(folders):
    config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", folders["llama"]))
    task, tokenizer = get_task(config.task), load.load_tokenizer(config.model)
    model = load.load_policy(config.model, threads=1)
    prompts = encode_prompts(task, tokenizer, task.problems("train")[:2])
    drawn = []
    for rows in (5, 64):
        found = {}
        for batch in sampling.sample(
            model, prompts, n=12, temperature=1.0, seed=0, eos_id=[0], max_new_tokens=8, max_rows=rows
        ):
            found |= {name: [c.token_ids for c in completions] for name, completions in batch.items()}
        drawn.append(found)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_unpacked_weights_are_the_4_bit_function_and_adapters_stay_float32(family, folders):
    config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", folders[family], **{"model.quantize": "nf4"})).model
    packed, unpacked = load.load_base(config).eval(), load.load_policy(config).eval()
    assert not any("4bit" in type(module).__name__ for module in unpacked.modules())
    batch = logprobs.collate([([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9])])
    with torch.no_grad():
        assert torch.allclose(
            logprobs.response_logps(packed, batch), logprobs.response_logps(unpacked, batch), atol=1e-4
        )
    half = config.but(dtype="bfloat16")
    policy = load.load_policy(half, trainable=True)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in policy.named_parameters() if "norm" in n} == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing_but_memory(folders, tmp_path):
    losses = []
    for checkpointing in ("false", "true"):
        more = {"train.gradient_checkpointing": checkpointing}
        config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", folders["qwen2"], **more))
        model = load.load_policy(config.model, trainable=True, seed=0, threads=1)
        pair = Pair("p", "", "", "", (5, 6, 7), (), (), None, None)
        pairs = [replace(pair, chosen_ids=(8, 9, i), rejected_ids=(10, i)) for i in range(20, 24)]
        training.train(
            model,
            pairs,
            tmp_path / checkpointing,
            loss=dpo_nll,
            weights={"beta": 0.1, "alpha": 1.0},
            has_reference=True,
            config=config.train,
            seed=0,
            sampled_by_start=False,
            show=lambda line: None,
        )
        losses.append([s["loss"] for s in read_jsonl(tmp_path / checkpointing / "steps.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_exported_model_is_the_policy_up_to_bfloat16(folders, tmp_path):

    config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", folders["llama"], **{"model.quantize": "nf4"})).model
    policy = load.load_policy(config, trainable=True)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    policy.save_pretrained(tmp_path / "adapter")
    load.export(config, tmp_path / "adapter", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.dtype == torch.bfloat16 and "quantization_config" not in json.loads(
        (tmp_path / "whole" / "config.json").read_text()
    )
    ids = torch.arange(5, 30).unsqueeze(0)
    with torch.no_grad():
        wanted, got = policy.eval()(ids).logits, whole.float()(ids).logits
        base = load.load_base(config).eval()(ids).logits
    assert (wanted - got).abs().max() < 0.2 * (wanted - base).abs().max()


def test_the_driver_runs_real_records_end_to_end_and_says_how_to_load(folders, tmp_path):

    remove_run("test-real")
    done = drive("gsm8k-qwen2.5-0.5b", "run=test-real", *settings("gsm8k", folders["qwen2"]))
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "estimate, from the model's shape" in done.stdout and "12 train problems" in done.stdout
        assert "PeftModel.from_pretrained(" in done.stdout
        rows = read_jsonl(ROOT / "outputs" / "test-real" / "m0" / "seed_0" / "samples.jsonl")
        assert len({r["problem"] for r in rows}) == 12
        whole = drive("export", "test-real", str(tmp_path / "whole"))
        assert whole.returncode == 0 and (tmp_path / "whole" / "model.safetensors").is_file(), whole.stderr
    finally:
        remove_run("test-real")


def test_dropout_in_the_base_is_off(folders, tmp_path):
    """It would make another function of the policy than the one that was sampled."""

    shutil.copytree(folders["qwen2"], tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts | {"attention_dropout": 0.5}))
    config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", tmp_path / "model")).model
    ids = torch.arange(5, 30).unsqueeze(0)
    for policy in (None, tmp_path / "model"):  # the base with an adapter; a whole model that was trained
        model = load.load_policy(config, policy, trainable=True).train()
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no \\*.safetensors; only that format"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"),
            "model.safetensors is damaged or cut off",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "is no folder with config.json and a tokenizer"),
        (lambda f: change(f, "config.json", vocab_size=100), "its model only 100"),
        (lambda f: change(f, "config.json", model_type="t5"), "is no causal language model"),
        (
            lambda f: change(
                f, "config.json", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}
            ),
            "holds quantized weights",
        ),
        (
            lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('never') }}"),
            "cannot write this conversation: never",
        ),
        (
            lambda f: (f / "chat_template.jinja").write_text("{{ bos_token }}hello"),
            "writes different prompts as the same tokens",
        ),
        (
            lambda f: change(f, "config.json", max_position_embeddings=64),
            "the longest prompt has .* tokens, the model's context 64",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_used_is_refused_before_anything_runs(spoil, message, folders, tmp_path):

    shutil.copytree(folders["llama"], tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        check_inputs(load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", tmp_path / "model")))


def change(folder, name, **facts):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_prompts_run_in_parts_give_the_same_samples(folders, monkeypatch):
    config = load_preset("gsm8k-qwen2.5-0.5b", settings("gsm8k", folders["llama"]))
    task, tokenizer = get_task(config.task), load.load_tokenizer(config.model)
    model = load.load_policy(config.model, threads=1)
    prompts = encode_prompts(task, tokenizer, task.problems("train")[:6])
    drawn = []
    for at_once in (1 << 15, 300):
        monkeypatch.setattr(sampling, "PREFILL_TOKENS", at_once)
        (batch,) = sampling.sample(
            model, prompts, n=2, temperature=1.0, seed=0, eos_id=[0], max_new_tokens=8, max_rows=64
        )
        drawn.append({name: [c.token_ids for c in completions] for name, completions in batch.items()})
    assert drawn[0] == drawn[1]
