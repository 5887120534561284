"""Grading: a labelled set of rule-breaking answers, every gold answer, hostile input, and the command line."""

import json
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import DATA, ROOT
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.answers import latex
from irpo_utils.answers.numbers import number, plain, states
from irpo_utils.settings import TaskConfig
from irpo_utils.tasks import get_task, grading
from irpo_utils.tasks.base import Problem
from irpo_utils.tasks.grading import grade
from irpo_utils.tasks.jsonl import Given

NAMES = ("gsm8k", "math", "arc_challenge")
# Labelled by reading, not by running: each with its reason. The gold answers are those of real records.
HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE / "graded_cases.jsonl").read_text().splitlines()]
# Answers made up to be misread, in the same form: null is "neither right nor wrong", whichever mode.
CRAFTED = [json.loads(line) for line in (HERE / "crafted_answers.jsonl").read_text().splitlines()]
UPSTREAM = HERE / "upstream"  # records made by hand in the form of each data set
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark records are not at {DATA}")


@pytest.fixture(scope="module")
def tasks():
    found = {name: get_task(TaskConfig(name=name)) for name in NAMES}
    found["math"].same = latex.Equality(seconds=2.0)
    return found


@pytest.mark.parametrize("mode", ["strict", "flexible"])
@pytest.mark.parametrize("name", NAMES)
def test_every_labelled_case(name, mode, tasks):
    cases = [case for case in CASES if case["task"] == name]
    assert len(cases) >= 100
    assert not misgraded(tasks[name], cases, mode)


def misgraded(task, cases, mode):
    """The cases whose verdict is not their label, cut to what can be read."""
    problems = [task.posed("", case["gold"], case) for case in cases]
    verdicts = grade(task, [case["response"] for case in cases], problems, flexible=mode == "flexible")
    assert all((verdict.extracted is None) is (verdict.correct is None) for verdict in verdicts)
    return [
        (case["response"][-200:], case["gold"], case["reason"], verdict.correct)
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.correct is not case[mode]
    ]


@pytest.mark.parametrize("mode", ["strict", "flexible"])
@pytest.mark.parametrize(("name", "count"), [("gsm8k", 480), ("math", 150), ("arc_challenge", 85)])
def test_every_crafted_answer(name, count, mode, tasks):
    """Hedges, denials, bounds, multiples, units, scripts, separators: right, wrong, or not understood and neither."""
    cases = [case for case in CRAFTED if case["task"] == name]
    assert len(cases) >= count
    assert {case[mode] for case in cases} == {True, False, None}
    assert not misgraded(tasks[name], cases, mode)


@pytest.mark.parametrize(
    "text", ["St. Louis", "Dr. Seuss", "U.S. Army", "__init__", "*args", "`x`", "The result is yes"]
)
def test_an_answer_in_words_is_read_whole(text):
    solution = f"So it must be.\nFinal answer: {text}"
    given = [{"question": f"Question {i}?", "answer": text, "solution": solution} for i in range(4)]
    task = Given(given)  # which grades the solutions
    (problem, *_) = task.problems("train")
    responses = [
        solution,
        f"{solution}. I hope it helps.",
        f"The answer is **{text}**.",
        f"{solution}. Or maybe another one",
    ]
    verdicts = grade(task, [*responses, f"{solution} the second"], [problem] * 5)
    assert [verdict.correct for verdict in verdicts] == [True, True, True, False, False]


def test_votes_for_one_number_are_counted_together(tasks):
    assert len({tasks["math"].vote(answer) for answer in ("\\frac{1}{2}", "0.5", "1/2", "$\\frac24$")}) == 1


@pytest.mark.parametrize(
    "hedge", ["{} maybe 99", "not {} or so", "at least {}", "{} or more", "it isn't {}", "{} dozen"]
)
@given(value=st.integers(-99, 99))
def test_what_is_hedged_or_changed_is_never_right(hedge, value):
    for text in (hedge.format(value), f"$ {hedge.format(f'{value}')} $", hedge.format(f"${value}").upper()):
        assert number(text) is None
        assert states(text, Fraction(value)) is not True


