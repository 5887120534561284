"""Tasks that read records, and one's own: disjoint splits, gold that grades right, errors that name the line."""

import copy
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from irpo_utils.model.prompts import encode_prompts
from irpo_utils.settings import EvaluationConfig, TaskConfig
from irpo_utils.tasks import check_task, get_task
from irpo_utils.tasks.base import SPLITS, Problem
from irpo_utils.tasks.grading import reward
from irpo_utils.tasks.jsonl import Given
from irpo_utils.tasks.records import alike, further_tests


def write_splits(folder, **lines):
    good = {s: [f'{{"question": "{s} 1+1?", "answer": "2", "solution": "It is 2."}}'] for s in SPLITS}
    for split, text in (good | lines).items():
        (folder / f"{split}.jsonl").write_text("\n".join(text) + "\n")
    files = {split: [str(folder / f"{split}.jsonl")] for split in SPLITS}
    return TaskConfig(name="jsonl", train_size=0, dev_size=0, test_size=0, **files)


def test_own_problems_from_json_lines(tmp_path):
    task = get_task(write_splits(tmp_path))
    (problem,) = task.problems("train")
    assert problem.solution == "It is 2.\nFinal answer: 2"
    assert reward(task, problem.solution, problem) == 1.0
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
    assert get_task(write_splits(tmp_path)).equal(answer, Problem("", "", gold)) is same


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"train": ["{oops"]}, "train.jsonl, line 1: not JSON"),
        ({"train": ['{"question": "q", "answer": "a"}', '{"question": "q"}']}, "train.jsonl, line 2: expected"),
        ({"dev": ['{"question": "q", "answer": true}']}, "dev.jsonl, line 1: answer must be text"),
        ({"dev": ["[1]"]}, "dev.jsonl, line 1: expected"),
        ({"dev": ['{"question": "train 1+1?", "answer": "2"}']}, "task.train: no problem is left"),
        ({"test": []}, "test.jsonl has no problem"),
        (
            {"test": ['{"question": "q", "answer": "2", "soluton": ""}']},
            "test.jsonl, line 1: no field is called 'soluton'",
        ),
        (
            {"test": ['{"question": "q", "answer": "2", "solution": "Final answer: 3"}']},
            "ends in '3', the answer is '2'",
        ),
    ],
)
def test_bad_own_problems(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        get_task(write_splits(tmp_path, **lines)).problems("train")


SUMS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 21)]


def test_problems_in_memory_leave_a_quarter_to_test_on():
    task = Given(SUMS)
    train, test = task.problems("train"), task.problems("test")
    assert len(train) == 15 and len(test) == 5 and task.problems("dev") == []
    assert {p.question for p in train + test} == {row["question"] for row in SUMS}
    again = Given(SUMS[::-1])  # which ones is not a matter of their order
    assert [p.question for p in again.problems("test")] == [p.question for p in test]
    assert reward(task, f"It is so.\nFinal answer: {test[0].answer}", test[0]) == 1.0


def test_problems_in_memory_with_others_to_test_on():
    task = Given(SUMS, test=[{"question": "what is 3 + 3", "answer": "6"}])
    assert len(task.problems("train")) == 19  # the tested question is not among them
    assert [p.question for p in task.problems("test")] == ["what is 3 + 3"]


@pytest.mark.parametrize(
    ("problems", "test", "message"),
    [
        ([{"question": "q"}], None, 'train problem 1: expected an object with "question", "answer"'),
        ([SUMS[0], {"question": "q", "answer": [5]}], None, "train problem 2: answer must be text"),
        (SUMS, [{"question": "q", "answer": "5", "solution": "Final answer: 6"}], "test problem 1: .* ends in '6'"),
        (SUMS[:1], None, "0 problems are left to train on and 1 to test on"),
        (SUMS, [], "20 problems are left to train on and 0 to test on"),
        (SUMS[:1], SUMS[:1], "0 problems are left to train on"),
    ],
)
def test_bad_problems_in_memory(problems, test, message):
    with pytest.raises(ValueError, match=message):
        Given(problems, test).problems("train")


def test_a_size_beyond_the_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task.dev_size: 9 is more than the 1 problems"):
        get_task(write_splits(tmp_path).but(dev_size=9)).problems("train")


