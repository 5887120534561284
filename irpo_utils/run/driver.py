"""The driver: run every stage of a run as a notebook, skip what is done, end with the table and the report.

python -m irpo_utils [preset] [key=value ...]      (what ./run_all.sh calls)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ..extras.bench import main as bench
from ..extras.expo import main as extrapolate
from ..extras.vllm.engine import check as vllm_check
from ..files import NOTEBOOKS, Busy, ConfigError, MissingArtefact, locked, relative, resolve, write_text
from ..methods.recipes import RecipeError, methods
from ..model import load, tokens
from ..model.prompts import encode_prompts, stop_ids
from ..report.publish import export, publish
from ..tasks import check_task, get_task
from . import estimate, presets
from .config import Config, dump, read_config
from .grade import main as grade
from .store import Stage, arms, plan, run_folder

HELP = """usage: ./run_all.sh [preset] [key=value ...]     run the loop, skip what is done, write outputs/<run>/report.html
       ./run_all.sh --list                        show the presets and every parameter with its default
       ./run_all.sh --estimate preset [key=value ...]   memory and time a run would take; runs nothing
       ./run_all.sh --bench [quick|full]          sampling and training beside generate and TRL -> outputs/bench/bench.json
       ./run_all.sh --publish RUN                 copy a run's small artefacts to outputs/reference/RUN
       ./run_all.sh export RUN FOLDER [method=irpo seed=0 iteration=3]   write M_t as one whole model in bfloat16
       ./run_all.sh extrapolate TH1 TH0|base FOLDER [a=0.3]   ExPO: write TH1 + a (TH1 - TH0), both folders of policies
       ./run_all.sh grade --task gsm8k FILE.jsonl       grade any responses (see grade --help)
       ./run_all.sh --test                        run the tests

  run=NAME       the folder under outputs/ (default: the preset's name)
  jobs=J         arms (method and seed) at work side by side (default 1; each takes `threads` CPU threads)
  key=value      any parameter, as in iterations=2 seeds=3 methods=irpo,dpo train.lr=1e-3 dpo.train.beta=0.3

A run that was stopped goes on with the same command. A changed parameter reruns what depends on it, and no more."""


def execute(stage: Stage) -> None:
    """Run one stage's notebook; its executed copy lies beside its artefacts, also when it fails."""
    (stage.folder / f"{stage.name}.ipynb").unlink(missing_ok=True)
    run_notebook(
        NOTEBOOKS / f"{stage.name}.ipynb",
        stage.folder / f"{stage.name}.ipynb",
        {"run": relative(stage.run), "method": stage.method, "seed": stage.seed, "iteration": stage.iteration},
        stage.config.threads,
    )


def run_notebook(source: Path, target: Path, parameters: dict, threads: int) -> None:
    """Execute a notebook with papermill.

    Raises:
        ConfigError: a parameter that the notebook does not have (papermill itself would only log it).
    """
    import logging

    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    unknown = set(parameters) - set(papermill.inspect_notebook(str(source)))
    if unknown:
        raise ConfigError(f"{source.name} has no parameter {', '.join(sorted(unknown))}")
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_VERBOSITY="error",
        TRANSFORMERS_VERBOSITY="error",
        PYDEVD_DISABLE_FILE_VALIDATION="1",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.stem}.part.ipynb")
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(source),
            str(part),
            parameters=parameters,
            progress_bar=False,
            cwd=str(NOTEBOOKS.parent),
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except PapermillExecutionError as error:
        where = f"cell {error.exec_count} of {relative(target)}"
        raise RuntimeError(f"{error.ename}: {error.evalue}\n({where})") from None
    finally:
        if part.exists():
            os.replace(part, target)