@pytest.mark.parametrize(
    ("text", "value", "verdict"),
    [
        ("7", "7", True),
        ("7 maybe 8", "7", None),
        ("7 maybe 8", "9", False),
        ("7 or 8", "7", False),
        ("3 * 6", "18", None),
        ("3 * 6", "3", False),
        ("9" * 5000, "9", False),
        ("(7 + 1) 2", "7", None),
        ("1011_2", "11", None),
        ("1011_2", "1011", False),
        ("9_8", "9", None),  # no digit of that base
        ("6 X 3", "18", None),
        ("6 X 3", "6", False),
        ("5/hour", "5", True),
        ("5 dollars/hour", "5", True),
        ("5 km/h/day", "5", True),
        ("5-foot", "5", True),
        ("5 miles-per-hour", "5", True),
        ("approximately 2 dozen", "24", None),
        ("May 5", "5", True),
        ("may 5", "5", None),
        ("5 st", "5", True),
        ("5th", "5", None),
    ],
)
def test_three_verdicts_on_a_number(text, value, verdict):
    assert states(text, Fraction(value)) is verdict


def test_the_other_tasks_know_the_third_verdict_too():
    listed, story = Problem("", "", "2,2,4"), Problem("", "", "12")
    for name, problem, verdicts in (
        ("mmlu_math", listed, {"2, 2, 4": True, "2, 2 and 4": True, "2, 3, 4": False, "2, 2, 4 or 5": None}),
        ("jsonl", story, {"12": True, "12 maybe 13": None, "13": False, "12 or 13": False}),
        ("stories", story, {"12": True, "13": False, "odd": False, "12 maybe 13": None}),
        ("gsm8k", story, {"12": True, "13 maybe 14": False, "12 maybe 13": None}),
    ):
        task = Given([]) if name == "jsonl" else get_task(TaskConfig(name=name))
        graded = grade(task, [f"Final answer: {answer}" for answer in verdicts], [problem] * len(verdicts))
        assert [v.correct for v in graded] == list(verdicts.values()), name


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("1 1/2", r"\frac{3}{2}", True),
        ("1 1/2", r"\frac{11}{2}", False),
        (r"-0.\overline{3}", r"-\frac{1}{3}", True),
        ("-1,234.50", "-1234.5", True),
        ("an area of $5$", "5", True),
        (r"5\text{and}6", "6, 5", True),
        (r"5\quad\text{or}\quad 6", "5, 6", True),
        (r"\displaystyle\frac12", r"\frac{1}{2}", True),
        (r"\big(1,2\big)", "(1,2)", True),
        (r"3~\sqrt5", r"3\sqrt{5}", True),
    ],
)
def test_latex_that_the_labelled_cases_lack(answer, gold, same):
    """Each of these is decided by a rule that nothing else in this file needs."""
    assert latex.decide(latex.normal(answer), latex.normal(gold)) is same


def own_form(path, folder):
    """The records of a file without the fields that a user's own file may not have."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    own = folder / f"own_{path.name}"
    own.write_text("".join(json.dumps({k: row[k] for k in ("question", "answer")}) + "\n" for row in rows))
    return own


def halves(path, folder, count):
    """A file's first `count` records as training, the others as test."""
    lines = path.read_text().splitlines(keepends=True)
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, part in zip(files, (lines[:count], lines[count:]), strict=True):
        file.write_text("".join(part))
    return files


