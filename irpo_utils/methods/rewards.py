"""What a reward is given. A reward is a function of a `Job`: (job) -> (samples with their rewards, facts)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..model.records import Prompt, Sample
from ..settings import Settings
from ..tasks.base import Problem, Task
from . import parts


@dataclass(frozen=True)
class Job:
    """What a reward is given: the samples of one round, and all that it takes to look at them again."""

    config: Settings
    policy: Path | None  # the folder of M_t, which drew the samples; None is the base
    task: Task
    problems: list[Problem]  # those that have samples
    prompts: dict[str, Prompt]
    samples: dict[str, list[Sample]]  # problem id -> its samples
    temperature: float
    seed: int  # of this round; add to it what tells your draws from others'
    folder: Path  # to work in; a stage that was killed finds it as it left it
    m0: Path | None = None  # the folder of M_0, for a reward that looks at it; None is the base

    def sampler(self, config: Settings | None = None, task: Task | None = None, problems: list[Problem] | None = None):
        """A sampler of the policy, of another task or with other settings if given. Use it in a `with` block."""
        config = config or self.config
        opened = parts.SAMPLERS[config.sampling.engine].opener(config)
        return opened(config, self.policy, task or self.task, problems or self.problems)
