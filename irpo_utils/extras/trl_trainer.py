"""The training stage with TRL's DPOTrainer, `train.engine=trl`: what `model/training.train` does, with TRL's loss.

The sampled token ids are what is trained on: TRL is given ids and its tokenizing is passed by, so that no BOS or EOS is
added. The pairs come in our order, with the reference log-probabilities that our own engine would use. A killed run
goes on at its last checkpoint.

It differs from our own engine in two ways.

* The NLL. Ours is the paper's: divided by the response's length sequence by sequence, then averaged over pairs. TRL
  takes one mean over all chosen tokens of a micro-batch, so that long responses weigh more. The test's two pairs, with
  11 and 18 chosen tokens, have a loss of 1.0418 in our engine and of 0.9579 in TRL's. With one pair per micro-batch the
  two agree.
* The work. Every response runs its prompt again, and responses that occur twice in a micro-batch are run twice.

TRL has the losses `dpo` and `dpo_nll`, for pairs and a policy that starts as its reference. Others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from ..files import ConfigError
from ..model import losses
from ..model.load import causal_model
from ..model.logprobs import check_head
from ..model.records import Pair
from ..model.training import (
    Loss,
    Recorder,
    check_sampled,
    check_start,
    kept_reference_logps,
    last_checkpoint,
    pair_tokens,
    sorted_in_batches,
    trainer_arguments,
    training_order,
)
from ..settings import TrainConfig

LOSS_TYPES = {losses.dpo: ["sigmoid"], losses.dpo_nll: ["sigmoid", "sft"]}


class TokenTrainer(DPOTrainer):
    """DPOTrainer on rows of `trl_row`: token ids and known reference log-probabilities.

    `terms` holds the means of the last step's micro-batches, for the log.
    """

    def __init__(self, model: PreTrainedModel, arguments: DPOConfig, rows: list[dict[str, Any]], recorder: Recorder):
        adapters = [p for p in model.parameters() if p.requires_grad]
        weights = [p.data for p in adapters]
        configs = (causal_model(model).config.get_text_config(), causal_model(model).generation_config)
        pads = [config.pad_token_id for config in configs]
        # TRL asks for a tokenizer, but needs only its padding for rows of ids. This one has nothing else, since a
        # policy may be a folder of weights without a tokenizer.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
        )
        data = Dataset.from_list(rows)
        super().__init__(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[recorder])
        self.remove_callback(PrinterCallback)  # prints a line of the Trainer's own bookkeeping
        # What TRL has changed in the model is taken back, since the model is saved, sampled and trained on afterwards:
        self.processing_class = None  # would put its special tokens into the model's configuration
        for config, pad in zip(configs, pads, strict=True):
            config.pad_token_id = pad
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")  # a frozen copy to score the reference with, which is done already
        for parameter, weight in zip(adapters, weights, strict=True):
            parameter.data = weight  # on a 4-bit base TRL rounds the adapter to 16 bits, too few for a LoRA step
        self.terms: list[dict[str, float]] = []

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # it holds token ids already

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # it holds them already

    def _send_telemetry(self) -> None:
        """Training sends nothing anywhere."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        loss = super().compute_loss(model, inputs)
        if not torch.isfinite(loss):
            step, lr = self.state.global_step + 1, self.args.learning_rate
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower train.lr (it is {lr:g})")
        logged = {name: values[-1] for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        chosen = logged["logps/chosen"]
        chosen_mask, _ = inputs["completion_mask"].chunk(2)
        nll = -chosen * len(chosen_mask) / chosen_mask.sum().item()  # TRL's: a mean over all chosen tokens
        alpha = self.loss_weights[1] if "sft" in self.loss_types else 0.0
        self.terms.append(
            {
                "loss": loss.item(),
                "dpo": loss.item() - alpha * nll,
                "nll": nll,
                "chosen_logp": chosen,
                "rejected_logp": logged["logps/rejected"],
                "margin": logged["rewards/margins"],
                "accuracy": logged["rewards/accuracies"],
            }
        )
        return loss

    def give_back(self) -> None:
        """Take TRL's forward off the model again: it holds the model in a circle."""
        vars(causal_model(self.model)).pop("forward", None)

    @torch.no_grad()
    def dpo_at_start(self, rows: list[dict[str, Any]]) -> Tensor:
        """The DPO terms [rows] of the policy as it is now; TRL tells a micro-batch's mean, which stands for each."""
        self.model.train()
        size = self.args.per_device_train_batch_size
        found: list[float] = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            self.compute_loss(self.model, self._prepare_inputs(self.data_collator(part)))
            found += [self.terms.pop()["dpo"]] * len(part)
        return torch.tensor(found)


def check(loss: Loss, pairs: list[Pair], reference_is_start: bool) -> None:
    """Raise a ConfigError for what TRL's DPOTrainer does not train."""
    for refused, why in (
        (loss not in LOSS_TYPES, f"trl has no loss {getattr(loss, '__name__', loss)!r} here, only dpo and dpo_nll"),
        (not reference_is_start, "trl's policy starts as its reference, and this method's does not"),
        (not all(pair.rejected_ids for pair in pairs), "trl needs a rejected response for every chosen one"),
    ):
        if refused:
            raise ConfigError(f"train.engine: {why}; set train.engine=own")


def trl_arguments(plain: TrainingArguments, loss: Loss, weights: dict[str, float]) -> DPOConfig:
    """The arguments of our own engine with TRL's beside them; what TRL would set otherwise stays as it is there."""
    arguments = DPOConfig(
        **{f.name: getattr(plain, f.name) for f in fields(plain) if f.init},
        loss_type=LOSS_TYPES[loss],
        loss_weights=[1.0, weights["alpha"]] if loss is losses.dpo_nll else [1.0],
        beta=weights["beta"],
        max_length=None,  # nothing is cut
        precompute_ref_log_probs=True,
    )
    arguments._n_gpu = plain._n_gpu
    return arguments


def train(
    model: PreTrainedModel,
    pairs: list[Pair],
    folder: Path,
    *,
    loss: Loss,
    weights: dict[str, float],
    has_reference: bool,
    config: TrainConfig,
    seed: int,
    sampled_by_start: bool,
    reference_is_start: bool = True,
    score: Callable[[PreTrainedModel], float] | None = None,
    stop_after: int | None = None,
    keep_reference: tuple[Path, Any] | None = None,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train `model` on `pairs` in place with TRL and leave the best policy in `folder`/best.

    Args:
        loss: `losses.dpo` or `losses.dpo_nll`. weights: its "beta", and "alpha" for the latter.

    Returns:
        What `model/training.train` returns.

    Raises:
        ConfigError: TRL does not train that loss on those pairs.
        RuntimeError: the DPO term before the first step is not ln 2, or the pairs are not samples of `model`.
    """
    check(loss, pairs, reference_is_start)
    folder.mkdir(parents=True, exist_ok=True)
    exact = next(model.parameters()).dtype == torch.float32
    tolerance = 1e-3 if exact else 5e-2
    check_head(model.eval())
    start_logps = kept_reference_logps(model, pairs, 2 * config.micro_batch, keep_reference)
    gap = check_sampled(pairs, start_logps, tolerance, exact) if sampled_by_start else None
    rows = [trl_row(pair, logps) for pair, logps in zip(pairs, start_logps, strict=True)]

    order = training_order([pair.problem for pair in pairs], config, seed)
    steps = len(order) // config.batch
    trained = sum(pair_tokens(pairs[i]) for i in order[: config.batch * (stop_after or steps)])
    if config.micro_batch < config.batch:  # less padding
        order = sorted_in_batches(
            order, config.batch, lambda i: (len(pairs[i].prompt_ids), pairs[i].problem, len(pairs[i].chosen_ids))
        )
    recorder = Recorder(folder, config.eval_every, score, show, stop_after)
    plain = trainer_arguments(folder, config, steps, seed, save_strategy="no")  # the recorder asks for checkpoints
    trainer = TokenTrainer(model, trl_arguments(plain, loss, weights), [rows[i] for i in order], recorder)
    start = check_start(trainer.dpo_at_start(rows[: max(16, config.micro_batch)]), tolerance)
    recorder.trainer = trainer
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None or int(checkpoint.rpartition("-")[2]) < min(steps, stop_after or steps):
        trainer.train(resume_from_checkpoint=checkpoint)
    recorder.trainer = None  # trainer and recorder hold each other, and with them the model and its optimizer
    trainer.give_back()
    best = json.loads((folder / "best" / "best.json").read_text())
    return {
        "best_step": best["step"],
        "best_score": best["score"],
        "steps": steps,
        "dpo_at_start": start,
        "sampler_gap": gap,
        "trained_tokens": trained,
    }


def trl_row(pair: Pair, reference: tuple[float, float]) -> dict[str, Any]:
    """A pair, and the reference's log-probabilities of its two responses, under the names that TRL's collator knows."""
    return {
        "prompt_ids": list(pair.prompt_ids),
        "chosen_ids": list(pair.chosen_ids),
        "rejected_ids": list(pair.rejected_ids),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
