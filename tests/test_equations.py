"""What went wrong in a wrong solution: told by the first equation that is not the gold solution's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.report.equations import KINDS, error, error_table, solution, steps

GOLD = "15 - 8 = 7\n9 * 7 = 63\nFinal answer: 63"


@pytest.mark.parametrize(
    ("response", "reward", "kind"),
    [
        ("7 * 9 = 63\nFinal answer: 63", 1, "right"),  # whatever its way
        ("15 - 8 = 7\n9 * 7 = 63", None, "no answer"),
        ("15 - 8 = 6\n9 * 6 = 54\nFinal answer: 54", 0, "arithmetic"),
        ("15 - 8 = 7\n7 * 9 = 64\nFinal answer: 64", 0, "arithmetic"),  # a product turned round is the same step
        ("15 + 8 = 23\n9 * 23 = 207\nFinal answer: 207", 0, "operation"),
        ("8 - 15 = -7\nFinal answer: -7", 0, "operation"),  # a difference turned round is not
        ("15 - 9 = 6\n8 * 6 = 48\nFinal answer: 48", 0, "number"),
        ("9 * 8 = 72\nFinal answer: 72", 0, "other step"),
        ("15 - 8 = 7\nFinal answer: 7", 0, "stopped early"),
        (GOLD.replace("Final", "63 + 1 = 64\nFinal").replace(": 63", ": 64"), 0, "went on"),
        ("15 - 8 = 7\n9 * 7 = 63\nFinal answer: 36", 0, "last line"),
        ("I think it is 12.\nFinal answer: 12", 0, "no step"),
        ("15 - 8 = 7.0\n9 * 7.0 = 64\nFinal answer: 64", 0, "arithmetic"),
        ("15 - 8 = 7 * 9 = 64\nFinal answer: 64", 0, "arithmetic"),  # a chain of equations
        ("(15 - 8) * 9 = 64\nFinal answer: 64", 0, "arithmetic"),
    ],
)
def test_a_wrong_solution_has_its_kind_of_error(response, reward, kind):
    assert error(response, reward, GOLD) == kind
    assert kind in KINDS


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5.6 * 22.5 = 126.", [(5.6, "*", 22.5, 126.0)]),
        ("1,000 x 2 = 2,000", [(1000.0, "*", 2.0, 2000.0)]),
        ("$3 + $2 = $5", [(3.0, "+", 2.0, 5.0)]),
        ("3 – 1 = 2\n3 · 4 = 12\n8 ÷ 2 = 4", [(3, "-", 1, 2), (3, "*", 4, 12), (8, "/", 2, 4)]),
        ("-3 + .5 = -2.5", [(-3.0, "+", 0.5, -2.5)]),
        ("5 + 3 + 2 = 10", [(5, "+", 3, 8), (8, "+", 2, 10)]),
        ("2-3-1=-2", [(2, "-", 3, -1), (-1, "-", 1, -2)]),
        ("3/4 + 1 = 2", [(3, "/", 4, 0.75), (0.75, "+", 1, 2)]),
        ("1. 5 + 3 = 8\n- 8 * 2 = 16", [(5, "+", 3, 8), (8, "*", 2, 16)]),
        ("He has 5 + 3 = 8 apples.", [(5, "+", 3, 8)]),
        ("3 * 4=12,5", []),
        ("1e400 * 2 = 3", []),
        ("5 + 3 = 8e5", []),
        ("1 x " * 50000 + "= 1", []),
        ("2 * 5 = " + "9" * 70, [(2, "*", 5, float("9" * 70))]),
        ("9" * 5000 + " + 1 = 2", []),
        ("1.5.2 + 2 = 3", []),
        ("2 ** 3 = 8, 4 / 0 = 1, 1,00 + 3 = 4, x + 3 = 5 and 7", []),
    ],
)
def test_equations_are_read_in_their_usual_forms(text, found):
    assert steps(text) == found


@given(st.text("0123456789 +-*/x=.,()$%\n", max_size=60))
def test_no_text_makes_reading_fail(text):
    assert all(isinstance(step.result, float) for step in steps(text))


def test_errors_are_counted_by_model_where_there_is_a_gold_solution():
    def record(problem, greedy, response):
        return {"problem": problem, "greedy": greedy, "response": response}

    before = [record("a", 0, "15 + 8 = 23\nFinal answer: 23"), record("b", None, ""), record("c", 0, "")]
    after = [record("a", 1, GOLD), record("b", 1, ""), record("c", 0, "")]
    table = error_table({"M_0": before, "M_1": after}, {"a": GOLD, "b": GOLD, "c": ""})
    assert table.loc["operation"].tolist() == [1, 0] and table.loc["right"].tolist() == [0, 2]
    assert table.loc["no answer"].tolist() == [1, 0] and table.sum().tolist() == [2, 2]


NUMBERS = st.integers(1, 99).map(str) | st.sampled_from(["2.5", "0.125"])
EXPRESSIONS = st.recursive(
    NUMBERS, lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner), max_leaves=5
)


@given(EXPRESSIONS)
def test_a_solution_made_of_an_expression_has_its_value_and_steps_that_are_right(expression):
    made = solution(expression)
    final = float(made.rpartition("Final answer: ")[2])
    assert final == pytest.approx(eval(expression))
    found = steps(made)
    assert len(found) == sum(expression.count(sign) for sign in "+-*")
    for step in found:
        assert eval(f"({step.left}) {step.operation} ({step.right})") == pytest.approx(step.result, abs=1e-6)
    assert not found or found[-1].result == final


def test_a_solution_is_made_of_arithmetic_alone():
    assert solution("(8 - 3) / 2") == "8 - 3 = 5\n5 / 2 = 2.5\nFinal answer: 2.5"
    assert solution("0 * -3") == "0 * -3 = 0\nFinal answer: 0"
    assert solution("8") == "Final answer: 8" and solution("-3 + 5.50") == "-3 + 5.5 = 2.5\nFinal answer: 2.5"
    wrong = (
        "x + 1",
        "2 ** 3",
        "f(1)",
        "1 +",
        "4 / (2 - 2)",
        "True + 1",
        "-(3 + 2)",
        "900000 * 900000",
        "1+" * 200 + "1",
    )
    for expression in wrong:
        with pytest.raises(ValueError, match="is more than|is no arithmetic|divides by zero|writes out|is longer"):
            solution(expression)


def test_a_rounded_result_is_not_computed_wrong():
    assert (
        error("10 / 3 = 3.33\n3.33 + 1 = 5\nFinal answer: 5", 0, "10 / 3 = 3.333333333\n3.333333333 + 1 = 4.333333333")
        != "arithmetic"
    )
    assert error("10 / 3 = 3.34\nFinal answer: 5", 0, "10 / 3 = 3.333333333") == "arithmetic"
