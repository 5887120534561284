"""Solutions of failed problems, drawn with the answer as a hint (STaR)."""

from __future__ import annotations

from dataclasses import replace

from ..run import stages
from ..run.rewards import Record
from ..tasks.base import Problem, Task
from . import sampler


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
        with sampler.drawing(stage.config, stage.input("policy"), tokenizer, task, hinted) as draw:
            batches = sampler.graded_samples(
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
