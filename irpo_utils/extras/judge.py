"""The model as its own judge, on an additive scale from 0 to 5 (Self-Rewarding Language Models, arXiv 2401.10020, sec. 2.2).

A judge's score takes the place of the right answer, so nothing says whether it means anything: `facts` measures that against
the answers, which the method itself never sees. What is left out of the paper: training the judge on judgements (its
"evaluation fine-tuning"). A small model cannot judge in words; `judge.read: scores` then takes the score from what it thinks of
the six numbers, which costs one forward pass and no sampling.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .. import metrics
from ..methods import sampler
from ..model import logprobs, sampling
from ..model.prompts import encode_prompts, stop_ids
from ..tasks.base import Problem

Record = dict[str, Any]
Prompts = dict[str, list[int]]  # name -> token ids
SCORES = range(6)
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
    "text": "Say briefly which points the reply earns and which it does not. Then end with a line that has their number, 0 to 5, as in\nScore: n\n",
    "scores": "How many points does it earn, 0 to 5?\n",
}


def judge_prompt(question: str, response: str, read: str) -> str:
    """What the judge is asked, for `read` "text" (a judgement that ends with its score) or "scores" (the score alone)."""
    return RUBRIC.format(question=question, response=response) + ASK[read]


def read_score(text: str) -> int | None:
    """The number behind the last "Score:" if it is one of 0 to 5, else None: 10, 4.5, -1 and 4/5 are not."""
    found = re.findall(r"Score:\s*(-?\d+(?:[.,/]\d+)?)", text)
    return int(found[-1]) if found and re.fullmatch("[0-5]", found[-1]) else None


def score_tokens(tokenizer) -> tuple[list[int], list[list[int]]]:
    """How the tokenizer writes "Score: 0" to "Score: 5": the tokens that all begin with, and the rest of each.

    Raises:
        ValueError: two scores are the same to it, or one begins another.
    """
    whole = [tokenizer(f"Score: {n}", add_special_tokens=False).input_ids for n in SCORES]
    same = next((i for i, ids in enumerate(zip(*whole, strict=False)) if len(set(ids)) > 1), min(map(len, whole)))
    rests = [ids[same:] for ids in whole]
    if not all(rests) or len({tuple(r) for r in rests}) < len(rests):
        raise ValueError(f"judge.read: the tokenizer cannot tell the scores apart ({whole}); set judge.read=text")
    return whole[0][:same], rests


def _written(config, draw: Callable, tokenizer, prompts: Prompts, seed: int) -> tuple[dict[str, list[int | None]], int]:
    """The scores in `judge.samples` judgements of each prompt, drawn from the policy; and how many tokens those have."""
    drawn = draw(
        prompts, n=config.judge.samples, temperature=config.judge.temperature, seed=seed,
        eos_id=stop_ids(config.model, tokenizer), max_new_tokens=config.judge.max_new_tokens,
        rows=config.sampling.max_rows, progress=sampler.Progress("judging"),
    )  # fmt: skip
    found, tokens = {}, 0
    for name, completions in ((name, judged) for batch in drawn for name, judged in batch.items()):
        texts = [tokenizer.decode(c.token_ids[:-1] if c.finished else c.token_ids) for c in completions]
        found[name] = [read_score(text) for text in texts]
        tokens += sum(len(c.token_ids) for c in completions)
    return found, tokens


def _likely(config, model, tokenizer, prompts: Prompts, seed: int) -> tuple[dict[str, list[int]], int]:
    """`judge.samples` draws from softmax(log p(score | prompt) / judge.temperature) over the six scores, each prompt's own.

    Nothing is drawn token by token: the second value is how many tokens of prompts the model read instead.
    """
    import numpy as np

    head, rests = score_tokens(tokenizer)
    rows = [
        {"problem": name, "prompt_ids": [*ids, *head], "chosen_ids": rests[n], "rejected_ids": rests[n + 1]}
        for name, ids in prompts.items()
        for n in SCORES[::2]
    ]
    logps = np.array(logprobs.reference_logps(model, rows, 2 * config.train.micro_batch)).reshape(-1, len(SCORES))
    likely = np.exp((logps - logps.max(-1, keepdims=True)) / config.judge.temperature).cumsum(-1)
    found = {}
    for name, points in zip(prompts, likely, strict=True):
        uniform = sampling.uniforms(seed, name, config.judge.samples, 1)[:, 0] * points[-1]
        found[name] = np.minimum(np.searchsorted(points, uniform, side="right"), SCORES[-1]).tolist()
    return found, sum(map(len, prompts.values()))


def judge(
    config, draw: Callable | None, tokenizer, problems: list[Problem], samples: list[Record], seed: int, model: Any = None
) -> tuple[list[Record], Record]:  # fmt: skip
    """The samples with the judge's mean score as their `reward`, and what the judge is worth.

    Args:
        draw: `stages.Draw` of the policy that judges, for `judge.read: text`. model: the policy itself, for "scores".
        samples: records of samples.jsonl of `problems`. A problem's equal responses are judged once.

    Returns:
        the samples, in order, with `reward` (0 to 5; None if no judgement can be read) and the answer's as `answer_reward`;
        and facts: `evaluation.ranking` of scores against right answers, shares of what was read, `verdict`.

    Raises:
        ValueError: what `judge.read` needs is not given.
    """
    read, by_id = config.judge.read, {p.id: p for p in problems}
    if (draw if read == "text" else model) is None:
        raise ValueError(f"judge.read: {read} needs {'a function that draws' if read == 'text' else 'the model'}")
    names: dict[str, dict[str, str]] = {}  # problem -> response -> the name of its prompt, and of its random stream
    for s in samples:
        mine = names.setdefault(s["problem"], {})
        mine.setdefault(s["response"], f"{s['problem']}/judge/{len(mine)}")
    asked = [
        Problem(name, judge_prompt(by_id[p].question, response, read), "")
        for p, mine in names.items()
        for response, name in mine.items()
    ]
    prompts = encode_prompts(SimpleNamespace(prompt=lambda p: p.question), tokenizer, asked)
    by, how = (draw, _written) if read == "text" else (model, _likely)
    found, cost = how(config, by, tokenizer, prompts, seed)

    scores = {name: [s for s in found[name] if s is not None] for name in prompts}
    mean = {name: sum(mine) / len(mine) if mine else None for name, mine in scores.items()}
    judged = [s | {"answer_reward": s["reward"], "reward": mean[names[s["problem"]][s["response"]]]} for s in samples]
    tokens, count = [i for ids in prompts.values() for i in ids], sum(map(len, found.values()))
    facts = {
        "judged_samples": len(samples),
        "responses": len(prompts),
        "judgements": count,
        "readable": sum(map(len, scores.values())) / max(1, count),
        "unscored": sum(s["reward"] is None for s in judged),
        "drawn_tokens": cost,
        "trained_tokens": 0,
        "prompt_tokens": len(tokens),
        "unknown_tokens": 0 if tokenizer.unk_token_id is None else tokens.count(tokenizer.unk_token_id),
    }
    return judged, facts | agreement(judged)


def agreement(judged: list[Record]) -> Record:
    """How the scores (`reward`) of judged samples agree with their answers (`answer_reward`); the unscored are left out.

    Returns:
        `evaluation.ranking`; `too_small`, whether the scores are not shown to tell right from wrong; and `verdict`, a sentence.
        Both the AUC and the share within problems must be above a half: pairs are made within a problem, while an AUC over
        all of them may come from knowing hard questions.
    """
    groups: dict[str, tuple[list[float], list[bool]]] = {}
    for s in judged:
        if s["reward"] is not None:
            scores, right = groups.setdefault(s["problem"], ([], []))
            scores.append(s["reward"])
            right.append(s["answer_reward"] == 1)
    found = metrics.ranking(list(groups.values()))
    lows, highs = ([found[f"{name}_{end}"] for name in ("auc", "ranked")] for end in ("low", "high"))
    if None in lows:
        verdict = "no right and wrong responses with a score to compare" if groups else "no judgement could be read"
        return found | {"too_small": True, "verdict": verdict}
    good, bad = min(lows) > 0.5, max(highs) < 0.5
    verdict = f"the judge {'tells' if good else 'prefers wrong to right' if bad else 'cannot tell'}{'' if bad else ' right from wrong'}"
    parts = [
        f"{found[name]:.3f} ({low:.3f} to {high:.3f})"
        for name, low, high in zip(("auc", "ranked"), lows, highs, strict=True)
    ]
    return found | {"too_small": not good, "verdict": f"{verdict}: AUC {parts[0]}, within problems {parts[1]}"}
