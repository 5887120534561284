"""What a GPU is to show on the first day that one is there: ./run_all.sh --gpu-check, in under nine minutes.

Each part is a process of its own and says first how long it takes. One that fails, is out of time or has no memory is
named with its reason, and the others go on. Figures stand beside what they should be: the estimate of memory beside the
peak; tokens and pairs per second beside the floor, which is the time to read the weights and the cache once a step at
the measured bandwidth, or to multiply at the measured rate, whichever is longer. -> outputs/gpu/gpu.json, table.txt

It needs torch, transformers, peft and bitsandbytes, and what this package itself stands on (pydantic, pyyaml,
filelock, psutil): no notebook is run. Models have random weights and are not loaded from anywhere.

Without a GPU the same parts run with tiny shapes on the CPU, so that the first minutes on one are not spent on typing
errors.

Left out: static shapes with CUDA graphs, which the sampler does not have; and estimates of time, which
`run/estimate.py` does not make.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..files import OUTPUTS, ROOT, ConfigError, load_object, relative, write_json, write_text
from ..model.load import device, free_bytes, load_policy, load_tokenizer
from ..model.losses import dpo_nll
from ..model.prompts import encode_prompts, stop_ids
from ..model.sampling import sample
from ..model.shape import Shape as ModelShape
from ..model.training import LN2, PreferenceTrainer, train
from ..settings import VERSIONS, ModelConfig, PairsConfig, SamplingConfig, Settings, TaskConfig, TrainConfig
from ..tasks import get_task
from .synthetic import Shape, make_pairs, random_prompts, word_tokenizer

LIMIT = 530  # seconds for all parts
FOLDER = OUTPUTS / "gpu"
GIB = 1 << 30
# Of the room that stands beside this one.
LOAD_PRESET, PLAN = "irpo_utils.run.presets:load_preset", "irpo_utils.run.stages:plan"
TRAINING_BYTES, SAMPLING_BYTES = "irpo_utils.run.estimate:training_bytes", "irpo_utils.run.estimate:sampling_bytes"
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A Llama as wide and as deep as one that is used, with random weights."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    words: int
    tied: bool = False

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.words,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )

    def model(self, dtype: torch.dtype) -> LlamaForCausalLM:
        """The model on the device, the same whenever it is made."""
        torch.manual_seed(0)
        with device():
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()


@dataclass(frozen=True)
class Work:
    """What the parts run."""

    small: Size
    large: Size
    shape: Shape  # of prompts, responses and pairs
    train: TrainConfig
    draws: int  # of the first token, for the chi-square test
    micro: tuple[str, ...] = ()  # changes of the micro preset


ON_GPU = Work(
    small=Size("0.5 B", 896, 24, 4864, 14, 2, 151_936, tied=True),  # as Qwen2.5-0.5B
    large=Size("7 B", 4096, 32, 11_008, 32, 32, 32_000),  # as Llama-2-7B
    shape=Shape("gsm8k", 120, 130, n=30, k=8, problems=8, trained=8),
    train=TrainConfig(
        batch=16, micro_batch=2, max_steps=4, eval_every=4, optimizer="paged_adamw_8bit", gradient_checkpointing=True
    ),
    draws=16_384,
)
ON_CPU = Work(
    small=Size("tiny", 64, 2, 128, 4, 2, 5000, tied=True),
    large=Size("tiny", 64, 2, 128, 4, 4, 600),
    shape=Shape("tiny", 12, 8, n=3, k=2, problems=2, trained=2),
    train=TrainConfig(batch=4, micro_batch=2, max_steps=2, max_epochs=9, eval_every=2, gradient_checkpointing=True),
    draws=2048,
    micro=(
        "iterations=1",
        "task.train_size=24",
        "task.dev_size=4",
        "task.test_size=4",
        "evaluation.samples=2",
        "train.max_steps=2",
    ),
)


def work() -> Work:
    return ON_GPU if torch.cuda.is_available() else ON_CPU


def row(what: str, value: float | None, unit: str, holds: bool = True, **beside: float) -> Row:
    """A line of the table: a figure (None: it cannot be measured here), and what it is to be compared with.

    Args:
        holds: whether it is as it must be, for a figure that must be so.
    """
    return {"what": what, "value": value, "unit": unit, "holds": holds, "beside": beside}


def finished() -> float:
    """The time, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def per_second(amount: float, run: Callable[[], Any]) -> float:
    """How much is done a second, of which `run` does `amount`."""
    for _ in range(3):
        run()
    started = finished()
    for _ in range(10):
        run()
    return 10 * amount / (finished() - started)


