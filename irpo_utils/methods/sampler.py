"""Draw responses from a policy and grade them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..model import load, sampling
from ..model.prompts import encode_prompts, stop_ids
from ..tasks.base import Problem, Task
from ..tasks.grading import grade

Record = dict[str, Any]
Draw = Callable[..., Iterator[dict[str, list["sampling.Completion"]]]]  # `sampling.sample` without its model


class Progress:
    """One line every few seconds on standard error: done, tokens per second, time left. No bars, which garble logs."""

    def __init__(self, label: str, every: float = 10.0):
        self.label, self.every, self.started = label, every, time.monotonic()
        self.shown = self.started

    def __call__(self, done: int, total: int, rate: float) -> None:
        now = time.monotonic()
        if now - self.shown > self.every:
            self.shown, left = now, (now - self.started) * (total - done) / max(1, done)
            print(
                f"{self.label}: {done}/{total} problems, {rate:,.0f} tokens/s, {left:.0f} s left",
                file=sys.stderr,
            )


@contextmanager
def drawing(config, policy: Path | None, tokenizer, task: Task, problems: list[Problem]) -> Iterator[Draw]:
    """The function that draws from M_t (None: the base) by `sampling.engine`, for prompts as long as those of `problems`."""
    if config.sampling.engine == "vllm":
        longest = max(len(ids) for ids in encode_prompts(task, tokenizer, problems).values())
        from ..extras.vllm.engine import Engine

        with Engine(config, policy, longest) as engine:
            yield engine.sample
    else:
        yield partial(sampling.sample, load.load_policy(config.model, policy, threads=config.threads))


def graded_samples(
    config,
    draw: Draw,
    tokenizer,
    task: Task,
    problems: list[Problem],
    *,
    n: int,
    temperature: float,
    seed: int,
    label: str,
) -> Iterator[list[Record]]:
    """Sample and grade, a batch of records at a time; each record is a line of samples.jsonl."""
    by_id = {p.id: p for p in problems}
    drawn = draw(
        encode_prompts(task, tokenizer, problems),
        n=n,
        temperature=temperature,
        seed=seed,
        eos_id=stop_ids(config.model, tokenizer),
        max_new_tokens=config.sampling.max_new_tokens,
        rows=config.sampling.max_rows if n > 1 else min(256, config.sampling.max_rows),
        progress=Progress(label),
    )
    for batch in drawn:
        drawn_rows = [(by_id[name], i, c) for name, completions in batch.items() for i, c in enumerate(completions)]
        texts = [tokenizer.decode(c.token_ids[:-1] if c.finished else c.token_ids) for _, _, c in drawn_rows]
        asked = [p for p, _, _ in drawn_rows]
        strict = grade(task, texts, asked)
        open_ones = [i for i, verdict in enumerate(strict) if verdict.correct is None]
        again = grade(task, [texts[i] for i in open_ones], [asked[i] for i in open_ones], flexible=True)
        loose = dict(zip(open_ones, again, strict=True))
        flexible = [loose.get(i, verdict) for i, verdict in enumerate(strict)]
        used = flexible if config.task.flexible else strict
        yield [
            {
                "problem": p.id,
                "sample": i,
                "response": text,
                "answer": verdict.extracted,
                "reward": verdict.reward,
                "flexible": other.reward,
                "finished": c.finished,
                "logp": c.logp,
                "token_ids": c.token_ids,
            }
            for (p, i, c), text, verdict, other in zip(drawn_rows, texts, used, flexible, strict=True)
        ]


def greedy_accuracy(config, model, tokenizer, task: Task, problems: list[Problem]) -> float:
    """Share of `problems` that `model`, which is in memory (so no other engine draws), solves greedily."""
    draw = partial(sampling.sample, model)
    batches = graded_samples(config, draw, tokenizer, task, problems, n=1, temperature=0, seed=0, label="dev")
    return sum(row["reward"] == 1 for batch in batches for row in batch) / len(problems)
