"""The report on a run that is written by hand, with a method of the user's own beside one of the package."""

import json
import shutil
import subprocess
import sys
from itertools import combinations, permutations

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from irpo_utils import files
from irpo_utils.extras.process import figures as process_figures
from irpo_utils.methods.recipes import catalogue
from irpo_utils.report import comparison, displays, figures, tables
from irpo_utils.run.card import outcome
from irpo_utils.run.config import dump, read_config
from irpo_utils.run.driver import compare, report
from irpo_utils.run.page import page
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import method_seeds, plan

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
def three_seeds(run, tmp_path_factory):
    """The same run thrice."""
    copy = tmp_path_factory.mktemp("seeds") / "run"
    shutil.copytree(run, copy)
    for folder in copy.glob("*/seed_0"):
        for seed in (1, 2):
            shutil.copytree(folder, folder.with_name(f"seed_{seed}"))
    return copy, read_config(copy / "config.yaml").but(seeds=3)


@pytest.fixture(scope="module")
def metrics(run, config):
    folders = {"irpo": run / "irpo" / "seed_0" / "iteration_1", "mine": run / "mine" / "seed_0" / "iteration_1"}
    rows = [
        {"method": method, "seed": 0, "iteration": t, **json.loads((folder / "evaluation.json").read_text())}
        for method, last in folders.items()
        for t, folder in enumerate((run / "m0" / "seed_0", last))
    ]
    return tables.metrics_table("x", rows, config)


def test_a_method_of_the_users_has_its_label_and_a_look_of_its_own(config, metrics):
    looks = [figures.look_of(name, config.catalogue) for name in config.catalogue]
    assert looks[0]["color"] == figures.BLUE and list(config.catalogue)[-1] == "mine"
    assert len({(look["color"], look["marker"]) for look in looks}) == len(looks)
    rows = tables.summary_table(metrics, config).to_dict("records")
    assert [(r["method"], r["iteration"], r["greedy"]) for r in rows] == [
        ("M_0", 0, "25.0"),
        ("IRPO (DPO + NLL)", 1, "100.0"),
        ("From M_0, held against M_t", 1, "25.0"),
    ]
    assert figures.accuracy_curves(metrics, config.catalogue).axes[0].get_legend_handles_labels()[1] == [
        "IRPO (DPO + NLL)",
        "From M_0, held against M_t",
    ]


# Linear RGB as seen without red cones and without green ones: Machado et al. 2009, severity 1.
EYES = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of linear sRGB


def cielab(color, eye):
    rgb = np.array(to_rgb(color))
    seen = np.array(eye) @ np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    x, y, z = np.cbrt(XYZ @ seen.clip(0, 1) / XYZ.sum(1))  # the straight part near black is left out
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(one, other):
    """Delta E of 1976 between two colours, for the eye that tells them apart worst. A just visible one is about 2."""
    return min(np.linalg.norm(cielab(one, eye) - cielab(other, eye)) for eye in EYES.values())


def test_methods_are_told_apart_by_every_eye():
    looks = {name: figures.look_of(name, catalogue()) for name in catalogue()}
    for (one, a), (other, b) in combinations(looks.items(), 2):
        alike = a["marker"] == b["marker"] or a["linestyle"] == b["linestyle"]
        assert not alike or difference(a["color"], b["color"]) >= 15, (one, other)
    for one, other in combinations(("irpo", "dpo", "sft_chosen", "sft_gold"), 2):
        assert difference(looks[one]["color"], looks[other]["color"]) >= 30, (one, other)
    ours = (process_figures.RIGHT, process_figures.WRONG, process_figures.GREEN, process_figures.PURPLE)
    assert set(ours) <= set(figures.COLORS)


def ahead_of(points, told_apart=True):
    """As `comparison.differences` gives it: method -> its points, the best first."""
    rows = [(a, b, points[a] - points[b], told_apart) for a, b in permutations(points, 2)]
    return pd.DataFrame(rows, columns=["method", "against", "points", "told_apart"])


def test_the_cells_of_the_differences_are_told_apart_by_every_eye():
    """The faintest colours from white and from each other; and what is written in them from them (WCAG: 4.5)."""
    (ax,) = figures.differences(ahead_of({"a": 100.0, "b": 99.9, "c": 0.0})).axes
    cells = ax.images[0].get_array()
    (_, faint, dark), (faint_behind, *_), (dark_behind, *_) = cells
    for color in (faint, dark, faint_behind, dark_behind):
        assert difference(color, "white") >= 15
        assert (cielab(color, EYES["all"])[0] + 16) ** 3 / 116**3 + 0.05 >= 4.5 * 0.05  # written in black
    assert difference(faint, faint_behind) >= 30 and difference(dark, dark_behind) >= 60
    assert [text.get_color() for text in ax.texts] == ["black"] * 6
    plt.close("all")


