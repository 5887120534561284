"""A method is a recipe: for each round a reward, a selection, a loss, a start and a reference (`recipes.yaml`).

All methods share one code path. A method of your own is an entry in a YAML file of yours (`recipes=my_methods.yaml`), which
names parts of the table (`parts.py`) or functions of your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..files import ConfigError, local_path
from . import parts


class RecipeError(ConfigError):
    """An entry of a file of recipes is not well-formed; the message names it and says what to change."""


FILE = Path(__file__).with_suffix(".yaml")
STARTS = ("M_t", "M_0")
REFERENCES = ("moving", "M_0", "none")
# Names that mean something else where methods are named.
RESERVED = ("all", "m0", "run", "jobs", "task", "model", "sampling", "pairs", "process", "judge", "train", "evaluation",
            "methods", "recipes", "seeds", "iterations", "threads", "method_settings")  # fmt: skip


class KeyTwice(ValueError):
    """A key is given twice in one mapping."""


class Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML lets the last one win."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise KeyTwice(f"{key!r} is given twice (line {node.start_mark.line + 1} and below); keep one")
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Round:
    """The choices of one round, M_{t-1} to M_t."""

    reward: str
    selection: str
    loss: str
    start: str  # what training starts from: "M_t", the model that was sampled, or "M_0"
    reference: str  # what the loss is held against: "moving" (the model that was sampled), "M_0", or "none"
    accumulate: bool = False  # train on the pairs of earlier rounds as well
    inherits: str = ""  # the method whose hyper-parameters it takes

    @property
    def samples(self) -> bool:
        """Whether the model is sampled: gold solutions alone need no samples, extrapolation nothing at all."""
        return parts.part("selection", self.selection).samples

    @property
    def needs_gold(self) -> bool:
        return parts.part("selection", self.selection).gold

    @property
    def scored(self) -> bool:
        """Whether samples get a reward beyond their answer's, in a stage of its own."""
        return self.reward not in ("none", "answer")

    @property
    def trains(self) -> bool:
        """Whether there are pairs, and training on them; extrapolation has neither."""
        return self.selection != "none"

    @property
    def reference_is_start(self) -> bool:
        """Whether the model that training starts from is the reference too, so that the loss begins at ln 2."""
        return (self.start, self.reference) in (("M_t", "moving"), ("M_0", "M_0"))

    @property
    def stages(self) -> list[str]:
        """The stage notebooks of such a round, in order."""
        if not self.trains:
            return ["03b_extrapolate", "04_evaluate"]
        return ["01_sample", *(["01b_reward"] if self.scored else []), "02_pairs", "03_train", "04_evaluate"]


@dataclass(frozen=True)
class Method:
    """One point in the space of self-training methods."""

    label: str
    source: str
    rounds: tuple[Round, ...]
    repeat: int = 1  # how many of the last rounds go on; 0: none does

    def round(self, t: int) -> Round:
        """The choices of round t = 1, 2, ... Raises RecipeError for a round that is not made."""
        last = len(self.rounds)
        if t > last and not self.repeat:
            raise RecipeError(f"{self.label} makes {last} round{'s' * (last > 1)}, there is no round {t}")
        return self.rounds[t - 1 if t <= last else last - self.repeat + (t - last - 1) % self.repeat]

    def count(self, iterations: int) -> int:
        """How many rounds it makes of so many iterations."""
        return iterations if self.repeat else min(iterations, len(self.rounds))

    def budget(self, iterations: int) -> int:
        """How many rounds' worth of steps one round may take: all of them where there is only one."""
        return iterations if not self.repeat and len(self.rounds) == 1 else 1


def catalogue(files: Sequence[str] = ()) -> dict[str, Method]:
    """The methods by name: those of this package, then those in `files` of your own.

    Raises:
        RecipeError: an entry is not well-formed, or a name is taken.
    """
    found = dict(_shipped())
    for file in files:
        path = local_path(file)
        for name, method in read(path, found).items():
            if name in found:
                raise RecipeError(f"{path}: a method is called {name!r} already; choose another name")
            found[name] = method
    return found


