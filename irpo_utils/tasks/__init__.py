"""Tasks: where problems come from, how they are asked, and what counts as a right answer."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from importlib import import_module

from ..files import local_path
from .base import SPLITS, Problem, Task

# Task name -> "module:Class". `task.name=path/to/file.py:Class` names a class of your own.
TASKS = {
    "word_problems": "irpo_utils.tasks.word_problems:WordProblems",
    "gsm8k": "irpo_utils.tasks.gsm8k:GSM8K",
    "math": "irpo_utils.tasks.math:MATH",
    "arc_challenge": "irpo_utils.tasks.arc:ARC",
    "mbpp": "irpo_utils.extras.code.tasks:MBPP",
    "humaneval": "irpo_utils.extras.code.tasks:HumanEval",
    "mmlu_math": "irpo_utils.tasks.mmlu_math:MMLUMath",
    "jsonl": "irpo_utils.tasks.jsonl:JsonLines",
}


def get_task(config) -> Task:
    """The task that a `TaskConfig` names.

    Raises:
        ValueError: there is no such task, or the file of your own has no such class.
    """
    where, _, name = TASKS.get(config.name, config.name).rpartition(":")
    if config.name in TASKS:
        return getattr(import_module(where), name)(config)
    path = local_path(where)
    if path.suffix != ".py":
        raise ValueError(
            f"task.name: no task is called {config.name!r}; there is: {', '.join(sorted(TASKS))}, "
            "or a class of your own as in my_task.py:MyTask"
        )
    if not path.is_file():
        raise ValueError(f"task.name: {path} is missing")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with _own(config.name):
        spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"task.name: {path} has no class {name!r}")
    with _own(config.name):
        return getattr(module, name)(config)


@contextmanager
def _own(name: str):
    """What a class of the user's raises, as one ValueError that names the class."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"task.name: {name} fails: {type(error).__name__}: {error}") from error


def check_task(task: Task, name: str) -> dict[str, list[Problem]]:
    """The problems of every split, after a look at whether a run can use the task.

    Raises:
        ValueError: problems are no `Problem`s or have no text, an id or a question occurs twice, the order changes from
            call to call, or one of the four methods does not do what `Task` says.
    """
    found = {}
    for split in SPLITS:
        with _own(f"{name}.problems({split!r})"):
            problems, again = list(task.problems(split)), list(task.problems(split))
        if not problems or not all(isinstance(p, Problem) for p in problems):
            raise ValueError(f"task.name: {name}.problems({split!r}) must give at least one irpo_utils.tasks.Problem")
        if problems != again:
            raise ValueError(
                f"task.name: {name}.problems({split!r}) must give the same problems in the same order every time"
            )
        found[split] = problems
    everything = [p for problems in found.values() for p in problems]
    for what in ("id", "question"):
        values = [getattr(p, what) for p in everything]
        if not all(isinstance(value, str) and value for value in values):
            raise ValueError(f"task.name: {name}: every problem's {what} must be text that is not empty")
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ValueError(
                f"task.name: {name}: two problems have the {what} {twice[:60]!r}; a split must not share any with another"
            )
    one = everything[0]
    with _own(f"{name}, on the problem {one.id},"):
        texts = [task.prompt(one), one.answer, one.solution]
        answers = [task.extract("Final answer: 1", one, flexible=flexible) for flexible in (False, True)]
        task.equal("1", one)
    if not all(isinstance(text, str) for text in texts) or not all(a is None or isinstance(a, str) for a in answers):
        raise ValueError(
            f"task.name: {name}: prompt, answer, solution and what extract finds must be text (or None for no answer)"
        )
    return found