def test_differences_that_are_not_shown_have_a_mark_and_no_colour():
    fig = figures.differences(ahead_of({"one": 2.0, "other": 0.0}, told_apart=False))
    assert [text.get_text() for text in fig.axes[0].texts] == ["+2.0\n≈", "-2.0\n≈"]
    cells = fig.axes[0].images[0].get_array()
    assert difference(cells[0, 1], "white") < 2 and difference(cells[1, 0], "white") < 2
    assert figures.described(fig).endswith("lines: row ahead, row behind, ≈ cannot be told apart")
    plt.close(fig)


def test_the_numbers_of_twenty_methods_stay_in_their_cells():
    fig = figures.differences(ahead_of({name: -3.0 * i for i, name in enumerate(list(catalogue())[:20])}))
    fig.canvas.draw()
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["irpo 1", "dpo 2"]
    cell = ax.get_window_extent().width / 20
    assert len(ax.texts) == 380 and max(text.get_window_extent().width for text in ax.texts) < cell
    plt.close(fig)


def test_the_log_probabilities_are_those_of_own_winners(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.TrainStage, "curve", lambda stage: [stage.method])
    config = load_preset("claims", ["methods=irpo,dpo,sft_chosen,sipf,orpo,irpo_gold,sft_gold"])
    assert list(tables.training_curves(tmp_path, config)) == ["irpo", "dpo", "sft_chosen"]


def test_steps_that_are_wrong_are_means_over_seeds():
    def row(seed, iteration, **wrong):
        errors = {kind: {"wrong": share} for kind, share in wrong.items()}
        return {"method": "irpo", "seed": seed, "iteration": iteration, "test": {"errors": errors}}

    rows = [row(0, 0, half=0.2, two=0.9, extra=1.0), row(1, 0, half=0.4), row(0, 1, half=0.0), row(1, 1, half=0.1)]
    fig = figures.error_heatmap(rows, ["irpo", "mine"])
    assert [text.get_text() for text in fig.axes[0].texts] == ["30", "5"]  # "two" came in one seed alone
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["half"]
    assert not fig.axes[1].axison  # a method without rows
    plt.close(fig)


def test_figures_can_be_read_on_a_phone(config, metrics):
    every = pd.concat([metrics[metrics.method == "irpo"].assign(method=name) for name in catalogue()])
    steps = [{"step": 1, "loss": 1.0, "nll": 0.3, "margin": 0.1, "dev_greedy": 0.5}]
    steps[0] |= {"watched_chosen_logp": -1.0, "watched_rejected_logp": -2.0}
    row = {"method": "irpo", "seed": 0, "iteration": 0, "test": {"errors": {"half": {"wrong": 0.5}}}}
    costs = comparison.by_seed(every, every.assign(samples=1, drawn=1, trained=1))
    knob = pd.DataFrame({"knob": "twice", "value": ["no", "steps, pairs"], "default": [True, False], "dev_greedy": 0.5})
    change = pd.DataFrame({"knob": ["twice"], "value": "steps, pairs", "seeds": 1, "low": -1.0, "high": 1.0})
    for fig in (
        figures.ablations(knob, change),
        figures.accuracy_curves(every, catalogue()),
        figures.accuracy_against_compute(costs, lambda results: results.iteration, catalogue()),
        figures.logp_curves(dict.fromkeys(catalogue(), steps), catalogue()),
        figures.loss_curves(steps, 1),
        figures.pass_curves({"M_0": [1, 2], "M_1": [2, 4]}, 4),
        figures.error_heatmap([row], ["irpo"]),
        figures.differences(ahead_of(dict.fromkeys(catalogue(), 0))),
    ):
        fig.canvas.draw()
        texts = [text for text in fig.findobj(Text) if text.get_visible() and text.get_text()]
        width = fig.get_tightbbox().width
        assert min(text.get_fontsize() for text in texts) / 72 * 390 / width >= 8  # pixels high, 390 wide
        plt.close(fig)


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


