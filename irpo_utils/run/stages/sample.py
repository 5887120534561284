"""01: the prompts of a round, and N graded samples of M_{t-1} for each; a round on gold solutions alone draws nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ...files import load_object
from ...methods.parts import SAMPLERS
from ...model.records import Prompt, Record, Sample
from ...tasks import get_task
from ...tasks.base import Problem, Task
from ..store import Stage


class SampleStage(Stage):
    name = "01_sample"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folder = self.samples_folder()

    def reads(self) -> dict[str, tuple[Path, str]]:
        return self.sampled_policy() if self.choices.samples else {}

    def writes(self) -> tuple[str, ...]:
        return ("prompts.jsonl", "samples.jsonl") if self.choices.samples else ("prompts.jsonl",)

    def parameters(self) -> dict[str, Any]:
        chosen = self.task_parameters(unused="dev test") | self.common_parameters() | self.base_parameters()
        if self.config.train.retrain_with_dev:
            chosen["train.retrain_with_dev"] = True
        if self.choices.samples:
            chosen |= self.section("sampling") | {"sampling.temperature": self.config.temperature(self.iteration)}
        return chosen

    def uses(self) -> list[str]:
        return [self.engine().where]

    def engine(self):
        return SAMPLERS[self.config.sampling.engine if self.choices.samples else "transformers"]

    def versions(self) -> dict[str, str | None]:
        return super().versions() | engine_version(self, self.engine())

    def run(self) -> list[Sample]:
        """Draws a chunk of problems at a time, so that a kill loses one chunk. Returns the samples."""
        config, task = self.config, get_task(self.config.task)
        problems = training_problems(task, config.train.retrain_with_dev)
        with self.engine().load()(config, self.input("policy"), task, problems) as sampler:
            prompts = sampler.prompts(problems)
            Record.write(self.path("prompts.jsonl"), prompts.values())
            if not self.choices.samples:
                return []
            self._draw(sampler, problems, prompts)
        found = [s for path in sorted(self.partial.glob("chunk_*.jsonl")) for s in Sample.read(path, self.name)]
        rank = {p.id: i for i, p in enumerate(problems)}
        found.sort(key=lambda s: (rank[s.problem], s.sample))
        Record.write(self.path("samples.jsonl"), found)
        if task.undecided:
            print(f"{task.undecided} answers took the symbolic check too long and count as wrong", file=sys.stderr)
        return found

    def _draw(self, sampler, problems: list[Problem], prompts: dict[str, Prompt]) -> None:
        """Leave the samples of every chunk of problems in a file."""
        sampling = self.config.sampling
        # Chunks follow the sampler's own order, so that every batch is the same in a resumed run.
        order = sorted(problems, key=lambda p: (len(prompts[p.id].prompt_ids), p.id))
        size = max(1, sampling.max_rows // sampling.n) * 8
        chunks = {start: self.partial / f"chunk_{start:07d}.jsonl" for start in range(0, len(order), size)}
        missing = {start: path for start, path in chunks.items() if not path.exists()}
        started = time.monotonic()
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
            if number == 1 and len(missing) > 1:  # what the first chunk took says what the rest will take
                rate = (time.monotonic() - started) / len(part)
                left = rate * sum(len(order[at : at + size]) for at in list(missing)[1:])
                print(f"sampling: {rate:.2f} s a problem, about {left:.0f} s left", file=sys.stderr)


def training_problems(task: Task, with_dev: bool) -> list[Problem]:
    """The training problems; then the dev problems too, if training is repeated with them (`train.retrain_with_dev`)."""
    return task.problems("train") + (task.problems("dev") if with_dev else [])


def engine_version(stage: Stage, engine: Any) -> dict[str, str | None]:
    """The version of an engine in an environment of its own.

    Without it at hand, a stage is judged by the one that it was made with; to sample, it must be there.
    """
    if not engine.version:
        return {}
    made_with = ((stage.manifest() or {}).get("key") or {}).get("versions") or {}
    name = stage.config.sampling.engine
    return {name: load_object(engine.version)() or made_with.get(name)}
