"""The table of parts: every reward, selection, loss and engine, by name. A recipe names a row, or your own function.

A row says where the function is, as "module:function", and what has to be known of it before it is loaded: checks, keys
and errors read that here. So nothing is imported until it is used, and a part of `extras` is named here only.

A part of your own is a function in a Python file, `my_parts.py:hardest` (a relative path is relative to the project):

    selection  (samples, gold, settings, rng) -> pairs          as in `select.py`; it makes pairs
    loss       (scores, <parameters of `train` by name>) -> PairLosses   as in `model/losses.py`; it takes pairs
    reward     (job) -> (samples, facts)                        as in `rationalize.py`; it gives a number

Without attributes a part of your own is what its line above says; one on the function says otherwise
(`hardest.pairs = False`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..files import ConfigError, load_object, source_of
from ..settings import Settings, TrainConfig


@dataclass(frozen=True)
class Part:
    """One row: a function by its place."""

    where: str  # "module:function", or "file.py:function"

    def load(self) -> Callable[..., Any]:
        """The function. Raises ConfigError where there is none."""
        return load_object(self.where)


@dataclass(frozen=True)
class Reward(Part):
    """(job) -> (samples, facts), for a `rewards.Job`. `answer` has no function: its verdict is in the samples."""

    number: bool = True  # not just right or wrong
    settings: tuple[str, ...] = ()  # that it looks at: whole sections ("judge"), or parameters ("train.micro_batch")
    files: tuple[str, ...] = ()  # what it leaves beside the samples
    m0: bool = False  # whether it looks at M_0 as well


@dataclass(frozen=True)
class Selection(Part):
    """(a problem's samples, its gold solution, section `pairs`, a random generator) -> [(chosen, rejected or None)]."""

    pairs: bool = True  # or single responses
    samples: bool = True  # whether it looks at samples, or at gold solutions alone
    gold: bool = False  # whether it is nothing without gold solutions
    rewards: bool = True  # whether it looks at what samples are worth
    numbers: bool = True  # whether rewards may be any numbers, or just right and wrong
    partial: bool = False  # whether responses may be the beginnings of what was drawn
    signed: bool = False  # whether a response may be there to become less likely, by a reward gap below 0
    continues: bool = False  # whether the chosen response goes on from the rejected one
    hint: str = ""  # what to change where it makes nothing


@dataclass(frozen=True)
class Loss(Part):
    """(scores, parameters of the `train` section) -> PairLosses."""

    pairs: bool = True
    reference: bool = True  # whether the reference's log-probabilities are needed
    gaps: bool = False  # whether it looks at reward gaps
    continues: bool = False  # whether the chosen response is to go on from the rejected one
    trains: bool = True  # or makes M_t of earlier models, and has no selection
    parameters: tuple[str, ...] = ()  # of the `train` section


# The last: which solutions its reward model sees.
PROCESS = (
    "process", "train.micro_batch", "train.warmup", "train.max_grad_norm", "train.optimizer",
    "train.gradient_checkpointing", "pairs.max_tokens",
)  # fmt: skip
REWARDS = {
    "none": Reward("", number=False),
    "answer": Reward("", number=False),
    "rationalized": Reward("irpo_utils.methods.rationalize:rationalized", number=False),
    "process": Reward(
        "irpo_utils.extras.process.labels:process", settings=PROCESS, files=("labels.jsonl", "reward_model")
    ),
    "votes": Reward("irpo_utils.methods.votes:votes"),
    "likelihood": Reward(
        "irpo_utils.methods.likelihood:likelihood", settings=("train.beta", "train.micro_batch"), m0=True
    ),
    "judge": Reward("irpo_utils.extras.judge:judged", settings=("judge", "train.micro_batch")),
}  # fmt: skip
SELECTIONS = {
    "none": Selection("", pairs=False, samples=False, rewards=False),
    "pairs": Selection("irpo_utils.methods.select:pairs_of", numbers=False),
    "pairs_with_gold": Selection("irpo_utils.methods.select:pairs_with_gold_of", gold=True, numbers=False),
    "diverse": Selection("irpo_utils.methods.select:diverse_of", numbers=False),
    "chosen": Selection("irpo_utils.methods.select:chosen_of", pairs=False, numbers=False),
    "gold": Selection(
        "irpo_utils.methods.select:gold_of", pairs=False, samples=False, gold=True, rewards=False, numbers=False
    ),
    "correct": Selection("irpo_utils.methods.select:correct_of", pairs=False, numbers=False),
    "distinct": Selection("irpo_utils.methods.select:distinct_of", pairs=False, numbers=False),
    "capped": Selection("irpo_utils.methods.select:capped_of", pairs=False, numbers=False),
    "pseudo": Selection("irpo_utils.methods.select:pseudo_of", pairs=False, numbers=False),
    "gold_against_own": Selection(
        "irpo_utils.methods.select:gold_against_own_of", gold=True, rewards=False, numbers=False
    ),
    "best_against_worst": Selection(
        "irpo_utils.methods.select:best_against_worst_of", hint="where all rewards of a problem are one"
    ),
    "voted": Selection("irpo_utils.methods.select:voted_of", hint="lower pairs.least_votes"),
    "group": Selection("irpo_utils.methods.select:group_of", pairs=False, signed=True),
    "group_scaled": Selection("irpo_utils.methods.select:group_scaled_of", pairs=False, signed=True),
    "first_wrong_step": Selection(
        "irpo_utils.methods.select:first_wrong_step_of",
        partial=True,
        hint="take the reward process, train its model longer (process.max_epochs)",
    ),
    "thoughts": Selection(
        "irpo_utils.methods.select:thoughts_of", continues=True, partial=True, hint="take the reward likelihood"
    ),
    # What `pairs.file` makes of every method; the function reads the whole file, and is called by the stage itself.
    "file": Selection("irpo_utils.methods.preferences:read", samples=False, rewards=False),
    "margin": Selection("irpo_utils.methods.select:margin_of", hint="lower pairs.eta"),
}
LOSSES = {
    "dpo+nll": Loss("irpo_utils.model.losses:dpo_nll", parameters=("beta", "alpha")),
    "dpo": Loss("irpo_utils.model.losses:dpo", parameters=("beta",)),
    "nll": Loss("irpo_utils.model.losses:nll", pairs=False, reference=False),
    "orpo": Loss("irpo_utils.model.losses:orpo", reference=False, parameters=("odds_weight",)),
    "weighted dpo+nll": Loss("irpo_utils.model.losses:weighted_dpo_nll", gaps=True, parameters=("beta", "alpha")),
    "cpo": Loss("irpo_utils.model.losses:cpo", reference=False, parameters=("beta", "alpha")),
    "simpo": Loss("irpo_utils.model.losses:simpo", reference=False, parameters=("beta", "gamma")),
    "dpo_norm": Loss("irpo_utils.model.losses:dpo_norm", parameters=("beta",)),
    "dpo_positive": Loss("irpo_utils.model.losses:dpo_positive", parameters=("beta", "bar")),
    "exmate": Loss("irpo_utils.model.losses:exmate", reference=False, parameters=("penalty",)),
    "dpo+exmate": Loss("irpo_utils.model.losses:dpo_exmate", parameters=("beta", "alpha", "penalty")),
    "policy_gradient": Loss("irpo_utils.model.losses:policy_gradient", pairs=False, reference=False, gaps=True),
    "policy_gradient_mean": Loss(
        "irpo_utils.model.losses:policy_gradient_mean", pairs=False, reference=False, gaps=True
    ),
    "latro": Loss("irpo_utils.model.losses:latro", reference=False, continues=True),
    "extrapolate": Loss(
        "irpo_utils.extras.expo:extrapolated", pairs=False, reference=False, trains=False, parameters=("extrapolation",)
    ),
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], type[Part]]] = {
    "reward": (REWARDS, Reward),
    "selection": (SELECTIONS, Selection),
    "loss": (LOSSES, Loss),
}


