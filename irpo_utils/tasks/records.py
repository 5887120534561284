"""Problems that are records of a data set: by hub name, or from a local file in the upstream form."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import re
import zlib
from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..files import OUTPUTS, ROOT, resolve
from ..settings import GENERATED, EvaluationConfig, TaskConfig
from .base import BadRecord, Problem, Task

FORMS = (".jsonl", ".json", ".jsonl.gz", ".parquet")


def is_file(source: str) -> bool:
    """Whether a source is meant as a local file, rather than as a hub name."""
    return source.endswith(FORMS) or source.startswith((".", "/", "~")) or Path(ROOT, source).is_file()


def read_file(path: Path, where: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, record) of a JSON-lines file, which may be packed by gzip, or of a Parquet file.

    The place names file and line. Raises ValueError.
    """
    if path.is_dir():
        raise BadRecord(f"{where}: {path} is a folder; name a file in it")
    if not path.exists():
        pages = "; irpo_utils/site/pages/own_data.md, family.md (refine), real_models.md (smollm2) say what goes in"
        hint = pages if OUTPUTS / "data" in path.parents else ""
        raise BadRecord(f"{where}: {path} is missing; name one that is there, as in {where}=my.jsonl{hint}")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise BadRecord(f"{where}: {path} is no Parquet file: {error}") from None
        return [(f"{path}, record {i}", row) for i, row in enumerate(rows, 1)]
    try:
        packed = path.read_bytes()
        text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadRecord(f"{where}: {path} is no whole gzip file: {error}") from None
    except UnicodeDecodeError:
        raise BadRecord(f"{where}: {path} is no UTF-8 text; unpack it if it is compressed, or convert it") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise BadRecord(
                    f"{path}, line {number}: not JSON; expected one object a line, without a list around them"
                ) from None
            found.append((f"{path}, line {number}", record))
    return found


