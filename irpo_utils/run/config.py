"""A run's configuration: read from a YAML preset and `key=value` overrides, checked once, its faults said in one line.

The parameters are in `settings.py`. Here are the methods that a run has, hyper-parameters of one method alone
(`irpo.train.lr=1e-3`), and the messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from ..files import ConfigError, load_object, read_yaml
from ..methods.parts import TRAINERS
from ..methods.recipes import Method, catalogue
from ..settings import Names, Settings, field_of, first_error, names_of, unknown
from ..tasks import check_name

PER_METHOD = ("pairs", "process", "judge", "train")  # sections that may differ between methods
AUTO = {  # what "auto" stands for where CUDA is (bfloat16 also where the CPU multiplies it), and where it is not
    "model.quantize": ("nf4", "none"),
    "model.dtype": ("bfloat16", "float32"),
    "train.optimizer": ("paged_adamw_8bit", "adamw"),
}


class Config(Settings):
    methods: Names = ("irpo",)  # or all
    recipes: Names = ()  # files of methods of your own, in the form of methods/recipes.yaml
    method_settings: dict[str, dict[str, Any]] = Field(default={})

    @cached_property
    def catalogue(self) -> dict[str, Method]:
        """The methods that there are, by name."""
        return catalogue(self.recipes)

    @model_validator(mode="after")
    def _runnable(self) -> Config:
        check_name(self.task.name)
        if not self.methods:
            raise ValueError("methods: expected at least one value")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("methods: each one once")
        for name in self.methods:
            if name not in self.catalogue:
                raise ValueError(
                    f"methods: no method is called {name!r}; there is: all, {', '.join(self.catalogue)}"
                    "; a file with methods of your own is named by recipes=my_methods.yaml"
                )
            if self.iterations < (least := len(self.catalogue[name].rounds)):
                raise ValueError(
                    f"iterations: {name} needs {least} rounds before it repeats; "
                    f"set iterations={least}, or leave it out of methods"
                )
        for name, own in self.method_settings.items():
            try:
                changed(self, {**own, "method_settings": {}})
            except ConfigError as error:
                raise ValueError(f"{name}: {error}") from None
        return self

    def check_trainable(self, method: str) -> None:
        """Raise a ConfigError for a method with a round that cannot be trained as its parameters say."""
        for t in range(1, self.rounds(method) + 1):
            choices, train = self.recipe(method).round(t), self.for_round(method, t).train
            known = TRAINERS[train.engine].losses
            at_start = choices.reference_is_start or choices.reference == "none"
            if choices.trains and known and (choices.loss not in known or not at_start):
                raise ConfigError(
                    f"train.engine: {train.engine} cannot train round {t} of {method} ({choices.loss}, "
                    f"{choices.reference} reference); set {method}.train.engine=own, or leave the method out"
                )
            if train.engine != "own" and self.sampling.calculator:
                raise ConfigError(
                    f"sampling.calculator: {train.engine} would train on what it writes; set {method}.train.engine=own"
                )
            again = choices.start == "M_0" and t > 1  # would not look at M_{t-1} at all
            if choices.is_online(train.sync_every) and (
                choices.has_reward_stage or choices.accumulate or again or not at_start
            ):
                raise ConfigError(
                    f"train.sync_every: round {t} of {method} cannot draw while it trains; that takes rewards "
                    "by the answer, no earlier pairs, a start at M_t and a reference that is the model it starts from; "
                    f"set {method}.train.sync_every=0, or leave the method out"
                )

    def recipe(self, method: str) -> Method:
        """Raises ConfigError for a method that there is not."""
        if method not in self.catalogue:
            raise ConfigError(f"method: no method is called {method!r}; there is: {', '.join(self.catalogue)}")
        return self.catalogue[method].on_file() if self.pairs_file(method) else self.catalogue[method]

    def pairs_file(self, method: str) -> str:
        """The file of pairs that all rounds of a method train on; "" where they make their own."""
        return self.method_settings.get(method, {}).get("pairs.file", self.pairs.file)

    def rounds(self, method: str) -> int:
        return self.recipe(method).count(self.iterations)

    def for_round(self, method: str, t: int) -> Config:
        """This configuration with the hyper-parameters of a method's round t: those that it inherits, then its own.

        Its own do not count in the rounds that come once before those that repeat (a first one on gold).
        """
        recipe = self.recipe(method)
        inherits = recipe.round(t).inherits if t else ""
        once = inherits and recipe.repeat and t <= len(recipe.rounds) - recipe.repeat
        own = self.method_settings.get(inherits, {}) | ({} if once else self.method_settings.get(method, {}))
        if own.get("pairs.file", self.pairs.file) != (file := self.pairs_file(method)):
            own["pairs.file"] = file  # in its first rounds too, and not another method's
        config, budget = changed(self, own), recipe.budget(self.iterations)
        longer = {f"train.{name}": budget * getattr(config.train, name) for name in ("max_steps", "max_epochs")}
        return changed(config, longer) if budget > 1 else config

    def for_seed(self, seed: int) -> Config:
        """This configuration with the base model and the problems of one random seed, where each has its own."""
        path = self.model.path.replace("{seed}", str(seed))
        own = {"model.path": path} if path != self.model.path else {}
        if self.task.by_seed:
            own |= {"task.seed": self.task.seed + seed, "task.by_seed": False}
        return changed(self, own)


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """A copy of `config` with dotted `settings` in it, checked. Raises ConfigError."""
    if not settings:
        return config
    raw = config.values()
    for name, value in settings.items():
        section, _, leaf = name.partition(".")
        if leaf:
            before = raw[section]
            raw[section] = {**(before if isinstance(before, dict) else before.values()), leaf: value}
        else:
            raw[name] = value
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_error(error, Config)) from None


def from_text(name: str, text: str) -> Any:
    """A value of the command line as its parameter's type. Raises ConfigError."""
    field = field_of(Config, name)
    if get_origin(field.annotation) is tuple:
        kind = field.annotation.__args__[0]
        return [_read(name, item.strip(), kind) for item in text.split(",") if item.strip()]
    return _read(name, text, field.annotation)


