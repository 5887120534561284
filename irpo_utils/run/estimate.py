"""Before a run: does it fit into memory, and about how long does it take? Counted from the model's shape, not measured.

The shape comes from the model's configuration; the weights are not loaded. Memory is a sum of named parts at the widest
moment of sampling and of training. Time is work divided by the machine's speed, which two short probes measure (a
matrix product and a copy), times the share of it that such work reaches in our experience of CPUs. The memory is good to
about a third, the time to a factor of about three.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..files import ROOT
from ..methods.recipes import methods
from ..model import load
from ..model.logprobs import CHUNK
from ..model.sampling import PREFILL_TOKENS, most_prompts
from .config import Config

GIB = 1 << 30
RESERVE = 1.5 * GIB  # the CUDA context or the interpreter, and what allocators cannot use
NF4_BITS = 4.127  # with double quantization (arXiv 2305.14314, section 3)
EFFICIENCY = 0.35  # of the probes' speed


class TooLarge(ValueError):
    """The run cannot fit; the message says by how much and what to change."""


class Speed(NamedTuple):
    """A machine's speed: floating-point operations a second, bytes a second, and the least seconds a layer's forward takes."""

    flops: float
    bandwidth: float
    layer: float


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model."""

    parameters: int
    linear: int  # weights in linear layers inside the blocks: what 4-bit and LoRA apply to
    lora: int  # LoRA parameters per unit of rank
    layers: int
    hidden: int
    intermediate: int
    cache: int  # numbers that one token leaves in the cache
    vocabulary: int
    context: int  # tokens

    @classmethod
    def of(cls, config: PretrainedConfig, trust_remote_code: bool = False) -> Shape:
        """The shape of the model that `config` describes, built without memory for its weights."""
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError:
            raise ValueError(f"model.path: a {config.model_type} is no causal language model") from None
        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(m.weight.numel() for m in layers),
            lora=sum(m.in_features + m.out_features for m in layers),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            cache=2 * config.num_hidden_layers * heads * width,
            vocabulary=config.vocab_size,
            context=getattr(config, "max_position_embeddings", None) or 1 << 30,
        )


def weight_bytes(shape: Shape, config: Config) -> float:
    """The base as it lies in memory while it is trained."""
    width = 4 if config.model.dtype == "float32" else 2
    if config.model.quantize == "nf4":
        return shape.linear * NF4_BITS / 8 + (shape.parameters - shape.linear) * width
    return shape.parameters * width


def trained_bytes(shape: Shape, config: Config) -> float:
    """What training keeps beside the base: the adapter (or nothing, for full tuning), gradients, the optimizer's moments."""
    full = config.model.tuning == "full"
    count = shape.parameters if full else shape.lora * config.model.lora_r
    return count * ((0 if full else 4) + 4 + (2 if config.train.optimizer == "paged_adamw_8bit" else 8))


def drawing_bytes(shape: Shape, config: Config, prompt: int, rows: int, n: int) -> dict[str, float]:
    """What drawing `rows` responses at once, `n` to a prompt of `prompt` tokens, needs beside the model."""
    prompts = most_prompts(rows, n)
    width = 4 if config.model.dtype == "float32" else 2
    at_once = min(prompts * prompt, max(prompt, PREFILL_TOKENS))
    return {
        "cache": 1.15 * (prompts * prompt + rows * config.sampling.max_new_tokens) * shape.cache * width,
        "logits": rows * shape.vocabulary * (width + 4 + 4 + 8 + 8),  # float32, softmax, and their float64 sums
        "prefill": at_once * (4 * shape.hidden + 3 * shape.intermediate + shape.cache) * width,
    }


def sampling_bytes(shape: Shape, config: Config, prompt: int, room: float) -> dict[str, float]:
    """Memory of sampling and evaluation, by part, for prompts of `prompt` tokens."""
    width = 4 if config.model.dtype == "float32" else 2
    dense = config.model.quantize == "nf4" and load.unpacks(shape.parameters, room)
    lora = 0 if config.model.tuning == "full" else shape.lora * config.model.lora_r * 4
    rows = config.sampling.max_rows
    return {
        "weights": shape.parameters * width if dense else weight_bytes(shape, config),
        "adapter": lora,
        **drawing_bytes(shape, config, prompt, rows, config.sampling.n),
    }


def dev_score_bytes(shape: Shape, config: Config, prompt: int) -> dict[str, float]:
    """Memory of a dev score, by part: greedy decoding beside all that training keeps."""
    rows = min(256, config.sampling.max_rows)
    parts = {"weights": weight_bytes(shape, config), "trained": trained_bytes(shape, config)}
    return parts | drawing_bytes(shape, config, prompt, rows, 1)


