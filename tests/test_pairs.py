"""What each method trains on, by hand: which samples, in which pairs; duplicates, unfinished and over-long counted."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import FAMILIES, build

from irpo_utils.methods.likelihood import answered
from irpo_utils.methods.parts import KINDS
from irpo_utils.methods.rewards import Job
from irpo_utils.methods.select import cyclic_pairs, distinct, margin_of, select
from irpo_utils.methods.votes import votes
from irpo_utils.model.load import load_tokenizer
from irpo_utils.model.records import Pair, Prompt, Sample
from irpo_utils.settings import ModelConfig, PairsConfig, Settings, TaskConfig
from irpo_utils.tasks import get_task


def sample(token, reward, finished=True, length=2, **more):
    fields = {
        "problem": "a",
        "sample": 0,
        "response": f"r{token}",
        "answer": None,
        "reward": reward,
        "flexible": reward,
        "finished": finished,
        "logp": -1.0,
        "token_ids": (token,) * (length - 1) + (2,),
    }
    return Sample(**fields | more)


PROMPTS = {name: Prompt(name, "p", ids) for name, ids in (("a", (1, 1)), ("b", (1,)), ("c", (1,)))}


def with_gold(golds):
    """The prompts with gold solutions, given as samples."""
    return PROMPTS | {n: replace(PROMPTS[n], gold=s.response, gold_ids=s.token_ids) for n, s in golds.items()}


def made(selection, samples, solution=None, **settings):
    """What a selection makes of the samples of one problem, as the names of the responses."""
    golds = {} if solution is None else {"a": solution}
    pairs, _ = select(selection, {"a": samples}, with_gold(golds), PairsConfig(max_tokens=10, **settings))
    return [(p.chosen, p.rejected) if p.rejected else p.chosen for p in pairs]


@given(st.integers(0, 7), st.integers(0, 7), st.integers(1, 60))
def test_cyclic_pairs_walk_both_lists_and_never_repeat(winners, losers, k):
    pairs = cyclic_pairs(list(range(winners)), list(range(losers)), k)
    assert pairs == [(i % winners, i % losers) for i in range(len(pairs))]
    assert len(set(pairs)) == len(pairs) == (min(k, math.lcm(winners, losers)) if winners and losers else 0)


def test_the_paper_s_example_is_simultaneous_not_a_product():
    assert cyclic_pairs("AB", "xyz", 4) == [("A", "x"), ("B", "y"), ("A", "z"), ("B", "x")]


# Right: 5 (twice), 6, 7. Wrong: 8, 9 (unparsed).
SIX = [sample(5, 1.0), sample(8, 0.0), sample(5, 1.0), sample(6, 1.0), sample(9, None), sample(7, 1.0)]
GOLD = sample(40, 1.0, logp=None)


@pytest.mark.parametrize(
    ("selection", "settings", "wanted"),
    [
        ("pairs", {"k": 4}, [("r5", "r8"), ("r6", "r9"), ("r7", "r8"), ("r5", "r9")]),
        ("pairs", {"k": 2, "gold": True}, [("r40", "r8"), ("r5", "r9")]),
        ("pairs_with_gold", {"k": 2}, [("r40", "r8"), ("r5", "r9")]),
        ("diverse", {"k": 4}, [("r6", "r8")]),  # r5 was drawn twice, r7 comes later
        ("chosen", {"k": 4}, ["r5", "r6", "r7", "r5"]),
        ("gold", {}, ["r40"]),
        ("correct", {}, ["r5", "r5", "r6", "r7"]),
        ("distinct", {}, ["r5", "r6", "r7"]),
        ("capped", {"max_per_problem": 3}, ["r5", "r5", "r6"]),
        ("pseudo", {"k": 2}, ["r40", "r5", "r6"]),
        ("gold_against_own", {"k": 3}, [("r40", "r5"), ("r40", "r8"), ("r40", "r6")]),
    ],
)
def test_what_a_selection_makes_of_six_samples(selection, settings, wanted):
    assert made(selection, SIX, GOLD, **settings) == wanted


def test_a_pair_holds_what_its_prompt_and_its_samples_hold():
    right, wrong = sample(5, 1.0, logp=-3.5), sample(8, 0.0, logp=-7.25, length=3)
    (pair,), _ = select("pairs", {"a": [right, wrong]}, PROMPTS, PairsConfig(max_tokens=10))
    assert pair == Pair("a", "p", "r5", "r8", (1, 1), right.token_ids, wrong.token_ids, -3.5, -7.25)
    (alone,), _ = select("correct", {"a": [right]}, PROMPTS, PairsConfig(max_tokens=10))
    assert alone == Pair("a", "p", "r5", "", (1, 1), right.token_ids, (), -3.5, None)


def test_sft_on_chosen_trains_on_the_winners_of_the_same_pairs_gold_among_them():
    golden = {"k": 3, "gold": True}
    assert made("chosen", SIX, GOLD, **golden) == [winner for winner, _ in made("pairs", SIX, GOLD, **golden)]
    assert "r40" in made("chosen", SIX, GOLD, **golden)


def test_dpo_st_drops_what_is_seven_tenths_alike():
    words = [f"w{i}" for i in range(20)]

    def beside(count, token):  # `count` of the first one's ten words, and so many others that all have ten
        text = " ".join(words[:count] + words[10 : 20 - count])
        return sample(token, 1.0, response=text)

    first = beside(10, 5)
    assert made("pseudo", [first, beside(9, 6)], GOLD, k=9) == ["r40", first.response]  # 9 of 11 words: 0.82
    assert made("pseudo", [first, beside(8, 7)], GOLD, k=9) == ["r40", first.response, beside(8, 7).response]  # 8 of 12
    seven = [sample(5, 1.0, response="a b c d e f g"), sample(6, 1.0, response="a b c d e f g h i j")]
    assert len(made("pseudo", seven, GOLD, k=9)) == 2  # 0.7 itself is too much alike
    assert len(made("pseudo", [sample(5, 1.0, response=" "), sample(6, 1.0, response="")], GOLD, k=9)) == 2


def test_spin_does_not_hold_gold_against_itself():
    assert made("gold_against_own", [sample(40, 1.0), sample(5, 1.0)], GOLD) == [("r40", "r5")]


def test_divpo_counts_tokens_not_answers_and_wants_both_sides():
    often = [sample(8, 0.0), sample(9, None), sample(5, 1.0), sample(9, 0.0), sample(5, 1.0), sample(6, 1.0)]
    assert made("diverse", often) == [("r6", "r9")]  # wrong: 9 twice, once unparsed
    assert made("diverse", often[:4]) == [("r5", "r9")]
    for one_sided in (often[:2], often[4:]):
        with pytest.raises(ValueError, match="no pair can be made"):
            made("diverse", one_sided)


def test_self_rewarding_takes_the_best_against_the_worst_and_drops_ties():
    scored = [sample(5, 2.0), sample(6, 4.5), sample(7, None), sample(8, 1.0), sample(9, 4.5)]
    assert made("best_against_worst", scored) == [("r6", "r8")]
    with pytest.raises(ValueError, match="no pair can be made"):
        made("best_against_worst", [sample(5, 3.0), sample(6, 3.0), sample(7, None)])


def test_votes_choose_the_most_agreed_with_and_weigh_the_pair_by_how_much():
    answers = {5: "6", 6: "6", 7: "4", 8: "6", 9: None}  # token -> answer; the majority is wrong
    samples = [sample(token, float(a == "4"), answer_reward=float(a == "4")) for token, a in answers.items()]
    samples = [replace(s, answer=a) for s, a in zip(samples, answers.values(), strict=True)]
    job = Job(Settings(), None, get_task(TaskConfig()), [], {}, {"a": samples}, 0.8, 0, Path())
    voted, facts = votes(job)
    assert [s.reward for s in voted] == [0.6, 0.6, 0.2, 0.6, None]
    assert [s.answer_reward for s in voted] == [s.answer_reward for s in samples]
    assert facts == {"problems_with_votes": 1, "majority_right": 0, "drawn_tokens": 0, "trained_tokens": 0}
    (pair,), _ = select("voted", {"a": voted}, PROMPTS, PairsConfig(max_tokens=10))
    assert (pair.chosen, pair.rejected) == ("r5", "r7") and pair.reward_gap == pytest.approx(0.4)
    with pytest.raises(ValueError, match="lower pairs.least_votes"):
        select("voted", {"a": voted}, PROMPTS, PairsConfig(max_tokens=10, least_votes=0.7))


def test_step_dpo_takes_the_first_wrong_step_and_a_right_one_from_the_same_place():
    def steps(ids, scores, right):  # a step a token, EOS behind the last
        text = "\n".join(f"s{i}" for i in ids)
        own = {"response": text, "token_ids": (*ids, 2), "step_scores": scores, "step_ends": tuple(range(len(ids)))}
        return sample(0, sum(scores) / len(scores), answer_reward=float(right), **own)

    right = steps((5, 6, 7), (0.9, 0.8, 0.9), True)
    lucky = steps((5, 9, 7), (0.9, 0.1, 0.2), True)  # its second step is no model to follow
    early, late = steps((8, 6), (0.4, 0.3), False), steps((5, 6, 9), (0.9, 0.8, 0.2), False)
    short = steps((5,), (0.9,), True)  # it ends where the next step would be
    sound = steps((5, 6, 7, 4), (0.9, 0.8, 0.9, 0.5), False)  # no step of it is wrong
    drawn = [lucky, short, late, right, early, late, sound]
    pairs, _ = select("first_wrong_step", {"a": drawn}, PROMPTS, PairsConfig(max_tokens=10))
    assert [(p.chosen_ids, p.rejected_ids) for p in pairs] == [((5, 6, 7), (5, 6, 9)), ((5,), (8,))]
    assert [(p.chosen, p.rejected) for p in pairs] == [("s5\ns6\ns7", "s5\ns6\ns9"), ("s5", "s8")]
    assert [p.reward_gap for p in pairs] == pytest.approx([0.9 - 0.2, 0.9 - 0.4])  # of the step
    assert {(p.chosen_logp, p.rejected_logp) for p in pairs} == {(None, None)}
    assert len(select("first_wrong_step", {"a": drawn}, PROMPTS, PairsConfig(max_tokens=10, k=1))[0]) == 1
    for none in ([lucky, late], SIX):
        with pytest.raises(ValueError, match="no pair can be made.*take the reward process"):
            select("first_wrong_step", {"a": none}, PROMPTS, PairsConfig(max_tokens=10))


def test_a_thought_is_held_against_the_others_of_its_problem():
    rewards = {5: -1.0, 6: -2.0, 7: -6.0}
    whole = [
        sample(t, r, length=4, thought=2, extra=True, logp=None, answer_reward=1.0, response=f"r{t}\nFinal answer: 8")
        for t, r in rewards.items()
    ]
    pairs, audit = select("thoughts", {"a": [sample(9, -1.0, answer_reward=0.0), *whole]}, PROMPTS, PairsConfig(k=1))
    assert [p.reward_gap for p in pairs] == [3.0, 1.5, -4.5]  # as -1 - (-2 - 6) / 2
    assert [(p.chosen_ids, p.rejected_ids) for p in pairs] == [((t, t, t, 2), (t, t)) for t in rewards]
    assert [(p.chosen, p.rejected) for p in pairs] == [(f"r{t}\nFinal answer: 8", f"r{t}\n") for t in rewards]
    assert {(p.chosen_logp, p.rejected_logp) for p in pairs} == {(None, None)}
    assert (audit["samples"], audit["right"]) == (1, 0)  # what was drawn
    twice, _ = select("thoughts", {"a": [whole[0], *whole[:2]]}, PROMPTS, PairsConfig())
    assert [p.reward_gap for p in twice] == [0.5, 0.5, -1.0]  # what is drawn twice counts twice
    for alone in ([sample(9, -1.0), whole[0]], SIX):
        with pytest.raises(ValueError, match="take the reward likelihood"):
            select("thoughts", {"a": alone}, PROMPTS, PairsConfig())


@pytest.mark.parametrize(
    ("drawn", "finished", "thought", "wanted"),
    [
        ("12 / 2 = 6\nFinal answer: 6", True, "12 / 2 = 6\n", "12 / 2 = 6\nFinal answer: 7"),
        ("Final answer: 5\n6\nFinal answer: 6", True, "Final answer: 5\n6\n", "Final answer: 5\n6\nFinal answer: 7"),
        ("12 / 2", False, "12 / 2", "12 / 2\nFinal answer: 7"),
        ("Final answer: 6", True, "", "Final answer: 7"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["seed", *FAMILIES])
def test_the_gold_answer_takes_the_place_of_a_response_s_own(
    tokenizer, tmp_path, family, drawn, finished, thought, wanted
):
    if family != "seed":
        built = build(family, tmp_path, [f"{i} / 2 = {i}. Final answer {i}" for i in range(99)])
        tokenizer = load_tokenizer(ModelConfig(path=str(built)))
    ids = tuple(tokenizer(drawn, add_special_tokens=False).input_ids)
    own = sample(5, 0.0, response=tokenizer.decode(ids), token_ids=(*ids, 2) if finished else ids, finished=finished)
    whole = answered(tokenizer, own, "7", end=2)
    assert whole.token_ids[: whole.thought] == ids[: whole.thought] and whole.token_ids[-1] == 2
    assert tokenizer.decode(ids[: whole.thought]) == thought
    assert tokenizer.decode(whole.token_ids[:-1]) == whole.response == wanted
    assert whole.extra and whole.finished and whole.logp is None and (whole.answer, whole.answer_reward) == ("7", 1.0)
    for answer in ("", "print(1)\nprint(2)"):
        with pytest.raises(ValueError, match="needs a gold answer of one line, and problem a has"):
            answered(tokenizer, own, answer, end=2)


def test_a_judge_that_says_nothing_is_named():
    with pytest.raises(ValueError, match="none of 1 samples has a reward.*judge.read=scores"):
        made("best_against_worst", [sample(5, None, answer_reward=1.0)])


def test_margin_pairs_differ_by_eta_or_more():
    scored = [sample(5, 0.9), sample(6, 0.75), sample(7, 0.5), sample(8, 0.45)]
    close = made("margin", scored, eta=0.25, k=9)
    assert sorted(close) == [("r5", "r7"), ("r5", "r8"), ("r6", "r7"), ("r6", "r8")]
    assert made("margin", scored, eta=0.45, k=9) == [("r5", "r8")]
    tenths = [sample(5, 1.0), sample(6, 0.8), sample(7, 0.6)]  # whose differences are not 0.2 to the last digit
    assert sorted(made("margin", tenths, eta=0.2, k=9)) == [("r5", "r6"), ("r5", "r7"), ("r6", "r7")]
    outcome = made("margin", SIX, eta=0.5, k=9)  # with rewards of 1 and 0 it is every right one against every wrong one
    assert sorted(outcome) == [(w, l) for w in ("r5", "r6", "r7") for l in ("r8", "r9")]  # noqa: E741


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0.01, 0.9), st.integers(1, 12))
def test_margin_never_takes_a_pair_twice_nor_one_that_is_closer(rewards, eta, k):
    samples = [sample(10 + i, reward) for i, reward in enumerate(rewards)]
    pairs = margin_of(samples, None, PairsConfig(eta=eta, k=k), random.Random(0))
    assert all(w.reward - loser.reward >= eta - 1e-9 for w, loser in pairs)
    possible = sum(a - b >= eta - 1e-9 for a in rewards for b in rewards)
    assert len({(w.response, loser.response) for w, loser in pairs}) == len(pairs) == min(k, possible)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (table, _) in KINDS.items() for name in table])
def test_every_part_that_a_recipe_may_name_is_there(kind, name):
    part = KINDS[kind][0][name]
    assert callable(part.load()) if part.where else name in ("none", "answer")


def test_duplicates_leave_first_and_everything_is_counted():
    samples = {
        "a": [
            sample(5, 1.0), sample(5, 1.0), sample(6, 0.0), sample(7, None), sample(8, 1.0, finished=False),
            sample(9, 1.0, length=30),
        ],
        "b": [sample(5, 0.0), sample(6, 0.0)],
        "c": [sample(5, 1.0)],
    }  # fmt: skip
    pairs, audit = select("pairs", samples, PROMPTS, PairsConfig(max_tokens=10))
    assert [(p.chosen, p.rejected) for p in pairs] == [("r5", "r6"), ("r5", "r7")]  # unparsed loses
    wanted = {
        "problems": 3, "none_right": 1, "all_right": 1, "some_right": 1, "samples": 9, "duplicates": 1, "unparsed": 1,
        "unfinished": 1, "over_long": 1, "pairs": 2, "problems_with_pairs": 1,
    }  # fmt: skip
    assert {k: audit[k] for k in wanted} == wanted
    assert audit["length_gap"] == 0


def test_rationalized_samples_are_trained_on_but_not_counted_as_drawn():
    failed = [sample(5, 0.0), sample(6, 1.0, extra=True, logp=None)]
    rows, audit = select("correct", {"a": failed}, PROMPTS, PairsConfig(max_tokens=10))
    assert [p.chosen for p in rows] == ["r6"]
    assert (audit["samples"], audit["right"], audit["none_right"]) == (1, 0, 1)


def test_a_rationalized_sample_wins_against_what_was_drawn_and_only_the_latter_has_the_sampler_s_log_probability():
    failed = [sample(5, 0.0, logp=-4.0), sample(6, 1.0, extra=True, logp=None), sample(7, None, logp=-6.0)]
    pairs, audit = select("pairs", {"a": failed}, PROMPTS, PairsConfig(max_tokens=10))
    assert [(p.chosen, p.rejected) for p in pairs] == [("r6", "r5"), ("r6", "r7")]
    assert [(p.chosen_logp, p.rejected_logp) for p in pairs] == [(None, -4.0), (None, -6.0)]
    assert {p.prompt_ids for p in pairs} == {PROMPTS["a"].prompt_ids}  # the one without the hint
    assert (audit["none_right"], audit["problems_with_pairs"]) == (1, 1)  # IRPO makes nothing of such a problem


def test_the_audit_counts_answers_where_the_reward_is_another():
    judged = [sample(5, 4.0, answer_reward=0.0), sample(6, 1.0, answer_reward=1.0)]
    _, audit = select("best_against_worst", {"a": judged}, PROMPTS, PairsConfig(max_tokens=10))
    assert (audit["right"], audit["some_right"]) == (1, 1)


def test_gold_joins_the_winners_and_saves_a_problem_without_one():
    samples, config = {"b": [sample(5, 0.0), sample(6, 0.0)]}, PairsConfig(max_tokens=10, gold=True)
    pairs, _ = select("pairs", samples, with_gold({"b": GOLD}), config)
    assert [(p.chosen, p.rejected) for p in pairs] == [("r40", "r5"), ("r40", "r6")]
    with pytest.raises(ValueError, match="1 gold solutions are too long"):
        select("pairs", samples, with_gold({"b": sample(40, 1.0, length=10)}), config)


def test_a_problem_s_draw_depends_on_the_seed_and_on_the_problem():
    scored = [sample(t, t / 20) for t in range(5, 15)]
    config = PairsConfig(k=5, eta=0.05, max_tokens=10)

    def drawn(seed):
        pairs, _ = select("margin", {name: scored for name in "ab"}, PROMPTS, config, seed)
        return [[(p.chosen, p.rejected) for p in pairs if p.problem == name] for name in "ab"]

    assert drawn(0) == drawn(0) and drawn(0) != drawn(1)
    assert drawn(0)[0] != drawn(0)[1]


def test_what_is_just_long_enough_fits():
    two = [sample(5, 1.0), sample(6, 0.0)]  # prompt and response have two tokens each
    assert len(select("pairs", {"a": two}, PROMPTS, PairsConfig(max_tokens=4))[0]) == 1
    with pytest.raises(ValueError, match="2 and 0 gold solutions are too long"):
        select("pairs", {"a": two}, PROMPTS, PairsConfig(max_tokens=3))


def test_the_audit_says_what_there_is_to_say():
    _, audit = select("gold", {}, with_gold({"a": GOLD}), PairsConfig(max_tokens=10))
    assert audit == {
        "problems": 1,
        "gold_over_long": 0,
        "problems_with_pairs": 1,
        "capped": 0,
        "pairs": 1,
        "chosen_tokens": 2,
    }
    pairs, audit = select("pairs", {"a": SIX}, PROMPTS, PairsConfig(k=4, max_tokens=10, max_pairs=4))
    assert (len(pairs), audit["capped"]) == (4, 0)


def test_cap_is_random_but_seeded():
    samples, config = (
        {"a": [sample(t, float(t % 2)) for t in range(5, 15)]},
        PairsConfig(k=9, max_tokens=10, max_pairs=3),
    )
    first, audit = select("pairs", samples, PROMPTS, config, seed=1)
    assert (len(first), audit["capped"]) == (3, 2)
    assert first == select("pairs", samples, PROMPTS, config, seed=1)[0]


def test_no_pair_at_all_says_why_and_what_to_do():
    with pytest.raises(ValueError, match=r"1 problems have no right answer.*; raise sampling\.n or .*problems$"):
        made("pairs", [sample(5, 0.0)])
    with pytest.raises(ValueError, match=r"; lower pairs\.eta, raise sampling\.n"):
        made("margin", [sample(5, 0.0)])
    with pytest.raises(ValueError, match="no gold solution to train on: the task has 0"):
        select("gold", {}, PROMPTS, PairsConfig())
    with pytest.raises(ValueError, match="the task has 1, and 1 exceed pairs.max_tokens"):
        select("gold", {}, with_gold({"a": GOLD}), PairsConfig(max_tokens=3))


def test_distinct_keeps_the_first():
    rows = [sample(5, 1.0, sample=0), sample(6, 1.0, sample=1), sample(5, 1.0, sample=2)]
    assert [s.sample for s in distinct(rows)] == [0, 1]
