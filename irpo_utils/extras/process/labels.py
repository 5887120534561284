"""Process feedback (SIPF, arXiv 2412.08393): a reward for every step of a solution, from nothing but final answers.

A step's label comes from simulation: from where the step ends, K continuations are drawn, and it is right if more than
delta of them reach the right answer. A reward model (`reward_model.py`) learns the labels. A solution's reward is the
mean of its steps' scores.

Left out of the paper: a prompt that numbers the steps. A step is a line that is not empty, of a solution or of code.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...methods.rewards import Job
from ...methods.select import distinct, gold_sample
from ...model.load import load_tokenizer
from ...model.records import Ids, Prompt, Sample
from . import reward_model
from .reward_model import Solution
from .simulation import simulate, tokens_drawn

SEED = 4  # added to the round's seed: the continuations' random numbers are their own
PATHS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}


def step_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], finished: bool = True) -> list[int]:
    """Numbers of the response tokens that end a step, [steps]. A step's prefix is all tokens up to that one.

    A step is a line that is not empty. A token that ends a line may hold more than "\\n" (".\\n", "\\n\\n", "\\n    ").
    Lines that end in one token are one step. The last line of a finished response ends before its EOS; that of an
    unfinished one is no step, since it was cut.
    """
    ends, blank = [], True
    body = token_ids[:-1] if finished else token_ids
    for i, text in enumerate(tokenizer.batch_decode([[t] for t in body])):
        *ended, rest = text.split("\n")
        if ended and (not blank or any(line.strip() for line in ended)):
            ends.append(i)
        blank = not rest.strip() and (blank or bool(ended))
    if finished and not blank and ends[-1:] != [len(body) - 1]:
        ends.append(len(body) - 1)
    return ends


def path_reward(scores: Sequence[float], how: str) -> float:
    """A solution's reward from its steps' scores, [steps]: one of `PATHS`; 0 for a solution that has no whole step."""
    return float(PATHS[how](scores)) if scores else 0.0


def label(outcomes: str, delta: int, k: int | None = None) -> int:
    """1 if more than `delta` of the first `k` `outcomes` are right ("0110": the second and third of four were)."""
    return int(outcomes[:k].count("1") > delta)


def solution_of(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sample: Sample, gold: bool = False) -> Solution:
    """A sample with its steps, which have no labels yet."""
    return Solution(
        problem=sample.problem,
        prompt_ids=prompt.prompt_ids,
        token_ids=sample.token_ids,
        gold=gold,
        finished=sample.finished,
        answer_reward=sample.answer_reward,
        ends=tuple(step_ends(tokenizer, sample.token_ids, sample.finished)),
        labels=(),
        outcomes=(),
    )


def solutions_of(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[Solution]:
    """The distinct responses of each problem and its gold solution, with their steps."""
    found = []
    for p in job.problems:
        prompt, samples = job.prompts[p.id], distinct(job.samples.get(p.id, []))
        found += [solution_of(tokenizer, prompt, s) for s in samples]
        gold = gold_sample(prompt)
        if gold is not None and gold.token_ids not in {s.token_ids for s in samples}:
            found.append(solution_of(tokenizer, prompt, gold, gold=True))
    return found


def simulated_prefixes(solution: Solution, labels: str) -> list[Ids]:
    """Where continuations of a solution begin: at the end of each step whose label its answer does not give.

    The last step of a finished response has its answer's label, and steps of a gold solution are right. With `labels`
    "outcome" every step has its answer's.
    """
    if solution.gold or labels == "outcome":
        return []
    ends = solution.ends[: len(solution.ends) - solution.finished]
    return [solution.token_ids[: end + 1] for end in ends]


def label_steps(job: Job) -> list[Solution]:
    """The distinct responses of each problem and its gold solution, with a label for every step.

    `process.labels: outcome` is the control: nothing is simulated, and a step has the label of its answer.

    Args:
        job: its `seed` is that of the continuations; its `folder` gets them, so that a killed run goes on.

    Returns:
        a solution with `labels` and `outcomes` for each (`label` gives the labels of a smaller K or another delta).
    """
    config, tokenizer = job.config.process, load_tokenizer(job.config.model)
    solutions = solutions_of(job, tokenizer)
    simulated = [simulated_prefixes(solution, config.labels) for solution in solutions]
    prefixes: dict[str, dict[Ids, None]] = {}  # distinct, in order
    for solution, own in zip(solutions, simulated, strict=True):
        if own:
            prefixes.setdefault(solution.problem, {}).update(dict.fromkeys(own))
    found = simulate(job, tokenizer, {name: list(own) for name, own in prefixes.items()}) if prefixes else {}
    labelled = []
    for solution, own in zip(solutions, simulated, strict=True):
        outcomes = [found[solution.problem, prefix] for prefix in own]
        rest = len(solution.ends) - len(outcomes)
        labels = [label(o, config.delta) for o in outcomes] + [int(solution.answer_reward == 1)] * rest
        labelled.append(replace(solution, labels=tuple(labels), outcomes=(*outcomes, *[""] * rest)))
    return labelled


def score_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, Prompt],
    samples: list[Sample],
    how: str,
    max_rows: int = 64,
) -> list[Sample]:
    """`samples` with `step_scores` and `step_ends` [steps]; `reward` is the path reward, `answer_reward` the answer's.

    An unfinished sample gets the reward of the steps that it has.

    Args:
        prompts: problem id -> its prompt.
        how: how a path's reward comes from its steps' scores, one of `PATHS`.
        max_rows: responses that are read at once.
    """
    different = {(s.problem, s.token_ids): s for s in samples}
    solutions = {key: solution_of(tokenizer, prompts[s.problem], s) for key, s in different.items()}
    scores = dict(zip(solutions, reward_model.score(model, list(solutions.values()), max_rows), strict=True))
    keyed = [(s, (s.problem, s.token_ids)) for s in samples]
    return [
        replace(s, step_scores=tuple(scores[k]), step_ends=solutions[k].ends, reward=path_reward(scores[k], how))
        for s, k in keyed
    ]


def process(job: Job) -> tuple[list[Sample], dict[str, Any]]:
    """Step labels, the reward model that learns them, and the path reward of every sample.

    `job.folder` gets labels.jsonl, reward_model/ and, while it runs, what a killed run goes on from.

    Returns:
        the samples as `score_samples` gives them, and what there is to report.
    """
    job = replace(job, seed=job.seed + SEED)
    config = job.config
    job.folder.mkdir(parents=True, exist_ok=True)
    solutions = label_steps(job)
    Solution.write(job.folder / "labels.jsonl", solutions)
    if not (job.folder / "reward_model").exists():
        fitting = [s for s in solutions if len(s.prompt_ids) + len(s.token_ids) <= config.pairs.max_tokens]
        reward_model.train(config, fitting, job.folder, job.seed)
        gc.collect()  # one base in memory at a time
    model = reward_model.load_reward_model(config, job.folder / "reward_model", threads=config.threads)
    samples = [s for drawn in job.samples.values() for s in drawn]
    tokenizer, max_rows = load_tokenizer(config.model), 2 * config.train.micro_batch
    scored = score_samples(model, tokenizer, job.prompts, samples, config.process.path, max_rows)
    steps = [(s.problem, *s.token_ids[: end + 1]) for s in solutions for end in s.ends]
    simulated = [bool(outcomes) for s in solutions for outcomes in s.outcomes]
    learned = json.loads((job.folder / "reward_model" / "facts.json").read_text())
    facts = {
        "labels": config.process.labels,
        "solutions": len(solutions),
        "steps": len(steps),
        "labelled_right": sum(sum(s.labels) for s in solutions) / max(1, len(steps)),
        "prefixes_simulated": len({step for step, drawn in zip(steps, simulated, strict=True) if drawn}),
        "drawn_tokens": tokens_drawn(job.folder),
        "reward_model": learned,
        "trained_tokens": learned["trained_tokens"],
    }
    return scored, facts
