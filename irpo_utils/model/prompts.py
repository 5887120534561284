"""Text to token ids: prompts through the chat template, responses as they would have been drawn, and what ends one."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..settings import ModelConfig
from ..tasks.base import Problem, Task
from .load import base_path


def encode_prompts(task: Task, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> dict[str, list[int]]:
    """Problem id -> prompt token ids, through the chat template where there is one, else as plain text.

    Either way there is one BOS.
    """
    if not tokenizer.chat_template:
        return {p.id: tokenizer(task.prompt(p)).input_ids for p in problems}
    # Without a system turn, since some templates have none.
    conversations = [[{"role": "user", "content": task.prompt(p)}] for p in problems]
    texts = [chat_text(tokenizer, turns, add_generation_prompt=True) for turns in conversations]
    return {p.id: tokenizer(t, add_special_tokens=False).input_ids for p, t in zip(problems, texts, strict=True)}


def chat_text(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> str:
    """A conversation in the tokenizer's template. The date is fixed, since some templates would write today's."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024", **options)
    except TemplateError as error:
        raise ValueError(f"model.path: the tokenizer's chat template cannot write this conversation: {error}") from None


def stop_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response of the base model; the first is the one that gold solutions are ended with."""
    return ending_tokens(tokenizer, _saved_generation(base_path(config)))


def ending_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> list[int]:
    """The same for a tokenizer and the model's own generation configuration, if it has one.

    A chat model ends its turn with the token that its template puts behind an answer, which need not be the
    tokenizer's EOS (Gemma: `<end_of_turn>`).
    """
    stops = generation.eos_token_id if generation else None
    stops = [] if stops is None else [stops] if isinstance(stops, int) else stops
    known = list(dict.fromkeys([tokenizer.eos_token_id, *stops]))
    if not tokenizer.chat_template:
        return known
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "@@"}]
    after_answer = chat_text(tokenizer, turns).rpartition("@@")[2]
    after_ids = tokenizer(after_answer, add_special_tokens=False).input_ids
    ending = [i for i in after_ids if i in tokenizer.all_special_ids or i in known]
    return list(dict.fromkeys([*ending[:1], *known]))


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> list[int]:
    """A response's token ids as the sampler would have drawn them: no BOS, the `end` token at the end."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, end]


@cache
def _saved_generation(path: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):  # it has none
        return None
