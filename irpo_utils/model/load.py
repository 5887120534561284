"""Load the base model, its tokenizer, and one iteration's policy.

A policy is one directory: a LoRA adapter on the frozen base (`adapter_config.json`), or, with `model.tuning: full`, a
whole small model. M_0 is the base itself, or a policy (a warm start). Nothing is ever merged back into quantized
weights: they would be quantized anew, and the model that is sampled would not be the one that was trained. Adapters are
float32 whatever the base is (peft casts them so), since a LoRA step is smaller than what bfloat16 can tell apart;
beside a 16-bit base they are rounded for their products alone (`adapter`).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from ..files import ROOT, MissingArtefact, relative, resolve
from ..settings import ModelConfig
from . import packaged
from .adapter import sample_beside, train_beside
from .attention import attend_by_products

disable_progress_bar()  # of loading weights: a notebook shows it in red, and keeps it

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def base_path(config: ModelConfig) -> str:
    """The hub name or folder of the base model, which may be one that a package brings."""
    here = packaged.ready(config.path) or resolve(config.path)
    return str(here) if here.is_dir() else config.path


def load_pretrained(kind: Any, config: ModelConfig, **options: Any) -> Any:
    """`kind.from_pretrained` of the base. Raises a ValueError that names the model and says what to do."""
    name, path = config.path, Path(base_path(config))
    local = path.is_absolute() or name.startswith((".", "~")) or path.exists() or name.count("/") > 1
    if local and not ((path / "config.json").is_file() and any((path / file).is_file() for file in TOKENIZER_FILES)):
        files = ", ".join(TOKENIZER_FILES)
        raise ValueError(f"model.path: {name} is no folder with config.json and a tokenizer ({files})")
    try:
        return kind.from_pretrained(str(path) if local else name, trust_remote_code=config.trust_remote_code, **options)
    except (Exception, SystemExit) as error:  # code that comes with a model may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error):
            hint = "model.trust_remote_code=true lets code that comes with the model run, if you trust it"
        elif local:
            hint = "see that the folder is whole"
        else:
            hint = (
                "see that the name is right, that there is a network, and that you may use it (some models want their "
                "licence accepted and `hf auth login`); or give a folder, as in model.path=/models/my-model"
            )
        raise ValueError(f"model.path: {name!r} could not be loaded ({reason}); {hint}") from None


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        ValueError: it has no EOS, so that a model could never learn to stop.
    """
    tokenizer = load_pretrained(AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path: the tokenizer of {config.path} has no EOS token; set one in its tokenizer_config.json"
        )
    return tokenizer


def causal_model(model: Any) -> PreTrainedModel:
    """The model without the adapter's wrapper; its layers hold the adapter all the same."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


Trial = Callable[[PreTrainedModel], str | None]  # what is wrong with the model, None if nothing is
_passed: WeakKeyDictionary[PreTrainedModel, dict[Trial, bool]] = WeakKeyDictionary()


def passes(model: PreTrainedModel, trial: Trial, otherwise: str) -> bool:
    """Whether `trial` finds nothing wrong with the model. It is run once; if it fails, a warning says what is done.

    Args:
        otherwise: what is done for a model that fails.
    """
    passed = _passed.setdefault(model, {})
    if trial not in passed:
        reason = trial(model)
        passed[trial] = reason is None
        if reason:
            kind = causal_model(model).config.model_type
            warnings.warn(f"{otherwise}, since a {kind} {reason}", stacklevel=3)
    return passed[trial]


def load_shape(config: ModelConfig) -> Any:
    """The base model's configuration: its architecture and sizes, without its weights."""
    return load_pretrained(AutoConfig, config)


def device() -> torch.device:
    """The GPU of this process (LOCAL_RANK says which, where a launcher started several); the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def shards() -> bool:
    """Whether a launcher's configuration says that the weights are divided over its processes (FSDP2)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def placement() -> dict[str, torch.device]:
    """Where a model's weights are put when it is loaded: on the device, unless they are yet to be divided."""
    return {"": torch.device("cpu") if shards() else device()}


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it (AMX, AVX512-BF16); without them bfloat16 is slower than float32."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def load_base(
    config: ModelConfig, kind: Any = AutoModelForCausalLM, whole: tuple[str, ...] = (), **options: Any
) -> PreTrainedModel:
    """The frozen base: in NF4 with double quantization for `quantize: nf4`, else in `dtype`.

    `kind` may be another Auto class, with `options` for it, whose modules named in `whole` are not quantized.
    """
    dtype = DTYPES[config.dtype]
    quantization = None
    if config.quantize == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(whole) or None,
        )
    model, loading = load_pretrained(
        kind,
        config,
        dtype=dtype,
        quantization_config=quantization,
        device_map=placement(),
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which check_loaded refuses by name
        **options,
    )
    causal = kind is AutoModelForCausalLM
    weights = stored_weights(config) if quantization else model.state_dict().items()
    check_loaded(f"model.path: {config.path}", loading, weights, new=whole, unused=() if causal else ("lm_head",))
    return as_run_here(model)