@dataclass(frozen=True)
class Engine(Part):
    """What draws responses: (config, policy, task, problems) -> a `sampler.Sampler`, as a context manager."""

    check: str = ""  # (config, jobs): raises ConfigError where it cannot run
    version: str = ""  # () -> its version, where it lies in an environment of its own

    def opener(self, config: Settings) -> Callable[..., Any]:
        """What opens a sampler: the engine's function, or that of `sampling.workers` processes that have the engine."""
        return (WORKERS if config.sampling.workers > 1 else self).load()


SAMPLERS = {
    "transformers": Engine("irpo_utils.methods.sampler:opened"),
    "vllm": Engine(
        "irpo_utils.extras.vllm.engine:opened", "irpo_utils.extras.vllm.engine:check",
        "irpo_utils.extras.vllm.engine:version",
    ),
    "server": Engine("irpo_utils.extras.server:opened", "irpo_utils.extras.server:check"),
}  # fmt: skip
# Any of these in several processes; no engine of its own, since what is drawn is the same.
WORKERS = Engine("irpo_utils.extras.workers:opened", "irpo_utils.extras.cluster:check")
COMMANDS = Part("irpo_utils.extras.cluster:run_commands")  # whole methods and seeds on the machines of a cluster


@dataclass(frozen=True)
class Trainer(Part):
    """What trains on pairs, with the signature of `model.training.train`."""

    losses: tuple[str, ...] = ()  # those that it can train; none: all
    packages: tuple[str, ...] = ()  # whose versions its result depends on, besides


TRAINERS = {
    "own": Trainer("irpo_utils.model.training:train"),
    "trl": Trainer(
        "irpo_utils.extras.trl_trainer:train",
        losses=("dpo", "dpo+nll", "orpo", "policy_gradient", "policy_gradient_mean"),
        packages=("trl",),
    ),
}
# What the training stage does with them; by name, so that a stage is known without loading torch.
TRAINING = Part("irpo_utils.methods.trainer:Training")
ONLINE = Part("irpo_utils.methods.online:OnlineTraining")


def part(kind: str, name: str) -> Any:
    """The row of a part: one of the table, or one for a function of your own, `file.py:function`.

    Raises:
        ConfigError: there is no such part, or the file has no such function.
    """
    table, row = KINDS[kind]
    if name in table:
        return table[name]
    if source_of(name) is None:
        raise ConfigError(
            f"no {kind} is called {name!r}; there is: {', '.join(table)}, or your own as in my_parts.py:hardest"
        )
    function = row(name).load()
    if not callable(function):
        raise ConfigError(f"{name} is no function")
    facts = {f.name: getattr(function, f.name) for f in fields(row) if f.name != "where" and hasattr(function, f.name)}
    if row is Loss:
        facts.setdefault("parameters", weights_of(name, function))
    return row(name, **facts)


def weights_of(name: str, loss: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters of `train` that a loss of your own takes beside the scores. Raises ConfigError for others."""
    taken = list(inspect.signature(loss).parameters.values())[1:]
    known = TrainConfig.model_fields
    wrong = [p.name for p in taken if p.name not in known and p.default is p.empty]
    if wrong:
        raise ConfigError(f"{name}: {wrong[0]} is no parameter of train; give it a default, or take one that is")
    return tuple(p.name for p in taken if p.name in known)