def read_hub(source: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, record) of a hub data set, `source` being name[:configuration[:split]]. Raises ValueError."""
    name, configuration, split = [*source.split(":"), "", ""][:3]
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the hub's library raises anything from ConnectionError to KeyError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadRecord(
            f"{where}: the data set {source!r} could not be loaded from the hub ({reason}); "
            f"give a local file instead, as in {where}=path/to/file.jsonl"
        ) from None
    return [(f"{source}, record {i}", row) for i, row in enumerate(rows, 1)]


# A point before a digit, a prime that is no apostrophe, and a factorial are none.
PUNCTUATION = re.compile(r"[\s,;:?\"$\\]|\.(?!\d)|(?<=[a-z])'(?=[a-z])|(?<=[a-z]{2})!", re.IGNORECASE)


def alike(question: str) -> str:
    """A question by its letters, numbers and operators: two that differ only in spaces, case or punctuation are one."""
    return PUNCTUATION.sub("", question).lower()


def set_names(config: EvaluationConfig) -> dict[str, str]:
    """What each further test set is called: its name, or its whole path where two have one name."""
    stems = {source: Path(source).stem for source in config.test}
    return {s: stem if [*stems.values()].count(stem) == 1 else s for s, stem in stems.items()}


def further_tests(task: Task, config: EvaluationConfig) -> dict[str, list[Problem]]:
    """The problems of `evaluation.test` by source, in the form of `task`, without what was trained on or chosen by.

    Raises:
        BadRecord: a source is missing or malformed, or has fewer problems than `evaluation.test_size`.
    """
    seen, found = set(), {}
    if config.test:
        seen = {alike(p.question) for split in ("train", "dev") for p in task.problems(split)}
        seen |= getattr(task, "shown", set())
    names = set_names(config)
    for source in config.test:
        try:
            problems = _further_problems(task, source)
        except BadRecord as error:
            raise BadRecord(str(error).replace("task.test", "evaluation.test")) from None
        fresh = [replace(p, id=f"{names[source]}/{p.id}") for p in problems if alike(p.question) not in seen]
        if not fresh:
            raise BadRecord(f"evaluation.test: all problems of {source} are in training or dev")
        if config.test_size > len(fresh):
            raise BadRecord(
                f"evaluation.test_size: {config.test_size} is more than the {len(fresh)} problems of {source} that "
                "are not in training or dev; 0 takes all"
            )
        found[source] = fresh[: config.test_size or None]
    return found


def _further_problems(task: Task, source: str) -> list[Problem]:
    if task.config.generated:
        return task.problems(source)
    if owner := next((name for name, sets in GENERATED.items() if source in sets), None):
        raise BadRecord(f"task.test: {source} is a test set of {owner}; give evaluation.test= for none, or files")
    other = type(task)(task.config.but(test=(source,), test_size=0))
    return other._read("test") if isinstance(other, RecordTask) else other.problems("test")


class RecordTask(Task):
    """What tasks made of records share: reading, held-out dev problems, no question in two splits.

    `task.train`, `task.dev` and `task.test` name files or hub data sets (several are joined); without them a task's own
    `sources` are taken. Dev problems come out of training unless `task.dev` is given, and test problems too, for a task
    without sources of its own that is given none to test on. The order is one of hashes of the questions, so that a cut
    (`task.train_size` and so on; 0 takes all) is a random sample, and the same every time.

    Raises (from `problems`):
        ValueError: a source is missing, or a record is malformed (named by file and line).
    """

    sources: ClassVar[dict[str, list[str]]] = {}
    template: ClassVar[str] = "{question}"  # of the prompt
    fields: tuple[str, ...] = ()  # what a record must have
    optional: tuple[str, ...] = ()  # what it may have; other fields are let be, unless they look like one of these
    graded_on: ClassVar[str] = '"gold": "answer"'  # what `grade` wants beside a response
    named: dict[str, Problem] | None = None  # problems by task_id, for a task that `grade` gives one

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self.notes: list[str] = []
        self.shown: set[str] = set()  # questions that every prompt shows, with their solutions

    @abstractmethod
    def problem(self, name: str, record: dict[str, Any]) -> Problem:
        """The problem that a record states. Raises ValueError for a malformed one."""

    @property
    def has_test(self) -> bool:
        """Whether test problems have a source of their own."""
        return bool(self.config.test or self.sources)

    def problems(self, split: str) -> list[Problem]:
        return self.splits[split]

    def prompt(self, problem: Problem) -> str:
        return self.template.format(question=problem.question)

    def belongs(self, split: str, record: dict[str, Any]) -> bool:
        """Whether a record of a split's source is one of that split; for data sets whose splits are in one file."""
        return True

    def gold(self, text: str) -> str:
        """The gold answer that a text states, in the form that answers are compared with. Raises ValueError."""
        return text.strip()

    def posed(self, name: str, gold: str, record: dict[str, Any]) -> Problem:
        """A problem known by its gold answer alone, to grade a response with; `record` may hold more of it."""
        return Problem(name, "", self.gold(gold))

    def examples(self, pool: list[Problem]) -> list[Problem]:
        """Training problems that every prompt shows, so that nothing is trained on them."""
        return []

    def _rows(self, split: str) -> list[tuple[str, Any]]:
        """(place, record) of all that a split's sources hold. The place names source and line in errors."""
        where = f"task.{split}"
        sources = getattr(self.config, split) or self.sources.get(split, [])
        if not sources:
            raise BadRecord(f"{where}: this task needs a file, as in {where}=path/to/file.jsonl")
        found: list[tuple[str, Any]] = []
        for source in sources:
            found += read_file(resolve(source), where) if is_file(source) else read_hub(source, where)
        rows = [(place, row) for place, row in found if not isinstance(row, dict) or self.belongs(split, row)]
        if not rows:
            raise BadRecord(f"{where}: {', '.join(sources)} has no problem in it")
        return rows

    def _read(self, split: str) -> list[Problem]:
        """The distinct problems of a split's records, in the order of their hashes."""
        where, rows = f"task.{split}", self._rows(split)
        problems: dict[str, Problem] = {}
        for total, (place, record) in enumerate(rows, 1):
            problem = self._checked(place, f"{split}-{total}", record)
            problems.setdefault(problem.question, problem)
        if len(problems) < len(rows):
            self.notes.append(
                f"{where}: {len(rows) - len(problems)} of {len(rows)} questions are there twice; the first is kept"
            )
        seed = self.config.seed
        for p in problems.values():
            try:
                f"{p.question}{p.answer}{p.solution}".encode()
            except UnicodeEncodeError:
                raise BadRecord(
                    f"{where}: the record {p.id} has characters that are no text (half of a surrogate pair)"
                ) from None
        return sorted(problems.values(), key=lambda p: hashlib.sha256(f"{seed}/{p.question}".encode()).digest())

    def _checked(self, place: str, name: str, record: Any) -> Problem:
        wanted = ", ".join(f'"{field}"' for field in self.fields)
        if not isinstance(record, dict) or not set(self.fields) <= set(record):
            raise BadRecord(f"{place}: expected an object with {wanted}")
        for field in [f for f in self.optional if f not in record]:
            if near := difflib.get_close_matches(field, set(record) - {*self.fields, *self.optional}, 1, 0.8):
                raise BadRecord(f"{place}: no field is called {near[0]!r}; did you mean {field!r}?")
        answer = record.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            record = record | {"answer": str(answer)}
        for field in ("question", "answer", "problem", "solution", "answerKey"):
            value = record.get(field)
            empty_ok = field == "solution" and field not in self.fields and value in (None, "")
            if field in record and not empty_ok and not (isinstance(value, str) and value.strip()):
                raise BadRecord(f"{place}: {field} must be text that is not empty")
        try:
            return self.problem(name, record)
        except ValueError as error:
            raise BadRecord(f"{place}: {error}") from None

    @cached_property
    def splits(self) -> dict[str, list[Problem]]:
        test, train = self._read("test") if self.has_test else [], self._read("train")
        elsewhere = {alike(p.question) for p in test}
        if self.config.dev:
            dev = [p for p in self._read("dev") if alike(p.question) not in elsewhere]
            elsewhere |= {alike(p.question) for p in dev}
        kept = [p for p in train if alike(p.question) not in elsewhere]
        if len(kept) < len(train):
            self.notes.append(f"task.train: {len(train) - len(kept)} questions of dev or test are left out of training")
        self.shown = {alike(p.question) for p in self.examples(kept)}
        kept = [p for p in kept if alike(p.question) not in self.shown]
        for split, left in (("train", kept), *((("dev", dev),) if self.config.dev else ())):
            if not left:
                raise BadRecord(f"task.{split}: no problem is left, since all its questions are in another split too")
        if not self.has_test:
            test, kept = self._hold_out(kept, "test")
        if not self.config.dev:
            dev, kept = self._hold_out(kept, "dev")
        found = {"train": kept, "dev": dev, "test": test}
        for split, problems in found.items():
            size = getattr(self.config, f"{split}_size")
            if size > len(problems):
                raise BadRecord(
                    f"task.{split}_size: {size} is more than the {len(problems)} problems there are; 0 takes all"
                )
            found[split] = problems[: size or None]
            if not found[split]:
                raise BadRecord(f"task.{split}: no problem is left; it shares all questions with another split")
        return found

    def _hold_out(self, problems: list[Problem], split: str) -> tuple[list[Problem], list[Problem]]:
        """The first of the problems, as many as `split` has, and those others that ask none of their questions."""
        count = getattr(self.config, f"{split}_size")
        if not 0 < count < len(problems):
            few = (
                f"; 1 to {len(problems) - 1} can"
                if len(problems) > 1
                else ", and one more to train on; give more problems"
            )
            raise BadRecord(
                f"task.{split}_size: {count} of the {len(problems)} training problems cannot be held out{few}"
            )
        chosen = problems[:count]
        held_out = {alike(p.question) for p in chosen}
        return chosen, [p for p in problems[count:] if alike(p.question) not in held_out]
