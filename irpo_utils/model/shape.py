"""The sizes of a model, from its configuration alone: the weights are not loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


def cache_numbers(config: PretrainedConfig) -> int:
    """How many numbers one token leaves in the cache of a (text) model: keys and values of every layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width


def sees_all(config: PretrainedConfig) -> bool:
    """Whether every layer of a (text) model looks at all tokens before, as far as its configuration says."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


@dataclass(frozen=True)
class Shape:
    """What counting a model's memory needs to know of it."""

    parameters: int
    linear: int  # weights in linear layers inside the blocks: what 4-bit and LoRA apply to
    lora: int  # LoRA parameters per unit of rank
    layers: int
    hidden: int
    intermediate: int
    cache: int  # numbers that one token leaves in the cache
    vocabulary: int
    context: int  # tokens

    @classmethod
    def of(cls, config: PretrainedConfig, trust_remote_code: bool = False) -> Shape:
        """The shape of the model that `config` describes, built without memory for its weights.

        Raises:
            ValueError: it is no causal language model.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError:
            raise ValueError(f"model.path: a {config.model_type} is no causal language model") from None
        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        config = config.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(m.weight.numel() for m in layers),
            lora=sum(m.in_features + m.out_features for m in layers),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            cache=cache_numbers(config),
            vocabulary=config.vocab_size,
            context=getattr(config, "max_position_embeddings", None) or 1 << 30,
        )