def check_golds(name, files, dev_size):
    """Load all records, and grade every gold two ways: against itself, and its solution through the response path.

    Returns how many problems there are.
    """
    train, test = map(str, files)
    task = get_task(TaskConfig(name=name, train=train, test=test, train_size=0, dev_size=dev_size, test_size=0))
    problems = [p for split in ("train", "dev", "test") for p in task.problems(split)]
    assert len({p.id for p in problems}) == len({p.question for p in problems}) == len(problems)
    solutions = [p.solution or f"Let me think.\nFinal answer: {p.answer}" for p in problems]
    assert all(p.question in task.prompt(p) for p in problems)
    assert all("<<" not in s for s in solutions)
    verdicts = grade(task, solutions, problems)
    assert [p.id for p, v in zip(problems, verdicts, strict=True) if v.correct is not True] == []
    assert all(task.equal(p.answer, p) for p in problems)
    return len(problems)


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "gsm8k.jsonl", 20),
        ("math", "math.jsonl", 20),  # of 24 records, four are the prompt's examples
        ("arc_challenge", "arc.jsonl", 20),
        ("mmlu_math", "mmlu_math.jsonl", 40),  # with GSM8K's for training
        ("jsonl", "mmlu_math.jsonl", 20),
    ],
)
def test_every_upstream_form_loads_prompts_and_its_gold_grades_right(name, file, count, tmp_path):
    if name == "mmlu_math":
        files = UPSTREAM / "gsm8k.jsonl", UPSTREAM / file
    else:
        files = halves(own_form(UPSTREAM / file, tmp_path) if name == "jsonl" else UPSTREAM / file, tmp_path, 14)
    assert check_golds(name, files, dev_size=2) == count


@needs_data
@pytest.mark.parametrize(
    ("name", "train", "test", "count"),
    [
        ("gsm8k", "gsm8k_train.jsonl", "gsm8k_test.jsonl", 8792),
        ("math", "math_train_4500.jsonl", "math_test_500.jsonl", 4996),  # four are the prompt's examples
        ("arc_challenge", None, "arc_challenge_validation.jsonl", 299),
        ("jsonl", None, "mmlu_math_test.jsonl", 348),  # of 354 records, six ask what another one asks
    ],
)
def test_every_record_loads_prompts_and_its_gold_grades_right(name, train, test, count, tmp_path):
    path = own_form(DATA / test, tmp_path) if name == "jsonl" else DATA / test
    files = (DATA / train, path) if train else halves(path, tmp_path, 100)
    assert check_golds(name, files, dev_size=20) == count


@given(
    st.fractions(-(10**12), 10**12, max_denominator=10**6),
    st.sampled_from(["{}", "${}", "{} dollars", "**{}**", "\\({}\\)", "{}.", "= {}"]),
)
def test_a_number_is_read_back_exactly_whatever_stands_around_it(value, form):
    assert number(form.format(plain(value))) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 99))
def test_separators_and_trailing_zeros_change_nothing(whole, cents):
    text = f"{whole:,}.{cents:02d}"
    exact = Fraction(f"{whole}.{cents:02d}")
    assert number(text) == number(f"${text}") == number(text.replace(",", "{,}")) == exact


@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_latex_fractions_compare_as_their_values(one, two):
    spelled = [f"{'-' if v < 0 else ''}\\dfrac{{{abs(v.numerator)}}}{{{v.denominator}}}" for v in (one, two)]
    assert latex.decide(latex.normal(spelled[0]), latex.normal(f"{two.numerator}/{two.denominator}")) is (one == two)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2^3", 8), ("2**3", 8), ("2^3^2", 512), ("2 ^ 3 + 1", 9), ("10^-2", Fraction(1, 100)), ("1 - 2 - 3", -4),
     ("12 / 4 / 3", 1), ("8 / 1 / 4 / 2", 1), ("2 ^ 3 / 4", 2), ("16/2^2", 4), ("3/4^2", Fraction(3, 16)),
     ("2 + 3 * 4 ^ 2", 50), ("3!", 6), ("0!", 1), ("3!", 3)],
)  # fmt: skip
def test_an_expression_may_be_its_value_and_is_no_other(text, value):
    """Nobody says that it is the answer, so it is not right either: unparsed."""
    assert states(text, Fraction(value)) is None and number(text) is None
    assert states(text, Fraction(value) + 7) is False
    assert states(f"{text} = 77", Fraction(77)) is True


@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 40)), min_size=2, max_size=6))
def test_a_line_of_arithmetic_is_computed_as_one_writes_it(parts):
    text = "".join(f" {operator} {value}" for operator, value in parts)[3:]
    value = eval("".join(f"{operator}F({value})" for operator, value in parts).lstrip("+-*/"), {"F": Fraction})
    assert states(text, value) is not False and states(text, value + 1000) is False


