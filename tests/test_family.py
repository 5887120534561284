"""Rounds of the methods beyond IRPO, stage by stage on the micro preset: what they read, leave and cost."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from irpo_utils.extras.process import reward_model
from irpo_utils.extras.process.labels import score_samples
from irpo_utils.files import NOTEBOOKS, read_jsonl, write_text
from irpo_utils.model.load import load_policy, load_tokenizer
from irpo_utils.model.prompts import encode_prompts
from irpo_utils.model.records import Prompt, Sample
from irpo_utils.report.comparison import spent_table
from irpo_utils.run.config import dump
from irpo_utils.run.notebooks import run_notebook
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import STAGES, plan
from irpo_utils.run.store import open_run
from irpo_utils.tasks import get_task

SETTINGS = [
    "methods=star,sipf,expo", "iterations=3", "pairs.eta=0.001", "process.continuations=4", "process.max_steps=8",
    "sft_gold.train.max_steps=3", "latro.train.beta=10.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_text(folder / "config.yaml", dump(load_preset("micro", SETTINGS)))
    return folder


def make(run, method, last):
    """Run a method's rounds up to `last`, without their evaluation; what is done stays."""
    for stage in plan(open_run(run), run, method, 0):
        if stage.name != "04_evaluate" and stage.iteration <= last and not stage.is_done():
            stage.begin().run()
            stage.finish()


def rows(run, method, t, file, name="02_pairs"):
    return read_jsonl(STAGES[name](run, method, 0, t).path(file))


def test_star_solves_failures_with_the_answer_in_sight_and_learns_them_without(run):
    make(run, "star", 1)
    samples, rewarded = (
        rows(run, "star", 1, "samples.jsonl", "01_sample"),
        rows(run, "star", 1, "rewarded.jsonl", "01b_reward"),
    )
    right = Counter(s["problem"] for s in samples if s["reward"] == 1)
    extra = [r for r in rewarded if r.get("extra")]
    kept = [s | {"answer_reward": s["reward"]} for s in samples]
    assert rewarded[: len(samples)] == kept  # nothing is lost or changed
    assert extra and all(right[r["problem"]] == 0 and r["reward"] == 1 and r["logp"] is None for r in extra)
    facts = json.loads(STAGES["01b_reward"](run, "star", 0, 1).path("reward.json").read_text())
    assert facts["failed_problems"] == len({s["problem"] for s in samples} - set(right)) and facts["right"] == len(
        extra
    )
    trained = rows(run, "star", 1, "pairs.jsonl")
    assert {r["problem"] for r in trained} == set(right) | {r["problem"] for r in extra}
    assert not any("Final answer" in r["prompt"] or r["rejected_ids"] for r in trained)  # no hint, nothing rejected


def test_self_rewarding_trains_on_its_own_scores_and_says_what_they_are_worth(run):
    make(run, "self_rewarding", 1)
    rewarded = rows(run, "self_rewarding", 1, "rewarded.jsonl", "01b_reward")
    assert all(0 <= r["reward"] <= 5 and r["answer_reward"] in (0, 1, None) for r in rewarded)
    worth = {(r["problem"], tuple(r["token_ids"])): r["reward"] for r in rewarded}
    for pair in rows(run, "self_rewarding", 1, "pairs.jsonl"):
        mine = [reward for (name, _), reward in worth.items() if name == pair["problem"]]
        assert worth[pair["problem"], tuple(pair["chosen_ids"])] == max(mine) > min(mine)
        assert worth[pair["problem"], tuple(pair["rejected_ids"])] == min(mine)
    facts = json.loads(STAGES["01b_reward"](run, "self_rewarding", 0, 1).path("reward.json").read_text())
    assert "the judge" in facts["verdict"] and facts["auc"] is not None


def test_latro_rewards_a_thought_by_the_answer_and_by_what_m0_says_of_it(run):
    make(run, "latro", 2)
    stage = STAGES["01b_reward"](run, "latro", 0, 2)
    config, prompts = stage.config, stage.prompts()
    rewarded = Sample.read(stage.path("rewarded.jsonl"), "01b_reward")
    drawn, whole = ([s for s in rewarded if s.extra == extra] for extra in (False, True))
    assert [(s.problem, s.sample, s.reward) for s in drawn] == [(s.problem, s.sample, s.reward) for s in whole]
    answers = {p.id: p.answer for p in get_task(config.task).problems("train")}
    own, first = (load_policy(config.model, policy) for policy in (stage.input("policy"), None))

    def logps(model, ids):
        with torch.no_grad():
            steps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [0.0] + [steps[i - 1, ids[i]].item() for i in range(1, len(ids))]

    for s in whole[:40:5]:
        prompt = prompts[s.problem].prompt_ids
        begin, cut = len(prompt), len(prompt) + s.thought
        here, there = (logps(model, prompt + s.token_ids) for model in (own, first))
        ratio = sum(here[begin:cut]) - sum(there[begin:cut])
        assert s.reward == pytest.approx(sum(here[cut:]) - 10 * ratio, abs=1e-3)
        assert abs(ratio) > 1e-5 and s.response.endswith(f"Final answer: {answers[s.problem]}")  # M_1 is not M_0
    pairs, advantages = rows(run, "latro", 2, "pairs.jsonl"), Counter()
    for p in pairs:
        assert p["chosen_ids"][: len(p["rejected_ids"])] == p["rejected_ids"] and p["chosen_logp"] is None
        advantages[p["problem"]] += p.get("reward_gap", 1.0)
    assert len(pairs) == len(whole) and max(map(abs, advantages.values())) < 1e-6  # a problem's cancel
    facts = json.loads(STAGES["03_train"](run, "latro", 0, 2).path("training.json").read_text())
    assert facts["dpo_at_start"] is None and facts["sampler_gap"] is None  # there is nothing to check


