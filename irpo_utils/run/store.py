"""Bookkeeping of a run: where each artefact is, which stage is done, and nothing half-written read as whole.

    outputs/<run>/config.yaml
    outputs/<run>/m0/seed_<s>/             M_0's evaluation and its samples, shared by all methods
    outputs/<run>/<method>/seed_<s>/iteration_<t>/   samples of M_{t-1}, pairs, the policy M_t, its evaluation
    outputs/<run>/report.html, metrics.csv, timing.csv

A stage is done when its manifest says so. The manifest is written last and names what the stage depended on: its
parameters, its input files, the code it runs and the package versions. If any of these differ, the stage runs again.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..extras.vllm.engine import version as vllm_version
from ..files import (
    NOTEBOOKS,
    OUTPUTS,
    PACKAGE,
    ConfigError,
    MissingArtefact,
    file_hash,
    local_path,
    locked,
    relative,
    resolve,
    write_json,
    write_text,
)
from ..methods.recipes import methods
from ..tasks import TASKS
from ..tasks.records import is_file
from .config import Config, dump, read_config
from .presets import load_preset

VERSIONS = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")
MATH_VERSIONS = ("math-verify", "latex2sympy2_extended", "sympy")  # of what checks LaTeX answers
# What of a model's folder makes the model.
MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")


def run_folder(name: str) -> Path:
    """outputs/NAME; refuses what is not a plain name, and the folder of published runs."""
    if not name or name[0] in ".-" or "/" in name or "\0" in name or name == "reference" or len(name.encode()) > 100:
        raise ConfigError(f"run: a plain folder name under outputs/, got {name!r}")
    return OUTPUTS / name


def _meaning(source: str) -> str:
    """The source's syntax tree without comments, layout and docstrings: what changes when the program does."""
    tree = ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.dump(tree)


def _imports(source: str, module: str) -> set[str]:
    """Names of this package's modules that a source imports, anywhere in it."""
    found, here = set(), ["irpo_utils", *module.split(".")[:-1]] if module else ["irpo_utils"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            full = [*base, *(node.module or "").split(".")] if node.module else base
            if full[:1] == ["irpo_utils"]:
                found |= {".".join([*full[1:], *extra]) for extra in ([], *([alias.name] for alias in node.names))}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("irpo_utils.") for a in node.names if a.name.startswith("irpo_utils.")}
    return found


def _module_file(name: str) -> Path | None:
    for path in (PACKAGE / f"{name.replace('.', '/')}.py", PACKAGE / name.replace(".", "/") / "__init__.py"):
        if name and path.is_file():
            return path
    return None


