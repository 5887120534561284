"""How fast this project samples and trains beside what a user would run otherwise: same model, same work, one run.

./run_all.sh --bench [quick|full]      writes outputs/bench/bench.json and prints the table
IRPO_VLLM_PYTHON=vllm-env/bin/python ./run_all.sh --bench       with vLLM beside it (pyproject.toml: how to install it)

Contenders take turns, so that a machine that slows down slows all of them; the figure is the median. Loading,
tokenizing and importing are not timed.

The shapes with random weights show what sharing prompts is worth: their samples differ from the first token on, and
have a fixed length, so that every contender draws the same number of tokens. The embedded model was trained, so it also
shows what sharing first tokens is worth. SmolLM2-135M, where its package is installed, is a model as it comes: asked
the stories with an instruction, and trained as an adapter (rank 8); in bfloat16 where the machine multiplies it.

Peak memory is that of one training in a process of its own, over what the process holds with model and pairs loaded.
"""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from ..files import OUTPUTS, write_json
from ..model import load as models
from ..model import logprobs, losses, packaged, sampling
from ..model.adapter import as_in_peft
from ..model.prompts import encode_prompts, stop_ids
from ..model.training import PreferenceTrainer
from ..settings import ModelConfig, SamplingConfig, Settings, TaskConfig
from ..tasks import get_task
from ..tasks.jsonl import Given
from .synthetic import REPEATS, WORDS, Shape, make_pairs, random_prompts, word_tokenizer
from .vllm import engine as vllm

EMBEDDED = [
    Shape("embedded", 0, 64, 16, 8, 64, model="seed", written=25, trained=32),
    Shape("embedded, N = 30", 0, 64, 30, 10, 64, model="seed"),
]
REAL = Shape("SmolLM2-135M", 0, 32, 8, 4, 16, model="smollm2", written=24, trained=4, lora=True, repeats=3)
SHAPES = {
    "quick": [*EMBEDDED, Shape("gsm8k", 120, 130, 30, 10, 8, 256, 4), Shape("math", 700, 220, 20, 15, 4, 192, 4)],
    "full": [
        *EMBEDDED,
        Shape("gsm8k", 120, 130, 30, 10, 8, 384),
        Shape("gsm8k, 30 M", 120, 130, 30, 10, 8, 512, 8),
        Shape("math", 700, 220, 20, 15, 4, 384),
    ],
    "gpu": [
        *EMBEDDED,
        Shape("gsm8k, 0.5 B", 120, 130, 30, 10, 32, 1024, 32),
        Shape("math, 0.5 B", 700, 220, 20, 15, 16, 1024, 32),
        Shape("gsm8k, 7 B", 120, 130, 30, 10, 16, 4096, 32),
    ],
}
MAX_ROWS = 256  # responses that this project runs at once


def dtype_of(shape: Shape) -> str:
    """float32 for the embedded model; else bfloat16 where the machine multiplies it (random weights: a GPU)."""
    if shape.model == "seed":
        return "float32"
    return "bfloat16" if torch.cuda.is_available() or (shape.model and models.cpu_multiplies_bfloat16()) else "float32"


