"""Iterative Reasoning Preference Optimization on one page, in memory (arXiv 2404.19733 v3, section 2).

    for t in 1..T:   sample N solutions of each problem from M_{t-1}
                     grade  their final answers: right, wrong, or none to be read
                     pair   K times a right one with a wrong one
                     train  M_t from M_{t-1} with DPO + NLL, M_{t-1} being the reference
                     evaluate M_t

    task = Given(problems, test=more)                        # or any task of irpo_utils.tasks
    for result in irpo(model, tokenizer, task, Settings()):
        print(result)

The parts are those that the stages of `./run_all.sh` call. What it does besides, and this page leaves out: every stage
is a notebook with its artefacts on disk, a stopped run goes on, and nothing is done twice; the step that is best on
held-out dev problems is kept, not the last one; M_t is one adapter on a frozen base, which may be in 4 bits; vLLM may
draw; other methods, seeds, majority votes and intervals. Nothing here checks that the model fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .methods.sampler import Sampler
from .methods.select import select
from .model.load import new_adapter
from .model.losses import dpo_nll
from .model.records import Sample
from .model.training import train
from .settings import Settings
from .tasks.base import Problem, Task


@dataclass(frozen=True)
class Result:
    """One iteration: accuracies are shares of problems, or of samples, with a right final answer."""

    iteration: int
    sampled: float  # on the training problems, of M_{t-1}
    pairs: int
    accuracy: float  # greedy, on the test problems, of M_t
    facts: dict[str, Any]  # the audit of the pairs, and what training said

    def __str__(self) -> str:
        return (
            f"M_{self.iteration - 1}: {self.sampled:.1%} of its samples are right; {self.pairs} pairs; "
            f"M_{self.iteration}: {self.accuracy:.1%} of the test problems"
        )


def irpo(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, settings: Settings, seed: int = 0
) -> Iterator[Result]:
    """Train `model` in place, and give a `Result` after every iteration.

    Args:
        model: M_0. It gets a LoRA adapter of `settings.model.lora_r`, which holds all that is learnt.
        task: gives the problems ("train" and "test"), asks them, and says what is a right answer.
        settings: sections `sampling`, `pairs`, `train` and `model`, and `iterations`.

    Raises:
        ValueError: the model has been through the loop before; or no pair can be made, since all samples of every
            problem are right, or all wrong.
    """
    if getattr(model, "peft_config", None):
        raise ValueError("the model has an adapter already; load it again (run that cell) to start from M_0")
    policy = new_adapter(model, settings.model, seed)
    sampler = Sampler.of(policy, tokenizer, task, settings)
    problems, test = task.problems("train"), task.problems("test")
    prompts = sampler.prompts(problems)
    for t in range(1, settings.iterations + 1):
        samples = draw(sampler, problems, settings, t, seed)
        graded = [s.reward == 1 for drawn in samples.values() for s in drawn]
        pairs, audit = select("pairs", samples, prompts, settings.pairs, seed)
        with TemporaryDirectory() as folder:
            facts = train(
                policy,
                pairs,
                Path(folder),
                loss=dpo_nll,
                weights={"beta": settings.train.beta, "alpha": settings.train.alpha},
                has_reference=True,
                config=settings.train,
                seed=seed + t,
                sampled_by_start=True,
                show=lambda line: None,
            )
        accuracy = sampler.greedy_accuracy(test, label="test")
        yield Result(t, sum(graded) / len(graded), len(pairs), accuracy, audit | facts)


def draw(sampler: Sampler, problems: list[Problem], settings: Settings, t: int, seed: int) -> dict[str, list[Sample]]:
    """Problem id -> N graded samples of M_{t-1}."""
    options = {"n": settings.sampling.n, "temperature": settings.temperature(t), "seed": 1000 * seed + t}
    batches = sampler.samples(problems, label=f"sampling M_{t - 1}", **options)
    found = Sample.by_problem(sample for batch in batches for sample in batch)
    return {p.id: found[p.id] for p in problems}
