"""The embedded task and its M_0: disjoint splits, two hands, and every step's truth in either."""

import hashlib
import json
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.extras.seed_model import solve, summary
from irpo_utils.files import ConfigError
from irpo_utils.model.packaged import SEED_MODEL
from irpo_utils.run.presets import load_preset
from irpo_utils.settings import TaskConfig
from irpo_utils.tasks import get_task
from irpo_utils.tasks.base import SPLITS
from irpo_utils.tasks.grading import reward
from irpo_utils.tasks.stories import (
    BUCKETS,
    MAX_VALUE,
    PAIRS,
    TWIN,
    WORDINGS,
    Event,
    Stories,
    Story,
    careless_choice,
    check,
    draw_problems,
    draw_story,
    make_problem,
    marked_answer,
    misreading_rate,
    story_of,
    value,
)

CONFIG = TaskConfig(train_size=60, dev_size=20, test_size=20, guessable_share=0.2)
EVENTS = (Event("half", 0, 2), Event("boxes", 0, 3, 4), Event("apart", 0, 5, who="Ben"), Event("times", 0, 2))
STORY = Story("Ann", "pens", 12, EVENTS, False)  # 12 / 2 = 6, 6 + 12 = 18, Ben's 5 do not count, 18 * 2 = 36
drawn_stories = st.builds(
    lambda seed, length: draw_story(random.Random(seed), (length,), 0.2), st.integers(0, 10**6), st.integers(2, 6)
)


def numbers(text):
    return [int(word) for word in text.split() if word.isdigit()]


@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 9)), max_size=5), st.integers(0, 60))
def test_an_expression_comes_to_what_python_says(operations, start):
    text = " ".join([str(start), *(f"{operator} {number}" for operator, number in operations)])
    assert value(text) == eval(text.replace("/", "//"))


def test_splits_share_no_problem_even_under_other_names():
    keys = {split: {story.key() for _, story in draw_problems(split, 200, 0, 0.5)} for split in BUCKETS}
    assert all(len(own) == 200 for own in keys.values())
    for one, other in product(keys, repeat=2):
        assert one == other or keys[one].isdisjoint(keys[other])


def test_problems_are_the_same_every_time_and_others_with_another_seed():
    task = get_task(CONFIG)
    assert task.problems("train") == get_task(CONFIG).problems("train")
    assert get_task(CONFIG.but(seed=1)).problems("train") != task.problems("train")
    assert all(len(story_of(p).events) > 4 for p in task.problems("long"))


def test_gold_is_right_in_every_step_and_by_another_hand():
    task = get_task(CONFIG)
    for problem in (p for split in (*SPLITS, "long") for p in task.problems(split)):
        assert task.equal(problem.answer, problem)
        assert reward(task, problem.solution, problem) == 1
        assert {verdict for _, verdict in task.check_steps(problem, problem.solution)} == {"right"}
        own, answer = story_of(problem).solution((False,) * len(story_of(problem).events))
        assert answer == problem.answer
        assert len(problem.solution.split("\n")) <= len(own.split("\n"))
        assert all(
            task.check_lines(problem, text) == [True] * len(text.split("\n")) for text in (own, problem.solution)
        )


def test_guessable_share_is_kept():
    problems = get_task(CONFIG.but(train_size=400, guessable_share=0.3)).problems("train")
    assert 0.2 < sum(story_of(p).guessable for p in problems) / 400 < 0.4


def test_solutions_survive_the_tokenizer_to_the_letter(tokenizer):
    task = get_task(CONFIG)
    for problem in (p for split in (*SPLITS, "long") for p in task.problems(split)):
        careless, _ = story_of(problem).solution((True,) * len(story_of(problem).events))
        for text in (task.prompt(problem), problem.solution, careless):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Final answer: 12", "12"),
        ("final answer:  odd.", "odd"),
        ("Final answer: 3\nno: 3 + 1 = 4\nFinal answer: 4", "4"),
        ("12", None),
        ("Final answer:", None),
        ("Final answer: \n7", None),
        ("", None),
    ],
)
def test_marked_answer(response, answer):
    assert marked_answer(response) == answer


def test_gold_by_hand():
    assert STORY.gold() == "12 / 2 + 3 * 4 = 18\n18 * 2 = 36\nFinal answer: 36"
    assert STORY.solution((False,) * 4)[0].split("\n") == [
        *("12 / 2 = 6", "3 * 4 = 12", "6 + 12 = 18", "18 + 0 = 18", "18 * 2 = 36", "Final answer: 36")
    ]


@given(drawn_stories, st.randoms())
def test_every_reading_stays_in_range_and_is_found(story, rng):
    careless = careless_choice(story, rng)
    solution, _ = story.solution(careless)
    found = check(story, solution)
    assert [verdict == "careless" for verdict in found.events] == list(careless)
    assert all(found.lines) == (not any(careless))
    assert not found.extra
    assert max(numbers(solution)) <= MAX_VALUE
    assert all(numbers(line)[-1] >= 1 for line in solution.split("\n")[:-1])


