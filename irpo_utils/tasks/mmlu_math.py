"""MMLU_Math: questions of MMLU's maths subjects (Hendrycks et al., arXiv 2009.03300), without options.

The answer is a number.
A test out of domain for a model that is trained on GSM8K; `task.test` names its file of {"question", "answer"}.
"""

from __future__ import annotations

import re
from typing import ClassVar

from ..answers.marks import kind_of
from ..answers.numbers import number
from .base import Problem
from .gsm8k import GSM8K


class MMLUMath(GSM8K):
    """The `mmlu_math` task: GSM8K's training set, prompt and grading.

    One upstream answer is a list of numbers ("2,2,4").
    """

    sources: ClassVar[dict[str, list[str]]] = {"train": GSM8K.sources["train"]}

    def problem(self, name: str, record: dict) -> Problem:
        if "####" in record["answer"]:
            return super().problem(name, record)
        return Problem(name, record["question"], self.gold(record["answer"]))

    def gold(self, text: str) -> str:
        listed = re.sub(r"\s", "", text)
        return listed if number(text) is None and re.fullmatch(r"-?\d+(,-?\d+)+", listed) else super().gold(text)

    def equal(self, answer: str, problem: Problem) -> bool | None:
        if number(problem.answer) is None:
            listed = re.sub(r"[\s$(){}\[\]\\]|\.$", "", re.sub(r",? and ", ",", answer))
            return listed == problem.answer or (None if any(kind_of(w) in "hcr" for w in answer.split()) else False)
        return super().equal(answer, problem)
