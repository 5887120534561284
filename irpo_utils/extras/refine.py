"""Attempts at a problem, answered by a program that solves it again: CaP (arXiv 2412.16871).

A record is a problem and somebody's chain of thought, right or wrong: {"question", "answer", "attempt"}, and "solution"
where there is a gold program. The response is the program, and what it returns when it is run is the answer. Any
method of the family can be trained on such a task. The paper's two stages, imitation and then DPO on right and wrong
refinements, are those of `self_refine`.

`attempts` writes the records from a round of a run on another task.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from ..answers.arithmetic import plain, unrolled
from ..answers.marks import candidates
from ..answers.numbers import number, states
from ..files import ConfigError, read_jsonl, write_jsonl
from ..model.records import Sample
from ..tasks.base import SPLITS, Problem, Task
from ..tasks.stories import Stories, Story, story_of
from .code.tasks import Code, defines

PROMPT = (
    "Below are a question and an attempt to answer it, which may be wrong. Answer the question with a Python function "
    "solution() that takes nothing and returns the answer, a number. Write the whole program, and nothing that calls "
    "it, in one block between ```python and ```.\n\nQuestion: {question}\n\nAttempt:\n{attempt}"
)
NAME = "solution"  # of the function
WITHIN = 1e-6  # of the gold answer, relative to it if that is above 1


class Refined(Code):
    """The `refined` task: the response is a Python function, which is run in the sandbox.

    A response without a program that ends in a marked answer ("Final answer: 6") is a refinement too.
    """

    template = PROMPT
    fields = ("question", "answer", "attempt")
    optional = ("solution",)

    def problem(self, name: str, record: dict) -> Problem:
        gold, attempt = number(record["answer"]), record["attempt"]
        if gold is None:
            raise ValueError(f"the answer of a program must be a number, got {record['answer']!r}")
        if not isinstance(attempt, str) or not attempt.strip():
            raise ValueError("attempt must be text that is not empty")
        test = f"assert abs(float({NAME}()) - {float(gold)!r}) <= {WITHIN * max(1.0, abs(float(gold)))!r}"
        meta = {"attempt": attempt, "tests": test, "names": [NAME], "before": ""}
        solution = record.get("solution") or ""
        if solution and self.extract(solution, Problem(name, "", "", meta=meta)) is None:
            raise ValueError("the solution is no program, and has no final answer")
        return Problem(name, record["question"], record["answer"].strip(), solution, meta)

    def prompt(self, problem: Problem) -> str:
        return self.template.format(question=problem.question, attempt=problem.meta["attempt"])

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        program = super().extract(response, problem, flexible)
        return program if program and defines(program, NAME) else next(candidates(response, None), None)

    def equal_all(self, answers: list[str], problems: list[Problem]) -> list[bool | None]:
        programs = [(a, p) for a, p in zip(answers, problems, strict=True) if defines(a, NAME)]
        ran = iter(super().equal_all(*map(list, zip(*programs, strict=True))) if programs else ())
        return [
            next(ran) if defines(a, NAME) else states(a, number(p.answer))
            for a, p in zip(answers, problems, strict=True)
        ]


class RefinedStories(Refined):
    """The `refined_stories` task, for the embedded model: a program is lines of arithmetic, each on what came before.

    The first line begins with a number, the others with an operation: "12 - 2", " * 3" is 30.
    """

    template: ClassVar[str] = "Question: {question}\nAnswer:\n{attempt}\nAnswer:\n"

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        value = computed(response)
        return None if value is None else plain(value)


def computed(program: str) -> float | None:
    """What lines of arithmetic come to; None for anything else."""
    lines = [line.strip() for line in program.split("\n") if line.strip()]
    value = ""
    try:
        for line in lines:
            if bool(value) != bool(re.match(r"[-+*/] ", line)):
                return None
            value = plain(unrolled(f"({value}) {line}" if value else line)[1])
        return float(value) if value else None
    except ValueError:
        return None


def program_of(story: Story) -> str:
    """The right program of a story: an operation a line, and none for an event that changes nothing."""
    first, *others = [event.operation() for event in story.events if event.kind != "apart"] or [""]
    return "\n".join([f"{story.start} {first}".strip(), *(f" {operation}" for operation in others)])


def attempts(task: Task, samples: Path, responses: Path, folder: Path) -> dict[str, int]:
    """Write train.jsonl, dev.jsonl and test.jsonl into `folder`: problems whose answer is a number, with an attempt.

    Args:
        task: of the run that the attempts come from. samples: its samples.jsonl, whose first sample of a problem is the
            attempt in training. responses: responses.jsonl of the same model's evaluation, whose greedy ones are the
            others'.

    Returns:
        how many records each split has.

    Raises:
        MissingArtefact: a file is missing. ConfigError: no answer is a number.
    """
    drawn = Sample.by_problem(Sample.read(samples, "01_sample.ipynb"))
    found = {name: own[0].response for name, own in drawn.items()}
    found |= {row["problem"]: row["response"] for row in read_jsonl(responses, "04_evaluate.ipynb")}
    counts = {}
    for split in SPLITS:
        rows: list[dict[str, Any]] = []
        for p in task.problems(split):
            if p.id in found and number(p.answer) is not None and found[p.id].strip():
                rows.append({"question": p.question, "answer": p.answer, "attempt": found[p.id]})
                rows[-1] |= {"solution": program_of(story_of(p))} if isinstance(task, Stories) else {}
        if not rows:
            raise ConfigError(f"attempts: no {split} problem has an attempt, and an answer that is a number")
        write_jsonl(folder / f"{split}.jsonl", rows)
        counts[split] = len(rows)
    return counts
