"""Ray, on this machine or on those of a cluster: actors, what they answer, and whole methods and seeds as tasks.

Ray places the actors, starts one anew that has died, and gives it its work again. `RAY_ADDRESS` names the cluster;
without it Ray is started here, for as long as it is needed (site/pages/clusters.md). Nothing here needs torch, so that
the driver starts fast.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from ..files import ConfigError
from ..settings import Settings

# How often an actor is started anew; an announced loss of its machine does not count. Its work is tried again without a
# limit of its own, so this is the limit.
RESTARTS = 10
STORE = 1 << 28  # bytes of a local cluster's memory for what travels


def check(config: Settings, jobs: int = 1) -> None:
    """Look before a run whether there is Ray for what is asked of it. Raises ConfigError, which says what to change."""
    workers = config.sampling.workers
    try:
        version("ray")
    except PackageNotFoundError:
        name = "sampling.workers" if workers > 1 else "jobs"
        raise ConfigError(f'{name}: ray is not installed; pip install -e ".[ray]", or set {name}=1') from None
    if jobs > 1 and workers > 1:
        raise ConfigError(
            "jobs: the workers of one method and seed would wait for what the others hold; "
            "set jobs=1 or sampling.workers=1"
        )
    gpus = config.sampling.gpus_per_worker
    if jobs > 1 and gpus and config.train.processes > gpus:
        raise ConfigError(
            f"train.processes: a job has sampling.gpus_per_worker={gpus:g} of a GPU, and each process wants one; "
            "set train.processes=1, or jobs=1"
        )


@contextmanager
def connected(cpus: int) -> Iterator[Any]:
    """Ray, connected to the cluster that `RAY_ADDRESS` names, else to one of its own with `cpus` for actors."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    before = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack, ExitStack() as start:
        if not os.environ.get("RAY_ADDRESS"):
            folder = stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            options |= {"address": "local", "num_cpus": cpus, "object_store_memory": STORE, "_temp_dir": folder}
            options |= {"include_dashboard": False}
            start.enter_context(quick_imports(Path(folder)))
        try:
            ray.init(**options)
        except Exception as error:  # one of Ray's time-outs is no more than that
            if os.environ.get("RAY_ADDRESS"):
                raise ConfigError(f"RAY_ADDRESS: {error}") from None
            raise ConfigError(
                f"sampling.workers: Ray does not start here ({error}); on a busy machine, where its own processes take "
                "more than its 15 s, wait or set sampling.workers=1; the same command goes on"
            ) from error
        start.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray sets one of its own
        stack.callback(ray.shutdown)
        yield ray


@contextmanager
def quick_imports(folder: Path) -> Iterator[None]:
    """Processes that are started in the block do without `rfc3987_syntax`.

    JupyterLab brings it, jsonschema imports it where it is, and Ray imports jsonschema: two to four seconds of a CPU in
    each of Ray's six processes, for a check of addresses that nobody asks for. Ray gives up those that take 15 s.
    """
    (folder / "rfc3987_syntax.py").write_text("raise ImportError\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, PYTHONPATH=path):
        yield


def results(actors: list[Any], calls: list[tuple]) -> Iterator[Any]:
    """What `actors` answer to calls of `do`, as they are done; `actors` is emptied.

    Raises:
        RuntimeError: an actor ended again and again. An error in one is raised as it was there.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.util import ActorPool

    pool = ActorPool(actors)
    actors.clear()
    for call in calls:
        pool.submit(lambda actor, call: actor.do.remote(*call), call)
    try:
        while pool.has_next():
            yield pool.get_next_unordered()
            # One that finds no more to do ends, and makes room for one whose machine was lost: its chunk waits for it.
            while pool.has_free():
                pool.pop_idle()
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise RuntimeError(
            f"a worker ended {RESTARTS + 1} times, often for want of memory "
            "(sampling.max_rows says how much it takes); "
            f"the same command goes on from the chunks that are done\n{error}"
        ) from None


def actor(ray: Any, kind: type, config: Settings) -> Any:
    """`kind` as an actor with the threads and GPUs of one worker.

    Raises:
        ConfigError: it would leave GPUs alone, or no machine has as many; it would wait for one for ever.
    """
    gpus = config.sampling.gpus_per_worker
    there = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
    if sum(there) and not gpus:
        raise ConfigError(
            f"sampling.gpus_per_worker: the cluster has {sum(there):.0f} GPUs and none would be used; set it to 1"
        )
    if gpus > max(there):
        raise ConfigError(
            f"sampling.gpus_per_worker: it is {gpus:g}, and the machine with the most GPUs has {max(there):.0f}; "
            "lower it, or start the cluster with such a machine"
        )
    # Sums depend on the number of threads, and Ray chooses one where none is set.
    environment = {"env_vars": {"OMP_NUM_THREADS": str(config.threads)}}
    options = {"num_cpus": config.threads, "num_gpus": gpus, "runtime_env": environment}
    return ray.remote(**options, max_restarts=RESTARTS, max_task_retries=-1)(kind)


class Runner:
    """An actor that runs commands of this project, one after another."""

    def do(self, name: str, command: list[str]) -> tuple[str, int]:
        """The command's name and exit status. Behind its arguments comes this process's number, with which it ends."""
        return name, subprocess.run([*command, str(os.getpid())], stdin=subprocess.DEVNULL).returncode


def run_commands(commands: dict[str, list[str]], jobs: int, config: Settings) -> Iterator[tuple[str, int]]:
    """Run every command, `jobs` at a time, on the cluster's machines; the name and exit status of each, as they end."""
    with connected(jobs * config.threads) as ray:
        kind = actor(ray, Runner, config)
        actors = [kind.remote() for _ in range(min(jobs, len(commands)))]
        yield from results(actors, list(commands.items()))
