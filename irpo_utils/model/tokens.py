"""The base model's tokenizer and stop tokens, without the model: nothing here imports torch, which takes longer than making pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from ..files import PACKAGE, ROOT

SEED_MODEL = PACKAGE / "assets" / "seed_model"
# (model type, declared tokenizer class without "Fast") -> what AutoTokenizer takes for it. Asking AutoTokenizer imports torch.
CLASSES = {
    ("llama", "TokenizersBackend"): "TokenizersBackend",
    ("llama", "PreTrainedTokenizer"): "TokenizersBackend",
    ("qwen2", "Qwen2Tokenizer"): "Qwen2Tokenizer",
    ("qwen3", "Qwen2Tokenizer"): "Qwen2Tokenizer",
    ("gemma", "GemmaTokenizer"): "GemmaTokenizer",
    ("gemma2", "GemmaTokenizer"): "GemmaTokenizer",
    ("gemma3_text", "GemmaTokenizer"): "GemmaTokenizer",
}


def base_path(config) -> str:
    """The hub name or folder of the base model; "seed" is the model in the package."""
    if config.path == "seed":
        return str(SEED_MODEL)
    here = ROOT / config.path  # a relative folder is relative to the project
    return str(here) if here.is_dir() else config.path


def load_tokenizer(config) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        ValueError: it has no EOS, so that a model could never learn to stop.
    """
    tokenizer = load(getattr(transformers, tokenizer_class(config)), config)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path: the tokenizer of {config.path} has no EOS token; set one in its tokenizer_config.json"
        )
    return tokenizer


def tokenizer_class(config) -> str:
    """The name of the class in transformers that loads the tokenizer; "AutoTokenizer" unless it is sure what that takes."""
    if config.trust_remote_code:  # code that comes with the model may choose
        return "AutoTokenizer"
    where = base_path(config)
    folder = Path(where).expanduser()
    try:
        files = [
            folder / name if folder.is_dir() else Path(try_to_load_from_cache(where, name))
            for name in ("config.json", "tokenizer_config.json")
        ]
        shape, declared = (json.loads(file.read_text()) for file in files)
        key = (shape["model_type"], declared["tokenizer_class"].removesuffix("Fast"))
        return "AutoTokenizer" if "auto_map" in declared else CLASSES.get(key, "AutoTokenizer")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "AutoTokenizer"  # files that are not there (yet), or damaged: it says what is wrong


def load(kind: Any, config, **options: Any) -> Any:
    """`kind.from_pretrained` of the base. Raises a ValueError that names the model and the mend."""
    name, path = config.path, Path(base_path(config)).expanduser()
    local = path.is_absolute() or name.startswith(".") or path.exists() or name.count("/") > 1
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if local and not ((path / "config.json").is_file() and any((path / file).is_file() for file in tokenizers)):
        raise ValueError(f"model.path: {name} is no folder with config.json and a tokenizer ({', '.join(tokenizers)})")
    try:
        return kind.from_pretrained(str(path) if local else name, trust_remote_code=config.trust_remote_code, **options)
    except (Exception, SystemExit) as error:  # code that comes with a model may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = (
            "model.trust_remote_code=true lets code that comes with the model run, if you trust it"
            if "trust_remote_code" in str(error)
            else "see that the folder is whole"
            if local
            else "see that the name is right, that there is a network, and that you may use it (some models want their licence "
            "accepted and `hf auth login`); or give a folder, as in model.path=/models/my-model"
        )
        raise ValueError(f"model.path: {name!r} could not be loaded ({reason}); {mend}") from None