class Peaks(NamedTuple):
    """What the device does at most, as measured."""

    bytes_per_second: float  # read and written
    flop_per_second: float  # bfloat16

    @classmethod
    def measured(cls) -> Peaks:
        side, size = (8192, 1 << 30) if torch.cuda.is_available() else (128, 1 << 20)
        matrix = torch.randn(side, side, device=device(), dtype=torch.bfloat16)
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device()) for _ in range(2))
        return cls(per_second(2 * size, lambda: target.copy_(source)), per_second(2 * side**3, lambda: matrix @ matrix))


def start_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """The most memory since `start_peak`, of tensors; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


# The parts: each yields rows.


def measure_device(now: Work) -> Iterator[Row]:
    """Bandwidth and rate of products, which the floors are made of."""
    peaks = Peaks.measured()
    yield row("memory that is free", free_bytes() / GIB, "GiB")
    yield row("copying", peaks.bytes_per_second / 1e12, "TB/s")
    yield row("products in bfloat16", peaks.flop_per_second / 1e12, "TFLOP/s")


def compare_draws(now: Work) -> Iterator[Row]:
    """Greedy decoding token by token beside `generate`, and the first token's distribution (chi-square)."""
    seed = ModelConfig()
    tokenizer, task = load_tokenizer(seed), get_task(TaskConfig(train_size=4 * now.shape.problems))
    asked = encode_prompts(task, tokenizer, task.problems("train"))
    embedded, stops = load_policy(seed), stop_ids(seed, tokenizer)
    prompts = random_prompts(replace(now.shape, prompt=40), now.small.words)
    wide = now.small.model(torch.float32)
    yield greedy_row("embedded model, float32", embedded, asked, stops)
    yield greedy_row(f"{now.small.name}, float32", wide, prompts, [])
    for name, model, ids in (
        ("embedded model", embedded, least_certain(embedded, asked)),
        (f"{now.small.name}, {now.small.words:,} words", wide, next(iter(prompts.values()))),
    ):
        for temperature in (0.7, 1.0):
            yield chi_square_row(name, model, ids, temperature, now.draws)


def greedy_row(name: str, model: PreTrainedModel, prompts: dict[str, list[int]], stops: list[int]) -> Row:
    """The share of tokens in which greedy responses are those of `generate`, up to the first that differs."""
    length, same, count = 32, 0, 0
    batches = sample(model, prompts, n=1, temperature=0, seed=0, eos_id=stops, max_new_tokens=length)
    ours = {problem: own[0].token_ids for batch in batches for problem, own in batch.items()}
    for problem, ids in prompts.items():
        given = torch.tensor([ids], device=model.device)
        options = {"do_sample": False, "max_new_tokens": length, "pad_token_id": 0, "eos_token_id": stops or None}
        theirs = model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()
        pairs = [a == b for a, b in zip(ours[problem], theirs, strict=False)]
        same += pairs.index(False) if False in pairs else len(pairs)
        count += max(len(theirs), len(ours[problem]))
    # In float32 a token differs where two are as likely but for rounding, which is rare.
    return row(f"greedy as generate, {name}", same / count, "of the tokens", holds=same >= 0.99 * count, wanted=1.0)


