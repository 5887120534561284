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
        if not path.is_file():
            raise ValueError(f"task.path: {path} is missing; the folder needs train.jsonl, dev.jsonl and test.jsonl")
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"task.path: {path} is not UTF-8; convert it") from None
        problems: dict[str, Problem] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            problem = self._problem(f"{path}, line {number}", f"{split}-{number}", line)
            if problem.question in problems:
                raise ValueError(f"{path}, line {number}: the question is there already; remove one")
            problems[problem.question] = problem
        if not problems:
            raise ValueError(f"task.path: {path} has no problem in it")
        size = self.sizes[split]
        if size > len(problems):
            raise ValueError(f"task.{split}_size: {size} is more than the {len(problems)} of {path}; 0 takes all")
        return list(problems.values())[: size or None]

    def _problem(self, where: str, name: str, line: str) -> Problem:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not {"question", "answer"} <= set(record) <= {
            "question",
            "answer",
            "solution",
        }:
            raise ValueError(f'{where}: expected {{"question": "...", "answer": "...", "solution": optional}}')
        question, answer, solution = (record.get(key) or "" for key in ("question", "answer", "solution"))
        for key, value in (("question", question), ("answer", answer), ("solution", solution)):
            if not isinstance(value, str) or (key != "solution" and not value.strip()):
                raise ValueError(f"{where}: {key} must be text" + ("" if key == "solution" else " that is not empty"))
        if solution and marked_answer(solution) is None:
            solution = f"{solution.rstrip()}\nFinal answer: {answer}"
        if solution and not self.equal(marked_answer(solution), answer):
            raise ValueError(f"{where}: the solution ends in {marked_answer(solution)!r}, the answer is {answer!r}")
        return Problem(name, question, answer, solution)

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