def training_bytes(shape: Shape, config: Config) -> dict[str, float]:
    """Memory of training, by part, for the longest pairs that `pairs.max_tokens` lets through."""
    width = 4 if config.model.dtype == "float32" else 2
    tokens = 2 * config.train.micro_batch * config.pairs.max_tokens  # chosen and rejected rows
    # What a block keeps for its backward pass: its input, norms, queries to output, and the three of the gated MLP; with
    # LoRA in float32 its inputs a second time.
    inside = (8 * shape.hidden + 4 * shape.intermediate) * width
    inside += 0 if config.model.tuning == "full" else 4 * (4 * shape.hidden + shape.intermediate)
    blocks = shape.layers * inside
    if config.train.gradient_checkpointing:
        blocks = shape.layers * shape.hidden * width + inside
    return {
        "weights": weight_bytes(shape, config),
        "trained": trained_bytes(shape, config),
        "activations": tokens * blocks,
        "logits": min(tokens * shape.vocabulary, CHUNK)
        * (width + 4 + 4 + 4),  # and a float32 copy, softmax and gradient
    }


def machine_speed() -> Speed:
    """This machine's, from a large matrix product and a copy. Takes about a second."""
    cuda = torch.cuda.is_available()
    device, dtype, size = ("cuda", torch.bfloat16, 4096) if cuda else ("cpu", torch.float32, 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    big = torch.zeros((1 << 28) if cuda else (1 << 25), device=device)

    def best(work) -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    return Speed(2 * size**3 / best(lambda: a @ a), 2 * 4 * big.numel() / best(big.clone), 4e-4 if cuda else 1e-4)


def seconds(
    shape: Shape, config: Config, prompt: int, problems: dict[str, int], speed: Speed, room: float
) -> dict[str, float]:
    """Seconds of the whole run, by kind of stage, all methods and seeds together.

    Responses are taken to be half as long as they may be; every method trains all its steps.
    """
    flops, bandwidth = EFFICIENCY * speed.flops, EFFICIENCY * speed.bandwidth
    width = 4 if config.model.dtype == "float32" else 2
    length = config.sampling.max_new_tokens / 2
    step_floor = shape.layers * speed.layer
    weights = shape.parameters * width
    if config.model.quantize == "nf4" and not load.unpacks(shape.parameters, room):
        weights = weight_bytes(shape, config) + 2 * weights  # every step writes the unpacked weights, and reads them

    def sampled(responses: float, rows: int, n: int = 1) -> float:
        """Time to draw `responses`, `rows` at a time: a token step reads all weights and the rows' cache, or computes."""
        rows = min(rows, max(1, responses))
        read = weights + rows * (prompt / n + length) * shape.cache * width
        step = max(read / bandwidth, 2 * shape.parameters * rows / flops, step_floor)
        return responses / rows * length * 1.5 * step

    rows, n = config.sampling.max_rows, config.sampling.n
    greedy = min(256, rows)
    again = config.train.retrain_with_dev
    asked = problems["train"] + problems["dev"] * again
    held_out = problems["dev"] + problems["test"]
    evaluated = sampled(held_out, greedy) + sampled(
        held_out * config.evaluation.samples, rows, config.evaluation.samples
    )
    total = {"sample": 0.0, "train": 0.0, "evaluate": evaluated}
    if any(methods()[method].round(1).samples for method in config.methods):
        total["sample"] += sampled(asked * n, rows, n)  # from M_0, for all methods
    for method in config.methods:
        for t in range(1, config.rounds(method) + 1):
            own, choices = config.for_round(method, t), methods()[method].round(t)
            if choices.loss == "extrapolate":
                total["evaluate"] += evaluated
                continue
            if choices.samples and t > 1:
                total["sample"] += sampled(asked * n, rows, n)
            # Continuations are half a response long; five steps a response, and no two responses alike, is a guess.
            extra = {
                "process": 5 * n * own.process.continuations / 2,
                "judge": n * own.judge.samples,
                "rationalized": n,
            }
            total["sample"] += sampled(int(asked * extra.get(choices.reward, 0)), rows, n)
            if choices.reward == "process":  # its reward model, trained and asked
                seen = own.process.max_steps * own.process.batch * 3 + asked * n
                total["train"] += seen * (prompt + length) * 2 * shape.parameters / flops
            steps = own.train.max_steps
            pairs = asked * own.pairs.k * own.train.max_epochs  # at most
            steps = min(steps, max(1, pairs // own.train.batch))
            tokens = steps * own.train.batch * 2 * (prompt + length)
            passes = 4 if own.model.tuning == "lora" else 6  # forward, and backward to the inputs alone
            passes += 2 if own.train.gradient_checkpointing else 0
            total["train"] += (1 + again) * tokens * passes * shape.parameters / flops
            total["train"] += steps / own.train.eval_every * sampled(problems["dev"], greedy)
            total["evaluate"] += evaluated
    return {name: value * config.seeds for name, value in total.items()}


def mend(config: Config, stage: str, parts: dict[str, float]) -> str:
    """What to change, the largest part first."""
    if stage != "training" and max(parts, key=parts.get) not in ("weights", "trained"):
        return f"set sampling.max_rows={max(1, config.sampling.max_rows // 2)} (it is {config.sampling.max_rows}), or lower sampling.max_new_tokens"
    largest = max(parts, key=parts.get)
    if largest == "weights":
        if config.model.quantize == "none" and config.model.tuning == "lora":
            return "set model.quantize=nf4, or take a smaller model"
        return "take a smaller model" if config.model.tuning == "lora" else "set model.tuning=lora"
    if largest == "trained":
        return (
            "set train.optimizer=paged_adamw_8bit or a lower model.lora_r"
            if config.model.tuning == "lora"
            else "set model.tuning=lora"
        )
    if largest == "activations" and not config.train.gradient_checkpointing:
        return "set train.gradient_checkpointing=true"
    if config.train.micro_batch > 1:
        return f"set train.micro_batch={config.train.micro_batch // 2} (it is {config.train.micro_batch}; train.batch stays)"
    return f"lower pairs.max_tokens (it is {config.pairs.max_tokens})"


def check_fits(shape: Shape, config: Config, prompts: range, room: float) -> list[str]:
    """Lines that say what sampling and training need of `room` bytes, for prompts with a number of tokens in `prompts`.

    Raises:
        TooLarge: one of them needs more, or responses do not fit the context; the message says what to change.
    """
    lines, prompt = [], prompts[-1]
    length = prompt + config.sampling.max_new_tokens
    if length > shape.context:
        raise TooLarge(
            f"the longest prompt has {prompt} tokens, the model's context {shape.context}: take a model with a longer one, or leave long problems out"
            if prompt >= shape.context
            else f"prompts of up to {prompt} tokens and sampling.max_new_tokens={config.sampling.max_new_tokens} exceed the model's context of {shape.context}; lower the latter to {max(0, shape.context - prompt)}, or take a model with a longer one"
        )
    stages = {
        "sampling": sampling_bytes(shape, config, prompt, room),
        "training": training_bytes(shape, config),
        "dev score": dev_score_bytes(shape, config, prompt),
    }
    if config.sampling.engine == "vllm":  # it fits its cache to what the weights leave
        del stages["sampling"]
        lines.append("sampling: by vLLM, which sizes its own memory and is not counted")
    for stage, parts in stages.items():
        total = sum(parts.values()) + RESERVE
        said = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        lines.append(f"{stage}: about {total / GIB:.1f} of {room / GIB:.1f} GiB ({said}, reserve {RESERVE / GIB:.1f})")
        if total > room:
            raise TooLarge(f"{lines[-1]}: does not fit; {mend(config, stage, parts)}")
    return lines


def clock(value: float) -> str:
    return f"{value / 3600:.1f} h" if value > 5400 else f"{value / 60:.0f} min" if value > 90 else f"{value:.0f} s"


def machine() -> tuple[Speed, float]:
    """This machine's speed and free memory in bytes, measured in a process of its own: it gives the GPU back when it ends."""
    code = "import json; from irpo_utils import estimate, models; print(json.dumps([estimate.machine_speed(), load.memory()]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the machine's speed cannot be measured:\n{done.stderr.strip()}")
    speed, room = json.loads(done.stdout.splitlines()[-1])
    return Speed(*speed), room


def estimate(config: Config, shape: Shape, prompts: range, problems: dict[str, int], jobs: int = 1) -> list[str]:
    """The lines that are printed before a run with `jobs` arms side by side.

    Args:
        prompts: the numbers of tokens of its prompts, shortest to longest. problems: how many each split has.

    Raises:
        TooLarge: it cannot fit.
    """
    speed, room = machine()
    lines = [
        f"estimate, from the model's shape ({shape.parameters / 1e6:,.0f} M parameters; prompts of {prompts[0]} to {prompts[-1]} tokens):"
    ]
    lines += ["  " + line for line in check_fits(shape, config, prompts, room / jobs)]
    times = seconds(shape, config, prompts[-1], problems, speed, room / jobs)
    said = ", ".join(f"{name} {clock(value)}" for name, value in times.items())
    lines.append(f"  time: about {clock(sum(times.values()))} on this machine, within a factor of three ({said})")
    return lines