@cache
def code_hash(notebook: Path, task: str = "") -> str:
    """Hash of what a notebook runs: its code cells and the modules of this package that they, and the `task`, reach.

    `runs`, `plots` and `family` are left out: they keep and show results, and do not make them.
    """
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    # The parameters cell is replaced by the run's own, which are in the key already.
    source = "\n".join("".join(c["source"]) for c in cells if "parameters" not in c.get("metadata", {}).get("tags", []))
    clean = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
    digest, seen, todo = hashlib.sha256(_meaning(source).encode()), set(), sorted(_imports(clean, ""))
    if task in TASKS:  # named by a string, so that no import statement tells
        todo.append(TASKS[task].partition(":")[0].removeprefix("irpo_utils."))
    while todo:
        name = todo.pop()
        path = _module_file(name)
        if name in seen or path is None or name in ("run.store", "report.figures", "report.comparison", "files"):
            continue
        seen.add(name)
        module = name + ".__init__" if path.name == "__init__.py" else name
        todo += sorted(_imports(path.read_text(), module))
    for name in sorted(seen):
        digest.update(name.encode() + _meaning(_module_file(name).read_text()).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Spec:
    """What a stage depends on: sections of the configuration, and the artefacts it reads and writes."""

    sections: tuple[str, ...]
    writes: tuple[str, ...]


# What a reward model's training takes from the `train` section.
REWARD_TRAIN = ("micro_batch", "warmup", "max_grad_norm", "optimizer", "gradient_checkpointing")
# What a stage writes besides, for a kind of reward.
REWARD_WRITES = {"process": ("labels.jsonl", "reward_model")}
STAGES = {
    "01_sample": Spec(("task", "model", "sampling"), ("samples.jsonl",)),
    "01b_reward": Spec(("task", "model", "sampling"), ("rewarded.jsonl", "reward.json")),
    "02_pairs": Spec(("task", "pairs"), ("pairs.jsonl", "audit.json")),
    "03_train": Spec(("task", "model", "train"), ("adapter", "steps.jsonl", "training.json")),
    "03b_extrapolate": Spec(("model",), ("adapter", "training.json")),
    "04_evaluate": Spec(("task", "model", "evaluation"), ("evaluation.json", "judged.jsonl")),
}
# Split sizes that a stage does not look at.
UNUSED_SIZES = {
    "01_sample": ("dev_size", "test_size"),
    "01b_reward": ("dev_size", "test_size"),
    "02_pairs": ("dev_size", "test_size"),
    "03_train": ("train_size", "test_size"),
    "03b_extrapolate": (),
    "04_evaluate": ("train_size",),
}
_held: dict[Path, Any] = {}  # locks of this process, so that "Run All" twice in one kernel does not wait for itself


class Stage:
    """One stage of one arm (method, seed, iteration) of a run; `iteration` 0 is M_0 itself.

    Args:
        name: one of `STAGES`. run: the run's folder. method: one of `methods.methods()`.
    """

    def __init__(self, name: str, run: str | Path, method: str = "irpo", seed: int = 0, iteration: int = 1):
        if method not in methods():
            raise ConfigError(f"method: no method is called {method!r}; there is: {', '.join(methods())}")
        self.name, self.spec, self.run = name, STAGES[name], resolve(run)
        for key, value in (("seed", seed), ("iteration", iteration)):
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{key}: expected a whole number from 0 on, got {value!r}")
        self.method, self.seed, self.iteration = method, seed, iteration
        self.config = open_run(self.run).for_round(method, iteration)
        self.recipe = methods()[method]
        self.choices = self.recipe.round(max(1, iteration))
        if name == "01b_reward":
            writes = (*self.spec.writes, *REWARD_WRITES.get(self.choices.reward, ()))
            sections = (*self.spec.sections, *({self.choices.reward} & {"process", "judge"}))
            self.spec = Spec(sections, writes)
        shared = iteration == 0 or (iteration == 1 and name == "01_sample")
        self.folder = self.m0_folder() if shared else self.folder_of(iteration)

    def m0_folder(self) -> Path:
        return self.run / "m0" / f"seed_{self.seed}"

    def folder_of(self, iteration: int) -> Path:
        return self.run / self.method / f"seed_{self.seed}" / f"iteration_{iteration}"

    def policy(self, iteration: int) -> Path | None:
        """The folder of M_t, None for M_0 (the base itself)."""
        return self.folder_of(iteration) / "adapter" if iteration else None

    def inputs(self) -> dict[str, tuple[Path, str]]:
        """Input name -> (path, the notebook that makes it)."""
        t, found = self.iteration, {}
        drawn = (self.m0_folder() if t == 1 else self.folder_of(t)) / "samples.jsonl"
        if self.name == "01b_reward" or (self.name == "02_pairs" and self.choices.samples):
            found["samples"] = (drawn, "01_sample.ipynb")
        if self.name == "02_pairs" and self.choices.scored:
            found["samples"] = (self.folder / "rewarded.jsonl", "01b_reward.ipynb")
        if self.name == "02_pairs" and self.choices.accumulate and t > 1 and self.recipe.round(t - 1).accumulate:
            found["earlier"] = (self.folder_of(t - 1) / "pairs.jsonl", f"02_pairs.ipynb with iteration = {t - 1}")
        if self.name == "03_train":
            found["pairs"] = (self.folder / "pairs.jsonl", "02_pairs.ipynb")
        if t > 1 and (
            self.name in ("01_sample", "01b_reward", "03b_extrapolate")
            or (self.name == "03_train" and self.choices.start == "M_t")
        ):
            found["policy"] = (self.policy(t - 1), f"{self._trained_by(t - 1)} with iteration = {t - 1}")
        if self.name == "03b_extrapolate" and t > 2:
            found["before"] = (self.policy(t - 2), f"{self._trained_by(t - 2)} with iteration = {t - 2}")
        if self.name == "04_evaluate" and t > 0:
            found["policy"] = (self.policy(t), self._trained_by(t))
        return found

    def _trained_by(self, t: int) -> str:
        return "03b_extrapolate.ipynb" if self.recipe.round(t).loss == "extrapolate" else "03_train.ipynb"

    def input(self, name: str) -> Path | None:
        """The path of an input; None for the policy M_0. Raises MissingArtefact."""
        path, made_by = self.inputs().get(name, (None, ""))
        if path is not None and not path.exists():
            raise MissingArtefact(f"{relative(path)} is missing; run notebooks/{made_by} first")
        return path

    def parameters(self) -> dict[str, Any]:
        """The parameters this stage depends on, and no others."""
        chosen = {section: asdict(getattr(self.config, section)) for section in self.spec.sections}
        chosen["threads"] = self.config.threads
        chosen["seed"], chosen["iteration"] = self.seed, self.iteration
        if self.name in ("01_sample", "01b_reward"):
            chosen["sampling"]["temperature"] = self.config.temperature(self.iteration)
        if self.name == "02_pairs":
            chosen["selection"] = self.choices.selection
            chosen["accumulate"] = self.choices.accumulate
            chosen["model"] = {"path": self.config.model.path}  # whose tokenizer writes the ids
        if self.name in ("03_train", "04_evaluate"):
            chosen["decoding"] = {k: getattr(self.config.sampling, k) for k in ("max_new_tokens", "rows")}
        if self.name == "04_evaluate":
            chosen["decoding"]["engine"] = self.config.sampling.engine
        retrain = self.config.train.retrain_with_dev
        if self.name in ("01_sample", "01b_reward", "02_pairs") and retrain:
            chosen["retrain_with_dev"] = True
        for name in UNUSED_SIZES[self.name]:
            # Where dev is held out of training, its size decides which problems are trained on.
            if name != "dev_size" or (self.config.task.name == "word_problems" and not retrain):
                del chosen["task"][name]
        if self.name in ("01_sample", "04_evaluate") and "policy" not in self.inputs():  # M_0 has no adapter
            for name in ("tuning", "lora_r", "lora_alpha"):
                del chosen["model"][name]
        if self.name == "01b_reward":
            chosen["reward"] = self.choices.reward
            if self.choices.reward == "process":  # how its reward model is trained, and which gold solutions it sees
                chosen["train"] = {name: getattr(self.config.train, name) for name in REWARD_TRAIN}
                chosen["max_tokens"] = self.config.pairs.max_tokens
        if self.name == "03_train":
            chosen["loss"], chosen["start"] = self.choices.loss, self.choices.start
            del chosen["train"]["extrapolation"]
        if self.name == "03b_extrapolate":
            chosen["extrapolation"] = self.config.train.extrapolation
        return chosen

    def key(self) -> dict[str, Any]:
        """Everything the stage's result depends on. Raises MissingArtefact if an input is not there."""
        inputs = {name: file_hash(self.input(name)) for name in self.inputs()}
        seed = self.config.model.path == "seed"
        base = PACKAGE / "assets" / "seed_model" if seed else resolve(Path(self.config.model.path).expanduser())
        if base.is_dir():
            inputs["base"] = file_hash(base, MODEL_FILES, sampled_above=64 << 20)
        if "process" in self.spec.sections and self.config.process.simulator:
            other = resolve(Path(self.config.process.simulator).expanduser())
            if other.is_dir():
                inputs["simulator"] = file_hash(other, MODEL_FILES, sampled_above=64 << 20)
        for source in (*self.config.task.train, *self.config.task.dev, *self.config.task.test):
            if is_file(source) and local_path(source).is_file():
                inputs[f"problems {source}"] = file_hash(local_path(source))
        if ".py:" in self.config.task.name:
            inputs["task"] = file_hash(local_path(self.config.task.name.rpartition(":")[0]))
        versions = {name: version(name) for name in VERSIONS + MATH_VERSIONS * (self.config.task.name == "math")}
        if self.config.sampling.engine == "vllm" and self.name in ("01_sample", "01b_reward", "04_evaluate"):
            # Without it at hand, a stage is judged by the one it was made with; to sample, it must be there.
            made_with = ((self.manifest() or {}).get("key") or {}).get("versions") or {}
            versions["vllm"] = vllm_version() or made_with.get("vllm")
        return {
            "stage": self.name,
            "parameters": self.parameters(),
            "inputs": inputs,
            "code": code_hash(NOTEBOOKS / f"{self.name}.ipynb", self.config.task.name),
            "versions": versions,
            "python": sys.version.split()[0],
        }

    def path(self, name: str) -> Path:
        return self.folder / name

    def manifest_path(self) -> Path:
        return self.folder / f"{self.name}.manifest.json"

    def manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads(self.manifest_path().read_text())
            return manifest if set(manifest["outputs"]) == set(self.spec.writes) and "key" in manifest else None
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: not done
            return None

    def is_done(self) -> bool:
        """Whether the manifest names the present inputs and the outputs are as it left them."""
        manifest = self.manifest()
        if manifest is None or any(not self.path(name).exists() for name in self.spec.writes):
            return False
        if any(not path.exists() for path, _ in self.inputs().values()) or manifest["key"] != self.key():
            return False
        return all(file_hash(self.path(name)) == digest for name, digest in manifest["outputs"].items())

    def begin(self) -> Stage:
        """Take the stage's folder, forget its old manifest, and clear away what other inputs left there.

        Raises:
            ConfigError: the method has no such stage in this round.
            MissingArtefact: an input is missing. Busy: another process is at work on this stage.
        """
        wanted = self.choices.stages if self.iteration else ["04_evaluate"]
        if self.name not in wanted:
            of = f"round {self.iteration} of {self.method}" if self.iteration else "M_0"
            raise ConfigError(f"{self.name}: {of} has no such stage; it has {', '.join(wanted)}")
        self._started = time.time()
        self._key = self.key()
        # A kernel whose driver was killed lives on for about a second; give it the time to notice.
        lock = self.folder / f".{self.name}.lock"
        if lock in _held:
            _held.pop(lock).__exit__(None, None, None)
        held = locked(lock, patience=20.0)
        held.__enter__()
        _held[lock] = held
        self.manifest_path().unlink(missing_ok=True)
        for name in self.spec.writes:  # what an undone stage left is nobody's input
            shutil.rmtree(self.path(name)) if self.path(name).is_dir() else self.path(name).unlink(missing_ok=True)
        self.partial = self.folder / f".{self.name}.partial"
        mark = self.partial / "key.json"
        if not mark.exists() or mark.read_text() != json.dumps(self._key, indent=1) + "\n":
            shutil.rmtree(self.partial, ignore_errors=True)
            write_json(mark, self._key)
        if "torch" not in sys.modules:
            os.environ["OMP_NUM_THREADS"] = str(self.config.threads)
        return self

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest: from now on the stage is done."""
        outputs = {name: file_hash(self.path(name)) for name in self.spec.writes}
        manifest = {
            "key": self._key,
            "outputs": outputs,
            "seconds": round(time.time() - self._started, 2),
            **facts,
        }
        write_json(self.manifest_path(), manifest)
        shutil.rmtree(self.partial, ignore_errors=True)
        _held.pop(self.folder / f".{self.name}.lock").__exit__(None, None, None)
        return manifest


def open_run(folder: Path, preset: str = "tiny") -> Config:
    """The configuration of a run. A folder that is not there yet starts as `preset`."""
    path = resolve(folder) / "config.yaml"
    if not path.exists():
        write_text(path, dump(load_preset(preset)))
    return read_config(path)


def arms(config: Config) -> list[tuple[str, int]]:
    """Every (method, seed) of a run, seed by seed."""
    return [(method, seed) for seed in range(config.seeds) for method in config.methods]


def plan(config: Config, run: Path, method: str, seed: int) -> list[Stage]:
    """The stages of one arm, in order."""
    stages = [Stage("04_evaluate", run, method, seed, 0)]
    for t in range(1, config.rounds(method) + 1):
        choices = methods()[method].round(t)
        stages += [Stage(name, run, method, seed, t) for name in choices.stages]
    return stages


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run: method, seed, iteration and the contents of `evaluation.json`. M_0 counts for each method."""
    config, rows = read_config(resolve(run) / "config.yaml"), []
    for method, seed in arms(config):
        for t in range(config.rounds(method) + 1):
            stage = Stage("04_evaluate", run, method, seed, t)
            if not stage.is_done():
                raise MissingArtefact(
                    f"{relative(stage.path('evaluation.json'))} is missing or out of date; run notebooks/04_evaluate.ipynb for it, or ./run_all.sh"
                )
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "iteration": t,
                    **json.loads(stage.path("evaluation.json").read_text()),
                }
            )
    return rows
