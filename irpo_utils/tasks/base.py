"""What a problem and a task are."""

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
    """Four small methods, and a constructor that takes the `TaskConfig`; `gsm8k.py` is a short example."""

    def problems(self, split: str) -> list[Problem]:
        """The problems of "train", "dev" or "test", always in the same order; no question in two of them."""

    def prompt(self, problem: Problem) -> str:
        """The text that the model continues, or the user's turn where the tokenizer has a chat template."""

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        """The final answer in a response, or None when there is none to be found (unparsed).

        Strict is the marked answer alone; `flexible` may fall back on what looks like one.
        """

    def equal(self, answer: str, problem: Problem) -> bool:
        """Whether an extracted answer is the problem's."""
