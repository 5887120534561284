"""Run stages: one after the other, side by side in processes of their own, or on the machines of a cluster."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext, suppress
from itertools import chain, takewhile
from pathlib import Path
from statistics import fmean

import psutil

from ..files import NOTEBOOKS, Busy, locked, relative, source_of
from ..methods.parts import COMMANDS
from ..progress import duration
from ..settings import SamplingConfig
from .config import Config, read_config
from .notebooks import StageFailed, can_fork, run_notebook
from .stages import plan
from .stages.evaluate import EvaluateStage
from .store import Stage
from .watch import is_terminal, of_run, of_stage, say, watched, wipe

JOB_BYTES = 2 << 30  # that a job takes with the embedded model, at most; of others the estimate knows


def executed(stage: Stage) -> Path:
    """Where a stage's executed notebook lies: beside its artefacts."""
    return stage.folder / f"{stage.name}.ipynb"


def execute(stage: Stage) -> None:
    """Run one stage's notebook."""
    parameters = {"run": relative(stage.run_folder), "method": stage.method}
    parameters |= {"seed": stage.seed, "iteration": stage.iteration}
    modules = [where.rpartition(":")[0] for where in stage.uses() if source_of(where) is None]
    run_notebook(NOTEBOOKS / f"{stage.name}.ipynb", executed(stage), parameters, stage.config.threads, modules)


def is_evaluation(stage: Stage) -> bool:
    """Whether it is one: no other stage reads what it leaves."""
    return stage.name == EvaluateStage.name


def is_done(stage: Stage) -> bool:
    """Whether nothing of a stage is left: one killed between its manifest and its page has no executed notebook."""
    return executed(stage).exists() and stage.is_done()


def reasons(stage: Stage) -> str:
    """Why a stage runs, on one line; empty for one that has not run before."""
    if not stage.manifest_path().exists():
        return ""
    found = stage.why_not_done()
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return f" ({'; '.join(found[:3])}{more})" if found else " (its notebook is missing)"


def run_stages(
    stages: list[Stage], after: list[Stage] | None = None, watch: bool = True, spent: dict[Path, float] | None = None
) -> None:
    """Run stages in order. Raises StageFailed.

    Args:
        after: stages of others that follow (for the time left). watch: show how far each is.
        spent: seconds of the stages that were looked at, by manifest; those of earlier methods come with it.
    """
    spent = {} if spent is None else spent
    todo = list(enumerate(stages, 1))
    for position, (i, stage) in enumerate(todo):
        at = f"[{i}/{len(stages)}] " if len(stages) > 1 else ""
        # M_0's stages are shared: whoever comes first does them, the others wait and then find them done. No stage
        # reads an evaluation, so they come back to that one at the end.
        puts_off = is_evaluation(stage) and position < len(stages)
        with ExitStack() as turn:
            try:
                turn.enter_context(locked(stage.folder / f".{stage.name}.turn", patience=0 if puts_off else -1))
            except Busy:
                todo.append((i, stage))
                continue
            if is_done(stage):
                say(f"{at}{stage.label()}: done already")
                spent.setdefault(stage.manifest_path(), 0.0)
                continue
            left = time_left([*(stage for _, stage in todo[position:]), *(after or ())], spent)
            say(f"{at}{stage.label()}{reasons(stage)} ...{left}")
            started = time.monotonic()
            with watched(of_stage(stage)) if watch else nullcontext():
                execute(stage)
            spent[stage.manifest_path()] = time.monotonic() - started


def time_left(stages: list[Stage], spent: dict[Path, float]) -> str:
    """In words, what these stages take, once one of each kind has been run here; evaluations may be another's."""
    left = {stage.manifest_path() for stage in stages} - spent.keys()
    kinds = {path.name: [took for other, took in spent.items() if other.name == path.name and took] for path in left}
    unknown = [name for name, seconds in kinds.items() if not seconds]
    seconds = sum(fmean(kinds[path.name]) for path in left if kinds[path.name])
    if not seconds or any(not name.startswith(EvaluateStage.name) for name in unknown):
        return ""
    return f", about {duration(seconds)} left" + (", and the evaluations" if unknown else "")


def run_evaluations(stages: list[Stage]) -> None:
    """Of stages that another process runs in order, run the evaluations, each when all before it are done."""
    for stage in stages:
        if not is_evaluation(stage):
            await_done(stage)
        elif not is_done(stage):
            try:
                spent: dict[Path, float] = {}
                run_stages([stage], watch=False, spent=spent)
                if spent[stage.manifest_path()]:
                    say(f"{stage.label()}: done")
            except StageFailed:  # the other process comes to it as well, and says what it was
                say(f"{stage.label()}: failed, and is tried again at the end")


def await_done(stage: Stage) -> None:
    """Wait until another process has done a stage, looking again where its files have changed."""
    seen: list[int] = []
    while True:
        files = [path.stat().st_mtime_ns for path in (stage.manifest_path(), executed(stage)) if path.exists()]
        if files != seen and is_done(stage):
            return
        seen = files
        time.sleep(1.0)


