"""What a run has stays: until a stage is done anew, beside a change, and where a method cannot go on."""

import json
import shutil

import pytest
from conftest import OUTPUTS, drive, remove_run

from irpo_utils.files import ConfigError, MissingArtefact, file_hash, relative
from irpo_utils.run import lab
from irpo_utils.run.beside import opened
from irpo_utils.run.stages import PairsStage, SampleStage, TrainStage, finished
from irpo_utils.run.store import open_run


@pytest.fixture
def run(micro_run, tmp_path):
    """A copy of a finished run, in another folder."""
    shutil.copytree(micro_run[0], tmp_path / "run")
    return tmp_path / "run"


def bytes_of(stage):
    return {name: file_hash(stage.folder / name) for name in (*stage.writes(), stage.manifest_path().name)}


def test_a_stage_that_is_done_is_shown_and_not_touched(run, capsys):
    stage = PairsStage(run)
    before, made = bytes_of(stage), stage.manifest_path().stat().st_mtime_ns
    stage.begin()
    assert "02_pairs is done, and shown as it is; again = True does it anew" in capsys.readouterr().out
    pairs, audit = stage.run()
    assert len(pairs) == audit["pairs"] and stage.finish() == stage.manifest()
    assert bytes_of(stage) == before and stage.manifest_path().stat().st_mtime_ns == made


def test_done_anew_it_keeps_the_old_outputs_until_it_is_finished(run):
    stage = PairsStage(run)
    before, first = bytes_of(stage), stage.manifest()
    stage.begin(again=True)
    assert bytes_of(stage) == before and PairsStage(run).is_done()
    stage.run()
    assert bytes_of(stage) == before and PairsStage(run).is_done()
    stage.finish()
    assert PairsStage(run).is_done() and stage.manifest()["outputs"] == first["outputs"]
    assert not stage.partial_folder().exists()


def test_a_stage_whose_parameters_changed_keeps_what_it_had_until_then(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  k: 2", "  k: 1"))
    stage = PairsStage(run)
    assert stage.why_not_done() == ["pairs.k 2 -> 1"]
    before = bytes_of(stage)
    stage.begin()
    assert bytes_of(stage) == before
    del stage
    (run / "config.yaml").write_text(text)
    assert PairsStage(run).is_done()


def test_published_runs_are_not_worked_in():
    published = sorted((OUTPUTS / "reference").glob("*/config.yaml"))[0].parent
    before = sorted(p.name for p in published.rglob("*"))
    for name in (published, relative(published)):
        with pytest.raises(ConfigError, match="is published as it is; take a run of your own"):
            SampleStage(name)
    assert sorted(p.name for p in published.rglob("*")) == before


def test_a_mistyped_run_is_no_new_run(tmp_path):
    for name in (tmp_path / "tinny", "outputs/tinny"):
        with pytest.raises(ConfigError, match=r"tinny is no run \(there is: "):
            SampleStage(name)
    assert not (tmp_path / "tinny").exists() and not (OUTPUTS / "tinny").exists()


def test_a_change_opens_a_run_beside_and_takes_what_it_does_not_touch(run):
    before = {path: file_hash(path) for path in run.rglob("*") if path.is_file()}
    other = opened(run, ["train.beta=0.3"])
    assert other == run.with_name("run+train.beta=0.3") and opened(other, ["train.beta=0.3"]) == other
    assert open_run(other).train.beta == 0.3 and open_run(run).train.beta != 0.3
    assert SampleStage(other).is_done() and PairsStage(other).is_done() and not TrainStage(other).is_done()
    assert file_hash(other / "m0/seed_0/samples.jsonl") == file_hash(run / "m0/seed_0/samples.jsonl")
    stage = TrainStage(other).begin()
    stage.run(show=lambda line: None)
    stage.finish()
    assert file_hash(stage.folder / "adapter") != file_hash(TrainStage(run).folder / "adapter")
    assert {path: file_hash(path) for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match=r"did you mean 'train\.beta'"):
        opened(run, ["train.betta=1"])
    assert opened(run) == run


def test_a_model_behind_one_that_is_not_done_is_not_reported(run):
    config, left_out = finished(run)
    assert config.methods == ("irpo", "sft_gold") and not left_out
    (TrainStage(run).folder / "training.json").write_text("{}")
    config, left_out = finished(run)
    assert config.methods == ("sft_gold",)
    assert left_out == ["irpo, seed 0, iteration 1, 03_train: output training.json is not as it was left"]
    (TrainStage(run, "sft_gold").folder / "training.json").unlink()
    with pytest.raises(MissingArtefact, match=r"no method of .* is finished \(irpo, seed 0, iteration 1, 03_train"):
        finished(run)


def test_a_copied_run_says_where_it_lies(run):
    assert f'"{relative(run)}/irpo/seed_0/iteration_1/adapter"' in TrainStage(run).load_line()


def test_much_finished_work_is_not_replaced_unasked(micro_run):
    remove_run("test-kept")
    run = OUTPUTS / "test-kept"
    shutil.copytree(micro_run[0], run)
    path = PairsStage(run).manifest_path()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 4000}))
    command = ("micro", "run=test-kept", "methods=irpo", "iterations=1", "pairs.k=1")
    before = (run / "config.yaml").read_bytes()
    try:
        done = drive(*command)
        assert done.returncode == 2 and not done.stdout
        assert "outputs/test-kept would lose finished work" in done.stderr
        assert "pairs.k 2 -> 1" in done.stderr and "choose another run=NAME to keep it, or add --yes" in done.stderr
        assert (run / "config.yaml").read_bytes() == before and PairsStage(run).is_done()
        done = drive(*command, "--yes")
        assert done.returncode == 0, done.stderr
        assert "changed since this run's last start: iterations 2 -> 1; methods ['irpo', 'sft_gold'] -> ['irpo']; pairs.k 2 -> 1" in done.stdout  # fmt: skip
        assert "done again: 3 finished stages" in done.stdout
    finally:
        remove_run("test-kept")


