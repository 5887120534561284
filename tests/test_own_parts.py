"""A method of one's own: a selection and a loss in a file, a recipe in another, and no edit of the package."""

import json
import shutil

import pytest
from conftest import ROOT, drive, remove_run

from irpo_utils.files import ConfigError, read_jsonl
from irpo_utils.methods.select import select
from irpo_utils.model.records import Prompt, Sample
from irpo_utils.run.presets import load_preset
from irpo_utils.settings import PairsConfig

PARTS = '''
import torch.nn.functional as F

from irpo_utils.model.losses import PairLosses, nll_term


def hardest(samples, gold, settings, rng):
    """The right sample that the model thought least likely, against the wrong one that it thought most likely."""
    right = sorted((s for s in samples if s.reward == 1), key=lambda s: s.logp)
    wrong = sorted((s for s in samples if s.reward != 1), key=lambda s: -s.logp)
    return [(right[0], wrong[0])] if right and wrong else []


def hinge(scores, beta):
    """max(0, 1 - margin), as in SLiC."""
    chosen, rejected = (beta * (p - r) for p, r in ((scores.chosen, scores.reference_chosen), (scores.rejected, scores.reference_rejected)))
    return PairLosses(F.relu(1 - (chosen - rejected)), None, nll_term(scores.chosen, scores.chosen_lengths), chosen, rejected)
'''  # noqa: E501
RECIPE = """
hardest_first:
  label: Hardest pairs, hinge
  rounds: [{reward: answer, selection: "%s:hardest", loss: "%s:hinge", start: M_t, reference: M_0, inherits: irpo}]
"""


@pytest.fixture
def own(tmp_path):
    parts, recipes = tmp_path / "my_parts.py", tmp_path / "my_methods.yaml"
    parts.write_text(PARTS)
    recipes.write_text(RECIPE % (parts, parts))
    yield parts, recipes
    remove_run("test-own")


def test_a_method_of_ones_own_runs_like_any_other(own, micro_run):
    """It starts from M_t and is held against M_0: `reference` is a choice beside `start`."""
    parts, recipes = own
    shutil.copytree(micro_run[0] / "m0", ROOT / "outputs" / "test-own" / "m0")  # which it shares with other methods
    command = ["micro", "run=test-own", f"recipes={recipes}", "methods=hardest_first", "iterations=2"]
    done = drive(*command, "hardest_first.train.beta=0.5")
    assert done.returncode == 0 and "Hardest pairs, hinge" in done.stdout, done.stdout + done.stderr
    run = ROOT / "outputs" / "test-own"
    samples = read_jsonl(run / "m0" / "seed_0" / "samples.jsonl")
    for pair in read_jsonl(run / "hardest_first" / "seed_0" / "iteration_1" / "pairs.jsonl"):
        own_samples = [s for s in samples if s["problem"] == pair["problem"] and s["finished"]]
        assert pair["chosen_logp"] == min(s["logp"] for s in own_samples if s["reward"] == 1)
        assert pair["rejected_logp"] == max(s["logp"] for s in own_samples if s["reward"] != 1)
    second = run / "hardest_first" / "seed_0" / "iteration_2"
    steps = read_jsonl(second / "steps.jsonl")
    assert steps[0]["loss"] != pytest.approx(1.0)  # the policy, M_1, is not its reference
    assert json.loads((second / "training.json").read_text())["dpo_at_start"] is None
    parts.write_text(PARTS.replace("1 - (chosen", "2 - (chosen"))
    why = drive("why", "test-own")
    assert f"03_train: input {parts}:hinge" in why.stdout and "m0/seed_0/01_sample: done" in why.stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":hardest", ":hardst", "my_parts.py has no 'hardst'"),
        (":hinge", ":hing", "my_parts.py has no 'hing'"),
        ("hardest_first", "irpo", "a method is called 'irpo' already"),
    ],
)
def test_what_is_wrong_with_it_is_named(own, old, new, message):
    _, recipes = own
    recipes.write_text(recipes.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_preset("micro", [f"recipes={recipes}", "methods=hardest_first"])


def test_a_file_of_recipes_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="nowhere.yaml is missing"):
        load_preset("micro", ["recipes=nowhere.yaml"])


def test_a_selection_that_fails_is_named_with_the_problem(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def broken(samples, gold, config, rng):\n    return samples[0].nothing\n\n\n"
                    "def alone(samples, gold, config, rng):\n    return [(s, None) for s in samples]\n")  # fmt: skip
    prompts, config = {"a": Prompt("a", "p", (1,))}, PairsConfig()
    drawn = {"a": [Sample("a", 0, "r", None, 1.0, 1.0, True, -1.0, (5, 2))]}
    with pytest.raises(
        ValueError, match=r"mine\.py:broken fails on problem a: AttributeError: .*nothing.*gives a list of"
    ):
        select(f"{file}:broken", drawn, prompts, config)
    with pytest.raises(ValueError, match="gave a response without a rejected one; set its attribute pairs = False"):
        select(f"{file}:alone", drawn, prompts, config)
