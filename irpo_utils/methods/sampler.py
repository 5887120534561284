"""Draw responses from a policy and grade them: the arrow from M_t to its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answers.arithmetic import result_behind
from ..model.load import load_policy, load_tokenizer
from ..model.prompts import encode_prompts, encode_response, ending_tokens, stop_ids, text_ids
from ..model.records import Prompt, Record, Sample
from ..model.sampling import DEV_SCORE_ROWS, Completion, sample
from ..progress import counting
from ..settings import Settings
from ..tasks.base import Problem, Task
from ..tasks.grading import grade

Draw = Callable[..., Iterator[dict[str, list[Completion]]]]  # `sampling.sample` without its model
Work = Callable[["Sampler", Any], list[Record]]  # what is done with one chunk
# (work, path -> chunk) -> the path and the records of every chunk, as they are done
Spread = Callable[[Work, dict[Path, Any]], Iterator[tuple[Path, list[Record]]]]
CHUNK = 8  # batches of samples that a killed stage loses at most, for each process that draws


@dataclass(frozen=True)
class Calculator:
    """Writes results behind arithmetic expressions and "=", as in GSM8K's solutions (arXiv 2110.14168, 2407.18248)."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def triggers(self) -> np.ndarray:
        """The tokens that end with "="."""
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return np.array([i for i, text in enumerate(texts) if text.rstrip(" ").endswith("=")], dtype=int)

    def __call__(self, token_ids: list[int]) -> list[int]:
        """A sampling.Insert. Nothing is written that the tokenizer has no tokens for."""
        text = result_behind(self.tokenizer.decode(token_ids))
        # As it is written behind "=": a tokenizer may put something before what begins a text.
        head, line = text_ids(self.tokenizer, "="), text_ids(self.tokenizer, f"={text}")
        if line[: len(head)] != head or self.tokenizer.unk_token_id in line[len(head) :]:
            return []
        return line[len(head) :]


calculator_of = cache(Calculator)  # to find its triggers every token is decoded


