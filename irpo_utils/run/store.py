"""Bookkeeping of a run: where each artefact is, what a stage's result depends on, and whether it is done.

    outputs/<run>/config.yaml
    outputs/<run>/m0/seed_<s>/   M_0 (its adapter, if it has one), its evaluation and samples, shared by all methods
    outputs/<run>/<method>/seed_<s>/iteration_<t>/   samples of M_{t-1}, pairs, the policy M_t, its evaluation
    outputs/<run>/report.html, metrics.csv, timing.csv

A stage is done when its manifest says so. The manifest is written last and holds the stage's key: its parameters, its
input files, the code that it runs and the versions of packages. If one of these differs now, the stage runs again, and
`why_not_done` says which one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from ..files import (
    NOTEBOOKS,
    OUTPUTS,
    PACKAGE,
    ConfigError,
    MissingArtefact,
    file_hash,
    load_object,
    lock_at,
    relative,
    remove,
    replace,
    resolve,
    source_of,
    take,
    write_json,
    write_text,
)
from ..methods.parts import SAMPLERS, Engine
from ..model import packaged
from ..model.records import Prompt, Record, Sample
from ..progress import kept
from ..settings import FROM_FILES, MATH_VERSIONS, PLACES, VERSIONS, ModelConfig, Section
from ..tasks import TASKS
from ..tasks.base import Problem, Task
from ..tasks.records import is_file
from .code import closure, edited_since_import, imports, module_file, module_hash, notebook_hash
from .config import Config, dump, read_config
from .presets import load_preset, presets

Kind = TypeVar("Kind", bound=Record)
# What of a model's folder makes the model.
MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")
PUBLISHED = OUTPUTS / "reference"
COUNTS = "progress.json"  # in a stage's partial folder: how far it is


def run_folder(name: str) -> Path:
    """outputs/NAME; refuses what is not a plain name, and what is a folder of something else."""
    plain = name.isprintable() and name == name.strip() and not any("\ud800" <= c <= "\udfff" for c in name)
    if not name or not plain or name[0] in ".-" or "/" in name or len(name.encode()) > 100:
        raise ConfigError(f"run: a plain folder name under outputs/, got {name!r}")
    if name in ("reference", "models", "lab", "site", "site-build", "gpu", "bench", "data"):
        raise ConfigError(f"run: outputs/{name} is kept for other things; take another name")
    return OUTPUTS / name


def read_run(name: str) -> tuple[Path, Config]:
    """The folder and the configuration of the run outputs/NAME. Raises MissingArtefact where there is none."""
    run = run_folder(name)
    if not (run / "config.yaml").is_file():
        raise MissingArtefact(f"{relative(run)} is no run; see outputs/ for those there are")
    return run, read_config(run / "config.yaml")


def is_run(name: str) -> bool:
    """Whether outputs/NAME is a run, and NAME is not a preset's name too."""
    return name not in presets() and name in {path.parent.name for path in OUTPUTS.glob("*/config.yaml")}


def open_run(folder: str | Path, preset: str = "") -> Config:
    """The configuration of a run. A folder that is not there yet starts as `preset`, or as the preset of its name.

    Raises:
        ConfigError: there is no such run, or it is one of the published ones.
    """
    if not str(folder).strip():
        raise ConfigError("run: the folder of a run, got none")
    named, folder = Path(folder), resolve(folder)
    path = folder / "config.yaml"
    if PUBLISHED.resolve() in folder.resolve().parents:
        raise ConfigError(f"run: {relative(folder)} is published as it is; take a run of your own, as outputs/tiny")
    if not path.exists():
        astray = folder.parent != OUTPUTS and not named.is_absolute()  # "tiny", where outputs/tiny is meant
        if astray or (preset or folder.name) not in presets():
            there = ", ".join(sorted(relative(p.parent) for p in OUTPUTS.glob("*/config.yaml"))) or "none yet"
            raise ConfigError(
                f"run: {relative(folder)} is no run (there is: {there}); "
                "./run_all.sh tiny run=NAME makes outputs/NAME, and outputs/tiny starts by itself"
            )
        write_text(path, dump(load_preset(preset or folder.name)))
    return read_config(path)


