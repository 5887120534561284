"""What leaves a run: small artefacts to commit, models, preference data, and responses that are to be refined."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from ..files import NOTEBOOKS, OUTPUTS, ConfigError, MissingArtefact, load_object, relative, write_jsonl, write_text
from ..model.records import Pair
from ..run.config import Config, configured, read_config
from ..run.presets import key_values
from ..run.stages import method_seeds, plan
from ..run.store import Stage, read_run
from ..tasks import get_task
from .cards import model_card, pairs_card

EXPORT = "export: used as export RUN FOLDER [method=irpo] [seed=0] [iteration=1] [push=OWNER/NAME]"
PAIRS = "pairs: used as pairs RUN FILE [method= seed= iteration=] [form=text|messages|sharegpt] [push=OWNER/NAME]"
ATTEMPTS = "attempts: used as attempts RUN FOLDER [method= seed= iteration=1]"
EXTRAPOLATE = "extrapolate: used as extrapolate TH1 TH0|base TARGET [a=0.3] [model.path=... model.dtype=...]"
TABLES = ("*.csv", "*.png", "table.txt", "methods.txt", "config.yaml", "*.ipynb")  # beside the methods' folders
FACTS = ("evaluation", "audit", "training", "reward")
NOT_IN_ALL = ("01b_reward", "03b_extrapolate")  # stages that the first method may not have
WITHOUT_PROBLEMS = ("03_train", "03c_online", "05_report", "20_real_model")  # notebooks that show none, or quote a few
LARGEST_ADAPTER = 12e6  # bytes, before it is rounded


def export(arguments: list[str]) -> int:
    """`export RUN FOLDER [method=...] [seed=...] [iteration=...] [push=...]`: write M_t as a whole model, with a card.

    Raises:
        ConfigError: an argument is wrong, or the folder is not empty. MissingArtefact: there is no such run or model.
    """
    stage, target, settings = round_of(EXPORT, arguments, "push")
    policy = stage.folder / "adapter"
    if not policy.is_dir():
        raise MissingArtefact(f"{relative(policy)} is missing; run that iteration first")
    check_new("export", target)
    # By name, so that publishing does not wait for torch.
    load_object("irpo_utils.model.load:export")(stage.config.model, policy, target)
    model_card(stage, target / "README.md")
    if "push" in settings:
        push(settings["push"], "model", {path.name: path for path in sorted(target.iterdir())})
    print(f'{target}: load it with AutoModelForCausalLM.from_pretrained("{target}", dtype="bfloat16")')
    return 0


def pairs(arguments: list[str]) -> int:
    """`pairs RUN FILE [method=...] [seed=...] [iteration=...] [form=...] [push=...]`: write a round's pairs and a card.

    Raises:
        ConfigError: an argument is wrong, the file is there already, or the round rejects nothing. MissingArtefact:
            there is no such run, or the round has no pairs.
    """
    stage, target, settings = round_of(PAIRS, arguments, "form", "push")
    if (form := settings.get("form", "text")) not in FORMS:
        raise ConfigError(f"pairs: form: one of {', '.join(FORMS)}, got {form!r}")
    about = target.with_name(f"{target.name}.md")
    if target.exists() or about.exists():
        raise ConfigError(f"pairs: {target} or {about.name} is there already; name a new file")
    found = Pair.read(stage.folder / "pairs.jsonl", "02_pairs.ipynb")
    if not all(pair.rejected_ids for pair in found) or stage.choices.part("selection").partial:
        raise ConfigError(
            f"pairs: round {stage.iteration} of {stage.method} has no pairs of whole responses; take one that has"
        )
    write_jsonl(target, map(FORMS[form], found))
    pairs_card(stage, about, form)
    if "push" in settings:
        push(settings["push"], "dataset", {"train.jsonl": target, "README.md": about})
    print(f"{target}: {len(found)} pairs, form={form}")
    return 0


# How a pair is written: TRL's two forms, and LLaMA-Factory's ShareGPT. The prompt is the text before the chat template.
FORMS = {
    "text": lambda p: {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected},
    "messages": lambda p: {
        name: [{"role": role, "content": getattr(p, name)}]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    },
    "sharegpt": lambda p: (
        {"conversations": [{"from": "human", "value": p.prompt}]}
        | {name: {"from": "gpt", "value": getattr(p, name)} for name in ("chosen", "rejected")}
    ),
}


def attempts(arguments: list[str]) -> int:
    """`attempts RUN FOLDER [method=...] [seed=...] [iteration=...]`: write problems with M_{t-1}'s solutions of them.

    Raises:
        ConfigError: an argument is wrong, the folder is not empty, or the round draws no samples. MissingArtefact:
            there is no such run, or samples or evaluation of M_{t-1} are not done.
    """
    first = [] if "iteration" in split(arguments)[1] else ["iteration=1"]  # M_0's
    stage, target, _ = round_of(ATTEMPTS, [*arguments, *first])
    check_new("attempts", target)
    run, t = stage.run_folder, stage.iteration
    stages = {(s.name, s.iteration): s for s in plan(read_run(run.name)[1], run, stage.method, stage.seed)}
    sampled, evaluated = stages.get(("01_sample", t)), stages.get(("04_evaluate", t - 1))
    if not (stage.choices.draws and sampled and evaluated):
        raise ConfigError(f"attempts: round {t} of {stage.method} draws no samples; take one that does")
    check_done(sampled)
    check_done(evaluated)
    write = load_object("irpo_utils.extras.refine:attempts")
    try:
        counts = write(
            get_task(stage.config.task), sampled.path("samples.jsonl"), evaluated.path("responses.jsonl"), target
        )
    except ValueError as error:  # of the problems' files
        raise ConfigError(str(error)) from None
    for name, (count, right) in counts.items():
        print(f"{target / name}.jsonl: {count} problems, {right} of whose attempts are right")
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


def push(name: str, kind: str, files: dict[str, Path]) -> None:
    """Upload files by their names to the repository OWNER/NAME of the hub, which is made, private, if there is none."""
    hub, add = load_object("huggingface_hub:HfApi")(), load_object("huggingface_hub:CommitOperationAdd")
    try:
        hub.create_repo(name, repo_type=kind, private=True, exist_ok=True)
        operations = [add(path_in_repo=as_named, path_or_fileobj=path) for as_named, path in files.items()]
        print(hub.create_commit(name, operations, commit_message="From a run of irpo_utils", repo_type=kind).repo_url)
    except Exception as error:  # of HTTP, of the connection, of a name that is none
        hint = f"the files are in {next(iter(files.values())).parent}; `hf auth login`, then `hf upload` sends them"
        raise ConfigError(f"push: {name}: {error}\n{hint}") from None


def round_of(usage: str, arguments: list[str], *more: str) -> tuple[Stage, Path, dict[str, str]]:
    """The round that `RUN TARGET [method=...] [seed=...] [iteration=...]` names, the target, and the settings.

    Args:
        usage: the command and how it is used, for the error. more: settings that it takes besides.
    """
    names, settings = split(arguments)
    if len(names) != 2 or not set(settings) <= {"method", "seed", "iteration", *more}:
        raise ConfigError(usage)
    (run, config), target = read_run(names[0]), Path(names[1]).expanduser().resolve()
    method = settings.get("method", config.methods[0])
    if method in config.methods:
        seeds, rounds = range(config.seeds), range(0 if config.warm_start.problems else 1, config.rounds(method) + 1)
        seed, t = settings.get("seed", "0"), settings.get("iteration", str(rounds[-1]))
        if seed in map(str, seeds) and t in map(str, rounds):
            return Stage(run, method, int(seed), int(t), config), target, settings
        there = f"seeds 0 to {seeds[-1]} and iterations {rounds[0]} to {rounds[-1]} of {method}"
    else:
        there = f"methods {', '.join(config.methods)}"
    asked = ", ".join(f"{name}={settings[name]}" for name in ("method", "seed", "iteration") if name in settings)
    raise ConfigError(f"{usage.partition(':')[0]}: no such method, seed or iteration: {asked}; {names[0]} has {there}")


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
    adapter comes along, and that of M_0 after a warm start, rounded to bfloat16. Of a run on a benchmark the notebooks
    that show its problems are left out, but for the few that 20_real_model quotes: the records are others' to publish.
    Whatever else the folder of the run has is not published: a method, a seed or an iteration that it had once. Of a
    run that was not evaluated, as one that a notebook made pairs in, what lies at its top is.

    Raises:
        MissingArtefact: the run holds no results, or one of its stages is not done. ConfigError: an executed copy that
            was published before is no notebook.
    """
    target = OUTPUTS / "reference" / run.name
    config = read_config(run / "config.yaml") if (run / "config.yaml").exists() else None
    kept = [p for pattern in TABLES for p in sorted(run.glob(pattern))]
    kept += of_stages(run, config) if config and (run / "metrics.csv").exists() else []
    if config and not config.task.generated:
        kept = [p for p in kept if p.suffix != ".ipynb" or p.stem in WITHOUT_PROBLEMS]
    if not any(p.suffix == ".csv" for p in kept):
        raise MissingArtefact(f"{relative(run)} holds nothing to publish; run it first")
    gone = {p.name for p in target.glob("*")} - {p.relative_to(run).parts[0] for p in kept}
    shutil.rmtree(target, ignore_errors=True)
    for path in kept:
        copy = target / path.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":  # papermill notes where the files lay on this machine
            write_text(copy, path.read_text().replace(f"{NOTEBOOKS.parent}/", "").rstrip("\n") + "\n")
        else:
            shutil.copyfile(path, copy)
    first = config.methods[0] if config else ""
    adapters = (
        [run / "m0/seed_0/adapter", run / first / f"seed_0/iteration_{config.rounds(first)}/adapter"] if config else []
    )
    for adapter in adapters:
        weights = adapter / "adapter_model.safetensors"
        if weights.is_file() and weights.stat().st_size <= LARGEST_ADAPTER:
            load_object("irpo_utils.model.load:copy_rounded")(adapter, target / adapter.relative_to(run))
    print(f"{len(kept)} files -> {relative(target)}")
    if gone:
        print(f"no longer there, since {relative(run)} has them not: {', '.join(sorted(gone))}")
    for copy in sorted(target.parent.rglob("*.ipynb")):
        write_text(copy, with_present_text(copy))