def test_a_chat_template_is_used_and_adds_no_second_bos(tmp_path, tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    task = get_task(write_splits(tmp_path))
    ids = encode_prompts(task, chat, task.problems("train"))["train-1"]
    assert ids.count(chat.bos_token_id) == 1
    assert ids == encode_prompts(task, tokenizer, task.problems("train"))["train-1"]


def records(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def gsm8k_rows(first, count):
    return [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1:,}.\n#### {i + 1:,}"}
        for i in range(first, first + count)
    ]


def test_dev_comes_out_of_training_and_no_question_is_in_two_splits(tmp_path):
    train, test = records(tmp_path, "a.jsonl", gsm8k_rows(0, 50)), records(tmp_path, "b.jsonl", gsm8k_rows(40, 20))
    config = TaskConfig(name="gsm8k", train=train, test=test, train_size=0, dev_size=10, test_size=0)
    task = get_task(config)
    train_questions, dev_questions, test_questions = ({p.question for p in task.problems(split)} for split in SPLITS)
    assert (len(train_questions), len(dev_questions), len(test_questions)) == (30, 10, 20)
    assert train_questions.isdisjoint(dev_questions | test_questions) and dev_questions.isdisjoint(test_questions)
    assert task.notes == ["task.train: 10 questions of dev or test are left out of training"]
    assert task.problems("train") == get_task(config).problems("train")
    assert get_task(config.but(seed=1)).problems("dev") != task.problems("dev")
    assert get_task(config.but(train_size=7)).problems("train") == task.problems("train")[:7]


def test_test_problems_come_out_of_training_too_where_there_is_no_file_of_them(tmp_path):
    rows = [{"question": f"How many are {i}?", "answer": i} for i in range(40)] + [
        {"question": "how many are 3", "answer": 3}
    ]
    config = TaskConfig(name="jsonl", train=records(tmp_path, "a.jsonl", rows), train_size=0, dev_size=5, test_size=12)
    task = get_task(config)
    asked = {split: {p.question.strip("?").lower() for p in task.problems(split)} for split in SPLITS}
    assert (len(task.problems("dev")), len(task.problems("test"))) == (5, 12)
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 40
    assert get_task(config.but(test_size=20)).problems("test")[:12] == task.problems("test")
    with pytest.raises(
        ValueError, match=r"task\.test_size: 41 of the 41 training problems cannot be held out; 1 to 40 can"
    ):
        get_task(config.but(test_size=41)).problems("test")


def test_a_task_with_sources_of_its_own_is_not_tested_on_what_it_trains_on(tmp_path):
    train = records(tmp_path, "a.jsonl", gsm8k_rows(0, 20))
    with pytest.raises(ValueError, match=r"task\.test: this task needs a file"):
        get_task(TaskConfig(name="mmlu_math", train=train, train_size=0, dev_size=2, test_size=3)).problems("test")


def test_gold_gsm8k_solutions_lose_their_calculator_marks_and_end_marked(tmp_path):
    train, test = records(tmp_path, "a.jsonl", gsm8k_rows(1000, 9)), records(tmp_path, "b.jsonl", gsm8k_rows(0, 2))
    task = get_task(TaskConfig(name="gsm8k", train=train, test=test, train_size=0, dev_size=1, test_size=0))
    problem = task.problems("train")[0]
    assert problem.solution == f"It is {int(problem.answer):,}.\nFinal answer: {int(problem.answer):,}"
    assert reward(task, problem.solution, problem) == 1.0


def test_parquet_and_json_lines_give_the_same_problems(tmp_path):
    import pandas as pd

    rows = [
        {
            "id": str(i),
            "question": f"q{i}",
            "choices": {"text": ["x", "y", "z"][: 2 + i % 2], "label": labels},
            "answerKey": labels[1],
        }
        for i, labels in enumerate([["A", "B"], ["1", "2", "3"]] * 6)
    ]
    lines = records(tmp_path, "a.jsonl", rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    other = records(tmp_path, "t.jsonl", [{**rows[0], "question": "another"}])
    config = TaskConfig(name="arc_challenge", test=other, train_size=0, dev_size=2, test_size=0)
    sources = lines, str(tmp_path / "a.parquet")
    found = [get_task(config.but(train=source)).problems("train") for source in sources]
    assert found[0] == found[1] and len(found[0]) == 10
    assert {p.answer for p in found[0]} == {"B"}  # label 2 is B
    three = next(p for p in found[0] if "z" in p.question)
    assert three.question.endswith("\n\n(A) x\n(B) y\n(C) z")


def test_math_examples_are_in_every_prompt_and_not_trained_on(tmp_path):
    rows = [
        {
            "problem": f"Find {i}+1.",
            "level": "1",
            "type": f"kind {i % 5}",
            "solution": "We add one. " * 15 + f"So it is $\\boxed{{{i + 1}}}$.",
        }
        for i in range(30)
    ]
    train, test = records(tmp_path, "a.jsonl", rows[:25]), records(tmp_path, "b.jsonl", rows[25:])
    task = get_task(TaskConfig(name="math", train=train, test=test, train_size=0, dev_size=5, test_size=0))
    assert [len(task.problems(split)) for split in SPLITS] == [16, 5, 5]
    assert len({p.meta["type"] for p in task.shots}) == len(task.shots) == 4
    for problem in task.problems("train"):
        assert all(shot.question in task.prompt(problem) and shot != problem for shot in task.shots)
        assert task.prompt(problem).count("Problem:") == 5
    fewer = get_task(task.config.but(train_size=3))
    (further,) = further_tests(fewer, EvaluationConfig(test=(train,))).values()
    (tmp_path / "more").mkdir()
    twice = further_tests(fewer, EvaluationConfig(test=(train, records(tmp_path / "more", "a.jsonl", rows[:25]))))
    assert len({p.id for problems in twice.values() for p in problems}) == 2 * len(further)
    assert len(further) == 25 - 5 - 3 - 4 and not {p.question for p in further} & {p.question for p in fewer.shots}


def test_two_questions_are_one_where_only_case_space_and_punctuation_differ():
    assert alike("What is 1.5 + 2?") == alike("what is 1.5+2 ") != alike("What is 15 + 2?")
    assert alike("Don't stop: 3.") == alike("dont stop 3") and alike("Find f'(2).") != alike("Find f(2).")
    assert alike("Find n!") != alike("Find n") and alike("Go!") == alike("Go")
    assert alike("y'' + y") != alike("y' + y") != alike("y + y") and alike("What is .5?") != alike("What is 5?")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "no mark"}, 'line 1: the answer does not end in "#### n"'),
        ("gsm8k", {"question": "q", "answer": "#### many"}, "line 1: the gold answer ' many' is not a number"),
        ("gsm8k", {"question": "q"}, 'line 1: expected an object with "question", "answer"'),
        ("math", {"problem": "p", "solution": "It is 5."}, "line 1: the solution has no .boxed"),
        (
            "jsonl", {"question": "q", "answer": "So it is.\n#### 5"},
            "line 1: the answer must be the final answer alone",
        ),
        (
            "arc_challenge",
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"},
            "same label",
        ),
        (
            "arc_challenge",
            {"question": "q", "choices": {"text": ["a", None], "label": ["A", "B"]}, "answerKey": "A"},
            "must be text",
        ),
        ("math", {"problem": "p", "solution": "no box \\boxed{"}, "line 1: no whole .boxed"),
        ("arc_challenge", {"question": "q", "choices": {"text": ["a"]}, "answerKey": "A"}, "line 1: choices: expected"),
        (
            "arc_challenge",
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"},
            "'C' is not the label",
        ),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named_with_its_line(name, row, message, tmp_path):
    path = records(tmp_path, "a.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        get_task(TaskConfig(name=name, train=path, test=path, train_size=0, dev_size=1, test_size=0)).problems("train")


def test_what_cannot_be_had_from_the_hub_is_named_with_the_mend():
    code = (
        "from irpo_utils.model.load import load_tokenizer\n"
        "from irpo_utils.settings import ModelConfig, TaskConfig\n"
        "from irpo_utils.tasks import get_task\n"
        "try: get_task(TaskConfig(name='gsm8k')).problems('train')\n"
        "except ValueError as e: print(e)\n"
        "try: load_tokenizer(ModelConfig(path='Qwen/Qwen9'))\n"
        "except ValueError as e: print(e)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    data, model = done.stdout.splitlines()
    assert data.startswith("task.test: the data set 'openai/gsm8k:main:test' could not be loaded from the hub")
    assert data.endswith("give a local file instead, as in task.test=path/to/file.jsonl")
    assert model.startswith("model.path: 'Qwen/Qwen9' could not be loaded")
    assert model.endswith("or give a folder, as in model.path=/models/my-model")


def test_the_documented_task_class_works(tmp_path):
    blocks = (ROOT / "irpo_utils/site/pages/extending.md").read_text().split("```python\n")[1:]
    (source,) = (block.partition("```")[0] for block in blocks if "class Sums" in block.partition("```")[0])
    (tmp_path / "my_task.py").write_text(source)
    task = get_task(TaskConfig(name=f"{tmp_path / 'my_task.py'}:Sums", train_size=5, dev_size=2, test_size=2))
    problem = task.problems("train")[3]
    assert reward(task, "3 and 3 is 6. Final answer: 6", problem) == 1.0
    assert reward(task, "six", problem) is None
    with pytest.raises(ValueError, match="has no 'Sum'"):
        get_task(TaskConfig(name=f"{tmp_path / 'my_task.py'}:Sum"))


OWN = """
from irpo_utils.tasks import Problem, Task
class Own(Task):
    def __init__(self, config): pass
    def problems(self, split): return [Problem(f"{split}-{i}", f"{split} {i}?", str(i)) for i in range(3)]
    def prompt(self, problem): return problem.question
    def extract(self, response, problem, flexible=False): return response[-1:]
    def equal(self, answer, problem): return answer == problem.answer
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("class Own(Task):", "class Own(:", "task.name: .*my_task.py fails: SyntaxError"),
        ("class Own(Task):", "class Own:", "my_task.py:Own is no task; .* write class Own\\(Task\\)"),
        ("class Own(Task):", "Own = 5\nclass Other(Task):", "my_task.py:Own is no task"),
        ("class Own(Task):", "class Other(Task):", "task.name: .*my_task.py has no 'Own'"),
        ("pass", "raise KeyError(1)", "my_task.py:Own fails: KeyError"),
        ("pass", "raise SystemExit", "my_task.py:Own fails: SystemExit"),
        ("Problem(f", "print(f", "must give at least one irpo_utils.tasks.Problem"),
        ('Problem(f"{split}-{i}"', 'Problem("same"', "two problems have the id 'same'"),
        ('f"{split} {i}?"', 'f"{i}?"', "two problems have the question '0\\?'"),
        (
            'f"{split} {i}?"',
            "f\"{split} {i} {id(object())} {__import__('random').random()}?\"",
            "same order every time",
        ),
        ("str(i))", "i)", "prompt, answer, solution and what extract finds must be text"),
        ("return problem.question", "return None", "prompt, answer, solution and what extract finds must be text"),
        ("def prompt(", "def promt(", "my_task.py:Own fails: TypeError: .* abstract method '?prompt"),
        (", flexible=False", "", "on the problem train-0, fails: TypeError"),
        ("return response[-1:]", "return response[99]", "on the problem train-0, fails: IndexError"),
    ],
)
def test_a_class_of_ones_own_is_looked_at_before_a_run(old, new, message, tmp_path):
    (tmp_path / "my_task.py").write_text(OWN.replace(old, new) if old else OWN)
    config = TaskConfig(name=f"{tmp_path / 'my_task.py'}:Own")
    if message is None:
        assert [len(problems) for problems in check_task(get_task(config), config.name).values()] == [3, 3, 3]
        return
    with pytest.raises(ValueError, match=message):
        check_task(get_task(config), config.name)


def test_answers_of_a_file_vote_together_however_they_are_written():
    task = Given(SUMS)
    problem = task.problems("train")[0]
    spellings = [problem.answer, f"{problem.answer}.0", f"{problem.answer} apples", f"${problem.answer}"]
    assert all(task.equal(spelling, problem) for spelling in spellings)
    assert len({task.vote(spelling) for spelling in spellings}) == 1
    assert task.vote("North West.") == task.vote(" north  west")


def test_a_task_has_defaults_for_what_it_need_not_write(tmp_path):
    (tmp_path / "my_task.py").write_text(OWN)
    task = get_task(TaskConfig(name=f"{tmp_path / 'my_task.py'}:Own"))
    one, two = task.problems("train")[:2]
    assert task.equal_all(["0", "0"], [one, two]) == [True, False]
    assert (task.vote("0"), task.undecided, list(task.notes), task.own_processes) == ("0", 0, [], False)
    assert task.chance(one) is task.check_steps(one, "0") is task.check_lines(one, "0") is None


def test_numbers_and_other_fields_in_records_are_fine(tmp_path):
    rows = [
        {"id": i, "source": "mine", "question": f"What is {i} + {n}?", "answer": i + n}
        for n in (0.5, 1)
        for i in range(6)
    ]
    for name, part in (("train", rows[:9]), ("test", rows[9:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    files = {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("train", "test")}
    task = get_task(TaskConfig(name="jsonl", **files, train_size=0, dev_size=2, test_size=0))
    problems = check_task(task, "jsonl")
    assert {p.answer for p in problems["test"]} == {"4", "5", "6"}
    assert all(task.equal(p.answer, p) for split in problems.values() for p in split)