def own_file_hash(where: str, file: Path) -> str:
    """The hash of a file of the user's, which `where` names. Raises ConfigError where there is none."""
    if not file.is_file():
        raise ConfigError(f"{where}: there is no file {relative(file)}")
    return file_hash(file)


class Stage:
    """One stage of one round of a method; `iteration` 0 is M_0 itself. A stage's file in `stages/` says the rest.

    Args:
        run: the run's folder. config: its configuration, if it has been read already.
    """

    name: ClassVar[str]
    reads_problems: ClassVar[bool] = True  # whether it loads the task
    loads_model: ClassVar[bool] = True
    draws: ClassVar[bool] = False  # whether it draws responses, which one of several engines does

    def __init__(
        self, run: str | Path, method: str = "irpo", seed: int = 0, iteration: int = 1, config: Config | None = None
    ):
        for key, value in (("seed", seed), ("iteration", iteration)):
            if type(value) is not int or value < 0:
                raise ConfigError(f"{key}: expected a whole number from 0 on, got {value!r}")
        self.run_folder, self.method, self.seed, self.iteration = resolve(run), method, seed, iteration
        whole = config or open_run(self.run_folder)
        self.recipe = whole.recipe(method)
        self.choices = self.recipe.round(max(1, iteration))
        self.config = whole.for_round(method, iteration).for_seed(seed)
        self.folder = self.folder_of(iteration)
        self.at_work = False  # between begin() and finish(), unless the stage was done before

    # What a stage says of itself.

    def reads(self) -> dict[str, tuple[Path, str]]:
        """Input name -> (path, the notebook that makes it)."""
        return {}

    def writes(self) -> tuple[str, ...]:
        """The files and folders that it leaves in `folder`."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The parameters that its result depends on, by name, and no others."""
        raise NotImplementedError

    def uses(self) -> Iterable[str]:
        """What it loads by name ("module:function" or "file.py:function"), which its imports do not tell."""
        return ()

    def make(self) -> None:
        """Do it: read the inputs, write the outputs."""
        raise NotImplementedError

    def result(self) -> Any:
        """What `make` has left, read back."""
        raise NotImplementedError

    @property
    def sampler(self) -> Engine:
        """The engine that it draws responses with."""
        return SAMPLERS[self.config.sampling.engine]

    def open_sampler(self, task: Task, problems: list[Problem]) -> Any:
        """A `sampler.Sampler` of the input "policy" that will be asked `problems`, for a `with` block."""
        return self.sampler.opener(self.config)(self.config, self.input("policy"), task, problems)

    # Where things are.

    def m0_folder(self) -> Path:
        return self.run_folder / "m0" / f"seed_{self.seed}"

    def folder_of(self, iteration: int) -> Path:
        if not iteration:
            return self.m0_folder()
        return self.run_folder / self.method / f"seed_{self.seed}" / f"iteration_{iteration}"

    def samples_folder(self) -> Path:
        """Where this round's samples are: those of M_0 are shared by all methods."""
        return self.m0_folder() if self.iteration == 1 and self.choices.draws else self.folder

    def policy_input(self, iteration: int, name: str = "policy") -> dict[str, tuple[Path, str]]:
        """M_t as the input `name`; nothing where it is the base itself."""
        if not iteration and not self.config.warm_start.problems:
            return {}
        if not iteration:
            maker = "00_warm_start"
        else:
            maker = self.recipe.round(iteration).stages(self.config.train.sync_every)[-2]  # the last one evaluates
        where = f" with iteration = {iteration}" if iteration and iteration != self.iteration else ""
        return {name: (self.folder_of(iteration) / "adapter", f"{maker}.ipynb{where}")}

    def path(self, name: str) -> Path:
        """Where an output is. While the stage is at work the new one is apart, so that an earlier one stays."""
        return (self.partial_folder() / "made" if self.at_work else self.folder) / name

    def facts(self, name: str) -> dict[str, Any]:
        """What it left in a JSON file. Raises MissingArtefact, which names the notebook that writes it."""
        path = self.path(name)
        if not path.exists():
            raise MissingArtefact(
                f"{relative(path)} is missing; run notebooks/{self.name}.ipynb for it, or ./run_all.sh"
            )
        return json.loads(path.read_text())

    def input(self, name: str) -> Path | None:
        """An input's path; None for one this stage has not, as M_0's where it is the base. Raises MissingArtefact."""
        path, made_by = self.reads().get(name, (None, ""))
        if path is not None and not path.exists():
            name, _, where = made_by.partition(".ipynb")
            if (path.parent / f".{name}.partial" / "key.json").exists():
                raise MissingArtefact(f"{relative(path)} is missing: {name} was begun{where}; run it to its last cell")
            raise MissingArtefact(f"{relative(path)} is missing; run notebooks/{made_by} first")
        return path

    def records(self, name: str, kind: type[Kind]) -> list[Kind]:
        """The records of an input. Raises MissingArtefact, which names the notebook that makes it."""
        return kind.read(self.input(name), self.reads()[name][1])

    def prompts(self) -> dict[str, Prompt]:
        """Problem id -> its prompt, from the input "prompts"."""
        return {prompt.problem: prompt for prompt in self.records("prompts", Prompt)}

    def samples(self) -> dict[str, list[Sample]]:
        """Problem id -> its samples, from the input "samples"; empty for a round that draws none."""
        return Sample.by_problem(self.records("samples", Sample)) if self.choices.draws else {}

    def training_problems(self, task: Task) -> list[Problem]:
        """The training problems but for the warm start's; the dev problems too, if training is repeated with them."""
        own = task.problems("train")[self.config.warm_start.problems :]
        return own + (task.problems("dev") if self.config.train.retrain_with_dev else [])

    def random_seed(self, purpose: int = 0) -> int:
        """A seed of its own for each (seed, iteration, purpose)."""
        return (self.seed * 1000 + self.iteration) * 10 + purpose

    def label(self) -> str:
        return f"{self.method}, seed {self.seed}, iteration {self.iteration}, {self.name}"

    # What it depends on.

    def section(self, name: str, only: Iterable[str] = (), without: Iterable[str] = ()) -> dict[str, Any]:
        """Parameters of a section of the configuration, as "train.lr", but for those that say where it is computed."""
        section: Section = getattr(self.config, name)
        found = section.model_dump(mode="json", include=set(only) or None, exclude={*without, *PLACES.get(name, ())})
        return {f"{name}.{leaf}": value for leaf, value in found.items()}

    def task_parameters(self, unused: str = "") -> dict[str, Any]:
        """The task's parameters, without the sizes of `unused` splits.

        Where dev or test is held out of training, its size decides which problems are trained on.
        """
        task = self.config.task
        own_splits = task.generated and not self.config.train.retrain_with_dev
        held_out = [] if own_splits else ["dev"]
        if not task.test and (task.name in FROM_FILES or source_of(task.name)):
            held_out.append("test")
        dropped = [f"{split}_size" for split in unused.split() if split not in held_out]
        return self.section("task", without=dropped)

    def common_parameters(self) -> dict[str, Any]:
        found = {"seed": self.seed, "iteration": self.iteration, "threads": self.config.threads}
        if self.draws and (split := self.config.sampling.tensor_parallel) > 1:
            found["sampling.tensor_parallel"] = split  # sums round differently, as with another number of threads
        return found

    def base_parameters(self) -> dict[str, Any]:
        """The model's parameters; those of an adapter do not count where there is none."""
        adapter = ("tuning", "lora_r", "lora_alpha")
        return self.section("model", without=() if "policy" in self.reads() else adapter)

    def inputs(self) -> dict[str, str]:
        """Input name -> hash. Raises MissingArtefact if one is not there."""
        found = {name: file_hash(self.input(name)) for name in self.reads()}
        found |= {where: own_file_hash(where, file) for where in self.uses() if (file := source_of(where))}
        return found | self.configured_files()

    def configured_files(self) -> dict[str, str]:
        """Hashes of the files that the configuration names: the base model, problems, a task of the user's."""
        found, task = {}, self.config.task
        if self.loads_model:
            path = self.config.model.path
            known = packaged.NAMED.get(path)  # by the hash of its package's file, written as a folder or not
            found |= {"base": known.sha256} if known else model_files("base", packaged.folder(path) or path)
        if self.reads_problems:
            found |= problem_files((*task.train, *task.dev, *task.test))
            if (file := source_of(task.name)) is not None:
                found["task"] = own_file_hash(task.name, file)
        return found

    def named_code(self) -> list[str]:
        """All that it loads by name: "module:name", or "file.py:name" of the user's."""
        task = self.config.task.name
        return [*self.uses(), *([TASKS.get(task, task)] if self.reads_problems else [])]

    def code(self) -> dict[str, str]:
        """Module -> hash of what this stage runs: its file, what it loads by name, and all that these import."""
        roots = {type(self).__module__}
        for where in self.named_code():
            file = source_of(where)
            if file is None:
                roots.add(where.rpartition(":")[0])
            elif file.is_file():  # it is an input; the package's modules that it imports count here
                try:
                    roots |= imports(file.read_text(), "")
                except (SyntaxError, UnicodeDecodeError) as error:
                    raise ConfigError(f"{where}: {relative(file)} is no Python: {error}") from None
        modules = closure(tuple(sorted(root.removeprefix("irpo_utils.") for root in roots)))
        found = {module_file(name).relative_to(PACKAGE).as_posix(): module_hash(name) for name in modules}
        return {f"notebooks/{self.name}.ipynb": notebook_hash(NOTEBOOKS / f"{self.name}.ipynb"), **found}

    def versions(self) -> dict[str, str | None]:
        """Package -> version, of what computes and grades.

        An engine in an environment of its own may be out of reach where nothing is drawn. The stage is then compared
        with the version that it was made with.
        """
        latex = "answers/verify.py" in self.code()
        names = (*(VERSIONS if self.loads_model else ()), *(MATH_VERSIONS if latex else ()))
        found = {name: version(name) for name in names}
        if self.draws and self.sampler.version:
            name = self.config.sampling.engine
            made_with = ((self.manifest() or {}).get("key") or {}).get("versions") or {}
            found[name] = load_object(self.sampler.version)() or made_with.get(name)
        return found

    def _parameters(self) -> dict[str, Any]:
        return self.parameters() | {"uses": sorted(self.uses())}

    def key(self) -> dict[str, Any]:
        """Everything the stage's result depends on. Raises MissingArtefact if an input is not there."""
        return {
            "stage": self.name,
            "parameters": self._parameters(),
            "inputs": self.inputs(),
            "code": self.code(),
            "versions": self.versions(),
            "python": sys.version.split()[0],
        }

    # Whether it is done.

    def manifest_path(self) -> Path:
        return self.folder / f"{self.name}.manifest.json"

    def manifest(self) -> dict[str, Any] | None:
        manifest = read_manifest(self.manifest_path())
        return manifest if manifest and set(manifest["outputs"]) == set(self.writes()) else None

    def replaced(self) -> dict[Path, dict[str, Any]]:
        """Manifests of what this stage replaces: its own, and those of another kind of round that left such files."""
        there = {path: read_manifest(path) for path in sorted(self.folder.glob("*.manifest.json"))}
        return {path: found for path, found in there.items() if found and {*found["outputs"]} & {*self.writes()}}

    def is_done(self) -> bool:
        """Whether the manifest names the present inputs and the outputs are as it left them."""
        return not self.why_not_done()

    def why_not_done(self) -> list[str]:
        """What keeps the stage from being done, a line each; nothing if it is done."""
        manifest = self.manifest()
        if manifest is None:
            if self.manifest_path().exists():
                return ["its manifest is damaged, or of another version"]
            begun = (self.partial_folder() / "key.json").exists()
            return ["it was begun and has not finished" if begun else "it has not run yet"]
        missing = [f"input {name} is missing" for name, (path, _) in self.reads().items() if not path.exists()]
        if missing:
            return missing
        before, now = manifest["key"], self.key()
        reasons = []
        for part in ("parameters", "inputs", "code", "versions"):
            old, new = before.get(part), now[part]
            old = old if isinstance(old, dict) else {}
            for name in sorted(old.keys() | new.keys()):
                if name not in old or name not in new or old[name] != new[name]:
                    reasons.append(difference(part, name, old, new))
        if before.get("python") != now["python"]:
            reasons.append(f"python {before.get('python')} -> {now['python']}")
        for name, digest in manifest["outputs"].items():
            if not self.path(name).exists():
                reasons.append(f"output {name} is missing")
            elif not reasons and file_hash(self.path(name)) != digest:
                reasons.append(f"output {name} is not as it was left")
        return reasons

    def begin(self, again: bool = False) -> Self:
        """Take the stage's folder. A stage that is done keeps what it has, unless it is to be done `again`.

        What an earlier run of the stage has left stays until `finish` puts the new outputs in its place.

        Raises:
            ConfigError: the method has no such stage in the round, or its code was edited after this process loaded it.
            MissingArtefact: an input is missing. Busy: another process is at work on this stage.
        """
        wanted = self.choices.stages(self.config.train.sync_every) if self.iteration else stages_of_m0(self.config)
        if self.name not in wanted:
            of = f"round {self.iteration} of {self.method}" if self.iteration else "M_0"
            hint = "; warm_start.problems=100 would give it one" if self.name == "00_warm_start" else ""
            raise ConfigError(f"{self.name}: {of} has no such stage; it has {', '.join(wanted)}{hint}")
        self._key = self.key()
        if "torch" not in sys.modules:
            os.environ["OMP_NUM_THREADS"] = str(self.config.threads)
        if edited := edited_since_import(self._key["code"]):
            raise ConfigError(
                f"code: {', '.join(edited)} was changed after this kernel had loaded it; restart the kernel"
            )
        if not again and self._is_shown(self.why_not_done()):
            return self
        self._lock = lock_at(self.folder / f".{self.name}.lock")
        # A kernel whose driver was killed lives on for about a second; give it the time to notice.
        take(self._lock, patience=20.0)
        found = self.why_not_done()
        if not again and self._is_shown(found):  # another process has done it in the meantime
            self._lock.release()
            return self
        mark = self.partial_folder() / "key.json"
        if not mark.exists() or mark.read_text() != json.dumps(self._key, indent=1) + "\n":
            shutil.rmtree(self.partial_folder(), ignore_errors=True)
            write_json(mark, self._key)
        elif any(path.is_file() and path != mark for path in self.partial_folder().rglob("*")):
            print(f"{relative(self.folder)}: {self.name} goes on with what was begun")
        if self.manifest_path().exists():
            why = "; ".join(found) or "again = True"
            print(f"{self.name} is done again ({why}); what is there stays until the last cell")
        self.at_work = True
        self._seconds = 0.0
        self.path("").mkdir(exist_ok=True)
        return self

    def join(self) -> None:
        """Work for the process that has begun the stage. Raises ConfigError where config.yaml was changed since."""
        self._key = json.loads((self.partial_folder() / "key.json").read_text())
        if json.loads(json.dumps(self._parameters())) != self._key["parameters"]:
            raise ConfigError(
                f"{self.name}: the run's config.yaml was changed while it began; the same command goes on"
            )

    def _is_shown(self, found: list[str]) -> bool:
        """Whether the stage is done, nothing being `found` that keeps it from that; says so."""
        if found:
            return False
        begun = (self.partial_folder() / "key.json").exists()
        anew = "goes on with doing it anew, which was begun" if begun else "does it anew"
        print(f"{relative(self.folder)}: {self.name} is done, and shown as it is; again = True {anew}")
        return True

    def run(self, **options: Any) -> Any:
        """Do it, unless it is done; returns what it has left. `options` are those of the stage's `make`."""
        self.check_begun()
        if self.at_work:
            self._check_unchanged()
            started = time.monotonic()
            with kept(self.partial_folder() / COUNTS, self.label()):
                self.make(**options)
            self._seconds += time.monotonic() - started  # a cell may be run twice
        return self.result()

    def check_begun(self) -> None:
        """Raise a ConfigError for a stage whose folder is not taken."""
        if not hasattr(self, "_key"):
            raise ConfigError(f"{self.name}: run the cell with begin() first")

    def _check_unchanged(self) -> None:
        """Raise a ConfigError where the result would not be what the key names."""
        for part, now in (("parameters", self._parameters()), ("inputs", self.inputs())):
            if now != self._key[part]:
                raise ConfigError(
                    f"{self.name}: {part} have changed since begin(); run that cell and stage.run() again"
                )

    def partial_folder(self) -> Path:
        return self.folder / f".{self.name}.partial"

    @property
    def partial(self) -> Path:
        """The folder to work in, which a stage that was killed finds as it left it."""
        self.check_begun()
        return self.partial_folder()

    def keep(self, name: str, made: Path) -> None:
        """Copy a file or folder that was made in `partial` to the output `name`, which is there whole or not at all.

        Copied and not moved, so that a stage that is killed now has it still.
        """
        fresh = self.path(f"{name}.tmp")
        remove(fresh)
        shutil.copytree(made, fresh) if made.is_dir() else shutil.copyfile(made, fresh)
        replace(fresh, self.path(name))

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Put the outputs in their place and write the manifest: from now on the stage is done.

        Raises:
            ConfigError: it has not begun, or not run.
        """
        self.check_begun()
        if not self.at_work:
            return self.manifest()
        if missing := [name for name in self.writes() if not self.path(name).exists()]:
            raise ConfigError(
                f"{self.name}: {', '.join(missing)} is not there yet; run the cell with stage.run() first"
            )
        self._check_unchanged()
        outputs = {name: file_hash(self.path(name)) for name in self.writes()}
        manifest = {"key": self._key, "outputs": outputs, "seconds": round(self._seconds, 2), **facts}
        for path in {self.manifest_path(), *self.replaced()}:
            path.unlink(missing_ok=True)
            remove(Path(str(path).replace(".manifest.json", ".ipynb")))  # which shows what was there before
        for name in outputs:
            replace(self.path(name), self.folder / name)
        write_json(self.manifest_path(), manifest)
        self.at_work = False
        remove(self.partial_folder())
        self._lock.release(force=True)
        return manifest

    def load_line(self) -> str:
        """One line of Python that loads M_t elsewhere."""
        return load_line(self.config.model, self.folder / "adapter")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest; None where there is none, or one that is damaged."""
    try:
        manifest = json.loads(path.read_text())
        return manifest if all(isinstance(manifest[part], dict) for part in ("key", "outputs")) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def stages_of_m0(config: Config) -> list[str]:
    """The stages of M_0: its warm start, if it has one, and its evaluation."""
    return [*(["00_warm_start"] if config.warm_start.problems else []), "04_evaluate"]


