"""A stage's bookkeeping, on one that needs no model: 02_pairs, from samples written by hand."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from irpo_utils.files import OUTPUTS, Busy, ConfigError, MissingArtefact, file_hash, write_text
from irpo_utils.model.records import Pair, Prompt, Record, Sample
from irpo_utils.run import store
from irpo_utils.run.config import dump
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import STAGES, EvaluateStage, PairsStage, SampleStage, TrainStage, WarmStartStage
from irpo_utils.settings import ModelConfig


def configure(run, *settings):
    write_text(run / "config.yaml", dump(load_preset("micro", settings)))


@pytest.fixture
def run(tmp_path):
    configure(tmp_path)
    m0 = tmp_path / "m0" / "seed_0"
    m0.mkdir(parents=True)
    Record.write(m0 / "prompts.jsonl", [Prompt(name, "p", (1, 2)) for name in "ab"])
    rows = [(name, i, float(i % 2)) for name in "ab" for i in range(4)]
    Record.write(
        m0 / "samples.jsonl",
        [Sample(name, i, f"r{i}", "6", reward, reward, True, -1.0, (5 + i, 2)) for name, i, reward in rows],
    )
    return tmp_path


def made(run, again=False):
    stage = PairsStage(run).begin(again)
    stage.run()
    stage.finish(fact=7)
    return stage


def test_a_stage_is_done_when_its_manifest_says_so_and_nothing_differs(run):
    stage = PairsStage(run)
    assert stage.why_not_done() == ["it has not run yet"] and not stage.is_done() and stage.manifest() is None
    manifest = made(run).manifest()
    assert PairsStage(run).is_done() and manifest["fact"] == 7 and manifest["seconds"] >= 0
    assert manifest["outputs"] == {name: file_hash(stage.folder / name) for name in ("pairs.jsonl", "audit.json")}
    assert sorted(manifest["key"]) == ["code", "inputs", "parameters", "python", "stage", "versions"]
    assert manifest["key"]["stage"] == "02_pairs" and manifest["key"]["python"] == sys.version.split()[0]
    assert manifest["key"]["parameters"]["pairs.k"] == 2 and manifest["key"]["parameters"]["selection"] == "pairs"
    assert set(manifest["key"]["inputs"]) == {"prompts", "samples"}
    pairs, audit = PairsStage(run).result()
    assert audit["pairs"] == len(pairs) == 4 and all(isinstance(p, Pair) for p in pairs)


def test_every_seed_iteration_and_purpose_has_random_numbers_of_its_own(run):
    stages = [TrainStage(run, seed=seed, iteration=t) for seed in (0, 1, 2) for t in (0, 1, 2, 999)]
    drawn = [stage.random_seed(purpose) for stage in stages for purpose in (0, 1, 2)]
    assert len(set(drawn)) == len(drawn) and all(isinstance(seed, int) for seed in drawn)


def test_a_section_s_parameters_are_those_that_are_asked_for(run):
    stage = PairsStage(run)
    assert list(stage.section("warm_start")) == [
        f"warm_start.{x}" for x in ("problems", "lr", "max_steps", "eval_every")
    ]
    assert stage.section("warm_start", only=["problems"]) == {"warm_start.problems": 0}
    assert set(stage.section("warm_start", without=["lr"])) == {
        f"warm_start.{x}" for x in ("problems", "max_steps", "eval_every")
    }


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda m: m["key"]["parameters"].update({"pairs.k": 9}), ["pairs.k 9 -> 2"]),
        (lambda m: m["key"]["parameters"].update({"old": 1}), ["old 1 -> none"]),
        (lambda m: m["key"]["parameters"].pop("pairs.k"), ["pairs.k none -> 2"]),
        (lambda m: m["key"]["inputs"].update({"samples": "x"}), ["input samples"]),
        (lambda m: m["key"]["inputs"].update({"other": "x"}), ["input other is gone"]),
        (lambda m: m["key"]["code"].pop("methods/select.py"), ["code methods/select.py is new"]),
        (lambda m: m["key"].update(versions={"torch": "1"}), ["torch 1 -> none"]),
        (lambda m: m["key"].update(versions=None), []),  # of an engine that has none
        (lambda m: m["key"].update(python="3.8.0"), [f"python 3.8.0 -> {sys.version.split()[0]}"]),
        (lambda m: m["outputs"].update({"audit.json": "x"}), ["output audit.json is not as it was left"]),
        (lambda m: m["outputs"].pop("audit.json"), ["its manifest is damaged, or of another version"]),
        (lambda m: m.pop("key"), ["its manifest is damaged, or of another version"]),
    ],
)
def test_what_differs_is_named(run, change, reasons):
    path = made(run).manifest_path()
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert PairsStage(run).why_not_done() == reasons


def test_a_file_that_is_gone_or_altered_is_named(run):
    stage = made(run)
    (stage.folder / "audit.json").write_text("{}")
    assert PairsStage(run).why_not_done() == ["output audit.json is not as it was left"]
    (stage.folder / "audit.json").unlink()
    assert PairsStage(run).why_not_done() == ["output audit.json is missing"]
    made(run)
    (run / "m0" / "seed_0" / "samples.jsonl").unlink()
    assert PairsStage(run).why_not_done() == ["input samples is missing"]
    with pytest.raises(MissingArtefact, match=r"samples\.jsonl is missing; run notebooks/01_sample\.ipynb first"):
        PairsStage(run).begin()


def test_steps_out_of_order_say_which_cell_comes_first(run, capsys):
    for early in (lambda s: s.run(), lambda s: s.finish(), lambda s: s.partial):
        with pytest.raises(ConfigError, match=r"02_pairs: run the cell with begin\(\) first"):
            early(PairsStage(run))
    stage = PairsStage(run).begin()
    assert stage.at_work and stage.why_not_done() == ["it was begun and has not finished"]
    with pytest.raises(ConfigError, match=r"pairs\.jsonl, audit\.json is not there yet; run the cell with stage\.run"):
        stage.finish()
    assert "goes on" not in capsys.readouterr().out
    stage.run()
    stage = PairsStage(run).begin()
    assert "02_pairs goes on with what was begun" in capsys.readouterr().out
    stage.run()
    assert stage.path("pairs.jsonl").parent == stage.partial / "made"
    stage.finish()
    assert not stage.at_work and not stage.partial.exists() and stage.path("pairs.jsonl").parent == stage.folder


def test_only_one_process_is_at_work_on_a_stage(run, monkeypatch):
    take = store.take
    monkeypatch.setattr(store, "take", lambda lock, patience: take(lock, patience=0.1))
    other = (
        "import sys, time; from irpo_utils.run.stages import PairsStage; stage = PairsStage(sys.argv[1]).begin(); "
        "print('begun', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", other, str(run)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        with pytest.raises(
            Busy, match=rf"process {process.pid} of \S+ \(.*\) is at work in .*iteration_1; wait for it"
        ):
            PairsStage(run).begin()
        process.kill()
    made(run)
    assert PairsStage(run).is_done()


def test_what_a_killed_stage_left_serves_the_same_work_and_no_other(run):
    stage = PairsStage(run).begin()
    (stage.partial / "chunk").write_text("half")
    stage._lock.release(force=True)  # as when its process ends
    again = PairsStage(run).begin()
    assert (again.partial / "chunk").read_text() == "half"
    again._lock.release(force=True)
    configure(run, "pairs.k=1")
    assert not (PairsStage(run).begin().partial / "chunk").exists()


def test_keep_puts_files_and_folders_in_place_of_what_was_there(run):
    stage = PairsStage(run).begin()
    for text in ("one", "two"):
        (stage.partial / "file").write_text(text)
        (stage.partial / "folder").mkdir(exist_ok=True)
        (stage.partial / "folder" / text).write_text(text)
        stage.keep("pairs.jsonl", stage.partial / "file")
        stage.keep("audit.json", stage.partial / "folder")
        assert stage.path("pairs.jsonl").read_text() == text
    assert sorted(p.name for p in stage.path("audit.json").iterdir()) == ["one", "two"]
    assert (stage.partial / "file").exists() and not list(stage.path("").glob("*.tmp"))


def test_every_seed_iteration_and_purpose_has_a_seed_of_its_own(run):
    config = load_preset("micro", ["iterations=3"])
    seeds = {
        SampleStage(run, "irpo", s, t, config).random_seed(p) for s in range(3) for t in (1, 2, 3) for p in range(5)
    }
    assert len(seeds) == 3 * 3 * 5


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", True), ("iteration", "1"), ("iteration", 1.0)])
def test_a_seed_or_iteration_that_is_none_is_refused(run, name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number from 0 on, got"):
        PairsStage(run, **{name: value})


def test_where_things_are(run):
    second = TrainStage(run, "irpo", 3, 2, load_preset("micro"))
    assert (
        second.folder == run / "irpo" / "seed_3" / "iteration_2"
        and second.label() == "irpo, seed 3, iteration 2, 03_train"
    )
    assert second.manifest_path() == second.folder / "03_train.manifest.json"
    assert second.reads()["policy"] == (run / "irpo/seed_3/iteration_1/adapter", "03_train.ipynb with iteration = 1")
    assert SampleStage(run).folder == run / "m0" / "seed_0" == EvaluateStage(run, iteration=0).folder
    assert SampleStage(run, "sft_gold").folder == run / "sft_gold" / "seed_0" / "iteration_1"  # it draws nothing
    assert WarmStartStage(run).folder == run / "m0" / "seed_0"


@pytest.mark.parametrize("stage", STAGES)
def test_a_round_that_has_no_such_stage_says_which_it_has(run, stage):
    if stage not in ("01_sample", "02_pairs", "03_train", "04_evaluate"):
        with pytest.raises(
            ConfigError, match=rf"{stage}: round 1 of irpo has no such stage; it has 01_sample, 02_pairs"
        ):
            STAGES[stage](run, "irpo", 0, 1).begin()
    if stage not in ("00_warm_start", "04_evaluate"):
        with pytest.raises(ConfigError, match=f"{stage}: M_0 has no such stage; it has 04_evaluate"):
            STAGES[stage](run, "irpo", 0, 0).begin()


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", " x", "x\n", "x" * 101, "\udcff"])
def test_a_run_s_name_is_a_plain_one(name):
    with pytest.raises(ConfigError, match="run: a plain folder name under outputs/, got"):
        store.run_folder(name)
    with pytest.raises(ConfigError, match="run: outputs/models is kept for other things"):
        store.run_folder("models")
    assert store.run_folder("x" * 100) == OUTPUTS / ("x" * 100)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {},
            'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("irpo_utils/assets/seed_model"), '
            '"outputs/x")',
        ),
        ({"tuning": "full"}, 'AutoModelForCausalLM.from_pretrained("outputs/x")'),
        (
            {"path": "a/b", "dtype": "bfloat16", "trust_remote_code": True},
            'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("a/b", dtype="bfloat16", '
            'trust_remote_code=True), "outputs/x")',
        ),
        (
            {"path": "a/b", "dtype": "bfloat16", "quantize": "nf4"},
            'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("a/b", dtype="bfloat16", '
            'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")), "outputs/x")',
        ),
    ],
)
def test_the_line_that_loads_a_policy(settings, line):
    assert store.load_line(ModelConfig(**settings), OUTPUTS / "x") == line


@pytest.mark.parametrize("task", ["jsonl", "refined"])
def test_where_test_is_held_out_of_training_its_size_is_in_the_key(tmp_path, task):
    def sizes(*settings):
        given = [f"task.name={task}", "task.train=a.jsonl", *settings]
        stage = SampleStage(tmp_path, config=load_preset("micro", given))
        return {name for name in stage.parameters() if name.endswith("_size")}

    assert sizes() == {"task.train_size", "task.dev_size", "task.test_size"}
    assert sizes("task.test=b.jsonl") == {"task.train_size", "task.dev_size"}


def test_the_model_s_and_the_problems_files_are_inputs(run, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "notes.md").write_text("of no account")
    before = store.model_files("base", folder)
    assert set(before) == {"base"} and store.model_files("base", "hub/name") == {}
    (folder / "notes.md").write_text("changed")
    assert store.model_files("base", folder) == before
    (folder / "model.safetensors").write_bytes(b"1")
    assert store.model_files("base", folder) != before
    (tmp_path / "p.jsonl").write_text("{}")
    assert set(store.problem_files([str(tmp_path / "p.jsonl"), "hub/name", str(tmp_path / "gone.jsonl")])) == {
        f"problems {tmp_path / 'p.jsonl'}"
    }
    assert "base" in TrainStage(run).configured_files() and PairsStage(run).configured_files() == {}
