"""Every notebook runs to its end: here with small parameters, or where the last test says.

A notebook spends most of such a run on imports, in a kernel of its own. So two run at a time.
"""

import csv
import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from small_models import build

from irpo_utils import files
from irpo_utils.files import NOTEBOOKS, read_jsonl
from irpo_utils.metrics import majority
from irpo_utils.report.publish import with_present_text
from irpo_utils.run.code import notebook_hash
from irpo_utils.run.config import differences
from irpo_utils.run.notebooks import run_notebook
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import STAGES

UPSTREAM = ROOT / "tests" / "upstream"


def quickstart(folder: Path) -> dict:
    return {"rounds": 1, "train_size": 16, "test_size": 6}


def seed_model(folder: Path) -> dict:
    return {"target": str(folder / "model"), "steps": 3, "stories": 80, "tried": 20, "samples": 2, "threads": 1}


def process_feedback(folder: Path) -> dict:
    labelled = {"problems": 10, "samples": 4, "continuations": 2, "gold_steps": 2}
    return {"run": str(folder / "run"), **labelled, "reward_steps": 3, "test_problems": 4, "candidates": 4}


def why_the_nll(folder: Path) -> dict:
    return {"run": str(folder), "lr": 5e-3, "watched": 16}


def losses(folder: Path) -> dict:
    small = {"rates": [1e-3], "watched": 4, "losses": ["dpo+nll", "nll", "simpo", "dpo_positive", "exmate"]}
    return {"run": str(folder), "preset": "micro", "folder": str(folder / "losses"), **small}


def ablations(folder: Path) -> dict:
    small = ["task.train_size=12", "task.dev_size=6", "train.max_steps=2", "train.eval_every=1"]
    varied = {"knobs": {"train.alpha": [0], "sampling.n": [1]}, "others": ["reference", "twice"]}
    return {"folder": str(folder), "preset": "micro", "settings": small, "seeds": 1, **varied}


def broken_runs(folder: Path) -> dict:
    return {"problems": 40, "held_out": 8, "samples": 16, "steps": 4, "lr": 2e-3}


