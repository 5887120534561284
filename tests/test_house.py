"""The rooms of the package and their one direction: who may import whom, and what stays light."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import STAGES

PACKAGE = ROOT / "irpo_utils"
# Each may import from those before it. extras and run stand beside one another.
LEVELS = {
    "files": 0, "metrics": 0, "progress": 0, "settings": 0, "answers": 1, "tasks": 2, "model": 3, "methods": 4,
    "loop": 5, "extras": 5, "run": 5, "report": 6, "site": 7, "__main__": 8,
}  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"}
LIGHT = [
    "files", "metrics", "settings", "answers", "tasks", "methods.parts", "methods.recipes", "methods.select",
    "run.config", "run.presets", "run.store", "run.stages", "run.driver", "run.jobs", "report", "__main__",
]  # fmt: skip


def modules():
    """Module name -> its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = (
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")
        )
        found[name or "__init__"] = (path, ast.parse(path.read_text()))
    return found


def imported(name, path, tree, known):
    """The package's modules that a module imports, at any level of it."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in known else ".".join(base)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("irpo_utils"):
            raise AssertionError(f"{name}: imports of the package are relative")


def arrows():
    known = modules()
    return {name: set(imported(name, *known[name], known)) - {name} for name in known}


def room(module):
    return module.split(".")[0]


def test_imports_go_one_way():
    for name, targets in arrows().items():
        for target in targets - {""}:
            same = room(name) == room(target)
            assert same or LEVELS[room(target)] < LEVELS[room(name)], f"{name} imports {target}"


def test_nothing_imports_extras():
    wrong = [(n, t) for n, targets in arrows().items() for t in targets if room(t) == "extras" and room(n) != "extras"]
    assert not wrong


def test_there_is_no_circle():
    graph, done, path = arrows(), set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done or name not in graph:
            return
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        done.add(path.pop())

    for name in graph:
        visit(name)


def lazy(tree):
    """Imports that stand inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from (n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom))


def test_imports_stand_at_the_top_of_the_file():
    """But for libraries that are heavy, or that not everybody has, and none of our own modules."""
    for name, (_, tree) in modules().items():
        for node in lazy(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}, line {node.lineno}"


def test_what_needs_no_model_imports_no_torch():
    code = "import sys; " + "; ".join(f"import irpo_utils.{name}" for name in LIGHT)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sorted({HEAVY!r} & set(sys.modules)))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


def test_the_loop_loads_no_bookkeeping():
    code = "import sys, irpo_utils.loop; print(*[m for m in sys.modules if m.startswith('irpo_utils.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {room(m.removeprefix("irpo_utils.")) for m in done.stdout.split()} & {"run", "report", "extras"}


def test_functions_have_at_most_six_arguments():
    """But for the sampler and the trainer."""
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in ("sample", "train"):
                given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                given = [arg for arg in given if arg not in ("self", "cls")]
                assert len(given) <= 6, f"{name}.{node.name}: {', '.join(given)}"


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory):
    """A copy of the project that has no extras, and what a run of IRPO said in it."""
    copy = tmp_path_factory.mktemp("without")
    for name in ("irpo_utils", "notebooks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("extras", "__pycache__"))
    return copy, drive_in(copy, "micro", "iterations=1")


def drive_in(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "irpo_utils", *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_the_loop_runs_without_extras(without_extras):
    _, done = without_extras
    assert done.returncode == 0 and "report.html" in done.stdout, done.stdout + done.stderr


def not_done(folder):
    """Stage -> why it is not done, for those of IRPO's first round and of M_0."""
    lines = [line.partition(": ") for line in drive_in(folder, "why", "micro").stdout.splitlines()]
    return {
        where.rpartition("/")[2]: why
        for where, _, why in lines
        if why != "done" and "/m0/" in where + "/m0/" * ("/irpo/" in where)
    }


def test_changed_code_reruns_what_runs_it_and_comments_change_nothing(without_extras):
    copy, _ = without_extras
    assert not_done(copy) == {}
    losses, select, sampling = (
        copy / "irpo_utils" / f for f in ("model/losses.py", "methods/select.py", "model/sampling.py")
    )
    before = losses.read_text()
    losses.write_text(before.replace("-F.logsigmoid(chosen_reward", "-2 * F.logsigmoid(chosen_reward"))
    assert losses.read_text() != before
    behind = {"04_evaluate": "done, but 03_train before it is not"}
    assert not_done(copy) == {"03_train": "code model/losses.py", **behind}
    losses.write_text(before.replace('"""The losses', '"""All losses') + "# a comment\n")
    assert not_done(copy) == {}
    select.write_text(select.read_text().replace("for i in range(k)", "for i in range(k + 1)"))
    behind = dict.fromkeys(("03_train", "04_evaluate"), "done, but 02_pairs before it is not")
    assert not_done(copy) == {"02_pairs": "code methods/select.py", **behind}
    sampling.write_text(sampling.read_text() + "\nMORE = 1\n")
    assert set(not_done(copy)) == {"01_sample", "02_pairs", "03_train", "04_evaluate"}


@pytest.mark.parametrize(
    ("stage", "method", "with_", "without"),
    [
        ("01_sample", "sipf", "sampling", "schedule training losses"),
        (
            "01b_reward",
            "sipf",
            "sampling schedule logprobs",
            "training losses",
        ),  # its reward model has a loss of its own
        ("01b_reward", "star", "sampling", "schedule training losses"),
        ("01b_reward", "latro", "sampling logprobs", "schedule training losses"),
        ("01b_reward", "self_rewarding", "sampling logprobs", "schedule training losses"),
        ("02_pairs", "latro", "records", "load sampling schedule training losses"),
        ("02_pairs", "sipf", "records", "load sampling schedule training losses"),
        ("03_train", "sipf", "sampling schedule training losses", ""),
        ("03b_extrapolate", "expo", "load", "sampling schedule training losses"),
        ("03c_online", "rloo", "sampling schedule training losses", ""),
        ("04_evaluate", "sipf", "sampling", "schedule training losses"),
    ],
)
def test_a_key_holds_the_code_of_the_model_that_a_stage_runs_and_no_other(tmp_path, stage, method, with_, without):
    config = load_preset("tiny", [f"methods={method}"])
    code = STAGES[stage](tmp_path, method, 0, 2, config).code()
    assert all(f"model/{name}.py" in code for name in with_.split())
    assert not [name for name in without.split() if f"model/{name}.py" in code]