def load(shape: Shape) -> tuple[LlamaForCausalLM, Any, dict[str, list[int]], int]:
    """Model, tokenizer, prompts, and the id that ends a response (-1: none does)."""
    if shape.model:
        config = ModelConfig(path=shape.model, dtype=dtype_of(shape))
        tokenizer, task = models.load_tokenizer(config), get_task(TaskConfig(train_size=200))
        problems = task.problems("train")[: shape.problems]
        if shape.model != "seed":  # asked as the `jsonl` task asks
            task = Given([])
        prompts = encode_prompts(task, tokenizer, problems)
        return models.load_policy(config), tokenizer, prompts, stop_ids(config, tokenizer)[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    prompts = random_prompts(shape)
    dtype = models.DTYPES[dtype_of(shape)]
    return LlamaForCausalLM(config).to(models.device(), dtype).eval(), word_tokenizer(), prompts, -1


def alternate(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every contender's result of `repeats` rounds, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, work in contenders.items():
            value = work()
            if round_:
                found[name].append(value)
    return found


def samplers(shape: Shape, stack: ExitStack) -> dict[str, Callable[[], float]]:
    """What draws N responses to every prompt and returns tokens per second.

    They are this project, `generate`, and vLLM where it is installed. What `stack` holds is needed until they have run.
    """
    model, tokenizer, prompts, eos = load(shape)

    options = {"n": shape.n, "temperature": 1.0, "seed": 0, "eos_id": [eos] if eos >= 0 else []}
    options |= {"max_new_tokens": shape.response, "max_rows": MAX_ROWS}

    def rate(draw: Callable[[], int]) -> float:
        started = time.perf_counter()
        drawn = draw()
        return drawn / (time.perf_counter() - started)

    def sampled(draw: Callable[..., Any]) -> int:
        batches = draw(prompts, **options)
        return sum(len(c.token_ids) for batch in batches for own in batch.values() for c in own)

    def generated(size: int) -> int:
        """One batch after the other: where nothing differs between batches, two of them have the rate of all."""
        set_seed(0)
        own = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        todo, drawn = sorted(prompts.values(), key=len), 0
        for i in range(0, len(todo) if eos >= 0 else min(len(todo), 2 * size), size):
            ids, mask = (t.to(model.device) for t in logprobs.padded(todo[i : i + size], left=True))
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                num_return_sequences=shape.n,
                max_new_tokens=shape.response,
                min_new_tokens=None if eos >= 0 else shape.response,
                pad_token_id=0,
            )[:, ids.shape[1] :]
            ended = (out == eos).int().cumsum(-1) - (out == eos).int()
            drawn += int((ended == 0).sum())
        model.set_attn_implementation(own)
        return drawn

    sizes = [s for s in ((8, 16) if eos >= 0 else (1, 2)) if s <= shape.problems]  # the best ones of a longer search
    found = {"ours": partial(sampled, partial(sampling.sample, model))}
    found |= {f"generate, {s} prompts a batch": partial(generated, s) for s in sizes}
    if vllm.version() and not torch.cuda.is_available():  # on a GPU it wants the memory that this process holds
        engine = stack.enter_context(start_vllm(shape, model, tokenizer, prompts, stack))
        found["vLLM"] = partial(sampled, engine.sample)
    return {name: partial(rate, draw) for name, draw in found.items()}


def start_vllm(
    shape: Shape, model: Any, tokenizer: Any, prompts: dict[str, list[int]], stack: ExitStack
) -> vllm.Engine:
    """vLLM in its process with this model, with the same number of rows and threads as this project has."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
    config = Settings(
        model=ModelConfig(path=folder, dtype=dtype),
        sampling=SamplingConfig(max_rows=MAX_ROWS, max_new_tokens=shape.response),
        threads=torch.get_num_threads(),
    )
    return vllm.Engine(config, None, max(map(len, prompts.values())))


class TimedTrainer(DPOTrainer):
    """Notes how long the reference pass takes that TRL makes while it is set up."""

    seconds = 0.0

    def _precompute_ref_logps(self, *args, **kwargs):
        started = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return found


def trainers(shape: Shape) -> dict[str, Callable[[], float]]:
    """What trains on the pairs and returns pairs per second, reference pass included.

    They are this project, and TRL in several set-ups. All take one optimizer step (AdamW) per K pairs, on all weights
    or on an adapter, from the same start.
    """
    model, _, prompts, _ = load(shape)
    words = model.config.vocab_size
    tokenizer = word_tokenizer(words)
    # TRL tokenizes text: words stand for a model's ids.
    prompts = {name: [max(3, i) for i in ids] for name, ids in list(prompts.items())[: shape.trained]}
    pairs = make_pairs(shape, prompts, words)
    if shape.lora:
        model = models.new_adapter(model, ModelConfig(lora_r=8, lora_alpha=16))
    data = datasets.Dataset.from_list(
        [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    )
    common = {
        "learning_rate": 1e-5,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
    }

    def ours() -> float:
        policy, started = copy.deepcopy(model), time.perf_counter()
        scored = logprobs.with_reference(pairs, logprobs.reference_logps(policy, pairs, 2 * shape.k))
        policy.train()
        arguments = TrainingArguments(
            tempfile.mkdtemp(),
            per_device_train_batch_size=shape.k,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **common,
        )
        PreferenceTrainer(
            policy, arguments, train_dataset=scored, loss=losses.dpo_nll, weights={"beta": 0.1, "alpha": 1.0}
        ).train()
        return len(pairs) / (time.perf_counter() - started)

    def trl(size: int, precompute: bool) -> float:
        # For an adapter the trainer makes a frozen copy of it by itself.
        policy, reference = copy.deepcopy(model), None if precompute or shape.lora else copy.deepcopy(model)
        as_in_peft(policy)
        for own in filter(None, (policy, reference)):
            models.causal_model(own).set_attn_implementation("sdpa")
        arguments = DPOConfig(
            tempfile.mkdtemp(),
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            beta=0.1,
            max_length=None,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=shape.k // size,
            gradient_checkpointing=False,
            precompute_ref_log_probs=precompute,
            **common,
        )
        trainer = TimedTrainer(policy, reference, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        return len(pairs) / (time.perf_counter() - started + trainer.seconds)

    found = {"ours": ours}
    for size in (1, 3) if shape.k % 2 else (2, shape.k):
        for precompute in (False, True):
            name = f"TRL, micro-batch {size}{', reference before' if precompute else ''}"
            found[name] = partial(trl, size, precompute)
    return found


def peak(shape: Shape, name: str) -> int | None:
    """The most bytes that training by the contender `name` takes, over what model and pairs take.

    None where the system does not say.
    """
    contenders = trainers(shape)
    small = Shape("small", 12, 8, n=4, k=shape.k, problems=2, hidden=64, layers=1)
    trainers(small)[name]()  # imports what it imports later
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contenders[name]()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark of the highest memory to what it is now
    before = held_bytes("VmRSS")
    contenders[name]()
    return held_bytes("VmHWM") - before


def held_bytes(field: str) -> int:
    """Memory of this process as Linux tells it: held now (VmRSS), or the most since the mark was set (VmHWM)."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def quiet() -> None:
    """Keep the libraries from writing between the lines of the table."""
    warnings.filterwarnings("ignore")
    for library in ("transformers", "trl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def main(size: str = "quick") -> int:
    """Run the benchmark of that size (its GPU shapes where there is a GPU) and write its table."""
    quiet()
    table, size = [], "gpu" if torch.cuda.is_available() else size
    if REAL not in shapes(size):
        print(f"{REAL.name} is left out: {packaged.install(REAL.model)}")
    for shape in shapes(size):
        for kind in ("sampling", "training"):
            if kind == "training" and (shape.name.endswith("N = 30") or shape.hidden > 2000):
                continue  # trained on already; and all weights of 7 B do not fit with their optimizer
            row, line = measured(shape, kind)
            table.append(row)
            print(line, flush=True)
    facts = {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "repeats": REPEATS,
        "torch": torch.__version__,
        "size": size,
        "rows": table,
    }
    target = OUTPUTS / "bench" / "bench.json"
    write_json(target, facts)
    print(f"-> {target.relative_to(OUTPUTS.parent)}")
    return 0


def shapes(size: str) -> list[Shape]:
    """The shapes of a size, with the pre-trained model where its package is installed."""
    return [*SHAPES[size], *([REAL] if packaged.available(REAL.model) else [])]


def measured(shape: Shape, kind: str) -> tuple[dict[str, Any], str]:
    """A row of the table: every contender's median for "sampling" or "training"; and the line that says it."""
    unit = {"sampling": "tokens/s", "training": "pairs/s"}[kind]
    with ExitStack() as stack:
        contenders = samplers(shape, stack) if kind == "sampling" else trainers(shape)
        found = {name: statistics.median(values) for name, values in alternate(contenders, shape.repeats).items()}
        del contenders
    ours = found["ours"]
    others = sorted((name for name in found if name != "ours"), key=found.get, reverse=True)
    row = {"shape": shape.name, "kind": kind, "unit": unit, "repeats": shape.repeats, "medians": found}
    row["dtype"] = dtype_of(shape)
    row["ratio"] = ours / found[others[0]]
    rates = "; ".join(f"{name} {found[name]:,.1f} ({ours / found[name]:.1f} times)" for name in others)
    line = f"{shape.name}, {kind}: ours {ours:,.1f} {unit}; {rates}"
    if kind == "training":
        with ProcessPoolExecutor(1, get_context("spawn"), quiet, max_tasks_per_child=1) as pool:
            peaks = {name: pool.submit(peak, shape, name).result() for name in ("ours", others[0])}
        row["peak_bytes"] = peaks
        if peaks["ours"] is not None:
            line += "; peak memory {:,.0f} and {:,.0f} MiB".format(*(value / 2**20 for value in peaks.values()))
    return row, line
