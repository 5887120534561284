"""Methods side by side: their recipes, what they reached and what they used up (`06_methods.ipynb`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd

from ..methods.recipes import Method, Round
from ..model.records import Pair
from ..run.config import Config
from ..run.stages.evaluate import EvaluateStage
from ..run.stages.extrapolate import ExtrapolateStage
from ..run.stages.pairs import PairsStage
from ..run.stages.reward import RewardStage
from ..run.stages.train import TrainStage
from ..settings import TaskConfig
from ..tasks import get_task
from ..tasks.base import Problem, Task
from .tables import MODEL, all_rounds, certainty, marked, paired, percent, right_problems

SPENT = {"samples": "samples", "drawn": "tokens drawn", "trained": "tokens trained on"}  # column -> in words
REFERENCES = {"moving": "M_t", "M_0": "M_0", "none": "-"}  # a moving reference is the model that was sampled
# Of a round: the choices, and in which rounds each is one. Gold needs no reward, the NLL no reference.
CHOICES: dict[str, Callable[[Round], bool]] = {
    "reward": lambda choices: choices.part("selection").rewards,
    "selection": lambda choices: choices.trains,
    "loss": lambda choices: True,
    "start": lambda choices: choices.trains,
    "reference": lambda choices: choices.part("loss").reference,
    "accumulate": lambda choices: choices.trains,
}


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
        training = trainer(run, method, seed, t, config).facts("training.json")
        reward, continuations = {}, 0
        audit = PairsStage(run, method, seed, t, config).facts("audit.json") if choices.trains else {}
        if choices.has_reward_stage:
            stage = RewardStage(run, method, seed, t, config)
            reward = stage.facts("reward.json")
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
    total = spent.sort_values("iteration").set_index(MODEL).groupby(["method", "seed"])[[*SPENT]].cumsum().reset_index()
    return test.merge(total, on=MODEL, how="left").fillna(dict.fromkeys(SPENT, 0)).astype(dict.fromkeys(SPENT, int))


def forward_passes(table: pd.DataFrame) -> pd.Series:
    """Compute in forward passes of one token: one for a token drawn, three for one trained on."""
    return table.drawn + 3 * table.trained


def material(recipe: Method) -> str:
    """What a method trains on, round by round, as its parts say: "gold, then pairs"."""
    kinds = []
    for choices in recipe.rounds:
        selection = choices.part("selection")
        kind = ("pairs" if selection.pairs else "responses") + (" with gold" if selection.gold else "")
        kinds.append("extrapolation" if not choices.trains else kind if selection.samples else "gold")
    return ", then ".join(dict.fromkeys(kinds))


def unlike(one: Method, other: Method) -> list[str]:
    """The choices in which two methods differ, of those that both have."""
    apart = []
    for choice, has in CHOICES.items():
        here, there = (list(dict.fromkeys(getattr(r, choice) for r in m.rounds if has(r))) for m in (one, other))
        apart += [choice] if here and there and here != there else []
    return apart


def differences(run: Path, config: Config) -> pd.DataFrame:
    """How far each method's last model is ahead of each other's, from the greedy answers to the same test problems.

    A row for each `method` and the one it is held `against`, the best method first; the other columns are those of
    `tables.paired`.
    """
    right = {m: right_problems(run, config, m, config.rounds(m)) for m in config.methods}
    ranked = sorted(right, key=lambda m: -mean(mean(own.values()) for own in right[m]))
    rows = [{"method": a, "against": b, **paired(right[a], right[b])} for a, b in permutations(ranked, 2)]
    return pd.DataFrame(rows, columns=["method", "against", "points", "low", "high", "p", "told_apart"])


def base_of(config: Config) -> str:
    """The method that the others are held against: IRPO, or the first one of a run without it."""
    return "irpo" if "irpo" in config.methods else config.methods[0]


def ahead_by_iteration(run: Path, config: Config) -> pd.DataFrame:
    """How far each method is ahead of IRPO (of the first method, in a run without it) after the same iteration."""
    base, rows = base_of(config), []
    of_base = cache(lambda t: right_problems(run, config, base, t))
    for method in [m for m in config.methods if m != base]:
        row = {"method": config.recipe(method).label}
        for t in range(1, min(map(config.rounds, (method, base))) + 1):
            row[f"M_{t}"] = marked(paired(right_problems(run, config, method, t), of_base(t)))
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def family_table(metrics: pd.DataFrame, spent: pd.DataFrame, ahead: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Greedy test accuracy by iteration, the difference to IRPO, and what was used up: a row for each method.

    Methods that train on the same come together; among these, and of these groups, the best last model comes first.
    Accuracy is in percent: mean ± standard deviation over seeds. Samples and tokens are means over seeds of all rounds.

    Args:
        ahead: as `differences` gives it.
    """
    test, rows, base = metrics[metrics.split == "test"], [], base_of(config)
    iterations = sorted(set(test.iteration) - {0})
    against = {row.method: row for row in ahead[ahead.against == base].itertuples()}
    used = spent.groupby(["method", "seed"])[[*SPENT]].sum().groupby("method").mean()
    for method, own in test.groupby("method", sort=False):
        last, recipe, row = own[own.iteration == own.iteration.max()], config.recipe(method), against.get(method)
        cells: dict[str, Any] = {"trained on": material(recipe), "method": recipe.label}
        cells[f"unlike {base}"] = ", ".join(unlike(recipe, config.recipe(base)))
        cells |= {f"M_{t}": percent(own[own.iteration == t].greedy) for t in iterations}
        cells[f"points ahead of {base}"] = marked(row._asdict()) if row else ""
        if last.steps_right.notna().any():
            cells |= {"steps (last)": percent(last.steps_right), "lucky (last)": percent(last.right_for_wrong_reason)}
        cells |= {name: f"{used[column][method]:,.0f}" for column, name in SPENT.items()}
        rows.append((last.greedy.mean(), cells))
    # The best method's group, then the best of those that are left, and so on: a group is where its first one is.
    rows.sort(key=lambda row: -row[0])
    groups = list(dict.fromkeys(cells["trained on"] for _, cells in rows))
    table = pd.DataFrame(sorted((cells for _, cells in rows), key=lambda cells: groups.index(cells["trained on"])))
    table["trained on"] = table["trained on"].mask(table["trained on"].duplicated(), "")
    return table


