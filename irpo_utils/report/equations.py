"""Solutions that are equations: what went wrong in one ("23 - 8 = 15" for "23 + 8 = 31"), and gold ones from expressions."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from typing import Any, NamedTuple

import pandas as pd

from ..answers.numbers import number

KINDS = {
    "right": "the answer is right",
    "no answer": "no final answer, or no end",
    "arithmetic": "the right step, computed wrong",
    "operation": "the right numbers, another operation, or in the wrong order",
    "number": "the right operation on other numbers",
    "other step": "another operation on other numbers",
    "stopped early": "the first steps are right, and the rest is missing",
    "went on": "all steps are right, and more follow",
    "last line": "all steps are right, and the final answer is another number",
}
OPERATIONS = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
_NUMBER = r"-?\d[\d,]*(?:\.\d*)?|-?\.\d+"
_STEP = re.compile(rf"({_NUMBER})\s*([-+*/x×÷])\s*({_NUMBER})\s*=\s*({_NUMBER})")


class Step(NamedTuple):
    """One equation, left operation right = result."""

    left: float
    operation: str
    right: float
    result: float

    @property
    def operands(self) -> list[float]:
        return sorted((self.left, self.right))

    def same(self, other: Step) -> bool:
        """Whether both compute the same, whatever they write as the result; only sums and products may be turned round."""
        if self.operation != other.operation:
            return False
        turned = self.operation in "+*" and self.operands == other.operands
        return turned or (self.left, self.right) == (other.left, other.right)


def steps(solution: str) -> list[Step]:
    """The equations of a solution, in their order."""
    names = {"x": "*", "×": "*", "÷": "/"}
    found = []
    for left, operation, right, result in _STEP.findall(solution):
        values = [float(number(text)) for text in (left, right, result)]
        found.append(Step(values[0], names.get(operation, operation), *values[1:]))
    return found


def error(response: str, reward: float | None, gold: str) -> str:
    """The kind of error in a response, one of KINDS: its first difference from the gold solution's equations.

    Args:
        reward: 1 for a right answer, 0 for a wrong one, None where there is none.
        gold: the gold solution. A wrong response that takes another way of as many steps is told by where it parts.
    """
    if reward == 1:
        return "right"
    if reward is None:
        return "no answer"
    own, wanted = steps(response), steps(gold)
    for mine, theirs in zip(own, wanted, strict=False):
        if mine.same(theirs):
            if abs(mine.result - theirs.result) > 1e-6 * max(1.0, abs(theirs.result)):
                return "arithmetic"
        elif mine.operands == theirs.operands:
            return "operation"
        else:
            return "number" if mine.operation == theirs.operation else "other step"
    if len(own) != len(wanted):
        return "stopped early" if len(own) < len(wanted) else "went on"
    return "last line"


def error_table(responses: dict[str, list[dict[str, Any]]], gold: dict[str, str]) -> pd.DataFrame:
    """How many responses of each model end in each kind of error: a row for each of KINDS, a column for each model.

    Args:
        responses: model -> its records of an evaluation (`problem`, `greedy`, `response`).
        gold: problem -> its gold solution; problems without one are left out.
    """
    counts = {
        model: Counter(error(r["response"], r["greedy"], gold[r["problem"]]) for r in records if gold.get(r["problem"]))
        for model, records in responses.items()
    }
    return pd.DataFrame({model: [count[kind] for kind in KINDS] for model, count in counts.items()}, index=list(KINDS))


def solution(expression: str) -> str:
    """A gold solution from an arithmetic expression: "(8 - 3) * 2" makes "8 - 3 = 5", "5 * 2 = 10", "Final answer: 10".

    Raises:
        ValueError: it is more than numbers, brackets and + - * /, or it divides by zero.
    """
    lines: list[str] = []

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATIONS:
            raise ValueError(f"{expression!r} is more than numbers, brackets and + - * /")
        sign, compute = OPERATIONS[type(node.op)]
        left, right = value(node.left), value(node.right)
        try:
            result = compute(left, right)
        except ZeroDivisionError:
            raise ValueError(f"{expression!r} divides by zero") from None
        lines.append(f"{left:.10g} {sign} {right:.10g} = {result:.10g}")
        return result

    try:
        final = value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    return "\n".join([*lines, f"Final answer: {final:.10g}"])
