"""One of the processes of a training stage: what the launcher of `launch.py` starts.

    python -m irpo_utils.run.rank STAGE RUN METHOD SEED ITERATION

It works in the folder of the stage that has begun. Which process it is, it reads from the usual environment alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

from psutil import pid_exists

from ..files import load_object, lock_at, take, write_json
from ..model import processes
from ..progress import kept
from .store import COUNTS


def watch(starter: str) -> None:
    """End this process when the one that waits for it (`starter`, "host:pid"), or the launcher, is gone."""
    launcher = os.getppid()
    host, _, waiting = starter.rpartition(":")
    while os.getppid() == launcher and (host != socket.gethostname() or pid_exists(int(waiting))):
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)  # it may stand in a library that awaits another process


def work(where: str, run: str, method: str, seed: str, iteration: str) -> None:
    """Train as the stage says, with the other processes. The first of them writes the facts."""
    stage = load_object(where)(run, method, int(seed), int(iteration))
    try:
        stage.join()
        processes.join(stage.config.train.processes, stage.config.train.shard)
        first = processes.rank() == 0
        if first:  # what is left of a stage that was killed is gone in a second
            lock = lock_at(stage.folder / f".{stage.name}.processes.lock")  # held as long as somebody holds this
            take(lock, patience=20.0)
        else:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
        with kept(stage.partial / COUNTS, stage.label()) if first else contextlib.nullcontext():
            facts = stage.training().run()
        if first:
            write_json(stage.partial / "facts.json", facts)
        processes.leave()
    except Exception as error:
        # The first to fail says why; the others only miss it.
        with contextlib.suppress(FileExistsError), open(stage.partial / "failure.json", "x") as file:
            json.dump({"kind": type(error).__name__, "message": str(error)}, file)
        raise


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    if starter := os.environ.get("IRPO_STARTED_BY"):
        threading.Thread(target=watch, args=[starter], daemon=True).start()
    work(*sys.argv[1:])
