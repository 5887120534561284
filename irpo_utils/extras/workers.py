"""Several processes that draw, `sampling.workers=W`: Ray actors, here or on all machines of a cluster.

A stage cuts its problems into chunks, which depend on the configuration alone. Each actor holds the sampler of the engine
that the run has, and does one chunk after another; the stage's own process writes what comes back. So the artefacts of
any number of workers are the same (on machines that compute alike), and a stage that is killed, or finds a file there,
goes on with any other number.

Ray places the actors, starts one anew that has died, and gives it its chunk again. Without `RAY_ADDRESS` the cluster is
this machine, for as long as the stage draws; CLUSTERS.md is about others.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..files import ConfigError, load_object, source_of
from ..methods.parts import SAMPLERS
from ..methods.sampler import Sampler, Work
from ..model.records import Record
from ..settings import Settings
from ..tasks.base import Problem, Task

RESTARTS = 20  # of one actor, besides those for machines that were taken away
RETRIES = 3  # of one chunk
STORE = 1 << 28  # bytes of a local cluster's memory for what travels


def check(config: Settings, jobs: int = 1) -> None:
    """Look, before a run, whether there is Ray for what is asked of it. Raises ConfigError, which says what to change."""
    workers = config.sampling.workers
    try:
        version("ray")
    except PackageNotFoundError:
        name = "sampling.workers" if workers > 1 else "jobs"
        raise ConfigError(f'{name}: ray is not installed; pip install -e ".[ray]", or set {name}=1') from None
    if jobs > 1 and workers > 1 and os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "jobs: on a cluster the workers of one method and seed could wait for what the others hold; "
            "set jobs=1 or sampling.workers=1"
        )


class Worker:
    """An actor that holds M_t. The model is loaded, or vLLM started, with the first chunk."""

    def __init__(self, config: Settings, policy: Path | None, task: Task, problems: list[Problem]):
        engine = SAMPLERS[config.sampling.engine]
        self.stack = ExitStack()
        self.sampler = self.stack.enter_context(engine.load()(config, policy, task, problems))

    def do(self, work: Work, path: Path, chunk: Any) -> tuple[Path, list[Record]]:
        before = self.sampler.task.undecided
        records = work(self.sampler, chunk)
        if more := self.sampler.task.undecided - before:
            print(f"{path.stem}: {more} answers took the symbolic check too long and are unparsed", file=sys.stderr)
        return path, records


class Runner:
    """An actor that runs commands of this project, one after another."""

    def do(self, name: str, command: list[str]) -> tuple[str, int]:
        """The command's name and exit status. Behind its arguments comes the number of this process, with which it ends."""
        return name, subprocess.run([*command, str(os.getpid())], stdin=subprocess.DEVNULL).returncode


@contextmanager
def cluster(cpus: int) -> Iterator[Any]:
    """Ray, connected to the cluster that `RAY_ADDRESS` names, else to one of its own with `cpus` for actors."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    before = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        if not os.environ.get("RAY_ADDRESS"):
            folder = stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            options |= {"address": "local", "num_cpus": cpus, "object_store_memory": STORE, "_temp_dir": folder}
            options |= {"include_dashboard": False}
            stack.enter_context(quick_imports(Path(folder)))
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise ConfigError(f"RAY_ADDRESS: {error}") from None
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
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def results(actors: list[Any], calls: list[tuple]) -> Iterator[Any]:
    """What `actors` answer to calls of `do`, as they are done; `actors` is emptied. An error is raised as it was there."""
    from ray.exceptions import RayTaskError
    from ray.util import ActorPool

    pool = ActorPool(actors)
    actors.clear()
    for call in calls:
        pool.submit(lambda actor, call: actor.do.remote(*call), call)
    try:
        while pool.has_next():
            yield pool.get_next_unordered()
            # One that finds nothing more to do ends, and makes room for one whose machine was lost: its chunk waits for it.
            while pool.has_free():
                pool.pop_idle()
    except RayTaskError as error:
        raise error.cause from None


def actor(ray: Any, kind: type, config: Settings) -> Any:
    """`kind` as an actor with the threads and GPUs of one worker. Raises ConfigError if it would leave GPUs alone."""
    gpus, there = config.sampling.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
    if there and not gpus:
        raise ConfigError(
            f"sampling.gpus_per_worker: the cluster has {there:.0f} GPUs and none would be used; set it to 1"
        )
    # Sums depend on the number of threads, and Ray chooses one where none is set.
    environment = {"env_vars": {"OMP_NUM_THREADS": str(config.threads)}}
    options = {"num_cpus": config.threads, "num_gpus": gpus, "runtime_env": environment}
    return ray.remote(**options, max_restarts=RESTARTS, max_task_retries=RETRIES)(kind)


@contextmanager
def opened(config: Settings, policy: Path | None, task: Task, problems: list[Problem]) -> Iterator[Sampler]:
    """A sampler of M_t (None: the base) whose chunks are done by `sampling.workers` actors.

    Ray is started for the chunks and ends with the block. What is not drawn in chunks is drawn in this process.
    """
    sampling = config.sampling
    with ExitStack() as stack:
        here = stack.enter_context(SAMPLERS[sampling.engine].load()(config, policy, task, problems))

        def spread(work: Work, chunks: dict[Path, Any]) -> Iterator[tuple[Path, list[Record]]]:
            if not chunks:
                return
            ray = stack.enter_context(cluster(sampling.workers * config.threads))
            if source_of(config.task.name):  # a file of the user's, which is no module elsewhere
                ray.cloudpickle.register_pickle_by_value(sys.modules[load_object(config.task.name).__module__])
            kind = actor(ray, Worker, config)
            given = [ray.put(value) for value in (config, policy, task, problems)]
            actors = [kind.remote(*given) for _ in range(min(sampling.workers, len(chunks)))]
            yield from results(actors, [(work, path, chunk) for path, chunk in chunks.items()])

        yield replace(here, spread=spread)


def run_commands(commands: dict[str, list[str]], jobs: int, config: Settings) -> Iterator[tuple[str, int]]:
    """Run every command, `jobs` at a time, on the machines of the cluster; the name and exit status of each, as they end."""
    with cluster(jobs * config.threads) as ray:
        kind = actor(ray, Runner, config)
        actors = [kind.remote() for _ in range(min(jobs, len(commands)))]
        yield from results(actors, list(commands.items()))
