"""A run's parameters: typed, from a YAML preset and `key=value` overrides. Anything unknown or mistyped is an error.

Methods are in `methods.py`. `method_settings` gives a method its own hyper-parameters, which those that are `like` it take too;
`irpo.train.lr=1e-3` sets one from the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from .methods import KeyTwice, Loader, methods
from .tasks import TASKS


class ConfigError(ValueError):
    """A parameter is unknown, mistyped or out of range; the message names it and the mend."""


@dataclass
class TaskConfig:
    name: str = "word_problems"  # one of tasks.TASKS, or a class of your own: my_task.py:MyTask
    train: list[str] = field(default_factory=list)  # files or hub data sets; empty: the task's own
    dev: list[str] = field(default_factory=list)  # empty: `dev_size` problems are held out of training
    test: list[str] = field(default_factory=list)
    train_size: int = 1000  # problems; 0 takes all there are
    dev_size: int = 200
    test_size: int = 300
    seed: int = 0  # which problems are held out, and which are taken when a size cuts
    flexible: bool = False  # whether the reward, too, accepts an answer that is not marked
    execution: str = "isolated"  # of sampled programs; without isolation only where "i-accept-the-risk" says so
    guessable_share: float = 0.8  # word_problems: share of problems that ask "odd or even?"


@dataclass
class ModelConfig:
    path: str = "seed"  # a hub name, a folder, or "seed": the model in the package
    tuning: str = "lora"  # "lora", or "full" for a model small enough to save whole
    quantize: str = "none"  # "nf4": 4-bit base (QLoRA); "auto": nf4 where CUDA is, else none
    dtype: str = "float32"  # or "bfloat16"; "auto": bfloat16 where CUDA is. Adapters are float32 in any case
    trust_remote_code: bool = False  # whether code that comes with the model may run
    lora_r: int = 32
    lora_alpha: int = 64


OWN = ("pairs", "process", "judge", "train")  # sections that may differ between methods
EXECUTIONS = ("isolated", "i-accept-the-risk")  # how sampled programs are run, see sandbox.py
ENGINES = ("transformers", "vllm")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


@dataclass
class SamplingConfig:
    # What samples and evaluates: "transformers" in this process, or "vllm" in one of its own, for which IRPO_VLLM_PYTHON
    # may name a Python that has it (pyproject.toml: how to make one). Dev scores while training: always the former.
    engine: str = "transformers"
    n: int = 16
    temperature: list[float] = field(default_factory=lambda: [0.8])  # per iteration; the last one goes on
    max_new_tokens: int = 64
    rows: int = 512


@dataclass
class PairsConfig:
    k: int = 8
    eta: float = 0.2  # least difference of two rewards that makes a pair, where rewards are not just right and wrong
    at_most: int = 10  # correct samples of a problem that ReST-EM takes
    gold: bool = False  # whether the gold solution joins the winners
    max_tokens: int = 128  # longer prompt + response: dropped and counted, never cut
    max_pairs: int = 0  # random cap on pairs per iteration, 0 for none


PATHS = ("mean", "min", "product", "last")


@dataclass
class ProcessConfig:
    """Process feedback (SIPF): step labels by simulation, and the process reward model that is trained on them."""

    continuations: int = 8  # K: from the end of every step; the paper's code implies 8 for maths, 6 for code
    delta: int = 0  # a step is right if more than so many of its continuations reach the right answer
    temperature: float = 1.0
    simulator: str = ""  # who continues: "" is the policy M_t itself, else a hub name or a folder
    labels: str = "process"  # or "outcome", the control: every step has its answer's label, and nothing is simulated
    path: str = "mean"  # a path's reward from its steps' scores: mean (the paper), min, product or last
    lr: float = 5.0e-5  # the paper's
    lora_r: int = 16  # the paper's
    batch: int = 32  # solutions per optimizer step
    max_steps: int = 2000
    max_epochs: int = 3


@dataclass
class JudgeConfig:
    """Self-Rewarding: the model as its own judge, on a scale from 0 to 5."""

    samples: int = 3  # judgements that are averaged
    temperature: float = 0.7
    # "text": a judgement is written out and its "Score: n" read. "scores": n is drawn from the model's own probabilities
    # of the six scores behind the prompt, for a model that cannot write a judgement.
    read: str = "text"
    max_new_tokens: int = 256


@dataclass
class TrainConfig:
    lr: float = 1.0e-3
    beta: float = 0.1
    alpha: float = 1.0
    odds_weight: float = 0.1  # lambda of ORPO's odds ratio term; the other losses have none
    # Pairs per optimizer step; where nothing is rejected, twice as many responses: as many tokens for every method.
    batch: int = 16
    micro_batch: int = 16  # pairs per forward pass (or twice as many responses)
    pairs_together: int = 1  # pairs of one problem that come together: they share its prompt, for a noisier gradient
    max_steps: int = 250
    max_epochs: int = 4
    extrapolation: float = 0.3  # a of ExPO; the paper: 0.3 to 0.5
    warmup: float = 0.1  # share of the steps
    max_grad_norm: float = 1.0
    eval_every: int = 50  # steps between dev scores; the best step becomes M_{t+1}
    retrain_with_dev: bool = (
        False  # then train anew for as many steps with the dev problems included, as the paper does
    )
    optimizer: str = "adamw"  # or "paged_adamw_8bit"; "auto": the latter where CUDA is
    gradient_checkpointing: bool = False  # less memory, about a third more time


@dataclass
class EvaluationConfig:
    samples: int = 32
    temperature: float = 0.8


@dataclass
class Config:
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    methods: list[str] = field(default_factory=lambda: ["irpo"])  # or all: every one in methods.yaml
    seeds: int = 1
    iterations: int = 3
    threads: int = 2  # CPU threads of a stage; part of what makes a rerun bit-identical
    method_settings: dict[str, Any] = field(default_factory=dict)

    def temperature(self, iteration: int) -> float:
        """The sampling temperature of iteration 1, 2, ...; the last one of the list goes on."""
        return self.sampling.temperature[min(iteration, len(self.sampling.temperature)) - 1]

    def for_round(self, method: str, t: int) -> Config:
        """This configuration with the hyper-parameters of a method's round t: those of the method that it is `like`, then its own.

        Its own do not count in the rounds that come once before those that repeat (a warm start).
        """
        recipe = methods()[method]
        like = recipe.round(t).like if t else ""
        warm = like and recipe.repeat and t <= len(recipe.kinds) - recipe.repeat
        own = self.method_settings.get(like, {}) | ({} if warm else self.method_settings.get(method, {}))
        config, share = apply(self, own.items()), recipe.share(self.iterations)
        config.train.max_steps, config.train.max_epochs = (
            share * config.train.max_steps,
            share * config.train.max_epochs,
        )
        return config

    def rounds(self, method: str) -> int:
        return methods()[method].rounds(self.iterations)


def _typed(name: str, value: Any, kind: Any, from_text: bool) -> Any:
    """`value` as `kind`, or a ConfigError. Text from a command line is read; text from YAML must be of the right type."""
    if get_origin(kind) is list:
        items = [v.strip() for v in value.split(",")] if from_text and isinstance(value, str) else value
        if not isinstance(items, list):
            items = [items]
        items = [item for item in items if item != ""]
        return [_typed(name, item, get_args(kind)[0], from_text) for item in items]
    if from_text and isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value}")
    if kind is float and isinstance(value, str):
        raise ConfigError(f"{name}: expected a number, got the text {value!r}; YAML reads 1e-5 as text, write 1.0e-5")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), 1)
    return ConfigError(f"no parameter is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def parameter_names(config: Config) -> list[str]:
    """Every settable key, as in `train.lr`."""
    names = []
    for f in dataclasses.fields(config):
        part = getattr(config, f.name)
        names += (
            [f"{f.name}.{g.name}" for g in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else [f.name]
        )
    return [name for name in names if name != "method_settings"]


def apply(config: Config, settings: Iterable[tuple[str, Any]], from_text: bool = False) -> Config:
    """A copy of `config` with dotted `settings` put in, each checked.

    Raises:
        ConfigError: a key is unknown or a value is of the wrong type or out of range.
    """
    config = dataclasses.replace(
        config,
        **{
            f.name: dataclasses.replace(v)
            for f in dataclasses.fields(config)
            if dataclasses.is_dataclass(v := getattr(config, f.name))
        },
        method_settings={k: dict(v) for k, v in config.method_settings.items()},
    )
    names = parameter_names(config)
    for name, value in settings:
        head, _, rest = name.partition(".")
        if head in methods():
            if rest not in names:
                raise _unknown(name, [f"{head}.{n}" for n in names])
            owner, leaf = rest.split(".") if "." in rest else (None, rest)
            if owner not in OWN:
                raise ConfigError(
                    f"{name}: only {', '.join(f'{part}.*' for part in OWN)} can differ between methods, so that they share their samples"
                )
            if leaf == "retrain_with_dev":
                raise ConfigError(
                    f"{name}: train.retrain_with_dev is for all methods, since it decides what is sampled"
                )
            kind = get_type_hints(type(getattr(config, owner)))[leaf]
            config.method_settings.setdefault(head, {})[rest] = _typed(name, value, kind, from_text)
            continue
        if name not in names:
            raise _unknown(name, names)
        if from_text and head in OWN:  # asked for on the command line: for every method
            for own in config.method_settings.values():
                own.pop(name, None)
        target = getattr(config, head) if rest else config
        leaf = rest or head
        value = _typed(name, value, get_type_hints(type(target))[leaf], from_text)
        setattr(target, leaf, list(methods()) if name == "methods" and "all" in value else value)
    return config


def check(config: Config) -> Config:
    """Raise a ConfigError for values that no run could use."""
    c = config
    rules = [
        (c.sampling.engine in ENGINES, f"sampling.engine: one of {', '.join(ENGINES)}"),
        (
            not (c.sampling.engine == "vllm" and c.model.quantize == "nf4"),
            "sampling.engine: vLLM would not run the 4-bit weights that are trained; set model.quantize=none or sampling.engine=transformers",
        ),
        (
            not (c.sampling.engine == "vllm" and c.model.tuning == "lora" and c.model.lora_r > LORA_RANKS[-1]),
            f"sampling.engine: vLLM takes a model.lora_r of up to {LORA_RANKS[-1]}; lower it or set sampling.engine=transformers",
        ),
        (c.model.tuning in ("lora", "full"), "model.tuning: one of lora, full"),
        (c.model.quantize in ("none", "nf4", "auto"), "model.quantize: one of none, nf4, auto"),
        (c.model.dtype in ("float32", "bfloat16", "auto"), "model.dtype: one of float32, bfloat16, auto"),
        (
            c.train.optimizer in ("adamw", "paged_adamw_8bit", "auto"),
            "train.optimizer: one of adamw, paged_adamw_8bit, auto",
        ),
        (bool(c.methods), "methods: expected at least one value"),
        (bool(c.sampling.temperature), "sampling.temperature: expected at least one value"),
        (
            not (c.model.quantize != "none" and c.model.tuning == "full"),
            "model.quantize: 4-bit weights cannot be trained; set model.tuning=lora",
        ),
        (0 <= c.train.warmup <= 1, "train.warmup: between 0 and 1"),
        (c.train.max_grad_norm > 0, "train.max_grad_norm: above 0"),
        (c.pairs.eta > 0, "pairs.eta: above 0"),
        (c.pairs.max_pairs >= 0, "pairs.max_pairs: 0 for no cap, or a number of pairs"),
        (
            c.task.name in TASKS or ".py:" in c.task.name,
            f"task.name: no task is called {c.task.name!r}; there is: {', '.join(sorted(TASKS))}, or a class of your own as in my_task.py:MyTask",
        ),
        (
            c.task.name != "jsonl" or (c.task.train and c.task.test),
            "task.train and task.test: the jsonl task needs the file of each, as in task.train=problems.jsonl",
        ),
        (
            c.task.execution in EXECUTIONS,
            f"task.execution: {EXECUTIONS[0]}, or {EXECUTIONS[1]} to run sampled programs without isolation",
        ),
        (bool(c.model.path), 'model.path: a hub name, a folder, or "seed"'),
        (
            min(c.task.train_size, c.task.dev_size, c.task.test_size) >= 0,
            "task: train_size, dev_size and test_size not below 0",
        ),
        (len(set(c.methods)) == len(c.methods), "methods: each one once"),
        (0 <= c.task.guessable_share <= 1, "task.guessable_share: between 0 and 1"),
        (all(t > 0 for t in c.sampling.temperature), "sampling.temperature: above 0"),
        (c.evaluation.temperature > 0, "evaluation.temperature: above 0"),
        (c.process.labels in ("process", "outcome"), "process.labels: one of process, outcome"),
        (c.process.path in PATHS, f"process.path: one of {', '.join(PATHS)}"),
        (
            0 <= c.process.delta < c.process.continuations,
            "process.delta: at least 0 and below process.continuations",
        ),
        (min(c.process.temperature, c.process.lr) > 0, "process.temperature and process.lr: above 0"),
        (c.judge.read in ("text", "scores"), "judge.read: one of text, scores"),
        (c.judge.temperature > 0, "judge.temperature: above 0"),
        (
            c.train.micro_batch < 1 or c.train.batch % c.train.micro_batch == 0,
            "train.batch: a multiple of train.micro_batch",
        ),
        (
            c.train.lr > 0 and c.train.beta > 0 and min(c.train.alpha, c.train.odds_weight) >= 0,
            "train: lr and beta above 0, alpha and odds_weight not below",
        ),
    ]
    if c.task.name == "word_problems":
        sizes = (c.task.train_size, c.task.dev_size, c.task.test_size)
        rules.append((min(sizes) >= 1, "task: train_size, dev_size and test_size at least 1"))
    positive = ["sampling.rows", "pairs.max_tokens", "model.lora_alpha"]
    positive += [
        "sampling.n",
        "sampling.max_new_tokens",
        "pairs.k",
        "pairs.at_most",
    ]
    positive += [
        "train.batch",
        "train.micro_batch",
        "train.pairs_together",
        "train.max_steps",
        "train.max_epochs",
        "train.eval_every",
    ]
    positive += ["process.continuations", "process.lora_r", "process.batch", "process.max_steps", "process.max_epochs"]
    positive += ["judge.samples", "judge.max_new_tokens"]
    positive += ["evaluation.samples", "seeds", "iterations", "threads", "model.lora_r"]
    for name in positive:
        value = _get(c, name)
        rules.append((value >= 1, f"{name}: at least 1, got {value}"))
    for fits, message in rules:
        if not fits:
            raise ConfigError(message)
    for method, own in c.method_settings.items():
        if own:
            try:
                check(dataclasses.replace(apply(c, own.items()), method_settings={}))
            except ConfigError as error:
                raise ConfigError(f"{method}: {error}") from None
    for method in c.methods:
        if method not in methods():
            raise ConfigError(f"methods: no method is called {method!r}; there is: all, {', '.join(methods())}")
        if c.iterations < (least := len(methods()[method].kinds)):
            raise ConfigError(
                f"iterations: {method} makes rounds of {least} kinds; set iterations={least}, or leave it out of methods"
            )
    return config


def flatten(raw: Any) -> list[tuple[str, Any]]:
    """Nested sections as dotted names with their values. Raises ConfigError."""
    if not isinstance(raw, dict):
        raise ConfigError(f"expected parameters as `key: value`, got {type(raw).__name__}")
    flat = []
    for key, value in raw.items():
        if key == "method_settings":
            if not isinstance(value, dict) or not all(isinstance(part, dict) for part in value.values()):
                raise ConfigError("method_settings: expected `method: {train.lr: ...}` for each method")
            flat += [(f"{m}.{k}", v) for m, part in value.items() for k, v in part.items()]
        elif isinstance(value, dict):
            flat += [(f"{key}.{k}", v) for k, v in value.items()]
        else:
            flat.append((str(key), value))
    return flat


def settle(config: Config) -> Config:
    """The configuration with every "auto" replaced by what this machine has, so that a run's record says what was used."""
    autos = {
        "model.quantize": ("nf4", "none"),
        "model.dtype": ("bfloat16", "float32"),
        "train.optimizer": ("paged_adamw_8bit", "adamw"),
    }
    chosen = [(name, both) for name, both in autos.items() if _get(config, name) == "auto"]
    if not chosen:
        return config
    import torch

    return apply(config, [(name, both[0 if torch.cuda.is_available() else 1]) for name, both in chosen])


def _get(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ConfigError."""
    try:
        raw = yaml.load(path.read_text(), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except KeyTwice as error:
        raise ConfigError(f"{path}: {error}") from None
    return {} if raw is None else raw


def read_config(path: Path) -> Config:
    """A configuration from a YAML file.

    Raises:
        ConfigError: the file is not YAML, or a parameter in it is unknown or mistyped.
    """
    raw = read_yaml(path)
    try:
        return check(settle(apply(Config(), flatten(raw))))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def dump(config: Config) -> str:
    """The whole configuration as YAML that `read_config` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
