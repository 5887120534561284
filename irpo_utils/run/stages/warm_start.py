"""00: M_0 where it is trained: an adapter on the gold solutions of a few problems, which the loop itself never sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...methods.parts import SAMPLERS, part
from ...methods.recipes import Round
from ...methods.select import select
from ...model.records import Pair
from ...tasks.base import Task
from ..store import open_run
from .train import TrainStage


class WarmStartStage(TrainStage):
    name = "00_warm_start"

    def __init__(self, run: str | Path, method: str = "irpo", seed: int = 0, iteration: int = 0, config: Any = None):
        whole = config or open_run(run)
        super().__init__(run, method, seed, iteration, whole)
        self.choices = Round(reward="none", selection="gold", loss="nll", start="M_0", reference="none")
        # Of the run and not of a method: all methods share M_0.
        changes = whole.warm_start.model_dump(exclude={"problems"}) | {"engine": "own", "retrain_with_dev": False}
        most = 2 * whole.train.batch * whole.warm_start.max_steps
        changes["max_epochs"] = min(most, 1_000_000)  # so that the steps decide
        self.config = whole.but(train=whole.train.but(**changes)).for_seed(self.seed)

    def reads(self) -> dict[str, tuple[Path, str]]:
        return {}

    def parameters(self) -> dict[str, Any]:
        return (
            super().parameters()
            | self.task_parameters(unused="test")
            | self.section("warm_start", only=["problems"])
            | self.section("pairs", only=["max_tokens"])
        )

    def uses(self) -> list[str]:
        return [*super().uses(), SAMPLERS["transformers"].where, part("selection", "gold").where]

    def pairs(self, task: Task) -> list[Pair]:
        problems = task.problems("train")[: self.config.warm_start.problems]
        with SAMPLERS["transformers"].load()(self.config, None, task, problems) as sampler:
            pairs, audit = select("gold", {}, sampler.prompts(problems), self.config.pairs.but(max_pairs=0))
        if audit["gold_over_long"]:
            print(
                f"{audit['gold_over_long']} of {len(problems)} gold solutions exceed pairs.max_tokens and are left out"
            )
        return pairs
