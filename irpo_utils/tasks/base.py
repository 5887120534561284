"""What a problem and a task are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..settings import TaskConfig

SPLITS = ("train", "dev", "test")


class BadRecord(ValueError):
    """A source or a record of problems cannot be used; the message names it and says what to change."""


class CannotGrade(ValueError):
    """This machine lacks what a task needs to grade; the message says what, and how to get it."""


@dataclass(frozen=True)
class Problem:
    """One problem. `solution` is the gold chain of thought *and* final answer, or "" where none exists."""

    id: str
    question: str
    answer: str
    solution: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Where problems come from, how they are put to the model, and which answers are right.

    Four methods must be written; `gsm8k.py` is a short example. The rest has defaults that suit most tasks.
    """

    notes: Sequence[str] = ()  # what a reader should know of the data, such as problems that were left out
    undecided: int = 0  # answers that are neither right nor wrong because their check was given up
    own_processes: ClassVar[bool] = False  # whether `equal_all` starts processes itself, so that `grade` should not

    def __init__(self, config: TaskConfig):
        self.config = config

    @abstractmethod
    def problems(self, split: str) -> list[Problem]:
        """The problems of "train", "dev" or "test", always in the same order; no question in two of them."""

    @abstractmethod
    def prompt(self, problem: Problem) -> str:
        """The text that the model continues, or the user's turn where the tokenizer has a chat template."""

    @abstractmethod
    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        """The final answer in a response, or None when there is none to be found (unparsed).

        Strict is the marked answer alone; `flexible` may fall back on what looks like one.
        """

    @abstractmethod
    def equal(self, answer: str, problem: Problem) -> bool | None:
        """Whether an extracted answer is the problem's; None where nobody can tell, which is unparsed too."""

    def equal_all(self, answers: Sequence[str], problems: Sequence[Problem]) -> list[bool | None]:
        """`equal` for every answer [n] and the problem beside it; for a task that is faster with many at once."""
        return [self.equal(answer, problem) for answer, problem in zip(answers, problems, strict=True)]

    def vote(self, answer: str) -> str:
        """The spelling under which an answer is counted in a majority vote."""
        return answer

    def chance(self, problem: Problem) -> float | None:
        """The accuracy of guessing; None where guessing is hopeless."""
        return None

    def check_steps(self, problem: Problem, response: str) -> list[tuple[str, str]] | None:
        """(kind, verdict) of every step of a response; None for a task that does not know the truth of steps."""
        return None

    def check_lines(self, problem: Problem, response: str) -> list[bool] | None:
        """For each line of a response that is not empty, whether it is right given those before it; else None."""
        return None
