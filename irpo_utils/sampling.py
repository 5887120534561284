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

from .prefix import SampleCache, shared_attention, shares_prompts

PREFILL_TOKENS = 1 << 15  # prompt tokens that are run at once
COMPACT_AT = 0.75  # rows are copied together when fewer than this share of them is still going


@dataclass(frozen=True)
class Completion:
    """A sampled response: its token ids (EOS included where it came), and log M_t(response | prompt) at T = 1."""

    token_ids: list[int]
    logp: float
    finished: bool


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
    shared = shares_prompts(model)
    caches, ends, size = [], [], max(1, PREFILL_TOKENS // width)
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        caches.append(DynamicCache())
        out = model(
            input_ids=ids[part],
            attention_mask=mask[part] if padded else None,
            position_ids=positions[part],
            past_key_values=caches[-1],
            use_cache=True,
            logits_to_keep=1,
        )
        ends.append(out.logits[:, -1])
    cache = SampleCache(caches, mask, n, max_new_tokens, shared)
    del caches
    logits = torch.cat(ends).repeat_interleave(n, 0)
    position = mask.sum(-1).repeat_interleave(n, 0)
    if not shared:
        mask = torch.cat([mask.repeat_interleave(n, 0), mask.new_ones(len(position), max_new_tokens)], -1)
    noise = torch.from_numpy(noise.reshape(-1, max_new_tokens)).to(device)

    stops = torch.tensor(list(eos_id), device=device)
    # The rows are a grid [problems, samples], which shrinks as samples end: `rows` says which sample each one is.
    rows = torch.arange(len(noise), device=device).view((-1, n) if shared else (-1, 1))
    tokens_out = torch.full((len(noise), max_new_tokens), -1, device=device)
    logps = torch.zeros(len(noise), dtype=torch.float64, device=device)
    going = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens, logp = pick(logits, temperature, noise[rows.flatten(), step])
        on = going.flatten()
        tokens_out[rows[going], step] = tokens[on]
        logps[rows[going]] += logp[on].double()
        going = going & ~torch.isin(tokens, stops).view_as(going)
        left = going.sum(-1)
        most, problems = int(left.max()), int((left > 0).sum())
        if most == 0 or step + 1 == max_new_tokens:
            break
        if problems * most < COMPACT_AT * rows.numel():
            # A problem with fewer samples left than another keeps ended ones beside them, whose tokens are not looked at.
            here = (left > 0).nonzero().squeeze(-1)
            there = (~going[here]).int().argsort(stable=True, dim=-1)[:, :most]
            kept = (here.unsqueeze(-1) * rows.shape[1] + there).flatten()
            tokens, position = tokens[kept], position[kept]
            rows, going = (x.flatten()[kept].view(problems, most) for x in (rows, going))
            mask = mask if shared else mask[kept]
            cache.keep(here, there)
        with shared_attention(model, shared):
            out = model(
                input_ids=tokens.unsqueeze(-1),
                attention_mask=mask[:, : width + step + 1] if padded and not shared else None,
                position_ids=(position + step).unsqueeze(-1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **({"shared": cache} if shared else {}),
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
