"""What every training here shares, whatever its loss: the order of examples, Trainer arguments, whole checkpoints."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from ..settings import TrainConfig
from . import processes
from .records import Pair

OPTIMIZERS = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}  # what transformers calls them


def training_order(problems: Sequence[str], config: TrainConfig, seed: int) -> list[int]:
    """Which pair comes when, by number; `problems` [pairs] names the problem of each pair.

    Whole shuffled passes over the pairs, cut to `config.max_steps` batches or `config.max_epochs` passes. With
    `pairs_together` above 1, up to so many pairs of one problem follow one another, so that they share their prompt in
    a batch: less work, and a gradient from fewer problems.
    """
    count, batch, together = len(problems), config.batch, config.pairs_together
    rng, order = random.Random(seed), []
    steps = min(config.max_steps, max(1, count * config.max_epochs // batch))
    while len(order) < steps * batch:
        shuffled = rng.sample(range(count), count)
        if together > 1:
            groups: dict[str, list[list[int]]] = {}
            for i in shuffled:
                own = groups.setdefault(problems[i], [[]])
                if len(own[-1]) == together:
                    own.append([])
                own[-1].append(i)
            parts = [part for own in groups.values() for part in own]
            shuffled = [i for part in rng.sample(parts, len(parts)) for i in part]
        order += shuffled
    return order[: steps * batch]


def sorted_in_batches(order: list[int], batch: int, key: Callable[[int], Any]) -> list[int]:
    """The same order with every batch sorted by `key`, so that a micro-batch holds like lengths and like problems."""
    return [i for first in range(0, len(order), batch) for i in sorted(order[first : first + batch], key=key)]


def pair_order(pair: Pair) -> tuple[int, str, int]:
    """What a batch is sorted by: like lengths and like problems come together."""
    return len(pair.prompt_ids), pair.problem, len(pair.chosen_ids)


def trainer_arguments(folder: Path, config: TrainConfig, steps: int, seed: int, **more: Any) -> TrainingArguments:
    """How every model here is trained: `steps` batches in the order given, at a rate that warms up and falls to 0.

    Several processes take a batch's micro-batches in turn.

    Args:
        folder: gets `checkpoints/`.
        more: when checkpoints are written, and who is told, as `TrainingArguments` takes it.
    """
    count = processes.world_size()
    micro_batch = config.own_micro_batch(count)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=config.batch // (count * micro_batch),
        ddp_find_unused_parameters=False,  # every adapter is used at every step
        learning_rate=config.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        weight_decay=0.0,
        optim=OPTIMIZERS[config.optimizer],
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",  # the order is the shuffle, so that a resumed run sees the same batches
        save_total_limit=2,  # the one before goes only after the new one has its mark
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
        **{"report_to": [], **more},
    )
    arguments._n_gpu = 1  # one process, one device: the Trainer would split batches over all GPUs that it sees
    return arguments


class Mark(TrainerCallback):
    """Marks a checkpoint as complete: a run killed while saving leaves one without the mark, which does not count."""

    def on_save(self, args, state, control, **kwargs):
        processes.wait()  # each writes a file into it
        if processes.rank() == 0:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "complete").touch()


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; half-written ones are removed. For process 0 alone."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / "complete").exists():
            found.append(path)
        else:
            shutil.rmtree(path)
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None
