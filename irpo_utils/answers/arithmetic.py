"""Arithmetic in a text: an expression's steps and value, and what a calculator writes behind "12 / 2 =". No eval."""

from __future__ import annotations

import ast
import operator
import re
from typing import NamedTuple

OPERATIONS = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
LONGEST = 200  # characters of a line or an expression that is read
ARITHMETIC = re.compile(r"[-+*/().\d\s]+$")
# An expression at the end that is no part of a longer one: it begins with a number or a bracket.
WHOLE = re.compile(r"(?:^|[=<(\n]|(?<!\d):|[a-z][.!?] )[ \t]*((?:-?[\d.]|\()[-+*/().\d \t]*)$")


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
        """Whether both compute the same, whatever result they write; only sums and products may be turned round."""
        if self.operation != other.operation:
            return False
        turned = self.operation in "+*" and self.operands == other.operands
        return turned or (self.left, self.right) == (other.left, other.right)


def unrolled(expression: str) -> tuple[list[Step], float]:
    """The steps in which an arithmetic expression is computed, none for a number alone; and its value.

    Raises:
        ValueError: it is more than numbers, brackets and + - * /, it divides by zero, or its numbers are too large.
    """
    found: list[Step] = []

    def value(node: ast.expr) -> float:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = -1, node.operand
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(sign * node.value)
        if sign < 0 or not isinstance(node, ast.BinOp) or type(node.op) not in OPERATIONS:
            raise ValueError(f"{expression[:80]!r} is more than numbers, brackets and + - * /")
        name, compute = OPERATIONS[type(node.op)]
        left, right = value(node.left), value(node.right)
        found.append(Step(left, name, right, compute(left, right)))
        return found[-1].result

    try:
        if len(expression) > LONGEST:
            raise ValueError(f"{expression[:80]!r}... is longer than {LONGEST} characters")
        if not ARITHMETIC.fullmatch(expression):
            raise ValueError(f"{expression!r} is more than numbers, brackets and + - * /")
        return found, value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by zero") from None
    except OverflowError:
        raise ValueError(f"{expression!r} has too large a number") from None


def result_behind(text: str) -> str:
    """What a calculator writes behind a text: " 6" behind "12 / 2 =". Nothing unless an expression and "=" end it.

    The expression begins the line, or stands behind one of `= : < (` or the end of a sentence. Behind anything else, as
    "$5 + $", "2 times" or "20 dollars", it may be a part of a longer one. A blank before "=" is written behind it too.
    """
    left, equals, behind = text.rpartition("=")
    whole = WHOLE.search(left)
    if not equals or behind.strip() or not whole:
        return ""
    try:
        found, value = unrolled(whole[1])
        return (" " if left.endswith(" ") and not behind else "") + plain(value) if found else ""
    except ValueError:
        return ""


def plain(value: float) -> str:
    """A number as one writes it, of up to ten digits. Raises ValueError for one larger, or smaller but not 0."""
    text = f"{value + 0.0:.10g}"  # without the sign of -0.0
    if "e" in text:
        raise ValueError(f"{value} is no number that one writes out")
    return text
