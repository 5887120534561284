"""Metrics against cases that can be counted by hand."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from irpo_utils.metrics import (
    auc,
    bootstrap,
    majority,
    over_seeds,
    pass_at_k,
    ranking,
    sign_test,
    step_summary,
    summarize,
    wilson,
)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.integers(1, n))))
def test_pass_at_k_counts_the_subsets(case):
    correct, total, k = case
    subsets = list(combinations([True] * correct + [False] * (total - correct), k))
    assert pass_at_k(correct, total, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_ties_unparsed_and_k():
    right = [True, False, False, True]
    assert majority(["6", "7", "7", "6"], right, 4) == 0.5
    assert majority(["6", "7", "7", "6"], right, 3) == 0.0
    assert majority([None, None, "6"], [False, False, True], 3) == 1.0
    assert majority([None, None], [False, False], 2) == 0.0


@example((300, 300))
@example((0, 300))
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_stays_in_range(case):
    correct, total = case
    low, high = wilson(correct, total)
    assert 0 <= low <= correct / total <= high <= 1


def test_wilson_known_value():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_bootstrap_holds_the_mean_and_narrows():
    low, high = bootstrap([0.0, 1.0] * 50)
    assert low < 0.5 < high
    wide = bootstrap([0.0, 1.0] * 5)
    assert wide[1] - wide[0] > high - low
    assert bootstrap([1.0] * 9) == (1.0, 1.0)


def test_summary_and_steps():
    records = [
        {"greedy": 1.0, "answers": ["6", "6"], "rewards": [1.0, 1.0]},
        {"greedy": None, "answers": [None, "5"], "rewards": [None, 0.0]},
    ]
    s = summarize(records)
    assert (s["greedy"], s["greedy_unparsed"], s["sampled"], s["maj2"], s["pass2"]) == (0.5, 0.5, 0.5, 0.5, 0.5)
    steps = step_summary([[("half", "careless")], [("half", "right"), ("gets", "right")]], [1.0, 1.0])
    assert steps["steps_right"] == 0.5 and steps["right_for_wrong_reason"] == 0.5
    assert steps["errors"]["half"] == {"careless": 0.5, "wrong": 0.5, "count": 2}


verdicts = st.lists(st.tuples(st.sampled_from(["half", "gets"]), st.sampled_from(["right", "careless", "wrong"])))
rewards = st.sampled_from([1.0, 0.0, None])


@given(st.lists(st.tuples(verdicts, rewards), min_size=1, max_size=6))
def test_steps_are_counted_over_all_solutions(solutions):
    got = step_summary([steps for steps, _ in solutions], [reward for _, reward in solutions])
    bad = [any(v != "right" for _, v in steps) for steps, _ in solutions]
    assert got["steps_right"] == bad.count(False) / len(solutions)
    lucky = sum(reward == 1 and b for (_, reward), b in zip(solutions, bad, strict=True))
    assert got["right_for_wrong_reason"] == lucky / len(solutions)
    for kind in {kind for steps, _ in solutions for kind, _ in steps}:
        own = [v for steps, _ in solutions for k, v in steps if k == kind]
        assert got["errors"][kind]["count"] == len(own)
        assert got["errors"][kind]["careless"] == pytest.approx(own.count("careless") / len(own))
        assert got["errors"][kind]["wrong"] == pytest.approx(1 - own.count("right") / len(own))


drawn = st.lists(st.tuples(st.sampled_from(["6", "7", None]), rewards), min_size=16, max_size=16)


@given(st.lists(st.tuples(rewards, rewards, drawn), min_size=1, max_size=5))
def test_a_summary_counts_what_each_record_holds(rows):
    records = [
        {"greedy": g, "flexible": f, "answers": [a for a, _ in d], "rewards": [r for _, r in d]} for g, f, d in rows
    ]
    s, total = summarize(records), len(records)
    assert (s["problems"], s["greedy"]) == (total, sum(g == 1 for g, _, _ in rows) / total)
    assert s["greedy_unparsed"] == sum(g is None for g, _, _ in rows) / total
    assert s["greedy_flexible"] == sum(f == 1 for _, f, _ in rows) / total
    right = [[r == 1 for r in record["rewards"]] for record in records]
    assert s["sampled"] == pytest.approx(sum(map(sum, right)) / (16 * total))
    assert {name for name in s if name[-1].isdigit()} == {
        f"{what}{k}" for what in ("maj", "pass") for k in (1, 2, 4, 8, 16)
    }
    for k in (1, 2, 4, 8, 16):
        assert s[f"pass{k}"] == pytest.approx(sum(pass_at_k(sum(w), 16, k) for w in right) / total)
        votes = [majority(record["answers"], w, k) for record, w in zip(records, right, strict=True)]
        assert s[f"maj{k}"] == pytest.approx(sum(votes) / total)
        assert s[f"pass{k}_low"] <= s[f"pass{k}"] + 1e-9 and s[f"maj{k}"] <= s[f"maj{k}_high"] + 1e-9


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        majority(["6", "7"], [True], 2)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        step_summary([[]], [])


def test_auc_by_hand():
    assert auc([5, 4, 3, 1], [True, True, False, False]) == 1
    assert auc([1, 4, 3, 4], [True, True, False, False]) == (0 + 0 + 1 + 0.5) / 4
    assert auc([2, 2, 2], [True, False, False]) == 0.5
    assert auc([1, 2], [True, True]) is None
    assert auc([True, 0.5], [True, False]) == 1


scored = st.lists(st.tuples(st.sampled_from([0, 1, 1.5, 4 / 3, 5]), st.booleans()), max_size=7)


@given(st.lists(scored, min_size=1, max_size=5))
def test_ranking_counts_the_pairs(problems):
    def share(groups):
        pairs = [(r, w) for g in groups for r, right in g if right for w, other in g if not other]
        return sum((r > w) + (r == w) / 2 for r, w in pairs) / len(pairs) if pairs else None

    got = ranking([([s for s, _ in g], [r for _, r in g]) for g in problems], draws=20)
    assert got["auc"] == pytest.approx(share([[x for g in problems for x in g]]))
    assert got["ranked"] == pytest.approx(share(problems))
    flipped = ranking([([-s for s, _ in g], [r for _, r in g]) for g in problems], draws=20)
    if got["auc"] is not None:
        assert 0 <= got["auc_low"] <= got["auc_high"] <= 1
        assert flipped["auc"] == pytest.approx(1 - got["auc"])


def test_the_interval_of_an_auc_narrows_with_problems_not_with_samples():
    """Scores that follow the problem, not the response: every sample of a problem adds nothing."""

    def width(problems):
        interval = ranking(problems)
        return interval["auc_high"] - interval["auc_low"]

    def problem(i, n):
        return [i % 7] * n, [i * 5 % 11 < 5] * n

    few, more = [problem(i, 1) for i in range(30)], [problem(i, 40) for i in range(30)]
    assert width(more) == pytest.approx(width(few))
    assert width([problem(i, 1) for i in range(300)]) < 0.6 * width(few)


def seeds_that_differ(rng, seeds, shared, apart, problems=80):
    """Values of each seed's problems with true mean 0: a part of each seed (`apart`), of each problem and of chance."""
    of_problem, found = rng.normal(0, 0.3, problems), []
    for seed in range(seeds):
        own = of_problem if shared else rng.normal(0, 0.3, problems)
        values = rng.normal(0, apart) + own + rng.normal(0, 0.3, problems)
        found.append({str(i) if shared else f"{seed}/{i}": float(v) for i, v in enumerate(values)})
    return found


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("seeds", "apart", "too_narrow"), [(3, 0.1, True), (5, 0.1, True), (5, 0.0, False)])
def test_an_interval_over_seeds_holds_the_truth_where_one_over_problems_does_not(seeds, apart, too_narrow, shared):
    rng, held, naive = np.random.default_rng(0), [], []
    for _ in range(150):
        values = seeds_that_differ(rng, seeds, shared, apart)
        mean, low, high = over_seeds(values)
        assert mean == pytest.approx(np.mean([np.mean(list(own.values())) for own in values])) and low < mean < high
        held.append(low < 0 < high)
        low, high = bootstrap([v for own in values for v in own.values()])
        naive.append(low < 0 < high)
    assert 0.88 <= np.mean(held) <= 0.995  # of 95 %
    assert not too_narrow or np.mean(naive) < 0.75


def test_an_interval_over_seeds_counts_a_problem_once():
    own = {str(i): float(i % 3 == 0) for i in range(60)}
    one, three = over_seeds([own]), over_seeds([own] * 3)
    assert one == pytest.approx(three, abs=0.02)
    assert over_seeds([dict.fromkeys(own, 1.0)] * 2) == (1.0, 1.0, 1.0)


def test_seeds_that_tie_on_problems_of_their_own_have_an_interval():
    tied = [{f"{seed}/{i}": float(i == 0) for i in range(3)} for seed in range(2)]
    mean, low, high = over_seeds(tied)
    assert mean == pytest.approx(1 / 3) and low < 0 < high


@given(st.integers(0, 6), st.integers(0, 6))
def test_sign_test_counts_the_splits(gained, lost):
    splits = [sum(signs) for signs in product((0, 1), repeat=gained + lost)]
    as_uneven = sum(abs(2 * s - gained - lost) >= abs(gained - lost) for s in splits)
    assert sign_test(gained, lost) == pytest.approx(as_uneven / len(splits))
