"""What a sample is worth beyond its answer: rationalization, process feedback, the model as judge.

Each of `REWARDS` takes a stage with its samples (problem id -> records) and gives back the records, `reward` replaced
(the answer's is kept as `answer_reward`) or records added, and facts for reward.json: `drawn_tokens` and
`trained_tokens` say what it cost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ..extras.judge import judge, judge_prompt
from ..extras.process.labels import feedback
from ..methods import sampler
from ..methods.rationalize import rationalized
from ..model.load import load_policy
from ..tasks.base import Problem, Task
from . import stages

Record = dict[str, Any]
Reward = Callable[[Any, Task, Any, list[Problem], dict[str, list[Record]]], tuple[list[Record], Record]]


def process(stage, task: Task, tokenizer, problems: list[Problem], samples: dict[str, list[Record]]):
    """Path rewards of a process reward model, trained on simulated step labels of these samples (SIPF, arXiv 2412.08393)."""
    asked = [p for p in problems if p.id in samples]
    seed = stages.stage_seed(stage, 4)
    labels = stage.config.process.labels
    scored, facts = feedback(
        stage.config, stage.input("policy"), tokenizer, task, asked, samples, stage.partial, seed, labels
    )
    shutil.copyfile(stage.partial / "labels.jsonl", stage.path("labels.jsonl"))
    shutil.rmtree(stage.path("reward_model.tmp"), ignore_errors=True)  # copied, so that a killed stage has it still
    shutil.copytree(stage.partial / "reward_model", stage.path("reward_model.tmp"))
    stage.path("reward_model.tmp").rename(stage.path("reward_model"))
    facts["trained_tokens"] = facts["reward_model"]["trained_tokens"]
    return [row for rows in scored.values() for row in rows], facts


def judged(stage, task: Task, tokenizer, problems: list[Problem], samples: dict[str, list[Record]]):
    """The model's own score of each response (Self-Rewarding, arXiv 2401.10020)."""
    config, rows = stage.config, [row for mine in samples.values() for row in mine]
    by_id, seed = {p.id: p for p in problems}, stages.stage_seed(stage, 5)
    if config.judge.read == "scores":
        model = load_policy(config.model, stage.input("policy"), threads=config.threads)
        return judge(config, None, tokenizer, problems, rows, seed, model)
    texts = {judge_prompt(by_id[r["problem"]].question, r["response"], "text") for r in rows}
    asked, prompts = SimpleNamespace(prompt=lambda p: p.question), [Problem(text, text, "") for text in sorted(texts)]
    longer = config.but(sampling=config.sampling.but(max_new_tokens=config.judge.max_new_tokens))
    with sampler.drawing(longer, stage.input("policy"), tokenizer, asked, prompts) as draw:
        return judge(config, draw, tokenizer, problems, rows, seed)


REWARDS: dict[str, Reward] = {"rationalized": rationalized, "process": process, "judge": judged}
