"""The order of the book: its parts, the pages of each, and where a notebook's executed copy lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..files import OUTPUTS

REFERENCE = OUTPUTS / "reference"
PAGES = Path(__file__).parent / "pages"


@dataclass(frozen=True)
class Notebook:
    """A page that is an executed notebook."""

    name: str  # notebooks/NAME.ipynb, where it exists
    folder: str = "."  # where under outputs/reference its executed copy lies; ".": anywhere
    interactive: tuple[str, str] = ("", "")  # interactive/NAME.md, and the heading before which its figures stand

    def executed(self) -> Path | None:
        """The executed copy; None where there is none."""
        return min((REFERENCE / self.folder).rglob(f"{self.name}.ipynb"), default=None)


# Part -> its pages in order: a name is that of a file in pages/. A notebook without an executed copy is left out.
BOOK: dict[str, tuple[str | Notebook, ...]] = {
    "Begin": ("results", Notebook("quickstart")),
    "The stages, as executed": (
        Notebook("00_seed_model"),
        Notebook("00_warm_start"),
        Notebook("01_sample", "tiny/m0"),
        Notebook("01b_reward", "claims-process/sipf/seed_0/iteration_2"),
        Notebook("02_pairs", "tiny/irpo/seed_0/iteration_1"),
        Notebook("03_train", "tiny/irpo/seed_0/iteration_1"),
        Notebook("03b_extrapolate"),
        Notebook("03c_online"),
        Notebook("04_evaluate", "tiny/irpo/seed_0/iteration_1"),
        Notebook("05_report", "tiny"),
    ),
    "The loss": (
        Notebook("10_loss_from_scratch", interactive=("loss_of_a_pair", "Why sums, and why a mean")),
        Notebook("11_why_the_nll"),
        Notebook("12_losses"),
        Notebook("30_tune"),
        "questions",
    ),
    "What the numbers say": (
        Notebook("13_ablations"),
        Notebook("14_online"),
        Notebook("15_without_labels"),
        Notebook("21_claims"),
        Notebook("22_read_a_run"),
    ),
    "The family of methods": (
        "family",
        Notebook("06_methods", "methods", interactive=("methods_at_a_budget", "What differs, and why")),
    ),
    "Feedback on steps": ("process", Notebook("07_process_feedback")),
    "How fast": ("speed", Notebook("31_speed"), Notebook("32_scale")),
    "Real models": ("real_models", Notebook("20_real_model"), "grading", "programs"),
    "Your own": ("running", "own_data", "extending", "clusters"),
    "Reference": ("configuration", "artefacts", "design"),
    "Limits": ("limits", Notebook("23_memorising")),
}


def notebooks() -> list[Notebook]:
    """The notebooks of the book, those without an executed copy among them."""
    return [page for pages in BOOK.values() for page in pages if isinstance(page, Notebook)]


def toctrees(present: set[str]) -> str:
    """The table of contents in MyST, a tree for each part, of the pages that are `present`."""
    trees = []
    for part, pages in BOOK.items():
        names = [page.name if isinstance(page, Notebook) else page for page in pages]
        lines = "\n".join(name for name in names if name in present)
        if lines:
            trees.append(f"```{{toctree}}\n:caption: {part}\n:maxdepth: 1\n\n{lines}\n```\n")
    return "\n".join(trees)
