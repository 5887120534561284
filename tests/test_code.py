"""MBPP, HumanEval and MMLU_Math: where the program is in a response, gold that passes, splits, and the command line."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA, ROOT
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.extras.code.sandbox import ACCEPTED
from irpo_utils.extras.code.tasks import called
from irpo_utils.metrics import summarize
from irpo_utils.run.grade import Malformed, read_records
from irpo_utils.settings import TaskConfig
from irpo_utils.tasks import check_task, get_task
from irpo_utils.tasks.grading import grade, reward

# All golds, in each of the forms that a response may have: 1,466 programs. Else a sample.
GOLD = os.environ.get("GOLD") == "all"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark records are not at {DATA}")
UPSTREAM = Path(__file__).parent / "upstream"  # records made by hand in the form of each data set
MBPP = {
    "task_id": 2,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\r\n\treturn a + b",
    "test_setup_code": "",
    "test_list": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0"],
}
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "prompt": "from typing import List\n\ndef zero():\n    return 0\n\n\n"
    'def add(a: int, b: int) -> int:\n    """ Add.\n    >>> add(1, 2)\n    3\n    """\n',
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == zero()\n",
}


def task_of(name, execution=ACCEPTED, **more):
    return get_task(TaskConfig(name=name, execution=execution, **more))


def problem_of(name, record=None):
    return task_of(name).posed("1", "", record or {"mbpp": MBPP, "humaneval": HUMANEVAL}[name])


ADD = "def add(a, b):\n    return a + b"
FENCED = "```python\n" + ADD + "\n```"


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        (FENCED, ADD, ADD),
        (f"First we add.\n\n{FENCED}\nThat is it.", ADD, ADD),
        (FENCED.replace("```", "~~~~"), ADD, ADD),
        (FENCED.replace("python", ""), ADD, ADD),
        (FENCED.replace("python", "Python"), ADD, ADD),
        (f"```bash\npip install x\n```\n{FENCED}", ADD, ADD),
        (f"{FENCED}\nand so\n```python\nprint(add(1, 2))\n```", ADD, ADD),  # the last that defines what is called
        (f"```\ndef add(a, b): return 0\n```\nNo:\n{FENCED}", ADD, ADD),
        ("```\nx = 1\n```\n```\ny = 2\n```", "y = 2", "y = 2"),
        ("1. so\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```", ADD, ADD),
        ('````\nadd = """\n```\n"""\n````', 'add = """\n```\n"""', 'add = """\n```\n"""'),
        (ADD, ADD, ADD),
        (ADD + "\nThis adds.", ADD, ADD),
        (ADD + "\n```\nThis adds.", ADD, ADD),
        (ADD.replace("\n", "\r\n"), ADD, ADD),
        ("import math\n# adds\n" + ADD, "import math\n# adds\n" + ADD, "import math\n# adds\n" + ADD),
        ("Here it is:\n" + ADD, None, ADD),
        ("Here it is:\n```python\n" + ADD, None, ADD),
        ("I do not know.", None, None),
        ("Final answer: 5", None, None),
        ("", None, None),
        ("```python\n```", None, None),
        ("for all of them, it is so", None, None),
    ],
)
def test_where_the_program_is(response, strict, flexible):
    task, problem = task_of("mbpp"), problem_of("mbpp")
    found = [task.extract(response, problem, flexible=loose) for loose in (False, True)]
    assert [f and f.rstrip() for f in found] == [strict, flexible]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("    return a + b\n", True),
        ("    c = a\n    return c + b\n\nprint(add(1, 2))\nAnd that is it.", True),
        (" return a + b", True),  # the tokenizer ate three spaces
        ("return a + b", True),
        ("if a:\n    return a + b\nreturn b", True),
        ("c = a + b\n    return c", True),
        ("```python\n    return a + b\n```", True),
        ("```python\nreturn a + b\n```", True),
        (f"So:\n{FENCED}", True),
        ("def add(a, b):\n    return a + b + zero()", True),  # what stands above the function is there
        ("def add(a: List, b):\n    return a + b", True),
        (
            "def zero():\n    return 7\ndef add(a, b):\n    return 5 if a == 2 else 7",
            False,
        ),  # the tests have their own zero
        ("    pass", False),
        ("It adds the two.", None),
        ("", None),
    ],
)
def test_a_body_or_a_whole_function_completes_a_header(response, right, execution):
    verdict = grade(task_of("humaneval", execution), [response], [problem_of("humaneval")])[0]
    assert verdict.correct is right


