"""Several processes that draw, `sampling.workers=W`: Ray actors, here or on all machines of a cluster.

A stage cuts its problems into chunks, which depend on the configuration alone. Each actor holds the sampler of the
engine that the run has, and does one chunk after another; the stage's own process writes what comes back. So the
artefacts of any number of workers are the same (on machines that compute alike), and a stage that is killed, or finds a
file there, goes on with any other number.
"""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import PACKAGE, ConfigError, file_hash, own_modules
from ..methods.parts import SAMPLERS
from ..methods.sampler import Sampler, Work
from ..model.records import Record
from ..settings import MATH_VERSIONS, VERSIONS, Settings
from ..tasks.base import Problem, Task
from .cluster import actor, connected, results


class Worker:
    """An actor that holds M_t: its first chunk opens the sampler, and loads the model or starts vLLM."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    @cached_property
    def sampler(self) -> Sampler:
        config, policy, task, problems, code = self.given
        if code != (here := code_here()):
            raise ConfigError(
                f"sampling.workers: {socket.gethostname()} has other code or packages than the machine of the command "
                f"({', '.join(sorted(k for k in code if code[k] != here[k]))}); make them the same"
            )
        engine = SAMPLERS[config.sampling.engine]
        return self.stack.enter_context(engine.load()(config, policy, task, problems))

    def __ray_shutdown__(self) -> None:
        self.stack.close()

    def do(self, given: tuple, work: Work, path: Path, chunk: Any) -> tuple[Path, list[Record]]:
        """The records of one chunk, and where they go. `given`: what opens the sampler, the same in every call."""
        self.given = given
        before = self.sampler.task.undecided
        records = work(self.sampler, chunk)
        if more := self.sampler.task.undecided - before:
            print(f"{path.stem}: {more} answers took the symbolic check too long and are unparsed", file=sys.stderr)
        return path, records


def code_here() -> dict[str, str]:
    """What a draw depends on beside the configuration, on this machine: versions, and a hash of the package's code."""
    versions = {name: version(name) for name in (*VERSIONS, *MATH_VERSIONS)}
    return versions | {"python": platform.python_version()} | {"irpo_utils": file_hash(PACKAGE, (".py",))}


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
            ray = stack.enter_context(connected(sampling.workers * config.threads))
            for module in own_modules():  # files of the user's, which are no modules elsewhere
                ray.cloudpickle.register_pickle_by_value(module)
            kind = actor(ray, Worker, config)
            # With the chunks and not with the actor, which could not be started anew where its arguments are gone.
            given = ray.put((config, policy, task, problems, code_here()))
            actors = [kind.remote() for _ in range(min(sampling.workers, len(chunks)))]
            yield from results(actors, [(given, work, path, chunk) for path, chunk in chunks.items()])

        yield replace(here, spread=spread)
