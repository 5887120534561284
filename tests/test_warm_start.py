"""M_0 as an adapter trained on a few gold solutions: what the loop samples first, begins from and is held against."""

import json

import pytest
import torch

from irpo_utils.files import NOTEBOOKS, ConfigError, file_hash, read_jsonl, write_text
from irpo_utils.model import load
from irpo_utils.run.config import dump
from irpo_utils.run.driver import check_gold
from irpo_utils.run.notebooks import run_notebook
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import STAGES, WarmStartStage, plan
from irpo_utils.tasks import get_task
from irpo_utils.tasks.base import Problem

SETTINGS = ["warm_start.problems=16", "warm_start.max_steps=4", "warm_start.eval_every=2", "warm_start.lr=5e-3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose M_0 was made by its notebook, and M_1 of IRPO and of SFT on chosen by the stages."""
    folder = tmp_path_factory.mktemp("warm")
    config = load_preset("micro", [*SETTINGS, "methods=irpo,sft_chosen", "iterations=1"])
    write_text(folder / "config.yaml", dump(config))
    run_notebook(NOTEBOOKS / "00_warm_start.ipynb", folder / "executed.ipynb", {"run": str(folder)}, 1)
    for method in config.methods:
        for stage in plan(config, folder, method, 0):
            if stage.name != "04_evaluate" and not stage.is_done():
                stage.begin().run()
                stage.finish()
    return folder


def stage(run, name, method="irpo", t=1):
    return STAGES[name](run, method, 0, t)


def test_the_loop_s_problems_are_not_those_of_the_warm_start(run):
    stages = plan(load_preset("micro", SETTINGS), run, "irpo", 0)
    assert [s.name for s in stages[:3]] == ["00_warm_start", "04_evaluate", "01_sample"]
    everything = [p.id for p in get_task(stages[0].config.task).problems("train")]
    drawn = {row["problem"] for row in read_jsonl(stage(run, "01_sample").path("prompts.jsonl"))}
    assert drawn == set(everything[16:]) and len(drawn) == 32


def test_m0_is_trained_and_is_what_is_sampled_and_held_against(run, seed_model):
    warm = WarmStartStage(run, "irpo", 0, 0)
    assert warm.is_done() and warm.result()["dpo_at_start"] is None
    adapter = warm.path("adapter")
    for name in ("01_sample", "03_train"):
        assert stage(run, name).input("policy") == adapter
    m0 = load.load_policy(warm.config.model, adapter)
    ids = torch.arange(5, 30).unsqueeze(0)
    with torch.no_grad():
        assert (m0(ids).logits - seed_model(ids).logits).abs().max() > 0.1
    facts = stage(run, "03_train").result()
    assert facts["dpo_at_start"] == pytest.approx(0.6931, abs=1e-3)  # M_1 begins as M_0, its reference
    assert facts["sampler_gap"] < 1e-3  # and is what was sampled


def test_methods_that_begin_anew_begin_from_m0_and_share_it(run):
    assert stage(run, "03_train", "sft_chosen").input("policy") == WarmStartStage(run).path("adapter")
    plain, other = (WarmStartStage(run, method, 0, 0).key() for method in ("irpo", "sft_chosen"))
    assert plain == other
    changed = load_preset("micro", [*SETTINGS, "methods=irpo", "iterations=1", "irpo.train.lr=0.5", "train.lr=0.25"])
    assert WarmStartStage(run, "irpo", 0, 0, changed).key() == plain


def test_the_same_warm_start_gives_the_same_bytes(run):
    warm = WarmStartStage(run, "irpo", 0, 0)
    before = file_hash(warm.path("adapter"))
    warm.begin(again=True).run(show=lambda line: None)
    warm.finish()
    assert file_hash(warm.path("adapter")) == before and stage(run, "01_sample").is_done()
    assert json.loads((warm.folder / "training.json").read_text())["best_step"] in (2, 4)


def test_without_one_there_is_no_such_stage(tmp_path):
    write_text(tmp_path / "config.yaml", dump(load_preset("micro")))
    with pytest.raises(ConfigError, match="00_warm_start: M_0 has no such stage; it has 04_evaluate"):
        WarmStartStage(tmp_path, "irpo", 0, 0).begin()


def test_what_leaves_the_loop_no_problem_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="warm_start.problems: the warm start takes all 48 problems"):
        load_preset("micro", ["warm_start.problems=48"])
    long = load_preset("micro", ["warm_start.problems=4", "train.batch=1024", "warm_start.max_steps=500"])
    assert WarmStartStage(tmp_path, config=long).config.train.max_steps == 500
    rows = [{"question": f"How many are {i}?", "answer": str(i), "solution": f"Final answer: {i}"} for i in range(12)]
    for row in rows[6:]:
        del row["solution"]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = ["task.name=jsonl", f"task.train={file}", f"task.test={file}", "task.train_size=0", "task.dev_size=2"]
    problems = {"train": [Problem(str(i), "q", "a", row.get("solution", "")) for i, row in enumerate(rows)]}
    for count, message in ((12, "the warm start takes all 12 training problems"), (7, "not all of the first 7")):
        with pytest.raises(ValueError, match=f"warm_start.problems: {message}"):
            check_gold(load_preset("micro", [*task, f"warm_start.problems={count}"]), problems)


def test_each_seed_has_its_own_problems_and_base_where_the_loop_has(tmp_path):
    config = load_preset("micro", [*SETTINGS, "task.by_seed=true", "model.path=models/m-{seed}", "seeds=2"])
    warm, sample, *_ = (
        stage for stage in plan(config, tmp_path, "irpo", 1) if stage.name in ("00_warm_start", "01_sample")
    )
    assert warm.config.task == sample.config.task and warm.config.model.path == "models/m-1"
    assert warm.config.train.max_steps == 4