def default_jobs(config: Config) -> int:
    """Jobs side by side where a command names none: as many as cores and memory allow, on a CPU alone."""
    processes = max(config.sampling.workers, *(config.for_round(m, 1).train.processes for m in config.methods))
    own = processes == 1 and config.sampling.engine == SamplingConfig().engine
    if not own or not can_fork() or os.environ.get("RAY_ADDRESS"):
        return 1
    cores = min(len(os.sched_getaffinity(0)), container_limit("cpu.max"))
    memory = min(psutil.virtual_memory().available, container_limit("memory.max"))
    work = 2 * len(config.methods) * config.seeds  # evaluations may be apart
    return max(1, int(min(cores // config.threads, memory // JOB_BYTES, work)))


def container_limit(name: str) -> float:
    """What the container that this runs in allows (Linux, cgroup v2): CPUs of "cpu.max", bytes of "memory.max"."""
    try:
        most, *period = Path("/sys/fs/cgroup", name).read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if most == "max" else float(most) / float(*period or [1])


def on_cluster(jobs: int) -> bool:
    """Whether jobs go to the machines of a Ray cluster."""
    return jobs > 1 and bool(os.environ.get("RAY_ADDRESS"))


def method_seed_command(run: Path, method: str, seed: int) -> list[str]:
    """What runs one method and seed; the number of the process with which it ends comes behind it."""
    return [sys.executable, "-m", "irpo_utils", "--method-seed", str(run), method, str(seed)]


def run_in_turn(plans: list[list[Stage]]) -> list[str]:
    """Run every method and seed; returns what failed."""
    failures, spent = [], {}
    for i, stages in enumerate(plans):
        try:
            run_stages(stages, list(chain.from_iterable(plans[i + 1 :])), spent=spent)
        except StageFailed as error:
            failures.append(f"{stages[-1].method}, seed {stages[-1].seed}: {error}")
    return failures


def run_on_cluster(run: Path, config: Config, work: list[tuple[str, int]], jobs: int) -> list[str]:
    """Each method and seed as a task of the cluster that `RAY_ADDRESS` names, `jobs` at a time; returns what failed."""
    commands = {f"{method}, seed {seed}": method_seed_command(run, method, seed) for method, seed in work}
    done = COMMANDS.load()(commands, jobs, config)
    return [f"{name}: its message is above" for name, status in done if status]


def run_side_by_side(run: Path, work: list[tuple[str, int]], jobs: int, lock: int) -> list[str]:
    """Every method and seed in a process of its own, `jobs` at a time; returns what failed.

    A job that is left over takes the evaluations of a method and seed that is at work. Each process holds the run's
    `lock` too, so that the run stays taken where the driver is killed and they are not yet gone.
    """
    waiting, failures = list(work), []
    going: dict[tuple[str, int], subprocess.Popen] = {}
    beside: dict[tuple[str, int], subprocess.Popen | None] = {}  # does the evaluations; None: it did, and has ended

    def begin(each: tuple[str, int], evaluations: str) -> subprocess.Popen:
        command = [*method_seed_command(run, *each), str(os.getpid()), "--evaluations", evaluations]
        return subprocess.Popen(command, pass_fds=[lock])

    try:
        # In a log each says itself how far it is; on a terminal there is one line for all.
        with watched(of_run(run)) if is_terminal(sys.stderr) else nullcontext():
            while waiting or going:
                while waiting and len(going) < jobs:
                    each = waiting.pop(0)
                    going[each] = begin(each, "last")
                free = jobs - len(going) - len([process for process in beside.values() if process])
                for each in [each for each in going if each not in beside][:free]:
                    beside[each] = begin(each, "only")
                time.sleep(0.2)
                for each, process in beside.items():
                    if process and process.poll() is not None:
                        beside[each] = None
                        if process.returncode and each in going:
                            say(
                                "{}, seed {}: the process that evaluated was ended; evaluations come last".format(*each)
                            )
                for each in [each for each, process in going.items() if process.poll() is not None]:
                    if going.pop(each).returncode:
                        failures.append("{}, seed {}: its message is above".format(*each))
                    end(filter(None, [beside.get(each)]))
    finally:
        end([*going.values(), *filter(None, beside.values())])
    return failures


def end(processes: Iterable[subprocess.Popen]) -> None:
    """Ask processes to end, and wait until they have."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def run_alone(run: Path, method: str, seed: int, parent: int, evaluations: str | None = None) -> None:
    """One method and seed, for the driver in process `parent`; ends when that does.

    Args:
        evaluations: "last", since another process may take them meanwhile; "only", for that other process; None: in
            their places.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    stages, drawn = plan(read_config(run / "config.yaml"), run, method, seed), is_terminal(sys.stderr)
    if evaluations == "only":
        run_evaluations(stages)
        return
    order = stages
    if evaluations == "last":  # from the last one on: the other process begins with the first
        order = [stage for stage in stages if not is_evaluation(stage)] + list(filter(is_evaluation, stages[::-1]))
    try:
        run_stages(order, watch=not drawn)
    except StageFailed as error:  # whose it is, between the lines of others
        wipe()
        ready = takewhile(lambda stage: is_evaluation(stage) or is_done(stage), stages)
        missing = [stage for stage in ready if is_evaluation(stage) and not is_done(stage)]
        if missing:
            say(f"{method}, seed {seed}: stopped; the models that there are get their evaluation")
        for stage in missing:
            with suppress(StageFailed):
                run_stages([stage], watch=not drawn)
        raise StageFailed(f"{method}, seed {seed}: {error}") from error
