r"""MATH (Hendrycks et al., arXiv 2103.03874): competition problems with LaTeX answers in `\boxed{}`. Four-shot."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import ClassVar

from ..answers.latex import Equality, normal, rational, unwrap
from ..answers.marks import boxed, candidates
from ..answers.numbers import last_number, plain
from .base import Problem
from .records import RecordTask

HUB_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
INSTRUCTION = (
    "Solve the last of the problems below as the ones before it are solved. Reason step by step, put the answer in "
    '\\boxed{}, and finish with a line of the form "Final answer: ...", with the answer in place of the dots.'
)
SHOTS = 4
SHOT_LENGTHS = (150, 600)  # characters of a solution that is shown as an example


class MATH(RecordTask):
    """The `math` task. The upstream record is {"problem", "solution", "level", "type"}.

    The test set is MATH-500; the other 12,000 problems of the original training and test sets are for training.
    """

    sources: ClassVar[dict[str, list[str]]] = {
        "train": [f"EleutherAI/hendrycks_math:{s}:{split}" for split in ("train", "test") for s in HUB_SUBJECTS],
        "test": ["HuggingFaceH4/MATH-500::test"],
    }
    fields = ("problem", "solution")
    own_processes = True  # the symbolic check's

    def problem(self, name: str, record: dict) -> Problem:
        solution = record["solution"].strip()
        if "\\boxed" not in solution and "\\fbox" not in solution:
            raise ValueError("the solution has no \\boxed{} answer")
        answer = self.gold(solution)
        solution = f"{solution}\nFinal answer: ${answer}$"
        return Problem(
            name, record["problem"], answer, solution, {"type": str(record.get("type") or record.get("subject", ""))}
        )

    def gold(self, text: str) -> str:
        r"""The gold answer: the last `\boxed{}` of a solution, or an answer alone."""
        answer = boxed(text) if "\\boxed" in text or "\\fbox" in text else text.strip()
        if not answer:
            raise ValueError(f"no whole \\boxed{{}} in the solution that ends in {text[-40:]!r}")
        return answer

    def examples(self, pool: list[Problem]) -> list[Problem]:
        """The four examples of the prompt: short solutions, one of a type each where types are given.

        The training data alone decides which, whatever the seed and the sizes.
        """
        low, high = SHOT_LENGTHS
        pool = sorted(pool, key=lambda p: hashlib.sha256(p.question.encode()).digest())
        fitting = [p for p in pool if low <= len(p.solution) <= high and "[asy]" not in p.question + p.solution]
        one_each = list({p.meta["type"] or p.id: p for p in reversed(fitting)}.values())[::-1]
        chosen = [*one_each, *(p for p in fitting if p not in one_each)][:SHOTS]
        if len(chosen) < SHOTS:
            raise ValueError(
                f"task.train: {SHOTS} short solved problems are needed for the prompt, there are {len(chosen)}"
            )
        self.shots = chosen
        return chosen

    def prompt(self, problem: Problem) -> str:
        _ = self.splits
        shown = [f"Problem: {p.question}\nSolution: {p.solution}" for p in self.shots]
        return "\n\n".join([INSTRUCTION, *shown, f"Problem: {problem.question}\nSolution:"])

    @cached_property
    def same(self) -> Equality:
        return Equality()

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        for text in candidates(response):
            if answer := unwrap(text):
                return answer
        if flexible:
            tail = response[-2000:]
            pieces = tail.split("$")
            if len(pieces) >= 3 and pieces[-2].strip():
                return unwrap(pieces[-2]) or None
            if (value := last_number(tail)) is not None:
                return plain(value)
        return None

    def equal(self, answer: str, problem: Problem) -> bool | None:
        return self.same([(answer, problem.answer)])[0]

    def equal_all(self, answers: list[str], problems: list[Problem]) -> list[bool | None]:
        return self.same([(a, p.answer) for a, p in zip(answers, problems, strict=True)])

    @property
    def undecided(self) -> int:
        """How many answers the symbolic check gave up on; they are neither right nor wrong."""
        return self.same.verifier.gave_up

    def vote(self, answer: str) -> str:
        text = normal(answer)
        value = rational(text)
        return text if value is None else plain(value)