def run_arm(run: Path, config: Config, method: str, seed: int, after: int = 0, parent: int = 0) -> None:
    """Run one arm's stages. `after` stages of later arms follow (for the time left); stops if process `parent` is gone."""
    stages = plan(config, run, method, seed)
    spent: list[float] = []
    for i, stage in enumerate(stages):
        if parent and os.getppid() != parent:
            raise RuntimeError("the driver is gone")
        label = f"{method}, seed {seed}, iteration {stage.iteration}, {stage.name}"
        # M_0's stages are shared: whoever comes first does them, the others wait and then find them done.
        with locked(stage.folder / f".{stage.name}.turn", patience=7200.0):
            # A run killed between the manifest and the page has the artefacts but not their notebook.
            if stage.is_done() and (stage.folder / f"{stage.name}.ipynb").exists():
                print(f"[{i + 1}/{len(stages)}] {label}: done already", flush=True)
                continue
            left = f", about {sum(spent) / len(spent) * (len(stages) - i + after):.0f} s left" if spent else ""
            print(f"[{i + 1}/{len(stages)}] {label} ...{left}", flush=True)
            started = time.monotonic()
            execute(stage)
            spent.append(time.monotonic() - started)


def report(run: Path, threads: int) -> None:
    """Run 05_report and render it as a page."""
    target = run / "05_report.ipynb"
    run_notebook(NOTEBOOKS / "05_report.ipynb", target, {"run": relative(run)}, threads)
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True).from_filename(
        str(target)
    )
    write_text(run / "report.html", page)


def compare(run: Path, threads: int) -> None:
    """Run 06_methods on a run of several methods."""
    run_notebook(NOTEBOOKS / "06_methods.ipynb", run / "06_methods.ipynb", {"run": relative(run)}, threads)


def check_inputs(config: Config, jobs: int = 1) -> list[str]:
    """Find bad problems, a model that is not there and a run that cannot fit, before anything is written.

    Returns what to say of them: problems left out, the estimate. Raises ConfigError.
    """
    if config.sampling.engine == "vllm":
        vllm_check(config, jobs)
    other = config.process.simulator
    if other and any(kind.reward == "process" for m in config.methods for kind in methods()[m].kinds):
        folder = resolve(Path(other).expanduser())
        if (folder.exists() or other.startswith((".", "/", "~"))) and not (
            (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file()
        ):
            raise ConfigError(
                f"process.simulator: {other} is no folder with an adapter_config.json or a config.json; name an adapter, a model or a hub name"
            )
    if config.task.name == "word_problems" and config.model.path == "seed":
        return []
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are said line by line otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        task = get_task(config.task)
        problems = check_task(task, config.task.name)
        lines = [f"{len(p)} {split} problems" for split, p in problems.items()]
        lines = [f"{config.task.name}: {', '.join(lines)}", *getattr(task, "notes", [])]
        solved = any(p.solution for p in problems["train"])
        needy = [m for m in config.methods if any(k.selection.startswith("gold") for k in methods()[m].kinds)]
        if not solved and needy:
            raise ValueError(f"methods: {config.task.name} has no gold solutions, which {', '.join(needy)} train on")
        if not solved and config.pairs.gold:
            lines.append(f"pairs.gold: {config.task.name} has no gold solutions, so none joins the winners")
        if config.model.path == "seed":
            return lines
        load.check_weights(config.model)
        tokenizer = tokens.load_tokenizer(config.model)
        shape = estimate.Shape.of(load.load_shape(config.model), config.model.trust_remote_code)
        everything = [p for part in problems.values() for p in part]
        prompts = encode_prompts(task, tokenizer, everything)
        stop_ids(config.model, tokenizer)
        if len({tuple(ids) for ids in prompts.values()}) < len(prompts):
            raise ValueError(
                f"model.path: the tokenizer of {config.model.path} writes different prompts as the same tokens; is it whole, and does its chat template use the message?"
            )
        if (largest := max(max(ids) for ids in prompts.values())) >= shape.vocabulary:
            raise ValueError(
                f"model.path: the tokenizer of {config.model.path} knows the token {largest}, its model only {shape.vocabulary}"
            )
        lengths = [len(ids) for ids in prompts.values()]
        sizes = {split: len(p) for split, p in problems.items()}
        return lines + estimate.estimate(config, shape, range(min(lengths), max(lengths) + 1), sizes, jobs)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def start(arguments: list[str], only_estimate: bool = False) -> int:
    preset, settings, name, jobs = "tiny", [], None, 1
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if not equals and i == 0:
            preset = argument
        elif key == "run":
            name = value
        elif key == "jobs":
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"jobs: expected a number of at least 1, got {value!r}")
            jobs = int(value)
        else:
            settings.append(argument)
    config = presets.load_preset(preset, settings)
    run = run_folder(preset if name is None else name)
    said = check_inputs(config, jobs)
    if only_estimate:
        print("\n".join(said or ["the embedded model: a few minutes on any machine"]))
        return 0
    with locked(run / ".lock") as lock:
        write_text(run / "config.yaml", dump(config))
        work = arms(config)
        print(*said, sep="\n", end="\n" if said else "")
        print(
            f"{run.name}: {', '.join(config.methods)}; {config.seeds} seed(s), {config.iterations} iterations -> {relative(run)}"
        )
        if jobs == 1:
            sizes = [len(plan(config, run, *arm)) for arm in work]
            for i, (method, seed) in enumerate(work):
                run_arm(run, config, method, seed, after=sum(sizes[i + 1 :]))
        else:
            run_side_by_side(run, work, jobs, lock.fileno())
        print("report ...", flush=True)
        report(run, config.threads)
        if len(config.methods) > 1:
            compare(run, config.threads)
        print((run / "table.txt").read_text())
        method, seed = work[-1]
        last = Stage("03_train", run, method, seed, config.rounds(method))
        facts = json.loads(last.path("training.json").read_text())
        print(f"load the last model ({method}, iteration {last.iteration}):\n  {facts['load']}")
        print(f"report: {relative(run / 'report.html')}")
    return 0