@torch.no_grad()
def least_certain(model: PreTrainedModel, prompts: dict[str, list[int]]) -> list[int]:
    """The prompt, with the beginning of its greedy response, whose next token the model knows least."""
    options = {"n": 1, "temperature": 0, "seed": 0, "eos_id": [], "max_new_tokens": 16}
    found: list[tuple[float, list[int]]] = []
    for batch in sample(model, prompts, **options):
        for problem, own in batch.items():
            ids = prompts[problem] + own[0].token_ids
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
            entropy = torch.distributions.Categorical(logits=logits[len(prompts[problem]) - 1 :].float()).entropy()
            found.append((entropy.max().item(), ids[: len(prompts[problem]) + int(entropy.argmax())]))
    return max(found)[1]


def chi_square_row(name: str, model: PreTrainedModel, ids: list[int], temperature: float, draws: int) -> Row:
    """Chi-square of the first token in so many draws against softmax(logits / T). One in 10,000 exceeds its limit.

    Words are put together, by their probability, until each group is expected at least 20 times.
    """
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
    likely = (logits.double() / temperature).softmax(-1)
    options = {"temperature": temperature, "seed": 0, "eos_id": [], "max_new_tokens": 1}
    drawn = next(iter(sample(model, {"p": ids}, n=draws, **options)))["p"]
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(likely)).double()
    ordered, order = likely.cpu().sort(descending=True)
    expected, seen = grouped(draws * ordered, counts[order], least=20)
    free = max(1, len(expected) - 1)
    found = ((seen - expected) ** 2 / expected).sum().item()
    limit = free * (1 - 2 / (9 * free) + 3.72 * math.sqrt(2 / (9 * free))) ** 3  # Wilson and Hilferty
    what = f"chi-square, {name}, T = {temperature}"
    return row(what, found, f"({len(expected)} groups)", holds=found <= limit, limit=limit)


