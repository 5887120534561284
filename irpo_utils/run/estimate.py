"""Before a run: can its model be used, and does the run fit into memory? Counted from the model's shape, not measured.

The shape comes from the model's configuration; the weights are not loaded. Memory is a sum of named parts at the widest
moment of sampling, of training and of a dev score. It is good to about a third.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import ROOT
from ..model.load import DTYPES, base_path, load_shape, load_tokenizer, unpacks
from ..model.logprobs import CHUNK
from ..model.prompts import encode_prompts, stop_ids
from ..model.sampling import DEV_SCORE_ROWS, PREFILL_TOKENS, most_prompts, pick_bytes
from ..model.shape import Shape
from ..settings import ModelConfig, SamplingConfig, Settings, TrainConfig
from ..tasks.base import Problem, Task

GIB = 1 << 30
RESERVE = 1.5 * GIB  # the CUDA context or the interpreter, and what allocators cannot use
NF4_BITS = 4.127  # with double quantization (arXiv 2305.14314, section 3)
# Run in a process of its own, which gives the GPU back when it ends.
FREE_BYTES = "from irpo_utils.model import load; print(load.free_bytes())"


class TooLarge(ValueError):
    """The run cannot fit; the message says by how much and what to change."""


def weight_bytes(shape: Shape, config: ModelConfig) -> float:
    """The base as it lies in memory while it is trained."""
    if config.quantize == "nf4":
        return shape.linear * NF4_BITS / 8 + (shape.parameters - shape.linear) * DTYPES[config.dtype].itemsize
    return shape.parameters * DTYPES[config.dtype].itemsize


def base_bytes(shape: Shape, config: Settings) -> float:
    """The base in each of the processes that train: all of it, or its part."""
    return weight_bytes(shape, config.model) / (config.train.processes if config.train.shard else 1)


def trained_bytes(shape: Shape, config: Settings) -> float:
    """What training keeps beside the base: the adapter (if there is one), gradients, the optimizer's moments."""
    full = config.model.tuning == "full"
    count = shape.parameters if full else shape.lora * config.model.lora_r
    return count * ((0 if full else 4) + 4 + (2 if config.train.optimizer == "paged_adamw_8bit" else 8))


def drawing_bytes(shape: Shape, config: Settings, prompt: int, rows: int, n: int) -> dict[str, float]:
    """What drawing `rows` responses at once needs beside the model, `n` to a prompt of `prompt` tokens."""
    prompts = most_prompts(rows, n)
    width = DTYPES[config.model.dtype].itemsize
    at_once = min(prompts * prompt, max(prompt, PREFILL_TOKENS))
    return {
        "cache": 1.15 * (prompts * prompt + rows * config.sampling.max_new_tokens) * shape.cache * width,
        "logits": rows * (shape.vocabulary * width + pick_bytes(shape.vocabulary)),
        "prefill": at_once * (4 * shape.hidden + 3 * shape.intermediate + shape.cache) * width,
    }


def sampling_bytes(shape: Shape, config: Settings, prompt: int, free_bytes: float) -> dict[str, float]:
    """Memory of sampling and evaluation, by part, for prompts of `prompt` tokens."""
    unpacked = config.model.quantize == "nf4" and unpacks(shape.parameters, config.model.dtype, free_bytes)
    weights = shape.parameters * DTYPES[config.model.dtype].itemsize if unpacked else weight_bytes(shape, config.model)
    return {
        "weights": weights,
        "adapter": 0 if config.model.tuning == "full" else shape.lora * config.model.lora_r * 4,
        **drawing_bytes(shape, config, prompt, config.sampling.max_rows, config.sampling.n),
    }


def dev_score_bytes(shape: Shape, config: Settings, prompt: int) -> dict[str, float]:
    """Memory of a dev score, by part: decoding beside what training keeps; greedy unless a round draws meanwhile."""
    rows, n = min(DEV_SCORE_ROWS, config.sampling.max_rows), 1
    if config.train.sync_every:
        rows, n = config.sampling.max_rows, config.sampling.n
    parts = {"weights": base_bytes(shape, config), "trained": trained_bytes(shape, config)}
    return parts | drawing_bytes(shape, config, prompt, rows, n)