def of_stages(run: Path, config: Config) -> list[Path]:
    """The facts of all stages of a run, and the notebooks of some. Raises MissingArtefact: a stage is not done."""
    kept = {}
    for method, seed in method_seeds(config):
        for stage in plan(config, run, method, seed):
            check_done(stage)
            shown = method == config.methods[0] or stage.name in NOT_IN_ALL
            names = [f"{name}.json" for name in FACTS] + [f"{stage.name}.ipynb"] * (shown and seed == 0)
            kept |= {stage.folder / name: None for name in names if (stage.folder / name).is_file()}
    return list(kept)


def check_done(stage: Stage) -> None:
    """Raise a MissingArtefact for a stage of which anything but code or versions of packages has changed since."""
    since = ("code ", "python ", *(f"{name} " for name in stage.key()["versions"]))
    if found := [line for line in stage.why_not_done() if not line.startswith(since)]:
        raise MissingArtefact(f"{stage.label()}: {found[0]}; ./run_all.sh {stage.run_folder.name} does what is missing")


def with_present_text(path: Path) -> str:
    """An executed copy, as JSON, with the text between its cells as its notebook has it now.

    Text is no result: where it was made clearer since, the copy says it too. A copy of other cells, or of a notebook
    that is not the project's, stays as it is. (What the package did otherwise when it was executed is not looked at.)
    """
    executed = path.read_text()
    if not (NOTEBOOKS / path.name).is_file():
        return executed
    source = json.loads((NOTEBOOKS / path.name).read_text())
    try:
        copy = json.loads(executed)
    except ValueError as error:
        raise ConfigError(f"{relative(path)}: not a notebook: {error}; publish its run again") from None

    def texts(notebook: dict[str, Any], kind: str) -> list[str]:
        return [
            "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind and not injected(cell)
        ]

    def injected(cell: dict[str, Any]) -> bool:  # what papermill has put behind the parameters
        return "injected-parameters" in cell["metadata"].get("tags", [])

    if texts(copy, "code") != texts(source, "code") or texts(copy, "markdown") == texts(source, "markdown"):
        return executed
    code, cells = [cell for cell in copy["cells"] if cell["cell_type"] == "code"], []
    for cell in source["cells"]:
        cells.append(code.pop(0) if cell["cell_type"] == "code" else cell)
        if code and injected(code[0]):
            cells.append(code.pop(0))
    return json.dumps(copy | {"cells": cells}, indent=1, ensure_ascii=False) + "\n"
