"""Online rounds: advantages, the policy gradient against TRL's GRPOTrainer, and a policy that draws while it trains."""

import json
import math
import random
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import OUTPUTS, drive, remove_run
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.files import NOTEBOOKS, ConfigError, read_jsonl, write_text
from irpo_utils.methods.online import Draws
from irpo_utils.methods.sampler import Sampler
from irpo_utils.methods.select import group_of, group_scaled_of
from irpo_utils.model import load, training
from irpo_utils.model.logprobs import pair_batch
from irpo_utils.model.losses import Scores, dpo_nll, policy_gradient, policy_gradient_mean
from irpo_utils.model.records import Pair, Sample
from irpo_utils.model.training import batch_losses
from irpo_utils.run.config import dump, read_config
from irpo_utils.run.notebooks import run_notebook
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import OnlineStage, TrainStage, plan
from irpo_utils.settings import PairsConfig

rewards = st.lists(st.sampled_from([0.0, 0.25, 1.0, None]), min_size=2, max_size=9)


def group(values):
    return [Sample("p", i, "", None, r, None, True, -1.0, (i, 2)) for i, r in enumerate(values)]


def advantages(select, values):
    return [s.reward for s, _ in select(group(values), None, PairsConfig(), random.Random(0))]


def test_an_advantage_is_the_reward_above_the_mean_of_the_others():
    assert advantages(group_of, [1.0, 0.0, 0.0, None]) == [1.0, -1 / 3, -1 / 3, -1 / 3]
    assert advantages(group_of, [1.0, 1.0, 1.0]) == advantages(group_scaled_of, [0.0, None]) == []
    assert advantages(group_scaled_of, [0.3, 0.1 + 0.2]) == []  # they differ in the last digit
    assert advantages(group_scaled_of, [1.0, 0.0]) == pytest.approx([0.5**0.5, -(0.5**0.5)])


@given(rewards)
def test_advantages_add_up_to_nothing_and_grpo_s_have_a_standard_deviation_of_one(values):
    plain, scaled = advantages(group_of, values), advantages(group_scaled_of, values)
    assert sum(plain) == pytest.approx(0, abs=1e-9) and sum(scaled) == pytest.approx(0, abs=1e-9)
    if plain:
        own = [r or 0.0 for r in values]
        mean = sum(own) / len(own)
        assert plain == pytest.approx([(r - mean) * len(own) / (len(own) - 1) for r in own])  # Dr. GRPO's, N / (N - 1)
        assert sum(a * a for a in scaled) == pytest.approx(len(own) - 1)


