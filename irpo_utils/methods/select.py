"""What a method trains on: which of a problem's samples, alone or in pairs.

Each selection takes one problem's samples that may be used, its gold solution or None, the `pairs` section and a random
generator of the problem's own. It gives (chosen, rejected) pairs, or (chosen, None) for a loss that imitates. A new one
is a function here and a row in `parts.py`, or a function of your own (see there).
IRPO's walks winners and losers together, each starting over when it runs out (arXiv 2404.19733 v3, section 2).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import product
from statistics import mean, stdev
from typing import Any

from ..model.records import Pair, Prompt, Sample
from ..settings import PairsConfig
from . import parts

Chosen = list[tuple[Sample, Sample | None]]


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
        first.setdefault(s.token_ids, s)
    return list(first.values())


def right(samples: list[Sample]) -> list[Sample]:
    return [s for s in samples if s.reward == 1]


def pairs_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """K cyclic pairs of right with wrong; gold may join the winners (IRPO)."""
    unique = distinct(samples)
    winners = right(unique)
    if gold is not None and config.gold:
        winners = distinct([gold, *winners])
    return cyclic_pairs(winners, [s for s in unique if s.reward != 1], config.k)


def pairs_with_gold_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """`pairs_of` with gold among the winners, whatever `gold` of the section `pairs` says."""
    return pairs_of(samples, gold, config.but(gold=True), rng)


def chosen_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """The winners of IRPO's pairs, as often as they are in them (the paper's SFT on chosen)."""
    return [(winner, None) for winner, _ in pairs_of(samples, gold, config, rng)]


def gold_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """The gold solution."""
    return [] if gold is None else [(gold, None)]


def correct_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """Every right sample, as often as it was drawn (STaR, arXiv 2203.14465, which draws one)."""
    return [(s, None) for s in right(samples)]


def distinct_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """Every distinct right sample (RFT, arXiv 2308.01825, which tells solutions apart by their equations)."""
    return [(s, None) for s in distinct(right(samples))]


def capped_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """The first `max_per_problem` right samples, so that easy problems do not take over.

    ReST-EM (arXiv 2312.06585, section 5) takes 10.
    """
    return [(s, None) for s in right(samples)[: config.max_per_problem]]


def pseudo_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """The gold solution, and up to K right samples that are not too much alike (DPO-ST, arXiv 2407.18248)."""
    labels = dissimilar(distinct(right(samples)))[: config.k]
    return gold_of(samples, gold, config, rng) + [(s, None) for s in labels]


def gold_against_own_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """Gold against up to K distinct samples of the model, right or wrong (SPIN, arXiv 2401.01335, which draws one)."""
    own = [s for s in distinct(samples) if gold is not None and s.token_ids != gold.token_ids]
    return [(gold, s) for s in own[: config.k]]


def best_against_worst_of(
    samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random
) -> Chosen:
    """The sample of highest reward against that of lowest; none for a tie (Self-Rewarding, arXiv 2401.10020)."""
    scored = [s for s in distinct(samples) if s.reward is not None]
    best, worst = (pick(scored, key=lambda s: s.reward, default=None) for pick in (max, min))
    return [(best, worst)] if scored and best.reward > worst.reward else []


def diverse_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """The rarest right sample against the commonest wrong one, the first of those that tie (DivPO, arXiv 2501.18101).

    Counted is how often a sample's tokens were drawn: right samples have one answer, which cannot tell them apart.
    """
    drawn = Counter(s.token_ids for s in samples)
    rarest = min(right(samples), key=lambda s: drawn[s.token_ids], default=None)
    commonest = max((s for s in samples if s.reward != 1), key=lambda s: drawn[s.token_ids], default=None)
    return [(rarest, commonest)] if rarest and commonest else []


def margin_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """K random pairs of those whose rewards differ by at least eta (SIPF, arXiv 2412.08393); unparsed counts as 0."""
    worth = [(s.reward or 0.0, s) for s in distinct(samples)]
    apart = [(w, loser) for (a, w), (b, loser) in product(worth, worth) if a - b >= config.eta - 1e-9]
    return rng.sample(apart, min(config.k, len(apart)))


def voted_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """A sample with the most votes and at least `least_votes` against one with the fewest (ScPO, arXiv 2411.04109)."""
    best = best_against_worst_of(samples, gold, config, rng)
    return [pair for pair in best if pair[0].reward >= config.least_votes]


def group_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """Every sample with its advantage as reward: how far it is above the mean of the others (RLOO, arXiv 2402.14740).

    Dr. GRPO's (arXiv 2503.20783) is (N - 1) / N of it. Unparsed counts as 0. Samples that never ended are not there, so
    the mean is over the others. A problem whose samples are all worth the same gives none.
    """
    worth = [s.reward or 0.0 for s in samples]
    if len(set(worth)) < 2:
        return []
    return [(replace(s, reward=gap), None) for s, gap in zip(samples, above_others(worth), strict=True)]


def above_others(worth: list[float]) -> list[float]:
    """By how much each of two or more is above the mean of the others."""
    total, others = sum(worth), len(worth) - 1
    return [own - (total - own) / others for own in worth]


def group_scaled_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """As `group_of`, with GRPO's advantage (arXiv 2402.03300): standard deviations above the mean of all."""
    worth = [s.reward or 0.0 for s in samples]
    if len(set(worth)) < 2:
        return []
    middle, spread = mean(worth), stdev(worth)
    if spread < 1e-9 * max(map(abs, worth)):  # rounding
        return []
    return [(replace(s, reward=(own - middle) / spread), None) for s, own in zip(samples, worth, strict=True)]


