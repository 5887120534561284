"""What travels between the stages: prompts, samples and pairs, as token ids beside their text. No torch here.

Each is a line of a JSON-lines file (`prompts.jsonl`, `samples.jsonl` and `rewarded.jsonl`, `pairs.jsonl`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from ..files import MissingArtefact, read_jsonl, write_jsonl

Ids = tuple[int, ...]
_SAME: Any = object()  # an answer_reward that is not given is the reward


class Record:
    """Reads and writes a frozen dataclass as a line of JSON. A field with its default value is left out of the line."""

    @classmethod
    def read(cls, path: Path, made_by: str) -> list[Self]:
        """The records of a file. Raises MissingArtefact, which names the line and the notebook that makes the file."""
        known = {f.name: f for f in fields(cls)}
        found = []
        for number, row in enumerate(read_jsonl(path, made_by), 1):
            row = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
            try:
                found.append(cls(**{name: value for name, value in row.items() if name in known}))
            except TypeError:
                raise MissingArtefact(
                    f"{path}, line {number} is damaged or cut off; delete it and run {made_by} again"
                ) from None
        return found

    @staticmethod
    def write(path: Path, records: Iterable[Record]) -> None:
        write_jsonl(path, (record.as_row() for record in records))

    def as_row(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not f.default}


@dataclass(frozen=True)
class Prompt(Record):
    """A problem as the model reads it, and its gold solution as it would have drawn it ("" where there is none)."""

    problem: str
    prompt: str  # text, before the chat template
    prompt_ids: Ids
    gold: str = ""
    gold_ids: Ids = ()


@dataclass(frozen=True)
class Sample(Record):
    """A response that was drawn, and what it is worth.

    `answer_reward` is 1 for a right answer, 0 for a wrong one, None where none could be read (unparsed). `reward` is
    what the method selects by: the same, unless a reward model, a judge or the like has given another.
    """

    problem: str
    sample: int  # number among the problem's samples; -1 for a greedy response that came along
    response: str
    answer: str | None
    reward: float | None
    flexible: float | None  # the answer's reward if it need not be marked
    finished: bool  # whether it ended by itself
    logp: (
        float | None
    )  # log M_t(response | prompt) in nats, the sum over its tokens that were drawn; None if another prompt drew it
    token_ids: Ids
    answer_reward: float | None = _SAME  # in a line only where it is not the reward
    extra: bool = False  # drawn on top of the N
    inserted: Ids = ()  # numbers of its tokens that a calculator wrote
    step_scores: tuple[float, ...] = ()
    step_ends: tuple[int, ...] = ()  # numbers of the tokens that end those steps
    thought: int | None = None  # how many of its tokens come before the gold answer that took the place of its own

    def __post_init__(self):
        if self.answer_reward is _SAME:
            object.__setattr__(self, "answer_reward", self.reward)

    @staticmethod
    def by_problem(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
        """Problem id -> its samples, both in the order in which they come."""
        found: dict[str, list[Sample]] = {}
        for sample in samples:
            found.setdefault(sample.problem, []).append(sample)
        return found

    def as_row(self) -> dict[str, Any]:
        row = super().as_row()
        if self.answer_reward == self.reward:
            del row["answer_reward"]
        return row


@dataclass(frozen=True)
class Pair(Record):
    """A chosen and a rejected response to one prompt, to train on. If none is rejected its text and ids are empty."""

    problem: str
    prompt: str
    chosen: str
    rejected: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    chosen_logp: float | None  # what the sampler saw; None for gold solutions
    rejected_logp: float | None
    reward_gap: float = 1.0  # by how much the chosen one's reward is above the rejected one's
    chosen_inserted: Ids = ()  # numbers of the tokens that a calculator wrote, which are not trained on
    rejected_inserted: Ids = ()
    reference_chosen: float | None = None  # the reference's log-probabilities, once they are scored
    reference_rejected: float | None = None
