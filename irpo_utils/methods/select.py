"""What a method trains on: which of a problem's samples, alone or in pairs.

Each selection takes one problem's samples and gives (chosen, rejected) pairs, or (chosen, None) for a loss that imitates.
IRPO's walks winners and losers together, each starting over when it runs out (arXiv 2404.19733 v3, section 2).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import product
from statistics import mean
from typing import Any

Sample = dict[str, Any]  # a record of samples.jsonl
Chosen = list[tuple[Sample, Sample | None]]
# (samples that may be used, the gold solution or None, the `pairs` section, a generator of the problem's own) -> pairs
Selection = Callable[[list[Sample], Sample | None, Any, random.Random], Chosen]


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


def right(samples: list[Sample]) -> list[Sample]:
    return [s for s in samples if s["reward"] == 1]


def pairs_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """K cyclic pairs of right with wrong; gold may join the winners (IRPO)."""
    unique = distinct(samples)
    winners = right(unique)
    if gold is not None and config.gold:
        winners = distinct([gold, *winners])
    return cyclic_pairs(winners, [s for s in unique if s["reward"] != 1], config.k)


def chosen_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """The winners of IRPO's pairs, as often as they are in them (the paper's SFT on chosen)."""
    return [(winner, None) for winner, _ in pairs_of(samples, gold, config, rng)]


def gold_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """The gold solution."""
    return [] if gold is None else [(gold, None)]


def correct_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """Every right sample, as often as it was drawn (STaR, arXiv 2203.14465, which draws one)."""
    return [(s, None) for s in right(samples)]


def distinct_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """Every distinct right sample (RFT, arXiv 2308.01825, which tells solutions apart by their equations)."""
    return [(s, None) for s in distinct(right(samples))]


def capped_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """The first `at_most` right samples, so that easy problems do not take over (ReST-EM, arXiv 2312.06585, section 5: 10)."""
    return [(s, None) for s in right(samples)[: config.max_per_problem]]


def pseudo_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """The gold solution, and up to K right samples that are not too much alike (DPO-ST, arXiv 2407.18248)."""
    labels = dissimilar(distinct(right(samples)))[: config.k]
    return gold_of(samples, gold, config, rng) + [(s, None) for s in labels]


def gold_against_own_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """Gold against up to K distinct samples of the model, right or wrong (SPIN, arXiv 2401.01335, which draws one)."""
    own = [s for s in distinct(samples) if gold is not None and s["token_ids"] != gold["token_ids"]]
    return [(gold, s) for s in own[: config.k]]


def best_against_worst_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """The sample with the highest reward against the one with the lowest; none for a tie (Self-Rewarding, arXiv 2401.10020)."""
    scored = [s for s in distinct(samples) if s["reward"] is not None]
    best, worst = (pick(scored, key=lambda s: s["reward"], default=None) for pick in (max, min))
    return [(best, worst)] if scored and best["reward"] > worst["reward"] else []


def margin_of(samples: list[Sample], gold: Sample | None, config: Any, rng: random.Random) -> Chosen:
    """K random ones of the pairs whose rewards differ by at least eta (SIPF, arXiv 2412.08393); unparsed counts as 0."""
    worth = [(s["reward"] or 0.0, s) for s in distinct(samples)]
    apart = [(w, loser) for (a, w), (b, loser) in product(worth, worth) if a - b >= config.eta]
    return rng.sample(apart, min(config.k, len(apart)))


SELECTIONS: dict[str, Selection] = {
    "pairs": pairs_of,
    "chosen": chosen_of,
    "gold": gold_of,
    "correct": correct_of,
    "distinct": distinct_of,
    "capped": capped_of,
    "pseudo": pseudo_of,
    "gold_against_own": gold_against_own_of,
    "best_against_worst": best_against_worst_of,
    "margin": margin_of,
}


def select(
    selection: str,
    samples: dict[str, list[Sample]],
    prompts: dict[str, tuple[str, list[int]]],
    gold: dict[str, Sample],
    config: Any,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What an iteration trains on, and the audit of how it came about.

    Args:
        selection: one of `SELECTIONS`.
        samples: problem id -> its samples (`response`, `token_ids`, `logp`, `finished`, `reward`, and `answer_reward` where
            the reward is not the answer's); empty for a method that needs none.
        prompts: problem id -> (prompt text, prompt token ids).
        gold: problem id -> gold solution as a sample, for problems that have one.
        config: the `pairs` section. `max_tokens` bounds prompt + response, longer ones are dropped and counted;
            `max_pairs` is a random cap on all pairs, 0 for none.
        seed: of the cap, and of selections that draw.

    Returns:
        records with `prompt`, `chosen`, `rejected` ("" where there is none) and the sampled token ids, and the audit as
        a flat dict.

    Raises:
        ValueError: not one record can be made.
    """
    audit: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for name in samples or gold:
        text, prompt_ids = prompts[name]
        drawn = samples.get(name, [])
        own = [s for s in drawn if not s.get("extra")]
        answers = [s.get("answer_reward", s["reward"]) for s in own]
        count = answers.count(1)
        audit["problems"] += 1
        audit["samples"] += len(own)
        audit["right"] += count
        audit["unparsed"] += answers.count(None)
        audit["scored"] += sum(s["reward"] is not None or "answer_reward" not in s for s in drawn)
        audit["none_right" if count == 0 else "all_right" if count == len(own) else "some_right"] += 1
        audit["unfinished"] += sum(not s["finished"] for s in drawn)
        audit["duplicates"] += len(own) - len(distinct(own))
        fits = lambda s: len(prompt_ids) + len(s["token_ids"]) <= config.max_tokens  # noqa: B023, E731 - used here only
        # An unfinished response never ended in EOS: as a winner it would teach the model not to stop.
        ended = [s for s in drawn if s["finished"]]
        usable = [s for s in ended if fits(s)]
        audit["over_long"] += len(distinct(ended)) - len(distinct(usable))
        best = gold.get(name)
        if best is not None and not fits(best):
            audit["gold_over_long"] += 1
            best = None
        made = SELECTIONS[selection](usable, best, config, random.Random(f"{seed}/{name}"))
        audit["problems_with_pairs"] += bool(made)
        rows += [record(name, text, prompt_ids, w, loser) for w, loser in made]
    if not rows:
        raise ValueError(_nothing(selection, audit, len(gold)))
    audit["capped"] = max(0, len(rows) - config.max_pairs) if config.max_pairs else 0
    if audit["capped"]:
        rows = random.Random(seed).sample(rows, config.max_pairs)
    audit["pairs"] = len(rows)
    lengths = {side: mean(len(r[f"{side}_ids"]) for r in rows) for side in ("chosen", "rejected")}
    facts: dict[str, Any] = {key: audit[key] for key in AUDIT_KEYS if samples or key in GOLD_KEYS}
    facts["chosen_tokens"] = lengths["chosen"]
    if lengths["rejected"]:
        facts |= {"rejected_tokens": lengths["rejected"], "length_gap": lengths["chosen"] - lengths["rejected"]}
    return rows, facts


