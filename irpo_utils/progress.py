"""How far it is, for the person who waits: what is done, of how much, how fast, how long still.

Whatever takes long counts (`counting`), one count within another: batches of a chunk, chunks of a stage. A stage says
in which file its counts stand (`kept`), and whoever waits for it reads them there (`run/watch.py`). In a live notebook
they are one line of output, which is gone in the end; where there is neither they are not shown. No result and no key
depends on them, and where they cannot be written or read nothing happens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EVERY = 1.0  # seconds between two writes, at least
WIDTH = 20  # of a bar


@dataclass
class Count:
    """Something that is counted. A call says how much of it is done: one more, or as many as it is told."""

    label: str  # "" for one that is only a part of the count around it
    total: float
    unit: str = ""
    done: float = 0
    worth: float = 1  # how many units of the count around it this one is
    note: str = ""  # its rate, where that is not in its own units
    first: float = 0  # what was done when it began
    started: float = field(default_factory=time.time)

    def __call__(self, done: float | None = None, note: str = "") -> None:
        self.done = self.done + 1 if done is None else done
        self.note = note or self.note
        _shown.soon()

    def problems(self, done: int, total: int, rate: float) -> None:
        """What engines call after each batch of problems."""
        self(done, f"{rate:,.0f} tokens/s")


class Shown:
    """Where the counts of this process are shown."""

    def __init__(self) -> None:
        self.counts: list[Count] = []  # each within the one before it
        self.file: Path | None = None
        self.label = ""
        self.display: Any = None  # the output of a live notebook
        self.last = 0.0

    def soon(self) -> None:
        """Show the counts, unless that was done a moment ago."""
        if time.monotonic() - self.last < EVERY or not any(count.label for count in self.counts):
            return
        self.last = time.monotonic()
        if is_live():
            self.say(described([asdict(count) for count in self.counts]))
        elif self.file:
            with suppress(OSError):  # a full disk, or a folder that is gone, is not for this to complain of
                found = {"label": self.label, "process": os.getpid(), "written": time.time()}
                fresh = self.file.with_name(f".{self.file.name}.tmp")
                fresh.write_text(json.dumps(found | {"counts": [asdict(count) for count in self.counts]}))
                os.replace(fresh, self.file)

    def say(self, text: str) -> None:
        """One line of output in a live notebook, in the place of the one before; none for ""."""
        from IPython.display import display

        line = {"text/plain": text} if text else {"text/plain": "", "text/html": ""}
        if self.display:
            self.display.update(line, raw=True)
        elif text:
            self.display = display(line, raw=True, display_id=True)

    def clear(self) -> None:
        """Take back what a live notebook shows."""
        if self.display:
            self.say("")
        self.display = None


_shown = Shown()


@contextmanager
def counting(label: str, total: float, unit: str = "", done: float = 0, worth: float = 1) -> Iterator[Count]:
    """A count for a `with` block, within those of the blocks around it."""
    count = Count(label, total, unit, done, worth, first=done)
    if not _shown.counts:
        # A file is written at once, for whoever waits; a notebook's line after a second, for it may not take longer.
        _shown.last = time.monotonic() if is_live() else 0.0
    _shown.counts.append(count)
    _shown.soon()
    try:
        yield count
    finally:
        _shown.counts = [other for other in _shown.counts if other is not count]
        if not _shown.counts and not _shown.file:
            _shown.clear()


@contextmanager
def kept(file: Path, label: str) -> Iterator[None]:
    """Within the block counts stand in `file`, or in the output of a live notebook. `label`: of whom they are."""
    before = _shown.file, _shown.label
    _shown.file, _shown.label = file, label
    try:
        yield
    finally:
        _shown.file, _shown.label = before
        _shown.clear()
        with suppress(OSError):
            file.unlink()


def is_live() -> bool:
    """Whether this is the kernel of a notebook that is open in JupyterLab, which names it in the environment."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel") and "JPY_SESSION_NAME" in os.environ


def read(file: Path, since: float) -> dict[str, Any] | None:
    """What a process keeps in `file`, written after `since`, in seconds of `time.time`; None if there is none."""
    try:
        found = json.loads(file.read_text())
        return found if found["written"] >= since and found["counts"] else None
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or gone
        return None


def share(counts: list[dict[str, Any]]) -> float:
    """Which part of the first count is done, with what is done of those within it, between 0 and 1."""
    inside = 0.0
    for count in reversed(counts):
        inside = count["worth"] * min(1.0, (count["done"] + inside) / (count["total"] or 1))
    return min(1.0, inside / (counts[0]["worth"] or 1))


def described(counts: list[dict[str, Any]]) -> str:
    """Counts as one line: "45 %  training: 27/60 steps, 1.2 steps/s, about 28 s left"."""
    now, whole, (*outer, count) = time.time(), counts[0], [count for count in counts if count["label"]]
    outer = [around for around in outer if around["unit"] != "parts"]  # a part says itself which one it is
    words = [f"{c['label']}: {c['done']:,.0f}/{c['total']:,.0f} {c['unit']}" for c in (*outer, count)]
    words.append(count["note"] or pace(count, now))
    done, first = share(counts), whole["first"] / (whole["total"] or 1)
    if done - first > 0.001:
        words.append(f"about {duration((now - whole['started']) * (1 - done) / (done - first))} left")
    return f"{100 * done:3.0f} %  {', '.join(word for word in words if word)}"


def pace(count: dict[str, Any], now: float) -> str:
    """How fast it goes, in its own units; "" before the first."""
    if count["done"] <= count["first"]:
        return ""
    each = (now - count["started"]) / (count["done"] - count["first"])
    if 0 < each <= 1:
        return f"{1 / each:.1f} {count['unit']}/s"
    return f"{each:.1f} s each" if each < 10 else f"{each:.0f} s each"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def bar(counts: list[dict[str, Any]]) -> str:
    return ("█" * round(WIDTH * share(counts))).ljust(WIDTH, "░")
