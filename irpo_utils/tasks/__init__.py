"""Tasks: where problems come from, how they are put to the model, and what counts as a right answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..files import ConfigError, load_object, source_of
from ..settings import TaskConfig
from .base import SPLITS, BadRecord, Problem, Task

# Task name -> "module:Class". `task.name=path/to/file.py:Class` names a class of your own.
TASKS = {
    "stories": "irpo_utils.tasks.stories:Stories",
    "gsm8k": "irpo_utils.tasks.gsm8k:GSM8K",
    "math": "irpo_utils.tasks.math:MATH",
    "arc_challenge": "irpo_utils.tasks.arc:ARC",
    "mbpp": "irpo_utils.extras.code.tasks:MBPP",
    "humaneval": "irpo_utils.extras.code.tasks:HumanEval",
    "mmlu_math": "irpo_utils.tasks.mmlu_math:MMLUMath",
    "jsonl": "irpo_utils.tasks.jsonl:JsonLines",
    "refined": "irpo_utils.extras.refine:Refined",
    "refined_stories": "irpo_utils.extras.refine:RefinedStories",
}


def check_name(name: str) -> None:
    """Raise a ConfigError for a name that is no task's, nor of the form of a class of the user's."""
    if name not in TASKS and source_of(name) is None:
        raise ConfigError(
            f"task.name: no task is called {name!r}; there is: {', '.join(sorted(TASKS))}, "
            "or a class of your own as in my_task.py:MyTask"
        )


def get_task(config: TaskConfig) -> Task:
    """The task that the parameters name.

    Raises:
        ConfigError: there is no such task, or the class of your own is missing, is no `Task` or cannot be made.
    """
    if config.name in TASKS:
        return load_object(TASKS[config.name])(config)
    check_name(config.name)
    try:
        own = load_object(config.name)
    except ConfigError as error:
        raise ConfigError(f"task.name: {error}") from error
    if not (isinstance(own, type) and issubclass(own, Task)):
        name = config.name.rpartition(":")[2]
        raise ConfigError(
            f"task.name: {config.name} is no task; import Task from irpo_utils.tasks and write class {name}(Task)"
        )
    with _one_error(config.name):
        return own(config)


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Whatever a class of the user's raises, as one ConfigError that names the class."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, BadRecord):
            raise ConfigError(str(error)) from None
        raise ConfigError(f"task.name: {name} fails: {type(error).__name__}: {error}") from error


def check_task(task: Task, name: str) -> dict[str, list[Problem]]:
    """The problems of every split, after a look at whether a run can use the task.

    Raises:
        ConfigError: problems are no `Problem`s or have no text, an id or a question occurs twice, the order changes
            from call to call, or one of the four methods does not do what `Task` says.
    """
    splits = {split: _checked_split(task, name, split) for split in SPLITS}
    everything = [problem for problems in splits.values() for problem in problems]
    for field in ("id", "question"):
        values = [getattr(problem, field) for problem in everything]
        if not all(isinstance(value, str) and value for value in values):
            raise ConfigError(f"task.name: {name}: every problem's {field} must be text that is not empty")
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ConfigError(
                f"task.name: {name}: two problems have the {field} {twice[:60]!r}; "
                "a split must not share any with another"
            )
    first = everything[0]
    with _one_error(f"{name}, on the problem {first.id},"):
        texts = [task.prompt(first), first.answer, first.solution]
        answers = [task.extract("Final answer: 1", first, flexible=flexible) for flexible in (False, True)]
        task.equal("1", first)
    if not all(isinstance(text, str) for text in texts) or not all(a is None or isinstance(a, str) for a in answers):
        raise ConfigError(
            f"task.name: {name}: prompt, answer, solution and what extract finds must be text (or None for no answer)"
        )
    return splits


def _checked_split(task: Task, name: str, split: str) -> list[Problem]:
    with _one_error(f"{name}.problems({split!r})"):
        problems, again = list(task.problems(split)), list(task.problems(split))
    if not problems or not all(isinstance(problem, Problem) for problem in problems):
        raise ConfigError(f"task.name: {name}.problems({split!r}) must give at least one irpo_utils.tasks.Problem")
    if problems != again:
        raise ConfigError(
            f"task.name: {name}.problems({split!r}) must give the same problems in the same order every time"
        )
    return problems
