"""Solutions as equations: what went wrong in one ("23 - 8 = 15" for "23 + 8 = 31"), and gold ones from formulas."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pandas as pd

from ..answers.arithmetic import ARITHMETIC, LONGEST, Step, plain, unrolled

KINDS = {
    "right": "the answer is right",
    "no answer": "no final answer, or no end",
    "no step": "no equation that can be read",
    "arithmetic": "the right step, computed wrong",
    "operation": "the right numbers, another operation, or in the wrong order",
    "number": "the right operation on other numbers",
    "other step": "another operation on other numbers",
    "stopped early": "the first steps are right, and the rest is missing",
    "went on": "all steps are right, and more follow",
    "last line": "all steps are right, and the final answer is another number",
}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "–": "-", "−": "-", "$": " "})
_TIMES = re.compile(r"(?<=[\d)])\s*x\s*(?=[\d(.-])")
_BULLET = re.compile(r"^\s*(?:[-*]|\d+[.)])\s+(?=.*=)")
_NUMBER = re.compile(r"\s*(-?(?:\d+\.?\d*|\.\d+))(?![\d,.]*\d|e\d)")


def steps(solution: str) -> list[Step]:
    """The equations of a solution, in their order; "5 + 3 + 2 = 10" is two steps. What cannot be read is left out."""
    found: list[Step] = []
    for line in (line for line in solution.splitlines() if len(line) <= LONGEST):
        line = _BULLET.sub("", line.translate(_SIGNS))
        line = _TIMES.sub(" * ", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line))
        for left, right in pairwise(line.split("=")):
            expression, result = ARITHMETIC.search(left), _NUMBER.match(right)
            if not expression or not result:
                continue
            if re.search(r"[\w,%]$", left[: expression.start()]) and not expression[0][0].isspace():
                continue  # a part of a word or of another number
            try:
                own, _ = unrolled(expression[0])
            except ValueError:
                continue
            if own:
                found += [*own[:-1], own[-1]._replace(result=float(result[1]))]
    return found


def error(response: str, reward: float | None, gold: str) -> str:
    """The kind of error in a response, one of KINDS: its first difference from the gold solution's equations.

    Args:
        reward: 1 for a right answer, 0 for a wrong one, None where there is none.
        gold: a gold solution with equations. A wrong response that goes another way is told by where the ways part.
    """
    if reward == 1:
        return "right"
    if reward is None:
        return "no answer"
    own, wanted = steps(response), steps(gold)
    if not own:
        return "no step"
    for step, gold_step in zip(own, wanted, strict=False):
        if step.same(gold_step):
            written = f"{step.result:.10g}".partition(".")[2]  # the digits that a rounded result has
            if abs(step.result - gold_step.result) > (0.51 * 10 ** -len(written) if written else 1e-6):
                return "arithmetic"
        elif step.operands == gold_step.operands:
            return "operation"
        else:
            return "number" if step.operation == gold_step.operation else "other step"
    if len(own) != len(wanted):
        return "stopped early" if len(own) < len(wanted) else "went on"
    return "last line"


def error_table(responses: dict[str, list[dict[str, Any]]], gold: dict[str, str]) -> pd.DataFrame:
    """How many responses of each model end in each kind of error: a row for each of KINDS, a column for each model.

    Args:
        responses: model -> its records of an evaluation (`problem`, `greedy`, `response`).
        gold: problem -> its gold solution; problems whose solution has no equation are left out.
    """
    readable = {problem: solution for problem, solution in gold.items() if steps(solution)}
    counts = {
        model: Counter(
            error(r["response"], r["greedy"], readable[r["problem"]]) for r in records if r["problem"] in readable
        )
        for model, records in responses.items()
    }
    return pd.DataFrame({model: [count[kind] for kind in KINDS] for model, count in counts.items()}, index=list(KINDS))


def solution(expression: str) -> str:
    """A gold solution from an arithmetic expression: "(8 - 3) * 2" makes "8 - 3 = 5", "5 * 2 = 10", "Final answer: 10".

    Raises:
        ValueError: see `unrolled`; or a number in it is none that one writes out (1e+12).
    """
    found, value = unrolled(expression)
    lines = [f"{plain(s.left)} {s.operation} {plain(s.right)} = {plain(s.result)}" for s in found]
    return "\n".join([*lines, f"Final answer: {plain(value)}"])
