"""Train M_t on pairs and score it on dev: what the training stage does with a model."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..model.load import load_policy
from ..model.logprobs import reference_logps
from ..model.records import Pair
from ..settings import Settings
from ..tasks.base import Task
from . import parts
from .recipes import Round
from .sampler import opened


@dataclass(frozen=True)
class Training:
    """What one round's training is given. Policies are folders; None is the base."""

    config: Settings
    choices: Round
    start: Path | None
    reference: Path | None  # where it is another model than `start`
    pairs: list[Pair]
    task: Task
    seed: int  # of a fresh adapter
    order_seed: int  # of the order in which pairs come
    sampled_by_start: bool
    folder: Path  # to work in; a training that was killed finds it as it left it
    kept_reference: tuple[
        Path, Any
    ]  # file of the reference's log-probabilities, and what names the model that gave them


def train_policy(job: Training, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Leave the best policy on dev in `job.folder`/kept; returns the facts in training.json.

    With `train.retrain_with_dev` training is then repeated for as many steps with the dev problems' pairs included.
    """
    config, train = job.config, parts.TRAINERS[job.config.train.engine].load()
    loss = parts.part("loss", job.choices.loss)
    options = {
        "loss": loss.load(),
        "weights": {name: getattr(config.train, name) for name in loss.parameters},
        "has_reference": loss.reference,
        "reference_is_start": job.choices.reference_is_start,
        "config": config.train,
        "seed": job.order_seed,
        "sampled_by_start": job.sampled_by_start,
        "show": show,
    }
    pairs = job.pairs if not loss.reference or job.choices.reference_is_start else with_reference(job)
    dev = job.task.problems("dev")
    held_out = {p.id for p in dev}
    with opened(config, None, job.task, dev) as sampler:
        model = start_of(job)
        facts = train(
            model,
            [pair for pair in pairs if pair.problem not in held_out],
            job.folder,
            score=lambda policy: sampler.on(policy).greedy_accuracy(dev),
            keep_reference=job.kept_reference,
            **options,
        )
    kept = job.folder
    if config.train.retrain_with_dev:
        show(
            f"step {facts['best_step']} is best on dev; training anew for as many steps with the dev problems included"
        )
        del model
        gc.collect()  # one base in memory at a time
        torch.cuda.empty_cache()
        model, kept = start_of(job), job.folder / "retrained"
        again = train(model, pairs, kept, stop_after=facts["best_step"], **options)
        facts["trained_tokens"] += again["trained_tokens"]
    shutil.rmtree(job.folder / "kept", ignore_errors=True)
    shutil.copytree(kept / "best", job.folder / "kept")
    facts["retrained_with_dev"] = config.train.retrain_with_dev
    facts["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return facts


def start_of(job: Training) -> Any:
    return load_policy(job.config.model, job.start, trainable=True, seed=job.seed, threads=job.config.threads)


def with_reference(job: Training) -> list[Pair]:
    """The pairs with the log-probabilities of a reference that is not the model that training starts from."""
    reference = load_policy(job.config.model, job.reference, threads=job.config.threads)
    logps = reference_logps(reference, job.pairs, 2 * job.config.train.micro_batch)
    del reference
    gc.collect()
    torch.cuda.empty_cache()
    return [
        replace(pair, reference_chosen=chosen, reference_rejected=rejected)
        for pair, (chosen, rejected) in zip(job.pairs, logps, strict=True)
    ]