def check_loaded(
    name: str,
    loading: Any,
    weights: Iterable[tuple[str, torch.Tensor]],
    new: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> None:
    """Refuse a model that is not the one in its files; a layer without weights would be another one in each process.

    Args:
        loading: what `from_pretrained(output_loading_info=True)` says. Tied weights are not among the missing ones.
        weights: by name, as they are in the files or in the model.
        new: beginnings of names that the files need not have. unused: of those that the model need not take.

    Raises:
        ValueError: weights are missing, left over, of another shape, or not finite; names the first of them.
    """
    left_over = [key for key in loading["unexpected_keys"] if not key.startswith(unused or ("\n",))]
    missing = [key for key in loading["missing_keys"] if not key.startswith(new or ("\n",))]
    broken = [key for key, tensor in weights if not finite(tensor)]
    for what, keys in (
        ("has no weights for", missing),
        ("has weights that its architecture does not take:", left_over),
        ("has weights of another shape for", [key for key, *_ in loading["mismatched_keys"]]),
        ("has NaN or infinite weights in", broken),
    ):
        if keys:
            first = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"{name} {what} {first}; copy the model again, or see that config.json is its own")


def stored_weights(config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in a model's files, by name: four bits do not show that they were made from a NaN."""
    folder = Path(base_path(config))
    if not folder.is_dir():
        folder = Path(snapshot_download(config.path, allow_patterns="*.safetensors", local_files_only=True))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            yield from ((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118 (no mapping)


def finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def as_run_here(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was just loaded, as it is sampled and trained: one function, and the fastest attention for it."""
    model = same_function(model)
    on_cpu = model.device.type == "cpu" and not shards()  # which are loaded there to be divided
    fused = model.config._attn_implementation == "sdpa" and model.dtype == torch.bfloat16
    if on_cpu and fused and cpu_multiplies_bfloat16():
        passes(model, attend_by_products, "attention stays PyTorch's")
    return model


def same_function(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which now computes the same while it is trained and while it is sampled."""
    for module in model.modules():
        # Dropout would make of the policy another function than the one that was sampled, and than its own reference.
        for name, value in list(vars(module).items()):
            if "drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0 if isinstance(value, float) else value)
        # bitsandbytes repacks 4-bit weights at the first forward in eval mode on some CPUs, for a kernel that computes
        # in bfloat16 and has no gradient: sampling would run another function than training, and training after a dev
        # score would silently get wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def unpacks(parameters: int, dtype: str, free: float) -> bool:
    """Whether a 4-bit base is unpacked to sample from it: where weights of `dtype` leave at least half of `free`."""
    return DTYPES[dtype].itemsize * parameters < free / 2


def free_bytes() -> float:
    """Free bytes of the GPU, or `machine_bytes` where there is none."""
    if torch.cuda.is_available():
        # What PyTorch has set aside for tensors to come is free, too.
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return machine_bytes()


def machine_bytes() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_adapter(policy: Path) -> bool:
    return (policy / "adapter_config.json").exists()


def copy_rounded(adapter: Path, target: Path) -> None:
    """Copy an adapter with its weights rounded to bfloat16: half the size."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter / "adapter_config.json", target / "adapter_config.json")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: weight.bfloat16() for name, weight in weights.items()},
        target / "adapter_model.safetensors",
        {"format": "pt"},
    )


def load_whole(
    config: ModelConfig, folder: Path, what: str, made_by: str, kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A whole model that was trained, from its folder. Raises FileNotFoundError, which says `what` is not there."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no {what} (neither adapter_config.json nor config.json); run {made_by} first"
        )
    model, loading = kind.from_pretrained(
        folder,
        dtype=DTYPES[config.dtype],
        device_map=placement(),
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which check_loaded refuses by name
    )
    check_loaded(str(folder), loading, model.state_dict().items())
    return as_run_here(model)


def damaged(adapter: Path, reason: str) -> MissingArtefact:
    return MissingArtefact(
        f"{relative(adapter)} is damaged ({reason}); the notebook that made it makes it again, with `again = True`"
    )


def check_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Raise MissingArtefact where the adapter's file lacks weights of the model's, or holds one that is not finite."""
    from peft import get_peft_model_state_dict

    if not (folder / "adapter_model.safetensors").exists():
        return
    saved = load_file(folder / "adapter_model.safetensors")
    missing = sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - saved.keys())
    if missing:
        raise damaged(folder, f"{len(missing)} of its weights are not in its file, as {missing[0]}")
    if wrong := [name for name, weight in saved.items() if not torch.isfinite(weight).all()]:
        raise damaged(folder, f"{wrong[0]} is not finite")


def load_policy(
    config: ModelConfig, policy: Path | None = None, trainable: bool = False, seed: int = 0, threads: int = 0
) -> PreTrainedModel:
    """M_t: the base for `policy=None`, else what the directory `policy` holds.

    With `trainable`, the same function ready for training: a fresh adapter (which starts as the identity) on the base,
    or the adapter of M_t going on. For inference a 4-bit base is unpacked where memory allows, and an adapter on a
    float32 base is folded in, both in memory only. Folded into 16 bits, an adapter would be rounded away; it stays
    beside its layer there (`adapter`).

    Args:
        seed: of a fresh adapter. threads: CPU threads from now on; 0 leaves their number as it is.

    Raises:
        FileNotFoundError: `policy` holds neither an adapter nor a model. MissingArtefact: the adapter is damaged.
    """
    if threads:
        torch.set_num_threads(threads)  # sums round differently with another number of threads
    if policy is not None and not is_adapter(policy):
        return load_whole(config, policy, "policy", "03_train")
    model = load_base(config)
    if not trainable and config.quantize == "nf4" and unpacks(model.num_parameters(), config.dtype, free_bytes()):
        # Every forward of a 4-bit layer unpacks its weights first; sampling would do that for every token.
        model = model.dequantize()
    if policy is None and (not trainable or config.tuning == "full"):
        return model
    if policy is None:
        return new_adapter(model, config, seed)

    from peft import PeftModel  # takes seconds, and the base alone needs none of it

    try:  # an adapter from elsewhere may bring dropout with it
        model = same_function(PeftModel.from_pretrained(model, policy, is_trainable=trainable))
    except SafetensorError as error:
        raise damaged(policy, str(error)) from None
    check_adapter(model, policy)
    if trainable:
        return train_beside(model)
    if config.quantize == "none" and config.dtype == "float32":
        return model.merge_and_unload()
    return sample_beside(model)


def new_adapter(model: PreTrainedModel, config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """A fresh LoRA adapter on a base, which it freezes: at first the base's own function."""
    from peft import LoraConfig, get_peft_model  # takes seconds

    same_function(model)
    # Not prepare_model_for_kbit_training: it puts embeddings and head in float32, so that the model that is trained
    # would not be the one that was sampled. peft itself freezes the base.
    torch.manual_seed(seed)  # LoRA's A is random; B is zero, so theta_0 = M_0
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return train_beside(get_peft_model(model, lora))


def save(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a policy or a reward model; the same model gives the same bytes.

    Args:
        weights: those that are saved, for a model that holds a part of each.
    """
    model.save_pretrained(folder, state_dict=weights)
    path = folder / "adapter_config.json"
    if path.exists():
        facts = json.loads(path.read_text())
        # peft writes a set's own order, which differs from process to process, and where the project lies now.
        facts["target_modules"] = sorted(facts["target_modules"])
        base = Path(facts["base_model_name_or_path"] or "")
        if base.is_relative_to(ROOT):
            facts["base_model_name_or_path"] = base.relative_to(ROOT).as_posix()
        path.write_text(json.dumps(facts, indent=1, sort_keys=True))


def export(config: ModelConfig, policy: Path, target: Path) -> None:
    """Write M_t as one whole model in bfloat16, with its tokenizer, for engines that take no adapter.

    The adapter is added to the weights that it was trained on (for a 4-bit base: those, unpacked) in float32, and the
    sum is rounded once. It is a rounding of M_t, not M_t. Needs 4 bytes of the machine's memory for every weight.
    """
    if not is_adapter(policy):
        model = load_policy(config, policy)
    else:
        from peft import PeftModel

        base = load_base(config)
        base = base.dequantize() if config.quantize == "nf4" else base
        model = PeftModel.from_pretrained(base.cpu().float(), policy).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(target)
    load_tokenizer(config).save_pretrained(target)
