"""A user's own problems, one JSON object a line: {"question": "...", "answer": "42", "solution": "..."}.

The solution, a gold chain of thought, is optional.
"""

from __future__ import annotations

from ..answers.marks import candidates
from ..answers.numbers import last_number, number, plain
from .base import Problem
from .records import RecordTask

PROMPT = (
    "Answer the question below. Reason step by step first. When you are done, finish with a line of the form "
    '"Final answer: ...", with the answer alone in place of the dots.\n\nQuestion: {question}'
)


class JsonLines(RecordTask):
    """The `jsonl` task: `task.train` and `task.test` are files.

    Answers compare as numbers where both are numbers, else as text.
    """

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

    def prompt(self, problem: Problem) -> str:
        return PROMPT.format(question=problem.question)

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        found = next(candidates(response), None)
        if found is None and flexible and (value := last_number(response)) is not None:
            return plain(value)
        return found

    def equal(self, answer: str, problem: Problem) -> bool:
        gold = number(problem.answer)
        if gold is not None and plain_number(problem.answer):
            return number(answer) == gold
        return normal(answer) == normal(problem.answer)


def plain_number(text: str) -> bool:
    """Whether an answer is a number and nothing else ("1,200.0", "$5"), so that it is compared by its value."""
    return not any(c.isalpha() for c in text)


def normal(text: str) -> str:
    return " ".join(text.strip().rstrip(".").lower().split())
