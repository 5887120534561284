"""The training stage with TRL's trainers, `train.engine=trl`: what `model/training.train` does, with TRL's losses.

The sampled token ids are what is trained on: TRL is given ids and its tokenizing is passed by, so that no BOS or EOS is
added. The pairs come in our order, with the reference log-probabilities or advantages that our own engine would use. A
killed run goes on at its last checkpoint.

It differs from our own engine in three ways.

* The NLL. Ours is the paper's: divided by the response's length sequence by sequence, then averaged over pairs.
  DPOTrainer takes one mean over all chosen tokens of a micro-batch, so that long responses weigh more. The test's two
  pairs, with 10 and 16 chosen tokens, have a loss of 1.5850 in our engine and of 1.6662 in TRL's. With one pair per
  micro-batch the two agree. ORPOTrainer takes that mean over the prompts' tokens, too.
* The value of a policy gradient's loss, which GRPOTrainer makes of ratios that are 1. Its gradient is ours.
* The work. Every response runs its prompt again, and responses that occur twice in a micro-batch are run twice.

What TRL trains here is in `ENGINES`; a policy with a reference starts as that reference. Other losses are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from ..files import ConfigError
from ..model import losses, training
from ..model.load import causal_model
from ..model.logprobs import padded
from ..model.records import Pair
from ..model.training import Loss, finite

Weights = dict[str, float]


@contextlib.contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Take back what TRL has changed in the model, since it is saved, sampled and trained on afterwards."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    before = [p.data for p in adapters]
    configs = (causal_model(model).config.get_text_config(), causal_model(model).generation_config)
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = [{name: getattr(config, name) for name in special} for config in configs]
    yield
    for config, own in zip(configs, ids, strict=True):
        for name, value in own.items():
            setattr(config, name, value)
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")  # a frozen copy to score the reference with, which is done already
    for parameter, weight in zip(adapters, before, strict=True):
        parameter.data = weight  # on a 4-bit base TRL rounds the adapter to 16 bits, too few for a LoRA step


class OnIds:
    """What the trainers share: they are made of pairs of token ids, and of the arguments of our own engine.

    `row` turns a pair into a row, under the names that TRL's collator knows. `options` are what TRL's constructor asks
    for besides. `terms` holds the means of the last step's micro-batches, for the log.
    """

    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        *,
        train_dataset: list[Pair],
        callbacks: list[TrainerCallback],
        loss: Loss,
        weights: Weights,
    ):
        rows = Dataset.from_list([self.row(pair) for pair in train_dataset])
        # TRL asks for a tokenizer, but needs only its padding for rows of ids. This one has nothing else, since a
        # policy may be a folder of weights without a tokenizer.
        only = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=only, pad_token="<pad>", eos_token="<pad>")
        arguments = trl_arguments(arguments, loss, weights)
        with as_it_was(model):
            super().__init__(
                model,
                args=arguments,
                train_dataset=rows,
                processing_class=tokenizer,
                callbacks=callbacks,
                **self.options,
            )
        self.train_dataset = rows
        self.remove_callback(PrinterCallback)  # prints a line of the Trainer's own bookkeeping
        self.processing_class = None  # would put its special tokens into the model's configuration
        self.terms: list[dict[str, float]] = []

    def _send_telemetry(self) -> None:
        """Training sends nothing anywhere."""


class TokenTrainer(OnIds, DPOTrainer):
    """DPOTrainer on token ids and known reference log-probabilities."""

    @staticmethod
    def row(pair: Pair) -> dict[str, Any]:
        return {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
            "ref_chosen_logps": pair.reference_chosen,
            "ref_rejected_logps": pair.reference_rejected,
        }

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # it holds token ids already

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # it holds them already

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        loss = finite(self, super().compute_loss(model, inputs))
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
        self.compute_loss(self.model, self._prepare_inputs(self.data_collator([self.row(pair) for pair in pairs])))
        return torch.full((len(pairs),), self.terms.pop()["dpo"])


class OddsTrainer(OnIds, ORPOTrainer):
    """ORPOTrainer on token ids."""

    @staticmethod
    def row(pair: Pair) -> dict[str, Any]:
        row = {"prompt_input_ids": list(pair.prompt_ids), "prompt_attention_mask": [1] * len(pair.prompt_ids)}
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            row[f"{side}_input_ids"] = [*pair.prompt_ids, *ids]
            row[f"{side}_attention_mask"] = [1] * (len(pair.prompt_ids) + len(ids))
            row[f"{side}_labels"] = [*[-100] * len(pair.prompt_ids), *ids]
        return row

    def tokenize_row(self, feature: dict[str, Any], model: PreTrainedModel | None = None) -> dict[str, Any]:
        return feature  # it holds token ids already

    def odds_ratio_loss(self, chosen: Tensor, rejected: Tensor) -> Any:
        self.per_token = chosen.detach(), rejected.detach()
        return super().odds_ratio_loss(chosen, rejected)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        loss = finite(self, super().compute_loss(model, inputs))
        logged = {name: values[-1] for name, values in self._stored_metrics["train"].items()}
        self._stored_metrics["train"].clear()
        lengths = [(inputs[f"{side}_labels"] != -100).sum(-1) for side in ("chosen", "rejected")]
        chosen, rejected = (mean * length for mean, length in zip(self.per_token, lengths, strict=True))
        self.terms.append(
            {
                "loss": loss.item(),
                "nll": logged["nll_loss"],
                "odds": -logged["log_odds_ratio"],
                "chosen_logp": chosen.mean().item(),
                "rejected_logp": rejected.mean().item(),
                "margin": logged["log_odds_chosen"],
                "accuracy": logged["rewards/accuracies"],
            }
        )
        return loss


class GroupTrainer(OnIds, GRPOTrainer):
    """GRPOTrainer on responses that were drawn before, each with its advantage."""

    options: ClassVar[dict[str, Any]] = {"reward_funcs": lambda completions, **columns: [0.0] * len(completions)}

    @staticmethod
    def row(pair: Pair) -> dict[str, Any]:
        found = {"prompt_ids": list(pair.prompt_ids), "completion_ids": list(pair.chosen_ids)}
        return found | {"advantage": pair.reward_gap, "prompt": ""}  # the last is what TRL looks for

    # A response comes once, in our order, and nothing is drawn.
    _get_train_sampler = Trainer._get_train_sampler
    _prepare_inputs = Trainer._prepare_inputs

    def get_train_dataloader(self) -> Any:
        self.data_collator = self.collated
        return Trainer.get_train_dataloader(self)

    @staticmethod
    def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch as GRPOTrainer takes it: prompts end where responses begin."""
        prompts, prompt_mask = padded([row["prompt_ids"] for row in rows], left=True)
        responses, mask = padded([row["completion_ids"] for row in rows])
        return {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": responses,
            "completion_mask": mask,
            "advantages": torch.tensor([row["advantage"] for row in rows]),
        }

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.per_token = found[0].detach()
        return found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        loss = finite(self, self._compute_loss(model, inputs))
        self._metrics["train"].clear()
        mask = inputs["completion_mask"]
        logps = (self.per_token * mask).sum(-1)
        nll = -(logps / mask.sum(-1)).mean().item()
        loss_now = loss.item() * self.current_gradient_accumulation_steps
        self.terms.append({"loss": loss_now, "nll": nll, "chosen_logp": logps.mean().item(), "rejected_logp": 0.0})
        return loss


