"""A method is a recipe: for each round a reward, a selection, a loss, a start and a reference (`recipes.yaml`).

All methods share one code path. A method of your own is an entry in a YAML file of yours (`recipes=my_methods.yaml`),
which names parts of the table (`parts.py`) or functions of your own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from unicodedata import category

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ..files import ConfigError, read_yaml, resolve
from ..settings import Section, Settings, Size, first_error
from . import parts

FILE = Path(__file__).with_suffix(".yaml")
# Names that mean something else where methods are named.
RESERVED = ("all", "m0", "run", "jobs", *Settings.model_fields, "methods", "recipes", "method_settings")


class Round(Section):
    """The choices of one round, M_{t-1} to M_t."""

    reward: str
    selection: str
    loss: str
    start: Literal["M_t", "M_0"]  # what training starts from: "M_t" is the model that was sampled
    reference: Literal["moving", "M_0", "none"]  # what the loss is held against: "moving" is the model that was sampled
    accumulate: bool = False  # train on the pairs of earlier rounds as well
    inherits: str = Field("", description="the name of a method")  # whose hyper-parameters it takes

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        reward, selection, loss = (self.part(kind) for kind in parts.KINDS)
        if loss.pairs and not selection.pairs:
            raise ValueError(
                f"the loss {self.loss!r} needs pairs, which the selection {self.selection!r} does not make"
            )
        if selection.signed and not loss.gaps:
            raise ValueError(f"the selection {self.selection!r} gives advantages, which the loss {self.loss!r} ignores")
        if loss.gaps and self.selection == "file":
            raise ValueError(f"the loss {self.loss!r} weighs responses by their rewards, which a file does not bring")
        if loss.continues != selection.continues:
            raise ValueError(
                f"the loss {self.loss!r} and the selection {self.selection!r} do not fit: only for one of them "
                "the chosen response goes on from the rejected one"
            )
        if loss.reference and self.reference == "none":
            raise ValueError(f"the loss {self.loss!r} needs a reference: moving or M_0")
        if self.reference != "none" and not loss.reference:
            raise ValueError(f"the loss {self.loss!r} has no reference (reference: none)")
        if reward.number and not selection.numbers:
            taking = [name for name, row in parts.SELECTIONS.items() if row.rewards and row.numbers]
            raise ValueError(f"the reward {self.reward!r} is a number; select by {' or '.join(taking)}")
        if self.reward == "none" and selection.rewards:
            raise ValueError(f"the selection {self.selection!r} needs a reward")
        if loss.trains == (self.selection == "none"):
            raise ValueError("extrapolation, and nothing else, has no selection (selection: none)")
        if self.has_reward_stage and not selection.samples:
            raise ValueError(
                f"the reward {self.reward!r} needs samples, which the selection {self.selection!r} does not take"
            )
        return self

    def part(self, kind: str) -> Any:
        """The row of its reward, selection or loss."""
        return parts.part(kind, getattr(self, kind))

    @property
    def draws(self) -> bool:
        """Whether the model is sampled: gold solutions alone need no samples, extrapolation nothing at all."""
        return self.part("selection").samples

    @property
    def needs_gold(self) -> bool:
        return self.part("selection").gold

    @property
    def has_reward_stage(self) -> bool:
        """Whether samples get a reward beyond their answer's."""
        return bool(self.part("reward").where)

    @property
    def trains(self) -> bool:
        """Whether there are pairs, and training on them; extrapolation has neither."""
        return self.part("loss").trains

    @property
    def reference_is_start(self) -> bool:
        """Whether the model that training starts from is the reference too, so that the loss begins at ln 2."""
        return (self.start, self.reference) in (("M_t", "moving"), ("M_0", "M_0"))

    def is_online(self, sync_every: int) -> bool:
        """Whether the policy is sampled while it is trained; a round on gold solutions alone never is."""
        return bool(sync_every) and self.draws

    def stages(self, sync_every: int = 0) -> list[str]:
        """The stage notebooks of such a round, in order. `sync_every` is that of the section `train`."""
        if not self.trains:
            return ["03b_extrapolate", "04_evaluate"]
        if self.is_online(sync_every):
            return ["03c_online", "04_evaluate"]
        prompts = [] if self.selection == "file" else ["01_sample"]
        return [*prompts, *(["01b_reward"] if self.has_reward_stage else []), "02_pairs", "03_train", "04_evaluate"]


