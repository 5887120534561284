"""03: train M_t on the pairs and keep the step that is best on dev."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...files import load_object, read_jsonl, write_json
from ...methods import parts
from ...model.records import Pair
from ...tasks import get_task
from ...tasks.base import Task
from ..store import Stage

# Where `train.processes` says so; by name, so that it has no part in the key where there is one.
SEVERAL = ("irpo_utils.run.launch:launched", "irpo_utils.run.rank:work")


class TrainStage(Stage):
    name = "03_train"
    trains = parts.TRAINING

    def reads(self) -> dict[str, tuple[Path, str]]:
        found = {"pairs": (self.folder / "pairs.jsonl", "02_pairs.ipynb")}
        iteration_of = {"M_t": self.iteration - 1, "moving": self.iteration - 1, "M_0": 0}
        found |= self.policy_input(iteration_of[self.choices.start])
        if self.choices.reference != "none" and not self.choices.reference_is_start:
            found |= self.policy_input(iteration_of[self.choices.reference], "reference")
        return found

    def writes(self) -> tuple[str, ...]:
        return ("adapter", "steps.jsonl", "training.json")

    def parameters(self) -> dict[str, Any]:
        unused = {name for loss in parts.LOSSES.values() for name in loss.parameters} - set(self.loss.parameters)
        unused |= set() if self.config.train.processes > 1 else {"processes", "shard"}
        unused |= {"sync_every"} if self.trains is parts.TRAINING else set()
        chosen = {"loss": self.choices.loss, "start": self.choices.start, "reference": self.choices.reference}
        return (
            self.task_parameters(unused="train test")
            | self.section("model")
            | self.section("train", without=unused)
            | self.section("sampling", only=["max_new_tokens", "max_rows", "calculator"])  # of dev scores
            | self.common_parameters()
            | chosen
        )

    @property
    def loss(self) -> parts.Loss:
        return parts.part("loss", self.choices.loss)

    @property
    def engine(self) -> parts.Trainer:
        return parts.TRAINERS[self.config.train.engine]

    def uses(self) -> list[str]:
        several = SEVERAL if self.config.train.processes > 1 else ()
        return [self.trains.where, self.engine.where, self.loss.where, *several]

    def versions(self) -> dict[str, str | None]:
        return super().versions() | {name: version(name) for name in self.engine.packages}

    def make(self, show: Callable[[str], None] = print) -> None:
        several = self.config.train.processes > 1
        facts = load_object(SEVERAL[0])(self, show) if several else self.training().run(show)
        write_json(self.path("training.json"), facts)
        self.keep("steps.jsonl", self.partial / "steps.jsonl")
        self.keep("adapter", self.partial / "kept")

    def training(self) -> Any:
        """The training to run, a `methods.trainer.Training`."""
        task = get_task(self.config.task)
        # What names the model that scores the pairs before the first step; the rate and the like have no part in it.
        named = self._key | {"parameters": self.section("model") | {"threads": self.config.threads}}
        return self.trains.load()(
            config=self.config,
            choices=self.choices,
            start=self.input("policy"),
            reference=self.input("reference"),
            pairs=self.pairs(task),
            task=task,
            seed=self.seed,
            order_seed=self.random_seed(2),
            sampled_by_start=self.choices.draws and (self.choices.start == "M_t" or self.iteration == 1),
            folder=self.partial,
            kept_scores=(self.folder / "reference.json", named),
            **self.draws_with(task),
        )

    def pairs(self, task: Task) -> list[Pair]:
        """What it trains on."""
        return self.records("pairs", Pair)

    def draws_with(self, task: Task) -> dict[str, Any]:
        """What a training is given besides that draws its own pairs."""
        return {}

    def curve(self) -> list[dict[str, float]]:
        """The watched pairs' log-probabilities before the first step (step 0), and a record for each step."""
        return [self.result() | {"step": 0}, *read_jsonl(self.path("steps.jsonl"), self.name)]

    def result(self) -> dict[str, Any]:
        """The facts in training.json."""
        return self.facts("training.json")
