"""Methods side by side: their recipes, what they reached and what they used up (`06_methods.ipynb`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import MissingArtefact, read_jsonl, relative
from ..methods.recipes import methods
from ..run.config import Config
from ..run.store import Stage, arms
from ..tasks import get_task

ARM = ["method", "seed", "iteration"]
SPENT = ["samples", "drawn", "trained"]


def recipe_table(names: list[str]) -> pd.DataFrame:
    """The recipes, a row for each kind of round."""
    rows = []
    for name in names:
        recipe = methods()[name]
        first = len(recipe.kinds) - recipe.repeat
        for i, kind in enumerate(recipe.kinds):
            again = recipe.repeat and i >= first
            reference = kind.start if "dpo" in kind.loss else "-"
            rows.append(
                {
                    "method": recipe.label if i == 0 else "",
                    "round": f"{i + 1}, {i + 1 + recipe.repeat}, ..." if again else str(i + 1),
                    "reward": kind.reward,
                    "selection": kind.selection + (", accumulated" if kind.accumulate else ""),
                    "loss": kind.loss,
                    "start": kind.start,
                    "reference": reference,
                    "source": recipe.source if i == 0 else "",
                }
            )
    return pd.DataFrame(rows)


def spent_table(run: Path, config: Config) -> pd.DataFrame:
    """What every round of every arm used up: samples, tokens drawn, and tokens of prompts and responses trained on."""
    rows = []
    for method, seed in arms(config):
        for t in range(1, config.rounds(method) + 1):
            kind = methods()[method].round(t)
            facts = lambda name, file: _facts(Stage(name, run, method, seed, t), file)  # noqa: B023, E731 - used here only
            audit = facts("02_pairs", "audit.json") if kind.loss != "extrapolate" else {}
            reward = facts("01b_reward", "reward.json") if kind.scored else {}
            training = facts("03_train", "training.json")
            continuations = reward.get("prefixes_simulated", 0) * config.process.continuations
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


def _facts(stage: Stage, file: str) -> dict[str, Any]:
    path = stage.path(file)
    if not path.exists():
        raise MissingArtefact(f"{relative(path)} is missing; run notebooks/{stage.name}.ipynb for it, or ./run_all.sh")
    return json.loads(path.read_text())


def by_seed(metrics: pd.DataFrame, spent: pd.DataFrame) -> pd.DataFrame:
    """Test results, a row for each method, seed and iteration, with what was used up until then."""
    test = metrics[metrics.split == "test"].drop(columns=["run", "split"])
    total = spent.sort_values("iteration").set_index(ARM).groupby(["method", "seed"])[SPENT].cumsum().reset_index()
    return test.merge(total, on=ARM, how="left").fillna(dict.fromkeys(SPENT, 0)).astype(dict.fromkeys(SPENT, int))


def forward_passes(table: pd.DataFrame) -> pd.Series:
    """Compute in forward passes of one token: one for a token drawn, three for one trained on."""
    return table.drawn + 3 * table.trained


def _spread(values: pd.Series) -> str:
    values = values.dropna() * 100
    if not len(values):
        return ""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def family_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Greedy test accuracy of each method by iteration, the best last model first; percent, mean ± standard deviation over seeds."""
    test, rows = metrics[metrics.split == "test"], []
    iterations = sorted(set(test.iteration) - {0})
    for method, mine in test.groupby("method", sort=False):
        last = mine[mine.iteration == mine.iteration.max()]
        row: dict[str, Any] = {"method": methods()[method].label, "seeds": mine.seed.nunique(), "M_0": _spread(mine[mine.iteration == 0].greedy)}  # fmt: skip
        row |= {f"M_{t}": _spread(mine[mine.iteration == t].greedy) for t in iterations}
        if last.steps_right.notna().any():
            row |= {"steps (last)": _spread(last.steps_right), "lucky (last)": _spread(last.right_for_wrong_reason)}
        rows.append((last.greedy.mean(), row))
    return pd.DataFrame([row for _, row in sorted(rows, key=lambda pair: -pair[0])])


def budget_table(spent: pd.DataFrame) -> pd.DataFrame:
    """What each method used up in a whole arm, in thousands, mean over seeds."""
    whole = spent.groupby(["method", "seed"], sort=False)[SPENT].sum()
    whole["forward passes"] = forward_passes(whole)
    mean = whole.groupby("method", sort=False).mean() / 1000
    names = {"samples": "samples (k)", "drawn": "tokens drawn (k)", "trained": "tokens trained on (k)", "forward passes": "forward passes (k)"}  # fmt: skip
    table = mean.rename(columns=names).map(lambda value: f"{value:,.0f}").reset_index()
    rounds = spent.groupby("method", sort=False).iteration.max()
    table.insert(1, "rounds", [rounds[m] for m in table.method])
    table["method"] = [methods()[m].label for m in table.method]
    return table


