"""Tables across iterations, methods and seeds, from the artefacts of a run. No model is loaded here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import read_jsonl
from ..methods.recipes import methods
from ..metrics import wilson
from ..run.config import Config
from ..run.store import Stage, arms, plan

KEYS = ["run", "method", "seed", "iteration", "split"]
MEASURES = ["problems", "greedy", "greedy_low", "greedy_high"]


def columns(config: Config) -> list[str]:
    """The columns of metrics.csv; maj and pass are at the largest k that the samples allow, 32 at most."""
    k = max(k for k in (1, 2, 4, 8, 16, 32) if k <= config.evaluation.samples)
    loose = [] if config.task.name == "word_problems" else ["greedy_flexible"]
    return [*KEYS, *MEASURES, *loose, f"maj{k}", f"pass{k}"]


def metrics_table(run: str, rows: list[dict[str, Any]], config: Config) -> pd.DataFrame:
    """One row per evaluated model and split; fractions. `columns` are those of metrics.csv; the embedded task has two more."""
    names = [*columns(config)[len(KEYS) :], "steps_right", "right_for_wrong_reason"]
    flat = [
        {
            "run": run,
            **{k: row[k] for k in ("method", "seed", "iteration")},
            "split": split,
            **{k: row[split].get(k) for k in names},
        }
        for row in rows
        for split in ("dev", "test")
    ]
    return pd.DataFrame(flat)


def summary_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy by method and iteration in percent: mean over seeds, and the standard deviation where there are several."""
    test = metrics[metrics.split == "test"]
    out = []
    base = test[test.iteration == 0].drop_duplicates("seed")
    groups = [("M_0", 0, base)]
    trained = test[test.iteration > 0]
    for name, recipe in methods().items():
        mine = trained[trained.method == name]
        groups += [(recipe.label, t, group) for t, group in mine.groupby("iteration")]
    told = {"greedy_flexible": "flexible", "steps_right": "steps", "right_for_wrong_reason": "lucky"}
    told |= {f"{name}{k}": f"{name}@{k}" for name in ("maj", "pass") for k in (1, 2, 4, 8, 16, 32)}
    shown = [c for c in metrics.columns if (c == "greedy" or c in told) and metrics[c].notna().any()]
    for method, t, group in groups:
        row = {"method": method, "iteration": t, "seeds": group.seed.nunique()}
        for name in shown:
            label = told.get(name, name)
            values = group[name].dropna() * 100
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            row[label] = f"{values.mean():.1f}{spread}" if len(values) else "-"
        out.append(row)
    return pd.DataFrame(out)


def training_curves(run: Path, config: Config) -> dict[str, list[dict[str, float]]]:
    """Method -> the first iteration's steps (seed 0), for methods that make pairs of right and wrong, or imitate their winners."""
    curves = {}
    for method in config.methods:
        path = Stage("03_train", run, method, 0, 1).path("steps.jsonl")
        if methods()[method].round(1).selection in ("pairs", "chosen") and len(methods()[method].kinds) == 1:
            curves[method] = read_jsonl(path, "03_train.ipynb")
    return curves


def audit_table(run: Path, config: Config) -> pd.DataFrame:
    """The pair audits, a row per method, seed and iteration."""
    out = []
    for method, seed in arms(config):
        for t in range(1, config.rounds(method) + 1):
            if methods()[method].round(t).loss == "extrapolate":
                continue
            audit = json.loads(Stage("02_pairs", run, method, seed, t).path("audit.json").read_text())
            training = json.loads(Stage("03_train", run, method, seed, t).path("training.json").read_text())
            keys = ("none_right", "all_right", "unparsed", "duplicates", "over_long", "pairs")
            share = f"{audit['right'] / audit['samples']:.1%}" if audit.get("samples") else ""
            facts = (
                {"right samples": share}
                | {k: audit.get(k, "") for k in keys}
                | {"length gap": f"{audit['length_gap']:+.1f}" if "length_gap" in audit else ""}
            )
            out.append({"method": method, "seed": seed, "iteration": t, **facts, "best step": training["best_step"]})
    return pd.DataFrame(out)


def in_words(run: Path, config: Config) -> list[str]:
    """What the last model's test accuracy says against M_0's, and what it does not, for every method.

    Both models answered the same problems, so the ones that changed are compared, all seeds together: an exact sign test.
    """
    return [_in_words(run, config, method) for method in config.methods]


def _in_words(run: Path, config: Config, method: str) -> str:
    last, gained, lost, total, right = config.rounds(method), 0, 0, 0, [0, 0]
    for seed in range(config.seeds):
        first, final = (
            {r["problem"]: r["greedy"] == 1 for r in read_jsonl(Stage("04_evaluate", run, method, seed, t).path("judged.jsonl")) if r["split"] == "test"}
            for t in (0, last)
        )  # fmt: skip
        gained += sum(final[name] and not first[name] for name in first)
        lost += sum(first[name] and not final[name] for name in first)
        total += len(first)
        right = [right[0] + sum(first.values()), right[1] + sum(final.values())]
    p = sign_test(gained, lost)
    verdict = f"no change can be shown with {total} answers" if p >= 0.05 else "a gain" if gained > lost else "a loss"
    told = (
        f"{methods()[method].label}: {right[0] / total:.1%} of the test answers are right before (M_0), {right[1] / total:.1%} after (M_{last}). "
        f"{gained} turned right and {lost} wrong: {verdict} (sign test, p = {p:.2g})."
    )
    summary = json.loads(Stage("04_evaluate", run, method, 0, last).path("evaluation.json").read_text())["test"]
    if "chance" in summary:
        low, high = wilson(right[1], total)
        same = (
            "is not known to do better"
            if low <= summary["chance"] <= high
            else "does better"
            if low > summary["chance"]
            else "does worse"
        )
        told += f" Guessing has {summary['chance']:.1%}; M_{last} {same} (95 % interval {low:.1%} to {high:.1%})."
    shares = [
        r["right samples"]
        for r in audit_table(run, config).to_dict("records")
        if r["method"] == method and r["seed"] == 0
    ]
    same_temperature = len({config.temperature(t) for t in range(1, last + 1)}) == 1
    if len(shares) > 1 and all(shares) and same_temperature:
        told += (
            " Right samples on the training problems: " + ", ".join(f"{x} (M_{t})" for t, x in enumerate(shares)) + "."
        )
    return told


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p of so uneven a split of `gained` + `lost` changes if either way were equally likely."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def timing_table(run: Path, config: Config) -> pd.DataFrame:
    """Seconds of every stage notebook, kernel start included. A stage that methods share counts once."""
    seen: dict[Path, dict[str, Any]] = {}
    for method, seed in arms(config):
        for stage in plan(config, run, method, seed):
            notebook = stage.folder / f"{stage.name}.ipynb"
            if notebook.exists():
                seconds = json.loads(notebook.read_text())["metadata"].get("papermill", {}).get("duration")
            else:  # a stage run in JupyterLab has its manifest only
                seconds = (stage.manifest() or {}).get("seconds")
            seen[stage.manifest_path()] = {
                "stage": stage.name,
                "iteration": stage.iteration,
                "seconds": round(seconds or 0.0, 1),
            }
    return pd.DataFrame(list(seen.values()))


def plain(table: pd.DataFrame) -> str:
    """The table as text, for a terminal."""
    return table.to_string(index=False, justify="left") + "\n"