def grouped(expected: Tensor, seen: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Neighbours put together until each group is expected `least` times; what is left over joins the last one."""
    group = (expected.cumsum(0) / least).floor().clamp(max=max(0.0, float(expected.sum()) // least - 1)).long()
    _, group = group.unique(return_inverse=True)
    sums = (torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, x) for x in (expected, seen))
    found = tuple(sums)
    return found[0], found[1]


def run_micro(now: Work) -> Iterator[Row]:
    """The micro preset, stage by stage without the notebooks."""
    config = load_object(LOAD_PRESET)("micro", now.micro)
    run = FOLDER / "micro"
    shutil.rmtree(run, ignore_errors=True)
    for stage in load_object(PLAN)(config, run, "irpo", 0):
        started = finished()
        stage.begin().run()
        stage.finish()
        yield row(stage.label(), finished() - started, "s")
    yield row("the last model, greedy on test", stage.result()[0]["test"]["greedy"], "of the problems")


class TimedTrainer(PreferenceTrainer):
    """Notes when each micro-batch begins."""

    moments: list[float] = []  # noqa: RUF012 - of the one training of a process

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.moments.append(finished())
        return super().training_step(*args, **kwargs)


def train_in_four_bits(now: Work) -> Iterator[Row]:
    """NF4 + LoRA + paged 8-bit AdamW on the large model: loaded from its files, scored, trained."""
    peaks, longest = Peaks.measured(), int(1.2 * now.shape.response) + 1 + now.shape.prompt + 5
    with tempfile.TemporaryDirectory() as folder:
        model_folder = Path(folder) / "model"
        started = finished()
        now.large.model(torch.bfloat16).save_pretrained(model_folder)
        word_tokenizer(now.large.words).save_pretrained(model_folder)
        start_peak()
        written = finished()
        yield row(f"writing {now.large.name} with random weights", written - started, "s")
        config = Settings(
            model=ModelConfig(path=str(model_folder), quantize="nf4", dtype="bfloat16", lora_r=32, lora_alpha=64),
            pairs=PairsConfig(max_tokens=longest),
            train=now.train,
        )
        model = load_policy(config.model, trainable=True)
        yield row(f"loading {now.large.name} in NF4, with an adapter", finished() - written, "s")
        shape = ModelShape.of(now.large.config)
        pairs = make_pairs(now.shape, random_prompts(now.shape, now.large.words), now.large.words)
        TimedTrainer.moments.clear()
        start_peak()
        started = finished()
        facts = train(
            model,
            pairs,
            Path(folder) / "training",
            loss=dpo_nll,
            weights={"beta": now.train.beta, "alpha": now.train.alpha},
            has_reference=True,
            config=now.train,
            seed=0,
            sampled_by_start=False,
            show=lambda line: None,
            engine=TimedTrainer,
        )
    moments = TimedTrainer.moments
    yield row("checks and reference, before the first step", moments[0] - started, "s")
    first = now.train.batch // now.train.micro_batch  # micro-batches of the first step, which does not count
    rate = now.train.micro_batch * (len(moments) - 1 - first) / (moments[-1] - moments[first])
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs) / len(pairs)
    # Forward, forward again with activation checkpointing, and backward to what is before (the base has no gradient).
    flop = 2 * shape.linear * tokens * (3 if now.train.gradient_checkpointing else 2)
    yield row("training in NF4", rate, "pairs/s", floor=peaks.flop_per_second / flop)
    estimate = sum(load_object(TRAINING_BYTES)(shape, config).values()) / GIB
    yield row("training in NF4, peak memory", peak_gib(), "GiB", estimate=estimate)
    yield row("DPO term before the first step", facts["dpo_at_start"], "nats", wanted=LN2)  # else it had not begun


def roomy() -> str | None:
    """A folder for a model's files: memory where there is much, else where temporary files go."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 40 * GIB else None


def draw_beside_generate(now: Work, size: Size) -> Iterator[Row]:
    """Sampling in bfloat16 beside `generate`: every row has a prompt and as many tokens, so that all work is alike."""
    peaks, shape = Peaks.measured(), now.shape
    model = size.model(torch.bfloat16)
    prompts = random_prompts(shape, size.words)
    rows = shape.n * shape.problems
    options = {"n": shape.n, "temperature": 1.0, "seed": 0, "eos_id": [], "max_rows": rows}
    ids = torch.tensor([own[: shape.prompt - 5] for own in prompts.values()], device=model.device)

    def ours(length: int) -> int:
        batches = sample(model, prompts, max_new_tokens=length, **options)
        return sum(len(c.token_ids) for batch in batches for own in batch.values() for c in own)

    def theirs(length: int) -> int:
        torch.manual_seed(0)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=shape.n,
            max_new_tokens=length,
            min_new_tokens=length,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].numel()

    rates = {}
    for name, draw in (("generate", theirs), ("ours", ours)):
        draw(4)  # does not count
        start_peak()
        started = finished()
        rates[name] = draw(shape.response) / (finished() - started)
    model_shape = ModelShape.of(size.config)
    floor = floor_rate(model_shape, shape, peaks)
    yield row(f"sampling {size.name} in bfloat16", rates["ours"], "tokens/s", generate=rates["generate"], floor=floor)
    config = Settings(
        model=ModelConfig(dtype="bfloat16", tuning="full"),
        sampling=SamplingConfig(n=shape.n, max_rows=rows, max_new_tokens=shape.response),
    )
    parts = load_object(SAMPLING_BYTES)(model_shape, config, shape.prompt + 5, free_bytes())
    yield row(f"sampling {size.name}, peak memory", peak_gib(), "GiB", estimate=sum(parts.values()) / GIB)


def floor_rate(model: ModelShape, shape: Shape, peaks: Peaks) -> float:
    """Tokens per second of a sampler that only reads weights and cache, or only multiplies, whichever is slower."""
    rows = shape.n * shape.problems
    cached = shape.problems * shape.prompt + rows * shape.response / 2  # tokens: prompts are shared, responses grow
    seconds = 2 * (model.parameters + cached * model.cache) / peaks.bytes_per_second
    return rows / max(seconds, 2 * model.parameters * rows / peaks.flop_per_second)


class Part(NamedTuple):
    what: str
    seconds: int  # about, on an H100 of which nothing is known yet; with tiny shapes far less
    run: Callable[[Work], Iterator[Row]]


