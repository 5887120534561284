"""One prompt, many responses: a cache that holds every prompt once, and the attention that reads it.

Decoding is reading: at every step attention reads all keys and values of every row. N samples of a problem have the
same prompt, so here its keys and values lie in memory once, and the queries of a step meet them in one matrix product;
only a row's own response is read for that row alone. The scores of both parts go through one softmax, so the result is
that of ordinary attention.

Models of transformers take it as one more attention function. Whether a model computes the same with it is tried on a
few tokens before it is used (`shares_prompts`); for a model that does not, every row gets a copy of its prompt's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .load import causal_model, passes
from .shape import sees_all

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
LEAST_PREFIX = 16  # tokens; fewer are not worth a pass of their own
PIECE = 16  # tokens by which the memory of responses grows


def run_prefix(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Run once what all prompts begin with, such as the instruction of a task.

    Args:
        ids, mask: the prompts, padded on their left, [prompts, length].

    Returns:
        its cache, of one row (empty where there is nothing worth it); and the mask of the prompts behind it: with n
        tokens in the cache, `ids[:, n:]` are still to be run, and the mask is 1 on the first n and where those are of
        the prompt, [prompts, length].
    """
    cache, causal = DynamicCache(), causal_model(model)
    count, width = ids.shape
    config = causal.config.get_text_config()
    # How a token is turned may depend on the length that is run with it.
    turned_by_length = (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope")
    # Padding comes to stand between the prefix and what follows. An attention of the model's own kind (MPT, GPT-Neo)
    # may measure distances in the cache, padding included.
    own_kind = not causal._can_set_attn_implementation() or not sees_all(config)
    if count < 2 or turned_by_length or own_kind:
        return cache, mask
    start = width - mask.sum(-1, keepdim=True)
    column = torch.arange(width, device=ids.device)
    kept = max(0, width - int(start.max()) - 1)  # every prompt keeps a token of its own
    beginnings = ids.gather(1, start + column[:kept])
    length = int((beginnings == beginnings[:1]).all(0).long().cumprod(0).sum())
    if length < LEAST_PREFIX:
        return cache, mask
    causal.base_model(input_ids=beginnings[:1, :length], past_key_values=cache, use_cache=True)
    return cache, ((column < length) | (column >= start + length)).to(mask.dtype)


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache of `rows` rows, each as the one row of `cache`."""
    found = DynamicCache()
    for number, layer in enumerate(cache.layers):
        found.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
    return found


def pad_after(cache: DynamicCache, length: int, more: int) -> None:
    """Put `more` tokens that are not looked at behind the first `length` ones."""
    for layer in cache.layers if more else ():
        for side in ("keys", "values"):
            states = getattr(layer, side)
            gap = states.new_zeros(*states.shape[:2], more, states.shape[-1])
            setattr(layer, side, torch.cat([states[:, :, :length], gap, states[:, :, length:]], -2))


def numbered(groups: np.ndarray) -> np.ndarray:
    """The number of each member within its group, from 0 on, for members of `groups` [members]."""
    order = np.argsort(groups, kind="stable")
    numbers = np.empty_like(groups)
    numbers[order] = np.arange(len(groups)) - np.searchsorted(groups[order], groups[order])
    return numbers


class SampleLayer(DynamicLayer):
    """One layer's keys and values, with memory for the tokens to come.

    `prompt` are those of the prompts [problems, heads, length, width]; `buffers` those of the responses
    [capacity, heads, tokens, width], of which `rows` rows and `length` tokens are in use.

    Products of 16-bit numbers on a CPU copy what is not contiguous, which took three times as long as the product.
    There the buffers grow by pieces, and `keys` and `values` are all of their tokens; those not in use are 0.
    """

    def __init__(self, prompt: tuple[Tensor, Tensor], capacity: int, max_tokens: int, shared: bool):
        super().__init__()
        self.dtype, self.device, self.is_initialized = prompt[0].dtype, prompt[0].device, True
        self.rows, heads, length, _ = prompt[0].shape
        self.length = 0 if shared else length  # unless shared, the prompt stands in front of every response
        self.grows = shared and self.device.type == "cpu" and self.dtype.itemsize == 2
        tokens = 0 if self.grows else self.length + max_tokens
        self.buffers = [p.new_zeros(capacity, heads, tokens, p.shape[-1]) for p in prompt]
        self.prompt = prompt if shared else None
        if not shared:
            for buffer, part in zip(self.buffers, prompt, strict=True):
                buffer[: self.rows, :, :length] = part
        self._expose()

    def _expose(self) -> None:
        tokens = None if self.grows else self.length
        self.keys, self.values = (buffer[: self.rows, :, :tokens] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.length == self.buffers[0].shape[2]:
            self.buffers = [self.grown(buffer) for buffer in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self.length] = new[:, :, 0]
        self.length += 1
        self._expose()
        return self.keys, self.values

    def grown(self, buffer: Tensor) -> Tensor:
        """A buffer with room for more tokens, and what is in use of this one."""
        capacity, heads, tokens, width = buffer.shape
        larger = buffer.new_zeros(capacity, heads, tokens + PIECE, width)
        larger[: self.rows, :, :tokens] = buffer[: self.rows]
        return larger

    def copy(self, sources: Tensor, targets: Tensor | slice, rows: int) -> None:
        """Put what is in the rows `sources` into the rows `targets`; after it `rows` rows are in use."""
        for buffer in self.buffers:
            buffer[targets, :, : self.length] = buffer[sources, :, : self.length]
        self.rows = rows
        self._expose()


class SampleCache(DynamicCache):
    """The cache of a batch: some prompts, and rows that each go on from one of them.

    It begins with one row for each prompt, in their order.

    Args:
        prompts: the prompts' caches, in parts. mask: [problems, length], 0 where a prompt is padded (on its left).
        capacity: rows that there may be. max_tokens: tokens that each of them may have.
        shared: whether rows read one copy of their prompt (with `attend`) or each its own (with any attention).
    """

    def __init__(self, prompts: list[DynamicCache], mask: Tensor, capacity: int, max_tokens: int, shared: bool):
        super().__init__()
        self.mask, self.biases, self.windows = mask, {}, set()
        self.assign(np.arange(len(mask)))
        for parts in zip(*(prompt.layers for prompt in prompts), strict=True):
            whole = tuple(torch.cat([getattr(part, side) for part in parts]) for side in ("keys", "values"))
            self.layers.append(SampleLayer(whole, capacity, max_tokens, shared))

    def assign(self, prompt_of_row: np.ndarray) -> None:
        """Say which prompt each row has, `prompt_of_row` [rows]."""
        self.prompt_of_row = torch.from_numpy(prompt_of_row).to(self.mask.device)
        number = numbered(prompt_of_row)
        self.rows_per_prompt = int(number.max()) + 1
        slots = prompt_of_row * self.rows_per_prompt + number
        dense = len(slots) == len(self.mask) * self.rows_per_prompt and bool((np.diff(slots) == 1).all())
        self.slots = None if dense else torch.from_numpy(slots).to(self.mask.device)
        self.biases = {}

    def copy(self, sources: np.ndarray, targets: np.ndarray | slice, prompt_of_row: np.ndarray) -> None:
        """Let rows `targets` go on where rows `sources` are; after it the rows have the prompts `prompt_of_row`."""
        sources = torch.from_numpy(sources).to(self.mask.device)
        if isinstance(targets, np.ndarray):
            targets = torch.from_numpy(targets).to(self.mask.device)
        for layer in self.layers:
            layer.copy(sources, targets, len(prompt_of_row))
        self.assign(prompt_of_row)

    def by_prompt(self, rows: Tensor) -> Tensor:
        """What belongs to rows [rows, heads, group, n], as [problems, heads, rows per prompt x group, n].

        Rows per prompt are those of the prompt that has most.
        """
        _, heads, group, n = rows.shape
        if self.slots is not None:
            grid = rows.new_empty(len(self.mask) * self.rows_per_prompt, heads, group, n)  # by_row takes what is filled
            rows = grid.index_copy_(0, self.slots, rows)
        rows = rows.view(len(self.mask), self.rows_per_prompt, heads, group, n).transpose(1, 2)
        return rows.reshape(len(self.mask), heads, self.rows_per_prompt * group, n)

    def by_row(self, grid: Tensor) -> Tensor:
        """The inverse of `by_prompt`: [problems, heads, rows per prompt x group, n] as [rows, heads, group, n]."""
        problems, heads, _, n = grid.shape
        grid = grid.view(problems, heads, self.rows_per_prompt, -1, n).transpose(1, 2)
        if self.slots is None:
            return grid.flatten(0, 1)
        return grid.reshape(problems * self.rows_per_prompt, heads, -1, n).index_select(0, self.slots)

    def bias(self, window: int | None, length: int, tokens: int) -> Tensor | None:
        """What is added to the scores [rows, prompt + response keys]: -inf where a key is padding or out of the window.

        The query is the response's token number `length`, whose own key is the last one in use, of `tokens`. None if
        all keys are seen.
        """
        if (window, length) not in self.biases:
            lengths = self.mask.sum(-1, keepdim=True)
            seen = self.mask.bool()
            own = torch.zeros(len(seen), tokens, dtype=torch.bool, device=seen.device)
            own[:, :length] = True
            if window is not None:
                seen = seen & (lengths + length - self.mask.cumsum(-1) < window)
                own[:, : max(0, length - window)] = False
            seen = torch.cat([seen, own], -1)[self.prompt_of_row]
            bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
            self.biases = {k: v for k, v in self.biases.items() if k[1] == length}  # of this step
            self.biases[window, length] = None if bool(seen.all()) else bias
        return self.biases[window, length]


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one new token a row, `query` [rows, query heads, 1, width], over its prompt and its own response.

    `key` and `value` are the responses' of a `SampleLayer`, [rows, heads, tokens, width].
    `options` are what transformers gives every attention (`scaling`, `softcap`, `sliding_window`), and the cache
    as `shared`.
    Returns [rows, 1, query heads, width].
    """
    shared: SampleCache = options["shared"]
    scaling, softcap, window = (options.get(name) for name in ("scaling", "softcap", "sliding_window"))
    rows, heads, tokens, width = key.shape
    layer = shared.layers[module.layer_idx]
    prompt_keys, prompt_values = layer.prompt
    prompt = prompt_keys.shape[2]
    query = query.reshape(rows, heads, -1, width) * (scaling or width**-0.5)
    on_prompt = shared.by_prompt(query) @ prompt_keys.transpose(-1, -2)
    scores = torch.cat([shared.by_row(on_prompt), query @ key.transpose(-1, -2)], -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    shared.windows.add(window)
    bias = shared.bias(window, layer.length, tokens)
    if bias is not None:
        scores += bias[:, None, None]
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = weights[..., prompt:] @ value
    out += shared.by_row(shared.by_prompt(weights[..., :prompt]) @ prompt_values)
    return out.reshape(rows, 1, -1, value.shape[-1]), None


AttentionInterface.register("shared_prompt", attend)


@contextmanager
def shared_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's attention is `attend`."""
    model = causal_model(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("shared_prompt")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model computes the same logits when samples share their prompt. Says so, once, if it does not."""
    return passes(model, shared_trial, "every sample gets a prompt cache of its own")


@torch.inference_mode()
def shared_trial(model: PreTrainedModel) -> str | None:
    """What is wrong when the model's samples share their prompt, tried on a few tokens; None if nothing is."""
    config = causal_model(model).config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if other := set(layer_types or KNOWN_LAYERS) - KNOWN_LAYERS:
        return f"has layers of another kind ({', '.join(sorted(other))})"
    if not causal_model(model)._can_set_attn_implementation():
        return "does not let its attention be replaced"
    device = next(model.parameters()).device
    ids = (torch.arange(3 * 6, device=device).view(3, 6) * 7 + 3) % config.vocab_size
    ids[2, :4] = ids[0, :4]  # rows 0 and 2 have the same prompt, row 1 a shorter one
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 4:]
    prompts = DynamicCache()
    model(
        input_ids=ids[:2, :4],
        attention_mask=mask[:2, :4],
        position_ids=positions[:2, :4],
        past_key_values=prompts,
        use_cache=True,
    )
    steps = []
    try:
        cache = SampleCache([prompts], mask[:2, :4], capacity=3, max_tokens=2, shared=True)
        cache.copy(np.array([0]), np.array([2]), np.array([0, 1, 0]))
        with shared_attention(model):
            for i in (4, 5):
                out = model(
                    input_ids=ids[:, i : i + 1],
                    position_ids=positions[:, i : i + 1],
                    past_key_values=cache,
                    use_cache=True,
                    shared=cache,
                )
                steps.append(out.logits)
    except Exception as error:
        if should_reduce_batch_size(error):  # that says nothing of the model
            raise
        return f"cannot ({type(error).__name__}: {error})"
    if not sees_all(config) and cache.windows == {None}:
        return "does not tell its attention its window"
    got, wanted = torch.cat(steps, 1).float(), wanted.float()
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2  # 16-bit weights round
    off = (got - wanted).norm() / wanted.norm()
    return None if off < tolerance else f"computes other logits then (off by {off:.1e} of their size)"
