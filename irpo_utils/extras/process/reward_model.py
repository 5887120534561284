"""A process reward model: the base with a two-class head, which says where a step ends whether all is well so far.

SIPF (arXiv 2412.08393), section 3: trained by cross-entropy on step labels. It has an adapter of its own on the same
base as the policy, or is a whole model with `model.tuning: full`. It is saved and loaded as a policy is: one folder.
Responses to one prompt share it, as in `logprobs.py`, whose hidden states it reads.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel, PrinterCallback, Trainer
from transformers.utils import logging

from ...files import write_json
from ...metrics import auc
from ...model import load
from ...model.load import causal_model
from ...model.logprobs import collate, response_states, to_device
from ...model.records import Ids, Record
from ...model.schedule import Mark, last_checkpoint, sorted_in_batches, trainer_arguments, training_order
from ...settings import Settings, TrainConfig

HEADS = ("score", "classifier")  # what transformers calls a token classifier's last layer
HELD_OUT = 0.1  # share of the problems whose steps it is tested on instead of trained
TOGETHER = 4  # responses to one prompt that come together in a batch
SAVE_EVERY = 50  # steps that a killed training loses at most


@dataclass(frozen=True)
class Solution(Record):
    """A response and its steps: a line of labels.jsonl, once the steps have labels."""

    problem: str
    prompt_ids: Ids
    token_ids: Ids
    gold: bool
    finished: bool
    answer_reward: float | None
    ends: tuple[int, ...]  # numbers of the response tokens that end a step
    labels: tuple[int, ...]  # of every step, 1 for right; () as long as there are none
    outcomes: tuple[str, ...]  # of every step's continuations, "0110"; "" where nothing was simulated
    truth: tuple[bool, ...] = ()  # of every step, where a task knows it (`truth.with_truth`)


def load_reward_model(config: Settings, folder: Path | None = None, seed: int = 0, threads: int = 0) -> PreTrainedModel:
    """The reward model in `folder`; without one, a new one that is ready for training.

    Args:
        folder: an adapter, or a whole model.
        seed: of the new head and adapter.
        threads: 0 leaves their number as it is.

    Raises:
        FileNotFoundError: `folder` holds no reward model.
    """
    if threads:
        torch.set_num_threads(threads)
    if folder is not None and not load.is_adapter(folder):
        model = load.load_whole(config.model, folder, "reward model", "01b_reward", AutoModelForTokenClassification)
        head_of(model).float()
        for file in folder.glob("*.safetensors"):  # the head as it was saved: loading has rounded it to `dtype`
            head = {k.rpartition(".")[2]: v for k, v in load_file(file).items() if k.partition(".")[0] in HEADS}
            head_of(model).load_state_dict({**head_of(model).state_dict(), **head})
        return model.eval()

    torch.manual_seed(seed)  # the head is new
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # which it would warn of
    try:
        model = load.load_base(config.model, AutoModelForTokenClassification, HEADS, num_labels=2)
    finally:
        logging.set_verbosity(before)
    # Two logits cost nothing, and training steps would round away in 16 bits. Before an adapter copies the head.
    head_of(model).float()
    if folder is not None:
        return PeftModel.from_pretrained(model, folder).eval()
    if config.model.tuning == "full":
        return model
    lora = LoraConfig(
        r=config.process.lora_r,
        lora_alpha=2 * config.process.lora_r,
        target_modules="all-linear",
        modules_to_save=[name for name in HEADS if hasattr(model, name)],  # trained whole, without an adapter
        lora_dropout=0.0,
        task_type="TOKEN_CLS",
    )
    return get_peft_model(model, lora)


def head_of(model: PreTrainedModel) -> torch.nn.Module:
    return next(getattr(causal_model(model), name) for name in HEADS if hasattr(causal_model(model), name))


def step_batch(solutions: Sequence[Solution]) -> dict[str, Tensor]:
    """The responses up to their last step, and where steps end: `row` and `column` [steps], and `labels` if there are.

    The state that has read response token e is number e + 1, since the first has read the prompt alone.
    """
    batch = collate([(s.prompt_ids, [*s.token_ids[: s.ends[-1] + 1], 0]) for s in solutions])
    batch["row"] = torch.tensor([i for i, s in enumerate(solutions) for _ in s.ends])
    batch["column"] = torch.tensor([end + 1 for s in solutions for end in s.ends])
    if solutions[0].labels:
        batch["labels"] = torch.tensor([label for s in solutions for label in s.labels])
    return batch


def step_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The logits of wrong and right at every step of a batch, [steps, 2]."""
    states = response_states(model, batch)
    return head_of(model)(states[batch["row"], batch["column"]].float())


