"""One prompt, many responses: a cache that holds every prompt once, and the attention that reads it.

Decoding is reading: at every step attention reads all keys and values of every row. N samples of a problem have the same
prompt, so here its keys and values lie in memory once, and the N queries of a step meet them in one matrix product; only
what a sample has said itself is read for that sample alone. The scores of both parts go through one softmax, so the
result is that of ordinary attention.

Models of transformers take it as one more attention function. Whether a model computes the same with it is tried on a
few tokens before it is used (`shares_prompts`); a model that does not gets its prompts' cache once per row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .scoring import causal_model

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class SampleLayer(DynamicLayer):
    """One layer's keys and values for rows in a grid of problems and samples, with room for the tokens to come.

    `prompt` are those of the prompts [problems, heads, length, width]; `responses` those of the responses
    [problems, heads, samples, room, width], of which `length` tokens are filled.
    """

    def __init__(self, prompt: tuple[Tensor, Tensor], samples: int, room: int, shared: bool):
        super().__init__()
        self.dtype, self.device, self.is_initialized = prompt[0].dtype, prompt[0].device, True
        self.shared, self.length = shared, 0
        if not shared:  # every row has its own copy of the prompt, in front of its response
            prompt = tuple(part.repeat_interleave(samples, 0) for part in prompt)
            self.length, samples = prompt[0].shape[2], 1
        problems, heads, _, _ = prompt[0].shape
        self.responses = [p.new_empty(problems, heads, samples, self.length + room, p.shape[-1]) for p in prompt]
        if not shared:
            for buffer, part in zip(self.responses, prompt, strict=True):
                buffer[:, :, 0, : self.length] = part
        self.prompt = prompt if shared else None
        self._expose()

    def _expose(self) -> None:
        rows = slice(None) if self.shared else 0  # ordinary attention wants [rows, heads, length, width]
        self.keys, self.values = (buffer[:, :, rows, : self.length] for buffer in self.responses)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self.responses, (key_states, value_states), strict=True):
            problems, heads, samples, _, width = buffer.shape
            buffer[:, :, :, self.length] = new.reshape(problems, samples, heads, width).transpose(1, 2)
        self.length += 1
        self._expose()
        return self.keys, self.values

    def keep(self, problems: Tensor, samples: Tensor) -> None:
        """Keep these problems [p], and of each of them these samples [p, s]; memory is reused, not taken anew."""
        if self.shared and len(problems) < len(self.prompt[0]):
            self.prompt = tuple(part.index_select(0, problems) for part in self.prompt)
        for i, buffer in enumerate(self.responses):
            _, heads, count, room, width = buffer.shape
            head = torch.arange(heads, device=problems.device)
            rows = (problems[:, None, None] * heads + head[:, None]) * count + samples[:, None, :]  # [p, heads, s]
            flat = buffer.view(-1, room * width)
            kept = flat[:, : self.length * width].index_select(0, rows.flatten())
            flat = flat[: len(kept)]
            flat[:, : self.length * width] = kept
            self.responses[i] = flat.view(len(problems), heads, samples.shape[1], room, width)
        self._expose()


class SampleCache(DynamicCache):
    """The cache of a batch of problems, each with the same number of samples.

    Args:
        prompts: the prompts' caches, in parts. mask: [problems, length], 0 where a prompt is padded (on its left).
        samples: responses of each problem. room: tokens that each of them may have.
        shared: whether rows read one copy of their prompt (with `attend`) or each its own (with any attention).
    """

    def __init__(self, prompts: list[DynamicCache], mask: Tensor, samples: int, room: int, shared: bool):
        super().__init__()
        self.mask, self.biases = mask, {}
        for parts in zip(*(prompt.layers for prompt in prompts), strict=True):
            whole = tuple(torch.cat([getattr(part, side) for part in parts]) for side in ("keys", "values"))
            self.layers.append(SampleLayer(whole, samples, room, shared))

    def keep(self, problems: Tensor, samples: Tensor) -> None:
        self.mask, self.biases = self.mask[problems], {}
        for layer in self.layers:
            layer.keep(problems, samples)

    def bias(self, window: int | None, length: int) -> Tensor | None:
        """What is added to the scores [problems, prompt + response keys]: -inf where a key is padding or out of the window.

        The query is the response's token number `length`, whose own key is the last one. None if all keys are seen.
        """
        if (window, length) not in self.biases:
            lengths = self.mask.sum(-1, keepdim=True)
            place = self.mask.cumsum(-1) - 1  # where a prompt token stands
            seen = self.mask.bool()
            own = torch.ones(len(seen), length, dtype=torch.bool, device=seen.device)
            if window is not None:
                seen = seen & (lengths + length - 1 - place < window)
                own[:, : max(0, length - window)] = False
            seen = torch.cat([seen, own], -1)
            bias = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
            self.biases = {k: v for k, v in self.biases.items() if k[1] == length}  # of this step
            self.biases[window, length] = None if bool(seen.all()) else bias
        return self.biases[window, length]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    shared: SampleCache | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one new token a row, `query` [rows, query heads, 1, width], over its prompt and its own response.

    `key` and `value` are a `SampleLayer`'s responses [problems, heads, samples, length, width]; rows are the grid of
    problems and samples. Returns [rows, 1, query heads, width].
    """
    problems, heads, samples, length, width = key.shape
    prompt_keys, prompt_values = shared.layers[module.layer_idx].prompt
    prompt = prompt_keys.shape[2]
    query = query.reshape(problems, samples, heads, -1, width).transpose(1, 2) * (scaling or width**-0.5)
    group = query.shape[3]
    on_prompt = query.reshape(problems, heads, samples * group, width) @ prompt_keys.transpose(-1, -2)
    scores = torch.cat([on_prompt.view(problems, heads, samples, group, prompt), query @ key.transpose(-1, -2)], -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    bias = shared.bias(sliding_window, length)
    if bias is not None:
        scores = scores + bias[:, None, None, None]
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = weights[..., prompt:] @ value
    flat = weights[..., :prompt].reshape(problems, heads, samples * group, prompt)
    out += (flat @ prompt_values).view_as(out)
    return out.transpose(1, 2).reshape(problems * samples, 1, heads * group, value.shape[-1]), None


AttentionInterface.register("shared_prefix", attend)


@contextmanager
def shared_attention(model: PreTrainedModel, shared: bool = True) -> Iterator[None]:
    """Within it the model's attention is `attend`; with `shared` false it stays as it is."""
    model = causal_model(model)
    before = model.config._attn_implementation
    if shared:
        model.set_attn_implementation("shared_prefix")
    try:
        yield
    finally:
        if shared:
            model.set_attn_implementation(before)


_tried: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.inference_mode()
def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model computes the same logits when samples share their prompt; says so, once, if it does not."""
    if model not in _tried:
        why = _why_not(model)
        _tried[model] = why is None
        if why:
            kind = causal_model(model).config.model_type
            warnings.warn(f"every sample gets a prompt cache of its own, since a {kind} {why}", stacklevel=2)
    return _tried[model]


def _why_not(model: PreTrainedModel) -> str | None:
    config = causal_model(model).config.get_text_config()
    if other := set(getattr(config, "layer_types", None) or KNOWN_LAYERS) - KNOWN_LAYERS:
        return f"has layers of another kind ({', '.join(sorted(other))})"
    if not causal_model(model)._can_set_attn_implementation():
        return "does not let its attention be replaced"
    device, vocabulary = next(model.parameters()).device, config.vocab_size
    ids = (torch.arange(3 * 6, device=device).view(3, 6) * 7 + 3) % vocabulary
    ids[2, :4] = ids[0, :4]  # rows 0 and 2 have the same prompt, row 1 a shorter one
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    place = (mask.cumsum(-1) - 1).clamp_(min=0)
    wanted = model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits[:, 4:]
    prompts = DynamicCache()
    model(input_ids=ids[:2, :4], attention_mask=mask[:2, :4], position_ids=place[:2, :4], past_key_values=prompts, use_cache=True)  # fmt: skip
    rows = torch.tensor([0, 2, 1, 1], device=device)  # the grid: two problems, two samples each
    try:
        cache = SampleCache([prompts], mask[:2, :4], samples=2, room=2, shared=True)
        with shared_attention(model):
            steps = [
                model(input_ids=ids[rows, i : i + 1], position_ids=place[rows, i : i + 1], past_key_values=cache, use_cache=True, shared=cache).logits
                for i in (4, 5)
            ]  # fmt: skip
    except Exception as error:
        return f"cannot ({type(error).__name__}: {error})"
    got, wanted = torch.cat(steps, 1).float(), wanted[rows].float()
    near = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2  # 16-bit weights round
    off = (got - wanted).norm() / wanted.norm()
    return None if off < near else f"computes other logits then (off by {off:.1e} of their size)"