def _nothing(selection: str, audit: Counter[str], golds: int) -> str:
    if not audit["samples"]:
        return (
            f"no gold solution to train on: the task has {golds}, and {audit['gold_over_long']} exceed pairs.max_tokens"
        )
    if not audit["scored"]:
        return (
            f"no pair can be made: none of {audit['samples']} samples has a reward, so the judge wrote no score that can be read; "
            "take a larger model, or set judge.read=scores"
        )
    return (
        f"no pair can be made of {audit['samples']} samples (selection {selection!r}): {audit['none_right']} problems have no right answer, "
        f"{audit['all_right']} no wrong one; {audit['unfinished']} samples are unfinished (sampling.max_new_tokens), "
        f"{audit['over_long']} and {audit['gold_over_long']} gold solutions are too long (pairs.max_tokens); {'lower pairs.eta, ' if selection == 'margin' else ''}{'or all rewards of a problem are one: ' if selection == 'best_against_worst' else ''}raise sampling.n or sampling.temperature, or take other problems"
    )


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
    "gold_over_long",
    "problems_with_pairs",
    "capped",
    "pairs",
]
GOLD_KEYS = (
    "problems",
    "gold_over_long",
    "problems_with_pairs",
    "capped",
    "pairs",
)  # what there is to say without samples


def record(name: str, prompt: str, prompt_ids: list[int], chosen: Sample, rejected: Sample | None) -> dict[str, Any]:
    """A line of pairs.jsonl. Without a rejected response its text and ids are empty."""
    rejected = rejected or {"response": "", "token_ids": [], "logp": None}
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
