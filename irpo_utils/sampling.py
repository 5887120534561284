"""Sample chains of thought. A prompt is run once and its cache shared by all samples of the problem.

What `model.generate(num_return_sequences=N)` does besides: it runs every prompt N times, concatenates the cache at
every step, and keeps finished rows in the batch until the last one ends. Here the prompt runs once per problem, the
cache is preallocated, and finished rows leave. Each problem has its own random stream (seed, problem, sample, step),
so its samples do not depend on the batch they were drawn in (exactly so in float32 up to the rounding of matmuls).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

PREFILL_TOKENS = 1 << 15  # prompt tokens that are run at once
COMPACT_AT = 0.75  # rows are copied together when fewer than this share of them is still going


@dataclass(frozen=True)
class Completion:
    """A sampled response: its token ids (EOS included where it came), and log M_t(response | prompt) at T = 1."""

    token_ids: list[int]
    logp: float
    finished: bool


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, room, width] with space for the tokens to come."""

    def __init__(self, like: Tensor, rows: int, new_tokens: int):
        """For `rows` rows of prompts with the heads, length and width of `like` [any, heads, length, width]."""
        super().__init__()
        _, heads, self.length, width = like.shape
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        self.buffers = [like.new_empty(rows, heads, self.length + new_tokens, width) for _ in ("keys", "values")]
        self._expose()

    def fill(self, first: int, keys: Tensor, values: Tensor, repeats: int) -> None:
        """Put the prompts' keys and values [prompts, heads, length, width] into the rows from `first` on, each `repeats` times."""
        for buffer, prompt in zip(self.buffers, (keys, values), strict=True):
            buffer[first : first + len(prompt) * repeats, :, : self.length] = prompt.repeat_interleave(repeats, 0)

    def _expose(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        self.buffers[0][:, :, self.length : end] = key_states
        self.buffers[1][:, :, self.length : end] = value_states
        self.length = end
        self._expose()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]
        self._expose()


def uniforms(seed: int, problem_id: str, n: int, steps: int) -> np.ndarray:
    """The problem's own random numbers in [0, 1), [n, steps], whatever batch it is in."""
    digest = hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random((n, steps))


def pick(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens [rows] from `logits` [rows, vocabulary], and their log-probabilities at temperature 1.

    Temperature 0 is greedy. Otherwise the inverse distribution function of softmax(logits / T) at `uniform` [rows].
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
        point = uniform.unsqueeze(-1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    return tokens, logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    noise: np.ndarray,
    temperature: float,
    eos_id: Sequence[int],
    max_new_tokens: int,
) -> list[list[Completion]]:
    """Sample every prompt of one batch. `noise` is [problems, n, max_new_tokens]; returns [problems][n]."""
    n, device = noise.shape[1], next(model.parameters()).device
    width = max(map(len, prompts))
    # Left padding puts the last prompt token of every row in one column. The pad id is never seen: it is masked.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = bool((mask == 0).any())
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    layers: list[PreallocatedLayer] = []
    ends, size = [], max(1, PREFILL_TOKENS // width)
    for first in range(0, len(prompts), size):
        cache, part = DynamicCache(), slice(first, first + size)
        out = model(
            input_ids=ids[part],
            attention_mask=mask[part] if padded else None,
            position_ids=positions[part],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        layers = layers or [PreallocatedLayer(p.keys, len(prompts) * n, max_new_tokens) for p in cache.layers]
        for layer, prompt in zip(layers, cache.layers, strict=True):
            layer.fill(first * n, prompt.keys, prompt.values, n)
        ends.append(out.logits[:, -1])
    cache.layers = layers
    logits = torch.cat(ends).repeat_interleave(n, 0)
    position = mask.sum(-1).repeat_interleave(n, 0)
    mask = torch.cat([mask.repeat_interleave(n, 0), mask.new_ones(len(prompts) * n, max_new_tokens)], -1)
    noise = torch.from_numpy(noise.reshape(-1, max_new_tokens)).to(device)

    stops = torch.tensor(list(eos_id), device=device)
    rows = torch.arange(len(noise), device=device)  # which sample each row of the batch is
    tokens_out = torch.full((len(noise), max_new_tokens), -1, device=device)
    logps = torch.zeros(len(noise), dtype=torch.float64, device=device)
    going = torch.ones(len(rows), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        tokens, logp = pick(logits, temperature, noise[rows, step])
        tokens_out[rows[going], step] = tokens[going]
        logps[rows[going]] += logp[going].double()
        going = going & ~torch.isin(tokens, stops)
        left = int(going.sum())
        if left == 0 or step + 1 == max_new_tokens:
            break
        if left < COMPACT_AT * len(rows):
            keep = going.nonzero().squeeze(-1)
            rows, tokens, mask, position, going = (x[keep] for x in (rows, tokens, mask, position, going))
            for layer in cache.layers:
                layer.batch_select_indices(keep)
        out = model(
            input_ids=tokens.unsqueeze(-1),
            attention_mask=mask[:, : width + step + 1] if padded else None,
            position_ids=(position + step).unsqueeze(-1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1]

    completions = []
    for ids_out, logp in zip(tokens_out.tolist(), logps.tolist(), strict=True):
        ids_out = ids_out[: ids_out.index(-1)] if -1 in ids_out else ids_out
        completions.append(Completion(ids_out, logp, ids_out[-1] in eos_id))
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def sample(
    model: PreTrainedModel,
    prompts: dict[str, list[int]],
    *,
    n: int,
    temperature: float,
    seed: int,
    eos_id: int | Sequence[int],
    max_new_tokens: int,
    rows: int = 512,
    progress: Callable[[int, int, float], None] | None = None,
) -> Iterator[dict[str, list[Completion]]]:
    """Sample `n` responses for every prompt, a batch of about `rows` responses at a time.

    Args:
        prompts: problem id -> prompt token ids, BOS included where the tokenizer wants one.
        temperature: 0 is greedy (then n must be 1).
        seed: with the problem id, fixes the problem's random stream.
        eos_id: the token, or tokens, that end a response.
        progress: called after each batch with (problems done, problems in all, tokens per second).

    Yields:
        problem id -> its n completions, for each batch. Batches go by prompt length, so padding is small.
    """
    if temperature == 0 and n != 1:
        raise ValueError(f"greedy decoding gives one response per problem, not n={n}; set n=1 or a temperature above 0")
    model.eval()
    stops = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    order = sorted(prompts, key=lambda name: (len(prompts[name]), name))
    size, started, tokens = max(1, rows // n), time.perf_counter(), 0  # problems of a batch
    for first in range(0, len(order), size):
        names = order[first : first + size]
        noise = np.stack([uniforms(seed, name, n, max_new_tokens) for name in names])
        batch: list[list[Completion]] = [[] for _ in names]
        for part in np.split(noise, range(rows, n, rows), axis=1):  # one part, unless n exceeds the rows
            drawn = sample_batch(model, [prompts[name] for name in names], part, temperature, stops, max_new_tokens)
            batch = [before + new for before, new in zip(batch, drawn, strict=True)]
        tokens += sum(len(c.token_ids) for completions in batch for c in completions)
        if progress:
            progress(first + len(names), len(order), tokens / (time.perf_counter() - started))
        yield dict(zip(names, batch, strict=True))
