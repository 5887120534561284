"""The whole loop through the driver and its notebooks on the micro preset."""

import csv
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import OUTPUTS, ROOT, drive, drive_apart, remove_run
from safetensors.torch import load_file, save_file

from irpo_utils.files import (
    NOTEBOOKS,
    PACKAGE,
    ConfigError,
    MissingArtefact,
    file_hash,
    locked,
    read_jsonl,
    resolve,
    write_json,
    write_text,
)
from irpo_utils.model.load import load_policy
from irpo_utils.model.records import Prompt
from irpo_utils.run import jobs as jobs_of
from irpo_utils.run.config import dump
from irpo_utils.run.driver import check_inputs, why
from irpo_utils.run.notebooks import run_notebook
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import STAGES, EvaluateStage, PairsStage, SampleStage, plan
from irpo_utils.tasks import get_task
from irpo_utils.tasks.records import further_tests

KILLS = int(os.environ.get("KILLS", "2"))


def manifests(run):
    return {p.relative_to(run): p.stat().st_mtime_ns for p in run.rglob("*.manifest.json")}


def test_run_ends_with_its_card_and_the_files(micro_run):
    run, printed = micro_run
    lines = printed.partition("report ...\n")[2].splitlines()
    assert lines[0].startswith(f"{run.name}: irpo, sft_gold; 1 seed(s), 2 iterations; took 0:") and len(lines) <= 6
    assert lines[1].startswith("M_0 solves ") and "M_2 of IRPO (DPO + NLL)" in lines[1] and "95 % interval" in lines[1]
    card = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[2:]}
    assert list(card) == ["report", "table", "model", "methods"]
    assert all((ROOT / card[name]).is_file() for name in ("report", "table", "methods"))
    assert f"{run.name}/irpo/seed_0/iteration_2/adapter" in card["model"]
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "run",
        "method",
        "seed",
        "iteration",
        "split",
        "problems",
        "greedy",
        "greedy_low",
        "greedy_high",
        "maj8",
        "pass8",
    ]
    assert {(r["method"], r["iteration"], r["split"]) for r in rows} == {
        (m, str(t), s) for m, last in (("irpo", 2), ("sft_gold", 1)) for t in range(last + 1) for s in ("dev", "test")
    }
    assert all(0 <= float(r["greedy_low"]) <= float(r["greedy"]) <= float(r["greedy_high"]) <= 1 for r in rows)
    assert (run / "timing.csv").read_text().splitlines()[0] == "method,seed,iteration,stage,seconds"
    page = (run / "report.html").read_text()
    assert "IRPO" in page and "data:image/png" in page


