"""Work for a machine to be measured with: prompts and responses of random words, whose ids are their text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ..model.records import Pair

WORDS = 4000  # of a model with random weights
REPEATS = 5  # of every contender; the first round before them does not count


@dataclass(frozen=True)
class Shape:
    """A size of problem: tokens of prompts and responses, N samples and K pairs per problem, and the model."""

    name: str
    prompt: int
    response: int
    n: int
    k: int
    problems: int  # how many are sampled
    hidden: int = 0
    layers: int = 6
    model: str = ""  # what model.path takes; "": a model of that width and depth with random weights
    written: int = 0  # tokens of a response that is trained on; 0: as many as of one that is sampled
    trained: int = 2  # problems that are trained on
    lora: bool = False  # whether an adapter is trained, or all weights
    repeats: int = REPEATS


def word_tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer whose text is its ids: a contender that tokenizes gets the very tokens that the others get."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def random_prompts(shape: Shape, words: int = WORDS) -> dict[str, list[int]]:
    """Problem -> a prompt of about `shape.prompt` tokens."""
    rng = random.Random(0)
    return {
        f"p{i}": [rng.randrange(3, words) for _ in range(shape.prompt + rng.randint(-5, 5))]
        for i in range(shape.problems)
    }


def make_pairs(shape: Shape, prompts: dict[str, list[int]], words: int = WORDS) -> list[Pair]:
    """K pairs per problem, as the cyclic walk makes them of four winners and six losers, of random tokens."""
    rng, pairs = random.Random(1), []
    for name, prompt in prompts.items():
        length = shape.written or shape.response
        drawn = [
            (*(rng.randrange(3, words) for _ in range(length + rng.randint(-length // 5, length // 5))), 1)
            for _ in range(10)
        ]
        for i in range(shape.k):
            chosen, rejected = drawn[i % 4], drawn[4 + i % 6]
            texts = map(as_text, (prompt, chosen, rejected))
            pairs.append(Pair(name, *texts, tuple(prompt), chosen, rejected, None, None))
    return pairs


def as_text(ids: Sequence[int]) -> str:
    """What `word_tokenizer` reads as these ids, without the EOS: TRL adds that itself."""
    return "".join(f" w{i}" for i in ids if i > 2)
