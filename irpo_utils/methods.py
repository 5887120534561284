"""The recipes: a method as four choices (reward, selection, loss, start), read from `methods.yaml`.

All methods share one code path. A new one is an entry of that file, or an entry and one part.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml


class RecipeError(ValueError):
    """An entry of the methods' file is not well-formed; the message names it and the mend."""


FILE = Path(__file__).with_suffix(".yaml")
# What the entries may name. Here, and not where the parts are, because a configuration is checked without loading them.
PARTS = {
    "reward": ("none", "answer", "rationalized", "process", "judge"),
    "selection": ("none", "pairs", "chosen", "gold", "correct", "distinct", "capped", "pseudo", "gold_against_own", "best_against_worst", "margin"),
    "loss": ("dpo+nll", "dpo", "nll", "orpo", "extrapolate"),
    "start": ("M_t", "M_0"),
}  # fmt: skip


# Names that mean something else where methods are named.
RESERVED = ("all", "m0", "run", "jobs", "task", "model", "sampling", "pairs", "process", "judge", "train", "evaluation", "methods", "seeds", "iterations", "threads", "method_settings")  # fmt: skip


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
    """The four choices of one round, M_{t-1} to M_t."""

    reward: str
    selection: str
    loss: str
    start: str  # also what a loss with a reference is held against
    accumulate: bool = False  # train on the pairs of earlier rounds as well
    like: str = ""  # the method whose hyper-parameters it takes

    @property
    def samples(self) -> bool:
        """Whether the model is sampled: gold solutions alone need no samples, extrapolation nothing at all."""
        return self.selection not in ("none", "gold")

    @property
    def stages(self) -> list[str]:
        """The stage notebooks of such a round, in order."""
        if self.loss == "extrapolate":
            return ["03b_extrapolate", "04_evaluate"]
        sampled = ["01_sample"] if self.samples else []
        return [*sampled, *(["01b_reward"] if self.scored else []), "02_pairs", "03_train", "04_evaluate"]

    @property
    def scored(self) -> bool:
        """Whether samples get a reward beyond their answer's, in a stage of its own."""
        return self.reward not in ("none", "answer")


@dataclass(frozen=True)
class Method:
    """One point in the space of self-training methods."""

    label: str
    source: str
    kinds: tuple[Round, ...]
    repeat: int = 1  # how many of the last rounds go on; 0: none does

    def round(self, t: int) -> Round:
        """The choices of round t = 1, 2, ... Raises RecipeError for a round that is not made."""
        last = len(self.kinds)
        if t > last and not self.repeat:
            raise RecipeError(f"{self.label} makes {last} round{'s' * (last > 1)}, there is no round {t}")
        return self.kinds[t - 1 if t <= last else last - self.repeat + (t - last - 1) % self.repeat]

    def rounds(self, iterations: int) -> int:
        """How many rounds it makes of so many iterations."""
        return iterations if self.repeat else min(iterations, len(self.kinds))

    def share(self, iterations: int) -> int:
        """Rounds whose budget of steps one round has: all of them where there is only one."""
        return iterations if not self.repeat and len(self.kinds) == 1 else 1


def read(path: Path = FILE) -> dict[str, Method]:
    """The methods of a file, by name. Raises RecipeError."""
    try:
        raw = yaml.load(path.read_text(), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
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
        for choices in method.kinds:
            if choices.like and choices.like not in methods:
                raise RecipeError(f"{path}, {name}: like: no method is called {choices.like!r}")
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
    kinds = tuple(_round(where, kind) for kind in rounds)
    if kinds[0].loss == "extrapolate":
        raise RecipeError(f"{where}: the first round cannot extrapolate: there is no model before M_0")
    return Method(str(entry["label"]), str(entry.get("source", "")), kinds, repeat)


def _round(where: str, entry: Any) -> Round:
    names = [f.name for f in fields(Round)]
    if not isinstance(entry, dict) or not set(PARTS) <= set(entry) <= set(names):
        raise RecipeError(f"{where}: a round has {', '.join(PARTS)}, and may have accumulate and like")
    for part, known in PARTS.items():
        if entry[part] not in known:
            raise RecipeError(f"{where}: no {part} is called {entry[part]!r}; there is: {', '.join(known)}")
    made = Round(**entry)
    paired = made.selection in ("pairs", "gold_against_own", "best_against_worst", "margin")
    if made.loss in ("dpo", "dpo+nll", "orpo") and not paired:
        raise RecipeError(
            f"{where}: the loss {made.loss!r} needs pairs, which the selection {made.selection!r} does not make"
        )
    if made.reward in ("process", "judge") and made.selection not in ("margin", "best_against_worst"):
        raise RecipeError(f"{where}: the reward {made.reward!r} is a number; select by margin or best_against_worst")
    if made.reward == "none" and made.selection not in ("none", "gold", "gold_against_own"):
        raise RecipeError(f"{where}: the selection {made.selection!r} needs a reward")
    if not isinstance(made.like, str):
        raise RecipeError(f"{where}: like: the name of a method, got {made.like!r}")
    if not isinstance(made.accumulate, bool):
        raise RecipeError(f"{where}: accumulate: true or false, got {made.accumulate!r}")
    if (made.loss == "extrapolate") != (made.selection == "none"):
        raise RecipeError(f"{where}: extrapolation, and nothing else, has no selection (selection: none)")
    if made.scored and not made.samples:
        raise RecipeError(
            f"{where}: the reward {made.reward!r} needs samples, which the selection {made.selection!r} does not take"
        )
    return made


@cache
def methods() -> dict[str, Method]:
    """The methods there are, by name."""
    return read()
