"""Train M_{t+1} from M_t on one iteration's pairs, with the transformers Trainer and the losses of `losses.py`.

What is added to the Trainer: the paper's loss, reference log-probabilities computed once before the first step, two
checks that refuse to start (the DPO term must be ln 2, and the sampled tokens must have the log-probability that the
sampler saw), metrics on disk as they happen, and the step that is best on dev kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..files import write_json, write_jsonl
from .load import save
from .logprobs import Pair, check_head, pair_batch, reference_logps, response_logps, to_device
from .losses import REFERENCE_FREE, pair_losses

LN2 = math.log(2)


def training_order(
    count: int,
    batch: int,
    max_steps: int,
    max_epochs: int,
    seed: int,
    problems: list[str] | None = None,
    together: int = 1,
) -> list[int]:
    """Which pair comes when: whole shuffled passes over `count` pairs, cut to `max_steps` batches or `max_epochs`.

    With `together` above 1 up to so many pairs of one problem (`problems` [count] names each pair's) follow one another, so
    that they share their prompt in a batch: less work, and a gradient from fewer problems.
    """
    rng, order = random.Random(seed), []
    steps = min(max_steps, max(1, count * max_epochs // batch))
    while len(order) < steps * batch:
        shuffled = rng.sample(range(count), count)
        if together > 1:
            groups: dict[str, list[list[int]]] = {}
            for i in shuffled:
                mine = groups.setdefault(problems[i], [[]])
                if len(mine[-1]) == together:
                    mine.append([])
                mine[-1].append(i)
            parts = [part for mine in groups.values() for part in mine]
            shuffled = [i for part in rng.sample(parts, len(parts)) for i in part]
        order += shuffled
    return order[: steps * batch]


def pair_tokens(pair: Pair) -> int:
    """Tokens of prompt and response, on both sides: what a step costs that shares nothing."""
    return sum(len(pair["prompt_ids"]) + len(ids) for ids in (pair["chosen_ids"], pair["rejected_ids"]) if ids)


def batch_losses(
    model: PreTrainedModel, batch: dict[str, Tensor], loss: str, beta: float, alpha: float, odds_weight: float = 0.1
):
    """The `PairLosses` of a batch made by `pair_batch`, and the policy's (chosen, rejected) log-probabilities [pairs]."""
    logps = response_logps(model, batch)
    chosen = logps[batch["chosen"]]
    rejected = torch.where(batch["rejected"] < 0, torch.zeros_like(chosen), logps[batch["rejected"]])
    reference = (None, None) if loss in REFERENCE_FREE else batch["reference"].to(logps.dtype).unbind(-1)
    terms = pair_losses(
        loss, chosen, rejected, *reference, batch["lengths"], beta, alpha,
        rejected_lengths=batch["rejected_lengths"], odds_weight=odds_weight,
    )  # fmt: skip
    return terms, chosen, rejected


def trainer_arguments(
    folder: Path, config, steps: int, batch: int, micro_batch: int, lr: float, seed: int, **more: Any
) -> TrainingArguments:
    """How every model here is trained: `steps` batches in the order given, at a rate that warms up and falls to 0.

    Args:
        folder: gets `checkpoints/`. config: a `TrainConfig`, whose own rate and sizes are not looked at. more: when to save.
    """
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        learning_rate=lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        weight_decay=0.0,
        optim={"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}[config.optimizer],
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",  # the order is the shuffle, so that a resumed run sees the same batches
        save_total_limit=2,  # the one before goes only after the new one has its mark
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
        **more,
    )
    arguments._n_gpu = 1  # one process, one device: the Trainer would split batches over all GPUs that it sees
    return arguments


class PreferenceTrainer(Trainer):
    """The transformers Trainer with the loss of a method; `terms` holds the last step's means for the log."""

    def __init__(self, *args: Any, loss: str, beta: float, alpha: float, odds_weight: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # prints a line of the Trainer's own bookkeeping
        # Our loss is a mean over pairs, so the Trainer must divide by the accumulation steps itself.
        self.model_accepts_loss_kwargs = False
        self.loss, self.weights = loss, (beta, alpha, odds_weight)
        self.terms: list[dict[str, float]] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms, chosen, rejected = batch_losses(model, inputs, self.loss, *self.weights)
        loss = terms.total.mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower train.lr (it is {self.args.learning_rate:g})"
            )
        values = {
            "loss": loss, "dpo": terms.dpo, "nll": terms.nll, "odds": terms.odds, "chosen_logp": chosen, "rejected_logp": rejected,
        }  # fmt: skip
        if terms.chosen_reward is not None:
            margin = terms.chosen_reward - terms.rejected_reward
            values |= {"margin": margin, "accuracy": (margin > 0).float()}
        self.terms.append({k: v.detach().double().mean().item() for k, v in values.items() if v is not None})
        return loss


class Recorder(TrainerCallback):
    """Writes every step's terms to disk, scores dev, and keeps the policy that is best there."""

    def __init__(
        self,
        folder: Path,
        every: int,
        score: Callable[[PreTrainedModel], float] | None,
        show: Callable[[str], None],
        stop_after: int | None = None,
    ):
        self.folder, self.every, self.score, self.show, self.stop_after = folder, every, score, show, stop_after
        self.trainer: PreferenceTrainer | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        rewind(self.folder, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step, terms = state.global_step, self.trainer.terms
        last = step in (self.stop_after, state.max_steps)
        control.should_training_stop |= last
        row = {"step": step, **{name: sum(t[name] for t in terms) / len(terms) for name in terms[0]}}
        terms.clear()
        if step % self.every == 0 or last:
            control.should_save = True
            if self.score:
                torch.cuda.empty_cache()  # does nothing without CUDA; sampling needs what training's last step left
                row["dev_greedy"] = self.score(model)
                torch.cuda.empty_cache()
                model.train()
            self._keep_best(model, step, row.get("dev_greedy", float(step)))
        with open(self.folder / "steps.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        if "dev_greedy" in row:
            self.show(f"step {step}/{state.max_steps}  loss {row['loss']:.3f}  dev {row['dev_greedy']:.1%}")

    def _keep_best(self, model: PreTrainedModel, step: int, score: float) -> None:
        best = self.folder / "best"
        if best.exists() and json.loads((best / "best.json").read_text())["score"] >= score:
            return
        if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
            lr = self.trainer.args.learning_rate
            raise FloatingPointError(f"the weights are not finite after step {step}; lower train.lr (it is {lr:g})")
        fresh = self.folder / "best.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        save(model, fresh)
        (fresh / "best.json").write_text(json.dumps({"step": step, "score": score}))
        shutil.rmtree(best, ignore_errors=True)
        fresh.rename(best)

    def on_save(self, args, state, control, **kwargs):
        # A checkpoint counts only with this mark: a run killed while saving leaves one without it. What was recorded
        # so far is part of it, since a resumed run goes on from here.
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (checkpoint / "complete").touch()


def rewind(folder: Path, step: int) -> None:
    """Forget what was recorded after `step`, so that a resumed run ends with the same record as an undisturbed one."""
    path = folder / "steps.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the line in flight when the run was killed
                break
    write_jsonl(path, (r for r in rows if r["step"] <= step))
    best = folder / "best"
    if best.exists() and (
        not (best / "best.json").exists() or json.loads((best / "best.json").read_text())["step"] > step
    ):
        shutil.rmtree(best)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; half-written ones are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / "complete").exists():
            found.append(path)
        else:
            shutil.rmtree(path)
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


def check_start(terms: Tensor, tolerance: float) -> float:
    """The mean of the DPO terms [pairs] before the first step, for a loss that has a reference.

    Raises:
        RuntimeError: it is not ln 2, so that policy and reference are not the same model (a wrong reference, dropout
            left on, or another adapter loaded).
    """
    dpo = terms.mean().item()
    if not abs(dpo - LN2) < tolerance:
        raise RuntimeError(
            f"the DPO term before the first step is {dpo:.6f}, not ln 2 = {LN2:.6f}: the policy is not its reference; "
            "check that both are M_t and that dropout is off"
        )
    return dpo


def check_sampled(pairs: list[Pair], tolerance: float, exact: bool = True) -> float:
    """Difference per token between the sampler's log-probabilities and the reference's, nats: the largest of all responses.

    Without `exact` (16-bit weights, where every batch shape rounds differently) it is their mean.

    Raises:
        RuntimeError: it exceeds `tolerance`: the sampler did not run the model that is trained.
    """
    gaps = [
        abs(p[f"{side}_logp"] - p[f"reference_{side}"]) / len(p[f"{side}_ids"])
        for p in pairs
        for side in ("chosen", "rejected")
        if p[f"{side}_logp"] is not None
    ]
    worst = (max(gaps) if exact else sum(gaps) / len(gaps)) if gaps else 0.0
    if not worst < tolerance:
        raise RuntimeError(
            f"the sampler saw other log-probabilities than the reference (off by {worst:.4f} nats per token): "
            "the pairs are not samples of M_t; run 01_sample and 02_pairs again"
        )
    return worst


def kept_reference_logps(
    model: PreTrainedModel, pairs: list[Pair], rows: int, keep: tuple[Path, Any] | None
) -> list[tuple[float, float]]:
    """`reference_logps`, read from the file in `keep` if it is about these pairs and what `keep` names beside it, else written there.

    So training that goes on after a kill, or again at another rate, does not score the pairs anew.
    """
    if keep is None:
        return reference_logps(model, pairs, rows)
    file, named = keep
    about = [named, rows, [[p["problem"], p["prompt_ids"], p["chosen_ids"], p["rejected_ids"]] for p in pairs]]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged: scored anew
        found = json.loads(file.read_text())
        if found["key"] == key:
            return [tuple(pair) for pair in found["logps"]]
    logps = reference_logps(model, pairs, rows)
    write_json(file, {"key": key, "logps": logps})
    return logps


def train(
    model: PreTrainedModel,
    pairs: list[Pair],
    folder: Path,
    *,
    loss: str,
    config,
    seed: int,
    sampled_by_start: bool,
    score: Callable[[PreTrainedModel], float] | None = None,
    stop_after: int | None = None,
    keep_reference: tuple[Path, Any] | None = None,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train `model` on `pairs` in place and leave the best policy in `folder`/best; a killed run goes on where it was.

    Args:
        model: M_t (or M_0), trainable. It is the reference too, so its log-probabilities are taken before step 1 (not for a
            loss without a reference, unless they verify who sampled the pairs).
        folder: gets `steps.jsonl` (a line per step), `best/` and, while it runs, checkpoints.
        loss: one of `losses.LOSSES`. config: a `TrainConfig`.
        sampled_by_start: the pairs' responses were sampled from `model` as it is now, which is then verified.
        score: dev score of a policy, higher is better, called every `config.eval_every` steps; None keeps the last.
        stop_after: stop after this step, on the schedule of the whole training.
        keep_reference: a file for the reference log-probabilities, and what (as JSON) names the model that gives them.

    Returns:
        step and score of the best policy, the DPO term at the start (None without a reference), the gap of `check_sampled`
        (None unless `sampled_by_start`), the number of steps, and the tokens of prompts and responses trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exact = next(model.parameters()).dtype == torch.float32
    tolerance = 1e-3 if exact else 5e-2
    pairs = [dict(p) for p in pairs]
    alone = not any(p["rejected_ids"] for p in pairs)  # a response without a rejected one is half a pair
    batch, micro_batch = (size * (1 + alone) for size in (config.batch, config.micro_batch))
    check_head(model.eval())
    sampled = any(p[f"{side}_logp"] is not None for p in pairs for side in ("chosen", "rejected"))
    if loss not in REFERENCE_FREE or (sampled_by_start and sampled):
        reference = kept_reference_logps(model, pairs, 2 * micro_batch, keep_reference)
        for pair, (chosen, rejected) in zip(pairs, reference, strict=True):
            pair["reference_chosen"], pair["reference_rejected"] = chosen, rejected
    model.train()
    start = None
    if loss not in REFERENCE_FREE:
        with torch.no_grad():  # over 16 pairs or more, since in 16 bits one pair may be off by more than the tolerance
            parts = [pairs[i : i + micro_batch] for i in range(0, min(16, len(pairs)), micro_batch)]
            first = [
                batch_losses(model, to_device(pair_batch(part), model), loss, config.beta, config.alpha)[0].dpo
                for part in parts
            ]
            start = check_start(torch.cat(first), tolerance)
    gap = check_sampled(pairs, tolerance, exact) if sampled_by_start else None

    problems = [p["problem"] for p in pairs]
    order = training_order(
        len(pairs), batch, config.max_steps, config.max_epochs, seed, problems, config.pairs_together
    )
    steps = len(order) // batch
    trained = sum(pair_tokens(pairs[i]) for i in order[: batch * (stop_after or steps)])
    if micro_batch < batch:  # micro-batches of a step by length and by problem: less padding, more sharing
        size = lambda i: (len(pairs[i]["prompt_ids"]), problems[i], len(pairs[i]["chosen_ids"]))  # noqa: E731
        order = [i for at in range(0, len(order), batch) for i in sorted(order[at : at + batch], key=size)]
    recorder = Recorder(folder, config.eval_every, score, show, stop_after)
    # The recorder asks for a checkpoint after each dev score.
    arguments = trainer_arguments(folder, config, steps, batch, micro_batch, config.lr, seed, save_strategy="no")
    trainer = PreferenceTrainer(
        model,
        arguments,
        train_dataset=[pairs[i] for i in order],
        data_collator=pair_batch,
        callbacks=[recorder],
        loss=loss,
        beta=config.beta,
        alpha=config.alpha,
        odds_weight=config.odds_weight,
    )
    recorder.trainer = trainer
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None or int(checkpoint.rpartition("-")[2]) < min(steps, stop_after or steps):
        trainer.train(resume_from_checkpoint=checkpoint)
    recorder.trainer = None  # trainer and recorder hold each other, and with them the model and its optimizer
    best = json.loads((folder / "best" / "best.json").read_text())
    return {
        "best_step": best["step"],
        "best_score": best["score"],
        "steps": steps,
        "dpo_at_start": start,
        "sampler_gap": gap,
        "trained_tokens": trained,
    }


def read_steps(path: Path) -> Iterator[dict[str, float]]:
    return (json.loads(line) for line in path.read_text().splitlines())