@given(st.text(alphabet="`~ \nadef(:)=#\"'xX.,[]{}12\t\\", max_size=80), st.sampled_from(["mbpp", "humaneval"]))
def test_no_text_makes_extraction_fail(text, name):
    task, problem = task_of(name), problem_of(name)
    for response in (text, f"```python\n{text}\n```", f"def add(a, b):\n{text}"):
        strict, flexible = (task.extract(response, problem, flexible=f) for f in (False, True))
        assert strict is None or flexible == strict
        assert strict is None or isinstance(task.vote(strict), str)


REPEATED = [
    "`",
    "~",
    "a",
    " ",
    "\n",
    "\t",
    "a,",
    "a.",
    "[",
    "(",
    ":",
    "a\n",
    "def ",
    "```\n",
    "'''",
    "if a:",
    "x = ",
    "async\n",
]
HOSTILE = [text * 100_000 for text in REPEATED]


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_hostile_text_takes_no_time(name):
    task, problem = task_of(name), problem_of(name)
    for text in HOSTILE:
        for response in (text, f"if {text}", f"def add(a, b):\n    {text}"):
            task.extract(response, problem, flexible=True)


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("assert add(1) == 2", ("add",)),
        ("assert set(similar((1, 2))) == set((1,))", ("similar",)),
        ("assert sum(10, 15) == 6", ("sum",)),
        ("import math\nassert math.isclose(f(2), 3)", ("f",)),
        ("root = Node(1)\nassert height(root) == 1", ("Node", "height")),
        ("assert all(f(x) for x in [1])", ("f",)),
        ("assert math.isclose(f(2), 3)", ("f",)),  # a module's, imported or not
        ("assert f(2) == collections.OrderedDict() and os.path.join(f(1), 'a') == math.pi", ("f",)),
        ("assert copy([1]) == [1] and copy.copy(1) == 1", ("copy",)),  # no module is called
        ("string = 'a'\nassert f(string.upper())", ("f",)),
        ("def same(a, b):\n    return a == b\nassert same(f(1), 2) and sorted(f(2), key=lambda x: -x)", ("f",)),
    ],
)
def test_only_the_program_s_own_names_are_taken_from_it(tests, names):
    assert set(called(tests)) == set(names)


def test_a_program_does_not_lend_the_tests_its_builtins(execution):
    record = MBPP | {"test_list": ["assert set(add([1], [2])) == set([1, 2])"]}
    cheat = "def set(x): return 0\ndef add(a, b): return []"
    assert not task_of("mbpp", execution).equal(cheat, problem_of("mbpp", record))


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
@pytest.mark.parametrize(
    ("tests", "program", "right"),
    [
        ("math.isclose({f}(2, 2), 4.0)", "def add(a, b): return a + b", True),
        ("math.isclose({f}(2, 2), 4.0)", "import math\ndef add(a, b): return a + b", True),
        ("math.isclose({f}(2, 2), 4.0)", "class math:\n    isclose = lambda *a: True\ndef add(a, b): return 5", False),
        ("{f}(2, 2) == operator.add(2, 2)", "class operator:\n    add = lambda *a: 5\ndef add(a, b): return 5", False),
        ("{f}('a', 'b') == urllib.parse.unquote('a%62')", "urllib = 5\ndef add(a, b): return a + b", True),
        ("{f}(sys.version_info.major, 0) == 3", "def add(a, b): return a + b", True),
        ("{f}(sys.version_info.major, 0) == 3", "sys = 5\ndef add(a, b): return 4", False),
    ],
)
def test_a_module_that_the_tests_do_not_import_is_the_library_s_own(name, tests, program, right, execution):
    if name == "mbpp":
        record = MBPP | {"test_list": ["assert " + tests.format(f="add")]}
    else:
        record = HUMANEVAL | {"test": "def check(candidate):\n    assert " + tests.format(f="candidate")}
    assert task_of(name, execution).equal(program, problem_of(name, record)) is right


def test_a_module_of_the_prompt_s_own_is_not_replaced(execution):
    prompt = "class calendar:\n    days = 8\n\n" + HUMANEVAL["prompt"]
    record = HUMANEVAL | {
        "prompt": prompt,
        "test": "def check(candidate):\n    assert candidate(4, 4) == calendar.days",
    }
    assert task_of("humaneval", execution).equal(prompt + "    return a + b", problem_of("humaneval", record))


ODD = {"367", "533", "596", "601", "927", "847", *(f"HumanEval/{i}" for i in (32, 33, 38, 50, 115))}


