"""What a run has stays: until a stage is done anew, beside a change, and where a method cannot go on."""

import importlib
import json
import os
import shutil
import socket
from types import SimpleNamespace

import pytest
from conftest import OUTPUTS, drive, remove_run

from irpo_utils.__main__ import main
from irpo_utils.files import ROOT, ConfigError, MissingArtefact, file_hash, relative
from irpo_utils.run import code, kernels, lab, store
from irpo_utils.run.beside import opened
from irpo_utils.run.config import differences
from irpo_utils.run.driver import changes, configure
from irpo_utils.run.stages import PairsStage, SampleStage, TrainStage, finished, method_seeds, plan
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
    for name in ("micro", "outputs/lab/micro"):
        with pytest.raises(ConfigError, match="micro is no run"):
            opened(name)
    assert not (ROOT / "micro").exists() and not (OUTPUTS / "lab" / "micro").exists()
    assert open_run(tmp_path / "trial", "micro").task.train_size == 48


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
    with pytest.raises(ConfigError, match=r'overrides: a list, as \["train\.beta=0\.3"\]'):
        opened(run, "train.beta=0.3")
    assert opened(run) == run


def test_the_driver_goes_on_with_a_run_beside_as_it_was_opened(micro_run, capsys):
    other = opened(micro_run[0], ["train.beta=0.3"])
    try:
        config, folder, jobs = configure(other.name, ["jobs=2"])
        assert (config.train.beta, folder, jobs) == (0.3, other, 2) and config == open_run(other)
        assert differences(config, configure(other.name, ["train.beta=0.5"])[0]) == ["train.beta 0.3 -> 0.5"]
        assert main(["--estimate", other.name]) == 0  # its name has a "=", as a parameter has
        assert main(["--estimate", f"{other.name}4"]) == 2 and "no parameter" in capsys.readouterr().err
    finally:
        shutil.rmtree(other)


def test_a_run_beside_one_that_was_changed_since_is_not_taken_for_it(run):
    other = opened(run, ["train.beta=0.3"])
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("  k: 2", "  k: 1"))
    with pytest.raises(ConfigError, match=r"one of the two runs was changed since \(pairs\.k 2 -> 1\)"):
        opened(run, ["train.beta=0.3"])
    assert opened(other) == other and PairsStage(other).is_done()


def test_a_stage_that_another_process_has_done_in_the_meantime_is_shown(run, monkeypatch, capsys):
    stage, manifest = PairsStage(run), PairsStage(run).manifest_path()
    text = manifest.read_text()
    manifest.unlink()
    monkeypatch.setattr(store, "take", lambda lock, patience: manifest.write_text(text))  # while this one waits
    monkeypatch.setattr(store, "lock_at", lambda path: SimpleNamespace(release=lambda: None))
    stage.begin()
    assert "02_pairs is done, and shown as it is" in capsys.readouterr().out and not stage.at_work


def test_a_cell_that_is_run_twice_does_not_shorten_the_time(run, monkeypatch):
    stage = PairsStage(run).begin(again=True)
    clock = iter([0.0, 30.0, 30.0, 31.0])
    monkeypatch.setattr(store.time, "monotonic", lambda: next(clock, 31.0))
    stage.run()
    stage.run()
    assert stage.finish()["seconds"] == 31.0


def test_code_that_was_edited_after_it_was_loaded_is_not_named_as_what_ran(run, monkeypatch):
    importlib.import_module("irpo_utils.methods.select")
    monkeypatch.setitem(code._WHEN_IMPORTED, "methods/select.py", 0)
    with pytest.raises(ConfigError, match=r"methods/select\.py.* was changed after this kernel had loaded it; restart"):
        PairsStage(run).begin(again=True)
    assert PairsStage(run).is_done()


def test_an_edit_of_the_package_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    (tmp_path / "losses.py").write_text("a = 1\n")
    before = code.written()
    assert code.written() == before
    os.utime(tmp_path / "losses.py", (1, 1))
    assert code.written() != before


def test_a_driver_that_is_stopped_while_libraries_are_imported_leaves_no_kernel(monkeypatch):
    channel, theirs = socket.socketpair()
    request = {"arguments": [], "env": {}, "cwd": ".", "modules": []}
    channel.sendall((json.dumps(request) + "\n").encode())
    channel.close()
    monkeypatch.setattr(kernels.signal, "signal", lambda *_: None)
    monkeypatch.setattr(kernels.os, "fork", lambda: pytest.fail("a kernel that nobody waits for"))
    kernels.serve(theirs)


