"""Attempts at a problem, answered by a program that solves it again: CaP (arXiv 2412.16871).

A record is a problem and somebody's chain of thought, right or wrong: {"question", "answer", "attempt"}, and "solution"
where there is a gold program. The response is a program, and what it returns when it is run is the answer. A method is
trained on such a task as on any other. The paper's two stages are imitation of programs, which is a warm start where
there are gold ones, and DPO on right and wrong ones.

`attempts` writes the records from a round of a run on another task.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..answers.arithmetic import plain, unrolled
from ..answers.marks import candidates
from ..answers.numbers import number, states
from ..answers.numbers import plain as plain_fraction
from ..files import ConfigError, read_jsonl, write_jsonl
from ..model.records import Sample
from ..tasks.base import SPLITS, Problem, Task
from ..tasks.records import RecordTask
from ..tasks.stories import Stories, Story, story_of
from .code.tasks import Code

PROMPT = (
    "Below are a question and an attempt to answer it, which may be wrong. Answer the question with a Python function "
    "solution() that takes nothing and returns the answer, a number. Write the whole program, and nothing that calls "
    "it, in one block between ```python and ```.\n\nQuestion: {question}\n\nAttempt:\n{attempt}"
)
PROGRAM = re.compile(r"^(?:def +solution *\(|solution *= *lambda\b)", re.MULTILINE)
WITHIN = 1e-9  # of the gold answer, relative to it: what floating point may lose


class Refined(RecordTask):
    """The `refined` task: the response is a Python function, which is run in the sandbox.

    A response without one that ends in a marked answer ("Final answer: 6") is a refinement too.
    """

    template = PROMPT
    fields = ("question", "answer", "attempt")
    optional = ("solution",)
    own_processes = True  # the sandbox's

    @cached_property
    def programs(self) -> Code:
        """What finds programs and runs them."""
        return Code(self.config)

    def problem(self, name: str, record: dict) -> Problem:
        gold, attempt, solution = number(record["answer"]), record["attempt"], record.get("solution") or ""
        if gold is None:
            raise ValueError(f"the answer of a program must be a number, got {record['answer']!r}")
        if not isinstance(attempt, str) or not attempt.strip():
            raise ValueError("attempt must be text that is not empty")
        try:
            attempt.encode()
        except UnicodeEncodeError:
            raise ValueError("attempt has characters that are no text (half of a surrogate pair)") from None
        within = WITHIN * (abs(float(gold)) or 1.0)
        test = f"assert abs(float(solution()) - {float(gold)!r}) <= {within!r}"
        meta = {"attempt": attempt, "tests": test, "names": ["solution"], "before": ""}
        problem = Problem(name, record["question"], record["answer"].strip(), solution, meta)
        if solution:
            self.check_gold(problem)
        return problem

    def check_gold(self, problem: Problem) -> None:
        """Raise a ValueError for a gold solution that is seen to be wrong; a program is read, and not run."""
        found = self.extract(problem.solution, problem)
        if found is None:
            raise ValueError("the solution is no program, and has no final answer")
        if PROGRAM.search(found):
            try:
                ast.parse(found)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise ValueError(f"the solution is no Python: {error}") from None
        elif not states(found, number(problem.answer)):
            raise ValueError(f"the solution comes to {found!r}, the answer is {problem.answer!r}")

    def prompt(self, problem: Problem) -> str:
        return self.template.format(question=problem.question, attempt=problem.meta["attempt"])

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        program = self.programs.extract(response, problem, flexible)
        return program if program and PROGRAM.search(program) else next(candidates(response, None), None)

    def equal(self, answer: str, problem: Problem) -> bool | None:
        return self.equal_all([answer], [problem])[0]

    def equal_all(self, answers: list[str], problems: list[Problem]) -> list[bool | None]:
        """Raises Refused: programs cannot be run in isolation here, whether these are programs or not."""
        _ = self.programs.sandbox.command
        both = list(zip(answers, problems, strict=True))
        found = [(a, p) for a, p in both if PROGRAM.search(a)]
        ran = iter(self.programs.equal_all([a for a, _ in found], [p for _, p in found]))
        return [next(ran) if PROGRAM.search(a) else states(a, number(p.answer)) for a, p in both]

    def vote(self, answer: str) -> str:
        value = None if PROGRAM.search(answer) else number(answer)
        return self.programs.vote(answer) if value is None else plain_fraction(value)


class RefinedStories(Refined):
    """The `refined_stories` task, for the embedded model: a program is lines of arithmetic, each on what came before.

    The first line is an expression, the others begin with an operation: "12 - 2" and " * 3" come to 30.
    """

    template: ClassVar[str] = "Question: {question}\nAnswer:\n{attempt}\nAnswer:\n"
    own_processes = False

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        return computed(response)

    def equal_all(self, answers: list[str], problems: list[Problem]) -> list[bool | None]:
        return [states(a, number(p.answer)) for a, p in zip(answers, problems, strict=True)]


def computed(program: str) -> str | None:
    """What lines of arithmetic come to, to ten digits; None for anything else."""
    value = ""
    try:
        for line in filter(None, map(str.strip, program.split("\n"))):
            if bool(value) != bool(re.match(r"[-+*/] ", line)):
                return None
            value = repr(unrolled(f"({value}) {line}" if value else line)[1])
        return plain(float(value)) if value else None
    except ValueError:
        return None


def program_of(story: Story) -> str:
    """The right program of a story: an operation a line, and none for an event that changes nothing."""
    first, *others = [event.operation() for event in story.events if event.kind != "apart"] or [""]
    return "\n".join([f"{story.start} {first}".strip(), *(f" {operation}" for operation in others)])


def attempts(task: Task, samples: Path, responses: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Write train.jsonl, dev.jsonl and test.jsonl into `folder`: problems whose answer is a number, with an attempt.

    Problems that were not asked, as those of a warm start, and empty responses are left out. Problems of stories have a
    gold program; others have none.

    Args:
        task: of the run that the attempts come from. samples: its samples.jsonl, whose first sample of a problem is the
            attempt in training. responses: responses.jsonl of the same model's evaluation, whose greedy ones are the
            others'.

    Returns:
        how many records each split has, and how many of their attempts are right.

    Raises:
        MissingArtefact: a file is missing. ConfigError: a split has no such problem.
    """
    drawn = Sample.by_problem(Sample.read(samples, "01_sample.ipynb"))
    found = {name: (own[0].response, own[0].answer_reward) for name, own in drawn.items()}
    greedy = read_jsonl(responses, "04_evaluate.ipynb")
    found |= {row["problem"]: (row["response"], row["greedy"]) for row in greedy}
    records: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    right = Counter()
    for split, rows in records.items():
        for p in task.problems(split):
            attempt, reward = found.get(p.id, ("", None))
            if number(p.answer) is not None and attempt.strip():
                rows.append({"question": p.question, "answer": p.answer, "attempt": attempt})
                rows[-1] |= {"solution": program_of(story_of(p))} if isinstance(task, Stories) else {}
                right[split] += reward == 1
        if not rows:
            raise ConfigError(f"attempts: no {split} problem has an attempt, and an answer that is a number")
    for split, rows in records.items():
        write_jsonl(folder / f"{split}.jsonl", rows)
    return {split: (len(rows), right[split]) for split, rows in records.items()}