def model_files(name: str, path: str | Path) -> dict[str, str]:
    """The hash of a local model's files, as the input `name`; a model of the hub is known by its name alone."""
    folder = resolve(path)
    return {name: file_hash(folder, MODEL_FILES, sampled_above=64 << 20)} if folder.is_dir() else {}


def problem_files(sources: Iterable[str]) -> dict[str, str]:
    """The hashes of the files among `sources`, as inputs; data sets of the hub are known by their names alone."""
    return {f"problems {s}": file_hash(resolve(s)) for s in sources if is_file(s) and resolve(s).is_file()}


def difference(part: str, name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed, in words: "train.lr 0.001 -> 0.002", "code model/losses.py", "input pairs"."""
    if part in ("parameters", "versions"):
        return f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}"
    what = {"inputs": "input", "code": "code"}[part]
    return f"{what} {name}" + ("" if name in old and name in new else " is new" if name in new else " is gone")


def load_line(config: ModelConfig, folder: Path) -> str:
    """One line of Python that loads the policy in `folder` elsewhere."""
    policy = relative(folder)
    if config.tuning == "full":
        return f'AutoModelForCausalLM.from_pretrained("{policy}")'
    here = packaged.folder(config.path)
    base = f'"{relative(here) if here else config.path}"'
    base += f', dtype="{config.dtype}"' * (config.path != packaged.EMBEDDED)
    if config.trust_remote_code:
        base += ", trust_remote_code=True"
    if config.quantize == "nf4":  # the adapter was trained on these weights, not on the ones that they are made from
        base += ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        base += f'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{config.dtype}")'
    return f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "{policy}")'
