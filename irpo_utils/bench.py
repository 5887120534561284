"""How fast this project samples and trains beside what a user would run otherwise: same model, same work, one run.

./run_all.sh --bench [quick|full]      writes outputs/bench/bench.json and prints the table

Contenders take turns, so that a machine that slows down slows all of them; the figure is the median. Nothing of loading,
tokenizing or importing is timed. Random weights do not change how much work there is; responses have a fixed length in the
two random shapes, so that every contender draws the same number of tokens.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from . import models, sampling, scoring, stages
from .presets import load_preset
from .runs import OUTPUTS, write_json
from .tasks import get_task
from .training import PreferenceTrainer


@dataclass(frozen=True)
class Shape:
    """A size of problem: tokens of prompts and responses, N samples and K pairs per problem, and the model."""

    name: str
    prompt: int
    response: int
    n: int
    k: int
    problems: int  # how many are sampled, and trained on
    hidden: int = 0  # 0: the embedded model on its own problems
    layers: int = 6


SHAPES = {
    "quick": [
        Shape("embedded", 0, 64, 16, 8, 32),
        Shape("gsm8k", 120, 130, 30, 10, 2, 256, 4),
        Shape("math", 700, 220, 20, 15, 1, 192, 4),
    ],
    "full": [
        Shape("embedded", 0, 64, 16, 8, 64),
        Shape("embedded, N = 30", 0, 64, 30, 10, 64),
        Shape("gsm8k", 120, 130, 30, 10, 4, 384),
        Shape("math", 700, 220, 20, 15, 2, 384),
    ],
}
WORDS = 4000


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose text is its ids, so that a contender that tokenizes gets the very tokens that the others get."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def load(shape: Shape) -> tuple[LlamaForCausalLM, Any, dict[str, list[int]], int]:
    """Model, tokenizer, prompts, and the id that ends a response (-1: none does)."""
    if not shape.hidden:
        config = load_preset("tiny", ["task.train_size=200"])
        tokenizer = models.load_tokenizer(config.model)
        task = get_task(config.task)
        prompts = stages.encode_prompts(task, tokenizer, task.problems("train")[: shape.problems])
        return models.load_policy(config.model), tokenizer, prompts, tokenizer.eos_token_id
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=shape.hidden, intermediate_size=3 * shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    rng = random.Random(0)
    prompts = {
        f"p{i}": [rng.randrange(3, WORDS) for _ in range(shape.prompt + rng.randint(-5, 5))]
        for i in range(shape.problems)
    }
    return LlamaForCausalLM(config).eval(), word_tokenizer(), prompts, -1


def alternate(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every contender's result of `repeats` rounds, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, work in contenders.items():
            value = work()
            if round_:
                found[name].append(value)
    return found


def bench_sampling(shape: Shape, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of this project's sampler and of `generate(num_return_sequences=N)` at two batch sizes."""
    model, _, prompts, eos = load(shape)

    def ours() -> float:
        started, tokens = time.perf_counter(), 0
        drawn = sampling.sample(
            model, prompts, n=shape.n, temperature=1.0, seed=0, eos_id=eos, max_new_tokens=shape.response
        )
        for batch in drawn:
            tokens += sum(len(c.token_ids) for completions in batch.values() for c in completions)
        return tokens / (time.perf_counter() - started)

    def generate(size: int) -> float:
        set_seed(0)
        started, tokens = time.perf_counter(), 0
        todo = sorted(prompts.values(), key=len)
        for i in range(0, len(todo), size):
            part = todo[i : i + size]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=shape.n,
                max_new_tokens=shape.response, min_new_tokens=None if eos >= 0 else shape.response, pad_token_id=0,
            )[:, width:]  # fmt: skip
            ended = (out == eos).int().cumsum(-1) - (out == eos).int()
            tokens += int((ended == 0).sum())
        return tokens / (time.perf_counter() - started)

    sizes = sorted({1, min(shape.problems, max(1, 256 // shape.n))})
    return alternate(
        {"ours": ours, **{f"generate, {s} prompts a batch": lambda s=s: generate(s) for s in sizes}}, repeats
    )


def make_pairs(shape: Shape, prompts: dict[str, list[int]]) -> list[scoring.Pair]:
    """K pairs per problem, as the cyclic walk makes them of four winners and six losers, of random tokens."""
    rng, pairs = random.Random(1), []
    words = WORDS if shape.hidden else 130
    for name, prompt in prompts.items():
        length = shape.response if shape.hidden else 45
        drawn = [
            [rng.randrange(3, words) for _ in range(length + rng.randint(-length // 5, length // 5))] + [1]
            for _ in range(10)
        ]
        for i in range(shape.k):
            pairs.append(
                {"problem": name, "prompt_ids": prompt, "chosen_ids": drawn[i % 4], "rejected_ids": drawn[4 + i % 6]}
            )
    return pairs


def bench_training(shape: Shape, repeats: int) -> dict[str, list[float]]:
    """Pairs per second, reference pass included, of this project's trainer and of TRL's at two micro-batch sizes.

    Both take one optimizer step (AdamW) per K pairs, all weights trained, from the same start.
    """
    import copy

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, _, prompts, _ = load(shape)
    tokenizer = word_tokenizer()
    if not shape.hidden:  # TRL tokenizes text: words stand for the embedded model's ids
        prompts = {name: [max(3, i) for i in ids] for name, ids in prompts.items()}
    pairs = make_pairs(shape, prompts)
    text = lambda ids: "".join(f" w{i}" for i in ids if i > 2)  # noqa: E731 - TRL adds the EOS itself
    data = Dataset.from_list(
        [{side: text(p[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")} for p in pairs]
    )
    common = {
        "learning_rate": 1e-5, "num_train_epochs": 1, "save_strategy": "no", "logging_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "bf16": False,
    }  # fmt: skip

    def ours() -> float:
        policy, started = copy.deepcopy(model), time.perf_counter()
        rows = [dict(p) for p in pairs]
        for row, (chosen, rejected) in zip(rows, scoring.reference_logps(policy, rows), strict=True):
            row["reference_chosen"], row["reference_rejected"] = chosen, rejected
        policy.train()
        arguments = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=shape.k, train_sampling_strategy="sequential",
            remove_unused_columns=False, dataloader_pin_memory=False, **common,
        )  # fmt: skip
        PreferenceTrainer(
            policy, arguments, train_dataset=rows, data_collator=scoring.pair_batch, loss="dpo+nll", beta=0.1, alpha=1.0
        ).train()
        return len(pairs) / (time.perf_counter() - started)

    def trl(size: int) -> float:
        policy, reference = copy.deepcopy(model), copy.deepcopy(model)
        arguments = DPOConfig(
            tempfile.mkdtemp(), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], beta=0.1, max_length=None,
            per_device_train_batch_size=size, gradient_accumulation_steps=shape.k // size, gradient_checkpointing=False, **common,
        )  # fmt: skip
        trainer = DPOTrainer(policy, reference, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        return len(pairs) / (time.perf_counter() - started)

    sizes = (1, 3) if shape.k % 2 else (2, shape.k)
    return alternate({"ours": ours, **{f"TRL, micro-batch {s}": lambda s=s: trl(s) for s in sizes}}, repeats)


def main(size: str = "quick", repeats: int = 5) -> int:
    """Run the benchmark of that size and write its table."""
    import logging
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    for library in ("transformers", "trl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for shape in SHAPES[size]:
        for kind, unit, bench in (("sampling", "tokens/s", bench_sampling), ("training", "pairs/s", bench_training)):
            found = {name: statistics.median(values) for name, values in bench(shape, repeats).items()}
            best = max(value for name, value in found.items() if name != "ours")
            rows.append(
                {"shape": shape.name, "kind": kind, "unit": unit, "medians": found, "ratio": found["ours"] / best}
            )
            others = ", ".join(f"{name} {value:,.1f}" for name, value in found.items() if name != "ours")
            print(
                f"{shape.name}, {kind}: ours {found['ours']:,.1f} {unit}; {others}; {rows[-1]['ratio']:.1f} times the best of them",
                flush=True,
            )
    target = OUTPUTS / "bench" / "bench.json"
    facts = {
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "torch": torch.__version__,
        "size": size,
        "rows": rows,
    }
    write_json(Path(target), facts)
    print(f"-> {target.relative_to(OUTPUTS.parent)}")
    return 0