@given(st.text(max_size=60), st.sampled_from(NAMES))
def test_no_text_makes_extraction_fail(text, name):
    task, problem = get_task(TaskConfig(name=name)), Problem("", "", "A", "", {"options": ["rain", "snow", "fog"]})
    for response in (text, f"Final answer: {text}", f"\\boxed{{{text}}}"):
        strict, flexible = (task.extract(response, problem, flexible=f) for f in (False, True))
        assert strict is None or flexible == strict  # the fall-back never overrules a marked answer


@pytest.mark.parametrize(("name", "gold"), [("gsm8k", ["2", "1/3", "1080"]), ("arc_challenge", ["A", "B", "C"])])
@pytest.mark.parametrize("flexible", [False, True])
def test_duplicates_and_processes_change_no_verdict(name, gold, flexible, tasks, monkeypatch):
    monkeypatch.setattr(grading, "MANY", 2000)
    rng, task = random.Random(0), tasks[name]
    problems = [Problem(str(i), "", g, "", {"options": ["rain", "snow", "fog"]}) for i, g in enumerate(gold)]
    forms = ["Final answer: {}", "so {}", "\\boxed{{{}}}", "#### {}", "nothing"]
    texts = [rng.choice(forms).format(rng.choice(gold)) + f"\n{i}" * (i % 5 == 0) for i in range(3500)]
    chosen = rng.choices(problems, k=len(texts))
    rows = [row for row in zip(texts, chosen, strict=True) for _ in range(rng.randint(1, 2))]
    rows += [(f"{i}: {texts[i]}", problems[i % 3]) for i in range(2000)]  # all distinct, so that processes start
    responses, repeated = [r for r, _ in rows], [p for _, p in rows]
    alone = [grade(task, [r], [p], flexible)[0] for r, p in rows]
    assert {v.correct for v in alone} == {True, False, None}
    for processes in (1, 2, 3):
        assert grade(task, responses, repeated, flexible, processes) == alone


PIECES = [
    "Final answer:", "\\boxed{", "}", "{", "\\frac", "\\sqrt", "^", "_", "$", "\\(", "\\)", "1", "2", "9", "0",
    ".", ",", "/", "-", "%", "####", "The answer is", "A:", "(B)", "B", "\n", "  ", "\\text{", "and", "or",
    "\\pm", "\\infty", "\\cup", "(", ")", "[", "]", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "=",
    "\\le", "e", "x", "!", "million", "½", "٣", "\x00", "😀", "\\", "\\overline{", "\\left", "°", "thousand",
]  # fmt: skip
HOSTILE = [
    "Final answer: " + "{" * 3_000_000, "\\boxed{" * 300_000, "Final answer:" * 300_000,
    "final answer" + " " * 2_000_000, "9" * 2_000_000, "Final answer: " + "1," * 500_000, "$" * 1_000_001,
    "A:" * 300_000, "\\text{" * 200_000, "- " * 500_000, "Final answer: " + "9" * 5000,
    "Final answer: 9^{9^{9^{9}}}", "Final answer: (1+x)^{10^9}", "Final answer: 1e999999999",
    "Final answer: \\sqrt{" + "\\sqrt{" * 60 + "2" + "}" * 61, "Final answer: " + "(" * 190 + "1" + ")" * 190,
]  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 10_000), ("arc_challenge", 10_000), ("math", 1_000)])
def test_fuzzed_and_hostile_responses_neither_crash_nor_hang(name, count, tasks):
    rng = random.Random(0)
    responses = ["".join(rng.choices(PIECES, k=rng.randint(0, 40))) for _ in range(count)] + HOSTILE
    gold = {"gsm8k": "2", "math": "2", "arc_challenge": "B"}[name]
    problems = [Problem("", "", gold, "", {"options": ["rain", "snow", "fog"]})] * len(responses)
    verdicts = grade(tasks[name], responses, problems, flexible=True)
    assert len(verdicts) == len(responses)
    assert {v.correct for v in verdicts} == {True, False, None}
    assert not any(v.correct for v in verdicts[-len(HOSTILE) :] if name == "math")