def _read(name: str, text: str, kind: Any) -> Any:
    kind = getattr(kind, "__origin__", None) if hasattr(kind, "__metadata__") else kind  # without its range
    if kind not in (int, float, bool):
        return text
    try:
        return TypeAdapter(kind).validate_python(text, strict=False)
    except ValidationError:
        what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ConfigError(f"{name}: expected {what}, got {text!r}") from None


def configured(base: dict[str, Any], overrides: Iterable[tuple[str, str]] = ()) -> Config:
    """The configuration that a file's parameters and `overrides` of the command line make, with every "auto" resolved.

    A general override (`train.lr`) reaches methods that have settings of their own; a method's own (`irpo.train.lr`)
    wins over it, in any order.

    Args:
        base: what a YAML file holds, sections nested or dotted.

    Raises:
        ConfigError: a parameter is unknown, mistyped, out of range or not to be set for one method.
    """
    flat = flatten(base)
    texts = dict(overrides)
    recipes = from_text("recipes", texts["recipes"]) if "recipes" in texts else flat.get("recipes", ())
    recipes = recipes if isinstance(recipes, list | tuple) else [recipes]
    if not all(isinstance(file, str) for file in recipes):
        raise ConfigError(f"recipes: expected files, as in recipes=my_methods.yaml, got {recipes}")
    methods = catalogue(recipes)
    names, own = [name for name in names_of(Config) if name != "method_settings"], {}
    for name in [*flat, *texts]:
        head, _, rest = name.partition(".")
        if head in methods:
            own.setdefault(head, {})
            check_own(head, rest, names)
        elif name not in names:
            raise ConfigError(unknown(name, names))
    for name, value in flat.items():
        head, _, rest = name.partition(".")
        if head in methods:
            own[head][rest] = value
    for name in texts:
        if name.partition(".")[0] in PER_METHOD:  # asked for on the command line: for every method
            for settings in own.values():
                settings.pop(name, None)
    for name, text in texts.items():
        head, _, rest = name.partition(".")
        if head in methods:
            own[head][rest] = _named(head, rest, text)
    values = {name: value for name, value in flat.items() if name.partition(".")[0] not in methods}
    values |= {name: from_text(name, text) for name, text in texts.items() if name in names}
    wanted = values.get("methods", ())
    if "all" in (wanted if isinstance(wanted, list | tuple) else [wanted]):
        values["methods"] = list(methods)
    config = changed(Config(), values | {"method_settings": {name: found for name, found in own.items() if found}})
    for method in config.methods:
        config.check_trainable(method)
    return resolve_auto(config)


def _named(method: str, name: str, text: str) -> Any:
    try:
        return from_text(name, text)
    except ConfigError as error:
        raise ConfigError(f"{method}.{error}") from None


def check_own(method: str, name: str, names: list[str]) -> None:
    """Raise a ConfigError unless a parameter may be set for one method alone."""
    if name not in names:
        own = [f"{method}.{known}" for known in names if known.partition(".")[0] in PER_METHOD]
        raise ConfigError(unknown(f"{method}.{name}".rstrip("."), own))
    if name.partition(".")[0] not in PER_METHOD:
        raise ConfigError(
            f"{method}.{name}: only {', '.join(f'{part}.*' for part in PER_METHOD)} can differ between methods, "
            "so that they share their samples"
        )
    if name == "train.retrain_with_dev":
        raise ConfigError(f"{method}.{name}: {name} is for all methods, since it decides what is sampled")


def flatten(raw: Any) -> dict[str, Any]:
    """Nested sections as dotted names with their values. Raises ConfigError."""
    if not isinstance(raw, dict):
        raise ConfigError(f"expected parameters as `key: value`, got {type(raw).__name__}")
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "method_settings":
            if not isinstance(value, dict) or not all(isinstance(part, dict) for part in value.values()):
                raise ConfigError("method_settings: expected `method: {train.lr: ...}` for each method")
            flat |= {f"{m}.{k}": v for m, part in value.items() for k, v in part.items()}
        elif isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[str(key)] = value
    return flat


def resolve_auto(config: Config) -> Config:
    """The configuration with every "auto" replaced by what this machine has, so a run's record says what was used."""
    open_ones = {name: both for name, both in AUTO.items() if attrgetter(name)(config) == "auto"}
    if not open_ones:
        return config
    cuda = load_object("torch:cuda").is_available()  # torch takes seconds to import
    there = {"model.dtype": cuda or load_object("irpo_utils.model.load:cpu_multiplies_bfloat16")()}
    return changed(config, {name: both[not there.get(name, cuda)] for name, both in open_ones.items()})


def differences(before: Config, now: Config) -> list[str]:
    """What differs between two configurations, as "train.lr 0.001 -> 0.002"; nothing if they are alike."""
    old, new = (flatten(config.model_dump(mode="json")) for config in (before, now))
    return [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]


def read_config(path: Path, overrides: Iterable[tuple[str, str]] = ()) -> Config:
    """A configuration from a YAML file, with `overrides` of the command line.

    Raises:
        ConfigError: the file is not YAML, or a parameter in it is unknown or mistyped.
    """
    raw = read_yaml(path)
    try:
        config = configured(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return configured(raw, overrides) if overrides else config


def dump(config: Config) -> str:
    """The whole configuration as YAML that `read_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
