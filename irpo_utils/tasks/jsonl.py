"""A user's own problems: a folder with `train.jsonl`, `dev.jsonl` and `test.jsonl`, one problem per line.

{"question": "...", "answer": "42", "solution": "optional gold chain of thought"}
"""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from pathlib import Path

from ..answers import marked_answer
from . import SPLITS, Problem

# The paper's zero-shot prompt in our words: reason step by step, then conclude in a form that can be checked.
INSTRUCTION = 'Answer the question below. Reason step by step, then end with a line "Final answer: ..." that holds the answer alone.'


class JsonLines:
    """The `jsonl` task; `config.path` is the folder. `*_size` cut a split short; 0 takes all of it.

    Raises:
        ValueError: a file is missing, a line is not a problem (named by its number), or two splits share a question.
    """

    def __init__(self, config):
        self.folder = Path(config.path)
        self.sizes = {"train": config.train_size, "dev": config.dev_size, "test": config.test_size}
        self.splits = {split: self._read(split) for split in SPLITS}
        for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
            shared = {p.question for p in self.splits[first]} & {p.question for p in self.splits[second]}
            if shared:
                raise ValueError(
                    f"task.path: {first} and {second} share {len(shared)} question(s), such as {min(shared)!r}; remove them from one"
                )

    def _read(self, split: str) -> list[Problem]:
        path = self.folder / f"{split}.jsonl"
        if not path.exists():
            raise ValueError(f"task.path: {path} is missing; the folder needs train.jsonl, dev.jsonl and test.jsonl")
        problems = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                fields = [record[name] for name in ("question", "answer")] + [record.get("solution", "")]
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {number}: expected {{"question": "...", "answer": "..."}}') from None
            if not all(isinstance(f, str) for f in fields) or not fields[0] or not fields[1].strip():
                raise ValueError(f"{path}, line {number}: question and answer must be text that is not empty")
            solution = fields[2]
            if solution and marked_answer(solution) is None:
                solution = f"{solution.rstrip()}\nFinal answer: {fields[1]}"
            problems.append(Problem(f"{split}-{number}", fields[0], fields[1], solution))
        if not problems:
            raise ValueError(f"{path} has no problem in it")
        return problems[: self.sizes[split] or None]

    def problems(self, split: str) -> list[Problem]:
        return self.splits[split]

    def prompt(self, problem: Problem) -> str:
        return f"{INSTRUCTION}\n\nQuestion: {problem.question}"

    def extract(self, response: str) -> str | None:
        return marked_answer(response)

    def equal(self, answer: str, gold: str) -> bool:
        return _normal(answer) == _normal(gold)


def _normal(answer: str) -> str | Decimal:
    """A number as its value ("1,200.0" is "1200"), any other answer as its text without case and outer spaces."""
    text = answer.strip().rstrip(".").strip().lower()
    try:
        number = Decimal(text.replace(",", "").lstrip("$"))
    except InvalidOperation:
        return text
    return number if number.is_finite() else text
