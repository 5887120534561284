"""Sample chains of thought. What samples of a problem have in common is run once: the prompt, and equal first tokens.

`model.generate(num_return_sequences=N)` does more work. It runs every prompt N times, keeps its cache once per sample,
concatenates the cache at every step, and keeps finished rows in the batch until the last one ends. Here a prompt runs
once and its cache is shared (`shared_prompt.py`). Samples whose tokens have been the same so far are one row, which
parts where they draw different tokens. The cache is not put together anew at each step, and finished rows leave.

Responses may be given their first tokens, a start, which is run once for all that share it: continuations from the end
of every step of a solution run the solution once.

Each problem has its own random stream (seed, problem, sample, step), so its samples do not depend on the batch they
were drawn in (in float32, except for a draw within a rounding error of the border between two tokens).
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..progress import counting
from .load import causal_model, free_bytes, shards
from .shape import cache_numbers
from .shared_prompt import SampleCache, numbered, pad_after, repeated, run_prefix, shared_attention, shares_prompts

DEV_SCORE_ROWS = 256  # responses at once where each is greedy, at most
PREFILL_TOKENS = 1 << 15  # prompt tokens of a part that is run at once, at most
ENOUGH_TOKENS = 1 << 11  # prompt tokens after which longer prompts are rather run by themselves
LONGER = 1.25  # that many times as long as the shortest
BLOCK = 256  # words of a vocabulary whose probabilities are summed together
SMALL = 16 * BLOCK  # words of a vocabulary that is summed one by one
CACHED = 1 << 18  # logits that are worked on at once on a CPU: 1 MB
COMPACT_AT = 0.75  # rows are put together anew when fewer than this share of them goes on, or many more


@dataclass(frozen=True)
class Completion:
    """A sampled response: its token ids (EOS included where it came), and log M_t(response | prompt) at T = 1."""

    token_ids: list[int]
    logp: float  # of the tokens that were drawn
    finished: bool
    inserted: tuple[int, ...] = ()  # numbers of the tokens that were not


def uniforms(seed: int, problem_id: str, n: int, steps: int) -> np.ndarray:
    """The problem's own random numbers in [0, 1), [n, steps], whatever batch it is in."""
    digest = hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random((n, steps))


