"""What went wrong in a wrong solution: told by the first equation that is not the gold solution's."""

import pytest

from irpo_utils.report.equations import KINDS, error, steps

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
        ("I think it is 12.\nFinal answer: 12", 0, "stopped early"),
    ],
)
def test_a_wrong_solution_has_its_kind_of_error(response, reward, kind):
    assert error(response, reward, GOLD) == kind
    assert kind in KINDS


def test_numbers_are_read_in_their_usual_forms():
    assert steps("5.6 * 22.5 = 126.\n1,000 x 2 = 2,000 and 8 ÷ 2 = 4; -3 + .5 = -2.5") == [
        (5.6, "*", 22.5, 126.0),
        (1000.0, "*", 2.0, 2000.0),
        (8.0, "/", 2.0, 4.0),
        (-3.0, "+", 0.5, -2.5),
    ]
    assert steps("no equation: 5 and 7") == []
