"""The embedded task: disjoint splits, gold that grades right, steps judged on the truth, answers in three classes."""

import copy
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.answers import marked_answer, reward
from irpo_utils.config import TaskConfig
from irpo_utils.stages import encode_prompts
from irpo_utils.tasks import SPLITS, get_task
from irpo_utils.tasks.word_problems import BUCKETS, MAX_VALUE, careless_choice, draw_problems, draw_story, story_of


def test_splits_share_no_problem_even_under_other_names():
    keys = {split: {story.key() for _, story in draw_problems(split, 400, 0, 0.5)} for split in BUCKETS}
    for split, mine in keys.items():
        assert len(mine) == 400
        for other, theirs in keys.items():
            assert split == other or mine.isdisjoint(theirs)


def test_problems_are_the_same_every_time_and_others_with_another_seed(config):
    task, again = get_task(config.task), get_task(config.task)
    assert task.problems("train") == again.problems("train")
    assert get_task(replace(config.task, seed=1)).problems("train") != task.problems("train")


def test_every_gold_answer_grades_right_and_every_step_of_it(task):
    for split in SPLITS:
        for problem in task.problems(split):
            assert task.equal(problem.answer, problem.answer)
            assert reward(task, problem.solution, problem.answer) == 1.0
            assert {verdict for _, verdict in task.judge_steps(problem, problem.solution)} == {"right"}


@given(st.integers(0, 10_000))
def test_careless_steps_are_judged_careless_and_values_stay_in_range(seed):
    rng = random.Random(seed)
    story = draw_story(rng, 0.5)
    careless = careless_choice(story, rng)
    solution, _ = story.solution(careless)
    from irpo_utils.tasks.word_problems import WordProblems, make_problem

    verdicts = WordProblems(None).judge_steps(make_problem("x", story), solution)
    assert [v == "careless" for _, v in verdicts] == list(careless)
    numbers = [int(w) for w in solution.split() if w.isdigit()]
    assert all(0 <= n <= MAX_VALUE for n in numbers)


def test_garbled_and_missing_steps_are_told_apart(task):
    problem = task.problems("train")[0]
    first, rest = problem.solution.split("\n", 1)
    garbled = task.judge_steps(problem, first + "1\n" + rest)
    assert garbled[0][1] == "other"
    assert task.judge_steps(problem, "")[-1][1] in ("other", "missing")


def test_solutions_survive_the_tokenizer_to_the_letter(task, tokenizer):
    for problem in task.problems("train"):
        for text in (task.prompt(problem), problem.solution):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids


def test_guessable_share_is_kept(config):
    task = get_task(replace(config.task, train_size=400, guessable_share=0.3))
    share = sum(story_of(p).guessable for p in task.problems("train")) / 400
    assert 0.2 < share < 0.4


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


def write_splits(folder, **lines):
    good = {s: [f'{{"question": "{s} 1+1?", "answer": "2", "solution": "It is 2."}}'] for s in SPLITS}
    for split, text in (good | lines).items():
        (folder / f"{split}.jsonl").write_text("\n".join(text) + "\n")
    return TaskConfig(name="jsonl", path=str(folder), train_size=0, dev_size=0, test_size=0)


def test_own_problems_from_json_lines(tmp_path):
    task = get_task(write_splits(tmp_path))
    (problem,) = task.problems("train")
    assert problem.solution == "It is 2.\nFinal answer: 2"
    assert reward(task, problem.solution, problem.answer) == 1.0
    assert "train 1+1?" in task.prompt(problem)


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("1,200.0", "1200", True),
        ("$5", "5.00", True),
        ("Odd", "odd", True),
        ("6", "7", False),
        ("nan", "nan", True),
        ("", "0", False),
    ],
)
def test_own_answers_compare_as_numbers_or_text(tmp_path, answer, gold, same):
    assert get_task(write_splits(tmp_path)).equal(answer, gold) is same


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"train": ["{oops"]}, "train.jsonl, line 1: expected"),
        ({"train": ['{"question": "q", "answer": "a"}', '{"question": "q"}']}, "train.jsonl, line 2: expected"),
        ({"dev": ['{"question": "q", "answer": 3}']}, "dev.jsonl, line 1: answer must be text"),
        ({"dev": ["[1]"]}, "dev.jsonl, line 1: expected"),
        ({"dev": ['{"question": "train 1+1?", "answer": "2"}']}, "train and dev share 1 question"),
        ({"test": []}, "test.jsonl has no problem"),
        ({"test": ['{"question": "q", "answer": "2", "soluton": ""}']}, "test.jsonl, line 1: expected"),
        (
            {"test": ['{"question": "q", "answer": "2", "solution": "Final answer: 3"}']},
            "ends in '3', the answer is '2'",
        ),
        ({"test": ['{"question": "q", "answer": "2"}'] * 2}, "line 2: the question is there already"),
    ],
)
def test_bad_own_problems(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        get_task(write_splits(tmp_path, **lines))


def test_a_size_beyond_the_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task.dev_size: 9 is more than the 1 of"):
        get_task(replace(write_splits(tmp_path), dev_size=9))


def test_a_chat_template_is_used_and_adds_no_second_bos(tmp_path, tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    task = get_task(write_splits(tmp_path))
    ids = encode_prompts(task, chat, task.problems("train"))["train-1"]
    assert ids.count(chat.bos_token_id) == 1
    assert ids == encode_prompts(task, tokenizer, task.problems("train"))["train-1"]
