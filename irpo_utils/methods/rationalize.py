"""Solutions of failed problems, drawn with the answer as a hint (STaR, arXiv 2203.14465)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..model.records import Sample
from .rewards import Job


def rationalized(job: Job) -> tuple[list[Sample], dict[str, Any]]:
    """Samples with the gold answer as a hint, for problems that have no right one (STaR, section 3.2).

    The hint is a line behind the question, and only in the prompt that is sampled: what is right joins the problem's
    samples as if it had been drawn without it (`extra`: it was drawn on top of the N). An answer of several lines, as a
    program, is no hint but the solution; such a problem stays failed.
    """
    failed = [p for p in job.problems if not any(s.reward == 1 for s in job.samples[p.id])]
    short = [p for p in failed if p.answer and "\n" not in p.answer]
    hinted = [replace(p, question=f"{p.question}\nFinal answer: {p.answer}") for p in short]
    drawn: list[Sample] = []
    if hinted:
        n = job.config.sampling.n
        with job.sampler(problems=hinted) as sampler:
            options = {"n": n, "temperature": job.temperature, "seed": job.seed + 3}
            (drawn,) = sampler.in_chunks({"rationalizing": hinted}, job.folder / "rationalized", **options).values()
    right = [replace(s, logp=None, extra=True) for s in drawn if s.reward == 1]
    facts = {
        "failed_problems": len(failed),
        "without_a_hint": len(failed) - len(short),
        "rationalized_problems": len({s.problem for s in right}),
        "samples": len(drawn),
        "right": len(right),
        "drawn_tokens": sum(len(s.token_ids) for s in drawn),
        "trained_tokens": 0,
    }
    return [s for samples in job.samples.values() for s in samples] + right, facts
