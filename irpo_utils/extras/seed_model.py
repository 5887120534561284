"""Make the seed model M_0: a small Llama trained from scratch on the careless solver's solutions, and try it.

`00_seed_model.ipynb` calls these functions; the result is shipped in `irpo_utils/assets/seed_model`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from ..model.logprobs import padded, token_logps
from ..model.losses import nll_term
from ..model.sampling import sample
from ..tasks.base import Problem, Task
from ..tasks.stories import MAX_VALUE, Story, careless_choice, draw_problems, make_problem, prompt

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
BATCH = 64  # solutions of an optimizer step
LR = 3e-3
# One token is a word with the space before it, or a line break: decoding gives the text back to the letter.
TOKEN = r" ?[^\s]+|\n"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with whole numbers as tokens; its words are those of `texts` and every value."""
    split = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    words |= {f" {value}" for value in range(MAX_VALUE + 1)}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    """0.9 M parameters. Every width is a multiple of 64, which NF4 needs on a CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train_seed_model(
    stories: list[Story],
    steps: int,
    seed: int = 0,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Teach a fresh model the careless solver's solutions, a new reading of the story each time it comes up.

    Plain next-token prediction on the response (length-normalised NLL per solution), prompts conditioned on.
    """
    rng = random.Random(seed)
    # A careless solution has no other words than a right one.
    texts = [prompt(story.question()) + make_problem("", story).solution for story in stories]
    tokenizer = build_tokenizer([*texts, "Final answer: odd", "Final answer: even"])
    model = build_model(len(tokenizer), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    prompts = [tokenizer(prompt(s.question())).input_ids for s in stories]
    for step in range(steps):
        rows = []
        for i in rng.sample(range(len(stories)), BATCH):
            response, _ = stories[i].solution(careless_choice(stories[i], rng))
            ids = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            rows.append((prompts[i], ids))
        ids, _ = padded([p + r for p, r in rows])
        scored, _ = padded([[0] * len(p) + [1] * len(r) for p, r in rows])
        logps = token_logps(model(input_ids=ids).logits[:, :-1], ids[:, 1:]) * scored[:, 1:]
        loss = nll_term(logps.sum(-1), scored.sum(-1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log(step + 1, loss.item())
    return model.eval(), tokenizer


def seed_stories(count: int, seed: int, guessable_share: float) -> list[Story]:
    """Stories of the "seed" part of the hash space, which shares none with train, dev or test."""
    return [story for _, story in draw_problems("seed", count, seed, guessable_share)]


def save_seed_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Solved(NamedTuple):
    """A problem that the model was tried on."""

    steps: list[tuple[str, str]]  # (kind, verdict) of every event in the greedy response
    right: bool  # whether the greedy response's answer is
    right_samples: int  # of the samples


def solve(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    problems: list[Problem],
    samples: int,
    temperature: float = 0.8,
) -> list[Solved]:
    """Try the model on problems of a task that knows the truth of steps: greedily, and with samples of each."""
    prompts = {p.id: tokenizer(task.prompt(p)).input_ids for p in problems}
    options = {"seed": 0, "eos_id": tokenizer.eos_token_id, "max_new_tokens": 96}

    def responses(n: int, temperature: float) -> dict[str, list[str]]:
        batches = sample(model, prompts, n=n, temperature=temperature, **options)
        return {
            name: [tokenizer.decode(c.token_ids[:-1]) for c in own] for found in batches for name, own in found.items()
        }

    def right(p: Problem, response: str) -> bool:
        return task.extract(response, p) == p.answer

    greedy, drawn = responses(1, 0.0), responses(samples, temperature)
    return [
        Solved(task.check_steps(p, greedy[p.id][0]), right(p, greedy[p.id][0]), sum(right(p, r) for r in drawn[p.id]))
        for p in problems
    ]


def summary(solved: list[Solved], samples: int) -> dict[str, float]:
    """Shares of the problems; luck is a right answer behind a wrong step, as a share of the right answers."""
    sound = [all(verdict == "right" for _, verdict in s.steps) for s in solved]
    right = sum(s.right for s in solved)
    return {
        "every step right": sum(sound) / len(solved),
        "answer right": right / len(solved),
        "luck among the right": sum(s.right and not ok for s, ok in zip(solved, sound, strict=True)) / max(1, right),
        "one sample right": sum(s.right_samples for s in solved) / samples / len(solved),
        "one of the samples right": sum(s.right_samples > 0 for s in solved) / len(solved),
    }


def by_kind(solved: list[Solved]) -> dict[str, dict[str, float]]:
    """Of every kind of event, the shares of the greedy responses' verdicts."""
    counts: dict[str, Counter[str]] = {}
    for kind, verdict in (step for s in solved for step in s.steps):
        counts.setdefault(kind, Counter())[verdict] += 1
    return {
        kind: {verdict: own[verdict] / own.total() for verdict in ("right", "careless", "other", "missing")}
        for kind, own in sorted(counts.items())
    }