def memorising(folder: Path) -> dict:
    lines = (UPSTREAM / "arc.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:16]))
    (folder / "test.jsonl").write_text("\n".join(lines[16:]))
    sources = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return sources | {"dev_size": 2, "folder": str(folder / "model"), "steps": 4, "threads": 1}


def tune(folder: Path) -> dict:
    grids = {"dpo+nll": {"lr": [1e-3], "alpha": [1.0, 5.0]}, "nll": {"lr": [1e-3, 2e-3]}, "orpo": {"lr": [1e-3]}}
    methods = {"irpo": "irpo", "sft_gold": "sft_gold", "orpo": "irpo"}
    return {"run": str(folder), "methods": methods, "grids": grids}


def claims(folder: Path) -> dict:
    return {"run": str(folder), "twice": "", "process": "", "fast": "", "real": str(folder), "watched": 4}


def without_labels(folder: Path) -> dict:
    return {"folder": str(folder), "runs": [str(folder)]}


def real_model(folder: Path) -> dict:
    return {"run": str(folder), "problems": 4, "samples": 4}


def speed(folder: Path) -> dict:
    facts = json.loads((ROOT / "outputs" / "reference" / "bench.json").read_text())
    rows = [row for row in facts["rows"] if row["shape"] in ("embedded", "gsm8k")]
    (folder / "bench.json").write_text(json.dumps(facts | {"threads": 1, "rows": rows}))
    profiled = {"problems": 1, "n": 4, "response": 16}
    return {"bench_file": str(folder / "bench.json"), "profiled": profiled}


def scale(folder: Path) -> dict:
    return {"problems": 300, "counts": [1, 8], "measured": 2, "unseen": 1, "sizes": [1, 8], "repeats": 2}


# Test -> the notebook that it looks at, and its parameters.
SMALL = {
    "test_quickstart": ("quickstart", quickstart),
    "test_quickstart_takes_a_model_and_problems_of_ones_own": ("quickstart", quickstart),
    "test_the_seed_notebook_makes_a_model": ("00_seed_model", seed_model),
    "test_the_process_notebook_writes_its_tables": ("07_process_feedback", process_feedback),
    "test_the_loss_by_hand_is_that_of_the_code": ("10_loss_from_scratch", lambda folder: {"alpha": 0.7, "beta": 0.3}),
    "test_the_nll_notebook_watches_three_losses": ("11_why_the_nll", why_the_nll),
    "test_the_losses_are_held_side_by_side": ("12_losses", losses),
    "test_the_ablations_compare_each_value_with_the_default": ("13_ablations", ablations),
    "test_the_majority_splits_the_problems_in_two": ("15_without_labels", without_labels),
    "test_the_broken_runs_are_refused_or_seen": ("22_read_a_run", broken_runs),
    "test_the_memorising_notebook_makes_a_model": ("23_memorising", memorising),
    "test_the_claims_are_differences_with_intervals": ("21_claims", claims),
    "test_the_real_model_notebook_reads_solutions": ("20_real_model", real_model),
    "test_the_tuning_notebook_ranks_its_points": ("30_tune", tune),
    "test_the_speed_notebook_counts_what_was_measured": ("31_speed", speed),
    "test_the_scale_notebook_simulates_from_what_it_measured": ("32_scale", scale),
}
ON_THE_MICRO_RUN = ("11_why_the_nll", "12_losses", "15_without_labels", "20_real_model", "21_claims", "30_tune")


def execute(source: Path, target: Path, parameters: dict) -> str:
    """What an executed notebook has printed."""
    run_notebook(source, target, parameters, 1)
    outputs = [out for cell in json.loads(target.read_text())["cells"] for out in cell.get("outputs", [])]
    return "".join("".join(out["text"]) for out in outputs if out.get("name") == "stdout")


@pytest.fixture(scope="module")
def running(request, tmp_path_factory):
    """Test -> (the folder of its notebook, what this prints in the end), for the tests that were asked for."""
    found: dict[str, tuple[Path, Future]] = {}
    with ThreadPoolExecutor(2) as pool:
        for test in [item.name for item in request.session.items if item.name in SMALL]:
            name, parameters = SMALL[test]
            place = tmp_path_factory.mktemp(name)
            folder = request.getfixturevalue("micro_run")[0] if name in ON_THE_MICRO_RUN else place
            source = NOTEBOOKS / f"{name}.ipynb"
            if test.endswith("of_ones_own"):
                source = with_own_problems(source, place)
            found[test] = folder, pool.submit(execute, source, place / "executed.ipynb", parameters(folder))
        yield found
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def executed(request, running):
    """The folder that a test's notebook has written to, and what it has printed."""
    folder, printed = running[request.node.name]
    return folder, printed.result()


def with_own_problems(source: Path, folder: Path) -> Path:
    """The quickstart with another model and other problems, in the one cell that is meant for it."""
    problems = []
    for line in (UPSTREAM / "gsm8k.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        solution, _, answer = row["answer"].rpartition("\n#### ")
        problems.append({"question": row["question"], "answer": answer, "solution": solution})
    model = build("qwen2", folder / "model", [row["question"] for row in problems], vocabulary=400)
    notebook = json.loads(source.read_text())
    (cell,) = [c for c in notebook["cells"] if "".join(c["source"]).startswith("model_path = ")]
    cell["source"] = [f"model_path = {str(model)!r}\n", f"problems = {problems!r}"]
    changed = folder / "own.ipynb"
    changed.write_text(json.dumps(notebook))
    return changed


def read_rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_notebooks_are_committed_without_output_and_short():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"] and cell["execution_count"] is None, path.name
                assert len("".join(cell["source"]).splitlines()) <= 30, path.name


def test_a_notebook_is_titled_by_its_number():
    for path in NOTEBOOKS.glob("*.ipynb"):
        title = json.loads(path.read_text())["cells"][0]["source"][0]
        number = path.stem.partition("_")[0]
        assert title.startswith(f"# {number.capitalize()} · "), path.name


def test_the_text_of_an_executed_copy_is_that_of_its_notebook(tmp_path):
    for path in sorted((ROOT / "outputs" / "reference").rglob("*.ipynb")):
        assert with_present_text(path) == path.read_text(), f"{path}: write with_present_text(path) there"
    (copy := tmp_path / "02_pairs.ipynb").write_text((NOTEBOOKS / copy.name).read_text().replace("pairs", "others"))
    assert with_present_text(copy) == copy.read_text()  # other code
    notebook = json.loads((NOTEBOOKS / copy.name).read_text())
    injected = {"cell_type": "code", "metadata": {"tags": ["injected-parameters"]}, "source": ["run = 1"]}
    (first, *_) = [i for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]
    notebook["cells"].insert(first + 1, injected)
    notebook["cells"][0] = notebook["cells"][0] | {"source": ["# An older title"]}
    copy.write_text(json.dumps(notebook))
    cells = json.loads(with_present_text(copy))["cells"]
    assert cells[0]["source"] != ["# An older title"] and cells[first + 1] == injected


def test_notebooks_name_others_that_there_are():
    names = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        assert set(re.findall(r"\b\d\db?_[a-z_]+", text)) <= names, path.name


def cells_of(path: Path) -> list[tuple[str, set[str], str]]:
    """Kind, tags and text of a notebook's cells."""
    cells = json.loads(path.read_text())["cells"]
    return [(c["cell_type"], {*c["metadata"].get("tags", [])}, "".join(c["source"])) for c in cells]


def test_every_exercise_has_a_solution():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for kind, _, text in cells_of(path):
            if kind == "markdown" and "## Exercises" in text:
                asked, _, solved = text.partition("## Exercises")[2].partition("<details><summary>Solutions</summary>")
                numbers = [re.findall(r"^(\d)\. ", part, re.MULTILINE) for part in (asked, solved)]
                assert numbers[0] and numbers[0] == numbers[1] and "\n</details>" in solved, path.name


def test_the_cell_of_a_solution_makes_nothing_and_is_in_no_key(tmp_path):
    """It stands behind stage.finish(), and an edit of it makes no stage run again."""
    for name in STAGES:
        path = NOTEBOOKS / f"{name}.ipynb"
        code = [(tags, text) for kind, tags, text in cells_of(path) if kind == "code"]
        (finished,) = [i for i, (_, text) in enumerate(code) if "stage.finish(" in text]
        hidden = [i for i, (tags, _) in enumerate(code) if "hide-cell" in tags]
        assert hidden == [*range(finished + 1, len(code))], name
        notebook = json.loads(path.read_text())
        notebook["cells"] = [c for c in notebook["cells"] if "hide-cell" not in c["metadata"].get("tags", [])]
        without = tmp_path / path.name
        without.write_text(json.dumps(notebook))
        assert notebook_hash(without) == notebook_hash(path), name


def test_quickstart(executed):
    _, printed = executed
    assert re.search(r"M_0: [\d.]+% of its samples are right; \d+ pairs; M_1: ", printed)


def test_quickstart_takes_a_model_and_problems_of_ones_own(executed):
    _, printed = executed
    assert "6 problems to learn from" in printed
    assert re.search(r"M_0: 0.0% of its samples are right; [1-9]\d* pairs; M_1: ", printed)  # gold against its own


def test_the_seed_notebook_makes_a_model(executed):
    folder, _ = executed
    assert {"model.safetensors", "tokenizer.json", "facts.json"} <= {p.name for p in (folder / "model").iterdir()}
    facts = json.loads((folder / "model" / "facts.json").read_text())
    assert facts["met"]["35 to 55 % sound"] is False  # after three steps


def test_the_process_notebook_writes_its_tables(executed):
    folder, _ = executed
    rows = read_rows(folder / "run" / "label_quality.csv")
    wanted = [("a number", "1", "0"), ("a number", "2", "0"), ("a number", "2", "1"), ("odd or even", "1", "0")]
    assert [(r["answer"], r["k"], r["delta"]) for r in rows[2:6]] == wanted
    assert not (folder / "run" / "scratch").exists()


def test_the_loss_by_hand_is_that_of_the_code(executed):
    _, printed = executed  # the notebook asserts it
    assert "DPO 0.6931" in printed


def test_the_nll_notebook_watches_three_losses(executed):
    folder, _ = executed
    rows = read_rows(folder / "nll.csv")
    assert [(r["loss"], r["step"]) for r in rows] == [
        (x, s) for x in ("dpo", "dpo+nll", "nll") for s in ("0", "3", "6")
    ]


def test_the_ablations_compare_each_value_with_the_default(executed):
    folder, printed = executed
    rows = {(r["knob"], r["value"]): r for r in read_rows(folder / "ablations.csv")}
    assert [f"{r['knob']} {r['value']}" for r in rows.values() if r["default"] == "True"] == [
        "alpha 1", "n 8", "reference moving", "twice nothing"
    ]  # fmt: skip
    assert rows["alpha", "1"]["dev_greedy"] == rows["n", "8"]["dev_greedy"] == rows["twice", "nothing"]["dev_greedy"]
    assert int(rows["alpha", "0"]["pairs"]) == int(rows["alpha", "1"]["pairs"]) > 0
    assert rows["n", "1"]["failed"].startswith("ValueError: no pair can be made of 12 samples")
    compared = read_rows(folder / "differences.csv")
    assert [(c["value"], c["seeds"]) for c in compared if c["knob"] != "twice"] == [
        ("0", "1"),
        ("1", "0"),
        ("M_0", "1"),
    ]
    assert re.search(r"alpha 0: [+-][\d.]+ points \([+-][\d.]+ to [+-][\d.]+\) against the default, 1\n", printed)
    assert "n 1: no model to hold against the default, 8\n" in printed
    alpha_0 = folder / "base+train.alpha=0" / "m0" / "seed_0" / "samples.jsonl"
    assert alpha_0.read_bytes() == (folder / "base" / "m0" / "seed_0" / "samples.jsonl").read_bytes()
    assert not list(folder.rglob("04_evaluate*")) and not list(folder.rglob("responses.jsonl"))  # test is left alone


def test_the_losses_are_held_side_by_side(executed):
    folder, _ = executed
    rows = {r["loss"]: r for r in read_rows(folder / "losses/losses.csv")}
    assert list(rows) == ["dpo+nll", "nll", "simpo", "dpo_positive", "exmate"]
    assert [r["reference"] for r in rows.values()] == ["yes", "no", "no", "yes", "no"]
    assert rows["dpo+nll"]["against dpo+nll"] == "+0.0 (+0.0 to +0.0)"
    assert len(read_rows(folder / "losses/curves.csv")) == 5 * 3


def test_the_claims_are_differences_with_intervals(executed):
    folder, printed = executed
    rows = read_rows(folder / "claims.csv")
    assert {(r["claim"], r["world"]) for r in rows} == {(c, w) for c in "16" for w in ("embedded", "pre-trained")}
    by_hand = {}
    for t in (1, 2):
        lines = (folder / f"irpo/seed_0/iteration_{t}/responses.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        by_hand[t] = [r["greedy"] == 1 for r in found if r["split"] == "test"]
    (gain,) = {float(r["mean"]) for r in rows if r["difference"] == "IRPO: M_2 above M_1"}
    assert gain == pytest.approx(100 * (sum(by_hand[2]) - sum(by_hand[1])) / len(by_hand[1]))
    assert all(float(r["low"]) <= float(r["mean"]) <= float(r["high"]) for r in rows)
    assert "embedded: stories, seed; 1 seeds" in printed


def test_the_claims_refuse_a_run_of_another_experiment():
    """One that differs in more than its claim is about. What a method has that is in neither run counts for nothing."""
    cells = json.loads((NOTEBOOKS / "21_claims.ipynb").read_text())["cells"]
    (cell,) = [source for c in cells if "def same_but(" in (source := "".join(c["source"]))]
    methods = "methods=irpo,dpo"
    scope = {"differences": differences, "files": files, "run": "outputs/claims"}
    scope["embedded"] = SimpleNamespace(config=load_preset("micro", [methods]))
    exec(cell, scope)

    def other(*changes):
        return SimpleNamespace(folder=ROOT / "outputs" / "other", config=load_preset("micro", [methods, *changes]))

    scope["same_but"](other("dpo.train.lr=1", "orpo.train.lr=1", "iterations=1", "evaluation.samples=1"), "dpo.")
    for change in ("sampling.temperature=0.5", "seeds=4", "dpo.train.lr=1", "irpo.train.beta=0.2"):
        with pytest.raises(files.ConfigError, match=f"outputs/other is .* than outputs/claims: {change.split('=')[0]}"):
            scope["same_but"](other(change), "task.train_size")


def test_the_majority_splits_the_problems_in_two(executed):
    folder, _ = executed
    first, *_ = rows = read_rows(folder / "labels.csv")
    test = [r for r in read_jsonl(folder / "m0/seed_0/responses.jsonl") if r["split"] == "test"]
    assert float(first["M_0"]) == pytest.approx(sum(r["greedy"] == 1 for r in test) / len(test))
    assert {float(r["behind IRPO"]) for r in rows if r["method"] == first["method"]} == {0.0}
    led = sum(majority(r["answers"], [x == 1 for x in r["rewards"]], 8) == 1 for r in test)
    halves = {r["majority of M_0"]: int(r["answers"]) for r in read_rows(folder / "majority.csv")}
    assert halves == {group: n for group, n in (("right", led), ("wrong", len(test) - led)) if n}


def test_the_broken_runs_are_refused_or_seen(executed):
    _, printed = executed  # the notebook asserts what holds of so small runs
    assert "RuntimeError: the DPO term before the first step is " in printed
    assert "RuntimeError: the sampler saw other log-probabilities" in printed
    assert "ValueError: no pair can be made of 40 samples" in printed
    assert "ConfigError: task.name: leaky: two problems have the id" in printed


def test_the_memorising_notebook_makes_a_model(executed):
    folder, printed = executed
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {p.name for p in (folder / "model").iterdir()}
    assert "{'train': 14, 'dev': 2, 'test': 4}" in printed


def test_the_tuning_notebook_ranks_its_points(executed):
    folder, _ = executed
    rows = read_rows(folder / "tune.csv")
    assert [(r["method"], r["lr"], r["alpha"]) for r in rows] == [
        ("irpo", "0.001", "1.0"),
        ("irpo", "0.001", "5.0"),
        ("sft_gold", "0.001", ""),
        ("sft_gold", "0.002", ""),
        ("orpo", "0.001", ""),
    ]


def test_the_real_model_notebook_reads_solutions(executed):
    _, printed = executed
    assert all(f"=== {title}: " in printed for title in ("turned right", "turned wrong", "wrong before and after"))
    assert re.search(r"M_0 +pass@1 [\d.]+% +pass@8", printed) is None  # of four samples there is no pass@8
    assert re.search(r"M_0 +pass@1 [\d.]+% +pass@4 [\d.]+%", printed)


def test_the_speed_notebook_counts_what_was_measured(executed):
    _, printed = executed
    assert "1 threads" in printed and "s of operations in all" in printed


def test_the_scale_notebook_simulates_from_what_it_measured(executed):
    _, printed = executed
    assert "3 chunks of 136 problems, the last of 28: 8 batches of 17" in printed
    assert re.search(r"1 chunks: simulated [\d.]+ s; drawn in [\d.]+ CPU seconds", printed)


def test_every_notebook_is_executed_by_a_test(micro_run):
    run, _ = micro_run
    here = {name for name, _ in SMALL.values()}
    in_the_micro_run = {"01_sample", "02_pairs", "03_train", "04_evaluate", "05_report", "06_methods"}
    elsewhere = {"00_warm_start", "01b_reward", "03b_extrapolate", "03c_online", "14_online"}  # tests of their own
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == here | in_the_micro_run | elsewhere
    assert in_the_micro_run == {path.stem for path in run.rglob("*.ipynb")}
    assert set(SMALL) <= set(globals())  # each has its test
