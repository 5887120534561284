"""CaP: attempts at a problem, answered by a program: what it comes to, who is right, and the way into a run."""

import random

import pytest
from conftest import drive, remove_run
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.extras.code.sandbox import ISOLATED, Refused
from irpo_utils.extras.refine import computed, program_of
from irpo_utils.files import OUTPUTS, read_jsonl, write_jsonl
from irpo_utils.settings import TaskConfig
from irpo_utils.tasks import check_task, get_task
from irpo_utils.tasks.grading import grade
from irpo_utils.tasks.stories import draw_story, marked_answer

RECORD = {"question": "What is half of 12, and 3 more?", "answer": "9", "attempt": "12 / 2 = 6\nFinal answer: 6"}


def program(body):
    return f"The attempt forgets the 3.\n```python\ndef solution():\n    {body}\n```"


@pytest.fixture
def refined(tmp_path, execution):
    """The task of one record."""

    def made(name, **changes):
        write_jsonl(tmp_path / "problems.jsonl", [RECORD | changes])
        config = TaskConfig(name=name, train=str(tmp_path / "problems.jsonl"), execution=execution)
        task = get_task(config)
        return task, task._read("train")[0]

    return made


@pytest.mark.parametrize(
    ("response", "worth"),
    [
        (program("return 12 / 2 + 3"), 1),
        (program("return '9.0'"), 1),
        (program("return 6"), 0),
        (program("return float('nan')"), 0),
        (program("return None"), 0),
        (program("while True: pass"), 0),
        (program("return 9.00001"), 0),
        ("solution = 9\nFinal answer: 9", 1),
        ("Final answer: solution = 8", 0),
        (program("return Any()") + "\n```python\nclass Any:\n    def __eq__(self, other): return True\n```", 0),
        ("12 / 2 + 3 = 9\nFinal answer: 9", 1),
        ("Final answer: 8", 0),
        ("It is 9.", None),
        ("```python\nprint(9)\n```", None),
    ],
)
def test_a_program_is_right_if_it_returns_the_answer(refined, response, worth):
    task, problem = refined("refined")
    assert [verdict.reward for verdict in grade(task, [response], [problem])] == [worth]


@pytest.mark.parametrize(
    ("response", "worth"),
    [
        ("12 / 2\n + 3", 1),
        ("1\n / 3\n * 27", 1),
        ("12 / 2 + 3", 1),
        ("12 + 2\n / 2\n + 2", 1),  # line by line: (12 + 2) / 2 + 2
        ("12 + 2 / 2 + 2", 0),
        ("12 / 2", 0),
        ("12 / 2 = 6\nFinal answer: 9", None),
        ("12 / 0", None),
        (" + 12", None),
        ("12\n 3", None),
        ("", None),
    ],
)
def test_lines_of_arithmetic_go_on_from_what_came_before(refined, response, worth):
    task, problem = refined("refined_stories")
    assert [verdict.reward for verdict in grade(task, [response], [problem])] == [worth]


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_a_story_s_program_comes_to_its_answer(seed, length):
    story = draw_story(random.Random(seed), (length,), 0.0)
    assert computed(program_of(story)) == story.solution((False,) * length)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "odd"}, "line 1: the answer of a program must be a number, got 'odd'"),
        ({"attempt": " "}, "line 1: attempt must be text that is not empty"),
        ({"attempt": "\ud800"}, r"line 1: attempt has characters that are no text"),
        ({"solution": "nothing"}, "line 1: the solution is no program, and has no final answer"),
        ({"solution": "Final answer: 8"}, "line 1: the solution comes to '8', the answer is '9'"),
        ({"solution": program("return (")}, "line 1: the solution is no Python: "),
    ],
)
def test_a_bad_record_is_named(refined, changes, message):
    with pytest.raises(ValueError, match=message):
        refined("refined", **changes)


def test_a_wrong_gold_program_of_a_story_is_named(refined):
    with pytest.raises(ValueError, match="line 1: the solution comes to '10', the answer is '9'"):
        refined("refined_stories", solution="12 - 2")


def test_where_programs_cannot_be_run_a_task_is_refused_at_once(refined, monkeypatch):
    task, problem = refined("refined", answer="10")
    monkeypatch.setenv("PATH", "")
    isolated = get_task(task.config.but(execution=ISOLATED))
    with pytest.raises(Refused, match="bwrap is not installed"):
        isolated.equal("1", problem)


def test_equal_answers_are_one_vote(refined):
    task, _ = refined("refined")
    assert task.vote("9.0") == task.vote("9") != task.vote("def solution():\n    return 9")


def test_a_run_s_solutions_become_problems_that_a_run_is_trained_on(micro_run, tmp_path):
    run, folder = micro_run[0], tmp_path / "data"
    done = drive("attempts", run.name, str(folder))
    assert done.returncode == 0, done.stderr
    test = read_jsonl(folder / "test.jsonl", "")
    right = sum(marked_answer(row["attempt"]) == row["answer"] for row in test)
    assert f"test.jsonl: {len(test)} problems, {right} of whose attempts are right" in done.stdout
    drawn = {row["response"] for row in read_jsonl(run / "m0/seed_0/samples.jsonl", "") if row["sample"] == 0}
    train = read_jsonl(folder / "train.jsonl", "")
    assert 30 < len(train) <= 48 and {row["attempt"] for row in train} <= drawn
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")}
    task = get_task(TaskConfig(name="refined_stories", train_size=0, dev_size=0, test_size=0, **files))
    problems = check_task(task, "refined_stories")["train"]
    assert len(problems) == len(train)  # none asks what another split asks
    verdicts = grade(task, [p.solution for p in problems], problems)
    assert all(verdict.reward == 1 for verdict in verdicts)

    name = "test-refine"
    remove_run(name)
    settings = [f"task.{split}={file}" for split, file in files.items()]
    settings += [f"task.{split}_size=0" for split in files]
    done = drive("micro", f"run={name}", "methods=sft_gold", "iterations=1", "task.name=refined_stories", *settings)
    assert done.returncode == 0, done.stderr
    pairs = read_jsonl(OUTPUTS / name / "sft_gold/seed_0/iteration_1/pairs.jsonl", "")
    attempt = {row["question"]: (row["attempt"], row["solution"]) for row in train}
    for pair in pairs:
        question = pair["prompt"].removeprefix("Question: ").partition("\n")[0]
        assert attempt[question] == (pair["prompt"].split("\nAnswer:\n")[1], pair["chosen"])
    remove_run(name)


def test_there_is_one_error_for_what_cannot_be_refined(micro_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    done = drive("attempts", micro_run[0].name, str(tmp_path / "full"))
    assert done.returncode == 2 and "full is not empty; name a new folder" in done.stderr
    done = drive("attempts", micro_run[0].name, str(tmp_path / "new"), "iteration=9")
    assert done.returncode == 2 and "no such method, seed or iteration: iteration=9" in done.stderr
    done = drive("attempts", micro_run[0].name, str(tmp_path / "new"), "method=sft_gold")
    assert done.returncode == 2 and "round 1 of sft_gold draws no samples; take one that does" in done.stderr
    config = micro_run[0] / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("train_size: 48", "train_size: 40"))
    done = drive("attempts", micro_run[0].name, str(tmp_path / "new"))
    config.write_text(before)
    assert done.returncode == 2 and "01_sample: task.train_size 48 -> 40" in done.stderr
    assert not (tmp_path / "new").exists()
