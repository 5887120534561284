"""The paper's pairing: both lists walked together, each starting over; duplicates, unfinished and over-long counted."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.pairs import build_pairs, cyclic_pairs, dissimilar, distinct, gold_only, jaccard


def sample(token, reward, finished=True, length=2):
    return {
        "response": f"r{token}",
        "token_ids": [token] * (length - 1) + [2],
        "logp": -1.0,
        "finished": finished,
        "reward": reward,
    }


PROMPTS = {"a": ("p", [1, 1]), "b": ("p", [1]), "c": ("p", [1])}


@given(st.integers(0, 7), st.integers(0, 7), st.integers(1, 60))
def test_cyclic_pairs_walk_both_lists_and_never_repeat(winners, losers, k):
    pairs = cyclic_pairs(list(range(winners)), list(range(losers)), k)
    assert pairs == [(i % winners, i % losers) for i in range(len(pairs))]
    assert len(set(pairs)) == len(pairs) == (min(k, math.lcm(winners, losers)) if winners and losers else 0)


def test_the_paper_s_example_is_simultaneous_not_a_product():
    assert cyclic_pairs("AB", "xyz", 4) == [("A", "x"), ("B", "y"), ("A", "z"), ("B", "x")]


def test_duplicates_leave_first_and_everything_is_counted():
    samples = {
        "a": [sample(5, 1.0), sample(5, 1.0), sample(6, 0.0), sample(7, None), sample(8, 1.0, finished=False), sample(9, 1.0, length=30)],
        "b": [sample(5, 0.0), sample(6, 0.0)],
        "c": [sample(5, 1.0)],
    }  # fmt: skip
    pairs, audit = build_pairs(samples, PROMPTS, None, k=8, max_tokens=10)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("r5", "r6"), ("r5", "r7")]  # unparsed loses
    wanted = {"problems": 3, "none_right": 1, "all_right": 1, "some_right": 1, "samples": 9, "duplicates": 1, "unparsed": 1, "unfinished": 1, "over_long": 1, "pairs": 2, "problems_with_pairs": 1}  # fmt: skip
    assert {k: audit[k] for k in wanted} == wanted
    assert audit["length_gap"] == 0


def test_gold_joins_the_winners_and_saves_a_problem_without_one():
    samples = {"b": [sample(5, 0.0), sample(6, 0.0)]}
    gold = {"b": sample(40, 1.0)}
    pairs, _ = build_pairs(samples, PROMPTS, gold, k=8, max_tokens=10)
    over = {"b": {**gold["b"], "token_ids": [9] * 10}}
    with pytest.raises(ValueError, match="1 too long"):
        build_pairs(samples, PROMPTS, over, k=8, max_tokens=10)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("r40", "r5"), ("r40", "r6")]


def test_cap_is_random_but_seeded():
    samples = {"a": [sample(t, float(t % 2)) for t in range(5, 15)]}
    first, audit = build_pairs(samples, PROMPTS, None, k=9, max_tokens=10, max_pairs=3, seed=1)
    assert (len(first), audit["capped"]) == (3, 2)
    assert first == build_pairs(samples, PROMPTS, None, k=9, max_tokens=10, max_pairs=3, seed=1)[0]


def test_no_pair_at_all_says_why_and_what_to_do():
    with pytest.raises(ValueError, match="1 problems have no right answer.*raise sampling.n"):
        build_pairs({"b": [sample(5, 0.0)]}, PROMPTS, None, k=8, max_tokens=10)
    with pytest.raises(ValueError, match="no gold solution"):
        gold_only({}, PROMPTS, 10)


def test_distinct_keeps_the_first():
    rows = [sample(5, 1.0) | {"n": 0}, sample(6, 1.0) | {"n": 1}, sample(5, 1.0) | {"n": 2}]
    assert [r["n"] for r in distinct(rows)] == [0, 1]


def test_dissimilar_keeps_what_shares_few_words_with_all_kept_before_it():
    texts = ["a b c d", "d c b a", "a b c e", "a b c d e", "f g"]  # to the first: 1, 3/5, 4/5, 0; third to fourth: 4/5
    assert [jaccard(texts[0], t) for t in texts] == [1, 1, 0.6, 0.8, 0]
    kept = lambda limit: [s["response"] for s in dissimilar([{"response": t} for t in texts], limit)]  # noqa: E731
    assert kept(0.7) == ["a b c d", "a b c e", "f g"]
    assert kept(0.6) == ["a b c d", "f g"]  # at the limit is not below it
    assert kept(1.0) == ["a b c d", "a b c e", "a b c d e", "f g"]
    assert dissimilar([]) == [] and jaccard("", "") == 1 and jaccard("a a b", "b a") == 1
