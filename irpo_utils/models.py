"""Load the base model, its tokenizer and one iteration's policy.

A policy is one directory: a LoRA adapter on the frozen base (`adapter_config.json`), or, with `model.tuning: full`, a
whole small model. M_0 is the base itself. Nothing is ever merged back into quantized weights: they would be quantized
anew, and the model that is sampled would not be the one that was trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SEED_MODEL = Path(__file__).parent / "assets" / "seed_model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def base_path(config) -> str:
    """The hub name or folder of the base model; "seed" is the model in the package."""
    return str(SEED_MODEL) if config.path == "seed" else config.path


def load_tokenizer(config) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        ValueError: it has no EOS, so that a model could never learn to stop.
    """
    check_path(config)
    tokenizer = AutoTokenizer.from_pretrained(base_path(config))
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path: the tokenizer of {config.path} has no EOS token; set one in its tokenizer_config.json"
        )
    return tokenizer


def check_path(config) -> None:
    """Raise a ValueError where `model.path` looks like a folder but is no model's."""
    path = Path(base_path(config))
    local = path.is_absolute() or config.path.startswith((".", "~")) or path.exists()
    if local and not ((path / "config.json").is_file() and any(path.glob("tokenizer*"))):
        raise ValueError(f"model.path: {config.path} is no folder with config.json and a tokenizer")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(config) -> PreTrainedModel:
    """The frozen base: in NF4 with double quantization for `quantize: nf4`, else in `dtype`."""
    dtype = DTYPES[config.dtype]
    quantization = None
    if config.quantize == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base_path(config),
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device()},
        use_safetensors=True,
    )
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights at the first forward in eval mode on some CPUs, for a kernel that computes
        # in bfloat16 and has no gradient: sampling would run another function than training, and training after a dev
        # score would silently get wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_adapter(policy: Path) -> bool:
    return (policy / "adapter_config.json").exists()


def load_policy(
    config, policy: Path | None = None, trainable: bool = False, seed: int = 0, threads: int = 0
) -> PreTrainedModel:
    """M_t: the base for `policy=None`, else what the directory `policy` holds.

    With `trainable`, the same function ready for training: a fresh adapter (which starts as the identity) on M_0, or
    the adapter of M_t going on. For inference an adapter on an unquantized base is folded in, in memory only.

    Raises:
        FileNotFoundError: `policy` holds neither an adapter nor a model.
    """
    if threads:
        torch.set_num_threads(threads)  # sums round differently with another number of threads
    if policy is not None and not is_adapter(policy) and not (policy / "config.json").exists():
        raise FileNotFoundError(
            f"{policy} holds no policy (neither adapter_config.json nor config.json); run 03_train first"
        )
    if policy is not None and not is_adapter(policy):
        return AutoModelForCausalLM.from_pretrained(policy, dtype=DTYPES[config.dtype], device_map={"": device()})
    model = load_base(config)
    if policy is None and (not trainable or config.tuning == "full"):
        return model

    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if trainable and config.quantize == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if policy is not None:
        model = PeftModel.from_pretrained(model, policy, is_trainable=trainable)
        if not trainable and config.quantize == "none":
            model = model.merge_and_unload()
        return model
    torch.manual_seed(seed)  # LoRA's A is random; B is zero, so theta_0 = M_0
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)
