"""The presets: one file each, or for real models a task's part and a model's part put together.

`<task>-<model>` is the quick size, `<task>-<model>-paper` has the paper's numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...files import ConfigError, read_yaml
from ..config import Config, configured, flatten

FOLDER = Path(__file__).parent
REAL_TASKS = ("gsm8k", "math", "arc_challenge", "mbpp")
REAL_MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-2-7b-chat")


def _first_line(path: Path) -> str:
    return path.read_text().splitlines()[0].lstrip("# ")


def _parts(name: str) -> tuple[Path, Path] | None:
    """The files of a preset for a real task and model, `<task>-<model>` or `<task>-<model>-paper`."""
    for task in REAL_TASKS:
        model = name.removeprefix(f"{task}-").removesuffix("-paper")
        if name.startswith(f"{task}-") and model in REAL_MODELS:
            return FOLDER / "parts" / f"{task}.yaml", FOLDER / "parts" / f"{model}.yaml"
    return None


def presets() -> dict[str, str]:
    """The presets by name, each with what it is."""
    found = {p.stem: _first_line(p) for p in sorted(FOLDER.glob("*.yaml"))}
    for task in REAL_TASKS:
        for model in REAL_MODELS:
            first, second = _parts(f"{task}-{model}")
            text = f"{_first_line(second)} on {_first_line(first)}"
            found[f"{task}-{model}"] = f"{text}; quick"
            found[f"{task}-{model}-paper"] = f"{text}; the paper's numbers"
    return found


def read_preset(name: str) -> dict[str, Any]:
    """A preset as written: one file, or a task's and a model's part put together, as dotted names with their values.

    A file has what is different from the preset that it `inherits` from, if it names one. Each part says what the
    paper does, and under `quick` what the quick size changes; a model's part says under a task's name (with `-quick`:
    in that size) what it needs for that task.

    Raises:
        ConfigError: no such preset.
    """
    if name not in presets():
        near = difflib.get_close_matches(name, list(presets()), 1)
        files = sorted(path.stem for path in FOLDER.glob("*.yaml"))
        raise ConfigError(
            f"no preset is called {name!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"There is: {', '.join(files)}, and <task>-<model> or <task>-<model>-paper with a task of "
            + f"{', '.join(REAL_TASKS)} and a model of {', '.join(REAL_MODELS)}"
        )
    parts = _parts(name)
    if parts is None:
        own = read_yaml(FOLDER / f"{name}.yaml")
        inherited = own.pop("inherits", None)
        return (read_preset(inherited) if inherited else {}) | flatten(own)
    raw = [read_yaml(path) for path in parts]
    quick = [part.pop("quick") for part in raw]
    task, paper = parts[0].stem, name.endswith("-paper")
    special = {key: raw[1].pop(key, {}) for t in REAL_TASKS for key in (t, f"{t}-quick")}
    settings = flatten(raw[0]) | flatten(raw[1])
    if paper:
        return settings | special[task]
    return settings | quick[0] | quick[1] | special[task] | special[f"{task}-quick"]


def load_preset(name: str, overrides: Iterable[str] = ()) -> Config:
    """The preset `name` with `key=value` overrides.

    Raises:
        ConfigError: no such preset, or an override is not `key=value`, unknown or mistyped.
    """
    return configured(read_preset(name), key_values(overrides).items())


def key_values(texts: Iterable[str]) -> dict[str, str]:
    """The `key=value` of a command line. Raises ConfigError for another word, and for a key that is given twice."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not key=value, as in train.lr=1e-3 (a preset's name comes first)")
        if key in found:
            raise ConfigError(f"{key} is given twice; keep one")
        found[key] = value
    return found