def training_bytes(shape: Shape, config: Settings) -> dict[str, float]:
    """Memory of training, by part, for the longest pairs that `pairs.max_tokens` lets through; of each process."""
    width, micro_batch = DTYPES[config.model.dtype].itemsize, config.train.own_micro_batch(config.train.processes)
    tokens = 2 * micro_batch * config.pairs.max_tokens  # chosen and rejected rows
    # What a block keeps for its backward pass: its input, norms, queries to output, and the three of the gated MLP;
    # on a 4-bit base LoRA's inputs a second time, in float32.
    inside = (8 * shape.hidden + 4 * shape.intermediate) * width
    inside += 4 * (4 * shape.hidden + shape.intermediate) if config.model.quantize == "nf4" else 0
    blocks = shape.layers * inside
    if config.train.gradient_checkpointing:
        blocks = shape.layers * shape.hidden * width + inside
    logits = min(tokens * shape.vocabulary, CHUNK)
    return {
        "weights": base_bytes(shape, config),
        "trained": trained_bytes(shape, config),
        "activations": tokens * blocks,
        "logits": logits * (width + 4 + 4 + 4),  # and a float32 copy, softmax and gradient
    }


def hint(config: Settings, stage: str, parts: dict[str, float]) -> str:
    """What to change, the largest part first."""
    largest = max(parts, key=parts.get)
    if stage != "training" and largest not in ("weights", "trained"):
        now = config.sampling.max_rows
        rows = now if stage == "sampling" else min(now, DEV_SCORE_ROWS)
        return f"set sampling.max_rows={max(1, rows // 2)} (it is {now}), or lower sampling.max_new_tokens"
    if largest == "weights":
        if config.model.quantize == "none" and config.model.tuning == "lora":
            divide = "" if stage == "sampling" else "or divide it over GPUs (train.processes=8 train.shard=true), "
            return f"set model.quantize=nf4, {divide}or take a smaller model"
        return "take a smaller model" if config.model.tuning == "lora" else "set model.tuning=lora"
    if largest == "trained":
        if config.model.tuning == "lora":
            return "set train.optimizer=paged_adamw_8bit or a lower model.lora_r"
        return "set model.tuning=lora"
    if largest == "activations" and not config.train.gradient_checkpointing:
        return "set train.gradient_checkpointing=true"
    pairs = config.train.own_micro_batch(config.train.processes)
    if pairs > 1:
        share = config.train.batch // config.train.processes
        fewer = next(size for size in range(pairs // 2, 0, -1) if share % size == 0)
        return f"set train.micro_batch={fewer} (it is {pairs}; train.batch stays)"
    return f"lower pairs.max_tokens (it is {config.pairs.max_tokens})"


def check_context(shape: Shape, prompt: int, max_new_tokens: int) -> None:
    """Raise TooLarge if the longest prompt (`prompt` tokens) and a response of `max_new_tokens` exceed the context."""
    if prompt >= shape.context:
        raise TooLarge(
            f"the longest prompt has {prompt} tokens, the model's context {shape.context}: "
            "take a model with a longer one, or leave long problems out"
        )
    if prompt + max_new_tokens > shape.context:
        raise TooLarge(
            f"prompts of up to {prompt} tokens and sampling.max_new_tokens={max_new_tokens} exceed the model's context "
            f"of {shape.context}; lower the latter to {shape.context - prompt}, or take a model with a longer one"
        )


def check_fits(shape: Shape, config: Settings, prompt: int, free_bytes: float) -> list[str]:
    """Lines that say what sampling and training need of `free_bytes`, for prompts of up to `prompt` tokens.

    Raises:
        TooLarge: one of them needs more, or responses do not fit the context; the message says what to change.
    """
    lines = []
    check_context(shape, prompt, config.sampling.max_new_tokens)
    stages = {
        "sampling": sampling_bytes(shape, config, prompt, free_bytes),
        "training": training_bytes(shape, config),
        "dev score": dev_score_bytes(shape, config, prompt),
    }
    if config.sampling.engine != "transformers":  # it fits its cache to what the weights leave
        del stages["sampling"]
        name = {"vllm": "vLLM", "server": "a server"}[config.sampling.engine]
        lines.append(f"sampling: by {name}, which sizes its own memory and is not counted")
    for stage, parts in stages.items():
        total = sum(parts.values()) + RESERVE
        own = free_bytes / (workers_beside(config.sampling) if stage == "sampling" else processes_beside(config.train))
        each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        needs = f"about {total / GIB:.1f} of {own / GIB:.1f} GiB"
        lines.append(f"{stage}: {needs} ({each}, reserve {RESERVE / GIB:.1f})")
        if total > own:
            fewer = stage != "sampling" and total <= free_bytes
            processes = f"lower train.processes (it is {config.train.processes}, and each holds as much)"
            raise TooLarge(f"{lines[-1]}: does not fit; {processes if fewer else hint(config, stage, parts)}")
    return lines


def workers_beside(sampling: SamplingConfig) -> float:
    """Workers that share the memory of this machine, or of a GPU. Where those of a cluster are is not known: 1."""
    if sampling.gpus_per_worker:
        return min(sampling.workers, 1 / min(1, sampling.gpus_per_worker))
    return 1 if os.environ.get("RAY_ADDRESS") else sampling.workers


def processes_beside(train: TrainConfig) -> int:
    """Processes that train in this machine's memory, one on a GPU. Where another launcher starts them is unknown: 1."""
    return 1 if torch.cuda.is_available() or os.environ.get("IRPO_LAUNCHER") else train.processes


def free_memory() -> float:
    """Free bytes of the GPU, or the bytes of the machine if it has none. Raises RuntimeError if that is not known."""
    done = subprocess.run([sys.executable, "-c", FREE_BYTES], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the machine's free memory cannot be read:\n{done.stderr.strip()}")
    return float(done.stdout.splitlines()[-1])


def check_weights(config: ModelConfig) -> None:
    """Look at a local model's weight files without loading them.

    Raises:
        ValueError: they cannot be loaded; the message names the model and says what to do.
    """
    shape = load_shape(config)
    if getattr(shape, "quantization_config", None):
        raise ValueError(
            f"model.path: {config.path} holds quantized weights; "
            "give the model they were made from, and model.quantize=nf4"
        )
    path = Path(base_path(config))
    if not path.is_dir():
        return  # on the hub
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"model.path: {config.path} has no *.safetensors; only that format is loaded (convert other weights)"
        )
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model.path: {file} is damaged or cut off ({error}); copy it again") from None


def check_model(
    config: Settings,
    task: Task,
    problems: dict[str, list[Problem]],
    jobs: int,
    or_fewer: bool = False,
    rounds: dict[str, Settings] | None = None,
) -> tuple[list[str], int]:
    """Look at the model, its tokenizer and the memory of a run, without loading weights.

    Args:
        problems: split -> its problems. jobs: stages that run side by side and share the memory.
        rounds: those with parameters of their own, by what they are called; they are to fit as well.

    Returns:
        The lines of the estimate, as they are printed; and the jobs, `or_fewer` where so many do not fit.

    Raises:
        ValueError: the model cannot be used, or its tokenizer cannot tell the prompts apart.
        TooLarge: the run cannot fit.
    """
    check_weights(config.model)
    tokenizer = load_tokenizer(config.model)
    shape = Shape.of(load_shape(config.model), config.model.trust_remote_code)
    everything = [p for split in problems.values() for p in split]
    prompts = encode_prompts(task, tokenizer, everything)
    stop_ids(config.model, tokenizer)  # a chat template that cannot write an answer is found here
    if len({tuple(ids) for ids in prompts.values()}) < len({task.prompt(p) for p in everything}):
        raise ValueError(
            f"model.path: the tokenizer of {config.model.path} writes different prompts as the same tokens; "
            "is it whole, and does its chat template use the message?"
        )
    if (largest := max(max(ids) for ids in prompts.values())) >= shape.vocabulary:
        raise ValueError(
            f"model.path: the tokenizer of {config.model.path} knows the token {largest}, "
            f"its model only {shape.vocabulary}"
        )
    lengths = [len(ids) for ids in prompts.values()]
    size = f"{shape.parameters / 1e6:,.0f} M parameters; prompts of {min(lengths)} to {max(lengths)} tokens"
    free = free_memory()

    def fit(free: float) -> list[str]:
        lines = check_fits(shape, config, max(lengths), free)
        for name, own in (rounds or {}).items():
            try:
                check_fits(shape, own, max(lengths), free)
            except TooLarge as error:
                raise TooLarge(f"{name}: {error}") from None
        return lines

    lines = fit(free)
    while jobs > 1:
        try:
            lines = fit(free / jobs)
            break
        except TooLarge as error:
            if not or_fewer:
                raise TooLarge(f"{error}, or run fewer jobs at once (there are {jobs}, and jobs=1 fits)") from None
            jobs -= 1
    each = f", for each of {jobs} jobs" if jobs > 1 else ""
    return [f"estimate, from the model's shape ({size}){each}:", *(f"  {line}" for line in lines)], jobs