class Method(Section):
    """One point in the space of self-training methods."""

    label: str = Field(min_length=1)
    source: Annotated[str, BeforeValidator(str)] = ""  # a number alone is text as well
    rounds: tuple[Round, ...] = Field(min_length=1, strict=False)  # a list in YAML
    repeat: Size = 1  # how many of the last rounds go on; 0: none does

    @model_validator(mode="after")
    def _goes_on(self) -> Self:
        if self.repeat > len(self.rounds):
            raise ValueError(f"repeat: 0 to {len(self.rounds)}, the number of its last rounds that go on")
        if not self.rounds[0].trains:
            raise ValueError("the first round cannot extrapolate: there is no model before M_0")
        return self

    @model_validator(mode="after")
    def _shows_as_text(self) -> Self:
        for name in ("label", "source"):
            if any(category(character) == "Cc" for character in getattr(self, name)):
                raise ValueError(f"{name}: expected one line of text without control characters, as ANSI codes have")
        return self

    def round(self, t: int) -> Round:
        """The choices of round t = 1, 2, ... Raises ConfigError for a round that is not made."""
        last = len(self.rounds)
        if t > last and not self.repeat:
            raise ConfigError(f"{self.label} makes {last} round{'s' * (last > 1)}, there is no round {t}")
        return self.rounds[t - 1 if t <= last else last - self.repeat + (t - last - 1) % self.repeat]

    def on_file(self) -> Self:
        """The same losses on pairs of a file: nothing is drawn, and reward and selection have no part in it.

        Raises:
            ConfigError: a loss of it does not fit pairs of a file.
        """
        own = {"reward": "none", "selection": "file", "accumulate": False}
        try:
            return self.but(rounds=tuple(choices.but(**own) if choices.trains else choices for choices in self.rounds))
        except ValidationError as error:
            reason = first_error(error, Method)
            raise ConfigError(f"pairs.file: {self.label}: {reason}; leave it out of methods") from None

    def count(self, iterations: int) -> int:
        """How many rounds it makes of so many iterations."""
        return iterations if self.repeat else min(iterations, len(self.rounds))

    def budget(self, iterations: int) -> int:
        """How many rounds' worth of steps one round may take: all of them where there is only one."""
        return iterations if not self.repeat and len(self.rounds) == 1 else 1


def catalogue(files: Sequence[str] = ()) -> dict[str, Method]:
    """The methods by name: those of this package, then those in `files` of your own.

    Raises:
        ConfigError: an entry is not well-formed, or a name is taken.
    """
    found = dict(_shipped())
    for file in files:
        path = resolve(file)
        for name, method in read(path, found).items():
            if name in found:
                raise ConfigError(f"{path}: a method is called {name!r} already; choose another name")
            found[name] = method
    return found


@cache
def _shipped() -> dict[str, Method]:
    return read(FILE)


def read(path: Path, known: Collection[str] = ()) -> dict[str, Method]:
    """The methods of a file, by name; they may inherit from one another and from those `known`. Raises ConfigError."""
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path}: expected methods by name")
    methods: dict[str, Method] = {}
    for name, entry in raw.items():
        if not str(name).isidentifier() or name in RESERVED:
            raise ConfigError(
                f"{path}: {name!r} is no name for a method; letters, digits and _ only, and no {', '.join(RESERVED)}"
            )
        try:
            methods[str(name)] = Method.model_validate(entry)
        except ValidationError as error:
            raise ConfigError(f"{path}, {name}: {first_error(error, Method)}") from None
    for name, method in methods.items():
        for choices in method.rounds:
            if choices.inherits and choices.inherits not in {*methods, *known}:
                raise ConfigError(f"{path}, {name}: inherits: no method is called {choices.inherits!r}")
    return methods
