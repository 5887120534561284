"""The driver: run every stage of a run as a notebook, skip what is done, end with the table and the report.

python -m irpo_utils [preset] [key=value ...]      (what ./run_all.sh calls)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from . import config as configs
from .runs import NOTEBOOKS, OUTPUTS, Busy, MissingArtefact, Stage, arms, locked, plan, write_text

HELP = """usage: ./run_all.sh [preset] [key=value ...]     run the loop, skip what is done, write outputs/<run>/report.html
       ./run_all.sh --list                        show the presets and every parameter with its default
       ./run_all.sh --publish RUN                 copy a run's small artefacts to outputs/reference/RUN
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
        {"run": project_path(stage.run), "method": stage.method, "seed": stage.seed, "iteration": stage.iteration},
        stage.config.threads,
    )


def project_path(folder: Path) -> str:
    """A folder as a notebook names it: relative to the project, so that an executed copy reads the same elsewhere."""
    return os.path.relpath(folder, NOTEBOOKS.parent)


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
        raise configs.ConfigError(f"{source.name} has no parameter {', '.join(sorted(unknown))}")
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
        PYDEVD_DISABLE_FILE_VALIDATION="1",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.stem}.part.ipynb")
    try:
        papermill.execute_notebook(
            str(source),
            str(part),
            parameters=parameters,
            progress_bar=False,
            cwd=str(NOTEBOOKS.parent),
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    finally:
        if part.exists():
            os.replace(part, target)


def run_arm(run: Path, config: configs.Config, method: str, seed: int, after: int = 0, parent: int = 0) -> None:
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
    run_notebook(NOTEBOOKS / "05_report.ipynb", target, {"run": project_path(run)}, threads)
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True).from_filename(
        str(target)
    )
    write_text(run / "report.html", page)


def run_folder(name: str) -> Path:
    """outputs/NAME; refuses what is not a plain name, and the folder of published runs."""
    if not name or name[0] in ".-" or "/" in name or "\0" in name or name == "reference" or len(name.encode()) > 100:
        raise configs.ConfigError(f"run: a plain folder name under outputs/, got {name!r}")
    return OUTPUTS / name


def check_inputs(config: configs.Config) -> None:
    """Find bad problems and model folders before anything is written. Raises ConfigError."""
    from .tasks import get_task

    try:
        get_task(config.task)
        if config.model.path != "seed":
            from .models import check_path

            check_path(config.model)
    except ValueError as error:
        raise configs.ConfigError(str(error)) from None


def start(arguments: list[str]) -> int:
    preset, settings, name, jobs = "tiny", [], None, 1
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if not equals and i == 0:
            preset = argument
        elif key == "run":
            name = value
        elif key == "jobs":
            if not value.isdecimal() or int(value) < 1:
                raise configs.ConfigError(f"jobs: expected a number of at least 1, got {value!r}")
            jobs = int(value)
        else:
            settings.append(argument)
    config = configs.load_preset(preset, settings)
    run = run_folder(preset if name is None else name)
    check_inputs(config)
    with locked(run / ".lock") as lock:
        write_text(run / "config.yaml", configs.dump(config))
        work = arms(config)
        print(
            f"{run.name}: {', '.join(config.methods)}; {config.seeds} seed(s), {config.iterations} iterations -> {project_path(run)}"
        )
        if jobs == 1:
            sizes = [len(plan(config, run, *arm)) for arm in work]
            for i, (method, seed) in enumerate(work):
                run_arm(run, config, method, seed, after=sum(sizes[i + 1 :]))
        else:
            run_side_by_side(run, work, jobs, lock.fileno())
        print("report ...", flush=True)
        report(run, config.threads)
        print((run / "table.txt").read_text())
        print(f"report: {project_path(run / 'report.html')}")
    return 0


def publish(run: Path) -> None:
    """Copy a run's small artefacts (notebooks, tables, figures; no weights, no samples) to outputs/reference."""
    import shutil

    target = OUTPUTS / "reference" / run.name
    kept = [
        p for pattern in ("*.csv", "*.png", "table.txt", "config.yaml", "*.ipynb") for p in sorted(run.glob(pattern))
    ]
    kept += [p for folder in ("m0/seed_0", "*/seed_0/iteration_*") for p in sorted(run.glob(f"{folder}/*.ipynb"))]
    kept += [p for name in ("evaluation", "audit", "training") for p in sorted(run.rglob(f"{name}.json"))]
    if not kept:
        raise MissingArtefact(f"{project_path(run)} holds nothing to publish; run it first")
    shutil.rmtree(target, ignore_errors=True)
    for path in kept:
        if not path.name.startswith("."):
            (target / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            copy = target / path.relative_to(run)
            if path.suffix in (".ipynb", ".html"):  # papermill notes where the files lay on this machine
                write_text(copy, path.read_text().replace(f"{NOTEBOOKS.parent}/", ""))
            else:
                shutil.copyfile(path, copy)
    print(f"{len(kept)} files -> {target}")


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


def main(arguments: list[str]) -> int:
    from papermill.exceptions import PapermillExecutionError

    if arguments[:1] == ["--arm"] and len(arguments) == 4:
        run, method, seed = Path(arguments[1]), arguments[2], int(arguments[3])
        parent = os.getppid()
        work = lambda: run_arm(run, configs.read_config(run / "config.yaml"), method, seed, parent=parent)  # noqa: E731
    elif arguments[:1] in (["--help"], ["-h"]):
        print(HELP)
        return 0
    elif arguments == ["--list"]:
        print("presets:")
        for name, text in configs.presets().items():
            print(f"  {name:10} {text}")
        print("\nmethods: " + ", ".join(configs.METHODS) + "\n\nparameters and their defaults (before the preset's):")
        print(configs.dump(configs.Config()))
        return 0
    elif arguments[:1] == ["--publish"] and len(arguments) == 2:
        work = lambda: publish(run_folder(arguments[1]))  # noqa: E731
    elif arguments[:1] and arguments[0].startswith("-"):
        print(f"error: no option is used as {' '.join(arguments)!r}; see ./run_all.sh --help", file=sys.stderr)
        return 2
    else:
        work = lambda: start(arguments)  # noqa: E731
    try:
        return work() or 0
    except (configs.ConfigError, MissingArtefact, Busy) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        print(
            f"error: {error.ename}: {error.evalue}\n(cell {error.exec_count} of the executed notebook)",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