def test_a_job_that_is_left_over_evaluates_and_changes_nothing(micro_run):
    run, beside = micro_run[0], OUTPUTS / "test-beside"
    remove_run(beside.name)
    done = drive_apart("micro", f"run={beside.name}", "iterations=2", "jobs=3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "irpo, seed 0, iteration 0, 04_evaluate ..." in lines  # the other process numbers its lines
    assert any(line.startswith("[1/9] irpo, seed 0, iteration 1, 01_sample ...") for line in lines)
    for stage in ("m0/seed_0", "irpo/seed_0/iteration_1", "irpo/seed_0/iteration_2"):
        for name in ("evaluation.json", "responses.jsonl"):
            assert (beside / stage / name).read_bytes() == (run / stage / name).read_bytes()
    remove_run(beside.name)


def test_jobs_are_as_many_as_the_cores_allow_where_none_are_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(jobs_of, "can_fork", lambda: True)
    monkeypatch.setattr(jobs_of.os, "sched_getaffinity", lambda process: range(8), raising=False)

    memory = SimpleNamespace(available=100 << 30)
    monkeypatch.setattr(jobs_of.psutil, "virtual_memory", lambda: memory)

    def jobs(*settings):
        return jobs_of.default_jobs(load_preset("micro", settings))

    assert jobs("methods=irpo,dpo", "seeds=9") == 8 and jobs("methods=irpo,dpo", "seeds=9", "threads=3") == 2
    assert jobs() == 2  # the evaluations apart
    assert jobs("threads=9") == jobs("sampling.workers=2") == jobs("train.processes=2") == 1
    memory.available = 7 << 30
    assert jobs("methods=irpo,dpo", "seeds=9") == 3
    monkeypatch.setattr(jobs_of, "can_fork", lambda: False)
    assert jobs() == 1


def test_pairs_load_with_datasets_and_hold_the_sampled_ids(micro_run):
    from datasets import load_dataset

    run, _ = micro_run
    folder = run / "irpo" / "seed_0" / "iteration_1"
    data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    assert {"prompt", "chosen", "rejected"} <= set(data.column_names)
    sampled = {(r["problem"], tuple(r["token_ids"])) for r in read_jsonl(run / "m0" / "seed_0" / "samples.jsonl")}
    for row in data:
        assert (row["problem"], tuple(row["chosen_ids"])) in sampled
        assert (row["problem"], tuple(row["rejected_ids"])) in sampled


def test_second_run_does_nothing_and_a_changed_parameter_reruns_what_depends_on_it(micro_run):
    run, _ = micro_run
    before = manifests(run)
    again = drive("micro", f"run={run.name}", "methods=irpo,sft_gold", "iterations=2")
    assert again.returncode == 0 and manifests(run) == before
    changed_run = OUTPUTS / "test-changed"
    remove_run(changed_run.name)
    shutil.copytree(run, changed_run)
    command = ["micro", f"run={changed_run.name}", "methods=irpo,sft_gold", "iterations=2"]
    changed = drive(*command, "sampling.temperature=0.8,0.9")  # of the first and of the second iteration
    assert changed.returncode == 0, changed.stderr
    after = manifests(changed_run)
    remove_run(changed_run.name)
    rerun = {str(p) for p in before if after[p] != before[p]}
    stages = ("01_sample", "02_pairs", "03_train", "04_evaluate")
    assert rerun == {f"irpo/seed_0/iteration_2/{stage}.manifest.json" for stage in stages}


@pytest.mark.parametrize(
    ("task", "graders"),
    [("math", {"tasks/math.py", "answers/latex.py", "answers/verify.py"}), ("gsm8k", {"tasks/gsm8k.py"})],
)
def test_the_key_of_a_stage_holds_what_it_runs_and_no_more(tmp_path, task, graders):
    """Tasks and engines are named by strings, which imports do not tell: a changed grader must rerun what it graded."""
    config = load_preset("micro", [f"task.name={task}"])
    code = {name: set(stage(tmp_path, config=config).code()) for name, stage in STAGES.items() if name != "01b_reward"}
    wanted = {*graders, "answers/numbers.py", "tasks/records.py", "model/sampling.py", "notebooks/01_sample.ipynb"}
    assert wanted <= code["01_sample"] and wanted - {"notebooks/01_sample.ipynb"} <= code["04_evaluate"]
    others = {"report/figures.py", "tasks/arc.py", "model/losses.py", "model/training.py", "methods/select.py"}
    assert not others & (code["01_sample"] | code["04_evaluate"])
    assert "model/losses.py" in code["03_train"] and "methods/select.py" not in code["03_train"]
    assert "methods/select.py" in code["02_pairs"] and not any(n.startswith("tasks/") for n in code["02_pairs"])


def test_a_stage_without_problems_or_model_has_none_in_its_key(tmp_path):
    problems = str(ROOT / "tests" / "upstream" / "gsm8k.jsonl")
    config = load_preset("micro", ["task.name=math", f"task.train={problems}"])
    both = {"base", f"problems {problems}"}
    for name, stage in STAGES.items():
        method, t = {"01b_reward": ("sipf", 2), "03b_extrapolate": ("expo", 2)}.get(name, ("irpo", 1))
        made = stage(tmp_path, method, iteration=t, config=config)
        assert set(made.configured_files()) == {"02_pairs": set(), "03b_extrapolate": {"base"}}.get(name, both), name
        assert ("torch" in made.versions()) == (name != "02_pairs")
        graded = name not in ("02_pairs", "03b_extrapolate")
        assert ("sympy" in made.versions()) == ("tasks/math.py" in made.code()) == graded


def done(stage):
    """A stage that has left empty files."""
    for name in stage.writes():
        write_text(stage.path(name), "")
    outputs = {name: file_hash(stage.path(name)) for name in stage.writes()}
    write_json(stage.manifest_path(), {"key": stage.key(), "outputs": outputs})


def test_why_tells_what_was_interrupted_and_what_stands_behind_it(tmp_path, capsys):
    config = load_preset("micro", ["iterations=1"])
    _, sampled, paired, trained, _ = plan(config, tmp_path, "irpo", 0)
    done(sampled)
    done(paired)
    done(trained)
    paired.manifest_path().unlink()
    paired.begin()  # as one that was killed while it wrote
    why(tmp_path, config)
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "it has not run yet",
        "done",
        "it was begun and has not finished",
        "done, but 02_pairs before it is not",
        "it has not run yet",
    ]


