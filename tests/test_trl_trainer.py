"""The second engine of the training stage trains on the same tokens with the same losses, but for TRL's mean NLL."""

import json
import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from irpo_utils.extras import trl_trainer
from irpo_utils.files import ConfigError, read_jsonl
from irpo_utils.model import load, losses, schedule, training
from irpo_utils.model.logprobs import reference_logps
from irpo_utils.model.records import Pair
from irpo_utils.settings import ModelConfig, TrainConfig

ENGINES = {"own": training.train, "trl": trl_trainer.train}
LOSSES = {
    "dpo": (losses.dpo, {"beta": 0.1}),
    "dpo+nll": (losses.dpo_nll, {"beta": 0.1, "alpha": 1.0}),
}
GRADIENTS = {"policy_gradient": losses.policy_gradient, "policy_gradient_mean": losses.policy_gradient_mean}
# Problem, chosen, rejected: responses of unequal lengths.
TEXTS = [
    (
        "Question: Ann has 12 pens. Ann sells half of them. How many pens does Ann have?\nAnswer:\n",
        "12 / 2 = 6\nFinal answer: 6",
        "12 - 2 = 10\nFinal answer: 10",
    ),
    (
        "Question: Ben has 3 eggs. Ben gets 4 from Ann. Ben gives Dan 2. How many eggs does Ben have?\nAnswer:\n",
        "3 + 4 = 7\n7 - 2 = 5\nFinal answer: 5",
        "Final answer: 9",
    ),
    (
        "Question: Eva has 5 books. Eva has 4 more now. How many books does Eva have?\nAnswer:\n",
        "Final answer: 9",
        "5 - 4 = 1\nFinal answer: 1",
    ),
    (
        "Question: Dan has 8 coins. Dan sells half of them. Dan gets 3 from Eva. "
        "How many coins does Dan have?\nAnswer:\n",
        "8 / 2 = 4\n4 + 3 = 7\nFinal answer: 7",
        "8 / 2 = 4\nFinal answer: 4",
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load.load_tokenizer(ModelConfig())


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """Pairs as the selection makes them, with the log-probabilities that a sampler would have seen."""
    made = []
    for number, (prompt, chosen, rejected) in enumerate(TEXTS):
        prompt_ids = tuple(tokenizer(prompt).input_ids)
        ids = [
            (*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id)
            for text in (chosen, rejected)
        ]
        made.append(Pair(f"p{number}", prompt, chosen, rejected, prompt_ids, *ids, None, None))
    seen = reference_logps(load.load_policy(ModelConfig(), threads=1), made)
    return [
        replace(pair, chosen_logp=chosen, rejected_logp=rejected)
        for pair, (chosen, rejected) in zip(made, seen, strict=True)
    ]


def train(engine, pairs, folder, loss="dpo+nll", settings=None, **more):
    """Facts and steps of a training of four steps by that engine, and the model."""
    config = TrainConfig(**{"batch": 1, "micro_batch": 1, "max_steps": 4, "eval_every": 2} | (settings or {}))
    others = {"orpo": (losses.orpo, {"odds_weight": 0.3}), **{name: (f, {}) for name, f in GRADIENTS.items()}}
    function, weights = (LOSSES | others)[loss]
    options = {"seed": 0, "sampled_by_start": True, "has_reference": loss in LOSSES, "show": lambda line: None} | more
    model = load.load_policy(ModelConfig(**options.pop("model", {})), trainable=True, seed=0, threads=1)
    facts = ENGINES[engine](model, pairs, folder, loss=function, weights=weights, config=config, **options)
    return facts, read_jsonl(folder / "steps.jsonl"), model


def assert_same(own, trl):
    """The same steps by both engines."""
    for ours, theirs in zip(own, trl, strict=True):
        assert theirs.keys() == ours.keys()
        if abs(ours["margin"]) < 1e-3:  # which of two equal rewards is larger is rounding
            ours, theirs = ({**row, "accuracy": 0.0} for row in (ours, theirs))
        assert theirs == pytest.approx(ours, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_with_one_pair_a_step_both_engines_have_the_same_losses(pairs, tmp_path, loss, tuning):
    rate = {"lr": 1e-3 if tuning == "lora" else 1e-4}
    found = {
        name: train(name, pairs, tmp_path / name, loss, rate, model={"tuning": tuning}, score=lambda policy: 0.5)[:2]
        for name in ENGINES
    }
    (own, own_steps), (trl, trl_steps) = found["own"], found["trl"]
    assert len(own_steps) == len(trl_steps) == 4
    assert_same(own_steps, trl_steps)
    assert own_steps[-1]["loss"] != pytest.approx(own_steps[0]["loss"], abs=1e-2)  # they have moved
    assert trl["dpo_at_start"] == pytest.approx(math.log(2), abs=1e-5)
    assert trl == pytest.approx(own, abs=1e-5)
    weights = [load.load_policy(ModelConfig(), tmp_path / name / "best").state_dict() for name in ENGINES]
    for name, ours in weights[0].items():
        assert torch.allclose(weights[1][name], ours, atol=1e-3), name


def test_accumulated_micro_batches_of_one_pair_are_those_of_the_other_engine(pairs, tmp_path):
    assert_same(*(train(name, pairs, tmp_path / name, settings={"batch": 4})[1] for name in ENGINES))


def test_at_unequal_lengths_dpo_agrees_and_the_nll_differs_by_the_two_means(pairs, tmp_path):
    two = {"batch": 2, "micro_batch": 2, "max_steps": 1}
    for loss in LOSSES:
        (_, own, _), (_, trl, _) = (train(name, pairs[:2], tmp_path / loss / name, loss, two) for name in ENGINES)
        assert trl[0]["dpo"] == pytest.approx(own[0]["dpo"], abs=1e-4)
        lengths = [len(pair.chosen_ids) for pair in pairs[:2]]
        assert lengths[0] != lengths[1]
        per_pair = sum(-pair.chosen_logp / len(pair.chosen_ids) for pair in pairs[:2]) / 2
        per_token = -sum(pair.chosen_logp for pair in pairs[:2]) / sum(lengths)
        assert abs(per_pair - per_token) > 1e-3
        assert own[0]["nll"] == pytest.approx(per_pair, abs=1e-4)
        assert trl[0]["nll"] == pytest.approx(per_token, abs=1e-4)
        difference = per_token - per_pair if loss == "dpo+nll" else 0.0
        assert trl[0]["loss"] - own[0]["loss"] == pytest.approx(difference, abs=1e-4)
    assert lengths == [10, 16]  # what the module's docstring says
    assert (own[0]["loss"], trl[0]["loss"]) == pytest.approx((1.5850, 1.6662), abs=1e-3)


def test_orpo_is_the_other_engine_s_but_for_the_nll_of_the_prompt(pairs, tmp_path):
    one = {"max_steps": 1, "batch": 2, "micro_batch": 2}
    (_, own, _), (_, trl, _) = (train(name, pairs[:2], tmp_path / name, "orpo", one) for name in ENGINES)
    assert trl[0].keys() == own[0].keys()
    same = ("odds", "chosen_logp", "rejected_logp", "margin", "accuracy")
    assert [trl[0][name] for name in same] == pytest.approx([own[0][name] for name in same], abs=1e-4)
    assert trl[0]["nll"] > own[0]["nll"] + 0.5  # the prompts are not what the policy was trained to say
    assert trl[0]["loss"] - trl[0]["nll"] == pytest.approx(own[0]["loss"] - own[0]["nll"], abs=1e-4)


@pytest.mark.parametrize("loss", list(GRADIENTS))
def test_a_policy_gradient_moves_the_weights_as_the_other_engine_s(pairs, tmp_path, loss):
    """Four responses a step, two at a time, each with its advantage; only the value of the loss is another."""
    group = [replace(pair, rejected="", rejected_ids=(), rejected_logp=None) for pair in pairs]
    group = [replace(pair, reward_gap=gap) for pair, gap in zip(group, (1.0, -1 / 3, -1 / 3, 0.5), strict=True)]
    settings = {"batch": 2, "micro_batch": 1, "max_steps": 3, "lr": 1e-2}
    (_, own, _), (_, trl, _) = (train(name, group, tmp_path / name, loss, settings) for name in ENGINES)
    for ours, theirs in zip(own, trl, strict=True):
        assert theirs.keys() == ours.keys()
        del ours["loss"], theirs["loss"]
        assert theirs == pytest.approx(ours, abs=2e-3)
    assert own[-1]["chosen_logp"] != pytest.approx(own[0]["chosen_logp"], abs=0.1)  # they have moved
    weights = [load.load_policy(ModelConfig(), tmp_path / name / "best").state_dict() for name in ENGINES]
    for name, ours in weights[0].items():
        assert torch.allclose(weights[1][name], ours, atol=1e-3), name


def test_the_ids_are_those_that_were_sampled(pairs, tmp_path, tokenizer, monkeypatch):
    """Neither text nor tokenizer: ids that no text gives come through, with one BOS and the EOS they had."""
    seen = []
    whole = trl_trainer.TokenTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs)
        return whole(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl_trainer.TokenTrainer, "compute_loss", watched)
    odd = [replace(pairs[0], prompt="?", chosen="?", chosen_ids=(9, 9, 9, 7), chosen_logp=None)]
    train("trl", odd, tmp_path, settings={"max_steps": 1})
    for inputs in seen:
        masked = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        rows = [ids[mask.bool()].tolist() for ids, mask in masked]
        assert rows == [[*odd[0].prompt_ids, *odd[0].chosen_ids], [*odd[0].prompt_ids, *odd[0].rejected_ids]]
        assert inputs["completion_mask"].sum(-1).tolist() == [4, len(odd[0].rejected_ids)]


def test_the_arguments_are_those_of_the_other_engine(tmp_path):
    """TRL's defaults would cut responses, compute in 16 bits, save memory and log."""
    plain = schedule.trainer_arguments(tmp_path, TrainConfig(), 7, 3, save_strategy="no")
    trl = trl_trainer.trl_arguments(plain, losses.dpo_nll, {"beta": 0.3, "alpha": 0.7})
    for field in fields(plain):
        assert getattr(trl, field.name) == getattr(plain, field.name), field.name
    assert trl.n_gpu == 1 and trl.max_length is None
    assert (trl.beta, trl.loss_type, trl.loss_weights) == (0.3, ["sigmoid", "sft"], [1.0, 0.7])
    assert trl_trainer.trl_arguments(plain, losses.dpo, {"beta": 0.3}).loss_type == ["sigmoid"]
    for loss in (losses.orpo, losses.policy_gradient):
        trl = trl_trainer.trl_arguments(plain, loss, {"odds_weight": 0.2})
        assert all(getattr(trl, field.name) == getattr(plain, field.name) for field in fields(plain))
    assert (trl.beta, trl.loss_type) == (0.0, "luspo")


def test_the_model_is_left_as_by_the_other_engine(pairs, tmp_path):
    own, trl = (train(name, pairs, tmp_path / name)[2] for name in ENGINES)
    assert list(trl.peft_config) == ["default"]
    trained = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (own, trl)]
    assert trained[0] == trained[1]
    own, trl = load.causal_model(own), load.causal_model(trl)
    assert vars(own).keys() == vars(trl).keys() - {"model_tags"}
    assert trl.config.to_dict() == own.config.to_dict()
    assert trl.generation_config.to_dict() == own.generation_config.to_dict()
    files = [sorted(path.name for path in (tmp_path / name / "best").iterdir()) for name in ENGINES]
    assert files[0] == files[1]


def test_the_padding_of_the_model_s_own_configuration_stays(pairs, tmp_path):
    model = load.load_policy(ModelConfig(tuning="full"), trainable=True, threads=1)
    model.config.pad_token_id, model.generation_config.pad_token_id = 7, 8
    function, weights = LOSSES["dpo"]
    config = TrainConfig(batch=1, micro_batch=1, max_steps=1)
    trl_trainer.train(
        model,
        pairs,
        tmp_path,
        loss=function,
        weights=weights,
        has_reference=True,
        config=config,
        seed=0,
        sampled_by_start=True,
    )
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (7, 8)
    assert json.loads((tmp_path / "best" / "config.json").read_text())["pad_token_id"] == 7


def test_a_killed_training_ends_the_same(pairs, tmp_path):
    class Killed(BaseException):
        pass

    def kill(policy):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return 0.5

    calls: list[int] = []
    again = partial(train, "trl", pairs, settings={"max_steps": 4, "batch": 2, "micro_batch": 2})
    again(tmp_path / "whole", score=lambda policy: 0.5)
    with pytest.raises(Killed):
        again(tmp_path / "cut", score=kill)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-2" / "complete").exists()
    again(tmp_path / "cut", score=lambda policy: 0.5)
    for name in ("steps.jsonl", "best/adapter_model.safetensors", "best/best.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_4_bit_adapters_stay_in_float32(pairs, tmp_path):
    facts, steps, model = train("trl", pairs, tmp_path, model={"quantize": "nf4"}, sampled_by_start=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert facts["dpo_at_start"] == pytest.approx(math.log(2), abs=1e-3) and facts["sampler_gap"] is None
    assert steps[-1]["margin"] != 0.0


def test_what_trl_does_not_train_is_refused(pairs, tmp_path):
    model = load.load_policy(ModelConfig(), trainable=True, seed=0, threads=1)

    def refused(match, pairs=pairs, loss=losses.dpo, error=ConfigError, **more):
        options = {"has_reference": True, "config": TrainConfig(), "seed": 0, "sampled_by_start": True} | more
        with pytest.raises(error, match=match):
            trl_trainer.train(model, pairs, tmp_path, loss=loss, weights={"beta": 0.1}, **options)
        assert not list(tmp_path.rglob("steps.jsonl"))

    refused("train.engine: trl has no loss 'simpo'.*set train.engine=own", loss=losses.simpo)
    refused("train.engine: trl has no loss 'nll'.*set train.engine=own", loss=losses.nll)
    refused("train.engine: .*starts as its reference.*set train.engine=own", reference_is_start=False)
    alone = [*pairs[1:], replace(pairs[0], rejected="", rejected_ids=())]
    refused("train.engine: .*rejected response.*set train.engine=own", pairs=alone)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.5)
    refused("not samples of M_t; run 01_sample", error=RuntimeError)


def test_a_wrong_reference_is_refused(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "kept_reference_logps", lambda model, rows, *a: [(-1.0, -9.0)] * len(rows))
    with pytest.raises(RuntimeError, match="not ln 2.*check that both are M_t"):
        train("trl", pairs, tmp_path, sampled_by_start=False)
    assert not (tmp_path / "steps.jsonl").exists()


def test_the_best_step_is_kept_and_the_schedule_is_that_of_the_whole(pairs, tmp_path):
    scores = iter([0.9, 0.1])
    facts, steps, _ = train("trl", pairs, tmp_path / "best", score=lambda policy: next(scores))
    assert facts["best_step"] == 2 and facts["best_score"] == 0.9
    assert [step.get("dev_greedy") for step in steps] == [None, 0.9, None, 0.1]
    assert json.loads((tmp_path / "best" / "best" / "best.json").read_text()) == {"step": 2, "score": 0.9}
    facts, cut, _ = train("trl", pairs, tmp_path / "cut", stop_after=2)
    assert facts["best_step"] == 2 and facts["steps"] == 4 and len(cut) == 2
    assert [step["loss"] for step in cut] == [step["loss"] for step in steps[:2]]
