"""03c: draw, pair and train in one, where the policy that is trained draws its own pairs (`train.sync_every`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...methods import parts
from ...model.records import Pair
from ...tasks.base import Task
from .train import TrainStage


class OnlineStage(TrainStage):
    name = "03c_online"
    trains = parts.ONLINE

    def reads(self) -> dict[str, tuple[Path, str]]:
        return {name: file for name, file in super().reads().items() if name != "pairs"}

    def writes(self) -> tuple[str, ...]:
        return (*super().writes(), "pairs.jsonl", "audit.json")

    def parameters(self) -> dict[str, Any]:
        chosen = (
            super().parameters()
            | self.task_parameters(unused="test")
            | self.section("warm_start", only=["problems"])
            | self.section("sampling")
            | {"sampling.temperature": self.config.temperature(self.iteration)}
            | self.section("pairs", without=["max_pairs"])
            | {"selection": self.choices.selection}
        )
        # Of rounds whose pairs are there before they train.
        return {k: v for k, v in chosen.items() if k not in ("train.max_epochs", "train.pairs_together")}

    def uses(self) -> list[str]:
        return [*super().uses(), parts.part("selection", self.choices.selection).where]

    def make(self, show: Callable[[str], None] = print) -> None:
        super().make(show)
        for name in ("pairs.jsonl", "audit.json"):
            self.keep(name, self.partial / name)

    def pairs(self, task: Task) -> list[Pair]:
        return []

    def draws_with(self, task: Task) -> dict[str, Any]:
        return {"problems": self.training_problems(task), "temperature": self.config.temperature(self.iteration)}
