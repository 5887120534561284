"""What the driver shows while a stage is at work: a line that is drawn over on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from psutil import pid_exists

from .. import progress
from ..progress import bar, described, duration
from .store import COUNTS, Stage

FIRST, AGAIN = 5.0, 30.0  # seconds to the first line in a log, and between two; one more when the time left is known
DRAWN = 0.5  # seconds between two lines that are drawn over one another
Text = Callable[[float, bool], str]  # (when the wait began, as time.time has it; whether with a bar) -> a line


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def wipe() -> None:
    """Take back a line that was drawn, by this process or another one on the same terminal."""
    if is_terminal(sys.stderr):
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print a line of the run itself."""
    wipe()
    print(line, flush=True)


@contextmanager
def watched(text: Text) -> Iterator[None]:
    """Show on standard error what `text` says, for as long as the block is at work."""
    end, stream = threading.Event(), sys.stderr
    thread = threading.Thread(target=show, args=(text, end, stream), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(2.0)
        with suppress(OSError, ValueError):  # a terminal that is gone
            wipe()


def show(text: Text, end: threading.Event, stream: TextIO) -> None:
    since, terminal, started = time.time(), is_terminal(stream), time.monotonic()
    due, known = started + FIRST, False
    with suppress(OSError, ValueError):  # a terminal or a pipe that is gone
        while not end.wait(DRAWN):
            line, now = text(since, terminal), time.monotonic()
            if terminal:
                width = os.get_terminal_size(stream.fileno()).columns or 80
                stream.write(f"\r{line[: width - 1]}\x1b[K")
            elif now >= due or (now >= started + FIRST and not known and line.endswith(" left")):
                stream.write(f"{line}\n")
                due, known = now + AGAIN, known or line.endswith(" left")
            stream.flush()


def of_stage(stage: Stage) -> Text:
    """How far one stage is."""

    def text(since: float, with_bar: bool) -> str:
        found = progress.read(stage.partial_folder() / COUNTS, since)
        counted = described(found["counts"]) if found else f"at work for {duration(time.time() - since)}"
        if not with_bar:
            return f"{stage.label()}: {counted.strip()}"
        return f"{bar(found['counts'])} {counted}" if found else f"{stage.name}: {counted}"

    return text


def of_run(run: Path) -> Text:
    """How far all stages of a run are that are at work, in one line."""

    def text(since: float, with_bar: bool) -> str:
        files = [f for where in ("m0/seed_*", "*/seed_*/iteration_*") for f in run.glob(f"{where}/.*.partial/{COUNTS}")]
        found = [counts for file in sorted(files) if (counts := progress.read(file, since))]
        at_work = [counts for counts in found if pid_exists(counts["process"])]  # one that was killed leaves its own
        stages = [f"{counts['label']} {100 * progress.share(counts['counts']):.0f} %" for counts in at_work]
        return " | ".join(stages) or f"at work for {duration(time.time() - since)}"

    return text
