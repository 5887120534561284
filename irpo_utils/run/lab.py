"""JupyterLab on working copies of the notebooks, so that looking around changes no file of the project."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from ..files import NOTEBOOKS, OUTPUTS, ROOT, relative, write_json

FOLDER = OUTPUTS / "lab"


def copies() -> list[str]:
    """Bring the working copies up to date; returns what to say of those that are not.

    A copy that was not changed follows its notebook. One that was changed is kept: where the notebook has changed since
    as well, the new one lies beside it.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = FOLDER / ".copied.json"  # name -> hash of the cells that were copied
    copied = json.loads(record.read_text()) if record.exists() else {}
    lines = []
    for source in sorted(NOTEBOOKS.glob("*.ipynb")):
        copy, now = FOLDER / source.name, cells_hash(source)
        if copied.get(source.name) == now and copy.exists():
            continue
        changed = copy.exists() and cells_hash(copy) not in (now, copied.get(source.name))
        if changed:
            copy = FOLDER / f"{source.stem}-{now[:6]}.ipynb"  # one for each version: it may be changed too
            lines.append(f"{relative(FOLDER / source.name)} was changed, so the new one is {relative(copy)}")
        if not (changed and copy.exists()):
            shutil.copyfile(source, copy)
        copied[source.name] = now
    write_json(record, copied)
    return lines


def cells_hash(path: Path) -> str:
    """The hash of a notebook's cells: JupyterLab fills in other fields of one that is only looked at."""
    text = path.read_text()
    with suppress(ValueError, TypeError, KeyError):  # a damaged copy is one that was changed
        text = json.dumps(json.loads(text)["cells"], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def main(arguments: list[str]) -> None:
    """Become JupyterLab, at the project's root; `arguments` are its own."""
    for line in copies():
        print(line, file=sys.stderr)
    first = relative(FOLDER / "quickstart.ipynb")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}", first, *arguments]
    os.chdir(ROOT)
    os.execv(sys.executable, command)
