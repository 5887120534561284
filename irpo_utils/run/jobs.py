"""Run stages: one after the other, side by side in processes of their own, or on the machines of a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
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
from .kernels import can_fork
from .notebooks import StageFailed, run_notebook
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


def run_stages(stages: list[Stage], after: Iterable[Stage] = (), watch: bool = True) -> None:
    """Run stages in order. Raises StageFailed.

    Args:
        after: stages of others that follow (for the time left). watch: show how far each is.
    """
    spent: dict[str, list[float]] = {}  # by the kind of stage
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
                continue
            left = time_left([stage for _, stage in todo[position:]] + list(after), spent)
            say(f"{at}{stage.label()}{reasons(stage)} ...{left}")
            started = time.monotonic()
            with watched(of_stage(stage)) if watch else nullcontext():
                execute(stage)
            spent.setdefault(stage.name, []).append(time.monotonic() - started)


def time_left(stages: list[Stage], spent: dict[str, list[float]]) -> str:
    """In words, what these stages take, once one of each kind has been run here; evaluations may be another's."""
    kinds = Counter(stage.name for stage in stages)
    if kinds.keys() - spent.keys() - {EvaluateStage.name}:
        return ""
    seconds = sum(count * fmean(spent[name]) for name, count in kinds.items() if name in spent)
    return f", about {duration(seconds)} left" if seconds else ""


def run_evaluations(stages: list[Stage]) -> None:
    """Of stages that another process runs in order, run the evaluations, each when all before it are done."""
    for stage in stages:
        if is_evaluation(stage) and not is_done(stage):
            run_stages([stage], watch=False)
            say(f"{stage.label()}: done")
        while not is_done(stage):
            time.sleep(1.0)


def default_jobs(config: Config) -> int:
    """Jobs side by side where a command names none: as many as cores and memory allow, on a CPU alone."""
    own = config.sampling.workers == config.train.processes == 1 and config.sampling.engine == SamplingConfig().engine
    if not own or not can_fork() or os.environ.get("RAY_ADDRESS"):
        return 1
    cores, memory = len(os.sched_getaffinity(0)) // config.threads, psutil.virtual_memory().available // JOB_BYTES
    work = 2 * len(config.methods) * config.seeds  # evaluations may be apart
    return max(1, min(cores, memory, work))


def on_cluster(jobs: int) -> bool:
    """Whether jobs go to the machines of a Ray cluster."""
    return jobs > 1 and bool(os.environ.get("RAY_ADDRESS"))


def method_seed_command(run: Path, method: str, seed: int) -> list[str]:
    """What runs one method and seed; the number of the process with which it ends comes behind it."""
    return [sys.executable, "-m", "irpo_utils", "--method-seed", str(run), method, str(seed)]


def run_in_turn(plans: list[list[Stage]]) -> list[str]:
    """Run every method and seed; returns what failed."""
    failures = []
    for i, stages in enumerate(plans):
        try:
            run_stages(stages, after=chain.from_iterable(plans[i + 1 :]))
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
    waiting, failures, told = list(work), [], set()
    going: dict[tuple[str, int], list[subprocess.Popen]] = {}

    def begin(each: tuple[str, int], *options: str) -> subprocess.Popen:
        command = [*method_seed_command(run, *each), str(os.getpid()), *options]
        return subprocess.Popen(command, pass_fds=[lock])

    try:
        # In a log each says itself how far it is; on a terminal there is one line for all.
        with watched(of_run(run)) if is_terminal(sys.stderr) else nullcontext():
            while waiting or going:
                while waiting and len(going) < jobs:
                    each = waiting.pop(0)
                    going[each] = [begin(each)]
                alone = [each for each, processes in going.items() if len(processes) == 1]
                for each in alone[: jobs - sum(map(len, going.values()))]:
                    going[each].append(begin(each, "--evaluations"))
                time.sleep(0.2)
                for each in [each for each in going if each not in told and any(p.poll() for p in going[each][1:])]:
                    say("{}, seed {}: the process that evaluated was ended; evaluations come last".format(*each))
                    told.add(each)
                for each in [each for each, processes in going.items() if processes[0].poll() is not None]:
                    ended, *beside = going.pop(each)
                    end(beside)
                    if ended.returncode:
                        failures.append("{}, seed {}: its message is above".format(*each))
    finally:
        end(chain.from_iterable(going.values()))
    return failures


def end(processes: Iterable[subprocess.Popen]) -> None:
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def run_alone(run: Path, method: str, seed: int, parent: int, beside: bool = False) -> None:
    """One method and seed, for the driver in process `parent`; ends when that does.

    Its evaluations come last, since a process `beside` this one may take them meanwhile.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    stages = plan(read_config(run / "config.yaml"), run, method, seed)
    if beside:
        with suppress(StageFailed):  # the other process comes to it as well, and says what it was
            run_evaluations(stages)
        return
    try:
        run_stages(sorted(stages, key=is_evaluation), watch=not is_terminal(sys.stderr))
    except StageFailed as error:  # whose it is, between the lines of others
        wipe()
        before = list(takewhile(lambda stage: is_evaluation(stage) or is_done(stage), stages))
        if len(before) < len(stages):  # the models that there are get their evaluation all the same
            with suppress(StageFailed):
                run_stages([stage for stage in before if is_evaluation(stage)])
        raise StageFailed(f"{method}, seed {seed}: {error}") from error