@dataclass(frozen=True)
class Sampler:
    """A policy that is asked problems of a task. `draw` is `sampling.sample` without its model, or another engine's."""

    draw: Draw
    tokenizer: PreTrainedTokenizerBase
    task: Task
    stops: list[int]  # tokens that end a response; the first ends gold solutions
    config: Settings
    spread: Spread | None = None  # hands chunks to processes that hold the same policy; none: this process does them

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: Settings) -> Sampler:
        """What asks a model in memory the problems of `task`, and grades its responses."""
        stops = ending_tokens(tokenizer, model.generation_config)
        return cls(partial(sample, model), tokenizer, task, stops, config)

    def on(self, model: PreTrainedModel) -> Sampler:
        """The same for a model in memory."""
        return replace(self, draw=partial(sample, model), spread=None)

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

    def ask(self, problems: list[Problem], **options: Any) -> Iterator[dict[str, list[Completion]]]:
        """Responses to problems, a batch at a time; `options` are those of `sampling.sample`."""
        sampling = self.config.sampling
        own = {"eos_id": self.stops, "max_new_tokens": sampling.max_new_tokens, "max_rows": sampling.max_rows}
        own |= {"insert": calculator_of(self.tokenizer)} if sampling.calculator else {}
        return self.draw(encode_prompts(self.task, self.tokenizer, problems), **own | options)

    def samples(
        self, problems: list[Problem], *, n: int, temperature: float, seed: int, label: str, greedy_too: bool = False
    ) -> Iterator[list[Sample]]:
        """Draw `n` responses to every problem and grade them, a batch at a time; temperature 0 is greedy.

        With `greedy_too` a problem's samples come after one that is greedy, whose number is -1.
        """
        by_id, most = {p.id: p for p in problems}, self.config.sampling.max_rows
        options = {"n": n, "temperature": temperature, "seed": seed, "greedy_too": greedy_too}
        options["max_rows"] = most if n > 1 else min(DEV_SCORE_ROWS, most)
        with counting(label, len(problems), "problems") as count:
            for batch in self.ask(problems, progress=count.problems, **options):
                yield self.graded(
                    [(by_id[name], i - greedy_too, c) for name, own in batch.items() for i, c in enumerate(own)]
                )

    def in_chunks(self, groups: dict[str, list[Problem]], folder: Path, **options: Any) -> dict[str, list[Sample]]:
        """`samples` of groups of problems, with its `options`, a chunk of problems at a time as `fill` does them.

        Chunks follow the sampler's own order, so that every batch is the same in a resumed run. They depend on the
        configuration alone, whoever draws them.

        Args:
            groups: what a group is called while it is drawn -> its problems.
            folder: gets a file for every chunk, from which a stage that was killed goes on; it holds no other chunks.
        """
        size = max(1, self.config.sampling.max_rows // options["n"]) * CHUNK
        chunks: dict[Path, tuple[list[Problem], str]] = {}
        files: dict[str, list[Path]] = {label: [] for label in groups}
        for number, (label, problems) in enumerate(groups.items()):
            ids = encode_prompts(self.task, self.tokenizer, problems)
            order = sorted(problems, key=lambda p: (len(ids[p.id]), p.id))
            for start in range(0, len(order), size):
                part = order[start : start + size]
                files[label].append(folder / f"chunk_{number}_{start:07d}.jsonl")
                which = f"{label}, problems {start + 1}-{start + len(part)} of {len(order)}"
                chunks[files[label][-1]] = part, which
        made = self.fill(chunks, partial(samples_of, **options), ", ".join(groups))
        for path in chunks.keys() - made.keys():
            made[path] = Sample.read(path, "the same stage")
        return {label: [s for path in paths for s in made[path]] for label, paths in files.items()}

    def fill(self, chunks: dict[Path, Any], work: Work, label: str) -> dict[Path, list[Record]]:
        """Leave the records of `work(sampler, chunk)` in the file of every chunk that has none yet; returns those.

        A kill loses the chunks that are at work: one, or one for each of `sampling.workers`. Where these are other
        processes `work` and its chunk go there, so both must pickle.
        """
        missing = {path: chunk for path, chunk in chunks.items() if not path.exists()}
        here = ((path, work(self, chunk)) for path, chunk in missing.items())
        made = {}
        with counting(label, len(chunks), "parts", done=len(chunks) - len(missing)) as count:
            for path, records in self.spread(work, missing) if self.spread else here:
                Record.write(path, records)
                made[path] = records
                count()
        return made

    def graded(self, drawn: list[tuple[Problem, int, Completion]]) -> list[Sample]:
        """Responses with their answers' worth. A marked answer counts; `flexible` says what another would earn."""
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
                inserted=c.inserted,
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


def samples_of(sampler: Sampler, chunk: tuple[list[Problem], str], **options: Any) -> list[Sample]:
    """The samples of one chunk, problems and their label; `options` are those of `Sampler.samples`."""
    problems, label = chunk
    return [s for batch in sampler.samples(problems, label=label, **options) for s in batch]


def opened_when_asked(config: Settings, task: Task, start: Callable[[], Draw]) -> Sampler:
    """A sampler of the run's model whose engine is started by its first draw."""
    tokenizer, draw = load_tokenizer(config.model), cache(start)
    stops = stop_ids(config.model, tokenizer)
    return Sampler(lambda prompts, **options: draw()(prompts, **options), tokenizer, task, stops, config)


@contextmanager
def opened(config: Settings, policy: Path | None, task: Task, problems: list[Problem]) -> Iterator[Sampler]:
    """A sampler of M_t (None: the base) in this process. The model is loaded when it is first asked.

    Args:
        problems: what it will be asked, for engines that want to know how long prompts are.
    """
    yield opened_when_asked(
        config, task, lambda: partial(sample, load_policy(config.model, policy, threads=config.threads))
    )
