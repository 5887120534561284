"""python -m irpo_utils grade --task gsm8k|math|arc_challenge|mmlu_math|mbpp|humaneval [--flexible] FILE.jsonl

Grades any file of records {"response": "...", "gold": "..."} (for arc_challenge optionally "choices", as upstream).
Programs are run on tests: {"response": "...", "task_id": 11}, or the upstream fields of the problem in place of its
task_id ("test_list" for mbpp; "prompt", "entry_point" and "test" for humaneval).
Writes {"extracted": ..., "correct": true|false|null} a line to standard output, in order, and a summary to standard
error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from ..files import ConfigError
from ..settings import EXECUTIONS, TaskConfig
from ..tasks import get_task
from ..tasks.base import Problem
from ..tasks.grading import Verdict, grade
from ..tasks.records import RecordTask

GRADED = ("gsm8k", "math", "arc_challenge", "mmlu_math", "mbpp", "humaneval")


class Malformed(ValueError):
    """A line of the file cannot be graded; the message names it."""


def read_records(path: Path, task: RecordTask) -> tuple[list[str], list[Problem]]:
    """The responses of a file and, for each, a problem that holds its gold answer or its tests.

    Lines with the same gold answer and choices share one problem. Raises Malformed, OSError.
    """
    responses, problems, posed = [], [], {}
    by_gold = '"gold"' in task.graded_on
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            response, gold = record["response"], record["gold"] if by_gold else ""
            key = (str(gold), json.dumps(record.get("choices"))) if by_gold else number
        except (ValueError, KeyError, TypeError, RecursionError):
            response = gold = None
        if not isinstance(response, str) or isinstance(gold, bool) or not isinstance(gold, str | int | float):
            raise Malformed(f'{path}, line {number}: expected {{"response": "text", {task.graded_on}}}')
        try:
            if key not in posed:
                posed[key] = task.posed(str(number), str(gold), record)
            problems.append(posed[key])
        except ValueError as error:
            raise Malformed(f"{path}, line {number}: {error}") from None
        responses.append(response)
    if not responses:
        raise Malformed(f"{path}: no response in it")
    return responses, problems


def summary(verdicts: list[Verdict]) -> str:
    counts, total = Counter(v.correct for v in verdicts), max(1, len(verdicts))
    kinds = {"right": True, "wrong": False, "unparsed": None}
    return ", ".join(f"{name} {counts[value]} ({counts[value] / total:.1%})" for name, value in kinds.items())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m irpo_utils grade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--task", required=True, choices=GRADED)
    parser.add_argument(
        "--flexible",
        action="store_true",
        help="fall back on the last number, option or formula where no answer is marked",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        default=[],
        help="mbpp, humaneval: the data set's file, for records with a task_id (default: from the hub)",
    )
    parser.add_argument("--execution", choices=EXECUTIONS, default=EXECUTIONS[0], help="mbpp, humaneval: of programs")
    options = parser.parse_args(arguments)
    task = get_task(TaskConfig(name=options.task, test=options.data, execution=options.execution))
    say, processes = partial(print, file=sys.stderr), min(8, os.cpu_count() or 1)
    try:
        if options.data and task.named is None:
            raise Malformed(f"--data: {options.task} grades by the gold answer in each record; leave it out")
        if options.data and not task.named:
            raise Malformed(f"--data: {', '.join(options.data)} has no problem in it")
        responses, problems = read_records(options.file, task)
        verdicts = grade(task, responses, problems, flexible=options.flexible, processes=processes)
    except ValueError as error:  # a line of the file or of the data set, or programs that cannot be run here
        raise ConfigError(str(error)) from error
    sys.stdout.writelines(json.dumps({"extracted": v.extracted, "correct": v.correct}) + "\n" for v in verdicts)
    if options.flexible:
        say(f"strict:   {summary(grade(task, responses, problems, processes=processes))}")
    if task.undecided:
        say(f"{task.undecided} answers took the symbolic check too long and are unparsed")
    say(f"{'flexible' if options.flexible else 'strict'}: {summary(verdicts)}  [{len(verdicts)} responses]")
    return 0
