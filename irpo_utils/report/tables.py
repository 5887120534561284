"""Tables across iterations, methods and seeds, from the artefacts of a run. No model is loaded here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from ..files import read_jsonl
from ..methods.recipes import Round
from ..metrics import KS, over_seeds, sign_test, wilson
from ..run.config import Config
from ..run.stages import method_seeds, plan
from ..run.stages.evaluate import EvaluateStage
from ..run.stages.pairs import PairsStage
from ..run.stages.train import TrainStage
from ..tasks.records import set_names

MODEL = ["method", "seed", "iteration"]
KEYS = ["run", *MODEL, "split"]
MEASURES = ["problems", "greedy", "greedy_low", "greedy_high"]
# Columns of the metrics as the table names them.
LABELS = {
    "greedy": "greedy",
    "greedy_flexible": "flexible",
    "steps_right": "steps",
    "right_for_wrong_reason": "lucky",
    **{f"{name}{k}": f"{name}@{k}" for name in ("maj", "pass") for k in KS},
}
AUDITED = ("none_right", "all_right", "unparsed", "duplicates", "over_long", "pairs")


def columns(config: Config) -> list[str]:
    """The columns of metrics.csv; maj and pass are at the largest k that the samples allow, 32 at most."""
    k = max(k for k in KS if k <= config.evaluation.samples)
    loose = [] if config.task.generated else ["greedy_flexible"]
    return [*KEYS, *MEASURES, *loose, f"maj{k}", f"pass{k}"]


def metrics_table(run: str, rows: list[dict[str, Any]], config: Config) -> pd.DataFrame:
    """One row per evaluated model and split; fractions.

    metrics.csv has those of `columns`; a task that knows the truth of a step has two more here.

    Args:
        run: its name. rows: as `run.stages.evaluations` gives them.
    """
    names = [*columns(config)[len(KEYS) :], "steps_right", "right_for_wrong_reason"]
    flat = []
    for row in rows:
        for split in ("dev", "test", *config.evaluation.test):
            key = {"run": run, **{k: row[k] for k in MODEL}, "split": split}
            flat.append(key | {k: row[split].get(k) for k in names})
    return pd.DataFrame(flat)


def summary_table(metrics: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Test accuracy by method and iteration in percent: mean over seeds, ± standard deviation if there are several.

    Further test sets have a column each, of greedy accuracy.
    """
    further = {source: f"greedy, {name}" for source, name in set_names(config.evaluation).items()}
    test = metrics[metrics.split == "test"].set_index(list(MODEL))
    for source, name in further.items():
        test[name] = metrics[metrics.split == source].set_index(list(MODEL)).greedy
    test = test.reset_index()
    trained = test[test.iteration > 0]
    groups = [("M_0", 0, test[test.iteration == 0].drop_duplicates("seed"))]
    for name, recipe in config.catalogue.items():
        own = trained[trained.method == name]
        groups += [(recipe.label, t, group) for t, group in own.groupby("iteration")]
    names = [c for c in metrics.columns if c in LABELS and metrics[c].notna().any()]
    rows = []
    for label, t, group in groups:
        row = {"method": label, "iteration": t, "seeds": group.seed.nunique()}
        row |= {LABELS[name]: percent(group[name]) or "-" for name in names}
        rows.append(row | {name: percent(group[name]) or "-" for name in further.values()})
    return pd.DataFrame(rows)


def percent(values: pd.Series) -> str:
    """The mean of fractions in percent, ± their sample standard deviation where there are several; "" for none."""
    values = values.dropna() * 100
    if not len(values):
        return ""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def training_curves(run: Path, config: Config) -> dict[str, list[dict[str, float]]]:
    """Method -> the first iteration's start and steps (seed 0).

    Of methods whose rounds are all of one kind and train on the policy's own samples alone, by their answers: the
    first iteration stands for the others, and what is chosen are right answers of the same model. (Gold solutions are
    so much less probable at first that no other curve could be read beside theirs.)
    """
    curves = {}
    for method in config.methods:
        first, *others = config.recipe(method).rounds
        selection = first.part("selection")
        if not others and first.draws and first.reward == "answer" and not (selection.gold or selection.signed):
            curves[method] = TrainStage(run, method, 0, 1, config).curve()
    return curves