def test_what_a_method_trains_on_and_how_it_is_unlike_irpo_are_read_from_its_recipe(run):
    known = catalogue([run / "my_methods.yaml"])
    assert {
        name: comparison.material(known[name]) for name in ("irpo", "sft_chosen", "spin", "sft_gold", "dpo_st", "expo")
    } == {
        "irpo": "pairs", "sft_chosen": "responses", "spin": "pairs with gold", "sft_gold": "gold",
        "dpo_st": "gold, then pairs, then responses", "expo": "pairs, then extrapolation",
    }  # fmt: skip

    def unlike(one, other="irpo"):
        return comparison.unlike(known[one], known[other])

    assert unlike("irpo") == [] and unlike("dpo") == ["loss"] and unlike("mine") == ["loss", "start"]
    assert unlike("cpo") == ["loss"]  # which has no reference to choose
    assert unlike("sft_gold") == ["selection", "loss", "start"]  # nor this one a reward
    assert unlike("sipf", "orpo") == ["reward"] and unlike("expo") == ["loss"]
    assert unlike("self_rewarding") == ["reward", "selection", "loss"]


def test_a_difference_is_that_of_the_same_problems():
    def solved(*right):
        return {f"p{i}": float(r) for i, r in enumerate(right)}

    one, other = solved(*[1] * 9, 0), solved(*[0] * 7, 1, 1, 1)
    found = tables.paired([one], [other])
    # Seven for the better, one for the worse: p = 2 (1 + 8) / 2**8.
    assert found["points"] == pytest.approx(60) and found["p"] == 18 / 256 and not found["told_apart"]
    assert found["low"] > 0  # what the bootstrap says of so few is not what decides
    back = tables.paired([other], [one])
    assert [back[k] for k in ("points", "low", "high")] == pytest.approx([-found[k] for k in ("points", "high", "low")])
    assert tables.paired([solved(*[1] * 6)], [solved(*[0] * 6)])["told_apart"]  # p = 2 / 2**6
    # Two seeds that gain 50 and 50 points on the same two of four problems: a problem's spread, 100 / sqrt(12), and
    # Student's 3.18 of four problems.
    twice = tables.paired([solved(1, 1, 0, 0)] * 2, [solved(0, 0, 0, 0)] * 2)
    assert twice["p"] is None and not twice["told_apart"]
    assert [twice[k] for k in ("points", "low", "high")] == pytest.approx([50, 50 - 318 / 12**0.5, 50 + 318 / 12**0.5])


def test_the_family_table_is_sorted_in_groups_and_holds_each_against_irpo(run, config, metrics):
    ahead, spent = comparison.differences(run, config), comparison.spent_table(run, config)
    assert ahead[["method", "against", "points", "p", "told_apart"]].values.tolist() == [
        ["irpo", "mine", 75.0, 0.25, False],
        ["mine", "irpo", -75.0, 0.25, False],
    ]
    first, last = comparison.family_table(metrics, spent, ahead, config).to_dict("records")
    assert (first["trained on"], last["trained on"]) == ("pairs", "")
    assert (first["M_1"], last["M_1"], first["unlike irpo"], last["unlike irpo"]) == (
        "100.0",
        "25.0",
        "",
        "loss, start",
    )
    assert first["points ahead of irpo"] == "" and last["points ahead of irpo"].startswith(
        "≈ -75.0 (-100.0 to -25.0, p = 0.25)"
    )
    assert (last["samples"], last["tokens drawn"], last["tokens trained on"]) == ("32", "500", "700")
    # Another group between the two, whose best is not the best of all, and a method with fewer rounds.
    settings = [f"recipes={run / 'my_methods.yaml'}", "methods=dpo,sft_chosen,irpo,sft_gold,rft", "iterations=2"]
    own, rows = load_preset("micro", settings), []
    for method, greedy in (("dpo", 0.3), ("sft_chosen", 0.6), ("irpo", 0.9), ("sft_gold", 0.5), ("rft", 0.7)):
        rows += [
            {"method": method, "seed": 0, "iteration": t, "split": "test", "greedy": greedy}
            for t in range(1 if method == "sft_gold" else 2, own.rounds(method) + 1)
        ]
    made = pd.DataFrame(rows).assign(steps_right=None, samples=1, drawn=1, trained=1)
    table = comparison.family_table(made, made, ahead.iloc[:0], own)
    assert list(table.method) == [own.recipe(m).label for m in ("irpo", "dpo", "rft", "sft_chosen", "sft_gold")]
    assert list(table["trained on"]) == ["pairs", "", "responses", "", "gold"]
    assert list(table.M_1) == ["", "", "", "", "50.0"] and list(table.M_2) == ["90.0", "30.0", "70.0", "60.0", ""]