HOLD = """
import sys
from pathlib import Path
from irpo_utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_an_evaluation_that_another_process_makes_is_come_back_to(tmp_path, monkeypatch):
    evaluated, *others = stages = plan(load_preset("micro", ["iterations=1"]), tmp_path, "irpo", 0)
    command = [sys.executable, "-c", HOLD, str(evaluated.folder / f".{evaluated.name}.turn")]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    ran = []

    def execute(stage):
        ran.append(stage)
        if len(ran) == len(others):
            other.communicate()

    monkeypatch.setattr(jobs_of, "execute", execute)
    jobs_of.run_stages(stages, watch=False)
    assert ran == [*others, evaluated]


def test_the_time_left_is_told_once_a_stage_of_each_kind_was_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs_of, "execute", lambda stage: time.sleep(1.0 if stage.name == "03_train" else 0.01))
    config = load_preset("micro", ["iterations=2", "methods=irpo,dpo"])
    jobs_of.run_in_turn([plan(config, tmp_path, method, 0) for method in config.methods])
    told = [line.partition(", about ")[2] for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 18  # here nobody leaves anything, so M_0's evaluation and sampling are run for each method
    assert told[:4] == [""] * 4 and told[4] == "3 s left"  # 03_train of M_2 here, and two of the other method
    assert told[7] == "3 s left" and told[8] == "2 s left" and told[-1] == "0 s left"


RUN_NOTEBOOKS = """
import json, sys
run, method = sys.argv[1], "irpo"
from irpo_utils.__main__ import main
assert main(["--list"]) == 0
for name in ("02_pairs", "05_report"):
    scope = {}
    for cell in json.load(open(f"notebooks/{name}.ipynb"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            scope["run"] = run
print("torch" in sys.modules)
"""


def test_a_stage_without_a_model_imports_no_torch(micro_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(micro_run[0], run)
    made = run / "irpo" / "seed_0" / "iteration_1" / "pairs.jsonl"
    before = made.read_bytes()
    made.unlink()
    done = subprocess.run(
        [sys.executable, "-c", RUN_NOTEBOOKS, str(run)],
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert made.read_bytes() == before


def test_a_damaged_artefact_is_made_again(micro_run):
    """Runs after the one above, so artefacts are those of the plain command."""
    run, _ = micro_run
    pairs = run / "sft_gold" / "seed_0" / "iteration_1" / "pairs.jsonl"
    whole = pairs.read_bytes()
    pairs.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MissingArtefact, match=r"line \d+ is damaged or cut off; delete it and run 02_pairs"):
        read_jsonl(pairs, "02_pairs.ipynb")
    assert drive("micro", f"run={run.name}", "methods=irpo,sft_gold", "iterations=2").returncode == 0
    assert pairs.read_bytes() == whole


def test_a_missing_stage_names_its_notebook(tmp_path):
    write_text(tmp_path / "config.yaml", dump(load_preset("micro")))
    with pytest.raises(MissingArtefact, match=r"prompts.jsonl is missing; run notebooks/01_sample.ipynb first"):
        PairsStage(tmp_path).begin()
    with pytest.raises(MissingArtefact, match=r"adapter is missing; run notebooks/03_train.ipynb with iteration = 1"):
        SampleStage(tmp_path, iteration=2).begin()
    with pytest.raises(ConfigError, match="no method is called 'ipo'"):
        PairsStage(tmp_path, method="ipo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "no preset is called 'tinny'"),
        (["micro", "train.lrr=1"], "did you mean 'train.lr'"),
        (["micro", "run=../x"], "run: a plain folder name"),
        (["micro", "run=reference"], "run: outputs/reference is kept for other things"),
        (["micro", "run=site-build"], "run: outputs/site-build is kept for other things"),
        (["--evaluations", "only"], "no option is used as '--evaluations only'"),
        (["--publish", "x/.."], "run: a plain folder name"),
        (["micro", "model.path=/nonexistent"], "model.path: /nonexistent is no folder with config.json"),
        (
            ["micro", "task.name=jsonl", "task.train=/nonexistent.jsonl", "task.test=/nonexistent.jsonl"],
            "/nonexistent.jsonl is missing",
        ),
        (["run=x", "micro"], "a preset's name comes first"),
        (["micro", "jobs=0"], "jobs: expected a number"),
        (
            ["micro", "train.report_to=paper"],
            "train.report_to: paper is not installed, but one of tensorboard, wandb, trackio can be",
        ),
        (["--tset"], "unrecognized arguments: --tset; see ./run_all.sh --help"),
    ],
)
def test_bad_commands(arguments, message):
    done = drive(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_test_set_of_the_embedded_task_is_no_file_for_another(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(f'{{"question": "{i} + 1?", "answer": {i + 1}}}' for i in range(20)))
    sizes = [f"task.{split}_size={size}" for split, size in (("train", 10), ("dev", 5), ("test", 5))]
    done = drive("tiny", "run=test-words", "task.name=jsonl", f"task.train={file}", *sizes)
    assert done.returncode == 2
    assert "evaluation.test: long is a test set of stories; give evaluation.test= for none" in done.stderr


def test_problems_in_words_that_the_embedded_model_has_never_seen_are_refused(tmp_path):
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "test")}
    for split, file in files.items():
        rows = [f'{{"question": "What percentage is {i} of {split}?", "answer": {i}}}' for i in range(20)]
        file.write_text("\n".join(rows))
    sources = [f"task.{split}={file}" for split, file in files.items()]
    done = drive("own", "run=test-words", "model.path=seed", *sources, "task.dev_size=5", "task.test_size=0")
    assert done.returncode == 2 and "the embedded model does not know" in done.stderr
    assert "Name a model, as in model.path=/models/my-llm" in done.stderr
    assert not (OUTPUTS / "test-words").exists()


def test_a_failing_stage_is_one_error(tmp_path):
    remove_run("test-fail")
    done = drive("micro", "run=test-fail", "sampling.max_new_tokens=2")  # nothing can finish, so no pair can be made
    assert done.returncode == 1 and "error: irpo, seed 0: ValueError: no pair can be made" in done.stderr
    remove_run("test-fail")
    done = drive_apart("micro", "run=test-fail", "sampling.max_new_tokens=2", "methods=irpo,dpo", "jobs=2")
    assert done.returncode == 1 and done.stderr.count("irpo, seed 0: ValueError: no pair can be made") == 1
    assert (OUTPUTS / "test-fail" / "m0" / "seed_0" / "evaluation.json").exists()  # and what could be done was done
    remove_run("test-fail")


def test_help_and_list():
    assert "run=NAME" in drive("--help").stdout
    assert "tiny" in drive("--list").stdout


def test_an_unknown_notebook_parameter_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="01_sample.ipynb has no parameter iteratoin"):
        run_notebook(NOTEBOOKS / "01_sample.ipynb", tmp_path / "x.ipynb", {"iteratoin": 2}, 1)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\udcff", '{"key": 1, "outputs": {}}'])
def test_a_damaged_manifest_means_not_done(tmp_path, text):
    write_text(tmp_path / "config.yaml", dump(load_preset("micro")))
    stage = SampleStage(tmp_path)
    stage.manifest_path().parent.mkdir(parents=True)
    stage.manifest_path().write_bytes(text.encode("utf-8", "surrogateescape"))
    assert not stage.is_done()


def test_a_record_without_its_fields_is_named(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"problem": "a", "prompt": "?", "prompt_ids": [1]}\n{"problem": "a"}\n')
    with pytest.raises(MissingArtefact, match="line 2 is damaged"):
        Prompt.read(tmp_path / "prompts.jsonl", "01_sample.ipynb")


def test_the_second_run_in_a_folder_refuses():
    with locked(ROOT / "outputs" / "test-busy" / ".lock"):
        done = drive_apart("micro", "run=test-busy")  # a process may take a lock twice
    assert done.returncode == 2 and f"error: process {os.getpid()} of {socket.gethostname()} (" in done.stderr
    assert ") is at work in outputs/test-busy; wait for it or stop it, or choose another run=" in done.stderr
    remove_run("test-busy")


def test_notebooks_find_the_run_from_their_own_folder(monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    folder = resolve("outputs/x")
    assert folder == resolve(folder) == ROOT / "outputs" / "x"


def test_keys_name_what_a_stage_depends_on_and_no_more(tmp_path):
    def keys(*overrides):
        write_text(tmp_path / "config.yaml", dump(load_preset("micro", overrides)))
        arm = {"01b_reward": ("sipf", 0, 2), "03b_extrapolate": ("expo", 0, 2)}
        return {name: stage(tmp_path, *arm.get(name, ("irpo", 0, 1))).parameters() for name, stage in STAGES.items()}

    plain = keys()
    expected = {
        "sampling.max_new_tokens=9": set(STAGES) - {"02_pairs", "03b_extrapolate"},
        "sampling.engine=vllm": {"01_sample", "01b_reward", "03c_online", "04_evaluate"},
        "task.test_size=9": {"04_evaluate"},
        "task.train_size=9": {
            "00_warm_start",
            "01_sample",
            "01b_reward",
            "03c_online",
        },  # the pairs read what these leave
        "model.lora_r=4": set(STAGES) - {"01_sample", "02_pairs"},
        "model.path=elsewhere": set(STAGES) - {"02_pairs"},
        "evaluation.temperature=1": {"04_evaluate"},
        "pairs.k=1": {"02_pairs", "03c_online"},
        "pairs.max_tokens=100": {"00_warm_start", "01b_reward", "02_pairs", "03c_online"},
        "warm_start.problems=8": {"00_warm_start", "01_sample", "01b_reward", "03c_online"},
        "train.alpha=0.5": {"03_train", "03c_online"},
        "train.sync_every=3": {"03c_online"},
        "train.odds_weight=0.5": set(),  # of another loss
        "process.continuations=3": {"01b_reward"},
        "train.warmup=0.5": {
            "00_warm_start",
            "01b_reward",
            "03_train",
            "03c_online",
        },  # the reward model is trained with it, too
        "judge.samples=2": set(),  # of another reward
        "train.extrapolation=0.5": {"03b_extrapolate"},
        "seeds=2": set(),
    }
    for override, stages in expected.items():
        changed = keys(override)
        assert {name for name in plain if changed[name] != plain[name]} == stages, override


def test_a_further_test_set_is_one_parameter_and_concerns_evaluations_alone(tmp_path):
    """Questions that are trained on, or that dev has, are left out of it."""
    upstream = ROOT / "tests" / "upstream" / "gsm8k.jsonl"
    lines = upstream.read_text().splitlines()
    for name, part in (("train", lines[:14]), ("test", lines[14:17]), ("more", lines[12:20])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    files = [f"task.{split}={tmp_path / split}.jsonl" for split in ("train", "test")]
    sizes = ["task.train_size=0", "task.dev_size=2", "task.test_size=0"]
    small = ["task.name=gsm8k", *files, *sizes, "evaluation.samples=2", "sampling.max_new_tokens=4"]
    plain, more = (
        load_preset("micro", [*small, *extra]) for extra in ([], [f"evaluation.test={tmp_path / 'more.jsonl'}"])
    )
    for name, stage in STAGES.items():
        if name not in ("01b_reward", "03b_extrapolate"):
            changed = stage(tmp_path, config=plain).parameters() != stage(tmp_path, config=more).parameters()
            assert changed == (name == "04_evaluate")
    # What is trained on is left out, so how much that is concerns the evaluation of M_0, too.
    for config, same in ((plain, True), (more, False)):
        fewer = config.but(task=config.task.but(train_size=5))
        one, other = (EvaluateStage(tmp_path, config=c).parameters() for c in (config, fewer))
        assert (one == other) == same
    stage = EvaluateStage(tmp_path, iteration=0, config=more).begin()
    summary, responses = stage.run()
    stage.finish()
    source = str(tmp_path / "more.jsonl")
    assert [summary[split]["problems"] for split in ("dev", "test", source)] == [2, 3, 6]
    assert len([r for r in responses if r["split"] == source]) == 6
    (tmp_path / "more.jsonl").write_text("\n".join(lines[17:]))
    assert stage.why_not_done() == [f"input problems {source}"]

    def further(size, config=more):
        evaluation = config.evaluation.but(test_size=size)
        return further_tests(get_task(config.task), evaluation).get(source, [])

    assert len(further(0)) == 3 and further(2) == further(0)[:2] and further(2, plain) == []
    with pytest.raises(ValueError, match=r"evaluation.test_size: 4 is more than the 3 problems of .*more.jsonl"):
        further(4)
    with pytest.raises(ValueError, match=r"evaluation.test: .*none.jsonl is missing"):
        further_tests(get_task(more.task), more.evaluation.but(test=(str(tmp_path / "none.jsonl"),)))
    seen = more.evaluation.but(test=(str(tmp_path / "train.jsonl"),))
    with pytest.raises(ValueError, match=r"evaluation.test: all problems of .*train.jsonl are in training or dev"):
        further_tests(get_task(more.task), seen)
    for config, counts in ((more, True), (plain, False)):  # without a further set its size is no parameter
        keys = [
            EvaluateStage(tmp_path, config=config.but(evaluation=config.evaluation.but(test_size=size))).parameters()
            for size in (0, 2)
        ]
        assert (keys[0] != keys[1]) == counts


@pytest.mark.long  # kills at every operation are among the faults of test_faults.py
def test_killed_and_run_again_ends_with_the_same_metrics(micro_run):
    """kill -9 of the driver and its kernels at random moments, twice (KILLS=10 for ten times), then to the end."""
    run, _ = micro_run
    remove_run("test-kill")
    command = [sys.executable, "-m", "irpo_utils", "micro", "run=test-kill", "methods=irpo", "iterations=2"]
    moments = random.Random(0)
    for seconds in [moments.uniform(10, 25) for _ in range(KILLS)]:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(seconds)
        assert process.poll() is None, "finished before it was killed"
        root = psutil.Process(process.pid)
        for victim in [root, *root.children(recursive=True)]:
            victim.kill()
        process.wait()
    done = drive(*command[3:])
    assert done.returncode == 0, done.stderr
    killed = (ROOT / "outputs" / "test-kill" / "metrics.csv").read_text().replace("test-kill", run.name)
    whole = (run / "metrics.csv").read_text().splitlines()
    assert killed.splitlines() == [line for line in whole if ",sft_gold," not in line]
    for name in (
        "m0/seed_0/samples.jsonl",
        *(f"irpo/seed_0/iteration_2/{n}" for n in ("pairs.jsonl", "steps.jsonl", "adapter")),
    ):
        assert file_hash(ROOT / "outputs" / "test-kill" / name) == file_hash(run / name), name
    remove_run("test-kill")


def test_publish_copies_small_files_without_this_machine_s_paths(micro_run):
    run, _ = micro_run
    at_work = run / "irpo" / "seed_0" / "iteration_2" / ".04_evaluate.partial" / "made" / "evaluation.json"
    write_text(at_work, "{}")
    done = drive("--publish", run.name)
    shutil.rmtree(at_work.parents[1])
    target = ROOT / "outputs" / "reference" / run.name
    try:
        assert done.returncode == 0, done.stderr
        assert (target / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
        assert (target / "irpo" / "seed_0" / "iteration_1" / "03_train.ipynb").exists()
        assert not any(p.suffix == ".jsonl" or p.name.startswith(".") for p in target.rglob("*"))
        (rounded,) = target.rglob("*.safetensors")
        weights = load_file(run / rounded.relative_to(target))
        assert all(torch.equal(own, weights[name].bfloat16()) for name, own in load_file(rounded).items())
        assert load_policy(load_preset("micro").model, rounded.parent)
        assert not any(f"{ROOT}/" in p.read_text() for p in target.rglob("*.ipynb"))
        # What is no longer in the run goes, and is named; what is not done is not published, and nothing is lost.
        (target / "21_claims.ipynb").write_text("{}")
        write_text(run / "dpo" / "seed_0" / "iteration_1" / "training.json", "{}")
        done = drive("--publish", run.name)
        assert done.returncode == 0 and "no longer there" in done.stdout and "21_claims.ipynb" in done.stdout
        assert not (target / "dpo").exists() and (target / "irpo").exists()
        manifest = run / "irpo" / "seed_0" / "iteration_1" / "03_train.manifest.json"
        manifest.rename(run / "aside")
        try:
            done = drive("--publish", run.name)
        finally:
            (run / "aside").rename(manifest)
        assert done.returncode == 2 and "irpo, seed 0, iteration 1, 03_train: it has not run yet" in done.stderr
        assert (target / "metrics.csv").exists()
    finally:
        remove_run(f"reference/{run.name}")
        shutil.rmtree(run / "dpo", ignore_errors=True)


def test_each_seed_may_have_a_base_model_and_problems_of_its_own(tmp_path):
    shutil.copytree(PACKAGE / "assets" / "seed_model", tmp_path / "m0-0")
    sizes = ["task.train_size=20", "task.dev_size=5", "task.test_size=5"]
    config = load_preset("tiny", [f"model.path={tmp_path}/m0-{{seed}}", "seeds=2", "task.by_seed=true", *sizes])
    with pytest.raises(ConfigError, match="m0-1.*one for each seed: notebooks/00_seed_model"):
        check_inputs(config)
    shutil.copytree(PACKAGE / "assets" / "seed_model", tmp_path / "m0-1")
    assert any("estimate" in line for line in check_inputs(config)[0])
    weights = tmp_path / "m0-1" / "model.safetensors"
    torch.manual_seed(0)
    save_file({name: torch.randn_like(w) for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    stages = [SampleStage(tmp_path / "run", seed=seed, config=config) for seed in (0, 1)]
    assert [stage.config.model.path for stage in stages] == [f"{tmp_path}/m0-{seed}" for seed in (0, 1)]
    first, second = (stage.configured_files() for stage in stages)
    assert {name for name in first if first[name] != second[name]} == {"base"}
    drawn = [{p.id for p in get_task(stage.config.task).problems("train")} for stage in stages]
    assert len(drawn[0]) == len(drawn[1]) == 20 and not drawn[0] & drawn[1]
