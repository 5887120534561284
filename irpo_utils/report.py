"""Tables across iterations, methods and seeds, from the artefacts of a run. No model is loaded here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from .config import METHODS, Config
from .runs import Stage, arms, plan, read_jsonl

METRICS = [
    "run",
    "method",
    "seed",
    "iteration",
    "split",
    "problems",
    "greedy",
    "greedy_low",
    "greedy_high",
    "maj32",
    "pass32",
]
LABELS = {
    "irpo": "IRPO (DPO + NLL)",
    "dpo": "DPO",
    "sft_chosen": "SFT on chosen (STaR)",
    "sft_gold": "SFT on gold",
}


def metrics_table(run: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per evaluated model and split; fractions. `METRICS` are the columns of metrics.csv."""
    flat = [
        {
            "run": run,
            **{k: row[k] for k in ("method", "seed", "iteration")},
            "split": split,
            **{k: row[split].get(k) for k in (*METRICS[5:], "steps_right", "right_for_wrong_reason")},
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
    groups += [(LABELS[m], t, g) for m in METHODS for (n, t), g in trained.groupby(["method", "iteration"]) if n == m]
    columns = {
        "greedy": "greedy",
        "maj32": "maj@32",
        "pass32": "pass@32",
        "steps_right": "steps",
        "right_for_wrong_reason": "lucky",
    }
    for method, t, group in groups:
        row = {"method": method, "iteration": t, "seeds": group.seed.nunique()}
        for name, label in columns.items():
            values = group[name].dropna() * 100
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            row[label] = f"{values.mean():.1f}{spread}" if len(values) else "-"
        out.append(row)
    return pd.DataFrame(out)


def training_curves(run: Path, config: Config) -> dict[str, list[dict[str, float]]]:
    """Method -> the first iteration's steps (seed 0), for methods that have rejected responses."""
    curves = {}
    for method in config.methods:
        path = Stage("03_train", run, method, 0, 1).path("steps.jsonl")
        if METHODS[method].selection == "pairs":
            curves[method] = read_jsonl(path, "03_train.ipynb")
    return curves


def audit_table(run: Path, config: Config) -> pd.DataFrame:
    """The pair audits, a row per method, seed and iteration."""
    out = []
    for method, seed in arms(config):
        for t in range(1, config.rounds(method) + 1):
            audit = json.loads(Stage("02_pairs", run, method, seed, t).path("audit.json").read_text())
            training = json.loads(Stage("03_train", run, method, seed, t).path("training.json").read_text())
            keys = ("none_right", "all_right", "unparsed", "duplicates", "over_long", "pairs")
            facts = {k: audit.get(k, "") for k in keys} | {
                "length gap": f"{audit['length_gap']:+.1f}" if "length_gap" in audit else ""
            }
            out.append({"method": method, "seed": seed, "iteration": t, **facts, "best step": training["best_step"]})
    return pd.DataFrame(out)


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
