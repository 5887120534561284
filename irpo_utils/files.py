"""Where the project is, files that are whole or not there, hashes, locks, objects named by a string, and the errors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from filelock import FileLock, Timeout

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
OUTPUTS = ROOT / "outputs"


class ConfigError(ValueError):
    """A parameter is unknown, mistyped or out of range; the message names it and says what to change."""


class MissingArtefact(FileNotFoundError):
    """An input is not there, or is damaged; the message names the notebook that makes it."""


class Busy(RuntimeError):
    """Another process is at work in the same folder."""


def resolve(path: str | Path) -> Path:
    """A file or folder that a parameter names; relative to the project, wherever the process was started."""
    return ROOT / Path(path).expanduser()


def relative(path: Path) -> str:
    """A path as it is printed: relative to the project, so that an executed notebook reads the same elsewhere."""
    return os.path.relpath(path, ROOT)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what it renames
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say where
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing is done where none is."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def replace(new: Path, old: Path) -> None:
    """Put a file or a folder in the place of another, or where none is."""
    if not new.is_dir():
        os.replace(new, old)
        return
    aside = old.with_name(f".{old.name}.old")  # a folder that is not empty cannot be replaced in one step
    remove(aside)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    remove(aside)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path, made_by: str = "the stage before") -> list[dict[str, Any]]:
    """The records of a JSON-lines file.

    Raises:
        MissingArtefact: the file is missing or empty, or a line is no whole record; names the line and what to do.
    """
    if not path.exists():
        raise MissingArtefact(f"{path} is missing; run {made_by} first")
    if not path.stat().st_size:
        raise MissingArtefact(f"{path} is empty; delete it and run {made_by} again")
    rows = []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise MissingArtefact(f"{path}, line {number} is damaged or cut off; delete it and run {made_by} again")
        rows.append(row)
    return rows


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML lets the last one win."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{key!r} is given twice (line {node.start_mark.line + 1} and below); keep one")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; {} for an empty one. Raises ConfigError."""
    try:
        found = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except (OSError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return {} if found is None else found


def file_hash(path: Path, suffixes: tuple[str, ...] = (), sampled_above: int | None = None) -> str:
    """SHA-256 of a file, or of a folder's files with their names (those that end in one of `suffixes`, if any).

    Of a file with more than `sampled_above` bytes only the size and both ends count: the weights of a large model do
    not change in place, and reading them whole at every stage would take longer than some stages.
    """
    digest = hashlib.sha256()
    inside = sorted(p for p in path.rglob("*") if p.is_file() and (not suffixes or p.suffix in suffixes))
    for part in inside if path.is_dir() else [path]:
        digest.update(part.relative_to(path).as_posix().encode())
        size = part.stat().st_size
        with open(part, "rb") as f:
            if sampled_above is not None and size > sampled_above:
                digest.update(f"{size}".encode() + f.read(1 << 20))
                f.seek(-(1 << 20), os.SEEK_END)
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[int]:
    """Hold `path` as a lock, given back when the block or the process ends, however it ends.

    Yields its file descriptor, for processes that are to hold it too. Raises Busy after `patience` seconds.
    """
    lock = lock_at(path)
    take(lock, patience)
    try:
        yield lock._context.lock_file_fd  # filelock has no public name for it
    finally:
        lock.release()


def lock_at(path: Path) -> FileLock:
    """The lock that `path` is. One process can take it again, so that "Run All" twice does not wait for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, is_singleton=True)


def take(lock: FileLock, patience: float) -> None:
    """Take a lock. Raises Busy, naming its holder, if another process holds it for `patience` seconds (-1: waits)."""
    path = Path(lock.lock_file)
    holder = path.with_name(f"{path.name}.holder")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        name = holder.read_text() if holder.exists() else "another process"
        hint = "shut its kernel down (Kernel, Shut Down)" if ".ipynb" in name else "wait for it or stop it"
        raise Busy(f"{name} is at work in {relative(path.parent)}; {hint}, or choose another run=") from None
    write_text(holder, f"process {os.getpid()} of {socket.gethostname()} ({own_name()})")


def own_name() -> str:
    """What a person calls this process: a notebook that is open in JupyterLab, or a command."""
    if notebook := os.environ.get("JPY_SESSION_NAME"):
        return f"the notebook {relative(Path(notebook))}"
    program = Path(sys.argv[0])
    if program.name.startswith("ipykernel"):
        return "a kernel of ./run_all.sh or papermill"
    return " ".join(["./run_all.sh" if program.parent == PACKAGE else program.name, *sys.argv[1:]])


_own_names: set[str] = set()


def own_modules() -> list[ModuleType]:
    """The modules that were made of files of the user's."""
    return [sys.modules[name] for name in sorted(_own_names) if name in sys.modules]


@cache
def _own_module(path: Path, digest: str) -> ModuleType:
    """A Python file of the user's, run once for each content that it has."""
    name = f"{path.stem}_{digest[:12]}"
    _own_names.add(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def source_of(where: str) -> Path | None:
    """The Python file of an object of the user's, "file.py:name"; None for "module:name"."""
    file, _, name = where.rpartition(":")
    return resolve(file) if file.endswith(".py") and name else None


def load_object(where: str) -> Any:
    """What "module:name" or "file.py:name" names; a relative file is relative to the project.

    Raises:
        ConfigError: there is no such file or object, or the file cannot be run.
    """
    module_name, _, name = where.rpartition(":")
    path = source_of(where)
    if path is None:
        return getattr(import_module(module_name), name)
    if not path.is_file():
        raise ConfigError(f"{where}: {path} is missing")
    try:
        module = _own_module(path, file_hash(path))
    except (Exception, SystemExit) as error:  # code of the user's may raise anything
        raise ConfigError(f"{where}: {path} fails: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{where}: {path} has no {name!r}")
    return getattr(module, name)