def test_a_method_that_cannot_go_on_does_not_take_the_others_report(tmp_path):
    remove_run("test-one-fails")
    try:
        done = drive(
            "micro", "run=test-one-fails", "methods=irpo,sft_gold", "iterations=1", "sampling.max_new_tokens=2"
        )
        assert done.returncode == 1
        assert "irpo, seed 0: ValueError: no pair can be made" in done.stderr and "Traceback" not in done.stderr
        assert "SFT on gold" in done.stdout and "IRPO" not in done.stdout.partition("method")[2]
        folder = OUTPUTS / "test-one-fails" / "irpo" / "seed_0" / "iteration_1"
        assert (folder / "02_pairs-failed.ipynb").exists() and not (folder / "02_pairs.ipynb").exists()
        assert "not in this report" in (OUTPUTS / "test-one-fails" / "05_report.ipynb").read_text()
    finally:
        remove_run("test-one-fails")


def test_the_lab_s_copies_follow_their_notebooks_and_keep_what_was_written(tmp_path, monkeypatch):
    notebooks, copies = tmp_path / "notebooks", tmp_path / "lab"
    notebooks.mkdir()
    monkeypatch.setattr(lab, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(lab, "FOLDER", copies)
    (notebooks / "a.ipynb").write_text("1")
    (notebooks / "b.ipynb").write_text("1")
    assert not lab.copies() and (copies / "a.ipynb").read_text() == "1"
    (copies / "a.ipynb").write_text("mine")
    assert not lab.copies() and (copies / "a.ipynb").read_text() == "mine"
    for name in ("a", "b"):
        (notebooks / f"{name}.ipynb").write_text("2")
    (line,) = lab.copies()
    assert "a.ipynb was changed, so the new one is" in line and not lab.copies()
    assert [(copies / f"{n}.ipynb").read_text() for n in ("a", "a-new", "b")] == ["mine", "2", "2"]
