"""The likelihood of the gold answer after a thought as its reward (LaTRO, arXiv 2411.04282).

A thought is a response up to its last "Final answer:", or all of a response that has none, as one that was cut off.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..answers.marks import MARKS
from ..model.load import load_policy, load_tokenizer
from ..model.logprobs import Response, distinct_logps
from ..model.prompts import stop_ids, text_ids
from ..model.records import Sample
from .rewards import Job


def likelihood(job: Job) -> tuple[list[Sample], dict[str, Any]]:
    """A thought z is worth log M_t(y | x, z) - beta * (log M_t(z | x) - log M_0(z | x)), where y is the gold answer.

    Sums over tokens, in nats; beta is `train.beta`. Each thought joins the samples with the gold answer in place of its
    own (`extra`), and `thought` tells the two apart.

    Raises:
        ValueError: a gold answer is not one line, as that of a program, or the tokenizer joins it to the line before.
    """
    config, tokenizer = job.config, load_tokenizer(job.config.model)
    end, answers = stop_ids(config.model, tokenizer)[0], {p.id: p.answer for p in job.problems}
    drawn = [s for own in job.samples.values() for s in own]
    whole = [answered(tokenizer, s, answers[s.problem], end) for s in drawn]
    solutions = [(s.problem, s.token_ids, s.inserted) for s in whole]
    thoughts = [(s.problem, s.token_ids[: s.thought], s.inserted) for s in whole]

    def logps(policy: Path | None, responses: list[Response]) -> dict[Response, float]:
        model = load_policy(config.model, policy, threads=config.threads)
        prompts = {response: job.prompts[response[0]].prompt_ids for response in responses if response[1]}
        empty = {response: 0.0 for response in responses if not response[1]}
        return empty | distinct_logps(model, prompts, 2 * config.train.micro_batch)

    own = logps(job.policy, solutions + thoughts)
    first = own if job.policy == job.m0 else logps(job.m0, thoughts)
    likely = [own[s] - own[z] for s, z in zip(solutions, thoughts, strict=True)]
    rewards = [y - config.train.beta * (own[z] - first[z]) for y, z in zip(likely, thoughts, strict=True)]
    facts = {
        "thoughts": len(whole),
        "thought_tokens": mean(s.thought for s in whole),
        "answer_logp": mean(likely),
        "log_ratio": mean(own[z] - first[z] for z in thoughts),
        "drawn_tokens": 0,
        "trained_tokens": 0,
    }
    return [replace(s, reward=r) for s, r in zip(drawn + whole, rewards + rewards, strict=True)], facts


def answered(tokenizer: PreTrainedTokenizerBase, sample: Sample, answer: str, end: int) -> Sample:
    """A sample's thought with `answer` and the token `end` behind it. Raises ValueError as `likelihood`."""
    if not answer or "\n" in answer:
        raise ValueError(f"the reward needs a gold answer of one line, and problem {sample.problem} has {answer!r}")
    body = sample.token_ids[: len(sample.token_ids) - sample.finished]
    marks = [len(sample.response), *(mark.start() for mark in MARKS["final answer"].finditer(sample.response))]
    count = bisect_right(range(len(body) + 1), marks[-1], key=lambda n: len(tokenizer.decode(body[:n]))) - 1
    # The answer as it is written behind a line: a tokenizer may put something before what begins a text.
    before = "a\n" if tokenizer.decode(body[:count])[-1:] in ("", "\n") else "a"
    head, line = (text_ids(tokenizer, text) for text in (before, f"a\nFinal answer: {answer}"))
    if line[: len(head)] != head:
        raise ValueError("model.path: the tokenizer joins an answer to the line before it; take another model")
    ids = (*body[:count], *line[len(head) :])
    return replace(
        sample,
        response=tokenizer.decode(ids),
        answer=answer,
        flexible=1.0,
        finished=True,
        logp=None,
        token_ids=(*ids, end),
        answer_reward=1.0,
        extra=True,
        inserted=tuple(i for i in sample.inserted if i < count),
        thought=count,
    )