def first_wrong_step_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """A right next step against the first wrong one of a wrong solution, at most K pairs (Step-DPO, arXiv 2406.18629).

    A step whose score is below a half is wrong. The right one is from a right solution that begins with the same
    tokens. Both responses end with the step: what they share cancels in DPO's log-ratios, as if part of the prompt.
    """

    def cut(s: Sample, steps: int) -> Sample:
        text = "\n".join([line for line in s.response.split("\n") if line.strip()][:steps])
        ids = s.token_ids[: s.step_ends[steps - 1] + 1] if steps else ()
        return replace(s, response=text, token_ids=ids, logp=None, reward=s.step_scores[steps - 1])

    pairs: dict[Any, tuple[Sample, Sample]] = {}
    for loser in (s for s in samples if s.answer_reward != 1):
        good = next((i for i, score in enumerate(loser.step_scores) if score < 0.5), None)
        for s in samples if good is not None else ():
            next_right = s.answer_reward == 1 and len(s.step_scores) > good and s.step_scores[good] >= 0.5
            if next_right and cut(s, good).token_ids == cut(loser, good).token_ids:
                pair = cut(s, good + 1), cut(loser, good + 1)
                pairs.setdefault(tuple(end.token_ids for end in pair), pair)
    return list(pairs.values())[: config.k]


def thoughts_of(samples: list[Sample], gold: Sample | None, config: PairsConfig, rng: random.Random) -> Chosen:
    """Every thought with the gold answer behind it, against the thought alone (LaTRO, arXiv 2411.04282).

    The pair's reward gap is the advantage: the thought's reward minus the mean of the others'. One alone has none.
    """
    whole = [s for s in samples if s.thought is not None]
    advantages, pairs = above_others([s.reward for s in whole]) if len(whole) > 1 else [], []
    for s, advantage in zip(whole, advantages, strict=False):
        text = s.response.rpartition("Final answer:")[0]
        pairs.append(
            (replace(s, reward=advantage), replace(s, response=text, token_ids=s.token_ids[: s.thought], reward=0.0))
        )
    return pairs