def test_a_single_method_is_held_against_none(run, config, metrics):
    own, alone = config.but(methods=["mine"]), metrics[metrics.method == "mine"]
    ahead = comparison.differences(run, own)
    (row,) = comparison.family_table(alone, comparison.spent_table(run, own), ahead, own).to_dict("records")
    assert row["unlike mine"] == row["points ahead of mine"] == ""
    assert comparison.differences_in_words(run, alone, ahead, own) == [
        "M_0 solves 25.0 % of the test problems. The last models of all methods solve 25.0 %."
    ]


def test_several_seeds_are_held_against_each_other_with_an_interval(three_seeds, metrics):
    run, config = three_seeds
    ahead = comparison.differences(run, config)
    assert list(ahead.p.isna()) == [True, True] and not ahead.told_apart.any()
    seeds = pd.concat([metrics.assign(seed=seed) for seed in range(3)])
    texts = comparison.differences_in_words(run, seeds, ahead, config)
    assert texts == [
        "M_0 solves 25.0 % of the test problems. The last model of IRPO (DPO + NLL) solves the most, 100.0 %, that of "
        "From M_0, held against M_t the fewest, 25.0 %.",
        "IRPO (DPO + NLL) cannot be told apart from: From M_0, held against M_t, +75.0 (-4.5 to +154.5).",
    ]


def test_gains_in_words_are_counted_by_hand(run, config):
    gained, same = tables.gains_in_words(run, config)
    # Three for the better and none for the worse: p = 2 / 2**3.
    assert "25.0% of the test answers are right before (M_0), 100.0% after (M_1)" in gained
    assert "3 turned right and 0 wrong: no change can be shown with 4 problems (sign test, p = 0.25)" in gained
    assert "Guessing has 10.0%; M_1 does better" in gained
    assert "1 turned right and 1 wrong" in same and "M_1 is not known to do better" in same


def test_what_an_iteration_mends_and_breaks_and_who_is_ahead_after_it(run, config, three_seeds):
    changes = tables.changes_table(run, config)
    assert list(changes.columns) == ["method", "test set", "iteration", "gain", "turned right", "turned wrong"]
    assert changes.values.tolist() == [
        ["IRPO (DPO + NLL)", "test", 1, "≈ +75.0 (+25.0 to +100.0, p = 0.25)", "3", "0"],
        ["From M_0, held against M_t", "test", 1, "≈ +0.0 (-50.0 to +75.0, p = 1)", "1", "1"],
    ]
    ahead = comparison.ahead_by_iteration(run, config)
    assert ahead.values.tolist() == [["From M_0, held against M_t", "≈ -75.0 (-100.0 to -25.0, p = 0.25)"]]
    assert comparison.ahead_by_iteration(run, config.but(methods=["irpo"])).empty
    assert list(tables.changes_table(*three_seeds)["turned right"]) == ["3, 3, 3", "1, 1, 1"]


def test_a_gain_of_several_seeds_counts_a_problem_once(three_seeds):
    gained, same = tables.gains_in_words(*three_seeds)
    # Nine answers for the better, but of three problems of four: half of one problem's spread, times Student's 3.18.
    assert (
        "9 turned right and 0 wrong: no change can be shown with 4 problems (+75.0 points, -4.5 to +154.5 over"
        in gained
    )
    assert "3 turned right and 3 wrong: no change can be shown with 4 problems (+0.0 points, " in same
    assert "M_1 does better (95 % interval 100.0% to 100.0%)" in gained


def test_what_was_used_up_is_summed(run, config, metrics):
    spent = comparison.spent_table(run, config)
    assert spent.to_dict("records")[1] == {
        "method": "mine", "seed": 0, "iteration": 1, "samples": 32, "drawn": 500, "trained": 700,
    }  # fmt: skip
    results = comparison.by_seed(metrics, spent)
    assert list(comparison.forward_passes(results)) == [0, 2600, 0, 2600]
    assert comparison.trained_on(run, config) is None  # nothing here knows the truth of a step


def test_an_artefact_that_is_not_there_is_named_with_its_notebook(run, config, tmp_path):
    files.write_text(tmp_path / "config.yaml", (run / "config.yaml").read_text())
    with pytest.raises(files.MissingArtefact, match=r"training.json is missing; run notebooks/03_train.ipynb"):
        comparison.spent_table(tmp_path, config)
    with pytest.raises(files.MissingArtefact, match=r"audit.json is missing; run notebooks/02_pairs.ipynb"):
        tables.audit_table(tmp_path, config)


