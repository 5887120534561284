"""The stages of a round, a file each: what it reads, which parameters enter its key, what it writes, and what it does.

None imports torch: what needs a model is loaded by name when a stage runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files import MissingArtefact, relative, resolve
from ..config import Config, read_config
from ..store import Stage
from .evaluate import EvaluateStage, read_evaluation
from .extrapolate import ExtrapolateStage
from .pairs import PairsStage
from .reward import RewardStage
from .sample import SampleStage
from .train import TrainStage

STAGES: dict[str, type[Stage]] = {
    kind.name: kind for kind in (SampleStage, RewardStage, PairsStage, TrainStage, ExtrapolateStage, EvaluateStage)
}


def method_seeds(config: Config) -> list[tuple[str, int]]:
    """Every (method, seed) of a run, seed by seed."""
    return [(method, seed) for seed in range(config.seeds) for method in config.methods]


def plan(config: Config, run: Path, method: str, seed: int) -> list[Stage]:
    """The stages of one method and seed, in order."""
    stages: list[Stage] = [EvaluateStage(run, method, seed, 0, config)]
    for t in range(1, config.rounds(method) + 1):
        stages += [STAGES[name](run, method, seed, t, config) for name in config.recipe(method).round(t).stages]
    return stages


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run: method, seed, iteration and the contents of `evaluation.json`. M_0 counts for each method."""
    config, rows = read_config(resolve(run) / "config.yaml"), []
    for method, seed in method_seeds(config):
        for t in range(config.rounds(method) + 1):
            stage = EvaluateStage(run, method, seed, t, config)
            if not stage.is_done():
                raise MissingArtefact(
                    f"{relative(stage.path('evaluation.json'))} is missing or out of date; run notebooks/04_evaluate.ipynb for it, or ./run_all.sh"
                )
            rows.append({"method": method, "seed": seed, "iteration": t, **read_evaluation(stage)})
    return rows
