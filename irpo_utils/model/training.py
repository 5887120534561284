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
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PrinterCallback, Trainer

from ..files import relative, write_json, write_jsonl
from ..progress import counting
from ..settings import TrainConfig
from .load import save
from .logprobs import check_head, pair_batch, reference_logps, response_logps, takes_trees, to_device, with_reference
from .losses import PairLosses, Scores
from .processes import check_same, from_first, gathered, rank, through, trained, world_size
from .records import Pair
from .schedule import Mark, last_checkpoint, pair_order, sorted_in_batches, trainer_arguments, training_order

LN2 = math.log(2)
WATCHED = 64  # pairs whose log-probabilities are followed through a training
Loss = Callable[..., PairLosses]  # (scores, weights by name), as in `losses.py`
Logps = list[tuple[float, float]]  # of each pair's chosen and rejected response


def pair_tokens(pair: Pair) -> int:
    """Tokens of prompt and response, on both sides: what a step costs that shares nothing."""
    return sum(len(pair.prompt_ids) + len(ids) for ids in (pair.chosen_ids, pair.rejected_ids) if ids)


def batch_losses(
    model: PreTrainedModel, batch: dict[str, Tensor], loss: Loss, weights: dict[str, float]
) -> tuple[PairLosses, Tensor, Tensor]:
    """The losses of a batch made by `pair_batch`, and the policy's (chosen, rejected) log-probabilities [pairs].

    Args:
        loss: a function of `losses.py`, or of that form. weights: its parameters by name.
    """
    logps = through(model, response_logps, batch)
    chosen = logps[batch["chosen"]]
    rejected = torch.where(batch["rejected"] < 0, torch.zeros_like(chosen), logps[batch["rejected"]])
    reference = batch["reference"].to(logps.dtype).unbind(-1) if "reference" in batch else (None, None)
    scores = Scores(chosen, rejected, *reference, batch["lengths"], batch["rejected_lengths"], batch["reward_gaps"])
    return loss(scores, **weights), chosen, rejected


def finite(trainer: Trainer, loss: Tensor) -> Tensor:
    """The loss of a step. Raises FloatingPointError where it is not finite."""
    if not torch.isfinite(loss):
        step, lr = trainer.state.global_step + 1, trainer.args.learning_rate
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower train.lr (it is {lr:g})")
    return loss


class PreferenceTrainer(Trainer):
    """The transformers Trainer with the loss of a method; `terms` holds the last step's means for the log."""

    def __init__(self, *args: Any, loss: Loss, weights: dict[str, float], **kwargs: Any):
        super().__init__(*args, data_collator=pair_batch, **kwargs)
        self.remove_callback(PrinterCallback)  # prints a line of the Trainer's own bookkeeping
        # Our loss is a mean over pairs, so the Trainer must divide by the accumulation steps itself.
        self.model_accepts_loss_kwargs = False
        self.loss, self.weights = loss, weights
        self.terms: list[dict[str, float]] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms, chosen, rejected = batch_losses(model, inputs, self.loss, self.weights)
        loss = finite(self, terms.total.mean())
        values = {
            "loss": loss,
            "dpo": terms.dpo,
            "nll": terms.nll,
            "odds": terms.odds,
            "chosen_logp": chosen,
            "rejected_logp": rejected,
        }
        if terms.chosen_reward is not None:
            margin = terms.chosen_reward - terms.rejected_reward
            values |= {"margin": margin, "accuracy": (margin > 0).float()}
        self.terms.append({k: v.detach().double().mean().item() for k, v in values.items() if v is not None})
        return loss

    def dpo_terms(self, pairs: list[Pair]) -> Tensor | None:
        """The DPO terms [pairs] of the policy as it is now; None for a loss without such a term."""
        return batch_losses(self.model, to_device(pair_batch(pairs), self.model), self.loss, self.weights)[0].dpo


