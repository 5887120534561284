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

from . import stages
from .tasks import Problem, Task

Record = dict[str, Any]
Reward = Callable[[Any, Task, Any, list[Problem], dict[str, list[Record]]], tuple[list[Record], Record]]


def rationalized(stage, task: Task, tokenizer, problems: list[Problem], samples: dict[str, list[Record]]):
    """Samples with the gold answer as a hint, for problems that have no right one (STaR, arXiv 2203.14465, section 3.2).

    The hint is a line behind the question, and only in the prompt that is sampled: what is right joins the problem's samples
    as if it had been drawn without it (`extra`: it was drawn on top of the N). An answer of several lines, as a program, is no
    hint but the solution; such a problem stays failed.
    """
    failed = [p for p in problems if p.id in samples and not any(s["reward"] == 1 for s in samples[p.id])]
    short = [p for p in failed if p.answer and "\n" not in p.answer]
    hinted = [replace(p, question=f"{p.question}\nFinal answer: {p.answer}") for p in short]
    drawn: list[Record] = []
    if hinted:
        with stages.drawing(stage.config, stage.input("policy"), tokenizer, task, hinted) as draw:
            batches = stages.graded_samples(
                stage.config,
                draw,
                tokenizer,
                task,
                hinted,
                n=stage.config.sampling.n,
                temperature=stage.config.temperature(stage.iteration),
                seed=stages.stage_seed(stage, 3),
                label="rationalizing",
            )
            drawn = [row for batch in batches for row in batch]
    right = [row | {"logp": None, "extra": True} for row in drawn if row["reward"] == 1]
    facts = {
        "failed_problems": len(failed),
        "without_a_hint": len(failed) - len(short),
        "rationalized_problems": len({row["problem"] for row in right}),
        "samples": len(drawn),
        "right": len(right),
        "drawn_tokens": sum(len(row["token_ids"]) for row in drawn),
        "trained_tokens": 0,
    }
    return [row for rows in samples.values() for row in rows] + right, facts


def process(stage, task: Task, tokenizer, problems: list[Problem], samples: dict[str, list[Record]]):
    """Path rewards of a process reward model, trained on simulated step labels of these samples (SIPF, arXiv 2412.08393)."""
    from .process import feedback

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
    from .judge import judge, judge_prompt

    config, rows = stage.config, [row for mine in samples.values() for row in mine]
    by_id, seed = {p.id: p for p in problems}, stages.stage_seed(stage, 5)
    if config.judge.read == "scores":
        from .models import load_policy

        model = load_policy(config.model, stage.input("policy"), threads=config.threads)
        return judge(config, None, tokenizer, problems, rows, seed, model)
    texts = {judge_prompt(by_id[r["problem"]].question, r["response"], "text") for r in rows}
    asked, prompts = SimpleNamespace(prompt=lambda p: p.question), [Problem(text, text, "") for text in sorted(texts)]
    longer = replace(config, sampling=replace(config.sampling, max_new_tokens=config.judge.max_new_tokens))
    with stages.drawing(longer, stage.input("policy"), tokenizer, asked, prompts) as draw:
        return judge(config, draw, tokenizer, problems, rows, seed)


REWARDS: dict[str, Reward] = {"rationalized": rationalized, "process": process, "judge": judged}