def select(
    selection: str,
    samples: dict[str, list[Sample]],
    prompts: dict[str, Prompt],
    config: PairsConfig,
    seed: int = 0,
) -> tuple[list[Pair], dict[str, Any]]:
    """What an iteration trains on, and the audit of how it came about.

    Args:
        selection: a row of `parts.SELECTIONS`, or a function of your own, "file.py:function".
        samples: problem id -> its samples; empty for a method that needs none.
        prompts: problem id -> its prompt, with the gold solution where there is one.
        config: `max_tokens` bounds prompt + response, longer ones are dropped and counted; `max_pairs` is a random cap
            on all pairs, 0 for none.
        seed: of the cap, and of selections that draw.

    Raises:
        ValueError: not one pair can be made.
    """
    pairs, audit = made(selection, samples, prompts, config, seed)
    if not pairs:
        golds = sum(bool(p.gold) for p in prompts.values())
        raise ValueError(_nothing(parts.part("selection", selection), selection, audit, golds))
    pairs = capped(pairs, config.max_pairs, seed, audit)
    return pairs, audited(pairs, audit, drawn=bool(samples))


def capped(pairs: list[Pair], most: int, seed: int | str, audit: Counter[str]) -> list[Pair]:
    """At most `most` of the pairs (0: all), drawn with the seed; `audit` counts the others."""
    audit["capped"] = max(0, len(pairs) - most) if most else 0
    return random.Random(seed).sample(pairs, most) if audit["capped"] else pairs


def made(
    selection: str,
    samples: dict[str, list[Sample]],
    prompts: dict[str, Prompt],
    config: PairsConfig,
    seed: int | str,
) -> tuple[list[Pair], Counter[str]]:
    """All pairs that a selection makes, maybe none, and what was counted on the way; its arguments are `select`'s."""
    row = parts.part("selection", selection)
    choose = row.load()
    audit: Counter[str] = Counter()
    pairs: list[Pair] = []
    for name in samples or [p.problem for p in prompts.values() if p.gold]:
        prompt, drawn = prompts[name], samples.get(name, [])
        usable, gold = _usable(drawn, prompt, config.max_tokens, audit)
        try:
            chosen = [
                (winner, loser) for winner, loser in choose(usable, gold, config, random.Random(f"{seed}/{name}"))
            ]
        except Exception as error:  # a selection of the user's may do anything
            raise ValueError(
                f"{selection} fails on problem {name}: {type(error).__name__}: {error}; "
                "it gives a list of (chosen, rejected)"
            ) from error
        if row.pairs and any(loser is None for _, loser in chosen):
            raise ValueError(f"{selection} gave a response without a rejected one; set its attribute pairs = False")
        audit["problems_with_pairs"] += bool(chosen)
        pairs += [pair_of(prompt, winner, loser) for winner, loser in chosen]
    return pairs, audit


def audited(pairs: list[Pair], audit: Counter[str], drawn: bool) -> dict[str, Any]:
    """The audit of what is trained on: what was counted, and mean lengths. `drawn`: whether there were samples."""
    audit["pairs"] = len(pairs)
    return {key: audit[key] for key in AUDIT_KEYS if drawn or key in GOLD_KEYS} | mean_tokens(pairs)


def mean_tokens(pairs: list[Pair]) -> dict[str, float]:
    """The mean lengths of chosen and rejected responses, and by how much the chosen are longer."""
    chosen, rejected = mean(len(p.chosen_ids) for p in pairs), mean(len(p.rejected_ids) for p in pairs)
    return {"chosen_tokens": chosen} | (
        {"rejected_tokens": rejected, "length_gap": chosen - rejected} if rejected else {}
    )


