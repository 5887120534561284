"""Sample chains of thought. What samples of a problem have in common is run once: the prompt, and how they begin.

What `model.generate(num_return_sequences=N)` does besides: it runs every prompt N times, keeps its cache once per sample,
concatenates the cache at every step, and keeps finished rows in the batch until the last one ends. Here a prompt runs
once and its cache is shared (`prefix.py`); samples that have said the same so far are one row, which parts where they draw
different tokens; the cache is preallocated; and finished rows leave. Responses may be given a beginning, which is run once
for all that share it: continuations from the end of every step of a solution run the solution once. Each problem has its
own random stream (seed, problem, sample, step), so its samples do not depend on the batch they were drawn in (in float32,
but for a draw that falls within a rounding error of the border between two tokens).
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .load import causal_model, memory
from .shared_prompt import SampleCache, numbered, shared_attention, shares_prompts

PREFILL_TOKENS = 1 << 15  # prompt tokens that are run at once
COMPACT_AT = 0.75  # rows are put together anew when fewer than this share of them goes on, or many more


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


def pick(logits: Tensor, temperature: float, rows: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Next tokens [samples] of samples that go on from `rows` [samples] of `logits` [rows, vocabulary].

    Temperature 0 is greedy. Otherwise the inverse distribution function of softmax(logits / T) at `uniform` [samples],
    where a row's distribution function is computed once for all its samples.

    Returns:
        the tokens, and their log-probabilities at temperature 1.
    """
    logits = logits.float()
    number = numbered(rows)  # samples are in a grid [rows, samples of one row]
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        number[:] = 0
    else:
        points = np.zeros((len(logits), int(number.max()) + 1))
        points[rows, number] = uniform
        likely = (logits if temperature == 1 else logits / temperature).softmax(-1)
        cumulative = likely.double().cumsum_(-1)
        points = torch.from_numpy(points).to(logits.device) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)
    if temperature == 1:
        logps = likely.gather(-1, tokens).log()
    else:
        logps = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    return tokens.cpu().numpy()[rows, number], logps.double().cpu().numpy()[rows, number]


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    noise: Sequence[np.ndarray],
    temperature: float,
    eos_id: Sequence[int],
    max_new_tokens: int,
    capacity: int,
    given: Sequence[np.ndarray] | None = None,
) -> tuple[list[list[Completion]], int]:
    """Sample the prompts of one batch with the `noise` of each, [its samples, max_new_tokens], on at most `capacity` rows.

    Samples of a problem that have said the same so far are one row; where they part, the row is copied. What a sample
    begins with is in `given`, of the shape of `noise`: token ids, and -1 where a token is drawn.

    Returns:
        the completions [problems][samples] of as many problems, from the first on, as went into `capacity` rows; and the
        most rows that there were.
    """
    counts, device = [len(samples) for samples in noise], next(model.parameters()).device
    width = max(map(len, prompts))
    # Left padding puts the last prompt token of every row in one column. The pad id is never seen: it is masked.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = bool((mask == 0).any())
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    shared = shares_prompts(model)
    caches, last, size = [], [], max(1, PREFILL_TOKENS // width)
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
        last.append(out.logits[:, -1])
    cache = SampleCache(caches, mask, max(len(prompts), min(capacity, sum(counts))), max_new_tokens, shared)
    del caches
    logits, lengths = torch.cat(last), np.array([len(p) for p in prompts])
    vocabulary = logits.shape[-1]

    done, most = len(prompts), len(prompts)
    owner = np.arange(len(prompts))  # the problem of each row
    who, row = np.arange(sum(counts)), np.repeat(owner, counts)  # the samples that go on, and the row of each
    noise, given = np.concatenate(noise), None if given is None else np.concatenate(given)
    tokens_out, logps_out = np.full(noise.shape, -1), np.zeros(len(noise))
    with shared_attention(model, shared):
        for step in range(max_new_tokens):
            tokens, logps = pick(logits, temperature, row, noise[who, step])
            if given is not None:
                fixed = given[who, step] >= 0
                tokens, logps = np.where(fixed, given[who, step], tokens), np.where(fixed, 0.0, logps)
            tokens_out[who, step] = tokens
            logps_out[who] += logps
            on = ~np.isin(tokens, eos_id)
            who, row, tokens = who[on], row[on], tokens[on]
            if step + 1 == max_new_tokens or not len(who):
                break
            # The next rows: distinct (row, token). A row's first one stays where it is.
            nexts, which = np.unique(row * vocabulary + tokens, return_inverse=True)
            if len(nexts) > capacity:
                wanted = np.bincount(owner[nexts // vocabulary], minlength=done)
                done = int(np.searchsorted(np.cumsum(wanted), capacity, side="right"))
                on = owner[row] < done
                who, row, tokens = who[on], row[on], tokens[on]
                nexts, which = np.unique(row * vocabulary + tokens, return_inverse=True)
            before, nexts = np.divmod(nexts, vocabulary)
            stays = np.r_[True, before[1:] != before[:-1]]
            free = np.setdiff1d(np.arange(len(owner)), before)
            more = int((~stays).sum())
            # Many rows more or fewer: all are put together anew, by problem.
            if not COMPACT_AT < len(nexts) / len(owner) < 1 / COMPACT_AT:
                order = np.argsort(owner[before], kind="stable")
                owner = owner[before[order]]
                cache.copy(before[order], slice(0, len(order)), owner)
                at = np.argsort(order)
            else:
                at = before.copy()
                if more:
                    at[~stays] = np.r_[free, np.arange(len(owner), len(owner) + more)][:more]
                    owner = np.r_[owner, np.zeros(max(0, more - len(free)), dtype=int)]
                    owner[at[~stays]] = owner[before[~stays]]
                    cache.copy(before[~stays], at[~stays], owner)
            row, most = at[which], max(most, len(nexts))
            inputs = np.zeros(len(owner), dtype=int)  # ended rows run along until there are many
            inputs[at] = nexts
            options = {"shared": cache} if shared else {}
            if padded and not shared:
                options["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), step + 1)], -1)[cache.owner]
            out = model(
                input_ids=torch.from_numpy(inputs).to(device).unsqueeze(-1),
                position_ids=torch.from_numpy(lengths[owner] + step).to(device).unsqueeze(-1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **options,
            )
            logits = out.logits[:, -1]

    completions = []
    for ids_out, logp in zip(tokens_out[: sum(counts[:done])].tolist(), logps_out.tolist(), strict=False):
        ids_out = ids_out[: ids_out.index(-1)] if -1 in ids_out else ids_out
        completions.append(Completion(ids_out, logp, ids_out[-1] in eos_id))
    ends = list(accumulate(counts[:done], initial=0))
    return [completions[first:end] for first, end in pairwise(ends)], most


def check_greedy(n: int, temperature: float) -> None:
    """Raises a ValueError for several responses at temperature 0, which would be the same one."""
    if temperature == 0 and n != 1:
        raise ValueError(f"greedy decoding gives one response per problem, not n={n}; set n=1 or a temperature above 0")


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
    starts: dict[str, list[list[int]]] | None = None,
) -> Iterator[dict[str, list[Completion]]]:
    """Sample `n` responses for every prompt, or from every beginning in `starts`, a batch at a time.

    Args:
        prompts: problem id -> prompt token ids, BOS included where the tokenizer wants one.
        temperature: 0 is greedy (then n must be 1).
        seed: with the problem id, fixes the problem's random stream.
        eos_id: the token, or tokens, that end a response.
        rows: responses that are run at once, at most; fewer where memory does not hold as many (see `fitting_rows`), and
            half of them, with a warning, whenever it runs out all the same.
        progress: called after each batch with (problems done, problems in all, tokens per second).
        starts: problem id -> the token ids that its responses begin with, `n` responses for each; [] is none. They count
            as new tokens. What several begin with is run once, and what one draws does not depend on which others there are.

    Yields:
        problem id -> its n completions, for each batch; with `starts` n for each of them, in their order. Token ids are the
        whole response, its given beginning included; logp is that of what was drawn. Batches go by prompt length, so
        padding is small.

    Raises:
        ValueError: several responses at temperature 0, or a beginning that no response can have (see `check_starts`).
    """
    check_greedy(n, temperature)
    model.eval()
    stops = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    begin = {name: [[]] for name in prompts} if starts is None else starts
    check_starts(begin, prompts, stops, max_new_tokens)
    order = sorted(prompts, key=lambda name: (len(prompts[name]), name))
    n, each = n * max(map(len, begin.values()), default=1), n  # of one problem, at most; and from each beginning
    rows = min(rows, fitting_rows(model, max(map(len, prompts.values()), default=0), max_new_tokens, n))
    started, tokens, done, size = time.perf_counter(), 0, 0, max(1, rows // n)  # problems of a batch
    while done < len(order):
        names = order[done : done + size]
        noise = [
            np.concatenate([uniforms(seed, stream(name, ids), each, max_new_tokens) for ids in begin[name]])
            for name in names
        ]
        given = None if starts is None else [given_tokens(begin[name], each, max_new_tokens) for name in names]
        batch: list[list[Completion]] = [[] for _ in names]
        ids = [prompts[name] for name in names]
        try:
            for first in range(0, max(map(len, noise)), rows):  # one part, unless they exceed the rows
                part = lambda samples: [s[first : first + rows] for s in samples[: len(batch)]]  # noqa: B023, E731
                drawn, most = sample_batch(
                    model,
                    ids[: len(batch)],
                    part(noise),
                    temperature,
                    stops,
                    max_new_tokens,
                    min(rows, size * n),
                    given and part(given),
                )
                batch = [before + new for before, new in zip(batch, drawn, strict=False)]
        except RuntimeError as error:
            if rows == 1 or not should_reduce_batch_size(error):
                raise
            drawn = None
        if drawn is None:  # not in the handler: its error holds the tensors of the batch that did not fit
            torch.cuda.empty_cache()
            warnings.warn(f"memory ran out with {rows} rows at once; going on with {rows // 2}", stacklevel=2)
            rows //= 2
            size = max(1, min(size // 2, rows // n))
            continue
        done += len(batch)
        tokens += sum(len(c.token_ids) for completions in batch for c in completions)
        # The more samples say the same, the more problems share the rows.
        size = max(1, rows // n, min(most_prompts(rows, n), 4 * size, int(0.8 * rows * len(batch) / most)))
        if progress:
            progress(done, len(order), tokens / (time.perf_counter() - started))
        yield dict(zip(names, batch, strict=False))


def stream(name: str, start: list[int]) -> str:
    """What names the random numbers of the samples of a problem that begin with `start`."""
    return f"{name}/{','.join(map(str, start))}" if start else name


def given_tokens(starts: list[list[int]], n: int, length: int) -> np.ndarray:
    """The beginnings as `sample_batch` takes them, [starts x n, length]: token ids, then -1."""
    rows = np.full((len(starts), length), -1)
    for row, start in zip(rows, starts, strict=True):
        row[: len(start)] = start
    return rows.repeat(n, axis=0)


def check_starts(
    starts: dict[str, list[list[int]]], prompts: dict[str, list[int]], stops: Sequence[int], max_new_tokens: int
) -> None:
    """Raises a ValueError that names the problem, unless every prompt has beginnings that a response can go on from."""
    for name in prompts:
        mine = starts.get(name)
        if not mine:
            raise ValueError(f"starts: {name} has none; leave its prompt out, or give [] for a response without one")
        if len({tuple(start) for start in mine}) < len(mine):
            raise ValueError(f"starts: {name} has the same one twice, which would draw the same responses")
        if any(len(start) >= max_new_tokens for start in mine):
            raise ValueError(f"starts: one of {name} leaves nothing of max_new_tokens={max_new_tokens}")
        if any(token in stops for start in mine for token in start):
            raise ValueError(f"starts: one of {name} has ended already, it holds a token of eos_id")


def beginnings(responses: list[list[int]]) -> int:
    """How many rows responses to one prompt need: their different proper beginnings, the empty one among them."""
    count, last = 0, None
    for ids in sorted(responses):
        if last is None:
            count += len(ids)
        else:
            same = next(
                (i for i, (a, b) in enumerate(zip(last, ids, strict=False)) if a != b), min(len(last), len(ids))
            )
            count += max(0, len(ids) - 1 - min(same, len(last) - 1))
        last = ids
    return count


def most_prompts(rows: int, n: int) -> int:
    """Prompts of one batch: never so many that they fill the memory that is meant for responses."""
    return max(1, rows // min(n, 4))


def fitting_rows(model: PreTrainedModel, prompt: int, new_tokens: int, n: int) -> int:
    """How many rows of `new_tokens` tokens fit, with prompts of `prompt` tokens, into half of the free memory."""
    config = causal_model(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    per_row = token * (prompt / min(n, 4) + new_tokens) + 24 * config.vocab_size  # and logits, with their sums
    if not shares_prompts(model):
        per_row += token * prompt
    return max(1, int(memory() / 2 / per_row))
