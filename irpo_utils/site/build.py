"""`./run_all.sh --site`: the project's book, from its executed notebooks and this folder's pages -> outputs/site."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from ..files import OUTPUTS, ROOT, ConfigError, MissingArtefact, relative, replace, write_json, write_text
from ..methods.recipes import catalogue
from ..report import comparison
from ..report import figures as report_figures
from . import parameters
from .chapters import PAGES, REFERENCE, Notebook, notebooks, toctrees
from .links import figures, in_prose, relinked
from .prepare import prepared, unbroken

SITE = OUTPUTS / "site"
WORK = OUTPUTS / "site-build"  # the sources as Sphinx reads them, and what it makes of them
INTERACTIVE = Path(__file__).parent / "interactive"  # figures that answer to the hand
PYTHON = "IRPO_SITE_PYTHON"  # a Python that has the group `site` of pyproject.toml


def main(arguments: list[str]) -> int:
    """Build the site. Raises ConfigError or MissingArtefact, or RuntimeError where Sphinx has a warning."""
    if arguments:
        raise ConfigError(f"--site: takes nothing else, got {' '.join(arguments)}")
    python = site_python()
    shutil.rmtree(WORK, ignore_errors=True)
    write_sources(WORK / "source")
    command = [python, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html", "-d", str(WORK / "doctrees")]
    command += ["-c", str(PAGES.parent), str(WORK / "source"), str(WORK / "html")]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise RuntimeError(f"the site has warnings (above; its sources are in {relative(WORK / 'source')})")
    replace(WORK / "html", SITE)
    print(f"wrote {relative(SITE / 'index.html')}")
    return 0


def site_python() -> str:
    """The Python that has Sphinx. Raises MissingArtefact, which says how to get one."""
    found = Path(os.environ.get(PYTHON) or ROOT / ".venv-site/bin/python")
    if not found.is_file():
        raise MissingArtefact(f"{found} is missing; ./run_all.sh --site makes it, or {PYTHON} names another Python")
    return str(found)


def write_sources(target: Path) -> None:
    """Write what Sphinx reads: the pages, the prepared copies of the notebooks, and the figures that they show."""
    executed = {notebook: notebook.executed() for notebook in notebooks()}
    for notebook in [n for n, path in executed.items() if path is None]:
        print(f"{notebook.name} is left out: no executed copy in outputs/reference")
        del executed[notebook]
    pages = {f"notebooks/{n.name}.ipynb": f"{n.name}.ipynb" for n in executed}
    pages |= {relative(path): f"{n.name}.ipynb" for n, path in executed.items()}
    texts = sorted(path.stem for path in PAGES.glob("*.md"))
    pages |= {relative(PAGES / f"{name}.md"): f"{name}.md" for name in texts}
    present = {*texts, *(n.name for n in executed)}
    for name in texts:
        page = relinked(page_text(name, present), relative(PAGES), pages)
        for figure in figures(page):
            copy = target / figure
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / figure, copy)
        write_text(target / f"{name}.md", in_prose(page, unbroken))
    write_json(target / "interactive.json", interactive_facts(REFERENCE / "methods"))
    for notebook, path in executed.items():
        write_notebook(notebook, path, target, pages)


def page_text(name: str, present: set[str]) -> str:
    """A page as it is in pages/, with what is generated behind it."""
    text = (PAGES / f"{name}.md").read_text()
    generated = {"index": lambda: toctrees(present), "configuration": parameters.tables}
    return text + "\n" + generated[name]() if name in generated else text


def write_notebook(notebook: Notebook, executed: Path, target: Path, pages: dict[str, str]) -> None:
    """Write a notebook's executed copy as the site shows it."""
    page = nbformat.read(executed, as_version=4)
    page.cells = prepared(page.cells, note(notebook, executed))
    add_interactive(page.cells, *notebook.interactive)
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, "notebooks", pages)
    page.metadata.pop("papermill", None)
    nbformat.write(page, target / f"{notebook.name}.ipynb")


def add_interactive(cells: list[Any], name: str, heading: str) -> None:
    """Put the figures of interactive/NAME.md before a section. Raises ConfigError where there is no such section."""
    if not name:
        return
    at = next((i for i, cell in enumerate(cells) if cell["source"].startswith(f"## {heading}\n")), None)
    if at is None:
        raise ConfigError(f"site/chapters.py: no cell of the notebook begins with ## {heading}")
    cells.insert(at, nbformat.v4.new_markdown_cell((INTERACTIVE / f"{name}.md").read_text()))


def interactive_facts(run: Path) -> dict[str, Any]:
    """What interactive/ shows of a published run: means over seeds, in percent and millions of forward passes."""
    known, table = catalogue(), pd.read_csv(run / "methods.csv")
    table["passes"] = comparison.forward_passes(table) / 1e6
    mean = table.groupby(["method", "iteration"], sort=False).mean().reset_index()
    shares = {"greedy": 100 * mean.greedy, "lucky": 100 * mean.right_for_wrong_reason}
    mean = mean.assign(**shares, sound=shares["greedy"] - shares["lucky"], wrong=100 - shares["greedy"])
    columns = ["iteration", "passes", "greedy", "sound", "lucky", "wrong"]
    methods = [
        report_figures.look_of(name, known) | {"name": name} | own[columns].round(3).to_dict("list")
        for name, own in mean.groupby("method", sort=False)
    ]
    return {"methods": methods}


def note(notebook: Notebook, executed: Path) -> str:
    """How to open the notebook of a page."""
    return (
        f":::{{container}} open-notebook\n"
        f"Open this notebook: `./run_all.sh lab`, then `{notebook.name}.ipynb` "
        f"([the file](checkout:notebooks/{notebook.name}.ipynb)). "
        f"This page is its [executed copy](checkout:{relative(executed)}).\n:::\n"
    )
