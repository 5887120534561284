"""01: the prompts of a round, and N graded samples of M_{t-1} for each; a round on gold solutions alone draws none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...methods.parts import SAMPLERS, Engine
from ...model.records import Record, Sample
from ...tasks import get_task
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
        """Draws a chunk of problems at a time, so that a kill loses no more than the chunks at work."""
        config, task = self.config, get_task(self.config.task)
        problems = self.training_problems(task)
        with self.open_sampler(task, problems) as sampler:
            Record.write(self.path("prompts.jsonl"), sampler.prompts(problems).values())
            if not self.choices.draws:
                return
            options = {"n": config.sampling.n, "temperature": config.temperature(self.iteration)}
            label = f"sampling M_{self.iteration - 1}"
            found = sampler.in_chunks({label: problems}, self.partial, seed=self.random_seed(), **options)[label]
        rank = {p.id: i for i, p in enumerate(problems)}
        found.sort(key=lambda s: (rank[s.problem], s.sample))
        Record.write(self.path("samples.jsonl"), found)
        if task.undecided:
            print(f"{task.undecided} answers took the symbolic check too long and are unparsed", file=sys.stderr)

    def result(self) -> list[Sample]:
        """The samples; none of a round on gold solutions alone."""
        return Sample.read(self.path("samples.jsonl"), self.name) if self.choices.draws else []
