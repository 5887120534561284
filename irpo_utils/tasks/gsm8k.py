"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school word problems with a whole number as answer. Zero-shot."""

from __future__ import annotations

import re
from typing import ClassVar

from ..answers.marks import candidates
from ..answers.numbers import NOTHING, last_number, number, plain, read, states
from .base import Problem
from .records import RecordTask

CALCULATOR = re.compile(r"<<[^<>\n]*>>")
PROMPT = (
    "Answer the question below. Reason step by step first. When you are done, finish with a line of the form "
    '"Final answer: ...", with the number alone in place of the dots.\n\nQuestion: {question}'
)


class GSM8K(RecordTask):
    """The `gsm8k` task. The upstream record is {"question", "answer"}, the answer a solution that ends in `#### n`."""

    sources: ClassVar[dict[str, list[str]]] = {"train": ["openai/gsm8k:main:train"], "test": ["openai/gsm8k:main:test"]}
    template = PROMPT
    fields = ("question", "answer")

    def problem(self, name: str, record: dict) -> Problem:
        solution, mark, gold = record["answer"].rpartition("####")
        if not mark:
            raise ValueError('the answer does not end in "#### n"')
        # Calculator marks are an annotation for another method: a winner must be text that the model could have said.
        steps = CALCULATOR.sub("", solution).strip()
        return Problem(name, record["question"], self.gold(gold), f"{steps}\nFinal answer: {gold.strip()}")

    def gold(self, text: str) -> str:
        value = number(text.rpartition("####")[2])
        if value is None:
            raise ValueError(f"the gold answer {text[-40:]!r} is not a number")
        return plain(value)

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        first = None
        for text in candidates(response):
            reading = read(text)
            if reading is not None and reading.sure:
                return plain(reading.values[0])
            if reading != NOTHING:
                return text
            first = first or text
        if first is None and flexible and (value := last_number(response)) is not None:
            return plain(value)
        return first

    def equal(self, answer: str, problem: Problem) -> bool | None:
        return answer == problem.answer or states(answer, number(problem.answer))