def test_a_check_that_never_ends_costs_its_worker_and_no_other_answer():
    verifier = latex.Equality(seconds=1.0).verifier
    questions = [
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("9^{9^{9^{9}}}", "\\sqrt{8}"),
        ("\\sqrt{18}", "3\\sqrt{2}"),
        ("x+1", "x+2"),
    ]
    assert verifier(questions) == [True, None, True, False]
    assert verifier.gave_up == 1
    verifier.close()


def test_hostile_answers_share_one_budget_and_honest_ones_are_decided_beside_them():
    equality = latex.Equality(seconds=1.0)
    equality.verifier.budget = 2.0
    towers = [(f"3+9^{{9^{{9^{{{i}}}}}}}", "\\sqrt{8}") for i in range(2, 302)]
    sums = [(f"\\prod_{{k=1}}^{{{10**6 + i}}} (k+x)", "x+1") for i in range(20)]
    honest = [(f"\\sqrt{{{4 * i}}}", f"2\\sqrt{{{i}}}") for i in range(2, 32)]
    started = time.monotonic()
    verdicts = equality([*towers, *honest, *sums])
    assert time.monotonic() - started < 60  # 300 times a second, and the workers that die of it, would be minutes
    assert verdicts[300:330] == [True] * 30
    assert True not in verdicts[:300] + verdicts[330:] and verdicts[:300].count(None) >= 250
    assert equality.verifier.gave_up == verdicts.count(None) and len(equality.verifier.cut) >= 250
    again = equality([towers[-1], *honest])  # what the budget did not reach is asked again; what was decided is known
    assert again[1:] == [True] * 30 and equality.verifier.gave_up == verdicts.count(None) + 1
    equality.verifier.close()


def test_a_right_answer_is_decided_whatever_its_place_in_the_file(tasks):
    rng = random.Random(0)
    pairs = [(f"{i}+{i}x", f"{i}(x+1)") for i in range(2, 12)] + [("3+9^{9^{9^{7}}}", "\\sqrt{8}")] * 5
    equality = latex.Equality(seconds=0.5)
    equality.verifier.budget = 0.5
    for _ in range(3):
        rng.shuffle(pairs)
        assert equality(pairs) == [None if "^" in answer else True for answer, _ in pairs]
    equality.verifier.close()


def run_grade(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "irpo_utils", "grade", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_grade_writes_a_line_for_each_in_order_and_a_summary_beside(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = [("Final answer: $1,080.00", "1080"), ("#### 7", 8), ("so 8", "8"), ("no idea", "#### 8")]
    path.write_text("".join(json.dumps({"response": r, "gold": g}) + "\n" for r, g in rows))
    done = run_grade("--task", "gsm8k", str(path))
    assert done.returncode == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"extracted": "1080", "correct": True},
        {"extracted": "7", "correct": False},
        {"extracted": None, "correct": None},
        {"extracted": None, "correct": None},
    ]
    assert "right 1 (25.0%), wrong 1 (25.0%), unparsed 2 (50.0%)" in done.stderr
    loose = run_grade("--flexible", "--task", "gsm8k", str(path))
    assert json.loads(loose.stdout.splitlines()[2]) == {"extracted": "8", "correct": True}
    assert "strict:" in loose.stderr and "flexible: right 2" in loose.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: expected"),
        ('{"response": "x"}', "line 2: expected"),
        ('{"response": 3, "gold": "1"}', "line 2: expected"),
        ('{"response": "x", "gold": true}', "line 2: expected"),
        ("", "line 2: expected"),
        ("[1]", "line 2: expected"),
        ('{"response": "x", "gold": "many"}', "line 2: the gold answer 'many' is not a number"),
    ],
)
def test_a_malformed_line_is_named(line, message, tmp_path):
    good = '{"response": "Final answer: 1", "gold": "1"}'
    (tmp_path / "r.jsonl").write_text("\n".join([good, line, good]) + "\n")
    done = run_grade("--task", "gsm8k", str(tmp_path / "r.jsonl"))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_a_missing_file_is_named():
    done = run_grade("--task", "math", "/nonexistent.jsonl")
    assert done.returncode == 1 and done.stderr == "error: No such file or directory: /nonexistent.jsonl\n"
