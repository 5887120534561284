"""A user's own problems, one JSON object a line: {"question": "...", "answer": "42", "solution": "..."}.

The solution, a gold chain of thought, is optional.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ..answers.marks import candidates
from ..answers.numbers import last_number, number, plain, states
from ..settings import TaskConfig
from .base import Problem
from .records import RecordTask, alike

PROMPT = (
    "Answer the question below. Reason step by step first. When you are done, finish with a line of the form "
    '"Final answer: ...", with the answer alone in place of the dots.\n\nQuestion: {question}'
)


class JsonLines(RecordTask):
    """The `jsonl` task: `task.train` and `task.test` are files.

    Answers compare as numbers where both are numbers, else as text.
    """

    template = PROMPT
    fields = ("question", "answer")
    optional = ("solution",)

    def problem(self, name: str, record: dict) -> Problem:
        answer, solution = record["answer"].strip(), record.get("solution") or ""
        if "####" in answer or "\n" in answer:
            raise ValueError(
                "the answer must be the final answer alone, on one line; a file in GSM8K's form is task.name=gsm8k"
            )
        problem = Problem(name, record["question"], answer)
        if not solution:
            return problem
        found = self.extract(solution, problem)
        if found is None:
            solution = f"{solution.rstrip()}\nFinal answer: {answer}"
        elif not self.equal(found, problem):
            raise ValueError(f"the solution ends in {found!r}, the answer is {answer!r}")
        return Problem(name, record["question"], answer, solution)

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        gold = None if plain_number(problem.answer) else problem.answer
        found = next(candidates(response, gold), None)
        if found is None and flexible and (value := last_number(response)) is not None:
            return plain(value)
        return found

    def equal(self, answer: str, problem: Problem) -> bool | None:
        gold = number(problem.answer)
        if gold is not None and plain_number(problem.answer):
            return states(answer, gold)
        return normal(answer) == normal(problem.answer)

    def vote(self, answer: str) -> str:
        value = number(answer)
        return normal(answer) if value is None else plain(value)


class Given(JsonLines):
    """Problems in memory: `Given([{"question": "What is 2 + 3?", "answer": "5"}, ...])`.

    Without `test`, a quarter of the problems is held out to test on. There are no dev problems.

    Raises (from `problems`):
        ValueError: a record is malformed (named by its number), or no problem is left to train or to test on.
    """

    def __init__(self, problems: list[dict[str, Any]], test: list[dict[str, Any]] | None = None):
        super().__init__(TaskConfig())  # only its seed counts here
        self.given = {"train": problems, "test": test}

    def _rows(self, split: str) -> list[tuple[str, Any]]:
        return [(f"{split} problem {i}", record) for i, record in enumerate(self.given[split], 1)]

    @cached_property
    def splits(self) -> dict[str, list[Problem]]:
        train = self._read("train")  # in the order of hashes, so that the first quarter is a random one
        test = train[: max(1, len(train) // 4)] if self.given["test"] is None else self._read("test")
        tested = {alike(p.question) for p in test}
        train = [p for p in train if alike(p.question) not in tested]
        if not train or not test:
            raise ValueError(
                f"{len(train)} problems are left to train on and {len(test)} to test on; give more problems"
            )
        return {"train": train, "dev": [], "test": test}


def plain_number(text: str) -> bool:
    """Whether an answer is a number and nothing else ("1,200.0", "$5"), so that it is compared by its value."""
    return not any(c.isalpha() for c in text)


def normal(text: str) -> str:
    return " ".join(text.strip().rstrip(".").lower().split())