def pick(
    logits: Tensor, temperature: float, row_of_sample: np.ndarray, uniform: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Next tokens [samples] of samples that go on from row `row_of_sample` [samples] of `logits` [rows, vocabulary].

    Temperature 0 is greedy. Otherwise the inverse distribution function of softmax(logits / T) at `uniform` [samples],
    where a row's distribution function is computed once for all its samples; a sample whose `uniform` is negative is
    greedy all the same.

    Returns:
        the tokens, and their log-probabilities at temperature 1.
    """
    number = numbered(row_of_sample)  # samples are in a grid [rows, samples of one row]
    if temperature == 0:
        number[:] = 0
    points = np.zeros((len(logits), int(number.max()) + 1))
    points[row_of_sample, number] = uniform
    points = torch.from_numpy(points).to(logits.device)
    # On a CPU few rows at once: what a step of the arithmetic leaves is in the processor's cache for the next.
    rows = max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    greedy = bool((uniform < 0).any())
    parts = zip(logits.split(rows), points.split(rows), strict=True)
    tokens, logps = map(
        torch.cat, zip(*(picked(part.float(), temperature, at, greedy) for part, at in parts), strict=True)
    )
    if logps.isnan().any():
        raise FloatingPointError("the model's logits are not numbers (NaN); its weights or its dtype are broken")
    return tokens.cpu().numpy()[row_of_sample, number], logps.double().cpu().numpy()[row_of_sample, number]


def picked(logits: Tensor, temperature: float, points: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """`pick` for `logits` [rows, vocabulary] at `points` [rows, samples of a row]; both results are of their shape.

    Args:
        greedy: whether some points are negative.
    """
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        likely = (logits if temperature == 1 else logits / temperature).softmax(-1)
        tokens = inverse(likely, points)
        if greedy:
            tokens = torch.where(points < 0, logits.argmax(-1, keepdim=True), tokens)
    if temperature == 1:
        return tokens, likely.gather(-1, tokens).log()
    return tokens, logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)


def inverse(likely: Tensor, uniform: Tensor) -> Tensor:
    """Where the distribution functions of `likely` [rows, words] exceed `uniform` [rows, points] times their ends.

    A word of a large vocabulary is found in two steps, its block and itself, so that only the sums of blocks and one
    block a point are summed in float64.
    """
    words = likely.shape[-1]
    if words <= SMALL:
        cumulative = likely.double().cumsum_(-1)
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_(max=words - 1)
    whole = F.pad(likely, (0, -words % BLOCK)) if words % BLOCK else likely
    blocks = whole.unflatten(-1, (-1, BLOCK))  # [rows, blocks, words of a block]
    ends = blocks.sum(-1).double().cumsum_(-1)
    point = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp_(max=ends.shape[-1] - 1)
    before = F.pad(ends, (1, 0)).gather(-1, block)
    share = (point - before) / (ends.gather(-1, block) - before)  # of the block's probability
    rows = torch.arange(len(likely), device=likely.device).unsqueeze(-1)
    inside = blocks[rows, block].double().cumsum_(-1)  # [rows, points, words of a block]
    word = torch.searchsorted(inside, (share.unsqueeze(-1) * inside[..., -1:]), right=True).squeeze(-1)
    found = (block * BLOCK + word.clamp_(max=BLOCK - 1)).clamp_(max=words - 1)
    # Where a point rounds to its block's end, the block's last word may have no probability.
    possible = likely.gather(-1, found) > 0
    if likely.device.type == "cpu" and possible.all():  # to ask costs more than an argmax where it waits for a GPU
        return found
    return torch.where(possible, found, likely.argmax(-1, keepdim=True))


def pick_bytes(words: int) -> int:
    """Bytes that `pick` takes for one row of logits: float32, probabilities, and their sums or a copy of them."""
    return words * (24 if words <= SMALL else 12)


class Insert(Protocol):
    """What is written into a response, and not drawn, as a calculator's result."""

    triggers: np.ndarray  # the tokens behind which it is asked

    def __call__(self, token_ids: list[int]) -> Sequence[int]:
        """The tokens that come behind a response's first ones; none, if it has nothing to write."""


class Decoding(NamedTuple):
    """How responses are drawn."""

    temperature: float  # 0 is greedy
    eos_ids: Sequence[int]  # what ends a response
    max_new_tokens: int
    insert: Insert | None = None


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    noise: Sequence[np.ndarray],
    decoding: Decoding,
    capacity: int,
    forced: Sequence[np.ndarray] | None = None,
) -> tuple[list[list[Completion]], int]:
    """Sample the prompts of one batch on at most `capacity` rows.

    Samples of a problem whose tokens have been the same so far are one row; where they part, the row is copied.

    Args:
        noise: of each prompt the random numbers of its samples, [samples, max_new_tokens]; negative: greedy.
        forced: of the same shape, what samples start with: token ids, and -1 where a token is drawn.

    Returns:
        the completions [problems][samples] of as many problems, from the first on, as went into `capacity` rows; and
        the largest number of rows that there was.
    """
    temperature, eos_ids, max_new_tokens, insert = decoding
    sample_counts = [len(samples) for samples in noise]
    device, prompt_lengths = next(model.parameters()).device, np.array([len(p) for p in prompts])
    shared, padded = shares_prompts(model), len(set(prompt_lengths)) > 1
    caches, logits, mask = run_prompts(model, prompts, padded)
    cache = SampleCache(caches, mask, max(len(prompts), min(capacity, sum(sample_counts))), max_new_tokens, shared)
    del caches
    vocabulary = logits.shape[-1]

    done = peak_rows = len(prompts)  # problems that still go into the rows, from the first on
    prompt_of_row = np.arange(len(prompts))
    sample_index = np.arange(sum(sample_counts))  # the samples that go on
    row_of_sample = np.repeat(prompt_of_row, sample_counts)  # of those
    noise, forced = np.concatenate(noise), None if forced is None else np.concatenate(forced)
    if insert and forced is None:
        forced = np.full(noise.shape, -1)
    tokens_out, logps_out, inserted = np.full(noise.shape, -1), np.zeros(len(noise)), np.zeros(noise.shape, bool)
    with (
        shared_attention(model) if shared else nullcontext(),
        counting("", max_new_tokens, worth=len(prompts)) as count,
    ):
        for step in range(max_new_tokens):
            count(step)
            tokens, logps = pick(logits, temperature, row_of_sample, noise[sample_index, step])
            if forced is not None:
                fixed = forced[sample_index, step] >= 0
                tokens = np.where(fixed, forced[sample_index, step], tokens)
                logps = np.where(fixed, 0.0, logps)
            tokens_out[sample_index, step] = tokens
            logps_out[sample_index] += logps
            for i in sample_index[np.isin(tokens, insert.triggers)] if insert and step + 1 < max_new_tokens else ():
                written = insert(tokens_out[i, : step + 1].tolist()) if forced[i, step + 1] < 0 else ()
                own = slice(step + 1, min(step + 1 + len(written), max_new_tokens))
                forced[i, own], inserted[i, own] = written[: own.stop - own.start], True
            going_on = ~np.isin(tokens, eos_ids)
            sample_index, row_of_sample, tokens = sample_index[going_on], row_of_sample[going_on], tokens[going_on]
            if step + 1 == max_new_tokens or not len(sample_index):
                break
            # The next rows: distinct (row, token).
            next_rows, next_of_sample = np.unique(row_of_sample * vocabulary + tokens, return_inverse=True)
            if len(next_rows) > capacity:
                needed = np.bincount(prompt_of_row[next_rows // vocabulary], minlength=done)
                done = int(np.searchsorted(np.cumsum(needed), capacity, side="right"))
                kept = prompt_of_row[row_of_sample] < done
                sample_index, row_of_sample, tokens = sample_index[kept], row_of_sample[kept], tokens[kept]
                next_rows, next_of_sample = np.unique(row_of_sample * vocabulary + tokens, return_inverse=True)
            sources, next_tokens = np.divmod(next_rows, vocabulary)
            new_row, prompt_of_row = move_rows(cache, prompt_of_row, sources)
            row_of_sample, peak_rows = new_row[next_of_sample], max(peak_rows, len(next_rows))
            inputs = np.zeros(len(prompt_of_row), dtype=int)  # ended rows run along until there are many
            inputs[new_row] = next_tokens
            options = {"shared": cache} if shared else {}
            if padded and not shared:
                seen = torch.cat([mask, mask.new_ones(len(mask), step + 1)], -1)
                options["attention_mask"] = seen[cache.prompt_of_row]
            out = model(
                input_ids=torch.from_numpy(inputs).to(device).unsqueeze(-1),
                position_ids=torch.from_numpy(prompt_lengths[prompt_of_row] + step).to(device).unsqueeze(-1),
                past_key_values=cache,
                use_cache=True,
                **options,
            )
            logits = out.logits[:, -1]

    completions = []
    drawn = zip(tokens_out[: sum(sample_counts[:done])].tolist(), logps_out.tolist(), inserted, strict=False)
    for ids, logp, written in drawn:
        ids = ids[: ids.index(-1)] if -1 in ids else ids
        completions.append(
            Completion(ids, logp, ids[-1] in eos_ids, tuple(np.flatnonzero(written[: len(ids)]).tolist()))
        )
    ends = list(accumulate(sample_counts[:done], initial=0))
    return [completions[first:end] for first, end in pairwise(ends)], peak_rows


def run_prompts(
    model: PreTrainedModel, prompts: list[list[int]], padded: bool
) -> tuple[list[DynamicCache], Tensor, Tensor]:
    """Run every prompt once, and what all begin with once for all; `padded` says whether their lengths differ.

    Returns:
        their caches, in parts; the logits of each one's next token, [prompts, vocabulary]; and the mask, which is 0
        where a cache holds padding, [prompts, length].
    """
    device, width = next(model.parameters()).device, max(map(len, prompts))
    # Left padding puts the last prompt token of every row in one column. The pad id is never seen: it is masked.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    prefix, mask = run_prefix(model, ids, mask)
    length, positions = prefix.get_seq_length(), (mask.cumsum(-1) - 1).clamp_(min=0)
    caches, logits = [], []
    # As an index, not a count: of a slice that is not contiguous, a product on a CPU copies the head for every prompt.
    last = ids.new_tensor([-1])
    for part, longest in parts_of_like_length([len(p) - length for p in prompts], length):
        own = slice(width - longest, width)
        caches.append(repeated(prefix, len(ids[part])))
        out = model(
            input_ids=ids[part, own],
            attention_mask=torch.cat([mask[part, :length], mask[part, own]], -1) if padded else None,
            position_ids=positions[part, own],
            past_key_values=caches[-1],
            use_cache=True,
            logits_to_keep=last,
        )
        logits.append(out.logits[:, -1])
        pad_after(caches[-1], length, width - longest - length)
    return caches, torch.cat(logits), mask


def parts_of_like_length(lengths: list[int], prefix: int) -> Iterator[tuple[slice, int]]:
    """Prompts of `lengths` tokens behind a prefix in parts that are run together, with the longest of each.

    Little of a part is padding, and with what it attends to it has at most PREFILL_TOKENS tokens.
    """
    first, longest, least = 0, lengths[0], lengths[0]
    for i, length in enumerate(lengths):
        longest, least = max(longest, length), min(least, length)
        enough = (i - first) * longest >= ENOUGH_TOKENS and longest > LONGER * least
        if i > first and (enough or (i + 1 - first) * (prefix + longest) > PREFILL_TOKENS):
            yield slice(first, i), max(lengths[first:i])
            first, longest, least = i, length, length
    yield slice(first, len(lengths)), longest


def move_rows(cache: SampleCache, prompt_of_row: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give every next row its place in the cache. Number i goes on from row `sources[i]`; they are in ascending order.

    The first that goes on from a row stays there. The others take the places of rows that have ended, then new ones.
    When rows become many more or many fewer, all are put together anew, by prompt.

    Returns:
        the place of each next row [next rows], and the prompt of each place [rows].
    """
    count = len(prompt_of_row)
    if not COMPACT_AT < len(sources) / count < 1 / COMPACT_AT:
        order = np.argsort(prompt_of_row[sources], kind="stable")
        prompt_of_row = prompt_of_row[sources[order]]
        cache.copy(sources[order], slice(0, len(order)), prompt_of_row)
        return np.argsort(order), prompt_of_row
    new_row = sources.copy()
    copied = np.r_[False, sources[1:] == sources[:-1]]
    if copied.any():
        ended = np.setdiff1d(np.arange(count), sources)
        places = np.r_[ended, np.arange(count, count + copied.sum())][: copied.sum()]
        new_row[copied] = places
        prompt_of_row = np.r_[prompt_of_row, np.zeros(max(0, len(places) - len(ended)), dtype=int)]
        prompt_of_row[places] = prompt_of_row[sources[copied]]
        cache.copy(sources[copied], places, prompt_of_row)
    return new_row, prompt_of_row


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
    max_rows: int = 512,
    greedy_too: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    starts: dict[str, list[list[int]]] | None = None,
    insert: Insert | None = None,
) -> Iterator[dict[str, list[Completion]]]:
    """Sample `n` responses for every prompt, or from every start in `starts`, a batch at a time.

    Args:
        prompts: problem id -> prompt token ids, BOS included where the tokenizer wants one.
        temperature: 0 is greedy (then n must be 1).
        seed: with the problem id, fixes the problem's random stream.
        eos_id: the token, or tokens, that end a response.
        max_rows: responses that are run at once, at most. Fewer where memory does not hold them (see `fitting_rows`),
            and half as many, with a warning, whenever it runs out all the same.
        greedy_too: one more response, before each n, is greedy; it shares the prompt, and tokens that are sampled too.
        progress: called after each batch with (problems done, problems in all, tokens per second).
        starts: problem id -> the token ids that its responses start with, `n` responses for each; [] is none. They
            count as new tokens. What several have in common is run once, and none changes what another draws.
        insert: what writes into responses; its tokens count as new ones.

    Yields:
        problem id -> its n completions (n + 1 with `greedy_too`), for each batch; with `starts` as many for each of
        them, in their order. Token ids are the whole response, its start included; logp is that of the tokens that were
        drawn. Batches go by prompt length, so padding is small.

    Raises:
        ValueError: several responses at temperature 0, or a start that no response can have (see `check_starts`).
    """
    check_greedy(n, temperature)
    model.eval()
    eos_ids = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    decoding = Decoding(temperature, eos_ids, max_new_tokens, insert)
    starts_of = {name: [[]] for name in prompts} if starts is None else starts
    check_starts(starts_of, prompts, eos_ids, max_new_tokens)
    order = sorted(prompts, key=lambda name: (len(prompts[name]), name))
    each, greedy = n + greedy_too, np.full((int(greedy_too), max_new_tokens), -1.0)
    samples = each * max((len(starts_of[name]) for name in prompts), default=1)  # of one problem, at most
    longest = max(map(len, prompts.values()), default=0)
    if not shards():  # whose processes have agreed on the rows
        max_rows = min(max_rows, fitting_rows(model, longest, max_new_tokens, samples))
    started, tokens, done, size = time.perf_counter(), 0, 0, max(1, max_rows // samples)  # problems of a batch
    while done < len(order):
        names = order[done : done + size]
        noise = [
            np.concatenate(
                [
                    part
                    for start in starts_of[name]
                    for part in (greedy, uniforms(seed, stream(name, start), n, max_new_tokens))
                ]
            )
            for name in names
        ]
        forced = None if starts is None else [forced_tokens(starts[name], each, max_new_tokens) for name in names]
        batch: list[list[Completion]] = [[] for _ in names]
        ids = [prompts[name] for name in names]
        try:
            for first in range(0, max(map(len, noise)), max_rows):  # one part, unless they exceed the rows
                part, capacity = slice(first, first + max_rows), min(max_rows, size * samples)
                if all(len(rows) <= first for rows in noise[: len(batch)]):
                    break  # those with more of them wait for the next batch
                drawn, peak_rows = sample_batch(
                    model,
                    ids[: len(batch)],
                    [rows[part] for rows in noise[: len(batch)]],
                    decoding,
                    capacity,
                    forced and [rows[part] for rows in forced[: len(batch)]],
                )
                batch = [before + new for before, new in zip(batch, drawn, strict=False)]
        except RuntimeError as error:
            # The processes of a sharded model go through it together, so none can go on with fewer rows alone.
            if max_rows == 1 or shards() or not should_reduce_batch_size(error):
                raise
            drawn = None
        if drawn is None:  # not in the handler: its error holds the tensors of the batch that did not fit
            torch.cuda.empty_cache()
            fewer = max_rows // 2
            warnings.warn(f"memory ran out with {max_rows} rows at once; going on with {fewer}", stacklevel=2)
            max_rows = fewer
            size = max(1, min(size // 2, max_rows // samples))
            continue
        done += len(batch)
        tokens += sum(len(c.token_ids) for completions in batch for c in completions)
        # The more tokens the samples have in common, the more problems share the rows.
        fitting = int(0.8 * max_rows * len(batch) / peak_rows)
        size = max(1, max_rows // samples, min(most_prompts(max_rows, samples), 4 * size, fitting))
        if progress:
            progress(done, len(order), tokens / (time.perf_counter() - started))
        yield dict(zip(names, batch, strict=False))


def stream(name: str, start: list[int]) -> str:
    """What names the random numbers of a problem's samples that start with `start`."""
    return f"{name}/{','.join(map(str, start))}" if start else name


def forced_tokens(starts: list[list[int]], n: int, length: int) -> np.ndarray:
    """The starts as `sample_batch` takes them, [starts x n, length]: token ids, then -1."""
    rows = np.full((len(starts), length), -1)
    for row, start in zip(rows, starts, strict=True):
        row[: len(start)] = start
    return rows.repeat(n, axis=0)


def check_starts(
    starts: dict[str, list[list[int]]], prompts: Iterable[str], eos_ids: Sequence[int], max_new_tokens: int
) -> None:
    """Raises a ValueError that names the problem, unless every prompt has starts that a response can go on from."""
    for name in prompts:
        own = starts.get(name)
        if not own:
            raise ValueError(f"starts: {name} has none; leave its prompt out, or give [] for a response without one")
        if len({tuple(start) for start in own}) < len(own):
            raise ValueError(f"starts: {name} has the same one twice, which would draw the same responses")
        if any(len(start) >= max_new_tokens for start in own):
            raise ValueError(f"starts: one of {name} leaves nothing of max_new_tokens={max_new_tokens}")
        if any(token in eos_ids for start in own for token in start):
            raise ValueError(f"starts: one of {name} has ended already, it holds a token of eos_id")


def most_prompts(max_rows: int, samples: int) -> int:
    """Prompts of one batch: never so many that they fill the memory that is meant for responses."""
    return max(1, max_rows // min(samples, 4))


def fitting_rows(model: PreTrainedModel, prompt_length: int, new_tokens: int, samples: int) -> int:
    """How many rows of `new_tokens` tokens fit into half of the free memory, with `samples` rows to a prompt."""
    config = causal_model(model).config.get_text_config()
    token = cache_numbers(config) * model.dtype.itemsize
    per_row = token * (prompt_length / min(samples, 4) + new_tokens) + pick_bytes(config.vocab_size)
    if not shares_prompts(model):
        per_row += token * prompt_length
    return max(1, int(free_bytes() / 2 / per_row))
