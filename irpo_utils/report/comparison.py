"""Methods side by side: their recipes, what they reached and what they used up (`06_methods.ipynb`)."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from ..model.records import Pair
from ..run.config import Config
from ..run.stages.evaluate import EvaluateStage, read_evaluation
from ..run.stages.extrapolate import ExtrapolateStage
from ..run.stages.pairs import PairsStage
from ..run.stages.reward import RewardStage
from ..run.stages.train import TrainStage
from ..settings import TaskConfig
from ..tasks import get_task
from ..tasks.base import Problem, Task
from .tables import MODEL, all_rounds, percent, read_facts

SPENT = ["samples", "drawn", "trained"]
REFERENCES = {"moving": "M_t", "M_0": "M_0", "none": "-"}  # a moving reference is the model that was sampled
CHOICES = ("reward", "selection", "loss", "start", "reference", "accumulate")  # of a round
# Methods that differ in one part, or nearly so.
NEIGHBOURS = [
    ("irpo", "dpo", "with and without the NLL term"),
    ("irpo", "sft_chosen", "the losers of the same pairs seen or not; from M_t or M_0"),
    ("star", "rest_em", "rationalizations, and every right sample instead of ten at most"),
    ("rft", "rest_em", "from M_t instead of M_0, and each right sample once"),
    ("dpo", "spin", "losers are wrong, or just the model's own"),
    ("dpo", "self_rewarding", "rewarded by the answer or by the model itself"),
    ("sipf", "orpo", "the same rounds, pairs by a process reward model or by the answer"),
    ("sipf", "sft_gold", "a round on gold and rounds of process feedback, or gold alone for all rounds"),
]


def recipe_table(config: Config) -> pd.DataFrame:
    """The recipes of a run's methods, a row for each kind of round."""
    rows = []
    for name in config.methods:
        recipe = config.recipe(name)
        once = len(recipe.rounds) - recipe.repeat  # rounds that come once, before those that go on
        for i, choices in enumerate(recipe.rounds):
            again = recipe.repeat and i >= once
            rows.append(
                {
                    "method": recipe.label if i == 0 else "",
                    "round": f"{i + 1}, {i + 1 + recipe.repeat}, ..." if again else str(i + 1),
                    "reward": choices.reward,
                    "selection": choices.selection + (", accumulated" if choices.accumulate else ""),
                    "loss": choices.loss,
                    "start": choices.start,
                    "reference": REFERENCES[choices.reference],
                    "source": recipe.source if i == 0 else "",
                }
            )
    return pd.DataFrame(rows)


def spent_table(run: Path, config: Config) -> pd.DataFrame:
    """What every round used up: samples, tokens drawn, and tokens of prompts and responses that were trained on."""
    rows = []
    for method, seed, t, choices in all_rounds(config):
        trainer = TrainStage if choices.trains else ExtrapolateStage
        training = read_facts(trainer(run, method, seed, t, config), "training.json")
        reward, continuations = {}, 0
        audit = read_facts(PairsStage(run, method, seed, t, config), "audit.json") if choices.trains else {}
        if choices.has_reward_stage:
            stage = RewardStage(run, method, seed, t, config)
            reward = read_facts(stage, "reward.json")
            continuations = reward.get("prefixes_simulated", 0) * stage.config.process.continuations
        rows.append(
            {
                "method": method,
                "seed": seed,
                "iteration": t,
                "samples": audit.get("samples", 0) + reward.get("samples", 0) + continuations,
                "drawn": audit.get("drawn_tokens", 0) + reward.get("drawn_tokens", 0),
                "trained": training["trained_tokens"] + reward.get("trained_tokens", 0),
            }
        )
    return pd.DataFrame(rows)


def by_seed(metrics: pd.DataFrame, spent: pd.DataFrame) -> pd.DataFrame:
    """Test results, a row for each method, seed and iteration, with what was used up until then."""
    test = metrics[metrics.split == "test"].drop(columns=["run", "split"])
    total = spent.sort_values("iteration").set_index(MODEL).groupby(["method", "seed"])[SPENT].cumsum().reset_index()
    return test.merge(total, on=MODEL, how="left").fillna(dict.fromkeys(SPENT, 0)).astype(dict.fromkeys(SPENT, int))


def forward_passes(table: pd.DataFrame) -> pd.Series:
    """Compute in forward passes of one token: one for a token drawn, three for one trained on."""
    return table.drawn + 3 * table.trained


