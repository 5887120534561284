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

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from ..files import ConfigError
from ..model import losses, training
from ..model.load import causal_model
from ..model.records import Pair
from ..model.training import Loss

LOSS_TYPES = {losses.dpo: ["sigmoid"], losses.dpo_nll: ["sigmoid", "sft"]}


class TokenTrainer(DPOTrainer):
    """DPOTrainer on rows of `trl_row`: token ids and known reference log-probabilities.

    `terms` holds the means of the last step's micro-batches, for the log.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        *,
        train_dataset: list[Pair],
        callbacks: list[TrainerCallback],
        loss: Loss,
        weights: dict[str, float],
    ):
        adapters = [p for p in model.parameters() if p.requires_grad]
        before = [p.data for p in adapters]
        configs = (causal_model(model).config.get_text_config(), causal_model(model).generation_config)
        pads = [config.pad_token_id for config in configs]
        # TRL asks for a tokenizer, but needs only its padding for rows of ids. This one has nothing else, since a
        # policy may be a folder of weights without a tokenizer.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
        )
        super().__init__(
            model,
            args=trl_arguments(arguments, loss, weights),
            train_dataset=Dataset.from_list([trl_row(pair) for pair in train_dataset]),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # prints a line of the Trainer's own bookkeeping
        # What TRL has changed in the model is taken back, since the model is saved, sampled and trained on afterwards:
        self.processing_class = None  # would put its special tokens into the model's configuration
        for config, pad in zip(configs, pads, strict=True):
            config.pad_token_id = pad
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")  # a frozen copy to score the reference with, which is done already
        for parameter, weight in zip(adapters, before, strict=True):
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

    def dpo_terms(self, pairs: list[Pair]) -> Tensor:
        """The DPO terms [pairs] of the policy as it is now; TRL tells their mean, which stands for each."""
        self.compute_loss(self.model, self._prepare_inputs(self.data_collator([trl_row(pair) for pair in pairs])))
        return torch.full((len(pairs),), self.terms.pop()["dpo"])


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
    reference_is_start: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """`model/training.train` with TRL: the same arguments, files and facts, for the losses `dpo` and `dpo_nll`.

    Raises:
        ConfigError: TRL does not train that loss on those pairs. Else as `model/training.train`.
    """
    check(loss, pairs, reference_is_start)
    facts = training.train(model, pairs, folder, loss=loss, engine=TokenTrainer, **options)
    vars(causal_model(model)).pop("forward", None)  # TRL's, which holds the model in a circle
    return facts


def trl_row(pair: Pair) -> dict[str, Any]:
    """A pair whose reference is scored, under the names that TRL's collator knows."""
    return {
        "prompt_ids": list(pair.prompt_ids),
        "chosen_ids": list(pair.chosen_ids),
        "rejected_ids": list(pair.rejected_ids),
        "ref_chosen_logps": pair.reference_chosen,
        "ref_rejected_logps": pair.reference_rejected,
    }
