"""02: what the round trains on, pairs of samples or single responses, and the audit of how it came about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...files import write_json
from ...methods import parts
from ...methods.select import select
from ...model.records import Pair, Record
from ..store import Stage, problem_files


class PairsStage(Stage):
    name = "02_pairs"
    reads_problems = loads_model = False  # prompts and samples say all that it needs of them

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Of a file texts are encoded, and questions of dev and test left out.
        self.on_file = self.reads_problems = self.loads_model = self.choices.selection == "file"

    def reads(self) -> dict[str, tuple[Path, str]]:
        if self.on_file:
            return {}
        drawn = self.samples_folder()
        found = {"prompts": (drawn / "prompts.jsonl", "01_sample.ipynb")}
        if self.choices.has_reward_stage:
            found["samples"] = (self.folder / "rewarded.jsonl", "01b_reward.ipynb")
        elif self.choices.draws:
            found["samples"] = (drawn / "samples.jsonl", "01_sample.ipynb")
        t = self.iteration
        if self.choices.accumulate and t > 1 and self.recipe.round(t - 1).accumulate:
            found["earlier"] = (self.folder_of(t - 1) / "pairs.jsonl", f"02_pairs.ipynb with iteration = {t - 1}")
        return found

    def writes(self) -> tuple[str, ...]:
        return ("pairs.jsonl", "audit.json")

    def parameters(self) -> dict[str, Any]:
        chosen = {"selection": self.choices.selection, "accumulate": self.choices.accumulate}
        if self.on_file:
            chosen |= {"loss": self.choices.loss} | self.task_parameters(unused="train")
            chosen |= self.section("model", only=["path", "trust_remote_code"])
        return self.section("pairs") | chosen | {"seed": self.seed, "iteration": self.iteration}

    def uses(self) -> list[str]:
        return [parts.part("selection", self.choices.selection).where]

    def configured_files(self) -> dict[str, str]:
        return super().configured_files() | problem_files((self.config.pairs.file,) if self.on_file else ())

    def make(self) -> None:
        samples, settings, seed = self.samples(), self.config.pairs, self.random_seed(1)
        if self.on_file:
            read, imitates = self.choices.part("selection").load(), not self.choices.part("loss").pairs
            pairs, audit = read(self.config, imitates, seed)
        else:
            pairs, audit = select(self.choices.selection, samples, self.prompts(), settings, seed)
        if samples:
            audit["drawn_tokens"] = sum(len(s.token_ids) for own in samples.values() for s in own if not s.extra)
        if "earlier" in self.reads():
            # Whoever drew them was not the model that is trained now: their log-probabilities are not to be compared.
            earlier = self.records("earlier", Pair)
            pairs = [replace(pair, chosen_logp=None, rejected_logp=None) for pair in earlier] + pairs
            audit["accumulated"] = len(pairs)
        Record.write(self.path("pairs.jsonl"), pairs)
        write_json(self.path("audit.json"), audit)

    def result(self) -> tuple[list[Pair], dict[str, Any]]:
        """The pairs and the audit."""
        return Pair.read(self.path("pairs.jsonl"), self.name), self.facts("audit.json")