def test_the_policy_gradient_is_its_formula_in_float64():
    logps = torch.tensor([-9.0, -30.0], dtype=torch.float64, requires_grad=True)
    scores = Scores(logps, torch.zeros(2), None, None, torch.tensor([3, 20]), None, torch.tensor([0.75, -0.25]))
    assert policy_gradient(scores).total.tolist() == [0.75 * 9, -0.25 * 30]
    assert policy_gradient_mean(scores).total.tolist() == [0.75 * 3, -0.25 * 1.5]
    assert policy_gradient(scores._replace(reward_gaps=None)).total.tolist() == [9, 30]  # each counts as 1


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_gradients_are_those_of_trl_s_grpo_trainer(name, tokenizer, tmp_path):
    """TRL's loss at a ratio of 1, on the same token ids and advantages."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from irpo_utils.model.packaged import SEED_MODEL

    prompt = tokenizer("Question: Ann has 12 pens. Ann sells half of them. How many pens does Ann have?\nAnswer:\n")
    texts = ["12 / 2 = 6\nFinal answer: 6", "12 - 2 = 10\nFinal answer: 10", "Final answer: 9", "Final"]
    ids = [[*tokenizer(t, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for t in texts]
    worth = [1.0, 0.0, 0.0, 0.0]
    # Leave-one-out is N / (N - 1) of Dr. GRPO's.
    own = advantages(group_scaled_of, worth) if name == "grpo" else [3 / 4 * a for a in advantages(group_of, worth)]
    length = max(map(len, ids))
    policy = AutoModelForCausalLM.from_pretrained(SEED_MODEL, dtype="float32")
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        loss_type=name,
        scale_rewards="group" if name == "grpo" else "none",
        max_completion_length=length,
        num_generations=4,
        per_device_train_batch_size=4,
        beta=0.0,
        temperature=1.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": "Question:"}])
    trainer = GRPOTrainer(policy, lambda completions, **_: [0.0] * 4, arguments, data, processing_class=tokenizer)
    pads = [length - len(i) for i in ids]
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(
        policy,
        {
            "prompt_ids": torch.tensor([prompt.input_ids] * 4),
            "prompt_mask": torch.ones(4, len(prompt.input_ids), dtype=torch.long),
            "completion_ids": torch.tensor([i + [0] * pad for i, pad in zip(ids, pads, strict=True)]),
            "completion_mask": torch.tensor([[1] * len(i) + [0] * pad for i, pad in zip(ids, pads, strict=True)]),
            "advantages": torch.tensor(own),
        },
    )
    loss.backward()
    theirs = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    pairs = [
        Pair("p", "", "", "", tuple(prompt.input_ids), tuple(i), (), None, None, reward_gap=a)
        for i, a in zip(ids, own, strict=True)
    ]
    total = batch_losses(policy, pair_batch(pairs), policy_gradient_mean if name == "grpo" else policy_gradient, {})[0]
    mean = total.total.mean() / (1 if name == "grpo" else length)
    mean.backward()
    ours = [p.grad for p in policy.parameters() if p.grad is not None]
    # TRL divides by the standard deviation and 1e-4; ours is not shifted.
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert max(g.abs().max() for g in ours) > 1e-3


@pytest.fixture
def online(config):
    train = {"max_steps": 6, "eval_every": 3, "batch": 4, "micro_batch": 2, "sync_every": 2}
    return config.but(train=config.train.but(**train), pairs=config.pairs.but(k=1), threads=1)


def train_on(draw, config, folder, tokenizer, task, **options):
    """Train M_0 on what `draw(sampler)` draws; returns the facts."""
    model = load.load_policy(config.model, trainable=True, seed=0, threads=1)
    draws = draw(Sampler.of(model, tokenizer, task, config))
    settings = {"weights": {"beta": 0.1, "alpha": 1.0}, "has_reference": True, "sampled_by_start": True, "seed": 0}
    return training.train(
        model,
        draws(0),
        folder,
        loss=dpo_nll,
        config=config.train,
        show=lambda line: None,
        draw=draws,
        **(settings | options),
    )


def drawing(config, task, folder, size=24):
    """`train_on`'s draw: fresh pairs of the policy that is trained."""
    problems = task.problems("train")[:size]
    return lambda sampler: Draws(sampler, problems, "pairs", config.train.batch, 1.0, 0, folder / "draws")


def weights_of(folder):
    return (folder / "best" / "adapter_model.safetensors").read_bytes()


def test_every_draw_is_of_the_policy_as_it_is_then(online, tokenizer, task, tmp_path):
    """A later draw has the log-probabilities of the trained policy, not those of M_0, and its reference stays M_0."""
    facts = train_on(drawing(online, task, tmp_path), online, tmp_path, tokenizer, task)
    assert facts["dpo_at_start"] == pytest.approx(training.LN2, abs=1e-5) and facts["steps"] == 6
    files = sorted((tmp_path / "draws").glob("*.jsonl"))
    assert [file.stem for file in files] == ["000000", "000002", "000004"]
    drawn = [Pair.read(file, "") for file in files]
    assert [len(pairs) for pairs in drawn] == [8, 8, 8]
    assert facts["trained_tokens"] == sum(training.pair_tokens(pair) for pairs in drawn for pair in pairs)
    m_0 = load.load_policy(online.model, threads=1)
    gaps = []
    for pairs in drawn:
        scored = training.reference_logps(m_0, pairs)
        gaps.append(max(abs(pair.chosen_logp - logp) for pair, (logp, _) in zip(pairs, scored, strict=True)))
    assert gaps[0] < 1e-3 < min(gaps[1:])
    # The first step of the second draw: the policy that drew it is the one trained, two steps from its reference.
    steps = read_jsonl(tmp_path / "steps.jsonl")
    mean = sum(pair.chosen_logp for pair in drawn[1][:4]) / 4
    assert steps[2]["chosen_logp"] == pytest.approx(mean, abs=1e-4)
    assert steps[3]["chosen_logp"] != pytest.approx(sum(p.chosen_logp for p in drawn[1][4:]) / 4, abs=1e-4)
    # Its DPO terms, by hand: held against M_0, and not against the policy that drew.
    first = drawn[1][:4]
    terms = []
    for pair, (chosen, rejected) in zip(first, training.reference_logps(m_0, first), strict=True):
        margin = 0.1 * ((pair.chosen_logp - chosen) - (pair.rejected_logp - rejected))
        terms.append(math.log(1 + math.exp(-margin)))
    assert steps[2]["dpo"] == pytest.approx(sum(terms) / 4, abs=1e-5)
    assert abs(steps[2]["dpo"] - training.LN2) > 3e-5


