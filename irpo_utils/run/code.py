"""Which code a stage runs: the modules that it imports, directly or not, and a hash of what each of them means."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..files import PACKAGE

# Modules that keep results, or name what makes them: what they choose stands in the key as parameters. And what a
# person sees while they are made.
BOOKKEEPING = (
    "files",
    "settings",
    "methods.parts",
    "methods.recipes",
    "progress",
    "run.code",
    "run.config",
    "run.presets",
    "run.store",
)


def parsed(source: str) -> ast.Module:
    """The syntax tree of a notebook's cells, without IPython's own lines."""
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()))


def meaning(tree: ast.Module) -> str:
    """A syntax tree, which has no comments and no layout, without docstrings: what changes when the program does."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.dump(tree)


def imports(source: str, module: str) -> set[str]:
    """Names of this package's modules that the source of `module` imports, anywhere in it."""
    found, here = set(), ["irpo_utils", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            full = [*base, *(node.module or "").split(".")] if node.module else base
            if full[:1] == ["irpo_utils"]:
                found |= {".".join([*full[1:], *extra]) for extra in ([], *([alias.name] for alias in node.names))}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("irpo_utils.") for a in node.names if a.name.startswith("irpo_utils.")}
    return found


def module_file(name: str) -> Path | None:
    for path in (PACKAGE / f"{name.replace('.', '/')}.py", PACKAGE / name.replace(".", "/") / "__init__.py"):
        if name and path.is_file():
            return path
    return None


def written() -> dict[str, int]:
    """The package's files ("model/losses.py"), and when each was written."""
    return {path.relative_to(PACKAGE).as_posix(): path.stat().st_mtime_ns for path in sorted(PACKAGE.rglob("*.py"))}


_WHEN_IMPORTED = written()


def edited_since_import(files: Iterable[str]) -> list[str]:
    """Which of the package's `files` this process has loaded, and somebody has written since.

    What runs is then not what the file says, nor the key, which is made from the file.
    """
    now = written()

    def module(file: str) -> str:
        return f"irpo_utils.{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"

    loaded = [file for file in files if module(file) in sys.modules]
    return [file for file in loaded if now.get(file) != _WHEN_IMPORTED.get(file)]


@cache
def closure(roots: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that `roots` import, directly or not, and the roots themselves, without those of bookkeeping."""
    seen, todo = set(), [*roots]
    while todo:
        name = todo.pop()
        path = module_file(name)
        if name in seen or path is None or name.startswith(BOOKKEEPING):
            continue
        seen.add(name)
        module = name + ".__init__" if path.name == "__init__.py" else name
        todo += sorted(imports(path.read_text(), module))
    return tuple(sorted(seen))


@cache
def module_hash(name: str) -> str:
    return hashlib.sha256(meaning(ast.parse(module_file(name).read_text())).encode()).hexdigest()


@cache
def notebook_hash(path: Path) -> str:
    """Hash of a notebook's code cells, but for two kinds.

    The parameters cell is replaced by the run's own, which are in the key already. A cell tagged "hide-cell" is the
    solution of an exercise: it stands behind `stage.finish()` and makes nothing.
    """
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    made = [c for c in cells if not {"parameters", "hide-cell"} & {*c.get("metadata", {}).get("tags", [])}]
    return hashlib.sha256(meaning(parsed("\n".join("".join(c["source"]) for c in made))).encode()).hexdigest()