@torch.no_grad()
def score(model: PreTrainedModel, solutions: Sequence[Solution], max_rows: int = 64) -> list[list[float]]:
    """P(right so far) at the end of every step, [solutions][steps]. `max_rows` responses are read at once."""
    model.eval()
    scores: list[list[float]] = [[] for _ in solutions]

    order = sorted((i for i, s in enumerate(solutions) if s.ends), key=lambda i: size(solutions[i]))
    for start in range(0, len(order), max_rows):
        part = order[start : start + max_rows]
        batch = to_device(step_batch([solutions[i] for i in part]), model)
        right = iter(step_logits(model, batch).softmax(-1)[:, 1].tolist())
        for i in part:
            scores[i] = list(islice(right, len(solutions[i].ends)))
    return scores


class StepTrainer(Trainer):
    """The transformers Trainer with cross-entropy at step ends."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # A mean over the steps of the whole batch: one over each micro-batch would weigh steps of short solutions more.
        found = torch.nn.functional.cross_entropy(step_logits(model, inputs), inputs["labels"], reduction="sum")
        loss = found / num_items_in_batch
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the reward model's loss is {loss.item()}; lower process.lr")
        return loss


def train(config: Settings, solutions: list[Solution], folder: Path, seed: int) -> dict[str, Any]:
    """Train a reward model on labelled `solutions` and leave it in `folder`/reward_model; a killed training goes on.

    `config.process` has rate, rank, batch and length.

    Returns:
        steps; and of the held-out problems' steps: their number, the share that is labelled right, accuracy, and AUC
        (None where all have one label).

    Raises:
        ValueError: there are fewer than two problems, so that none can be held out.
    """
    solutions = [s for s in solutions if s.ends]
    problems = sorted({s.problem for s in solutions})
    if len(problems) < 2:
        raise ValueError("the reward model needs labelled steps of at least two problems, one of which is held out")
    held_out = set(random.Random(seed).sample(problems, max(1, round(HELD_OUT * len(problems)))))
    trained = [s for s in solutions if s.problem not in held_out]
    model = load_reward_model(config, seed=seed, threads=config.threads).train()
    settings = training_settings(config, len(trained))
    order = training_order([s.problem for s in trained], settings, seed)
    data = [trained[i] for i in sorted_in_batches(order, settings.batch, lambda i: size(trained[i]))]
    steps = len(data) // settings.batch
    arguments = trainer_arguments(folder, settings, steps, seed, save_strategy="steps", save_steps=SAVE_EVERY)
    trainer = StepTrainer(model, arguments, train_dataset=data, data_collator=step_batch, callbacks=[Mark()])
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = True  # so it says how many labels a batch has, and divides nothing itself
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    facts = {
        "steps": steps,
        "solutions": len(trained),
        "trained_tokens": sum(len(s.prompt_ids) + len(s.token_ids) for s in data),
        **held_out_facts(model, solutions, held_out),
    }
    fresh = folder / "reward_model.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    load.save(model, fresh)
    write_json(fresh / "facts.json", facts)
    fresh.rename(folder / "reward_model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return facts


def training_settings(config: Settings, count: int) -> TrainConfig:
    """How the reward model is trained on `count` solutions: as policies are, but for what `config.process` says."""
    batch = min(config.process.batch, count)
    largest = min(batch, 2 * config.train.micro_batch)
    return config.train.but(
        processes=1,
        shard=False,
        lr=config.process.lr,
        batch=batch,
        micro_batch=next(size for size in range(largest, 0, -1) if batch % size == 0),
        max_steps=config.process.max_steps,
        max_epochs=config.process.max_epochs,
        pairs_together=TOGETHER,
    )


def size(solution: Solution) -> tuple[int, str, int]:
    """What a batch is sorted by: its neighbours are about as long and share a prompt."""
    return len(solution.prompt_ids), solution.problem, len(solution.token_ids)


def held_out_facts(model: PreTrainedModel, solutions: list[Solution], held_out: set[str]) -> dict[str, Any]:
    """How well the model tells the labels of the held-out problems' steps."""
    tested = [s for s in solutions if s.problem in held_out]
    labels = [label for s in tested for label in s.labels]
    scores = [p for found in score(model, tested) for p in found]
    count = max(1, len(labels))
    return {
        "held_out_steps": len(labels),
        "held_out_right": sum(labels) / count,
        "held_out_accuracy": sum((p > 0.5) == bool(y) for p, y in zip(scores, labels, strict=True)) / count,
        "held_out_auc": auc(scores, labels),
    }