@cache
def _shipped() -> dict[str, Method]:
    return read(FILE)


def read(path: Path, known: Sequence[str] | dict[str, Any] = ()) -> dict[str, Method]:
    """The methods of a file, by name; they may inherit from one another and from those `known`. Raises RecipeError."""
    try:
        raw = yaml.load(path.read_text(), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    except FileNotFoundError:
        raise RecipeError(f"{path} is missing") from None
    except (OSError, KeyTwice) as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected methods by name")
    methods = {str(name): _method(f"{path}, {name}", entry) for name, entry in raw.items()}
    for name, method in methods.items():
        if not name.isidentifier() or name in RESERVED:
            raise RecipeError(
                f"{path}: {name!r} is no name for a method; letters, digits and _ only, and no {', '.join(RESERVED)}"
            )
        for choices in method.rounds:
            if choices.inherits and choices.inherits not in {*methods, *known}:
                raise RecipeError(f"{path}, {name}: inherits: no method is called {choices.inherits!r}")
    return methods


def _method(where: str, entry: Any) -> Method:
    if not isinstance(entry, dict) or not {"label", "rounds"} <= set(entry) <= {"label", "source", "rounds", "repeat"}:
        raise RecipeError(f"{where}: expected label, source, rounds and repeat")
    rounds, repeat = entry["rounds"], entry.get("repeat", 1)
    if not isinstance(rounds, list) or not rounds:
        raise RecipeError(f"{where}: rounds: expected a list with at least one round")
    if not isinstance(entry["label"], str) or not entry["label"]:
        raise RecipeError(f"{where}: label: expected text, got {entry['label']!r}")
    if not isinstance(repeat, int) or isinstance(repeat, bool) or not 0 <= repeat <= len(rounds):
        raise RecipeError(f"{where}: repeat: 0 to {len(rounds)}, the number of its last rounds that go on")
    made = tuple(_round(where, choices) for choices in rounds)
    if not made[0].trains:
        raise RecipeError(f"{where}: the first round cannot extrapolate: there is no model before M_0")
    return Method(entry["label"], str(entry.get("source", "")), made, repeat)


def _round(where: str, entry: Any) -> Round:
    needed = [f.name for f in fields(Round)][:5]
    if not isinstance(entry, dict) or not set(needed) <= set(entry) <= {f.name for f in fields(Round)}:
        raise RecipeError(f"{where}: a round has {', '.join(needed)}, and may have accumulate and inherits")
    for name, known in (("start", STARTS), ("reference", REFERENCES)):
        if entry[name] not in known:
            raise RecipeError(f"{where}: no {name} is called {entry[name]!r}; there is: {', '.join(known)}")
    try:
        reward, selection, loss = (parts.part(kind, str(entry[kind])) for kind in parts.KINDS)
    except ConfigError as error:
        raise RecipeError(f"{where}: {error}") from None
    made = Round(**entry)
    if not isinstance(made.inherits, str):
        raise RecipeError(f"{where}: inherits: the name of a method, got {made.inherits!r}")
    if not isinstance(made.accumulate, bool):
        raise RecipeError(f"{where}: accumulate: true or false, got {made.accumulate!r}")
    for broken, message in (
        (loss.pairs and not selection.pairs, f"the loss {made.loss!r} needs pairs, which the selection {made.selection!r} does not make"),
        (loss.reference != (made.reference != "none"), f"the loss {made.loss!r} {'needs a reference: moving or M_0' if loss.reference else 'has no reference (reference: none)'}"),
        (reward.number and made.selection in parts.SELECTIONS and made.selection not in ("margin", "best_against_worst"), f"the reward {made.reward!r} is a number; select by margin or best_against_worst"),
        (made.reward == "none" and selection.rewards, f"the selection {made.selection!r} needs a reward"),
        ((made.loss == "extrapolate") != (made.selection == "none"), "extrapolation, and nothing else, has no selection (selection: none)"),
        (made.scored and not selection.samples, f"the reward {made.reward!r} needs samples, which the selection {made.selection!r} does not take"),
    ):  # fmt: skip
        if broken:
            raise RecipeError(f"{where}: {message}")
    return made
