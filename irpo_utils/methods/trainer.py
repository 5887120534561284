"""Train M_t on pairs and score it on dev: what the training stage does with a model."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..model.load import causal_model, load_policy, shards
from ..model.logprobs import with_reference
from ..model.processes import divided, gathered, rank, sharded, through, world_size
from ..model.prompts import encode_prompts
from ..model.records import Pair
from ..model.sampling import fitting_rows
from ..model.training import kept_reference_logps
from ..settings import Settings
from ..tasks.base import Problem, Task
from . import parts
from .recipes import Round
from .sampler import Sampler, opened


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
    kept_scores: tuple[Path, Any]  # file of the start's log-probabilities, and what names the model that gave them

    def run(self, show: Callable[[str], None] = print) -> dict[str, Any]:
        """Leave the policy that is best on dev in `folder`/kept; returns the facts in training.json.

        With `train.retrain_with_dev` training is then repeated for as many steps with the dev problems' pairs included.
        """
        config, train, options = self.config, self.engine, self.options(show)
        pairs, dev = self.scored_pairs(), self.task.problems("dev")
        held_out = {p.id for p in dev}
        held_in = [pair for pair in pairs if pair.problem not in held_out]
        if not held_in:
            raise ValueError(
                f"no pair is left to train on: all {len(pairs)} are of dev problems; set train.retrain_with_dev=false, "
                "or lower task.dev_size"
            )
        with opened(config, None, self.task, dev) as sampler:
            model = self.start_model()
            facts = train(
                model,
                held_in,
                self.folder,
                score=lambda policy: dev_score(policy, sampler, dev),
                keep_reference=self.kept_scores,
                **options,
            )
        kept = self.folder
        if config.train.retrain_with_dev:
            best = facts["best_step"]
            show(f"step {best} is best on dev; training anew for as many steps with the dev problems included")
            del model
            release_memory()
            model, kept = self.start_model(), self.folder / "retrained"
            options["config"] = config.train.but(max_steps=facts["steps"])  # the schedule is that of the first training
            scores = (self.folder / "retrained.json", self.kept_scores[1])
            again = train(model, pairs, kept, stop_after=best, keep_reference=scores, **options)
            facts["trained_tokens"] += again["trained_tokens"]
        return self.kept(kept, model) | facts

    def kept(self, folder: Path, model: PreTrainedModel) -> dict[str, Any]:
        """Keep the best policy of a training in `folder`; returns what is to be said of `model`."""
        if rank() == 0:
            shutil.rmtree(self.folder / "kept", ignore_errors=True)
            shutil.copytree(folder / "best", self.folder / "kept")
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"retrained_with_dev": self.config.train.retrain_with_dev, "trainable_parameters": trainable}

    @property
    def engine(self) -> Callable[..., dict[str, Any]]:
        return parts.TRAINERS[self.config.train.engine].load()

    @property
    def loss(self) -> parts.Loss:
        return self.choices.part("loss")

    def options(self, show: Callable[[str], None]) -> dict[str, Any]:
        """What every training engine is told."""
        return {
            "loss": self.loss.load(),
            "weights": {name: getattr(self.config.train, name) for name in self.loss.parameters},
            "has_reference": self.loss.reference,
            "reference_is_start": self.choices.reference_is_start,
            "config": self.config.train,
            "seed": self.order_seed,
            "sampled_by_start": self.sampled_by_start,
            "show": show,
        }

    def start_model(self) -> PreTrainedModel:
        options = {"trainable": True, "seed": self.seed, "threads": self.config.threads}
        return sharded(load_policy(self.config.model, self.start, **options))

    def scored_pairs(self) -> list[Pair]:
        """The pairs, with the log-probabilities of a reference that is not the model that training starts from."""
        if not self.loss.reference or self.choices.reference_is_start:
            return self.pairs
        reference = sharded(load_policy(self.config.model, self.reference, threads=self.config.threads))
        kept = (self.folder / "reference.json", "reference")  # a training that was killed does not score them again
        logps = kept_reference_logps(reference, self.pairs, 2 * self.config.train.micro_batch, kept)
        del reference
        release_memory()
        return with_reference(self.pairs, logps)


def dev_score(policy: PreTrainedModel, sampler: Sampler, problems: list[Problem]) -> float:
    """Share of `problems` that are solved greedily; each process asks a part of them, unless the policy is sharded."""
    if shards():
        return through(policy, solved_together, sampler, problems) / len(problems)
    count, sampler = world_size(), sampler.on(policy)
    return sum(divided([problems[i::count] for i in range(count)], sampler.solved)) / len(problems)


def solved_together(policy: PreTrainedModel, sampler: Sampler, problems: list[Problem]) -> int:
    """How many of `problems` a sharded policy solves greedily, within its forward pass.

    Its processes are to run it equally often: each asks all problems, with the rows that the least free memory holds.
    """
    model, sampling = causal_model(policy), sampler.config.sampling
    longest = max(map(len, encode_prompts(sampler.task, sampler.tokenizer, problems).values()))
    rows = min(gathered(fitting_rows(model, longest, sampling.max_new_tokens, 1)))
    config = sampler.config.but(sampling=sampling.but(max_rows=min(rows, sampling.max_rows)))
    return replace(sampler.on(model), config=config).solved(problems)


def release_memory() -> None:
    """One base in memory at a time."""
    gc.collect()
    torch.cuda.empty_cache()
