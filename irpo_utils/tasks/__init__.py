"""Tasks: where problems come from, how they are asked, and what counts as a right answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Problem:
    """One problem. `solution` is the gold chain of thought *and* final answer, or "" where none exists."""

    id: str
    question: str
    answer: str
    solution: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Four small methods; see `word_problems` for the embedded example."""

    def problems(self, split: str) -> list[Problem]:
        """The problems of "train", "dev" or "test", always in the same order."""

    def prompt(self, problem: Problem) -> str:
        """The text that the model continues."""

    def extract(self, response: str) -> str | None:
        """The final answer in a response, or None when there is none to be found (unparsed)."""

    def equal(self, answer: str, gold: str) -> bool:
        """Whether an extracted answer is the gold answer."""


def get_task(config) -> Task:
    """The task that a `TaskConfig` names."""
    from .jsonl import JsonLines
    from .word_problems import WordProblems

    # A task of your own: add it here and to `config.TASKS`.
    return {"word_problems": WordProblems, "jsonl": JsonLines}[config.name](config)