def trained_on(run: Path, config: Config) -> pd.DataFrame | None:
    """How many of the chosen responses of every round have every step right; percent, mean over seeds.

    No method sees it. The records that are counted are pairs or single responses. None for a task that does not know
    the truth of a step.
    """
    if "steps_right" not in EvaluateStage(run, config.methods[0], 0, 0, config).facts("evaluation.json")["test"]:
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
        selection = choices.part("selection")
        if selection.partial:  # no whole solutions, of which the task could say whether they are right
            continue
        # Of a group those that are to become more likely.
        pairs = [pair for pair in pairs if not selection.signed or pair.reward_gap > 0]
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


def differences_in_words(run: Path, metrics: pd.DataFrame, ahead: pd.DataFrame, config: Config) -> list[str]:
    """The best and the worst, which methods IRPO is ahead of, how many pairs can be told apart, and the judge.

    Args:
        ahead: as `differences` gives it.
    """
    test = metrics[metrics.split == "test"]
    last = test[test.iteration == test.method.map(config.rounds)].groupby("method", sort=False).greedy.mean() * 100
    label = {m: config.recipe(m).label for m in config.methods}
    best, worst = last.idxmax(), last.idxmin()
    ranked = (
        f"The last model of {label[best]} solves the most, {last[best]:.1f} %, "
        f"that of {label[worst]} the fewest, {last[worst]:.1f} %."
    )
    if last[best] == last[worst]:
        ranked = f"The last models of all methods solve {last[best]:.1f} %."
    texts = [f"M_0 solves {test[test.iteration == 0].greedy.mean() * 100:.1f} % of the test problems. {ranked}"]
    base, pairs = base_of(config), len(ahead) // 2
    for verb, sign in (("is ahead of", 1), ("is behind", -1), ("cannot be told apart from", 0)):
        others = ahead[(ahead.method == base) & (ahead.told_apart * np.sign(ahead.points) == sign)].itertuples()
        named = "; ".join(f"{label[row.against]}, {certainty(row._asdict())}" for row in others)
        texts += [f"{label[base]} {verb}: {named}."] if named else []
    if pairs > 1:
        texts.append(f"Pairs of methods that can be told apart: {ahead.told_apart.sum() // 2} of {pairs}.")
    for method in config.methods:
        if config.recipe(method).round(1).has_reward_stage:
            texts += _judge_in_words(run, config, method)
    return texts


def _judge_in_words(run: Path, config: Config, method: str) -> list[str]:
    """What a first round's judge is worth, a text per seed; nothing of a reward that gives no verdict on itself."""
    facts = [RewardStage(run, method, seed, 1, config).facts("reward.json") for seed in range(config.seeds)]
    name = f"The judge of {config.recipe(method).label}, before the first round"
    return [f"{name}, seed {seed}: {own['verdict']}" for seed, own in enumerate(facts) if "verdict" in own]
