"""The report on a run that is written by hand, with a method of the user's own beside one of the package."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from irpo_utils import files
from irpo_utils.report import comparison, figures, tables
from irpo_utils.run.config import dump, read_config
from irpo_utils.run.presets import load_preset

OWN = """
mine:
  label: From M_0, held against M_t
  rounds: [{reward: answer, selection: pairs, loss: dpo, start: M_0, reference: moving, inherits: dpo}]
"""
TRAINED = {"trained_tokens": 700, "best_step": 3}
# Of four test problems M_0 solves one; the last model of irpo solves all, that of mine another one.
RIGHT = {"m0": [1, 0, 0, None], "irpo": [1, 1, 1, 1], "mine": [0, 1, 0, None]}


def write_evaluation(folder, greedy):
    rows = [{"split": "test", "problem": f"p{i}", "greedy": g} for i, g in enumerate(greedy)]
    share = greedy.count(1) / len(greedy)
    split = {"problems": 4, "greedy": share, "greedy_low": 0.0, "greedy_high": 1.0, "chance": 0.1}
    files.write_jsonl(folder / "responses.jsonl", rows)
    files.write_json(folder / "evaluation.json", {"dev": split, "test": split})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "my_methods.yaml").write_text(OWN)
    settings = [f"recipes={folder / 'my_methods.yaml'}", "methods=irpo,mine", "iterations=1"]
    files.write_text(folder / "config.yaml", dump(load_preset("micro", settings)))
    write_evaluation(folder / "m0" / "seed_0", RIGHT["m0"])
    for method in ("irpo", "mine"):
        made = folder / method / "seed_0" / "iteration_1"
        write_evaluation(made, RIGHT[method])
        audit = {"samples": 32, "right": 8, "pairs": 6, "drawn_tokens": 500, "length_gap": -1.25}
        files.write_json(made / "audit.json", audit)
        files.write_json(made / "training.json", TRAINED)
    return folder


@pytest.fixture(scope="module")
def config(run):
    return read_config(run / "config.yaml")


@pytest.fixture(scope="module")
def metrics(run, config):
    folders = {"irpo": run / "irpo" / "seed_0" / "iteration_1", "mine": run / "mine" / "seed_0" / "iteration_1"}
    rows = [
        {"method": method, "seed": 0, "iteration": t, **json.loads((folder / "evaluation.json").read_text())}
        for method, last in folders.items()
        for t, folder in enumerate((run / "m0" / "seed_0", last))
    ]
    return tables.metrics_table("x", rows, config)


def test_a_method_of_the_users_has_its_label_and_a_colour_of_its_own(config, metrics):
    assert figures.color_of("irpo", config.catalogue) == figures.BLUE
    colors = [figures.color_of(name, config.catalogue) for name in config.catalogue]
    assert len(set(colors)) == len(colors) and list(config.catalogue)[-1] == "mine"
    rows = tables.summary_table(metrics, config).to_dict("records")
    assert [(r["method"], r["iteration"], r["greedy"]) for r in rows] == [
        ("M_0", 0, "25.0"),
        ("IRPO (DPO + NLL)", 1, "100.0"),
        ("From M_0, held against M_t", 1, "25.0"),
    ]
    assert list(comparison.family_table(metrics, config)["M_1"]) == ["100.0", "25.0"]
    assert figures.accuracy_curves(metrics, config.catalogue).axes[0].get_legend_handles_labels()[1] == [
        "IRPO (DPO + NLL)",
        "From M_0, held against M_t",
    ]


def test_a_further_test_set_has_a_column_behind_the_others(metrics, config):
    def columns(*sources):
        own = config.but(task=config.task.but(name="gsm8k"), evaluation=config.evaluation.but(test=sources))
        test = metrics[metrics.split == "test"]
        rows = [
            test.assign(split=source, greedy=test.greedy * share)
            for source, share in zip(sources, (0.5, 0.2), strict=False)
        ]
        found = tables.summary_table(pd.concat([metrics, *rows]), own)
        return {name: found[name].tolist() for name in found.columns[-len(sources) :]}

    assert columns("a/svamp.jsonl", "b/other.jsonl") == {
        "greedy, svamp": ["12.5", "50.0", "12.5"],
        "greedy, other": ["5.0", "20.0", "5.0"],
    }
    assert list(columns("a/test.jsonl", "b/test.jsonl")) == ["greedy, a/test.jsonl", "greedy, b/test.jsonl"]


def test_the_recipe_table_has_the_reference_of_the_round(config):
    rows = comparison.recipe_table(config).to_dict("records")
    assert [(r["loss"], r["start"], r["reference"]) for r in rows] == [("dpo+nll", "M_t", "M_t"), ("dpo", "M_0", "M_t")]


def test_methods_that_differ_in_one_choice_are_compared(run):
    settings = [f"recipes={run / 'my_methods.yaml'}", "methods=irpo,dpo,sft_chosen,mine"]
    config = load_preset("micro", settings)
    assert comparison.neighbours(config)[0] == ("irpo", "dpo", "with and without the NLL term")
    assert comparison.neighbours(config)[2:] == [("dpo", "mine", "start: M_t or M_0")]


def test_gains_in_words_are_counted_by_hand(run, config):
    gained, same = tables.gains_in_words(run, config)
    # Three for the better and none for the worse: p = 2 / 2**3.
    assert "25.0% of the test answers are right before (M_0), 100.0% after (M_1)" in gained
    assert "3 turned right and 0 wrong: no change can be shown with 4 answers (sign test, p = 0.25)" in gained
    assert "Guessing has 10.0%; M_1 does better" in gained
    assert "1 turned right and 1 wrong" in same and "M_1 is not known to do better" in same


def test_what_was_used_up_is_summed(run, config, metrics):
    spent = comparison.spent_table(run, config)
    assert spent.to_dict("records")[1] == {
        "method": "mine", "seed": 0, "iteration": 1, "samples": 32, "drawn": 500, "trained": 700,
    }  # fmt: skip
    results = comparison.by_seed(metrics, spent)
    assert list(comparison.forward_passes(results)) == [0, 2600, 0, 2600]
    assert list(comparison.budget_table(spent, config).columns)[2:5] == [
        "samples (k)",
        "tokens drawn (k)",
        "tokens trained on (k)",
    ]
    assert "solves the most, 100.0 %" in comparison.differences_in_words(run, metrics, config)[0]
    assert comparison.trained_on(run, config) is None  # nothing here knows the truth of a step


def test_an_artefact_that_is_not_there_is_named_with_its_notebook(run, config, tmp_path):
    files.write_text(tmp_path / "config.yaml", (run / "config.yaml").read_text())
    with pytest.raises(files.MissingArtefact, match=r"training.json is missing; run notebooks/03_train.ipynb"):
        comparison.spent_table(tmp_path, config)
    with pytest.raises(files.MissingArtefact, match=r"audit.json is missing; run notebooks/02_pairs.ipynb"):
        tables.audit_table(tmp_path, config)


def test_the_report_does_not_load_torch():
    code = "import sys; from irpo_utils.report import comparison, figures, publish; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, check=True)