@pytest.mark.parametrize(
    ("lines", "right", "events"),
    [
        (["12 - 2 + 3 * 4 = 22", "22 * 2 = 44", "Final answer: 44"], [0, 1, 1], "careless right right right"),
        (["12 / 2 + 3 + 4 = 13", "13 * 2 = 26", "Final answer: 26"], [0, 1, 1], "right careless right right"),
        (["12 / 2 = 6", "3 * 4 = 12", "6 + 12 + 5 = 23"], [1, 1, 0], "right other missing missing"),
        (["12 / 2 + 3 * 4 = 18", "18 + 5 = 23", "23 * 2 = 46"], [1, 0, 1], "right right careless right"),
        (["12 / 2 = 6", "3 * 4 = 13", "6 + 13 = 19", "19 * 2 = 38"], [1, 0, 1, 1], "right other right right"),
        (["12 / 2 = six", "6 + 12 = 18"], [0, 0], "other missing missing missing"),
        (["12 / 2 = 6", "Final answer: 6"], [1, 0], "right missing right missing"),
        (
            ["12 / 2 + 3 * 4 = 18", "18 * 2 = 36", "36 + 0 = 36", "Final answer: 36"],
            [1, 1, 0, 1],
            "right right right right",
        ),
        (["12 / 2 + 3 * 4 = 18", "18 * 2 = 36", "Final answer: 37"], [1, 1, 0], "right right right right"),
        ([], [], "missing missing missing missing"),
        (
            ["12 - 2 = 10", "3 * 4 = 12", "10 + 12 = 22", "22 + 0 = 22", "22 * 2 = 44", "Final answer: 44"],
            [0, 1, 1, 1, 1, 1],
            "careless right right right",
        ),
        (
            ["12 / 2 = 6", "3 + 4 = 7", "6 + 7 = 13", "13 + 0 = 13", "13 * 2 = 26", "Final answer: 26"],
            [1, 0, 1, 1, 1, 1],
            "right careless right right",
        ),
        (["12 / 2 = 6", "3 + 4 = 7", "6 + 12 = 18"], [1, 0, 0], "right other missing missing"),
        (["12 / 2 = 6", "", "3 * 4 = 12", "6 + 12 = 18"], [1, 1, 1], "right right missing missing"),
    ],
)
def test_solutions_by_either_hand_are_checked_line_by_line(lines, right, events):
    found = check(STORY, "\n".join(lines))
    assert found.lines == tuple(map(bool, right))
    assert found.events == tuple(events.split())


def test_what_need_not_be_written_may_be_left_out_and_what_must_may_not():
    apart, joins = (Story("Ann", "pens", 12, (Event(kind, 0, 5, who="Ben"),), False) for kind in ("apart", "joins"))
    assert check(apart, "Final answer: 12").events == ("right",)
    assert check(joins, "Final answer: 12") == ((False,), ("careless",), False)
    assert check(apart, "12 + 5 = 17\nFinal answer: 17").events == ("careless",)


def test_lines_that_are_too_many_are_extra():
    task, problem, text = Stories(CONFIG), make_problem("x", STORY), STORY.gold() + "\n36 + 1 = 37"
    assert task.check_steps(problem, text)[-1] == ("extra", "other")
    assert task.check_lines(problem, text) == [True, True, True, False]


def test_every_kind_has_a_twin_and_its_misreadings_depend_on_the_context():
    assert set(TWIN) == set(WORDINGS) and all(TWIN[TWIN[kind]] == kind != TWIN[kind] for kind in TWIN)
    for kind in WORDINGS:
        contexts = product(range(3), (3, 8), (3, 6), range(3))
        rates = [misreading_rate(Event(kind, wording, a, b), place) for wording, a, b, place in contexts]
        assert min(rates) < 0.5  # no kind is always read wrongly
        assert max(rates) - min(rates) > 0.2
    assert {kind for pair in PAIRS for kind in pair} < set(TWIN)


def test_the_shipped_model_has_its_recorded_hash_and_meets_the_criteria(seed_model, tokenizer):
    facts = json.loads((SEED_MODEL / "facts.json").read_text())
    assert hashlib.sha256((SEED_MODEL / "model.safetensors").read_bytes()).hexdigest() == facts["sha256"]
    assert all(facts["met"].values())
    task = get_task(TaskConfig(dev_size=100))
    share = summary(solve(seed_model, tokenizer, task, task.problems("dev"), 4), 4)["every step right"]
    assert 0.3 <= share <= 0.55  # of the first hundred; facts.json has all 300


def test_the_preset_tests_on_longer_stories_and_other_test_sets_are_refused():
    assert load_preset("tiny", []).evaluation.test == ("long",)
    with pytest.raises(ConfigError, match="evaluation.test: short is no further test set of stories.*long"):
        load_preset("tiny", ["evaluation.test=short"])