def family_table(metrics: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Greedy test accuracy of each method by iteration, the best last model first.

    In percent: mean ± standard deviation over seeds.
    """
    test, rows = metrics[metrics.split == "test"], []
    iterations = sorted(set(test.iteration) - {0})
    for method, own in test.groupby("method", sort=False):
        last = own[own.iteration == own.iteration.max()]
        row: dict[str, Any] = {"method": config.recipe(method).label, "seeds": own.seed.nunique()}
        row |= {f"M_{t}": percent(own[own.iteration == t].greedy) for t in [0, *iterations]}
        if last.steps_right.notna().any():
            row |= {"steps (last)": percent(last.steps_right), "lucky (last)": percent(last.right_for_wrong_reason)}
        rows.append((last.greedy.mean(), row))
    return pd.DataFrame([row for _, row in sorted(rows, key=lambda pair: -pair[0])])


def budget_table(spent: pd.DataFrame, config: Config) -> pd.DataFrame:
    """What each method used up in all its rounds, in thousands, mean over seeds."""
    whole = spent.groupby(["method", "seed"], sort=False)[SPENT].sum()
    whole["forward passes"] = forward_passes(whole)
    mean = whole.groupby("method", sort=False).mean() / 1000
    names = {"drawn": "tokens drawn", "trained": "tokens trained on"}
    table = mean.rename(columns=lambda name: f"{names.get(name, name)} (k)").map("{:,.0f}".format).reset_index()
    rounds = spent.groupby("method", sort=False).iteration.max()
    table.insert(1, "rounds", [rounds[m] for m in table.method])
    table["method"] = [config.recipe(m).label for m in table.method]
    return table


def trained_on(run: Path, config: Config) -> pd.DataFrame | None:
    """How many of the chosen responses of every round have every step right; percent, mean over seeds.

    No method sees it. The records that are counted are pairs or single responses. None for a task that does not know
    the truth of a step.
    """
    if "steps_right" not in read_evaluation(EvaluateStage(run, config.methods[0], 0, 0, config))["test"]:
        return None

    @cache
    def drawn(own: TaskConfig) -> tuple[Task, dict[str, Problem]]:
        task = get_task(own)
        return task, {p.id: p for split in ("train", "dev") for p in task.problems(split)}

    rows = []
    for method, seed, t, choices in all_rounds(config):
        if not choices.trains or choices.selection == "file":  # whose problems the task does not know
            continue
        task, problems = drawn(config.for_seed(seed).task)
        pairs = Pair.read(PairsStage(run, method, seed, t, config).path("pairs.jsonl"), "02_pairs.ipynb")
        checked = [task.check_steps(problems[pair.problem], pair.chosen) for pair in pairs]
        clean = sum(all(verdict == "right" for _, verdict in steps) for steps in checked)
        rows.append({"method": method, "iteration": t, "records": len(pairs), "clean": clean / len(pairs)})
    if not rows:
        return None
    mean = pd.DataFrame(rows).groupby(["method", "iteration"], sort=False).mean().unstack("iteration")
    table = pd.DataFrame({"method": [config.recipe(m).label for m in mean.index]})
    for t in mean.clean:
        both = zip(mean.clean[t], mean.records[t], strict=True)
        table[f"M_{t}"] = ["" if pd.isna(clean) else f"{clean:.0%} of {count:,.0f}" for clean, count in both]
    return table


def neighbours(config: Config) -> list[tuple[str, str, str]]:
    """(method, another, in what they differ): those of `NEIGHBOURS`, and all whose recipes differ in one choice."""
    found = [row for row in NEIGHBOURS if {*row[:2]} <= {*config.methods}]
    for one, other in combinations(config.methods, 2):
        both = [config.recipe(method).rounds for method in (one, other)]
        if len(both[0]) == len(both[1]) and not any({one, other} == {*row[:2]} for row in found):
            pairs = {(c, getattr(a, c), getattr(b, c)) for a, b in zip(*both, strict=True) for c in CHOICES}
            apart = [f"{choice}: {here} or {there}" for choice, here, there in pairs if here != there]
            found += [(one, other, *apart)] if len(apart) == 1 else []
    return found


def differences_in_words(run: Path, metrics: pd.DataFrame, config: Config) -> list[str]:
    """What the figures say: the best and the worst, each pair of methods that differ in one part, and the judge."""
    test = metrics[metrics.split == "test"].set_index(MODEL).greedy * 100
    final = {m: [test[m, s, config.rounds(m)] for s in range(config.seeds)] for m in config.methods}
    mean = {m: sum(values) / len(values) for m, values in final.items()}
    label = {m: config.recipe(m).label for m in config.methods}
    best, worst = max(mean, key=mean.get), min(mean, key=mean.get)
    m0 = sum(test[config.methods[0], s, 0] for s in range(config.seeds)) / config.seeds
    ranked = (
        f"The last model of {label[best]} solves the most, {mean[best]:.1f} %, "
        f"that of {label[worst]} the fewest, {mean[worst]:.1f} %."
    )
    if mean[best] == mean[worst]:
        ranked = f"The last models of all methods solve {mean[best]:.1f} %."
    texts = [f"M_0 solves {m0:.1f} % of the test problems. {ranked}"]
    for one, other, what in neighbours(config):
        apart = [a - b for a, b in zip(final[one], final[other], strict=True)]
        ahead = sum(d > 0 for d in apart)
        every = ", ".join(f"{d:+.1f}" for d in apart)
        texts.append(
            f"{label[one]} against {label[other]} ({what}): {mean[one]:.1f} and {mean[other]:.1f} %, "
            f"ahead in {ahead} of {len(apart)} seeds ({every} points)."
        )
    for method in config.methods:
        if config.recipe(method).round(1).has_reward_stage:
            texts += _judge_in_words(run, config, method)
    return texts


def _judge_in_words(run: Path, config: Config, method: str) -> list[str]:
    """What a first round's judge is worth, a text for each seed; nothing of a reward that gives no verdict on itself."""
    facts = [read_facts(RewardStage(run, method, seed, 1, config), "reward.json") for seed in range(config.seeds)]
    name = f"The judge of {config.recipe(method).label}, before the first round"
    return [f"{name}, seed {seed}: {own['verdict']}" for seed, own in enumerate(facts) if "verdict" in own]