class OnlineTrainer(PreferenceTrainer):
    """Trains on pairs that the policy draws as it trains: every `every` steps `draw` gives those up to the next draw.

    The Trainer fetches batches before it takes their steps, so what it fetches are numbers of pairs; the pairs
    themselves are looked up when their step begins.

    Args:
        draw: (step) -> the pairs of `every` steps, drawn from the policy as it is after so many steps.
        count: how many pairs these are.
    """

    def __init__(self, *args: Any, draw: Callable[[int], list[Pair]], every: int, count: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator = lambda numbers: {"pair": torch.tensor(numbers)}
        self.draw, self.every, self.count = draw, every, count
        self.drawn: tuple[int, list[Pair]] = (-1, [])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        numbers = inputs["pair"].tolist()
        number = numbers[0] // self.count  # of the draw
        if self.drawn[0] != number:
            self.drawn = number, self.draw(number * self.every)
            model.train()
        batch = pair_batch([self.drawn[1][i % self.count] for i in numbers])
        return super().compute_loss(model, to_device(batch, model))


@contextlib.contextmanager
def with_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model with other trained weights, by name, and then with its own again."""
    own = {name: p.data for name, p in model.named_parameters() if name in weights}
    for name, p in model.named_parameters():
        p.data = weights.get(name, p.data)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.data = own.get(name, p.data)


def step_terms(own: list[dict[str, float]]) -> list[dict[str, float]]:
    """The terms of all micro-batches of a step, in their order: processes take them in turn."""
    return [terms for turn in zip(*gathered(own), strict=True) for terms in turn]


class Recorder(Mark):
    """Writes every step's terms to disk, scores dev and the watched pairs, and keeps the policy that is best on dev."""

    def __init__(
        self,
        folder: Path,
        every: int,
        score: Callable[[PreTrainedModel], float] | None,
        watch: Callable[[PreTrainedModel], dict[str, float]],
        show: Callable[[str], None],
        stop_after: int | None = None,
    ):
        self.folder, self.every, self.score, self.watch = folder, every, score, watch
        self.show, self.stop_after = show, stop_after
        self.trainer: PreferenceTrainer | None = None
        self.count: Callable[[int], None] = lambda step: None  # says how far it is

    def on_train_begin(self, args, state, control, **kwargs):
        if rank() == 0:
            rewind(self.folder, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step, terms = state.global_step, step_terms(self.trainer.terms)
        self.count(step)
        last = step in (self.stop_after, state.max_steps)
        control.should_training_stop |= last
        row = {"step": step, **{name: sum(t[name] for t in terms) / len(terms) for name in terms[0]}}
        self.trainer.terms.clear()
        if step % self.every == 0 or last:
            control.should_save = True
            torch.cuda.empty_cache()  # does nothing without CUDA; sampling needs what training's last step left
            row |= self.watch(model)
            if self.score:
                row["dev_greedy"] = self.score(model)
            torch.cuda.empty_cache()
            model.train()
            weights = trained(model)
            if rank() == 0:
                self._keep_best(model, weights, step, row.get("dev_greedy", float(step)))
        if rank() > 0:
            return
        with open(self.folder / "steps.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        if args.report_to:
            self.trainer.log({name: value for name, value in row.items() if name != "step"})
        if "dev_greedy" in row:
            self.show(f"step {step}/{state.max_steps}  loss {row['loss']:.3f}  dev {row['dev_greedy']:.1%}")

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        if rank() == 0:
            shutil.rmtree(self.folder / "best.before", ignore_errors=True)

    def _keep_best(self, model: PreTrainedModel, weights: dict[str, Tensor], step: int, score: float) -> None:
        best = self.folder / "best"
        if best.exists() and json.loads((best / "best.json").read_text())["score"] >= score:
            return
        if not all(torch.isfinite(weight).all() for weight in weights.values()):
            lr = self.trainer.args.learning_rate
            raise FloatingPointError(f"the weights are not finite after step {step}; lower train.lr (it is {lr:g})")
        fresh = self.folder / "best.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        save(model, fresh, weights if isinstance(model, FSDPModule) else None)
        (fresh / "best.json").write_text(json.dumps({"step": step, "score": score}))
        if best.exists():  # a run that is killed before the checkpoint is whole goes back to it
            shutil.rmtree(self.folder / "best.before", ignore_errors=True)
            best.rename(self.folder / "best.before")
        fresh.rename(best)


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
    best, before = folder / "best", folder / "best.before"
    if best.exists() and (
        not (best / "best.json").exists() or json.loads((best / "best.json").read_text())["step"] > step
    ):
        shutil.rmtree(best)
    if before.exists() and not best.exists():
        before.rename(best)


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


def check_sampled(pairs: list[Pair], start_logps: Logps, tolerance: float, exact: bool = True) -> float:
    """Difference per token between the sampler's log-probabilities and `start_logps`, in nats.

    It is the largest of all responses. Without `exact` (16-bit weights, where every batch shape rounds differently) it
    is their mean.

    Args:
        start_logps: of the pairs' responses under the model that is trained, before the first step.

    Raises:
        RuntimeError: it exceeds `tolerance`: the sampler did not run the model that is trained.
    """
    gaps = [
        abs(sampled - start) / len(ids)
        for pair, (chosen, rejected) in zip(pairs, start_logps, strict=True)
        for sampled, start, ids in (
            (pair.chosen_logp, chosen, pair.chosen_ids),
            (pair.rejected_logp, rejected, pair.rejected_ids),
        )
        if sampled is not None
    ]
    worst = (max(gaps) if exact else sum(gaps) / len(gaps)) if gaps else 0.0
    if not worst < tolerance:
        raise RuntimeError(
            "the sampler saw other log-probabilities than the model that is trained "
            f"(off by {worst:.4f} nats per token): the pairs are not samples of M_t; run 01_sample and 02_pairs again"
        )
    return worst


def kept_reference_logps(
    model: PreTrainedModel, pairs: list[Pair], max_rows: int, keep: tuple[Path, Any] | None
) -> Logps:
    """`reference_logps`, kept in a file, so that training that goes on after a kill does not score the pairs anew.

    Args:
        keep: the file, and what (as JSON) names the model. The file is read if it is about this model and these pairs,
            else written.
    """
    if keep is None:
        return reference_logps(model, pairs, max_rows)
    file, named = keep
    about = [
        named,
        max_rows,
        [
            [p.problem, p.prompt_ids, p.chosen_ids, p.rejected_ids, p.chosen_inserted, p.rejected_inserted]
            for p in pairs
        ],
    ]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def read() -> Logps | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged: scored anew
            found = json.loads(file.read_text())
            if found["key"] == key:
                return [tuple(pair) for pair in found["logps"]]
        return None

    if (found := from_first(read)) is not None:
        return found
    logps = reference_logps(model, pairs, max_rows)
    if rank() == 0:
        write_json(file, {"key": key, "logps": logps})
    return logps


def mean_logps(logps: Logps) -> dict[str, float]:
    """The mean log-probability of pairs' chosen and rejected responses, in nats, by the names in a step's record."""
    return {
        f"watched_{side}_logp": sum(pair[i] for pair in logps) / len(logps)
        for i, side in enumerate(("chosen", "rejected"))
    }


def dpo_at_start(trainer: PreferenceTrainer, pairs: list[Pair]) -> Tensor | None:
    """The DPO terms [pairs] of the first pairs before the first step; None for a loss without such a term.

    They are 16 pairs or more, since in 16 bits one pair may be off by more than the tolerance.
    """
    trainer.model.train()
    size = trainer.args.per_device_train_batch_size
    with torch.no_grad():
        terms = [trainer.dpo_terms(pairs[i : i + size]) for i in range(0, min(16, len(pairs)), size)]
    return None if terms[0] is None else torch.cat(terms)


def in_order(pairs: list[Pair], config: TrainConfig, seed: int) -> list[Pair]:
    """The pairs of all passes in the order of training. What a batch's micro-batches hold is about as long."""
    order = training_order([p.problem for p in pairs], config, seed)
    if config.own_micro_batch(world_size()) < config.batch:  # less padding, and more prompts that are shared
        order = sorted_in_batches(order, config.batch, lambda i: pair_order(pairs[i]))
    return [pairs[i] for i in order]


def held_against_start(
    model: PreTrainedModel, pairs: list[Pair], draw: Callable[[int], list[Pair]], max_rows: int
) -> Callable[[int], list[Pair]]:
    """`draw`, whose pairs get the log-probabilities of the model as it is now. `pairs` are the first, with them."""
    start = {name: weight.clone() for name, weight in trained(model).items()}

    def scored(step: int) -> list[Pair]:
        if not step:
            return pairs
        drawn = draw(step)
        with with_weights(model, start):
            return with_reference(drawn, reference_logps(model, drawn, max_rows))

    return scored


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
    engine: Callable[..., PreferenceTrainer] = PreferenceTrainer,
    draw: Callable[[int], list[Pair]] | None = None,
) -> dict[str, Any]:
    """Train `model` on `pairs` in place and leave the best policy in `folder`/best; a killed run goes on where it was.

    Several processes may do it together (`processes.join`): each calls this with the same arguments, takes its part of
    every batch and of the pairs to score, and gets the same facts.

    Args:
        model: M_t (or M_0), trainable.
        folder: gets `steps.jsonl` (a line per step), `best/` and, while it runs, checkpoints.
        loss: a function of `losses.py`, or of that form. weights: its parameters by name.
        has_reference: whether the loss looks at a reference's log-probabilities.
        config: batch sizes, rate and length of the training; the weights in it are not looked at.
        sampled_by_start: the pairs' responses were sampled from `model` as it is now, which is then verified.
        reference_is_start: the reference is `model` as it is now. Its log-probabilities are taken before step 1, and
            the DPO term must be ln 2 there. Else the pairs bring the reference's log-probabilities with them.
        score: dev score of a policy, higher is better, called every `config.eval_every` steps; None keeps the last.
        stop_after: stop after this step, on the schedule of the whole training.
        keep_reference: a file for the log-probabilities of `model` before step 1, and what (as JSON) names the model.
        engine: the trainer's class; another one has the constructor, `terms` and `dpo_terms` of this one.
        draw: where pairs are drawn while it trains (`config.sync_every`), what draws them after so many steps; each
            time as many as there are `pairs`, which are the first draw. There are `config.max_steps` steps then.

    Returns:
        step and score of the best policy, the DPO term at the start and the gap of `check_sampled` (each None where it
        is not checked), the number of steps, the tokens of prompts and responses trained on, and the watched pairs'
        mean log-probabilities before the first step (the steps' records have those after them).

    Raises:
        ValueError: the pairs should bring the reference's log-probabilities, and do not.
        RuntimeError: `model` is not its reference, or did not sample the pairs (`check_start`, `check_sampled`); or
            processes have trained different weights (`check_same`).
        FloatingPointError: the loss or the weights are no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exact = next(model.parameters()).dtype == torch.float32
    tolerance = 1e-3 if exact else 5e-2
    if not any(p.rejected_ids for p in pairs):  # a response without a rejected one is half a pair
        config = config.but(batch=2 * config.batch, micro_batch=2 * config.micro_batch)
    batch, micro_batch = config.batch, config.micro_batch
    through(model.eval(), check_head)
    if isinstance(model, FSDPModule):
        through(model, takes_trees)  # tried by all processes together, and not when one of them first needs it
    own_reference = has_reference and reference_is_start
    if has_reference and not reference_is_start and any(p.reference_chosen is None for p in pairs):
        raise ValueError(
            "the pairs have no log-probabilities of the reference; score them with `reference_logps` first"
        )
    sampled = sampled_by_start and any(logp is not None for p in pairs for logp in (p.chosen_logp, p.rejected_logp))
    start_logps: Logps = [(0.0, 0.0)] * len(pairs)  # not looked at unless they are scored
    if own_reference or sampled:
        start_logps = kept_reference_logps(model, pairs, 2 * micro_batch, keep_reference)
    if own_reference:
        pairs = with_reference(pairs, start_logps)
    every = -(-len(pairs) // WATCHED)

    def watch(policy: PreTrainedModel) -> dict[str, float]:
        return mean_logps(reference_logps(policy, pairs[::every], 2 * micro_batch))

    watched_at_start = mean_logps(start_logps[::every]) if own_reference or sampled else watch(model)
    examples: list[Any]
    if draw is None:
        examples = in_order(pairs, config, seed)
        steps = len(examples) // batch
    else:
        steps, examples = config.max_steps, list(range(config.max_steps * batch))
        drawn_at = held_against_start(model, pairs, draw, 2 * micro_batch) if own_reference else draw
        engine = partial(OnlineTrainer, draw=drawn_at, every=config.sync_every, count=len(pairs))
    recorder = Recorder(folder, config.eval_every, score, watch, show, stop_after)
    lasting = Path(re.sub(r"/\.\w+\.partial\b", "", str(folder)))  # a stage's own folder, for that which goes with it
    own = {"report_to": [*config.report_to], "run_name": relative(lasting)}
    own["save_strategy"] = "no"  # the recorder asks for checkpoints
    if config.report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(lasting / "tensorboard")
    trainer = engine(
        model,
        trainer_arguments(folder, config, steps, seed, **own),
        train_dataset=examples,
        callbacks=[recorder],
        loss=loss,
        weights=weights,
    )
    terms = dpo_at_start(trainer, pairs) if own_reference else None
    start = None if terms is None else check_start(terms, tolerance)
    gap = check_sampled(pairs, start_logps, tolerance, exact) if sampled else None
    recorder.trainer = trainer
    checkpoint = from_first(lambda: last_checkpoint(folder / "checkpoints"))
    if checkpoint is None or int(checkpoint.rpartition("-")[2]) < min(steps, stop_after or steps):
        done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
        with counting("training", stop_after or steps, "steps", done) as recorder.count:
            trainer.train(resume_from_checkpoint=checkpoint)
    recorder.trainer = None  # trainer and recorder hold each other, and with them the model and its optimizer
    check_same(model)
    taken = stop_after or steps
    if draw is not None:
        examples = [pair for step in range(0, taken, config.sync_every) for pair in draw(step)]
    best = from_first(lambda: json.loads((folder / "best" / "best.json").read_text()))
    return {
        "best_step": best["step"],
        "best_score": best["score"],
        "steps": steps,
        "dpo_at_start": start,
        "sampler_gap": gap,
        "trained_tokens": sum(map(pair_tokens, examples[: batch * taken])),
        **watched_at_start,
    }
