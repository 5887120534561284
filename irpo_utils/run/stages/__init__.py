"""The stages of a round, a file each: what it reads, which parameters enter its key, what it writes, and what it does.

None imports torch: what needs a model is loaded by name when a stage runs.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ...files import MissingArtefact, relative
from ..config import Config
from ..store import Stage, open_run, stages_of_m0
from .evaluate import EvaluateStage
from .extrapolate import ExtrapolateStage
from .online import OnlineStage
from .pairs import PairsStage
from .reward import RewardStage
from .sample import SampleStage
from .train import TrainStage
from .warm_start import WarmStartStage

STAGES: dict[str, type[Stage]] = {
    kind.name: kind
    for kind in (
        WarmStartStage,
        SampleStage,
        RewardStage,
        PairsStage,
        TrainStage,
        OnlineStage,
        ExtrapolateStage,
        EvaluateStage,
    )
}


def method_seeds(config: Config) -> list[tuple[str, int]]:
    """Every (method, seed) of a run, seed by seed."""
    return [(method, seed) for seed in range(config.seeds) for method in config.methods]


def plan(config: Config, run: Path, method: str, seed: int) -> list[Stage]:
    """The stages of one method and seed, in order."""
    stages = [STAGES[name](run, method, seed, 0, config) for name in stages_of_m0(config)]
    for t in range(1, config.rounds(method) + 1):
        names = config.recipe(method).round(t).stages(config.for_round(method, t).train.sync_every)
        stages += [STAGES[name](run, method, seed, t, config) for name in names]
    return stages


def finished(run: Path) -> tuple[Config, list[str]]:
    """A run's configuration with those methods alone whose every stage is done; and a line for each of the others.

    A model whose own stage is done does not count where one before it is not: it would stand beside another M_{t-1}.

    Raises:
        MissingArtefact: no method is finished; names the first stage to run.
    """
    config = open_run(run)
    left_out = {}
    for method, seed in method_seeds(config):
        for stage in plan(config, run, method, seed):
            if found := stage.why_not_done():
                left_out.setdefault(method, f"{stage.label()}: {found[0]}")
                break
    whole = [method for method in config.methods if method not in left_out]
    if not whole:
        line = next(iter(left_out.values()))
        raise MissingArtefact(
            f"no method of {relative(run)} is finished ({line}); run that notebook, "
            f"or ./run_all.sh {shlex.quote(run.name)}"
        )
    return (config.but(methods=whole) if left_out else config), list(left_out.values())


def evaluations(run: Path, config: Config) -> list[dict[str, Any]]:
    """Every evaluation of a run: method, seed, iteration and its `evaluation.json`. M_0 counts for each method."""
    rows = []
    for method, seed in method_seeds(config):
        for t in range(config.rounds(method) + 1):
            stage = EvaluateStage(run, method, seed, t, config)
            rows.append({"method": method, "seed": seed, "iteration": t, **stage.facts("evaluation.json")})
    return rows