def check_golds(name, problems, execution, forms):
    """Every gold solution passes its tests; of HumanEval, with `forms`, also a body alone, and code without a fence."""
    task = task_of(name, execution)
    responses, repeated = [p.solution for p in problems], list(problems)
    if name == "humaneval" and forms:
        responses += [p.answer.removeprefix(p.meta["prompt"]) for p in problems] + [p.answer for p in problems]
        repeated += problems * 2
    verdicts = grade(task, responses, repeated)
    assert [p.id for p, v in zip(repeated, verdicts, strict=True) if v.correct is not True] == []
    neither = grade(task, ["```python\npass\n```", "no idea"], problems[:1] * 2)
    assert [v.correct for v in neither] == [False, None]


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_every_gold_solution_in_the_upstream_form_passes_its_tests(name, execution):
    problems = list(task_of(name, test=str(UPSTREAM / f"{name}.jsonl")).named.values())
    assert len(problems) == 20
    check_golds(name, problems, execution, forms=True)


@needs_data
@pytest.mark.parametrize(
    ("name", "file", "count"), [("mbpp", "mbpp.jsonl", 974), ("humaneval", "HumanEval.jsonl.gz", 164)]
)
def test_every_gold_solution_passes_its_tests(name, file, count, execution):
    """Upstream records that cannot pass: none. Without GOLD=all, the odd ones and a tenth of the rest are run."""
    every = list(task_of(name, test=str(DATA / file)).named.values())
    assert len(every) == count
    rng = random.Random(0)
    check_golds(name, [p for p in every if GOLD or p.meta["task_id"] in ODD or rng.random() < 0.1], execution, GOLD)


def check_splits(mbpp, humaneval, dev_size):
    """The ids of MBPP's three splits, and the sizes of HumanEval's, whose training problems are MBPP's."""
    sizes = {"train_size": 0, "dev_size": 0, "test_size": 0}
    task = task_of("mbpp", train=mbpp, dev=mbpp, test=mbpp, **sizes)
    ids = {split: {int(p.meta["task_id"]) for p in task.problems(split)} for split in ("train", "dev", "test")}
    for split in ids:
        for p in task.problems(split):
            assert all(test.strip() in task.prompt(p) for test in p.meta["tests"].splitlines()[-1:])
    human = task_of("humaneval", train=mbpp, test=humaneval, **sizes | {"dev_size": dev_size})
    found = check_task(human, "humaneval")
    assert all(p.meta["prompt"].rstrip() in human.prompt(p) for p in found["test"])
    return ids, {split: len(problems) for split, problems in found.items()}


def test_official_splits_of_the_upstream_form():
    ids, sizes = check_splits(str(UPSTREAM / "mbpp.jsonl"), str(UPSTREAM / "humaneval.jsonl"), dev_size=2)
    assert ids == {"train": set(range(601, 609)), "dev": {511, 512, 513}, "test": {11, 12, *range(100, 105)}}
    assert sizes == {"train": 6, "dev": 2, "test": 20}


@needs_data
def test_official_splits_out_of_one_file():
    ids, sizes = check_splits(str(DATA / "mbpp.jsonl"), str(DATA / "HumanEval.jsonl.gz"), dev_size=20)
    assert ids == {"train": set(range(601, 975)), "dev": set(range(511, 601)), "test": set(range(11, 511))}
    assert sizes == {"train": 354, "dev": 20, "test": 164}


def check_mmlu_math(train, test, dev_size, count):
    """MMLU_Math is graded as GSM8K is, but for the answer that is a list."""
    task = task_of("mmlu_math", train=train, test=test, train_size=0, dev_size=dev_size, test_size=0)
    problems = task.problems("test")
    assert len(problems) == count
    verdicts = grade(task, [f"So.\nFinal answer: {p.answer}" for p in problems], problems)
    assert all(v.correct for v in verdicts)
    wrong = grade(task, ["Final answer: 123456", "Final answer: 2, 2, 4", "none"], [problems[0]] * 3)
    assert [v.correct for v in wrong] == [False, False, None]
    (listed,) = (p for p in problems if p.answer.startswith("2,2,"))
    forms = [f"Final answer: ${listed.answer}$", f"Final answer: ({', '.join(listed.answer.split(','))})"]
    assert [v.correct for v in grade(task, forms, [listed] * 2)] == [True, True]
    assert reward(task, task.problems("train")[0].solution, task.problems("train")[0]) == 1.0


def test_mmlu_math_in_the_upstream_form_is_graded_as_gsm8k_is():
    check_mmlu_math(str(UPSTREAM / "gsm8k.jsonl"), str(UPSTREAM / "mmlu_math.jsonl"), dev_size=2, count=20)


