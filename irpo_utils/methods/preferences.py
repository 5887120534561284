"""Preference data from elsewhere, `pairs.file`, in place of a round's own pairs.

A line is in one of TRL's forms: `prompt`, `chosen` and `rejected` as texts, or as lists of {"role", "content"}. Where
the latter two hold the whole conversation, `prompt` is not looked at. Texts are encoded as the task's own: a prompt
goes through the chat template, a response ends with the token that ends a turn. No sampler saw them, so `logp` is None.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..files import ConfigError, resolve
from ..model.load import load_tokenizer
from ..model.prompts import chat_text, encode_response, encode_texts, special_names, stop_ids, text_ids
from ..model.records import Pair
from ..settings import Settings
from ..tasks import get_task
from ..tasks.records import alike, is_file, read_file, read_hub
from .select import capped, mean_tokens

Turns = list[dict[str, str]]
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def read(config: Settings, imitates: bool = False, seed: int = 0) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of `pairs.file`, and an audit of those left out: over-long, alike, or about a question of dev or test.

    Args:
        imitates: leave the rejected responses out, for a loss that takes none. seed: of the cap `pairs.max_pairs`.

    Raises:
        ConfigError: there is no such file, a line of it is not preference data, or no pair is left.
    """
    source, limit = config.pairs.file, config.pairs.max_tokens
    if not source:
        raise ConfigError("pairs.file: the selection 'file' needs preference data, as in pairs.file=pairs.jsonl")
    tokenizer, task = load_tokenizer(config.model), get_task(config.task)
    end = stop_ids(config.model, tokenizer)[0]
    held_out = {alike(t) for s in ("dev", "test") for p in task.problems(s) for t in (p.question, task.prompt(p))}
    rows = read_file(resolve(source), "pairs.file") if is_file(source) else read_hub(source, "pairs.file")
    pairs, audit = [], Counter(problems=len(rows), duplicates=0, over_long=0, held_out=0)
    for number, (place, row) in enumerate(rows, 1):
        try:
            turns, *answers = conversation(row)
            prompt = prompt_ids(tokenizer, turns)
            chosen, rejected = (tuple(encode_response(tokenizer, text, end)) for text in answers)
        except ValueError as error:
            raise ConfigError(f"pairs.file: {place}: {error}") from None
        if any(alike(turn["content"]) in held_out for turn in turns):
            audit["held_out"] += 1
        elif chosen == rejected:
            audit["duplicates"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > limit:
            audit["over_long"] += 1
        else:
            text, other = (
                "\n\n".join(turn["content"] for turn in turns),
                ("", ()) if imitates else (answers[1], rejected),
            )
            pairs.append(Pair(f"pair-{number}", text, answers[0], other[0], prompt, chosen, other[1], None, None))
    if not pairs:
        why = (
            f"{audit['over_long']} exceed pairs.max_tokens (it is {limit}; raise it), "
            f"{audit['held_out']} ask a question of dev or test, {audit['duplicates']} have the same response twice"
        )
        raise ConfigError(f"pairs.file: no pair of {source} is left of {len(rows)}: {why}")
    pairs = capped(pairs, config.pairs.max_pairs, seed, audit)
    return pairs, {**audit, "pairs": len(pairs), **mean_tokens(pairs)}


def conversation(row: Any) -> tuple[Turns, str, str]:
    """What was said, and the chosen and rejected answer to it. Raises ValueError for a line that is neither form."""
    fields = {"prompt": [], **row} if isinstance(row, dict) else {}
    said = fields.get("chosen")
    if isinstance(said, list) and len(said) > 1:  # the whole conversation; a prompt is not looked at
        fields["prompt"] = []
    prompt, chosen, rejected = (turns_of(fields.get(name), name, role) for name, role in ROLES.items())
    turns = chosen[:-1] or prompt
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected answer different conversations; they may differ in the last turn alone")
    if not turns or turns[-1]["role"] != "user" or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("expected a prompt that ends with the user's turn, and an answer of the assistant's to it")
    return turns, chosen[-1]["content"], rejected[-1]["content"]


def turns_of(found: Any, name: str, role: str) -> Turns:
    """A field as turns, of which a text is one."""
    found = [{"role": role, "content": found}] if isinstance(found, str) else found
    if isinstance(found, list) and (found or name == "prompt"):
        texts = [turn.get("content") if isinstance(turn, dict) else None for turn in found]
        if all(isinstance(text, str) and text.strip() for text in texts):
            return [{"role": turn.get("role"), "content": turn["content"]} for turn in found]
    raise ValueError(f'{name}: expected a text that is not empty, or a list of {{"role": ..., "content": ...}}')


def prompt_ids(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> tuple[int, ...]:
    """A conversation's token ids up to where the answer begins. One turn is encoded as a problem of a task is."""
    if len(turns) == 1:
        return tuple(encode_texts(tokenizer, {"": turns[0]["content"]})[""])
    special = [name for name in special_names(tokenizer).values() if any(name in turn["content"] for turn in turns)]
    if special or not tokenizer.chat_template:
        why = f"must not hold the special token {special[0]}" if special else "need a model with a chat template"
        raise ValueError(f"several turns {why}; leave this line out")
    return tuple(text_ids(tokenizer, chat_text(tokenizer, turns, add_generation_prompt=True)))