def run_side_by_side(run: Path, work: list[tuple[str, int]], jobs: int, lock: int) -> None:
    """Arms in processes of their own, `jobs` at a time; the first failure stops the rest. Each holds the run's lock too."""
    waiting, going = list(work), []
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                method, seed = waiting.pop(0)
                going.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "irpo_utils", "--arm", str(run), method, str(seed)], pass_fds=[lock]
                    )
                )
            time.sleep(0.2)
            for process in [p for p in going if p.poll() is not None]:
                going.remove(process)
                if process.returncode:
                    raise RuntimeError("an arm failed; its message is above. The same command goes on from there")
    finally:
        for process in going:
            process.terminate()


def show_all() -> None:
    """The presets, the methods and the parameters there are."""
    print("presets:")
    for name, text in presets.presets().items():
        print(f"  {name:36} {text}")
    print(
        "\nmethods (irpo_utils/methods.yaml), each round as reward, selection, loss, start; methods=all takes every one:"
    )
    for name, recipe in methods().items():
        rounds = [f"{k.reward}, {k.selection}, {k.loss}, {k.start}" for k in recipe.kinds]
        print(f"  {name:16} {' | '.join(rounds)}")
    print("\nparameters and their defaults (before the preset's):")
    print(dump(Config()))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--arm"] and len(arguments) == 4:
        run, method, seed = Path(arguments[1]), arguments[2], int(arguments[3])
        parent = os.getppid()
        work = lambda: run_arm(run, read_config(run / "config.yaml"), method, seed, parent=parent)  # noqa: E731
    elif arguments[:1] in (["--help"], ["-h"]):
        print(HELP)
        return 0
    elif arguments == ["--list"]:
        work = show_all
    elif arguments[:1] == ["grade"]:
        work = lambda: grade(arguments[1:])  # noqa: E731
    elif arguments[:1] == ["export"]:
        work = lambda: export(arguments[1:])  # noqa: E731
    elif arguments[:1] == ["extrapolate"]:
        work = lambda: extrapolate(arguments[1:])  # noqa: E731
    elif arguments in (["--bench"], ["--bench", "quick"], ["--bench", "full"]):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars between the lines of the table
        work = lambda: bench(*arguments[1:])  # noqa: E731
    elif arguments[:1] == ["--estimate"]:
        work = lambda: start(arguments[1:], only_estimate=True)  # noqa: E731
    elif arguments[:1] == ["--publish"] and len(arguments) == 2:
        work = lambda: publish(run_folder(arguments[1]))  # noqa: E731
    elif arguments[:1] and arguments[0].startswith("-"):
        print(f"error: no option is used as {' '.join(arguments)!r}; see ./run_all.sh --help", file=sys.stderr)
        return 2
    else:
        work = lambda: start(arguments)  # noqa: E731
    try:
        return work() or 0
    except (ConfigError, RecipeError, MissingArtefact, Busy) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # standard output was closed, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename}" if error.strerror else f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