def trained_on(run: Path, config: Config) -> pd.DataFrame | None:
    """How many of the chosen responses of every round have every step right, for a task that knows; percent, mean over seeds.

    No method sees it. `records` are pairs or single responses; None for a task without such a truth.
    """
    task = get_task(config.task)
    if not hasattr(task, "judge_steps"):
        return None
    problems = {p.id: p for split in ("train", "dev") for p in task.problems(split)}
    rows = []
    for method, seed in arms(config):
        for t in range(1, config.rounds(method) + 1):
            if methods()[method].round(t).selection == "none":
                continue
            stage = Stage("02_pairs", run, method, seed, t)
            pairs = read_jsonl(stage.path("pairs.jsonl"), "02_pairs.ipynb")
            steps = [task.judge_steps(problems[pair["problem"]], pair["chosen"]) for pair in pairs]
            clean = sum(all(verdict == "right" for _, verdict in mine) for mine in steps)
            rows.append({"method": method, "iteration": t, "records": len(pairs), "clean": clean / len(pairs)})
    mean = pd.DataFrame(rows).groupby(["method", "iteration"], sort=False).mean().unstack("iteration")
    text = {f"M_{t}": [f"{clean:.0%} of {count:,.0f}" if count == count else "" for clean, count in zip(mean.clean[t], mean.records[t], strict=True)] for t in mean.clean}  # fmt: skip
    return pd.DataFrame({"method": [methods()[m].label for m in mean.index], **text})


def in_words(run: Path, metrics: pd.DataFrame, spent: pd.DataFrame, config: Config) -> list[str]:
    """What the figures say: the best and the worst, each pair of methods that differ in one part, and the judge."""
    test = metrics[metrics.split == "test"].set_index(ARM).greedy * 100
    label = lambda method: methods()[method].label  # noqa: E731
    final = {m: [test[m, s, config.rounds(m)] for s in range(config.seeds)] for m in config.methods}
    mean = {m: sum(values) / len(values) for m, values in final.items()}
    best, worst = max(mean, key=mean.get), min(mean, key=mean.get)
    m0 = test[config.methods[0], 0, 0]
    told = [
        f"M_0 solves {m0:.1f} % of the test problems. The last model of {label(best)} solves the most, {mean[best]:.1f} %, that of {label(worst)} the fewest, {mean[worst]:.1f} %."
    ]
    for one, other, what in NEIGHBOURS:
        if one in final and other in final:
            apart = [a - b for a, b in zip(final[one], final[other], strict=True)]
            ahead = sum(d > 0 for d in apart)
            every = ", ".join(f"{d:+.1f}" for d in apart)
            told.append(
                f"**{label(one)} against {label(other)}** ({what}): {mean[one]:.1f} and {mean[other]:.1f} %, ahead in {ahead} of {len(apart)} seeds ({every} points)."
            )
    for method, seed in arms(config):
        if seed == 0 and methods()[method].round(1).reward == "judge":
            told += _judge_in_words(run, config, method)
    return told


# Methods that differ in one part, or nearly so.
NEIGHBOURS = [
    ("irpo", "dpo", "with and without the NLL term"),
    ("irpo", "sft_chosen", "the losers of the same pairs seen or not; from M_t or M_0"),
    ("star", "rest_em", "rationalizations, and every right sample instead of ten at most"),
    ("rft", "rest_em", "from M_t instead of M_0, and each right sample once"),
    ("dpo", "spin", "losers are wrong, or just the model's own"),
    ("dpo", "self_rewarding", "rewarded by the answer or by the model itself"),
    ("sipf", "orpo", "the same rounds, pairs by a process reward model or by the answer"),
    ("sipf", "sft_gold", "a warm start and rounds of process feedback, or gold alone for all rounds"),
]  # fmt: skip


def _judge_in_words(run: Path, config: Config, method: str) -> list[str]:
    facts = [_facts(Stage("01b_reward", run, method, seed, 1), "reward.json") for seed in range(config.seeds)]
    return [f"**The judge of {methods()[method].label}**, before the first round, seed {s}: {f['verdict']}" for s, f in enumerate(facts)]  # fmt: skip