def test_the_outcome_is_one_sentence(config):
    def row(method, seed, t, greedy):
        test = {"problems": 4, "greedy": greedy, "greedy_low": greedy - 0.125, "greedy_high": greedy + 0.125}
        return {"method": method, "seed": seed, "iteration": t, "test": test}

    one = [row("irpo", 0, 0, 0.25), row("irpo", 0, 1, 0.75), row("mine", 0, 0, 0.25), row("mine", 0, 1, 0.5)]
    sentence = "M_0 solves 25.0% of the 4 test problems, M_1 of IRPO (DPO + NLL) 75.0% (95 % interval: 62.5% to 87.5%)"
    assert outcome(one, config) == f"{sentence}."
    one[-1]["test"]["greedy"] = 1.0
    highest = "of 2 methods From M_0, held against M_t ends highest, at 100.0% (06_methods says which differ)"
    assert outcome(one, config) == f"{sentence}; {highest}."
    several = [*one, row("irpo", 1, 1, 0.25), row("mine", 1, 1, 0.0)]
    assert "M_1 of IRPO (DPO + NLL) 50.0% (2 seeds: 25.0% to 75.0%)." in outcome(several, config)


MARKUP = "<script>alert(1)</script> <img src=x onerror=alert(1)> [x](javascript:alert(1)) $\\frac{"
HOSTILE = f"{MARKUP} \x1b[31mred\x1b[0m"
SHOWN = f"{MARKUP} \\x1b[31mred\\x1b[0m"


