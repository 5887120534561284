"""Draw responses from a policy and grade them: the arrow from M_t to its samples."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.load import load_policy, load_tokenizer
from ..model.prompts import encode_prompts, encode_response, ending_tokens, stop_ids
from ..model.records import Prompt, Sample
from ..model.sampling import Completion, sample
from ..settings import Settings
from ..tasks.base import Problem, Task
from ..tasks.grading import grade

Draw = Callable[..., Iterator[dict[str, list[Completion]]]]  # `sampling.sample` without its model


class Progress:
    """One line every ten seconds on standard error: done, tokens per second, time left. No bars, which garble logs."""

    def __init__(self, label: str):
        self.label, self.started = label, time.monotonic()
        self.printed = self.started

    def __call__(self, done: int, total: int, rate: float) -> None:
        now = time.monotonic()
        if now - self.printed > 10:
            self.printed, left = now, (now - self.started) * (total - done) / max(1, done)
            print(
                f"{self.label}: {done}/{total} problems, {rate:,.0f} tokens/s, {left:.0f} s left",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Sampler:
    """A policy that can be asked problems of a task. `draw` is `sampling.sample` without its model, or another engine's."""

    draw: Draw
    tokenizer: PreTrainedTokenizerBase
    task: Task
    stops: list[int]  # tokens that end a response; the first ends gold solutions
    config: Settings

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: Settings) -> Sampler:
        """What asks a model in memory the problems of `task`, and grades its responses."""
        stops = ending_tokens(tokenizer, model.generation_config)
        return cls(partial(sample, model), tokenizer, task, stops, config)

    def on(self, model: PreTrainedModel) -> Sampler:
        """The same for a model in memory."""
        return replace(self, draw=partial(sample, model))

    def prompts(self, problems: list[Problem]) -> dict[str, Prompt]:
        """Problem id -> its prompt, with the gold solution as the model would have drawn it."""
        ids = encode_prompts(self.task, self.tokenizer, problems)
        end = self.stops[0]
        return {
            p.id: Prompt(
                p.id,
                self.task.prompt(p),
                tuple(ids[p.id]),
                p.solution,
                tuple(encode_response(self.tokenizer, p.solution, end)) if p.solution else (),
            )
            for p in problems
        }

    def samples(
        self, problems: list[Problem], *, n: int, temperature: float, seed: int, label: str, greedy_too: bool = False
    ) -> Iterator[list[Sample]]:
        """Draw `n` responses to every problem and grade them, a batch at a time; temperature 0 is greedy.

        With `greedy_too` a problem's samples come after one that is greedy, whose number is -1.
        """
        by_id, sampling = {p.id: p for p in problems}, self.config.sampling
        drawn = self.draw(
            encode_prompts(self.task, self.tokenizer, problems),
            n=n,
            temperature=temperature,
            seed=seed,
            eos_id=self.stops,
            max_new_tokens=sampling.max_new_tokens,
            max_rows=sampling.max_rows if n > 1 else min(256, sampling.max_rows),
            greedy_too=greedy_too,
            progress=Progress(label),
        )
        for batch in drawn:
            yield self.graded(
                [(by_id[name], i - greedy_too, c) for name, own in batch.items() for i, c in enumerate(own)]
            )

    def graded(self, drawn: list[tuple[Problem, int, Completion]]) -> list[Sample]:
        """Responses with what their answers are worth. A marked answer counts; `flexible` says what another would earn."""
        texts = [self.tokenizer.decode(c.token_ids[:-1] if c.finished else c.token_ids) for _, _, c in drawn]
        problems = [p for p, _, _ in drawn]
        strict = grade(self.task, texts, problems)
        unparsed = [i for i, verdict in enumerate(strict) if verdict.correct is None]
        again = grade(self.task, [texts[i] for i in unparsed], [problems[i] for i in unparsed], flexible=True)
        flexible = strict.copy()
        for i, verdict in zip(unparsed, again, strict=True):
            flexible[i] = verdict
        return [
            Sample(
                problem=p.id,
                sample=i,
                response=text,
                answer=verdict.extracted,
                reward=verdict.reward,
                flexible=other.reward,
                finished=c.finished,
                logp=c.logp,
                token_ids=tuple(c.token_ids),
            )
            for (p, i, c), text, verdict, other in zip(
                drawn, texts, flexible if self.config.task.flexible else strict, flexible, strict=True
            )
        ]

    def greedy_accuracy(self, problems: list[Problem], label: str = "dev") -> float:
        """Share of `problems` that are solved greedily."""
        return self.solved(problems, label) / len(problems)

    def solved(self, problems: list[Problem], label: str = "dev") -> int:
        """How many of `problems` are solved greedily."""
        batches = self.samples(problems, n=1, temperature=0, seed=0, label=label)
        return sum(s.reward == 1 for batch in batches for s in batch)


@contextmanager
def opened(config: Settings, policy: Path | None, task: Task, problems: list[Problem]) -> Iterator[Sampler]:
    """A sampler of M_t (None: the base) in this process. The model is loaded when it is first asked.

    Args:
        problems: what it will be asked, for engines that want to know how long prompts are.
    """
    model = cache(lambda: load_policy(config.model, policy, threads=config.threads))
    tokenizer = load_tokenizer(config.model)
    stops = stop_ids(config.model, tokenizer)
    yield Sampler(lambda prompts, **options: sample(model(), prompts, **options), tokenizer, task, stops, config)