def test_a_training_killed_between_draws_ends_the_same(online, tokenizer, task, tmp_path):
    class Killed(BaseException):
        pass

    def score(policy):
        scored.append(1)
        if len(scored) == 2:
            raise Killed
        return 0.5

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_on(drawing(online, task, whole), online, whole, tokenizer, task, score=lambda policy: 0.5)
    scored: list[int] = []
    with pytest.raises(Killed):  # in step 6; a checkpoint lies at 3, within the second draw
        train_on(drawing(online, task, cut), online, cut, tokenizer, task, score=score)
    train_on(drawing(online, task, cut), online, cut, tokenizer, task, score=lambda policy: 0.5)
    assert weights_of(cut) == weights_of(whole)
    for file in (whole / "draws").iterdir():
        assert (cut / "draws" / file.name).read_bytes() == file.read_bytes()
    assert (cut / "steps.jsonl").read_bytes() == (whole / "steps.jsonl").read_bytes()


def test_problems_are_asked_in_turn_and_pairs_repeated_where_they_are_too_few(
    online, seed_model, tokenizer, task, tmp_path
):
    problems = task.problems("train")[:10]
    sampler = Sampler.of(seed_model, tokenizer, task, online)
    draws = Draws(sampler, problems, "pairs", 4, 1.0, 0, tmp_path)

    def ids(place, count, asked=()):
        found, behind = draws.next_problems(place, count, set(asked))
        return [p.id for p in found], behind

    whole, behind = ids(0, 10)
    assert sorted(whole) == sorted(p.id for p in problems) and behind == 10
    assert [name for start in range(0, 10, 3) for name in ids(start, min(3, 10 - start))[0]] == whole != ids(10, 10)[0]
    across, behind = ids(7, 6, asked=whole[:5])  # the end of a pass, and the next one without those asked already
    assert across[:3] == whole[7:] and len(across) == len({*across, *whole[:5]}) - 5 == 5
    assert behind > 10
    assert len(draws.fresh(online.train.max_steps - 1)[0]) == 4  # one step is left, and not two
    few = replace(draws, batch=40)  # 80 pairs are wanted, of 10 problems with one pair each at most
    pairs, counted = few.fresh(0)
    assert len(pairs) == 80 and counted["made"] <= 10 and counted["tried"] == 10
    assert len({(p.problem, p.chosen_ids) for p in pairs}) == counted["made"]


def test_nothing_to_learn_from_is_said(online, seed_model, tokenizer, task, tmp_path):
    cold = Sampler.of(seed_model, tokenizer, task, online)
    draws = Draws(
        cold, task.problems("train")[:4], "pairs", 4, 0.001, 0, tmp_path
    )  # all samples of a problem are alike
    with pytest.raises(ValueError, match="no pair can be made of 32 samples after step 0"):
        draws(0)
    assert not list(tmp_path.iterdir())


def test_the_switch_changes_the_stages_of_rounds_that_draw_and_no_other_s_key(tmp_path):
    on, off = (load_preset("micro", [f"train.sync_every={s}", "methods=irpo,sft_gold", "iterations=3"]) for s in (2, 0))

    def names(config, method):
        return [stage.name for stage in plan(config, tmp_path, method, 0)][1:]

    assert names(on, "irpo") == ["03c_online", "04_evaluate"] * 3
    assert names(on, "sft_gold") == names(off, "sft_gold")
    assert "train.sync_every" in OnlineStage(tmp_path, config=on).parameters()
    assert "train.sync_every" not in TrainStage(tmp_path, "sft_gold", config=on).parameters()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.processes=2"], "train.sync_every: .*train.processes"),
        (["train.engine=trl"], "train.sync_every: .*train.engine"),
        (["train.retrain_with_dev=true"], "train.sync_every: .*retrain_with_dev"),
        (["sampling.engine=vllm"], "train.sync_every: .*sampling.engine=transformers"),
        (["methods=scpo"], "train.sync_every: round 1 of scpo"),
        (["methods=orpo", "iterations=3"], "train.sync_every: round 2 of orpo"),
        (["methods=sft_chosen"], "train.sync_every: round 2 of sft_chosen .* M_t"),
        (["pairs.max_pairs=9"], "pairs.max_pairs: .*train.sync_every"),
        (["pairs.file=x.jsonl"], "pairs.file: .*train.sync_every"),
    ],
)
def test_what_cannot_draw_while_it_trains_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("micro", ["train.sync_every=2", *settings])


