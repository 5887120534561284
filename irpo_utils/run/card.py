"""What a run came to: one sentence, which the report begins with, and the few lines that the driver ends with."""

from __future__ import annotations

import csv
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import Any

from ..files import relative
from .config import Config
from .stages import evaluations, plan


def outcome(rows: list[dict[str, Any]], config: Config) -> str:
    """One sentence: how many test problems M_0 and the first method's last model solve, and which method ends highest.

    With one seed the range is the 95 % interval of the test set; with several it spans the seeds.

    Args:
        rows: as `stages.evaluations` gives them.
    """
    first = config.methods[0]
    before, after = (tests(rows, first, t) for t in (0, config.rounds(first)))
    ends = {method: solved(tests(rows, method, config.rounds(method))) for method in config.methods}
    best = max(ends, key=ends.get)
    values = [test["greedy"] for test in after]
    low, high, what = min(values), max(values), f"{len(values)} seeds"
    if len(values) == 1:
        low, high, what = after[0]["greedy_low"], after[0]["greedy_high"], "95 % interval"
    whose = "each seed's" if config.task.by_seed else "the"
    sentence = (
        f"M_0 solves {solved(before):.1%} of {whose} {after[0]['problems']} test problems, "
        f"M_{config.rounds(first)} of {config.recipe(first).label} {ends[first]:.1%} ({what}: {low:.1%} to {high:.1%})"
    )
    if ends[best] > ends[first]:
        highest = f"{config.recipe(best).label} ends highest, at {ends[best]:.1%}"
        sentence += f"; of {len(ends)} methods {highest} (06_methods says which differ)"
    return f"{sentence}."


def tests(rows: list[dict[str, Any]], method: str, iteration: int) -> list[dict[str, Any]]:
    """The test results of a method's M_t, one for each seed."""
    return [row["test"] for row in rows if (row["method"], row["iteration"]) == (method, iteration)]


def solved(results: list[dict[str, Any]]) -> float:
    """The mean greedy accuracy over seeds."""
    return mean(test["greedy"] for test in results)


def card(run: Path, config: Config, seconds: float) -> list[str]:
    """At most six lines: what ran and how long, what came of it, and where it lies.

    Args:
        config: with the finished methods alone. seconds: what this command took; finished stages were skipped.
    """
    with open(run / "timing.csv", newline="") as timing:
        stages = sum(float(row["seconds"]) for row in csv.DictReader(timing))
    methods = ", ".join(config.methods) if len(config.methods) < 5 else f"{len(config.methods)} methods"
    last = plan(config, run, config.methods[0], 0)[-1]
    lines = [
        f"{run.name}: {methods}; {config.seeds} seed(s), {config.iterations} iterations; "
        f"took {duration(seconds)}, all its stages {duration(stages)}",
        outcome(evaluations(run, config), config),
        f"report  {relative(run / 'report.html')}",
        f"table   {relative(run / 'table.txt')}",
        f"model   {last.load_line()}",
    ]
    return lines + ([f"methods {relative(run / '06_methods.ipynb')}"] if len(config.methods) > 1 else [])


def duration(seconds: float) -> str:
    """As "0:02:41"."""
    return str(timedelta(seconds=round(seconds)))
