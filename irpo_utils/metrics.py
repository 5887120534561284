"""Accuracy of a model: greedy, majority vote, pass@k, intervals, tests; which steps are wrong, what samples share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

Record = dict[str, Any]
KS = (1, 2, 4, 8, 16, 32)  # of maj@k and pass@k


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, as fractions. Raises ValueError for total = 0."""
    if total < 1:
        raise ValueError("an interval needs at least one problem")
    z = 1.96
    p, zz = correct / total, z * z / total
    center, half = p + zz / 2, z * math.sqrt(p * (1 - p) / total + zz / (4 * total))
    # The bounds hold p; at p = 0 or 1 rounding would otherwise leave it out by one unit in the last place.
    return min(p, max(0.0, (center - half) / (1 + zz))), max(p, min(1.0, (center + half) / (1 + zz)))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over problems, [problems]: a percentile bootstrap of 1,000 seeded draws."""
    rng = np.random.default_rng(0)
    means = np.asarray(values)[rng.integers(0, len(values), (1000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# 97.5 % points of Student's t: degrees of freedom -> quantile; between them it is nearly linear in 1 / degrees.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 7: 2.36, 10: 2.23, 15: 2.13, 30: 2.04, 1e9: 1.96}


def over_seeds(values: Sequence[dict[str, float]]) -> tuple[float, float, float]:
    """The mean over random seeds of something measured on problems, and its 95 % interval (mean, low, high).

    Seeds vary, and problems do. Where all seeds have the same problems, the variance of the mean is that of a two-way
    layout with random rows and columns, so that a problem counts once and not once a seed. Where each has its own, the
    seeds' means hold all of it; it is taken for no smaller than that of the problems alone. The quantile is Student's,
    with Satterthwaite's degrees of freedom: few seeds give a wide interval. (That of two seeds that differ much is
    still somewhat too narrow.) That of one seed is a bootstrap over its problems.

    Args:
        values: of each seed, problem -> value.
    """
    means = np.array([np.mean(list(own.values())) for own in values])
    seeds, problems, mean = len(values), len(values[0]), float(means.mean())
    if seeds == 1:
        return mean, *bootstrap(list(values[0].values()))
    between, among, rest, least = means.var(ddof=1) / seeds, 0.0, 0.0, 0.0
    if any(own.keys() != values[0].keys() for own in values):
        # The means of few seeds may lie nearer to each other than the problems of each allow.
        least = sum(np.var(list(own.values()), ddof=1) / len(own) for own in values if len(own) > 1) / seeds**2
    elif problems > 1:
        table = np.array([[own[name] for name in values[0]] for own in values])
        of_problem = table.mean(0)
        residual = table - means[:, None] - of_problem + mean
        among = of_problem.var(ddof=1) / problems
        rest = (residual**2).sum() / ((seeds - 1) * (problems - 1) * seeds * problems)
    variance = max(between, among, between + among - rest, least)
    uncertain = between**2 / (seeds - 1) + among**2 / max(1, problems - 1)
    degrees = variance**2 / uncertain if uncertain else 1e9
    half = np.interp(-1 / degrees, [-1 / d for d in STUDENT], list(STUDENT.values())) * math.sqrt(variance)
    return mean, mean - float(half), mean + float(half)


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p of the sign test: how likely so uneven a split is if either way is equally likely.

    Args:
        gained, lost: how many of the problems changed for the better, and for the worse.
    """
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def auc(scores: Sequence[float], labels: Sequence[int]) -> float | None:
    """Probability that a positive scores above a negative, [n] each; ties count half. None if either is missing."""
    return ranking([(scores, labels)], draws=0)["auc"]


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Unbiased probability that one of k samples is right, given `correct` of `total` (arXiv 2107.03374, Eq. 1)."""
    if not 1 <= k <= total:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {total}")
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


def majority(answers: Sequence[str | None], gold_is: Sequence[bool], k: int) -> float:
    """Whether the most frequent of the first k answers is right; among tied answers, the share that is.

    Args:
        answers: extracted answers, [samples]; None (unparsed) does not vote.
        gold_is: whether each of them is right, [samples].
    """
    votes = Counter(a for a in answers[:k] if a is not None)
    if not votes:
        return 0.0
    right = {a for a, ok in zip(answers, gold_is, strict=True) if ok}
    top = [a for a, count in votes.items() if count == max(votes.values())]
    return sum(a in right for a in top) / len(top)


def best_of_n(rewards: Sequence[float], right: Sequence[bool], n: int) -> float:
    """Probability that the best rewarded of n of the samples is right, over all choices of n without repetition; exact.

    Args:
        rewards, right: of a problem's samples, [samples]. Of those that share the best reward any may be taken.
    """
    total = len(rewards)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} needs at least {n} samples, got {total}")
    found, above = 0.0, 0
    for value in sorted(set(rewards), reverse=True):
        tied = [ok for r, ok in zip(rewards, right, strict=True) if r == value]
        # The best of the choice is one of these: none of those above is in it, and not all of it is below.
        rest = total - above
        share = (math.comb(rest, n) - math.comb(rest - len(tied), n)) / math.comb(total, n)
        found += share * sum(tied) / len(tied)
        above += len(tied)
    return found


def weighted_majority(answers: Sequence[str | None], weights: Sequence[float], right: Sequence[bool], n: int) -> float:
    """How often the answer with the most weight among n of the samples is right; weights of 1 are a majority vote.

    Mean over 200 seeded choices of n without repetition (one, where n is all). Of tied answers the share that is
    right counts.

    Args:
        answers: extracted, None (unparsed) has no vote; weights: of each sample, [samples]; right: whether it is right.
    """
    total, rng = len(answers), np.random.default_rng(0)
    if not 1 <= n <= total:
        raise ValueError(f"a vote of {n} needs at least {n} samples, got {total}")
    names = sorted({a for a in answers if a is not None})
    if not names:
        return 0.0
    good = np.array([any(ok for a, ok in zip(answers, right, strict=True) if a == name) for name in names])
    votes = np.array([[w * (a == name) for name in names] for a, w in zip(answers, weights, strict=True)])
    cast = np.array([[a == name for name in names] for a in answers])
    chosen = np.argsort(rng.random((1 if n == total else 200, total)), axis=1)[:, :n]
    sums = np.where(cast[chosen].any(1), votes[chosen].sum(1), -np.inf)
    # Sums of the same weights in another order differ in their last digit, and tie all the same.
    top = (sums >= sums.max(1, keepdims=True) - 1e-9) & cast[chosen].any(1)
    return float(((top & good).sum(1) / np.maximum(1, top.sum(1))).mean())


def against_n(records: list[Record], ns: Sequence[int]) -> list[dict[str, float]]:
    """Accuracy of what can be made of N samples, for each N: fractions, and their 95 % intervals over problems.

    Args:
        records: one per problem, with `answers`, `rewards` (of the answer) and `path_rewards`, [samples] each.

    Returns:
        n and, for each of "majority", "best_of_n", "weighted" and "pass" (one of them is right), the mean and its _low
        and _high.
    """
    rows = []
    for n in ns:
        values: dict[str, list[float]] = {name: [] for name in ("majority", "best_of_n", "weighted", "pass")}
        for r in records:
            right = [x == 1 for x in r["rewards"]]
            values["majority"].append(weighted_majority(r["answers"], [1.0] * len(right), right, n))
            values["best_of_n"].append(best_of_n(r["path_rewards"], right, n))
            values["weighted"].append(weighted_majority(r["answers"], r["path_rewards"], right, n))
            values["pass"].append(pass_at_k(sum(right), len(right), n))
        rows.append({"n": n, **{name: sum(found) / len(found) for name, found in values.items()}})
        for name, found in values.items():
            rows[-1][f"{name}_low"], rows[-1][f"{name}_high"] = bootstrap(found)
    return rows


def summarize(records: list[Record]) -> dict[str, float]:
    """The accuracies of one model on one split, as fractions.

    Args:
        records: one per problem, with `greedy` (the greedy response's reward), `answers` and `rewards` [samples], and
            optionally `flexible`, the greedy response's reward when an answer need not be marked.
    """
    total = len(records)
    greedy = sum(r["greedy"] == 1 for r in records)
    low, high = wilson(greedy, total)
    samples = len(records[0]["rewards"])
    out = {"problems": total, "greedy": greedy / total, "greedy_low": low, "greedy_high": high}
    out["greedy_unparsed"] = sum(r["greedy"] is None for r in records) / total
    if "flexible" in records[0]:
        out["greedy_flexible"] = sum(r["flexible"] == 1 for r in records) / total
    if samples:
        out["sampled"] = sum(x == 1 for r in records for x in r["rewards"]) / (total * samples)
    for k in KS:
        if k <= samples:
            rewards = [[x == 1 for x in r["rewards"]] for r in records]
            per_problem = {
                "maj": [majority(r["answers"], w, k) for r, w in zip(records, rewards, strict=True)],
                "pass": [pass_at_k(sum(w), samples, k) for w in rewards],
            }
            for name, values in per_problem.items():
                out[f"{name}{k}"] = sum(values) / total
                out[f"{name}{k}_low"], out[f"{name}{k}_high"] = bootstrap(values)
    return out


def ranking(problems: Sequence[tuple[Sequence[float], Sequence[bool]]], draws: int = 1000) -> dict[str, float | None]:
    """How well scores tell right responses from wrong ones; None where there is nothing to compare.

    Args:
        problems: for every problem the scores of its responses and whether each is right.

    Returns:
        `auc` over the responses of all problems together. `ranked`: the share of the pairs (right, wrong) of *one*
        problem in which the right one scores higher; ties count half. With `_low` and `_high`: the 95 % interval from
        `draws` seeded resamplings of the problems.
    """
    values, at = np.unique([s for scores, _ in problems for s in scores], return_inverse=True)
    number = np.repeat(np.arange(len(problems)), [len(scores) for scores, _ in problems])
    truth = np.array([bool(r) for _, right in problems for r in right])
    counts = np.zeros((2, len(problems), len(values)))  # wrong and right responses of each problem with each score
    np.add.at(counts, (truth.astype(int), number, at), 1)

    def compare(wrong: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that are ranked right, and all pairs, from counts [..., values]."""
        return (right * (wrong.cumsum(-1) - wrong / 2)).sum(-1), right.sum(-1) * wrong.sum(-1)

    # How often each problem comes: once each, then in the resamplings.
    times = np.ones((1, len(problems)), dtype=int)
    if draws and problems:
        more = np.random.default_rng(0).multinomial(len(problems), [1 / len(problems)] * len(problems), size=draws)
        times = np.concatenate([times, more])
    out: dict[str, float | None] = {}
    for name, (won, pairs) in {
        "auc": compare(*(times @ counts)),
        "ranked": [times @ x for x in compare(*counts)],
    }.items():
        shares = won[pairs > 0] / pairs[pairs > 0]
        known = pairs[0] > 0
        low, high = np.quantile(shares[1:], [0.025, 0.975]).tolist() if known and len(shares) > 1 else (None, None)
        out |= {name: float(shares[0]) if known else None, f"{name}_low": low, f"{name}_high": high}
    return out


def step_summary(checked: list[list[tuple[str, str]]], rewards: list[float | None]) -> dict[str, Any]:
    """How many solutions are right step by step, for a task whose `check_steps` knows.

    Args:
        checked: (kind, verdict) of every event of every solution. rewards: the solutions' rewards.

    Returns:
        `steps_right`: share of solutions whose every step is right. `right_for_wrong_reason`: share of all solutions
        with a right answer and a wrong step. `errors`: kind -> {"careless", "wrong", "count"}: shares of its events.
    """
    clean = [all(verdict == "right" for _, verdict in steps) for steps in checked]
    counts: dict[str, Counter[str]] = {}
    for steps in checked:
        for kind, verdict in steps:
            counts.setdefault(kind, Counter())[verdict] += 1
    return {
        "steps_right": sum(clean) / len(checked),
        "right_for_wrong_reason": sum(r == 1 and not c for r, c in zip(rewards, clean, strict=True)) / len(checked),
        "errors": {
            kind: {"careless": c["careless"] / c.total(), "wrong": 1 - c["right"] / c.total(), "count": c.total()}
            for kind, c in sorted(counts.items())
        },
    }


def distinct_prefixes(responses: list[list[int]]) -> int:
    """How many rows the sampler needs for responses to one prompt: their distinct proper prefixes, [] among them."""
    ordered = sorted(responses)
    count = len(ordered[0]) if ordered else 0
    for one, other in pairwise(ordered):
        same = len(list(takewhile(lambda tokens: tokens[0] == tokens[1], zip(one, other, strict=False))))
        count += max(0, len(other) - 1 - min(same, len(one) - 1))
    return count
