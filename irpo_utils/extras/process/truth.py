"""How good step labels are, on a task that knows the truth of every line (`stories`).

The truth that labels are held against is that of a *prefix*: every line up to the end of the step is right. It is what
simulation asks: can the right answer still be reached from here? A solution of such steps alone is right for the right
reason. Whether a line is right given the lines before it is another question: a right line on top of a wrong one is not
counted as right here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...metrics import auc
from ...model.records import Sample
from ...tasks.base import Problem, Task
from .labels import label
from .reward_model import Solution

Row = dict[str, Any]  # of a table
BINS = 10


def prefix_truth(
    task: Task, problem: Problem, tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], ends: Sequence[int]
) -> list[bool]:
    """Whether every line up to each step's end is right, [steps]. `token_ids` are without EOS."""
    verdicts = task.check_lines(problem, tokenizer.decode(token_ids))
    counts = [sum(bool(line.strip()) for line in tokenizer.decode(token_ids[: e + 1]).split("\n")) for e in ends]
    return [all(verdicts[:count]) for count in counts]


def with_truth(
    task: Task, problems: list[Problem], tokenizer: PreTrainedTokenizerBase, solutions: list[Solution]
) -> list[Solution]:
    """The solutions of `labels.label_steps` with `truth` [steps]."""
    by_id, found = {p.id: p for p in problems}, []
    for s in solutions:
        body = s.token_ids[:-1] if s.finished else s.token_ids
        found.append(replace(s, truth=tuple(prefix_truth(task, by_id[s.problem], tokenizer, body, s.ends))))
    return found


def simulated_steps(solutions: list[Solution]) -> list[Row]:
    """Every step that was simulated: its `outcomes`, its `truth`, and whether its solution's `answer` is right."""
    return [
        {"outcomes": outcomes, "truth": truth, "answer": s.answer_reward == 1}
        for s in solutions
        for outcomes, truth in zip(s.outcomes, s.truth, strict=True)
        if outcomes
    ]


def quality(labels: Sequence[int], truth: Sequence[bool]) -> dict[str, float | None]:
    """Precision, recall and accuracy of `labels` [steps], the share labelled right, and the share that is right.

    Precision is None where nothing is labelled right, recall where nothing is.
    """
    both = sum(bool(y) and t for y, t in zip(labels, truth, strict=True))
    labelled, right, n = sum(map(bool, labels)), sum(truth), len(truth)
    return {
        "precision": both / labelled if labelled else None,
        "recall": both / right if right else None,
        "accuracy": sum(bool(y) == t for y, t in zip(labels, truth, strict=True)) / n,
        "labelled_right": labelled / n,
        "right": right / n,
        "steps": n,
    }


def label_quality(steps: list[Row], ks: Sequence[int]) -> list[Row]:
    """`quality` of the labels that the first K outcomes give, for each K in `ks` and each delta below it."""
    truth = [s["truth"] for s in steps]
    return [
        {"k": k, "delta": delta, **quality([label(s["outcomes"], delta, k) for s in steps], truth)}
        for k in ks
        for delta in range(k)
    ]


def calibration(scores: Sequence[float], truth: Sequence[bool]) -> tuple[list[Row], dict[str, Any]]:
    """The reliability curve of `scores` [steps] in [0, 1] in `BINS` bins of equal width, and what sums it up.

    Returns:
        a record for each bin that is not empty: mean score, share that is right, count; and the expected calibration
        error (the mean over steps of a bin's distance of the two; Naeini et al., 2015), AUC, and the Brier score.
    """
    steps: dict[int, list[tuple[float, bool]]] = {}  # of each bin
    for score, right in zip(scores, truth, strict=True):
        steps.setdefault(min(int(score * BINS), BINS - 1), []).append((score, right))
    curve = [
        {"score": sum(s for s, _ in own) / len(own), "right": sum(t for _, t in own) / len(own), "count": len(own)}
        for _, own in sorted(steps.items())
    ]
    n = len(truth)
    return curve, {
        "ece": sum(b["count"] * abs(b["score"] - b["right"]) for b in curve) / n,
        "auc": auc(scores, [int(t) for t in truth]),
        "brier": sum((s - t) ** 2 for s, t in zip(scores, truth, strict=True)) / n,
    }


def right_for_wrong_reason(task: Task, problems: list[Problem], samples: list[Sample]) -> dict[str, float]:
    """The share of samples whose answer is right, and the share of those that have a wrong line."""
    by_id = {p.id: p for p in problems}
    right = [s for s in samples if s.answer_reward == 1]
    wrong = sum(not all(task.check_lines(by_id[s.problem], s.response)) for s in right)
    return {"right": len(right) / len(samples), "of_them_with_a_wrong_step": wrong / max(1, len(right))}
