"""The model as its own judge, on an additive scale from 0 to 5 (Self-Rewarding, arXiv 2401.10020, section 2.2).

A judge's score takes the place of the right answer, so nothing says whether it means anything. The facts measure that
against the answers, which the method itself never sees. A small model cannot judge in words: `judge.read: scores` then
takes the score from the model's probabilities of the six numbers, which costs one forward pass and no sampling.

Left out of the paper: training the judge on judgements (its "evaluation fine-tuning").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import metrics
from ..methods.rewards import Job
from ..methods.sampler import Sampler
from ..model.load import load_policy
from ..model.logprobs import distinct_logps
from ..model.prompts import encode_prompts
from ..model.records import Sample
from ..model.sampling import uniforms
from ..settings import Settings
from ..tasks.base import Problem, Task

Questions = dict[tuple[str, str], Problem]  # (problem id, response) -> the question about it
Prompts = dict[str, list[int]]  # name of a question -> token ids
Scores = dict[str, list[int | None]]  # name of a question -> the score of each judgement, None where none can be read
SEED = 5  # added to the round's seed: the judge's random numbers are its own
SCORES = range(6)
LEAST = 10  # problems with right and wrong responses, of which an interval can be made
RUBRIC = """Grade a reply to a question. Start from 0 and add one point for each of these that is true:
- The reply is about the question.
- It shows how it comes to its result.
- Each step follows from the question or from an earlier step.
- Each calculation and each claim is right.
- It ends with one clear result, and that is the right one.

Question:
{question}

Reply:
{response}

"""
ASK = {
    "text": "Say briefly which points the reply earns and which it does not. "
    "Then end with a line that has their number, 0 to 5, as in\nScore: n\n",
    "scores": "How many points does it earn, 0 to 5?\n",
}


def judge_prompt(question: str, response: str, read: str) -> str:
    """The judge's prompt, for `read` "text" (a judgement that ends with its score) or "scores" (the score alone)."""
    return RUBRIC.format(question=question, response=response) + ASK[read]


def read_score(text: str) -> int | None:
    """The number behind the last "Score:" if it is one of 0 to 5, else None: 10, 4.5, -1 and 4/5 are not."""
    found = re.findall(r"Score:\s*(-?\d+(?:[.,/]\d+)?)", text)
    return int(found[-1]) if found and re.fullmatch("[0-5]", found[-1]) else None


def score_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    """How the tokenizer writes "Score: 0" to "Score: 5": the tokens that all begin with, and the rest of each.

    Raises:
        ValueError: two scores are the same to it, or one begins another.
    """
    whole = [tokenizer(f"Score: {n}", add_special_tokens=False).input_ids for n in SCORES]
    shared = next((i for i, ids in enumerate(zip(*whole, strict=False)) if len(set(ids)) > 1), min(map(len, whole)))
    rests = [ids[shared:] for ids in whole]
    if not all(rests) or len({tuple(rest) for rest in rests}) < len(rests):
        raise ValueError(f"judge.read: the tokenizer cannot tell the scores apart ({whole}); set judge.read=text")
    return whole[0][:shared], rests


class Judging(Task):
    """The judge's task: a problem's question is the whole prompt. Its answers are scores, none of which is right."""

    def problems(self, split: str) -> list[Problem]:
        return []

    def prompt(self, problem: Problem) -> str:
        return problem.question

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        score = read_score(response)
        return None if score is None else str(score)

    def equal(self, answer: str, problem: Problem) -> bool:
        return False


def judged(job: Job) -> tuple[list[Sample], dict[str, Any]]:
    """The samples with the judge's mean score as their `reward`, and what the judge is worth.

    The policy that drew the samples judges them. Equal responses to a problem are judged once.

    Returns:
        the samples, in order, with a `reward` from 0 to 5 (None if no judgement can be read);
        and facts: `metrics.ranking` of scores against right answers, shares of what was read, `verdict`.
    """
    config, samples = job.config, [s for drawn in job.samples.values() for s in drawn]
    questions = judge_questions(job.problems, samples, config.judge.read)
    longer = config.but(sampling=config.sampling.but(max_new_tokens=config.judge.max_new_tokens))
    asked = list(questions.values())
    with job.sampler(longer, Judging(config.task), asked) as sampler:
        tokenizer = sampler.tokenizer
        prompts = encode_prompts(sampler.task, tokenizer, asked)
        if config.judge.read == "text":
            scores, cost = written_scores(config, sampler, asked, job.seed + SEED, job.folder / "judgements")
        else:
            model = load_policy(config.model, job.policy, threads=config.threads)
            scores, cost = likely_scores(config, model, tokenizer, prompts, job.seed + SEED)
    rewards = {name: mean(scores[name]) for name in prompts}
    scored = [replace(s, reward=rewards[questions[s.problem, s.response].id]) for s in samples]
    tokens, count = [i for ids in prompts.values() for i in ids], sum(map(len, scores.values()))
    readable = sum(score is not None for found in scores.values() for score in found)
    facts = {
        "judged_samples": len(samples),
        "responses": len(prompts),
        "judgements": count,
        "readable": readable / max(1, count),
        "unscored": sum(s.reward is None for s in scored),
        "drawn_tokens": cost,
        "trained_tokens": 0,
        "prompt_tokens": len(tokens),
        "unknown_tokens": 0 if tokenizer.unk_token_id is None else tokens.count(tokenizer.unk_token_id),
    }
    return scored, facts | agreement(scored)