@needs_data
def test_mmlu_math_is_graded_as_gsm8k_is():
    files = str(DATA / "gsm8k_train.jsonl"), str(DATA / "mmlu_math_test.jsonl")
    check_mmlu_math(*files, dev_size=20, count=348)  # of 354 records, six ask what another one asks


def test_the_same_program_is_run_once_and_pass_at_k_counts_it(execution, monkeypatch):
    task, problem = task_of("mbpp", execution), problem_of("mbpp")
    runs = []
    monkeypatch.setattr(task.sandbox, "run", lambda job: runs.append(job) or "return a + b" in job.program)
    responses = [FENCED, FENCED + "\nDone.", FENCED.replace("+", "-"), "no idea"]
    verdicts = grade(task, responses, [problem] * 4) + grade(task, responses, [problem] * 4)
    assert len(runs) == 2 and [v.reward for v in verdicts[:4]] == [1.0, 1.0, 0.0, None]
    record = {
        "greedy": 1.0,
        "answers": [v.extracted and task.vote(v.extracted) for v in verdicts[:4]],
        "rewards": [v.reward for v in verdicts[:4]],
    }
    out = summarize([record])
    assert (out["pass1"], out["pass2"], out["pass4"]) == (0.5, pytest.approx(5 / 6), 1.0)
    assert task.vote("# adds\ndef add(a, b):\n\n    return a + b  \n") == task.vote(ADD)


def run_grade(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "irpo_utils", "grade", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_grade_runs_programs_by_task_id_or_by_the_tests_given(execution, tmp_path):
    with gzip.open(tmp_path / "he.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL) + "\n")
    data = lines(tmp_path / "mbpp.jsonl", [MBPP])
    rows = [
        {"response": FENCED, "task_id": 2},
        {"response": "no", "task_id": 2},
        {"response": FENCED, "test_list": ["assert add(1, 1) == 3"]},
        {"response": FENCED, "test_list": ["assert add(1, 1) == 2"]},
    ]
    done = run_grade("--task", "mbpp", "--data", data, "--execution", execution, lines(tmp_path / "r.jsonl", rows))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["correct"] for line in done.stdout.splitlines()] == [True, None, False, True]
    rows = [
        {"response": "    return a + b", "task_id": "HumanEval/7"},
        {k: HUMANEVAL[k] for k in ("prompt", "entry_point", "test")} | {"response": "    return 0"},
    ]
    done = run_grade(
        "--task",
        "humaneval",
        "--data",
        str(tmp_path / "he.jsonl.gz"),
        "--execution",
        execution,
        lines(tmp_path / "r.jsonl", rows),
    )
    assert [json.loads(line)["correct"] for line in done.stdout.splitlines()] == [True, False], done.stderr
    done = run_grade("--task", "mmlu_math", lines(tmp_path / "r.jsonl", [{"response": "Final answer: 3", "gold": 3}]))
    assert "right 1" in done.stderr


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "x"}, 'line 1: expected {"response": "text", "task_id": 11}'),
        ({"task_id": 2}, "line 1: expected"),
        ({"response": 3, "task_id": 2}, "line 1: expected"),
        ({"response": "x", "task_id": 77}, "line 1: no problem has the task_id 77"),
        ({"response": "x", "test_list": []}, "line 1: test_list must be a list of assertions"),
        ({"response": "x", "test_list": ["assert ("]}, "line 1: the tests are no Python"),
        ({"response": "x", "test_list": ["assert 1 == 1"]}, "line 1: the tests call nothing of the program"),
        (
            {"response": "x", "entry_point": "add", "prompt": "def ad(): pass", "test": "pass"},
            "line 1: the prompt does not define the entry_point 'add'",
        ),
        ({"response": "x", "entry_point": "add", "prompt": ""}, "line 1: prompt must be text"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(row, message, tmp_path):
    data = lines(tmp_path / "mbpp.jsonl", [MBPP])
    path = tmp_path / "r.jsonl"
    lines(path, [row])
    with pytest.raises(Malformed) as found:
        read_records(path, task_of("mbpp", test=[data]))
    assert message in str(found.value)


def test_a_damaged_gzip_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:30])
    with pytest.raises(ValueError, match="a.jsonl.gz is no whole gzip file"):
        task_of("mbpp", test=[str(tmp_path / "a.jsonl.gz")]).problems("test")


def test_grade_refuses_in_one_line_where_there_are_no_walls(tmp_path):
    path = lines(tmp_path / "r.jsonl", [{"response": FENCED, "test_list": ["assert add(1, 1) == 2"]}])
    command = [sys.executable, "-m", "irpo_utils", "grade", "--task", "mbpp", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: bwrap is not installed.") and len(done.stderr.splitlines()) == 1
