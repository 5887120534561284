"""The share of votes as a reward, which needs no gold answer (ScPO, arXiv 2411.04109)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from ..model.records import Sample
from .rewards import Job


def votes(job: Job) -> tuple[list[Sample], dict[str, Any]]:
    """Each sample's reward is the share of its problem's samples that have its answer; None where none could be read.

    Returns:
        the samples, and facts: of the problems with a majority (the first of those that tie) how many have the right
        one. No method sees it. Where a wrong answer is easily guessed, the majority misleads.
    """
    voted: list[Sample] = []
    right = led = 0
    for own in job.samples.values():
        answers = [None if s.answer is None else job.task.vote(s.answer) for s in own]
        counts = Counter(a for a in answers if a is not None)
        voted += [
            replace(s, reward=None if a is None else counts[a] / len(own)) for s, a in zip(own, answers, strict=True)
        ]
        if counts:
            led += 1
            right += own[answers.index(counts.most_common(1)[0][0])].answer_reward == 1
    return voted, {"problems_with_votes": led, "majority_right": right, "drawn_tokens": 0, "trained_tokens": 0}
