"""A LoRA adapter beside its frozen base, run without peft's detour.

peft has autograd run and keep every product, scaling and sum of a layer by itself, and beside a 16-bit base turns the
layer's whole input and output to float32 for them. Here a layer is one function with its gradient (`train_beside`), or
one module where it only samples (`sample_beside`). Both round A and B to the base's type for their products, so that
the model that is trained is the one that was sampled; what is trained stays float32. On a 4-bit base peft trains.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel


def is_plain(layer: Any) -> bool:
    """Whether a layer with adapters is W x + s B (A x) of one of them, with a W that is not quantized."""
    names = layer.active_adapters
    if len(names) != 1 or type(layer.base_layer) is not torch.nn.Linear:
        return False
    (name,) = names
    with_dropout = getattr(layer.lora_dropout[name], "p", 0.0) > 0
    return not (with_dropout or name in layer.lora_variant or getattr(layer, "lora_bias", {}).get(name, False))


class Added(torch.autograd.Function):
    """y = W x + bias + B (A x) of a frozen W, [..., width]; it keeps x and A x for the gradient, and no more."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).T
        y = functional.linear(rows, weight, bias).addmm_(low, b.to(x.dtype).T)
        ctx.save_for_backward(rows, low, weight, a, b)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, low, weight, a, b = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, shape[-1])
        of_low = grad @ b.to(grad.dtype)
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight).addmm_(of_low, a.to(grad.dtype)).view(*shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0)
        return of_x, None, of_bias, (of_low.T @ rows).to(a.dtype), (grad.T @ low).to(b.dtype)


@cache
def trained_layer() -> type:
    """peft's linear layer with `Added` for its forward pass wherever it is plain; all else of it is peft's."""
    from peft.tuners.lora import Linear  # takes seconds

    class TrainedLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged or args or kwargs or not is_plain(self):
                return super().forward(x, *args, **kwargs)
            (name,) = self.active_adapters
            base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
            return Added.apply(x, base.weight, base.bias, a, self.scaling[name] * b)

    return TrainedLinear


def train_beside(model: PreTrainedModel) -> PreTrainedModel:
    """A peft model to train, with `trained_layer` for its linear layers; it is saved as it is."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = trained_layer()
    return model


def as_in_peft(model: PreTrainedModel) -> PreTrainedModel:
    """The inverse of `train_beside`."""
    for layer in model.modules():
        if type(layer) is trained_layer():
            layer.__class__ = trained_layer().__base__
    return model


class Beside(torch.nn.Module):
    """A linear layer in 16 bits and its adapter, y = W x + B (A x), with A and B rounded to 16 bits.

    Their product is what must not be rounded to the steps of W, and it is not.
    """

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        (name,) = layer.active_adapters
        self.base, dtype = layer.base_layer, layer.base_layer.weight.dtype
        self.register_buffer("a", layer.lora_A[name].weight.detach().to(dtype))
        self.register_buffer("b", (layer.scaling[name] * layer.lora_B[name].weight.detach()).to(dtype))

    @property
    def weight(self) -> Tensor:  # some models read it
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ self.a.T, self.b.T)
        return y


def sample_beside(model: PreTrainedModel) -> PreTrainedModel:
    """A peft model for inference alone, with `Beside` for its layers where all are plain and in 16 bits."""
    from peft.tuners.lora import Linear, LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for layer in layers.values():
        plain = isinstance(layer, Linear) and is_plain(layer)
        if not plain or layer.base_layer.weight.dtype != torch.bfloat16:
            return model
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Beside(layer))
    return model.get_base_model() if layers else model  # an adapter of another kind has none
