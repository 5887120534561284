"""A training stage in several processes, `train.processes=P`: a launcher starts them, and this one waits for their end.

    accelerate launch --config_file irpo_utils/assets/accelerate/ddp.yaml --num_processes 2 \\
        -m irpo_utils.run.rank irpo_utils.run.stages.train:TrainStage outputs/two irpo 0 1

IRPO_LAUNCHER names another launcher, of one machine or several, that takes `-m` as Python does:

    IRPO_LAUNCHER="torchrun --nproc-per-node 8"
    IRPO_LAUNCHER="srun --overlap --kill-on-bad-exit=1 --nodes 4 --ntasks-per-node 1 \\
        torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500"

Several machines share the project's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from .. import files
from ..files import PACKAGE, ROOT
from ..settings import TrainConfig
from .store import Stage

TAIL = 30  # lines of the processes' log that are shown when they fail
PLAIN = ("ConfigError", "MissingArtefact", "Busy")  # errors that say all there is to say


def launcher(config: TrainConfig) -> list[str]:
    """The command that starts `config.processes` processes, but for what they run."""
    if named := os.environ.get("IRPO_LAUNCHER"):
        return shlex.split(named)
    file = PACKAGE / "assets" / "accelerate" / ("fsdp2.yaml" if config.shard else "ddp.yaml")
    own = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*own, "--config_file", str(file), "--num_processes", str(config.processes)]


def launched(stage: Stage, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Let several processes do the training of a stage that has begun; returns the facts that the first one gives.

    Raises:
        RuntimeError: one of them failed; the message has the end of their log.
        ConfigError, MissingArtefact, Busy: one of them raised it.
    """
    facts, failure = stage.partial / "facts.json", stage.partial / "failure.json"
    for file in (facts, failure):
        file.unlink(missing_ok=True)
    command = [
        *launcher(stage.config.train),
        "-m",
        "irpo_utils.run.rank",
        f"{type(stage).__module__}:{type(stage).__name__}",
    ]
    command += [str(stage.run_folder), stage.method, str(stage.seed), str(stage.iteration)]
    environment = os.environ | {
        "IRPO_STARTED_BY": f"{socket.gethostname()}:{os.getpid()}",
        "OMP_NUM_THREADS": str(stage.config.threads),
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            for line in process.stdout:
                show(line.rstrip("\n"))
            code = process.wait()
        finally:
            end(process)
        log.seek(0)
        tail = "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL:])
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(failure.read_text())
        if found["kind"] in PLAIN:
            raise getattr(files, found["kind"])(found["message"])
        raise RuntimeError(
            f"{found['kind']}: {found['message']}\n(in one of {stage.config.train.processes} processes; if another was "
            f"ended from outside, the end of their log says which, and the same command goes on)\n{tail}"
        )
    if code or not facts.exists():
        raise RuntimeError(
            f"{stage.name}: its processes ended with exit code {code}, often for want of memory (train.micro_batch "
            f"says how much they take); the same command goes on. The end of their log:\n{tail}"
        )
    return json.loads(facts.read_text())


def end(process: subprocess.Popen) -> None:
    """End a launcher, which ends what it has started."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()  # its processes see that it is gone
        process.wait()
    process.stdout.close()
