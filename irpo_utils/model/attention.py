"""Attention of 16-bit numbers on a CPU as matrix products, and its gradient.

PyTorch's fused kernel keeps scores in registers, but does not use there what multiplies 16-bit matrices (AMX,
AVX512-BF16). Whole products do: for as many tokens as a problem has, forward and backward pass take a
third to two thirds of the time. Scores are made anew for the gradient, and for a few rows at a time, so that no layer
keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

SCORES = 1 << 18  # that are made at once: what a core's cache holds


class Attention(torch.autograd.Function):
    """softmax(q k^T + bias) v, where several query heads share a head of keys and values.

    Shapes: q [rows, query heads, length, width], scaled already; k and v [rows, heads, keys, width]; bias
    [rows, 1, length, keys]. The result is as q.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows in parts(q, k):
            out[rows] = (weights(q[rows], k[rows], bias[rows]).to(v.dtype) @ v[rows]).view_as(out[rows])
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, out = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(out), torch.empty_like(k), torch.empty_like(v)
        for rows in parts(q, k):
            weight, g = weights(q[rows], k[rows], bias[rows]), by_key_head(grad[rows], k)
            of_v[rows] = weight.to(v.dtype).transpose(-1, -2) @ g
            mean = (g.float() * by_key_head(out[rows], k)).sum(-1, keepdim=True)  # of the gradients of its weights
            of_score = weight.mul_((g @ v[rows].transpose(-1, -2)) - mean).to(q.dtype)
            of_q[rows] = (of_score @ k[rows]).view_as(of_q[rows])
            of_k[rows] = of_score.transpose(-1, -2) @ by_key_head(q[rows], k)
        return of_q, of_k, of_v, None


def parts(q: Tensor, k: Tensor) -> list[slice]:
    """Rows, a few at a time."""
    size = max(1, SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(first, first + size) for first in range(0, len(q), size)]


def by_key_head(q: Tensor, k: Tensor) -> Tensor:
    """What belongs to query heads [rows, query heads, length, width] by head: [rows, heads, queries of it, width]."""
    return q.reshape(len(q), k.shape[1], -1, q.shape[-1])


def weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Attention weights [rows, heads, queries of it, keys], in float32."""
    scores = by_key_head(q, k) @ k.transpose(-1, -2)
    each = scores.view(*q.shape[:3], -1) + bias.float()
    return each.softmax(-1).view_as(scores)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """`Attention` as transformers asks for it; returns [rows, length, query heads, width]."""
    bias = attention_mask[..., : key.shape[2]].expand(len(query), 1, -1, -1)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return Attention.apply(query * scaling, key, value, bias).transpose(1, 2), None


AttentionInterface.register("products", attend)
AttentionMaskInterface.register("products", eager_mask)


@torch.no_grad()
def attend_by_products(model: PreTrainedModel) -> str | None:
    """Give the model `Attention` and try it on a few tokens. If it does not fit, say why; the model keeps its own."""
    if not model._can_set_attn_implementation():
        return "does not let its attention be replaced"
    own = model.config._attn_implementation
    ids = torch.arange(3, 15).view(2, 6) % model.config.get_text_config().vocab_size
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])

    def states() -> Tensor:
        run = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return run.last_hidden_state[mask.bool()].float()

    wanted = states()
    model.set_attn_implementation("products")
    try:
        off = ((states() - wanted).norm() / wanted.norm()).item()
        reason = None if off < 5e-2 else f"computes other states with ours (off by {off:.1e} of their size)"
    except Exception as error:
        if should_reduce_batch_size(error):  # that says nothing of the model
            raise
        reason = f"asks more of its attention ({type(error).__name__}: {error})"
    if reason:
        model.set_attn_implementation(own)
    return reason