def judge_questions(problems: list[Problem], samples: list[Sample], read: str) -> Questions:
    """A question to the judge for every distinct response to a problem, problem by problem.

    A question's id names its random stream. It counts within the problem, whatever else is judged.
    """
    by_id = {p.id: p for p in problems}
    responses: dict[str, dict[str, None]] = {}
    for s in samples:
        responses.setdefault(s.problem, {})[s.response] = None
    return {
        (name, response): Problem(f"{name}/judge/{i}", judge_prompt(by_id[name].question, response, read), "")
        for name, distinct in responses.items()
        for i, response in enumerate(distinct)
    }


def written_scores(
    config: Settings, sampler: Sampler, questions: list[Problem], seed: int, folder: Path
) -> tuple[Scores, int]:
    """Scores of `judge.samples` judgements on each question, drawn from the policy, and how many tokens those have.

    `folder` keeps the judgements, so that a stage that is killed goes on.
    """
    options = {"n": config.judge.samples, "temperature": config.judge.temperature, "seed": seed}
    scores, tokens = {}, 0
    for judgement in sampler.in_chunks({"judging": questions}, folder, **options)["judging"]:
        score = None if judgement.answer is None else int(judgement.answer)
        scores.setdefault(judgement.problem, []).append(score)
        tokens += len(judgement.token_ids)
    return scores, tokens


def likely_scores(
    config: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, seed: int
) -> tuple[Scores, int]:
    """`judge.samples` draws for each prompt from softmax(log p(score | prompt) / judge.temperature) over the scores.

    Nothing is drawn token by token: the second value is how many tokens of prompts the model read instead.
    """
    head, rests = score_tokens(tokenizer)
    responses = {(name, tuple(rest), ()): (*ids, *head) for name, ids in prompts.items() for rest in rests}
    found = distinct_logps(model, responses, 2 * config.train.micro_batch)
    logps = np.array([[found[name, tuple(rest), ()] for rest in rests] for name in prompts]).reshape(-1, len(SCORES))
    cumulative = np.exp((logps - logps.max(-1, keepdims=True)) / config.judge.temperature).cumsum(-1)
    scores = {}
    for name, steps in zip(prompts, cumulative, strict=True):
        uniform = uniforms(seed, name, config.judge.samples, 1)[:, 0] * steps[-1]
        scores[name] = np.minimum(np.searchsorted(steps, uniform, side="right"), SCORES[-1]).tolist()
    return scores, sum(map(len, prompts.values()))


def mean(scores: Sequence[int | None]) -> float | None:
    """The mean of the scores that could be read, None if none could."""
    readable = [score for score in scores if score is not None]
    return sum(readable) / len(readable) if readable else None


def agreement(samples: list[Sample]) -> dict[str, Any]:
    """How the scores (`reward`) of samples agree with their answers (`answer_reward`); the unscored are left out.

    Returns:
        `metrics.ranking`; `too_small`, whether the scores are not shown to tell right from wrong; and `verdict`, a
        sentence. Both the AUC and the share within problems must be above a half: pairs are made within a problem, and
        an AUC over all of them may come from knowing hard questions.
    """
    groups: dict[str, tuple[list[float], list[bool]]] = {}
    for s in samples:
        if s.reward is not None:
            scores, right = groups.setdefault(s.problem, ([], []))
            scores.append(s.reward)
            right.append(s.answer_reward == 1)
    found = metrics.ranking(list(groups.values()))
    lows, highs = ([found[f"{name}_{end}"] for name in ("auc", "ranked")] for end in ("low", "high"))
    mixed = sum(len(set(right)) == 2 for _, right in groups.values())
    if None in lows or mixed < LEAST:
        verdict = f"too few problems ({mixed}) have right and wrong responses with a score"
        return found | {"too_small": True, "verdict": verdict if groups else "no judgement could be read"}
    tells = min(lows) > 0.5
    if tells:
        verdict = "the judge tells right from wrong"
    elif max(highs) < 0.5:
        verdict = "the judge prefers wrong to right"
    else:
        verdict = "the judge cannot tell right from wrong"
    auc, within = (
        f"{found[name]:.3f} ({low:.3f} to {high:.3f})"
        for name, low, high in zip(("auc", "ranked"), lows, highs, strict=True)
    )
    return found | {"too_small": not tells, "verdict": f"{verdict}: AUC {auc}, within problems {within}"}