def _usable(
    drawn: list[Sample], prompt: Prompt, max_tokens: int, audit: Counter[str]
) -> tuple[list[Sample], Sample | None]:
    """A problem's samples that may be trained on, and its gold solution if it fits; `audit` counts the rest."""

    def fits(sample: Sample) -> bool:
        return len(prompt.prompt_ids) + len(sample.token_ids) <= max_tokens

    own = [s for s in drawn if not s.extra]
    answers = [s.answer_reward for s in own]
    count = answers.count(1)
    # An unfinished response never ended in EOS: as a winner it would teach the model not to stop.
    ended = [s for s in drawn if s.finished]
    usable = [s for s in ended if fits(s)]
    gold = gold_sample(prompt)
    audit.update(
        {
            "problems": 1,
            "samples": len(own),
            "right": count,
            "unparsed": answers.count(None),
            # A judge gives no reward where it wrote none that can be read.
            "rewarded": sum(s.reward is not None or s.answer_reward is None for s in drawn),
            "none_right" if count == 0 else "all_right" if count == len(own) else "some_right": 1,
            "unfinished": len(drawn) - len(ended),
            "duplicates": len(own) - len(distinct(own)),
            "over_long": len(distinct(ended)) - len(distinct(usable)),
            "gold_over_long": int(gold is not None and not fits(gold)),
        }
    )
    return usable, gold if gold is not None and fits(gold) else None


def gold_sample(prompt: Prompt) -> Sample | None:
    """The gold solution in the form of a sample; None where there is none."""
    if not prompt.gold:
        return None
    return Sample(prompt.problem, -1, prompt.gold, None, 1.0, 1.0, True, None, prompt.gold_ids)


def pair_of(prompt: Prompt, chosen: Sample, rejected: Sample | None) -> Pair:
    """A line of pairs.jsonl. Without a rejected response its text and ids are empty.

    Its reward gap is the difference of the rewards; an unparsed response has 0.
    """
    worst = rejected.reward or 0.0 if rejected else 0.0
    return Pair(
        problem=prompt.problem,
        prompt=prompt.prompt,
        chosen=chosen.response,
        rejected=rejected.response if rejected else "",
        prompt_ids=prompt.prompt_ids,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids if rejected else (),
        chosen_logp=chosen.logp,
        rejected_logp=rejected.logp if rejected else None,
        reward_gap=1.0 if chosen.reward is None else chosen.reward - worst,
        chosen_inserted=inserted(chosen),
        rejected_inserted=inserted(rejected) if rejected else (),
    )


def inserted(sample: Sample) -> tuple[int, ...]:
    """Numbers of the tokens that a calculator wrote, of those that are left of the response."""
    return tuple(i for i in sample.inserted if i < len(sample.token_ids))


def _nothing(row: parts.Selection, selection: str, audit: Counter[str], golds: int) -> str:
    if not audit["samples"]:
        return (
            f"no gold solution to train on: the task has {golds}, and {audit['gold_over_long']} exceed pairs.max_tokens"
        )
    if not audit["rewarded"]:
        return (
            f"no pair can be made: none of {audit['samples']} samples has a reward; where the judge gives them, it "
            "wrote no score that can be read: take a larger model, or set judge.read=scores"
        )
    hints = [row.hint] if row.hint else []
    hints += ["raise sampling.n or sampling.temperature", "or take other problems"]
    return (
        f"no pair can be made of {audit['samples']} samples (selection {selection!r}): {audit['none_right']} problems "
        f"have no right answer, {audit['all_right']} no wrong one; {audit['unfinished']} samples are unfinished "
        f"(sampling.max_new_tokens), {audit['over_long']} and {audit['gold_over_long']} gold solutions are too long "
        f"(pairs.max_tokens); {', '.join(hints)}"
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
# What there is to say without samples.
GOLD_KEYS = ("problems", "gold_over_long", "problems_with_pairs", "capped", "pairs")


def jaccard(a: str, b: str) -> float:
    """Words that two texts share, out of those of either; 1 for two texts without any. Words are split at blanks."""
    first, second = set(a.split()), set(b.split())
    return len(first & second) / len(first | second) if first | second else 1.0


def dissimilar(samples: list[Sample]) -> list[Sample]:
    """The samples, in order, whose `response` has a Jaccard similarity below 0.7 with every one kept before it.

    So DPO-ST dedupes the rationales that it trains on (arXiv 2407.18248), with the words of a response as its set; two
    that differ in the order of their words only are one.
    """
    kept: list[Sample] = []
    for s in samples:
        if all(jaccard(s.response, k.response) < 0.7 for k in kept):
            kept.append(s)
    return kept
