"""The driver: run every stage of a run as a notebook, skip what is done, end with the report."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from ..files import (
    NOTEBOOKS,
    ConfigError,
    MissingArtefact,
    load_object,
    locked,
    relative,
    resolve,
    write_text,
)
from ..methods.parts import SAMPLERS, SELECTIONS, WORKERS
from ..model.packaged import EMBEDDED, SEED_MODEL
from ..tasks import check_task, get_task
from ..tasks.base import Problem, Task
from ..tasks.records import further_tests
from .card import card
from .config import Config, differences, dump, read_config
from .jobs import default_jobs, executed, on_cluster, run_in_turn, run_on_cluster, run_side_by_side
from .notebooks import QUIET, StageFailed, run_notebook
from .page import page
from .presets import key_values, load_preset
from .stages import finished, method_seeds, plan
from .store import Stage, is_run, run_folder


def report(run: Path, threads: int) -> None:
    """Run 05_report and render it as a page."""
    target = run / "05_report.ipynb"
    run_notebook(NOTEBOOKS / "05_report.ipynb", target, {"run": relative(run)}, threads)
    write_text(run / "report.html", page(target, f"Report: {run.name}"))


def compare(run: Path, threads: int) -> None:
    """Run 06_methods on a run of several methods."""
    run_notebook(NOTEBOOKS / "06_methods.ipynb", run / "06_methods.ipynb", {"run": relative(run)}, threads)


def check_inputs(config: Config, jobs: int | None = 1) -> tuple[list[str], int]:
    """Find bad problems, a model that is not there and a run that cannot fit, before anything is written.

    Args:
        jobs: how many run side by side; None: as many as cores and memory allow.

    Returns:
        What to say of it: problems left out, the memory it needs; and how many jobs there are.

    Raises:
        ConfigError: it cannot be run; the message says what to change.
    """
    wanted, jobs = jobs, jobs or default_jobs(config)
    clustered = on_cluster(jobs)
    if config.sampling.workers > 1 or clustered:
        load_object(WORKERS.check)(config, jobs)
    here = 1 if clustered else jobs  # share this machine
    if check := SAMPLERS[config.sampling.engine].check:
        load_object(check)(config.for_seed(0), here)
    check_simulator(config)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        check_methods(config)
        if config.task.generated and config.model.path == EMBEDDED:
            return [], jobs
        task = get_task(config.task)
        problems = check_task(task, config.task.name)
        lines = [", ".join(f"{len(p)} {split} problems" for split, p in problems.items())]
        further = further_tests(task, config.evaluation)
        lines += [f"{len(p)} further test problems from {source}" for source, p in further.items()]
        lines = [f"{config.task.name}: {', '.join(lines)}", *task.notes, *check_gold(config, problems)]
        if config.model.path == EMBEDDED:
            check_words(task, problems["train"])
            return lines, jobs
        # torch takes seconds to import, and the embedded model fits anywhere.
        check = load_object("irpo_utils.run.estimate:check_model")
        models = {own.model.path: own for own in map(config.for_seed, range(config.seeds))}
        for own in models.values():
            rounds = {f"{m}, round {t}": own.for_round(m, t) for m in own.methods for t in range(1, own.rounds(m) + 1)}
            estimated, here = check(own, task, problems | further, here, wanted is None, rounds)
        return lines + estimated, jobs if clustered else here
    except ValueError as error:
        of_each_seed = "{seed}" in config.model.path and "is no folder" in str(error)
        hint = f"; {config.model.path} is one for each seed: notebooks/00_seed_model.ipynb makes them" * of_each_seed
        raise ConfigError(f"{error}{hint}") from None


def check_words(task: Task, problems: list[Problem]) -> None:
    """Raise a ValueError for problems in words that the embedded model, whose vocabulary is small, has never seen."""
    from tokenizers import Tokenizer  # with what it draws in, longer to import than all of the above

    tokenizer = Tokenizer.from_file(str(SEED_MODEL / "tokenizer.json"))
    unknown, ids = tokenizer.token_to_id("<unk>"), []
    words: dict[str, None] = {}
    for problem in problems[:200]:
        prompt = task.prompt(problem)
        encoded = tokenizer.encode(prompt)
        ids += encoded.ids
        words |= {
            prompt[slice(*at)].strip(): None for i, at in zip(encoded.ids, encoded.offsets, strict=True) if i == unknown
        }
    share = ids.count(unknown) / len(ids)
    if share > 0.2:
        raise ValueError(
            f"model.path: the embedded model does not know {share:.0%} of the words of these prompts "
            f"({', '.join(list(words)[:5])}, ...); "
            "it reads stories alone. Name a model, as in model.path=/models/my-llm"
        )


def check_simulator(config: Config) -> None:
    """Raise a ConfigError for a simulator of process feedback that is no model."""
    name = config.process.simulator
    if not name or not any(
        "process" in r.part("reward").settings for m in config.methods for r in config.recipe(m).rounds
    ):
        return
    folder = resolve(name)
    if (folder.exists() or name.startswith((".", "/", "~"))) and not (
        (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file()
    ):
        raise ConfigError(
            f"process.simulator: {name} is no folder with an adapter_config.json or a config.json; "
            "name an adapter, a model or a hub name"
        )


def check_methods(config: Config) -> None:
    """Raise a ValueError for preference data that cannot be trained on, or a reporter of steps that is not there."""
    for name in config.methods:
        own = config.for_round(name, 1).for_seed(0)
        for tool in own.train.report_to:
            if tool not in REPORTERS or find_spec(tool) is None:
                hint = f"; pip install {tool}" if tool in REPORTERS else f", but one of {', '.join(REPORTERS)} can be"
                raise ConfigError(f"train.report_to: {tool} is not installed{hint}")
        if config.recipe(name).round(1).selection == "file":
            load_object(SELECTIONS["file"].where)(own)


def check_gold(config: Config, problems: dict[str, list[Problem]]) -> list[str]:
    """What to say of gold solutions that a task lacks. Raises ValueError where methods, or a warm start, need them."""
    train, warm = problems["train"], config.warm_start.problems
    if warm and len(train) <= warm:
        raise ValueError(f"warm_start.problems: the warm start takes all {len(train)} training problems; lower it")
    if warm and not all(p.solution for p in train[:warm]):
        raise ValueError(
            f"warm_start.problems: not all of the first {warm} training problems have a gold solution; "
            "lower it, or add solutions"
        )
    if any(p.solution for p in train[warm:]):
        return []
    needy = [m for m in config.methods if any(r.needs_gold for r in config.recipe(m).rounds)]
    if needy:
        raise ValueError(f"methods: {config.task.name} has no gold solutions, which {', '.join(needy)} train on")
    if not config.pairs.gold:
        return []
    return [f"pairs.gold: {config.task.name} has no gold solutions, so none joins the winners"]


def configure(preset: str, settings: list[str]) -> tuple[Config, Path, int | None]:
    """The configuration, the run's folder and the jobs that a command line asks for, if it does. Raises ConfigError.

    Args:
        preset: a preset's name, or that of a run that is there, which goes on as it was started.
    """
    texts = key_values(settings)
    run, jobs = texts.pop("run", preset), texts.pop("jobs", None)
    if jobs is not None and (not jobs.isdecimal() or len(jobs) > 4 or int(jobs) < 1):
        raise ConfigError(f"jobs: expected a number of at least 1, got {jobs[:20]!r}")
    if is_run(preset):
        config = read_config(run_folder(preset) / "config.yaml", texts.items())
    else:
        config = load_preset(preset, [f"{name}={text}" for name, text in texts.items()])
    if (rounds := len(config.methods) * config.seeds * config.iterations) > 100_000:
        raise ConfigError(f"methods, seeds, iterations: {rounds:,} rounds; at most 100,000 in one run")
    return config, run_folder(run), None if jobs is None else int(jobs)


def start(preset: str, settings: list[str], replaces: bool = False) -> None:
    """Run the loop to its end: what `./run_all.sh [preset] [key=value ...]` does.

    A method that cannot go on does not keep the others from theirs, nor from the report.

    Args:
        replaces: whether finished stages may be done again that took long.

    Raises:
        ConfigError: see `configure`, `check_inputs`; or much would be replaced.
        StageFailed: a stage failed, in the end.
    """
    started = time.monotonic()
    config, run, jobs = configure(preset, settings)
    notes, jobs = check_inputs(config, jobs)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < OPEN_FILES:
        raise ConfigError(f"a run has up to {OPEN_FILES} files open; allow them with ulimit -n {OPEN_FILES}")
    # What is left of a driver that was killed is gone in a second or two.
    with locked(run / ".lock", patience=5.0) as lock:
        plans = [plan(config, run, method, seed) for method, seed in method_seeds(config)]
        notes += changes(run, config, plans, replaces)
        write_text(run / "config.yaml", dump(config))
        print(*notes, sep="\n", end="\n" if notes else "")
        print(
            f"{run.name}: {', '.join(config.methods)}; {config.seeds} seed(s), "
            f"{config.iterations} iterations -> {relative(run)}",
            flush=True,  # before what the processes of jobs print
        )
        # Side by side method by method: the methods of one seed would wait for its M_0 together.
        work = [(method, seed) for method in config.methods for seed in range(config.seeds)]
        if on_cluster(jobs):
            failures = run_on_cluster(run, config, work, jobs)
        else:
            failures = run_in_turn(plans) if jobs == 1 else run_side_by_side(run, work, jobs, lock)
        conclude(run, config, failures, started)


def conclude(run: Path, config: Config, failures: list[str], started: float) -> None:
    """The report, and what came of it in a few lines, `started` then. Raises StageFailed if something had failed."""
    try:
        whole, _ = finished(run)
        print("report ...", flush=True)
        report(run, config.threads)
        if len(whole.methods) > 1:
            compare(run, config.threads)
        else:  # that of an earlier start would be of other methods
            for name in COMPARISON:
                (run / name).unlink(missing_ok=True)
        print(*card(run, whole, time.monotonic() - started), sep="\n")
    except (MissingArtefact, StageFailed) as error:
        # Something that the stages read has changed meanwhile; a method that had failed is named already.
        failures = failures if failures and isinstance(error, MissingArtefact) else [*failures, str(error)]
    if failures:
        raise StageFailed("\n".join([*failures, "the same command goes on from there"]))


COMPARISON = (
    "06_methods.ipynb",
    "methods.csv",
    "methods.txt",
    "against.csv",
    "against.png",
    "curves.png",
    "compute.png",
)
OPEN_FILES = 256
REPORTERS = ("tensorboard", "wandb", "trackio")  # packages that transformers has a callback for, by its own name
LONG = 600.0  # seconds of finished work that are not replaced without being asked for


def changes(run: Path, config: Config, plans: list[list[Stage]], replaces: bool) -> list[str]:
    """What a command changes in a run that is there already, and which finished stages it does again.

    Raises:
        ConfigError: these took longer than `LONG` in sum, and `replaces` is not set.
    """
    if not (run / "config.yaml").exists():
        return []
    try:
        found = differences(read_config(run / "config.yaml"), config)
        lines = [f"changed since this run's last start: {'; '.join(found)}"] if found else []
    except ConfigError as error:
        lines = [f"the run's config.yaml, of another version or edited, is written anew: {error}"]
    lost: dict[Path, dict[str, Any]] = {}
    for stage, found, before in with_reasons(plans):
        lost |= stage.replaced() if found or before else {}
    names = [relative(path).removesuffix(".manifest.json") for path in lost]
    seconds = sum(manifest.get("seconds", 0.0) for manifest in lost.values())
    if not names:
        return lines
    first = "; ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
    lines.append(f"done again: up to {len(names)} finished stages that took {seconds:.0f} s ({first})")
    if seconds > LONG and not replaces:
        changed = "\n".join(lines)
        raise ConfigError(
            f"{relative(run)} would lose finished work:\n{changed}\n"
            "choose another run=NAME to keep it, or add --yes to replace it (./run_all.sh why RUN says why)"
        )
    return lines


def estimate(preset: str, settings: list[str]) -> None:
    """Say whether a run fits into memory; run nothing."""
    config, _, jobs = configure(preset, settings)
    lines, _ = check_inputs(config, jobs)
    print("\n".join(lines or ["the embedded model: a few minutes on any machine"]))


def why(run: Path, config: Config) -> None:
    """Say of every stage of a run whether it is done, and if not why."""
    for stage, found, before in with_reasons(plan(config, run, *each) for each in method_seeds(config)):
        done = f"done, but {nearby(before, stage)} before it is not" if before else "done"
        print(f"{relative(executed(stage)).removesuffix('.ipynb')}: {'; '.join(found) or done}")


def with_reasons(plans: Iterable[list[Stage]]) -> Iterator[tuple[Stage, list[str], Stage | None]]:
    """Each stage once, why it is not done, and a stage not done that its inputs come from, directly or not."""
    awaited: dict[Path, Stage] = {}  # a file -> the stage to run that it comes from
    seen = set()
    for stage in chain.from_iterable(plans):
        if stage.manifest_path() in seen:
            continue
        seen.add(stage.manifest_path())
        found = stage.why_not_done()
        before = next((awaited[path] for path, _ in stage.reads().values() if path in awaited), None)
        if first := (stage if found else before):
            awaited |= {stage.path(name): first for name in stage.writes()}
        yield stage, found, before


def nearby(stage: Stage, other: Stage) -> str:
    """A stage as it is called beside another one of its method and seed."""
    return stage.name if stage.iteration == other.iteration else f"{stage.name} of iteration {stage.iteration}"
