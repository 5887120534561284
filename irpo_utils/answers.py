"""Find the final answer in a response. Right, wrong and *unparsed* are three classes, counted apart."""

from __future__ import annotations

import re

MARK = re.compile(r"Final answer:[ \t]*(.*)", re.IGNORECASE)


def marked_answer(response: str) -> str | None:
    """The text after the last "Final answer:" of a response, to the end of its line; None where there is none.

    The last mark counts, since a chain of thought may mention one before it concludes.
    """
    found = MARK.findall(response)
    answer = found[-1].strip().rstrip(".") if found else ""
    return answer or None


def reward(task, response: str, gold: str) -> float | None:
    """1.0 for a right final answer, 0.0 for a wrong one, None for a response without one (arXiv 2404.19733, sec. 2)."""
    answer = task.extract(response)
    return None if answer is None else float(task.equal(answer, gold))
