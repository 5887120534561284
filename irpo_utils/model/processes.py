"""Several processes that train one model, each on a part of every batch: how they meet, and what they tell one another.

A launcher starts them (accelerate launch, torchrun), and the usual environment says which one this is: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Where none has, there is one process, and all of this changes nothing.

Every function but `rank` and `world_size` is for all processes together: the others wait for one that leaves it out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, wait_for_everyone
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..files import PACKAGE, ConfigError, read_yaml
from .load import causal_model, shards

Item = TypeVar("Item")
Found = TypeVar("Found")
FSDP_FILE = PACKAGE / "assets" / "accelerate" / "fsdp2.yaml"
PATIENCE = timedelta(hours=2)  # a dev score may keep one process much longer than the others


def rank() -> int:
    """The number of this process; number 0 writes files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def join(count: int, shard: bool = False) -> None:
    """Meet the other processes that the environment tells of.

    Args:
        count: how many there are to be. shard: whether models are divided over them (FSDP2), or each has a whole one.

    Raises:
        ConfigError: they are not `count`, or this machine has no GPU for this one.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != count:
        raise ConfigError(f"train.processes: it is {count}, and the launcher started {started}; let it start as many")
    gpus, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and number >= gpus:
        raise ConfigError(
            f"train.processes: this machine has {gpus} GPUs, one for each process; lower it, or start the processes "
            "on several machines (IRPO_LAUNCHER)"
        )
    if not torch.cuda.is_available():
        if shard:
            raise ConfigError("train.shard: weights are divided over GPUs, and none is here; leave it out")
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if shard:
        divide_weights()
    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def divide_weights() -> None:
    """Tell accelerate, as its launcher does from the file, that models are divided: other launchers do not."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for name, value in read_yaml(FSDP_FILE)["fsdp_config"].items():
        os.environ[name.upper()] = value if isinstance(value, str) else str(value).lower()


def leave() -> None:
    """Part from the others, who have come as far."""
    PartialState().destroy_process_group()


def gathered(value: Found) -> list[Found]:
    """What each process has, in their order."""
    return gather_object([value]) if world_size() > 1 else [value]


def from_first(find: Callable[[], Found]) -> Found:
    """What process 0 finds, known to all when it has found it."""
    if world_size() == 1:
        return find()
    return broadcast_object_list([find() if rank() == 0 else None])[0]


def wait() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        wait_for_everyone()


def divided(items: list[Item], work: Callable[[Item], Found]) -> list[Found]:
    """`work` of every item, in their order: each item is done by one process, and its result known to all.

    Each does as many, since those of a sharded model must run it equally often: what is left over is done twice.
    """
    size, own = world_size(), rank()
    turns = range(-(-len(items) // size))
    done = gathered([work(items[min(turn * size + own, len(items) - 1)]) for turn in turns])
    return [found for turn in zip(*done, strict=True) for found in turn][: len(items)]


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose weights are divided over the processes (FSDP2) where `shards()`; else as it is.

    Here and not by the Trainer, since the pairs are scored before it begins. It takes a model that is sharded as it is.
    """
    if shards():
        blocks = causal_model(model)._no_split_modules
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module)
        fully_shard(model)
    return model


def through(model: nn.Module, function: Callable[..., Found], *arguments: Any) -> Found:
    """`function(model, *arguments)`, as the forward pass of what divides the work (DDP, FSDP2) where `model` is that.

    `function` gets the model inside. Called past the wrapper's forward, DDP would not synchronise gradients, silently,
    and FSDP2 would not gather weights. (As `_ForwardRedirection` of TRL and Lightning.)
    """
    if isinstance(model, DistributedDataParallel):
        inside = model.module
    elif isinstance(model, FSDPModule):
        inside = model
    else:
        return function(model, *arguments)
    before = vars(inside).get("forward")

    def put_back() -> None:
        vars(inside).pop("forward", None)
        if before is not None:
            inside.forward = before

    def forward(*given: Any) -> Found:
        put_back()  # the function may call the model's own
        return function(inside, *given)

    inside.forward = forward
    try:
        return model(*arguments)
    finally:
        put_back()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name, and whole where the model is sharded."""
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in found.items()}


def check_same(model: nn.Module) -> None:
    """See that every process has the same trained weights.

    Raises:
        RuntimeError: it has not, so that each has trained a model of its own.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(trained(model).items()) if world_size() > 1 else ():
        digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if len(set(gathered(digest.hexdigest()))) > 1:
        raise RuntimeError("the processes have trained different weights: their gradients were not synchronised")