def test_process_feedback_accumulates_pairs_and_starts_from_m0_with_a_fresh_adapter(run):
    make(run, "sipf", 3)
    second, third = rows(run, "sipf", 2, "pairs.jsonl"), rows(run, "sipf", 3, "pairs.jsonl")
    assert len(third) > len(second)
    assert [(r["chosen_ids"], r["rejected_ids"]) for r in third[: len(second)]] == [
        (r["chosen_ids"], r["rejected_ids"]) for r in second
    ]
    assert all(r["chosen_logp"] is None for r in third[: len(second)])  # another model drew them
    stage = STAGES["03_train"](run, "sipf", 0, 3)
    assert stage.input("policy") is None and json.loads(stage.path("training.json").read_text())["dpo_at_start"] is None


def test_the_reward_model_on_disk_gives_the_rewards_that_made_the_pairs(run):
    make(run, "sipf", 2)
    stage = STAGES["01b_reward"](run, "sipf", 0, 2)
    model = reward_model.load_reward_model(stage.config, stage.path("reward_model"), threads=1)
    tokenizer, task = load_tokenizer(stage.config.model), get_task(stage.config.task)
    ids = encode_prompts(task, tokenizer, task.problems("train"))
    prompts = {name: Prompt(name, "", tuple(prompt)) for name, prompt in ids.items()}
    rewarded = Sample.read(stage.path("rewarded.jsonl"), "01b_reward")[:64]
    unscored = [replace(s, reward=s.answer_reward, step_scores=(), step_ends=()) for s in rewarded]
    again = score_samples(model, tokenizer, prompts, unscored, "mean")
    assert [s.reward for s in again] == pytest.approx([s.reward for s in rewarded], abs=1e-5)
    worth = {(r["problem"], tuple(r["token_ids"])): r["reward"] for r in read_jsonl(stage.path("rewarded.jsonl"))}
    for pair in rows(run, "sipf", 2, "pairs.jsonl"):
        better, worse = (worth[pair["problem"], tuple(pair[f"{side}_ids"])] for side in ("chosen", "rejected"))
        assert better - worse >= stage.config.pairs.eta


def test_expo_goes_on_from_the_base_through_the_trained_model(run):
    make(run, "expo", 2)
    config = open_run(run).model
    stage = STAGES["04_evaluate"](run, "expo", 0, 2)
    weights = [load_policy(config, stage.policy_input(t).get("policy", [None])[0]).state_dict() for t in (0, 1, 2)]
    for name, w_2 in weights[2].items():
        w_0, w_1 = weights[0][name], weights[1][name]
        assert torch.allclose(w_2, w_1 + 0.3 * (w_1 - w_0), atol=1e-6), name
    assert not torch.equal(
        weights[2]["model.layers.0.mlp.up_proj.weight"], weights[1]["model.layers.0.mlp.up_proj.weight"]
    )


def test_what_a_round_used_up_is_what_is_in_its_files(run):
    for method in ("star", "sipf"):
        make(run, method, 3)
    make(run, "expo", 2)
    spent = spent_table(run, open_run(run)).set_index(["method", "iteration"])
    drawn = rows(run, "star", 1, "samples.jsonl", "01_sample")
    extra = json.loads(STAGES["01b_reward"](run, "star", 0, 1).path("reward.json").read_text())
    assert spent.loc[("star", 1), "drawn"] == sum(len(s["token_ids"]) for s in drawn) + extra["drawn_tokens"]
    assert spent.loc[("star", 1), "samples"] == len(drawn) + extra["samples"]
    assert spent.loc[("expo", 2), ["samples", "drawn", "trained"]].tolist() == [0, 0, 0]
    assert spent.loc[("sipf", 1), "drawn"] == 0 and spent.loc[("sipf", 2), "drawn"] > spent.loc[("expo", 1), "drawn"]
    for method, steps in (("star", [6, 6, 6]), ("sipf", [3, 6, 6]), ("expo", [6])):  # the warm start was set to 3
        trained = [STAGES["03_train"](run, method, 0, t).path("training.json") for t in range(1, len(steps) + 1)]
        assert [json.loads(path.read_text())["steps"] for path in trained] == steps
    reward = json.loads(STAGES["01b_reward"](run, "sipf", 0, 2).path("reward.json").read_text())
    assert spent.loc[("sipf", 2), "samples"] == len(drawn) + 4 * reward["prefixes_simulated"] > len(drawn)
    # Six steps of eight pairs, or of sixteen responses: as many responses, so nearly as many tokens.
    one, other = spent.loc[("star", 2), "trained"], spent.loc[("expo", 1), "trained"]
    assert 0.8 < one / other < 1.25


@pytest.mark.parametrize(("name", "method", "t"), [("01b_reward", "self_rewarding", 1), ("03b_extrapolate", "expo", 2)])
def test_the_notebooks_of_the_new_stages_leave_the_same_files(run, tmp_path, name, method, t):
    make(run, method, t)
    stage = STAGES[name](run, method, 0, t)
    before = stage.manifest()["outputs"]
    run_notebook(
        NOTEBOOKS / f"{name}.ipynb",
        tmp_path / "x.ipynb",
        {"run": str(run), "method": method, "seed": 0, "iteration": t},
        1,
    )
    assert stage.is_done() and stage.manifest()["outputs"] == before