PARTS = {
    "device": Part("what the device can do", 25, measure_device),
    "draws": Part("greedy equality and the chi-square test", 60, compare_draws),
    "micro": Part("the micro preset from its first stage to its last", 110, run_micro),
    "nf4": Part("NF4, LoRA and paged AdamW on the large model", 150, train_in_four_bits),
    "small": Part("sampling beside generate, small model", 60, lambda now: draw_beside_generate(now, now.small)),
    "large": Part("sampling beside generate, large model", 90, lambda now: draw_beside_generate(now, now.large)),
}


def perform(name: str, target: Path) -> None:
    """Run one part in this process; its rows go to `target`, those before a failure too, with the reason."""
    found: dict[str, Any] = {"rows": []}
    try:
        for made in PARTS[name].run(work()):
            found["rows"].append(made)
            write_json(target, found)
    except Exception as error:
        found["reason"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    write_json(target, found)


def apart(name: str, patience: float) -> dict[str, Any]:
    """A part's rows, and the reason where it did not come to its end; run in a process of its own."""
    target = FOLDER / f".{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "irpo_utils.extras.gpu_check", name, str(target)]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory(dir=roomy()) as folder:  # goes with what a part that is killed leaves in it
        own = os.environ | quiet | {"TMPDIR": folder}
        try:
            done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=patience)
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            ended = f"it ended with exit code {done.returncode}: {last}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"it was ended after {patience:.0f} s"
    found = json.loads(target.read_text()) if target.exists() else {"rows": []}
    target.unlink(missing_ok=True)
    if ended:
        found["reason"] = ended
    return found


def lines_of(result: dict[str, Any]) -> list[str]:
    """The table's lines of one part."""
    lines = []
    for made in result["rows"]:
        value = "not measured here" if made["value"] is None else f"{made['value']:,.4g} {made['unit']}"
        beside = ", ".join(f"{name} {other:,.4g}" for name, other in made["beside"].items())
        wrong = "" if made["holds"] else "   NOT AS IT MUST BE"
        lines.append(f"  {made['what']}: {value}" + (f" ({beside})" if beside else "") + wrong)
    if "reason" in result:
        lines.append(f"  not done: {result['reason']}")
    return lines


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main(arguments: list[str]) -> int:
    """Run all parts, each apart; write what was found after each.

    Returns 1 if one did not come to its end, or something is not as it must be. Raises ConfigError.
    """
    if arguments:
        raise ConfigError(f"--gpu-check: takes nothing else, got {' '.join(arguments)}")
    cuda, started = torch.cuda.is_available(), time.monotonic()
    about = sum(part.seconds for part in PARTS.values())
    print("on a GPU" if cuda else "no GPU is here: tiny shapes on the CPU, which only tries the script", flush=True)
    print(f"{len(PARTS)} parts" + (f", about {about} s, at most {LIMIT}" if cuda else ""), flush=True)
    facts = {"gpu": cuda, "versions": versions(), "parts": {}}
    table = []
    for number, (name, part) in enumerate(PARTS.items(), 1):
        left = LIMIT - (time.monotonic() - started)
        takes = part.seconds if cuda else 10
        print(f"[{number}/{len(PARTS)}] {part.what}: about {takes} s ({left:.0f} are left) ...", flush=True)
        before = time.monotonic()
        if takes > left:
            result = {"rows": [], "reason": "there is no time left for it"}
        else:
            result = apart(name, min(left, 2 * part.seconds) if cuda else LIMIT)
        result["seconds"] = round(time.monotonic() - before, 1)
        facts["parts"][name] = {"what": part.what, "stated_seconds": takes, **result}
        lines = lines_of(result)
        print(*lines, sep="\n", flush=True)
        table += [f"{part.what} ({result['seconds']:.0f} s)", *lines]
        write_json(FOLDER / "gpu.json", facts)
        write_text(FOLDER / "table.txt", "\n".join(table) + "\n")
    print(f"-> {relative(FOLDER / 'gpu.json')}, {relative(FOLDER / 'table.txt')}; {time.monotonic() - started:.0f} s")
    results = facts["parts"].values()
    return int(not all("reason" not in found and all(made["holds"] for made in found["rows"]) for found in results))


if __name__ == "__main__":
    perform(sys.argv[1], Path(sys.argv[2]))
