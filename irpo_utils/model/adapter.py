"""A LoRA adapter beside its frozen base, run without peft's detour.

peft has autograd run and keep every product, scaling and sum of a layer by itself, and beside a 16-bit base it turns the
layer's whole input and output to float32 for them. Here a layer is one function with its gradient (`train_beside`), or
one module where it only samples (`sample_beside`). Both round A and B to the type of the base for their products, so
that the model that is trained is the one that was sampled; what is trained stays float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel


def plain_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The adapter's layers by name, if each is W x + s B (A x) with a W that is not quantized; else none."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for layer in layers.values():
        with_bias = any(getattr(layer, "lora_bias", {}).values())
        with_dropout = any(not isinstance(part, torch.nn.Identity) for part in layer.lora_dropout.values())
        another = layer.lora_variant or with_bias or with_dropout
        if type(layer.base_layer) is not torch.nn.Linear or len(layer.active_adapters) != 1 or another:
            return {}
    return layers


class Added(torch.autograd.Function):
    """y = W x + bias + B (A x) of a frozen W, [..., width]; it keeps x and A x for the gradient, and no more."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).T
        y = functional.linear(rows, weight, bias).addmm_(low, b.to(x.dtype).T)
        ctx.save_for_backward(rows, low, weight, a, b)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, low, weight, a, b = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, shape[-1])
        of_low = grad @ b.to(grad.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight).addmm_(of_low, a.to(grad.dtype)).view(*shape[:-1], -1)
        of_a, of_b = of_low.T @ rows, grad.T @ low
        return of_x, None, None, of_a.to(a.dtype), of_b.to(b.dtype)


def added(layer: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward pass of peft's layer with the adapter `name`; that of peft where another is asked for, or none."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != [name] or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    # Looked up anew, since sharding replaces them.
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    return Added.apply(x, base.weight, base.bias, a, layer.scaling[name] * b)


def train_beside(model: PreTrainedModel) -> PreTrainedModel:
    """A peft model to train, with `Added` in its layers where they are plain; it is saved as it is."""
    for layer in plain_layers(model).values():
        layer.forward = partial(added, layer, layer.active_adapters[0])
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
    """A peft model for inference alone, with `Beside` for its layers where they are plain and in 16 bits."""
    layers = plain_layers(model)
    if not layers or any(layer.base_layer.weight.dtype != torch.bfloat16 for layer in layers.values()):
        return model
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Beside(layer))
    return model.get_base_model()