def test_what_is_done_again_is_what_takes_from_what_changed(run):
    config = open_run(run)
    more = config.but(evaluation=config.evaluation.but(samples=4))
    plans = [plan(more, run, *each) for each in method_seeds(more)]
    lines = changes(run, more, plans, replaces=False)
    assert lines[0] == "changed since this run's last start: evaluation.samples 8 -> 4"
    assert lines[1].startswith("done again: up to 4 finished stages")  # the evaluations: M_0, irpo twice, sft_gold


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
        assert (
            "changed since this run's last start: iterations 2 -> 1; "
            "methods ['irpo', 'sft_gold'] -> ['irpo']; pairs.k 2 -> 1"
        ) in done.stdout
        assert "done again: up to 3 finished stages" in done.stdout
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
        card = done.stdout.partition("report ...\n")[2]
        assert "M_1 of SFT on gold" in card and "IRPO" not in card
        folder = OUTPUTS / "test-one-fails" / "irpo" / "seed_0" / "iteration_1"
        assert (folder / "02_pairs-failed.ipynb").exists() and not (folder / "02_pairs.ipynb").exists()
        assert "Not in this report" in (OUTPUTS / "test-one-fails" / "05_report.ipynb").read_text()
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
    (copies / ".copied.json").unlink()  # a start that was killed before it had noted what it copied
    assert not lab.copies() and len(list(copies.glob("a*"))) == 1
    (copies / "a.ipynb").write_text("mine")
    assert not lab.copies() and (copies / "a.ipynb").read_text() == "mine"
    for name in ("a", "b"):
        (notebooks / f"{name}.ipynb").write_text("2")
    (line,) = lab.copies()
    assert "a.ipynb was changed, so the new one is" in line and not lab.copies()
    (new,) = copies.glob("a-*.ipynb")
    assert [path.read_text() for path in (copies / "a.ipynb", new, copies / "b.ipynb")] == ["mine", "2", "2"]
    new.write_text("mine too")
    for text in ("3", "2"):  # a newer one, and back
        (notebooks / "a.ipynb").write_text(text)
        lab.copies()
    assert new.read_text() == "mine too" and (copies / "a.ipynb").read_text() == "mine"


def test_the_lab_s_copy_that_was_only_opened_follows_its_notebook(tmp_path, monkeypatch):
    def notebook(text, **metadata):
        cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": [text]}
        return json.dumps({"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})

    monkeypatch.setattr(lab, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(lab, "FOLDER", tmp_path / "lab")
    source, copy = tmp_path / "a.ipynb", tmp_path / "lab" / "a.ipynb"
    source.write_text(notebook("1"))
    lab.copies()
    copy.write_text(notebook("1", language_info={"name": "python"}))  # as JupyterLab does
    source.write_text(notebook("2"))
    assert not lab.copies() and copy.read_text() == notebook("2")
    ran = json.loads(notebook("2"))
    ran["cells"][0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["2"]}]
    for mine in (json.dumps(ran), notebook("mine")):  # what was run, or written, stays
        copy.write_text(mine)
        source.write_text(notebook(str(len(mine))))
        (line,) = lab.copies()
        assert "a.ipynb was changed" in line and copy.read_text() == mine


def test_a_process_does_not_work_by_parameters_that_were_changed_since_its_stage_began(run):
    PairsStage(run).begin(again=True)
    PairsStage(run).join()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("\n  k: 2", "\n  k: 3"))
    with pytest.raises(ConfigError, match="02_pairs: the run's config.yaml was changed while it began"):
        PairsStage(run).join()


def test_a_module_is_known_by_all_its_lines(tmp_path, monkeypatch):
    path = tmp_path / "module.py"
    monkeypatch.setattr(code, "module_file", lambda name: path)

    def hashed(text):
        path.write_text(text)
        code.module_hash.cache_clear()
        return code.module_hash("module")

    assert hashed("x = (\n 7\n % 2\n)") == hashed("x = 7 % 2  # a comment") != hashed("x = (\n 7\n % 3\n)")
    code.module_hash.cache_clear()


def test_inputs_that_change_while_a_stage_is_at_work_are_not_named_as_what_it_was_made_of(run, capsys):
    stage = PairsStage(run).begin(again=True)
    drawn = run / "m0" / "seed_0" / "samples.jsonl"
    text = drawn.read_text()
    drawn.write_text(text.replace("\n", " \n"))
    with pytest.raises(
        ConfigError, match=r"inputs have changed since begin\(\); run that cell and stage\.run\(\) again"
    ):
        stage.run()
    stage = PairsStage(run).begin()
    assert "02_pairs is done again (input samples" in capsys.readouterr().out
    stage.run()
    drawn.write_text(text)
    with pytest.raises(ConfigError, match="inputs have changed since begin"):
        stage.finish()
    assert PairsStage(run).is_done()
