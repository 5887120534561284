"""03b: ExPO, theta = M_{t-1} + a (M_{t-1} - M_{t-2}), without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files import write_json
from ...methods import parts
from ..store import Stage


class ExtrapolateStage(Stage):
    name = "03b_extrapolate"
    reads_problems = False

    def reads(self) -> dict[str, tuple[Path, str]]:
        return self.policy_input(self.iteration - 1) | self.policy_input(self.iteration - 2, "before")

    def writes(self) -> tuple[str, ...]:
        return ("adapter", "training.json")

    def parameters(self) -> dict[str, Any]:
        return self.section("model") | self.section("train", only=["extrapolation"]) | self.common_parameters()

    def uses(self) -> list[str]:
        return [parts.part("loss", self.choices.loss).where]

    def make(self) -> None:
        made, policies = self.partial / "adapter", (self.input("policy"), self.input("before"))
        extrapolated = parts.part("loss", self.choices.loss).load()
        facts = extrapolated(self.config.model, policies, self.config.train.extrapolation, made)
        write_json(self.path("training.json"), facts)
        self.keep("adapter", made)

    def result(self) -> dict[str, Any]:
        """The facts in training.json."""
        return self.facts("training.json")