# What trains a loss, and what it is called there.
ENGINES: dict[Loss, tuple[type[OnIds], type[TrainingArguments], dict[str, Any]]] = {
    losses.dpo: (TokenTrainer, DPOConfig, {"loss_type": ["sigmoid"]}),
    losses.dpo_nll: (TokenTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"]}),
    losses.orpo: (OddsTrainer, ORPOConfig, {}),
    losses.policy_gradient: (GroupTrainer, GRPOConfig, {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    losses.policy_gradient_mean: (GroupTrainer, GRPOConfig, {"loss_type": "grpo"}),
}


def check(loss: Loss, pairs: list[Pair], has_reference: bool, reference_is_start: bool) -> None:
    """Raise a ConfigError for what TRL's trainers do not train."""
    if loss not in ENGINES:
        known = ", ".join(one.__name__ for one in ENGINES)
        raise ConfigError(
            f"train.engine: trl has no loss {getattr(loss, '__name__', loss)!r} here, only {known}; "
            "set train.engine=own"
        )
    alone = ENGINES[loss][0] is GroupTrainer
    for refused, why in (
        (any(p.chosen_inserted or p.rejected_inserted for p in pairs), "trl would train on what a calculator wrote"),
        (has_reference and not reference_is_start, "trl's policy starts as its reference, and this method's does not"),
        (
            not alone and not all(pair.rejected_ids for pair in pairs),
            "trl needs a rejected response for every chosen one",
        ),
    ):
        if refused:
            raise ConfigError(f"train.engine: {why}; set train.engine=own")


def trl_arguments(plain: TrainingArguments, loss: Loss, weights: Weights) -> TrainingArguments:
    """The arguments of our own engine with TRL's beside them; what TRL would set otherwise stays as it is there."""
    _, kind, own = ENGINES[loss]
    own = dict(own)
    if kind is DPOConfig:
        own = own | {
            "loss_weights": [1.0, weights["alpha"]] if loss is losses.dpo_nll else [1.0],
            "beta": weights["beta"],
        }
        own |= {"precompute_ref_log_probs": True, "max_length": None}  # nothing is cut
    elif kind is ORPOConfig:
        own |= {"beta": weights["odds_weight"], "max_length": 2**31 - 1}
    else:
        own |= {"beta": 0.0, "temperature": 1.0, "num_generations": 2}  # the last is of no use here
    arguments = kind(**{f.name: getattr(plain, f.name) for f in fields(plain) if f.init}, **own)
    arguments._n_gpu = plain._n_gpu
    return arguments


def train(
    model: PreTrainedModel,
    pairs: list[Pair],
    folder: Path,
    *,
    loss: Loss,
    has_reference: bool,
    reference_is_start: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """`model/training.train` with TRL: the same arguments, files and facts, for the losses of `ENGINES`.

    Raises:
        ConfigError: TRL does not train that loss on those pairs. Else as `model/training.train`.
    """
    check(loss, pairs, has_reference, reference_is_start)
    options |= {"has_reference": has_reference, "engine": ENGINES[loss][0]}
    facts = training.train(model, pairs, folder, loss=loss, **options)
    vars(causal_model(model)).pop("forward", None)  # TRL's, which holds the model in a circle
    return facts
