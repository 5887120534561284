"""Make the seed model M_0: a small Llama trained from scratch on the careless solver's solutions.

`00_seed_model.ipynb` calls these functions; the result is shipped in `irpo_utils/assets/seed_model`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from ..model.logprobs import padded, token_logps
from ..model.losses import nll_term
from ..tasks.word_problems import MAX_VALUE, Story, careless_choice, draw_problems, prompt

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
    readings = [(s, (careless,) * len(s.events)) for s in stories for careless in (False, True)]
    texts = [prompt(story.question()) + story.solution(careless)[0] for story, careless in readings]
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
