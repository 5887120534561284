"""What leaves a run: its small artefacts for the repository (`publish`), and models (`export`, `extrapolate`)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ..files import NOTEBOOKS, OUTPUTS, ConfigError, MissingArtefact, load_object, relative, write_text
from ..run.config import configured, read_config
from ..run.presets import key_values
from ..run.store import Stage, run_folder

EXPORT = "export: used as export RUN FOLDER [method=irpo] [seed=0] [iteration=1]"
EXTRAPOLATE = "extrapolate: used as extrapolate TH1 TH0|base TARGET [a=0.3] [model.path=... model.dtype=...]"
TABLES = ("*.csv", "*.png", "table.txt", "methods.txt", "config.yaml", "*.ipynb")  # beside the methods' folders
FACTS = ("evaluation", "audit", "training", "reward")
WITHOUT_PROBLEMS = ("03_train", "03c_online", "05_report", "20_real_model")  # notebooks that show none, or quote a few
LARGEST_ADAPTER = 12e6  # bytes, before it is rounded


def export(arguments: list[str]) -> int:
    """`export RUN FOLDER [method=...] [seed=...] [iteration=...]`: write M_t as one whole model.

    Raises:
        ConfigError: an argument is wrong, or the folder is not empty. MissingArtefact: there is no such run or model.
    """
    names, settings = split(arguments)
    if len(names) != 2 or not set(settings) <= {"method", "seed", "iteration"}:
        raise ConfigError(EXPORT)
    run, target = run_folder(names[0]), Path(names[1]).expanduser().resolve()
    if not (run / "config.yaml").is_file():
        raise MissingArtefact(f"{relative(run)} is no run; see outputs/ for those there are")
    config = read_config(run / "config.yaml")
    method = settings.get("method", config.methods[0])
    try:
        seed, t = (int(settings.get(k, v)) for k, v in (("seed", 0), ("iteration", config.rounds(method))))
    except ValueError:
        raise ConfigError(f"export: no such method, seed or iteration: {settings}") from None
    policy = Stage(run, method, seed, t, config).folder_of(t) / "adapter"
    if not policy.is_dir():
        raise MissingArtefact(f"{relative(policy)} is missing; run that iteration first")
    check_new("export", target)
    # By name, so that publishing does not wait for torch.
    load_object("irpo_utils.model.load:export")(config.for_seed(seed).model, policy, target)
    print(f'{target}: load it with AutoModelForCausalLM.from_pretrained("{target}", dtype="bfloat16")')
    return 0


def extrapolate(arguments: list[str]) -> int:
    """`extrapolate TH1 TH0 TARGET [a=0.3] [model.path=...]`: ExPO without a run; TH0 may be the word `base`.

    Raises:
        ConfigError: an argument is wrong, the folder is not empty, or the two policies do not go together.
    """
    names, settings = split(arguments)
    if len(names) != 3 or not all(name == "a" or name.startswith("model.") for name in settings):
        raise ConfigError(EXTRAPOLATE)
    try:
        a = float(settings.pop("a", 0.3))
    except ValueError as error:
        raise ConfigError(f"extrapolate: a: {error}") from None
    if not math.isfinite(a):
        raise ConfigError(f"extrapolate: a: expected a finite number, got {a}")
    th_1, th_0, target = (Path(name).expanduser() for name in names)
    model = configured({}, settings.items()).model
    check_new("extrapolate", target)
    write = load_object("irpo_utils.extras.expo:extrapolate")
    write(model, th_1, None if names[1] == "base" else th_0, a, target)
    print(f"{target}: {names[0]} + {a:g} ({names[0]} - {names[1]})")
    return 0


def split(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command line, and its key=value. Raises ConfigError for a key that is given twice."""
    return [text for text in arguments if "=" not in text], key_values(text for text in arguments if "=" in text)


def check_new(command: str, target: Path) -> None:
    """Raise a ConfigError for a folder that has something in it, or is a file."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{command}: {target} is not empty; name a new folder")


def publish(run: Path) -> None:
    """Copy a run's small artefacts (notebooks, tables, figures, small adapters; no samples) to outputs/reference.

    Of several methods the first has all its notebooks published (of seed 0), the others those that it has not. Its last
    adapter comes along, and that of M_0 after a warm start, rounded to bfloat16.
    Of a run on a benchmark the notebooks that show its problems are left out, but for the few that 20_real_model quotes:
    the records are others' to publish.

    Raises:
        MissingArtefact: the run holds no results.
    """
    target = OUTPUTS / "reference" / run.name
    config = read_config(run / "config.yaml") if (run / "config.yaml").exists() else None
    first = config.methods[0] if config else "*"
    notebooks = ("m0/seed_0/*", f"{first}/seed_0/iteration_*/*", "*/seed_0/iteration_*/0?b_*")
    kept = [p for pattern in TABLES for p in sorted(run.glob(pattern))]
    kept += sorted({p for pattern in notebooks for p in run.glob(f"{pattern}.ipynb")})
    kept += [p for name in FACTS for p in sorted(run.rglob(f"{name}.json"))]
    if config and not config.task.generated:
        kept = [p for p in kept if p.suffix != ".ipynb" or p.stem in WITHOUT_PROBLEMS]
    if not any(p.suffix == ".csv" for p in kept):
        raise MissingArtefact(f"{relative(run)} holds nothing to publish; run it first")
    shutil.rmtree(target, ignore_errors=True)
    for path in kept:
        if not path.name.startswith("."):
            copy = target / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ipynb":  # papermill notes where the files lay on this machine
                write_text(copy, path.read_text().replace(f"{NOTEBOOKS.parent}/", ""))
            else:
                shutil.copyfile(path, copy)
    adapters = (
        [run / "m0/seed_0/adapter", run / first / f"seed_0/iteration_{config.rounds(first)}/adapter"] if config else []
    )
    for adapter in adapters:
        weights = adapter / "adapter_model.safetensors"
        if weights.is_file() and weights.stat().st_size <= LARGEST_ADAPTER:
            load_object("irpo_utils.model.load:copy_rounded")(adapter, target / adapter.relative_to(run))
    print(f"{len(kept)} files -> {relative(target)}")
