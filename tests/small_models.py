"""Small random models: three architectures, four families, each with a BPE tokenizer and its kind of chat template."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

# (BOS, EOS of the tokenizer, end of a turn, template). Written in the manner of the families' own templates.
FAMILIES = {
    "llama": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "qwen2": (
        None,
        "<|im_end|>",
        "<|im_end|>",
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "gemma2": (
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
}
FAMILIES["llama2"] = (
    "<s>",
    "</s>",
    "</s>",
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
)
SPECIAL = {
    "llama2": ["<unk>"],
    "llama": ["<|start_header_id|>", "<|end_header_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>"],
    "gemma2": ["<pad>", "<start_of_turn>"],
}
SHAPE = dict(
    hidden_size=64,  # every width is a multiple of 64, which NF4 needs on a CPU
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)


def build(family: str, folder: Path, texts: list[str], vocabulary: int = 600) -> Path:
    """A model folder as one from the hub: weights, tokenizer with chat template, generation_config."""
    bos, eos, end, template = FAMILIES[family]
    special = list(dict.fromkeys([t for t in (bos, eos, end) if t] + SPECIAL[family]))
    tokenizer = Tokenizer(models.BPE())
    if family == "llama2":  # as SentencePiece has it: a space is a character, and a text begins with one
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    ids = {token: tokenizer.token_to_id(token) for token in special}
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, additional_special_tokens=special
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config, "llama2": LlamaConfig}[family]
    stops = sorted({ids[eos], ids[end]})
    more = {"sliding_window": 32} if family == "gemma2" else {}  # shorter than the prompts
    config = kind(
        vocab_size=len(fast), bos_token_id=ids.get(bos), eos_token_id=stops, pad_token_id=ids[eos], **SHAPE, **more
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=stops, bos_token_id=ids.get(bos), pad_token_id=ids[eos])
    model.save_pretrained(folder)
    return folder
