"""01: the prompts of a round, and N graded samples of M_{t-1} for each; a round on gold solutions alone draws nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ...methods.parts import SAMPLERS, Engine
from ...model.records import Prompt, Record, Sample
from ...tasks import get_task
from ...tasks.base import Problem
from ..store import Stage


class SampleStage(Stage):
    name = "01_sample"
    draws = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folder = self.samples_folder()

    def reads(self) -> dict[str, tuple[Path, str]]:
        return self.policy_input(self.iteration - 1) if self.choices.draws else {}

    def writes(self) -> tuple[str, ...]:
        return ("prompts.jsonl", "samples.jsonl") if self.choices.draws else ("prompts.jsonl",)

    def parameters(self) -> dict[str, Any]:
        chosen = self.task_parameters(unused="dev test") | self.common_parameters() | self.base_parameters()
        chosen |= self.section("warm_start", only=["problems"])
        if self.config.train.retrain_with_dev:
            chosen["train.retrain_with_dev"] = True
        if self.choices.draws:
            chosen |= self.section("sampling") | {"sampling.temperature": self.config.temperature(self.iteration)}
        return chosen

    def uses(self) -> list[str]:
        return [self.sampler.where]

    @property
    def sampler(self) -> Engine:
        return super().sampler if self.choices.draws else SAMPLERS["transformers"]  # which writes prompts

    def make(self) -> None:
        """Draws a chunk of problems at a time, so that a kill loses one chunk."""
        config, task = self.config, get_task(self.config.task)
        problems = self.training_problems(task)
        with self.sampler.load()(config, self.input("policy"), task, problems) as sampler:
            prompts = sampler.prompts(problems)
            Record.write(self.path("prompts.jsonl"), prompts.values())
            if not self.choices.draws:
                return
            self._draw(sampler, problems, prompts)
        found = [s for path in sorted(self.partial.glob("chunk_*.jsonl")) for s in Sample.read(path, self.name)]
        rank = {p.id: i for i, p in enumerate(problems)}
        found.sort(key=lambda s: (rank[s.problem], s.sample))
        Record.write(self.path("samples.jsonl"), found)
        if task.undecided:
            print(f"{task.undecided} answers took the symbolic check too long and are unparsed", file=sys.stderr)

    def result(self) -> list[Sample]:
        """The samples; none of a round on gold solutions alone."""
        return Sample.read(self.path("samples.jsonl"), self.name) if self.choices.draws else []

    def _draw(self, sampler, problems: list[Problem], prompts: dict[str, Prompt]) -> None:
        """Leave the samples of every chunk of problems in a file."""
        sampling = self.config.sampling
        # Chunks follow the sampler's own order, so that every batch is the same in a resumed run.
        order = sorted(problems, key=lambda p: (len(prompts[p.id].prompt_ids), p.id))
        size = max(1, sampling.max_rows // sampling.n) * 8
        chunks = {start: self.partial / f"chunk_{start:07d}.jsonl" for start in range(0, len(order), size)}
        missing = {start: path for start, path in chunks.items() if not path.exists()}
        started = 0.0
        for number, (start, path) in enumerate(missing.items(), 1):
            part = order[start : start + size]
            batches = sampler.samples(
                part,
                n=sampling.n,
                temperature=self.config.temperature(self.iteration),
                seed=self.random_seed(),
                label=f"sampling M_{self.iteration - 1}, problems {start + 1}-{start + len(part)} of {len(order)}",
            )
            Record.write(path, [s for batch in batches for s in batch])
            if number == 1:  # in which the model was loaded
                started = time.monotonic()
            elif number == 2 and len(missing) > 2:  # what a chunk takes says what the rest will take
                left = (time.monotonic() - started) * (len(missing) - 2)
                print(f"sampling: {len(missing) - 2} more parts, about {left:.0f} s left", file=sys.stderr)