@pytest.fixture(scope="module")
def runs():
    """Small runs that draw every 2 and every 6 steps: steps between draws -> folder, and what the command printed."""
    found = {}
    for every in (2, 6):
        remove_run(f"test-online-{every}")
        done = drive(
            "micro", f"run=test-online-{every}", "methods=irpo,rloo", f"train.sync_every={every}", "iterations=1"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found[every] = OUTPUTS / f"test-online-{every}"
    yield found
    for every in found:
        remove_run(f"test-online-{every}")


def test_an_online_run_ends_with_its_report_and_is_done_then(runs):
    stage = OnlineStage(runs[2], "rloo", 0, 1)
    facts, audit = stage.result(), json.loads(stage.path("audit.json").read_text())
    assert [draw["step"] for draw in facts["draws"]] == [0, 2, 4]
    assert audit["samples"] == sum(draw["samples"] for draw in facts["draws"]) == 8 * audit["problems"]
    pairs = Pair.read(stage.path("pairs.jsonl"), "")
    assert len(pairs) == audit["pairs"] == 6 * 16 and not any(pair.rejected_ids for pair in pairs)
    assert "03c_online" in (runs[2] / "timing.csv").read_text() and len(pd.read_csv(runs[2] / "methods.csv"))
    again = drive("micro", "run=test-online-2", "methods=irpo,rloo", "train.sync_every=2", "iterations=1")
    assert again.returncode == 0 and again.stdout.count("done already") == 6


def test_the_sync_notebook_holds_each_interval_against_one_draw(runs, tmp_path):
    given = {"folder": str(tmp_path), "runs": [str(run) for run in runs.values()]}
    run_notebook(NOTEBOOKS / "14_online.ipynb", tmp_path / "executed.ipynb", given, threads=1)
    table = pd.read_csv(tmp_path / "differences.csv").set_index(["method", "every"])
    right = {}
    for every, run in runs.items():
        rows = read_jsonl(run / "irpo/seed_0/iteration_1/responses.jsonl")
        right[every] = [row["greedy"] == 1 for row in rows if row["split"] == "test"]
    by_hand = (sum(right[2]) - sum(right[6])) / len(right[2])
    assert table.gain["irpo", 2] == pytest.approx(by_hand) and table.gain["irpo", 6] == 0
    drawn = pd.read_csv(tmp_path / "syncs.csv").groupby(["method", "every"]).drawn.max()
    assert (drawn > 0).all() and drawn["irpo", 6] == OnlineStage(runs[6]).result()["draws"][0]["drawn_tokens"]


def test_one_method_may_draw_while_others_do_not():
    config = load_preset("micro", ["methods=rloo,scpo,sft_chosen", "rloo.train.sync_every=1"])
    assert config.for_round("rloo", 1).train.sync_every == 1 and config.for_round("scpo", 1).train.sync_every == 0


def test_a_loss_that_ignores_advantages_is_refused(tmp_path):
    chosen = {"reward": "answer", "selection": "group", "loss": "nll", "start": "M_t", "reference": "none"}
    (tmp_path / "mine.yaml").write_text(json.dumps({"mine": {"label": "mine", "rounds": [chosen]}}))
    with pytest.raises(ConfigError, match="'group' gives advantages, which the loss 'nll' ignores"):
        load_preset("micro", [f"recipes={tmp_path / 'mine.yaml'}", "methods=mine"])


def test_going_back_to_offline_counts_and_removes_what_the_online_round_left(runs, tmp_path):
    """One round's files are of one kind of round: the others' manifests and notebooks would lie."""
    run = tmp_path / "run"
    shutil.copytree(runs[6], run)
    config = read_config(run / "config.yaml", [("train.sync_every", "0")])
    write_text(run / "config.yaml", dump(config))
    online = run / "irpo/seed_0/iteration_1/03c_online.manifest.json"
    sample, pairs, train = (stage for stage in plan(config, run, "irpo", 0) if stage.name[:2] in ("01", "02", "03"))
    assert set(pairs.replaced()) == set(train.replaced()) == {online} and not sample.replaced()
    for stage in (sample, pairs):
        stage.begin().run()
        stage.finish()
    assert not online.exists() and not online.with_name("03c_online.ipynb").exists() and pairs.is_done()
