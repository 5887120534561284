"""A run with faults on command: a full disk, a rename that fails, a process that is killed, a clock that is set back.

Every process of the run is started with `faults.c` before libc, so that the writes of PyTorch and safetensors count as
well as Python's. A fault comes at a byte, a rename, an fsync or an operation (a write, rename, sync, removal or new
folder) below one folder, counted over all processes. Where and how it comes stands on a page of memory that all share.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
KINDS = ("none", "disk_full", "rename", "sync", "kill", "terminate", "kill_driver", "memory", "clock")
# The counter that says when a fault comes.
COUNTER = {"disk_full": "bytes", "rename": "renames", "sync": "syncs"}
FIELDS = ("mode", "at", "driver", "bytes", "renames", "syncs", "operations", "happened")
SIZE = 8 * len(FIELDS) + 4096


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Faults:
    """The page, and what a process needs to look at it.

    Args:
        folder: for the compiled library and the page; outside of `root`.
        root: operations on files below it count.
    """

    def __init__(self, folder: Path, root: Path):
        library, page = folder / "faults.so", folder / "page"
        if not library.exists():
            subprocess.run([compiler(), "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        if not page.exists():  # else processes look at it already
            page.write_bytes(bytes(SIZE))
        with open(page, "r+b") as file:
            self._page = mmap.mmap(file.fileno(), SIZE)
        self._page[8 * len(FIELDS) :] = os.fsencode(root).ljust(4096, b"\0")
        self.environment = {"LD_PRELOAD": str(library), "FAULTS_PAGE": str(page)}

    def __getitem__(self, field: str) -> int:
        return struct.unpack_from("q", self._page, 8 * FIELDS.index(field))[0]

    def __setitem__(self, field: str, value: int) -> None:
        struct.pack_into("q", self._page, 8 * FIELDS.index(field), value)

    def set(self, kind: str = "none", at: int = 0, driver: int = 0) -> None:
        """Count anew from 0; the fault `kind` comes at the `at`-th of what it counts."""
        for field in FIELDS:
            self[field] = 0
        self["at"], self["driver"], self["mode"] = at, driver, KINDS.index(kind)

    def total(self, kind: str) -> int:
        """How far the counter of a kind of fault has come."""
        return self[COUNTER.get(kind, "operations")]
