"""Grade responses. Right, wrong and *unparsed* are three classes, counted apart."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

from .base import Problem, Task

# From how many distinct responses on processes pay, and how many one of them takes at a time. Starting two costs
# 0.15 s, and grading 1,000 responses to GSM8K 0.02 s. Two processes on two cores take twice the time of one for 5,000
# responses, three quarters of it for 20,000, and half of it for 200,000.
MANY = 20_000
SHARE = 5_000


class Verdict(NamedTuple):
    """What was read out of a response, and whether it is right: True, False, or None where nothing was understood."""

    extracted: str | None
    correct: bool | None

    @property
    def reward(self) -> float | None:
        """1.0 for a right final answer, 0.0 for a wrong one, None without one (arXiv 2404.19733, section 2)."""
        return None if self.correct is None else float(self.correct)


def grade(
    task: Task, responses: Sequence[str], problems: Sequence[Problem], flexible: bool = False, processes: int = 1
) -> list[Verdict]:
    """Grade `responses` [n], each on the problem beside it. `flexible` also accepts an answer that is not marked.

    A response that occurs several times on one problem (the very same object) is graded once. From `MANY` distinct ones
    on, the work is spread over `processes`, for which the task must pickle; the verdicts are the same.

    Raises:
        CannotGrade: this machine lacks what the task needs, such as a sandbox for programs.
    """
    keys = [(response, id(problem)) for response, problem in zip(responses, problems, strict=True)]
    problem_of = dict(zip(keys, problems, strict=True))
    rows = [(response, problem) for (response, _), problem in problem_of.items()]
    if processes > 1 and len(rows) >= MANY and not task.own_processes:
        parts = [rows[i : i + SHARE] for i in range(0, len(rows), SHARE)]
        # Spawned: a fork of a process in which torch has threads may hang.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            graded = [verdict for part in pool.map(partial(_grade, task, flexible), parts) for verdict in part]
    else:
        graded = _grade(task, flexible, rows)
    verdicts = dict(zip(problem_of, graded, strict=True))
    return [verdicts[key] for key in keys]


def _grade(task: Task, flexible: bool, rows: list[tuple[str, Problem]]) -> list[Verdict]:
    extracted = [task.extract(response, problem, flexible=flexible) for response, problem in rows]
    found = [(answer, problem) for answer, (_, problem) in zip(extracted, rows, strict=True) if answer is not None]
    right = iter(task.equal_all([answer for answer, _ in found], [problem for _, problem in found]))
    verdicts = [None if answer is None else next(right) for answer in extracted]
    return [Verdict(None if v is None else a, v) for a, v in zip(extracted, verdicts, strict=True)]


def reward(task: Task, response: str, problem: Problem) -> float | None:
    """The reward of one response: 1.0, 0.0, or None (unparsed)."""
    return grade(task, [response], [problem])[0].reward