def all_rounds(config: Config) -> Iterator[tuple[str, int, int, Round]]:
    """Every (method, seed, iteration t > 0) of a run, with the choices of that round."""
    for method, seed in method_seeds(config):
        for t in range(1, config.rounds(method) + 1):
            yield method, seed, t, config.recipe(method).round(t)


def audit_table(run: Path, config: Config) -> pd.DataFrame:
    """The pair audits, a row per method, seed and iteration."""
    rows = []
    for method, seed, t, choices in all_rounds(config):
        if not choices.trains:
            continue
        audit = PairsStage(run, method, seed, t, config).facts("audit.json")
        training = TrainStage(run, method, seed, t, config).facts("training.json")
        rows.append(
            {
                "method": method,
                "seed": seed,
                "iteration": t,
                "right samples": f"{audit['right'] / audit['samples']:.1%}" if audit.get("samples") else "",
                **{k: audit.get(k, "") for k in AUDITED},
                "length gap": f"{round(audit['length_gap'], 1) + 0.0:+.1f}" if "length_gap" in audit else "",
                "best step": training["best_step"],
            }
        )
    return pd.DataFrame(rows)


def gains_in_words(run: Path, config: Config) -> list[str]:
    """What the last model's test accuracy says against M_0's, and what it does not, a text for each method.

    Both models answered the same problems, so the ones that changed are compared: those of one seed by an exact sign
    test, those of several by an interval of the gain that counts a problem once.
    """
    audits = audit_table(run, config)
    texts = []
    for method in config.methods:
        gain, right = _gain(run, config, method)
        chance = _against_chance(run, config, method, right)
        texts.append(gain + chance + _right_samples(audits, config, method))
    return texts


