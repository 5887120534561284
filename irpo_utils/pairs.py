"""Build preference pairs as the paper does: walk winners and losers together, each starting over when it runs out.

arXiv 2404.19733 v3, section 2: K pairs per problem; a problem without a winner or without a loser gives none.
"""

from __future__ import annotations

import random
from collections import Counter
from statistics import mean
from typing import Any

Sample = dict[str, Any]  # a record of samples.jsonl


def cyclic_pairs(winners: list[Any], losers: list[Any], k: int) -> list[tuple[Any, Any]]:
    """At most `k` different (winner, loser) pairs: the i-th of each list, each list starting over at its end.

    After lcm(len(winners), len(losers)) steps the walk repeats itself, so it stops there: a pair twice adds no
    information, only weight.
    """
    pairs: dict[tuple[int, int], tuple[Any, Any]] = {}
    if winners and losers:
        for i in range(k):
            at = (i % len(winners), i % len(losers))
            if at in pairs:
                break
            pairs[at] = (winners[at[0]], losers[at[1]])
    return list(pairs.values())


def distinct(samples: list[Sample]) -> list[Sample]:
    """The first sample of every distinct token sequence, in order."""
    first: dict[tuple[int, ...], Sample] = {}
    for s in samples:
        first.setdefault(tuple(s["token_ids"]), s)
    return list(first.values())


def build_pairs(
    samples: dict[str, list[Sample]],
    prompts: dict[str, tuple[str, list[int]]],
    gold: dict[str, Sample] | None,
    k: int,
    max_tokens: int,
    max_pairs: int = 0,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Pairs of an iteration and the audit of how they came about.

    Args:
        samples: problem id -> its graded samples (`response`, `token_ids`, `logp`, `finished`, `reward`).
        prompts: problem id -> (prompt text, prompt token ids).
        gold: problem id -> gold solution as a sample, to join the winners, or None.
        k: pairs per problem. max_tokens: prompt + response; longer responses are dropped and counted.
        max_pairs: random cap on all pairs, 0 for none, drawn with `seed`.

    Returns:
        pairs with `prompt`, `chosen`, `rejected` and the sampled token ids, and the audit as a flat dict.

    Raises:
        ValueError: not one pair can be made.
    """
    audit: Counter[str] = Counter()
    pairs: list[dict[str, Any]] = []
    for name, drawn in samples.items():
        text, prompt_ids = prompts[name]
        right = sum(s["reward"] == 1 for s in drawn)
        audit["problems"] += 1
        audit["samples"] += len(drawn)
        audit["right"] += right
        audit["unparsed"] += sum(s["reward"] is None for s in drawn)
        audit["none_right" if right == 0 else "all_right" if right == len(drawn) else "some_right"] += 1
        audit["unfinished"] += sum(not s["finished"] for s in drawn)
        unique = distinct(drawn)
        audit["duplicates"] += len(drawn) - len(unique)
        # An unfinished response never ended in EOS: as a winner it would teach the model not to stop.
        usable = [s for s in unique if s["finished"]]
        fitting = [s for s in usable if len(prompt_ids) + len(s["token_ids"]) <= max_tokens]
        audit["over_long"] += len(usable) - len(fitting)
        winners = [s for s in fitting if s["reward"] == 1]
        if gold is not None and name in gold:
            short = len(prompt_ids) + len(gold[name]["token_ids"]) <= max_tokens
            audit["over_long"] += not short
            winners = distinct([gold[name], *winners]) if short else winners
        losers = [s for s in fitting if s["reward"] != 1]
        made = cyclic_pairs(winners, losers, k)
        audit["problems_with_pairs"] += bool(made)
        pairs += [_pair(name, text, prompt_ids, w, loser) for w, loser in made]
    if not pairs:
        raise ValueError(
            f"no pair can be made of {audit['samples']} samples: {audit['none_right']} problems have no right answer, "
            f"{audit['all_right']} no wrong one; {audit['unfinished']} samples are unfinished (sampling.max_new_tokens), "
            f"{audit['over_long']} too long (pairs.max_tokens); raise sampling.n or sampling.temperature, or take other problems"
        )
    audit["capped"] = max(0, len(pairs) - max_pairs) if max_pairs else 0
    if audit["capped"]:
        pairs = random.Random(seed).sample(pairs, max_pairs)
    audit["pairs"] = len(pairs)
    lengths = {side: mean(len(p[f"{side}_ids"]) for p in pairs) for side in ("chosen", "rejected")}
    return pairs, {
        **{key: audit[key] for key in AUDIT_KEYS},
        "chosen_tokens": lengths["chosen"],
        "rejected_tokens": lengths["rejected"],
        "length_gap": lengths["chosen"] - lengths["rejected"],
    }


AUDIT_KEYS = [
    "problems",
    "none_right",
    "some_right",
    "all_right",
    "samples",
    "right",
    "unparsed",
    "unfinished",
    "duplicates",
    "over_long",
    "problems_with_pairs",
    "capped",
    "pairs",
]


def _pair(name: str, prompt: str, prompt_ids: list[int], chosen: Sample, rejected: Sample) -> dict[str, Any]:
    return {
        "problem": name,
        "prompt": prompt,
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen["token_ids"],
        "rejected_ids": rejected["token_ids"],
        "chosen_logp": chosen["logp"],
        "rejected_logp": rejected["logp"],
    }


def gold_only(
    gold: dict[str, Sample], prompts: dict[str, tuple[str, list[int]]], max_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One record per problem with the gold solution as chosen and nothing rejected, for SFT on gold."""
    rows = [
        {
            "problem": name,
            "prompt": prompts[name][0],
            "chosen": s["response"],
            "rejected": "",
            "prompt_ids": prompts[name][1],
            "chosen_ids": s["token_ids"],
            "rejected_ids": [],
            "chosen_logp": None,
            "rejected_logp": None,
        }
        for name, s in gold.items()
        if len(prompts[name][1]) + len(s["token_ids"]) <= max_tokens
    ]
    if not rows:
        raise ValueError("no gold solution to train on: the task has none, or all exceed pairs.max_tokens")
    lengths = mean(len(r["chosen_ids"]) for r in rows)
    return rows, {
        "problems": len(gold),
        "over_long": len(gold) - len(rows),
        "pairs": len(rows),
        "chosen_tokens": lengths,
    }


def jaccard(a: str, b: str) -> float:
    """Words that two texts share, as a share of the words of either; 1 for two texts without any. Words are split at blanks."""
    mine, other = set(a.split()), set(b.split())
    return len(mine & other) / len(mine | other) if mine | other else 1.0


def dissimilar(samples: list[Sample], limit: float = 0.7) -> list[Sample]:
    """The samples, in order, whose `response` has a Jaccard similarity below `limit` with every one kept before it.

    So DPO-ST dedupes the rationales that it trains on (arXiv 2407.18248), with the words of a response as its set; two that
    differ in the order of their words only are one. At limit 1 only these go.
    """
    kept: list[Sample] = []
    for s in samples:
        if all(jaccard(s["response"], k["response"]) < limit for k in kept):
            kept.append(s)
    return kept
