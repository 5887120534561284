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
    """Problem id -> prompt token ids."""
    return encode_texts(tokenizer, {p.id: task.prompt(p) for p in problems})


def encode_texts(tokenizer: PreTrainedTokenizerBase, prompts: dict[str, str]) -> dict[str, list[int]]:
    """Name -> token ids of a prompt, through the chat template where there is one, else as plain text.

    Either way there is one BOS. What a problem says is text: a special token's name in it is no special token.
    """
    if not tokenizer.chat_template:
        return {name: text_ids(tokenizer, text, bos=True) for name, text in prompts.items()}
    around = chat_prompt(tokenizer, PLACE).split(PLACE)
    before, after = len(around[0]), len(around[-1])
    texts = {name: chat_prompt(tokenizer, text) for name, text in prompts.items()}
    return {name: text_ids(tokenizer, text, before, len(text) - after) for name, text in texts.items()}


PLACE = "\ue000\ue001"  # of a question in the template: characters that no template has


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question in the chat template, up to where the answer begins; without a system turn, since some have none."""
    return chat_text(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)


def text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int = 0, end: int | None = None, bos: bool = False
) -> list[int]:
    """Token ids of `text`. From character `start` to `end` special tokens' names are spelt out, as they are text there.

    Raises:
        ValueError: such a name is there, and the tokenizer is too old a kind to tell where.
    """
    end = len(text) if end is None else end
    special = special_names(tokenizer)
    if not any(name in text[start:end] for name in special.values()):
        return tokenizer(text, add_special_tokens=bos).input_ids
    if not tokenizer.is_fast:
        raise ValueError(
            "model.path: a problem holds a special token's name, which only a tokenizer.json can spell out"
        )
    whole, ids = tokenizer(text, add_special_tokens=bos, return_offsets_mapping=True), []
    for token, (first, last) in zip(whole.input_ids, whole.offset_mapping, strict=True):
        if token in special and start <= first < last <= end:
            ids += tokenizer(text[first:last], add_special_tokens=False, split_special_tokens=True).input_ids
        else:
            ids.append(token)
    return ids


def special_names(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by id: those that templates are made of, and those that end a text."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def chat_text(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> str:
    """A conversation in the tokenizer's template. The date is fixed, since some templates would write today's."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024", **options)
    except (TemplateError, MemoryError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"model.path: the tokenizer's chat template cannot write this conversation: {reason}"
        ) from None


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
    special = {*tokenizer.all_special_ids, *special_names(tokenizer), *known}  # the first lack those of templates
    ending = [i for i in after_ids if i in special]
    return list(dict.fromkeys([*ending[:1], *known]))


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> list[int]:
    """A response's token ids as the sampler would have drawn them: no BOS, the `end` token at the end."""
    return [*text_ids(tokenizer, text), end]


@cache
def _saved_generation(path: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):  # it has none
        return None