def _gain(run: Path, config: Config, method: str) -> tuple[str, list[dict[str, float]]]:
    """What changed from M_0 to the last model; and of each seed, which test problems the latter solves."""
    last = config.rounds(method)
    before, after = (right_problems(run, config, method, t) for t in (0, last))
    both = [(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in old]
    names = {name for old in before for name in old}
    total, gained, lost = len(both), both.count((0, 1)), both.count((1, 0))
    right_before, right_after = (sum(column) for column in zip(*both, strict=True))
    found = paired(after, before)
    how = "{points:+.1f} points, {low:+.1f} to {high:+.1f} over seeds and problems".format(**found)
    if found["p"] is not None:
        how = f"sign test, p = {found['p']:.2g}"
    verdict = "a gain" if gained > lost else "a loss"
    verdict = verdict if found["told_apart"] else f"no change can be shown with {len(names)} problems"
    text = (
        f"{config.recipe(method).label}: {right_before / total:.1%} of the test answers are right before (M_0), "
        f"{right_after / total:.1%} after (M_{last}). "
        f"{gained} turned right and {lost} wrong: {verdict} ({how})."
    )
    return text, after


def paired(after: Sequence[dict[str, float]], before: Sequence[dict[str, float]]) -> dict[str, Any]:
    """How far one model is ahead of another on the same problems, in points, and whether that can be shown.

    For one seed an exact sign test decides, at 5 %, over the problems that only one of the two solves. For several the
    95 % interval does, in which a problem counts once.

    Args:
        after, before: of each seed, problem -> 1.0 where the model solves it, else 0.0.

    Returns:
        `points`, `low`, `high`; `p` (None for several seeds); `told_apart`.
    """
    changes = [{name: own[name] - other[name] for name in other} for own, other in zip(after, before, strict=True)]
    points, low, high = (100 * value for value in over_seeds(changes))
    found = {"points": points, "low": low, "high": high, "p": None, "told_apart": low > 0 or high < 0}
    if len(changes) == 1:
        gained, lost = (list(changes[0].values()).count(change) for change in (1, -1))
        found["p"] = sign_test(gained, lost)
        found["told_apart"] = found["p"] < 0.05
    return found


def changes_table(run: Path, config: Config) -> pd.DataFrame:
    """What each iteration mended and broke, by the greedy answers to the same problems: a row for each and test set.

    *gain* is in points, with its 95 % interval (and, of one seed, the p of a sign test); the two last columns count the
    problems of each seed that turned.
    """
    rows, names = [], {"test": "test"} | set_names(config.evaluation)
    for method, split in product(config.methods, names):
        models = [right_problems(run, config, method, t, split) for t in range(config.rounds(method) + 1)]
        for t, (before, after) in enumerate(pairwise(models), 1):
            row = {"method": config.recipe(method).label, "test set": names[split], "iteration": t}
            row["gain"] = marked(paired(after, before))
            for name, change in (("turned right", 1), ("turned wrong", -1)):
                turned = [sum(new[p] - old[p] == change for p in old) for old, new in zip(before, after, strict=True)]
                row[name] = ", ".join(map(str, turned))
            rows.append(row)
    return pd.DataFrame(rows)


def certainty(found: dict[str, Any]) -> str:
    """What `paired` found as text: points, 95 % interval and, of one seed, the p of the sign test."""
    p = "" if pd.isna(found["p"]) else ", p = {p:.2g}".format(**found)
    return "{points:+.1f} ({low:+.1f} to {high:+.1f}".format(**found) + f"{p})"


def marked(found: dict[str, Any]) -> str:
    """`certainty`, behind ≈ where the two models cannot be told apart."""
    return ("" if found["told_apart"] else "≈ ") + certainty(found)


def right_problems(run: Path, config: Config, method: str, t: int, split: str = "test") -> list[dict[str, float]]:
    """Of each seed, test problem -> 1.0 where the greedy answer of M_t is right, else 0.0."""
    stages = [EvaluateStage(run, method, seed, t, config) for seed in range(config.seeds)]
    found = [read_jsonl(stage.path("responses.jsonl"), "04_evaluate.ipynb") for stage in stages]
    return [{r["problem"]: float(r["greedy"] == 1) for r in rows if r["split"] == split} for rows in found]


def _against_chance(run: Path, config: Config, method: str, right: list[dict[str, float]]) -> str:
    """Whether the last model does better than guessing, for a task that knows how often a guess is right.

    Args:
        right: of each seed, test problem -> 1.0 where the last model solves it, else 0.0.
    """
    last = config.rounds(method)
    stages = [EvaluateStage(run, method, seed, last, config) for seed in range(config.seeds)]
    chances = [stage.facts("evaluation.json")["test"].get("chance") for stage in stages]
    if None in chances:
        return ""
    chance = mean(chances)
    one = len(right) == 1
    low, high = wilson(int(sum(right[0].values())), len(right[0])) if one else over_seeds(right)[1:]
    verdict = "does better" if low > chance else "does worse" if high < chance else "is not known to do better"
    return f" Guessing has {chance:.1%}; M_{last} {verdict} (95 % interval {low:.1%} to {high:.1%})."


def _right_samples(audits: pd.DataFrame, config: Config, method: str) -> str:
    """How many samples were right round by round (seed 0), where every round sampled at the same temperature."""
    own = audits[(audits.method == method) & (audits.seed == 0)]
    shares = list(own["right samples"])
    if any(
        config.recipe(method).round(t).is_online(config.for_round(method, t).train.sync_every) for t in own.iteration
    ):
        return ""  # those of a round are of many policies
    temperatures = {config.temperature(t) for t in range(1, config.rounds(method) + 1)}
    if len(shares) < 2 or not all(shares) or len(temperatures) > 1:
        return ""
    each = ", ".join(f"{share} (M_{t - 1})" for t, share in zip(own.iteration, shares, strict=True))
    return f" Right samples on the training problems: {each}."


def timing_table(run: Path, config: Config) -> pd.DataFrame:
    """Seconds of every stage notebook, kernel start included. A stage that methods share counts once, for "m0"."""
    seen: dict[Path, tuple[str, int, int, str, float]] = {}
    for method, seed in method_seeds(config):
        for stage in plan(config, run, method, seed):
            notebook, seconds = stage.folder / f"{stage.name}.ipynb", (stage.manifest() or {}).get("seconds") or 0.0
            if notebook.exists():  # of a stage that was done in JupyterLab none is, or one that shows what was there
                page = json.loads(notebook.read_text())["metadata"].get("papermill", {}).get("duration")
                seconds = max(seconds, page or 0.0)
            whose = "m0" if stage.folder == stage.m0_folder() else method
            seen[stage.manifest_path()] = (whose, seed, stage.iteration, stage.name, round(seconds, 1))
    return pd.DataFrame(list(seen.values()), columns=["method", "seed", "iteration", "stage", "seconds"])


def plain(table: pd.DataFrame) -> str:
    """The table as text, for a terminal."""
    return table.to_string(index=False, justify="left") + "\n"