def checked(made):
    """The parsed page, which loads nothing, runs nothing and leads nowhere else, whatever it shows."""
    soup = BeautifulSoup(made, "html.parser")
    (policy,) = soup.select("head > meta[http-equiv=Content-Security-Policy]")
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert not soup.select("script, link, iframe, object, embed, form, base, svg, video, audio")
    assert not [name for tag in soup.find_all(True) for name in tag.attrs if name.startswith("on")]
    assert all(image["src"].startswith("data:image/") for image in soup.select("img"))
    links = [tag["href"] for tag in soup.select("[href]")]
    assert all(link.startswith("#") and soup.find(id=link[1:]) for link in links), links
    assert "\x1b" not in made and "url(" not in made and "@import" not in made
    return soup


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A finished run whose problems, responses, label and further test set are hostile; and its report."""
    run = tmp_path_factory.mktemp("hostile")
    problems, further = run / "problems.jsonl", run / "<img src=x onerror=alert(1)>.jsonl"
    rows = [{"question": f"{HOSTILE} {i}", "answer": i, "solution": HOSTILE} for i in range(40)]
    files.write_jsonl(problems, rows[:24])
    files.write_jsonl(further, rows[24:])
    (run / "my_methods.yaml").write_text(OWN.replace("label: From M_0, held against M_t", f"label: '{MARKUP}'"))
    settings = [f"recipes={run / 'my_methods.yaml'}", "methods=irpo,mine", "iterations=1", "task.name=jsonl"]
    settings += [f"task.train={problems}", f"task.test={problems}", f"evaluation.test={further}"]
    config = load_preset("micro", [*settings, "task.train_size=8", "task.dev_size=4", "task.test_size=4"])
    files.write_text(run / "config.yaml", dump(config))
    facts = {"problems": 4, "greedy": 0.5, "greedy_low": 0.25, "greedy_high": 0.75, "chance": 0.1}
    responses = [{"split": "test", "problem": f"p{i}", "greedy": i % 2, "response": HOSTILE} for i in range(4)]
    watched = {"step": 1, "watched_chosen_logp": -1.0, "watched_rejected_logp": -2.0}
    contents = {
        "evaluation.json": json.dumps(dict.fromkeys(("dev", "test", str(further)), facts)),
        "responses.jsonl": "\n".join(map(json.dumps, responses)),
        "audit.json": json.dumps({"samples": 32, "right": 8, "pairs": 6, "drawn_tokens": 500}),
        "training.json": json.dumps(TRAINED),
        "steps.jsonl": json.dumps(watched),
    }
    for method, seed in method_seeds(config):
        for stage in plan(config, run, method, seed):
            for name in stage.writes():
                files.write_text(stage.path(name), contents.get(name, HOSTILE))
            outputs = {name: files.file_hash(stage.path(name)) for name in stage.writes()}
            files.write_json(stage.manifest_path(), {"key": stage.key(), "outputs": outputs, "seconds": 1.0})
    report(run, 1)
    return run


def test_the_page_of_a_hostile_run_shows_its_texts_as_text(hostile_run):
    soup = checked((hostile_run / "report.html").read_text())
    assert soup.find("td", string=MARKUP) and soup.find("th", string="greedy, <img src=x onerror=alert(1)>")
    paragraphs = [p.get_text() for p in soup.select("p")]
    assert [p for p in paragraphs if p.startswith(f"{MARKUP}: 50.0% of the test answers are right before")]


def test_the_page_begins_with_the_outcome_and_the_curve_and_has_contents(hostile_run):
    soup = checked((hostile_run / "report.html").read_text())
    first, then, *_ = soup.select("h2")
    begins = [tag for tag in first.find_all_next(["p", "img", "nav", "h2"])][:4]
    assert [tag.name for tag in begins] == ["p", "img", "p", "nav"]
    assert begins[0].get_text().startswith("M_0 solves 50.0% of the 4 test problems, M_1 of IRPO (DPO + NLL) 50.0%")
    headings = [heading.find(string=True) for heading in soup.select("h2")]
    assert [link.get_text() for link in soup.select("nav a")] == headings and then in begins[3].find_all_next("h2")
    assert [image["alt"].partition(" against")[0] for image in soup.select("img")] == [
        "greedy accuracy on test (%)",
        "The same pairs at every step: chosen (solid), rejected (dashed): log-probability of a response (nats)",
    ]


def test_the_methods_of_a_hostile_run_are_compared_in_text(hostile_run):
    compare(hostile_run, 1)
    notebook = nbformat.read(hostile_run / "06_methods.ipynb", as_version=4)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not any("text/markdown" in out.get("data", {}) for out in outputs)
    found = BeautifulSoup("".join(out.get("data", {}).get("text/html", "") for out in outputs), "html.parser")
    assert found.find("td", string=MARKUP) and not found.select("script, img, a")
    assert checked(page(hostile_run / "06_methods.ipynb", HOSTILE)).h1.get_text() == SHOWN


def test_tables_and_paragraphs_are_text():
    for made in (displays.table(pd.DataFrame({HOSTILE: [HOSTILE]})), displays.paragraphs([HOSTILE])):
        soup = BeautifulSoup(made.data, "html.parser")
        assert {tag.name for tag in soup.find_all(True)} <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
        assert {tag.get_text() for tag in soup.select("th, td, p")} == {SHOWN}


def test_a_page_shows_markup_of_any_output_as_text(tmp_path):
    """Should a text come past the displays, as one that a task of the user's own prints."""
    kinds = ("text/html", "text/markdown", "text/latex", "text/plain", "image/svg+xml", "application/javascript")
    outputs = [new_output("display_data", {kind: HOSTILE}) for kind in kinds]
    outputs += [new_output("stream", name=name, text=HOSTILE) for name in ("stdout", "stderr")]
    outputs += [new_output("display_data", {"text/html": '<a href="javascript:alert(1)">x</a>'})]
    notebook = new_notebook(cells=[new_markdown_cell(HOSTILE), new_code_cell("1", outputs=outputs)])
    nbformat.write(notebook, tmp_path / "hostile.ipynb")
    made = page(tmp_path / "hostile.ipynb", HOSTILE)
    soup = BeautifulSoup(made, "html.parser")
    assert not soup.select("script, [onerror], [href*=javascript]") and "\x1b" not in made
    assert made.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8
    assert [pre.get_text() for pre in soup.select("pre")] == [SHOWN] * 3


def test_a_label_with_control_characters_is_refused(tmp_path):
    (tmp_path / "my_methods.yaml").write_text(OWN.replace("label: From M_0", 'label: "\\e[31mred"  #'))
    with pytest.raises(files.ConfigError, match="label: expected one line of text without control characters"):
        load_preset("micro", [f"recipes={tmp_path / 'my_methods.yaml'}", "methods=mine"])


def test_notebooks_that_become_pages_have_no_equation():
    """A page has nothing that renders one."""
    for name in ("05_report", "06_methods"):
        cells = nbformat.read(files.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        assert not [cell.id for cell in cells if cell.cell_type == "markdown" and "$" in cell.source]


def test_the_report_does_not_load_torch():
    code = "import sys; from irpo_utils.report import comparison, figures, publish; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, check=True)
