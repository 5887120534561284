"""01b: other rewards than the answer's, as a process reward model, a judge, or a function of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files import write_json, write_jsonl
from ...methods import parts
from ...methods.rewards import Job
from ...model.records import Sample
from ...tasks import get_task
from ..store import Stage, model_files


class RewardStage(Stage):
    name = "01b_reward"
    draws = True

    @property
    def part(self) -> parts.Reward:
        return parts.part("reward", self.choices.reward)

    def reads(self) -> dict[str, tuple[Path, str]]:
        drawn = self.samples_folder()
        files = {name: (drawn / f"{name}.jsonl", "01_sample.ipynb") for name in ("samples", "prompts")}
        files |= self.policy_input(self.iteration - 1)
        return files | (self.policy_input(0, "m0") if self.part.m0 else {})

    def writes(self) -> tuple[str, ...]:
        return ("rewarded.jsonl", "reward.json", *self.part.files)

    def parameters(self) -> dict[str, Any]:
        chosen = self.task_parameters(unused="dev test") | self.common_parameters() | self.section("model")
        chosen |= self.section("sampling") | {"sampling.temperature": self.config.temperature(self.iteration)}
        chosen |= self.section("warm_start", only=["problems"])
        chosen |= {"reward": self.choices.reward, "train.retrain_with_dev": self.config.train.retrain_with_dev}
        for name in self.part.settings:
            section, _, leaf = name.partition(".")
            chosen |= self.section(section, only=[leaf] if leaf else ())
        return chosen

    def uses(self) -> list[str]:
        return [self.part.where, self.sampler.where]

    def configured_files(self) -> dict[str, str]:
        simulator = self.parameters().get("process.simulator")
        return super().configured_files() | (model_files("simulator", simulator) if simulator else {})

    def make(self) -> None:
        task, samples = get_task(self.config.task), self.samples()
        found, facts = self.part.load()(
            Job(
                config=self.config,
                policy=self.input("policy"),
                task=task,
                problems=[p for p in self.training_problems(task) if p.id in samples],
                prompts=self.prompts(),
                samples=samples,
                temperature=self.config.temperature(self.iteration),
                seed=self.random_seed(),
                folder=self.partial,
                m0=self.input("m0"),
            )
        )
        rows = (sample.as_row() | {"answer_reward": sample.answer_reward} for sample in found)
        write_jsonl(self.path("rewarded.jsonl"), rows)
        write_json(self.path("reward.json"), facts)
        for name in self.part.files:
            self.keep(name, self.partial / name)

    def result(self) -> tuple[list[Sample], dict[str, Any]]:
        """The samples with their rewards, and the facts in reward.json."""
        return Sample.read(self.path("rewarded.jsonl"), self.name), self.facts("reward.json")
