"""Several processes train what one trains: over gloo, on two cores, with models that take seconds."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from itertools import count
from unittest import mock

import pytest
import ranks
import torch
from conftest import ROOT

from irpo_utils.files import ConfigError, read_jsonl, write_text
from irpo_utils.methods.parts import LOSSES
from irpo_utils.methods.sampler import Sampler
from irpo_utils.methods.trainer import dev_score
from irpo_utils.model import load, logprobs, processes, training
from irpo_utils.model.records import Pair
from irpo_utils.run import launch
from irpo_utils.run.config import dump
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import TrainStage, WarmStartStage
from irpo_utils.settings import ModelConfig
from irpo_utils.tasks import get_task

HALF_WAY = {"lr": 1e-3, "eval_every": 2}  # a checkpoint after two steps of four
CASES = {
    **{name: {} for name, row in LOSSES.items() if row.trains},
    "dpo, at once": {"settings": {"micro_batch": 4}},  # nothing is accumulated in two processes
    "dpo+nll, checkpointed": {"settings": {"gradient_checkpointing": True}},
    "dpo+nll, float32": {"dtype": torch.float32, "settings": HALF_WAY},
    "nll, float32": {"dtype": torch.float32, "settings": HALF_WAY},
}


def every_case(folder):
    return {name: ranks.train(folder / name, name.split(",")[0], **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every case, trained by one process and by two."""
    folder = tmp_path_factory.mktemp("trained")
    return every_case(folder / "one"), *ranks.together(2, every_case, folder / "two")


def assert_same(one, two, tolerance=1e-5):
    """The same facts, steps and weights, from (facts, steps, weights)."""
    assert two[0] == pytest.approx(one[0], abs=tolerance)
    assert len(two[1]) == len(one[1]) > 0
    for ours, theirs in zip(one[1], two[1], strict=True):
        if "margin" in ours and abs(ours["margin"]) < 1e-5:  # which of two equal rewards is larger is rounding
            ours, theirs = ({**step, "accuracy": 0.0} for step in (ours, theirs))
        assert theirs == pytest.approx(ours, abs=tolerance)
    assert one[2].keys() == two[2].keys()
    for name, weight in one[2].items():
        assert torch.allclose(two[2][name], weight, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_train_what_one_trains(trained, case):
    one, first, second = (found[case] for found in trained)
    assert one[1][-1]["loss"] < one[1][0]["loss"] - 1e-3  # it has learnt
    assert_same(one, first)
    assert second[0] == first[0]
    assert all(torch.equal(second[2][name], weight) for name, weight in first[2].items())


def inside(model, score, *given):
    return score(getattr(model, "module", model), *given)


def past_the_wrapper(folder):
    """Train with the scores of the model inside, whose gradients nobody synchronises."""
    different = pytest.raises(RuntimeError, match="different weights: their gradients were not synchronised")
    with mock.patch.object(training, "through", inside), different:
        ranks.train(folder, "dpo+nll")


def test_past_the_wrapper_each_process_trains_a_model_of_its_own(trained, tmp_path):
    ranks.together(2, past_the_wrapper, tmp_path)
    one, alone = trained[0]["dpo+nll"][1], read_jsonl(tmp_path / "steps.jsonl")
    assert alone[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-5)  # before the first update that counts
    assert abs(alone[-1]["loss"] - one[-1]["loss"]) > 1e-3


EACH_STEP = {"eval_every": 1, "batch": 4}  # a checkpoint after every step


def killed_at_the_third_step(folder):
    calls = count(1)

    def score(policy):
        if next(calls) == 3 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5

    ranks.train(folder, "dpo+nll", EACH_STEP, score=score)


def scored(folder):
    return ranks.train(folder, "dpo+nll", EACH_STEP, score=lambda policy: 0.5)


def test_a_training_whose_process_was_killed_goes_on_in_two_processes_and_in_one(tmp_path):
    whole = ranks.together(2, scored, tmp_path / "whole")[0]
    with pytest.raises((BrokenProcessPool, RuntimeError)):
        ranks.together(2, killed_at_the_third_step, tmp_path / "two")
    left = sorted(path.parent.name for path in (tmp_path / "two").rglob("complete"))
    assert left == ["checkpoint-1", "checkpoint-2"]
    (tmp_path / "two" / "checkpoints" / "checkpoint-3").mkdir(exist_ok=True)  # half-written: has no mark
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert_same(whole, ranks.together(2, scored, tmp_path / "two")[1], tolerance=0)
    assert_same(whole, scored(tmp_path / "one"))
    assert [step["step"] for step in read_jsonl(tmp_path / "one" / "steps.jsonl")] == [1, 2, 3, 4]


def of_both_dtypes(folder, divided=lambda model: model):
    """Scores, and what training gives, of a base in bfloat16 with an adapter in float32."""
    model = ranks.small_policy()
    for name, weight in model.named_parameters():
        weight.data = weight.data if "lora_" in name else weight.data.bfloat16()
    model, batch = divided(model), logprobs.pair_batch(ranks.small_pairs())
    with torch.no_grad():
        scores = processes.through(model.eval(), logprobs.response_logps, batch)
    return scores, ranks.train(folder, "dpo+nll", HALF_WAY, model=model)


def as_shards(folder):
    """Scores of a sharded Llama with and without its parts' forward pass, and what training it gives."""
    ranks.divide_weights()
    model, batch = processes.sharded(ranks.small_policy()), logprobs.pair_batch(ranks.small_pairs())
    parts = {tuple(weight.to_local().shape) != tuple(weight.shape) for weight in model.parameters()}
    with torch.no_grad():
        scores = processes.through(model.eval(), logprobs.response_logps, batch)
    found = ranks.train(folder, "dpo+nll", HALF_WAY, model=model)
    again = processes.sharded(ranks.small_policy())  # goes on from the last checkpoint, and has nothing left to do
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4", ignore_errors=True) if processes.rank() == 0 else None
    processes.wait()
    resumed = ranks.train(folder, "dpo+nll", HALF_WAY, model=again)
    single = processes.sharded(ranks.small_policy())
    with mock.patch.object(logprobs, "GROUP_ON_CPU", 1):  # rows of one process are of like length, the other's are not
        single = ranks.train(folder / "nll", "nll", HALF_WAY, model=single)
    return parts, scores, found, resumed, single, of_both_dtypes(folder / "mixed", processes.sharded)


def test_a_sharded_model_scores_and_trains_as_the_whole(trained, tmp_path):
    with torch.no_grad():
        whole = logprobs.response_logps(ranks.small_policy().eval(), logprobs.pair_batch(ranks.small_pairs()))
    one = trained[0]["dpo+nll, float32"]
    with mock.patch.object(logprobs, "FSDPModule", torch.nn.Module):  # in the rows of a sharded model: 16 bits tell
        mixed = of_both_dtypes(tmp_path / "one")
    for parts, scores, found, resumed, single, shards in ranks.together(2, as_shards, tmp_path):
        assert parts == {True}  # each process holds a part of every weight
        assert torch.allclose(scores, whole, rtol=0, atol=1e-5)
        assert_same(one, found, tolerance=2e-5)
        assert_same(one, resumed, tolerance=2e-5)
        assert_same(trained[0]["nll, float32"], single, tolerance=2e-5)
        assert torch.equal(shards[0], mixed[0])
        assert_same(mixed[1], shards[1], tolerance=1e-3)
    kept = load.load_file(tmp_path / "best" / "adapter_model.safetensors")
    assert kept.keys() == {name.replace(".default", "") for name in one[2]}
    for name, weight in one[2].items():
        assert torch.allclose(kept[name.replace(".default", "")], weight, rtol=0, atol=2e-5)


def dev_scores(folder, shard=False):
    config = load_preset("micro")
    task = get_task(config.task)
    if shard:
        ranks.divide_weights()
    model = processes.sharded(load.new_adapter(load.load_base(ModelConfig()), ModelConfig(lora_r=4)))
    sampler = Sampler.of(model, load.load_tokenizer(ModelConfig()), task, config)
    with torch.no_grad():
        processes.through(model.eval(), logprobs.check_head)
    return dev_score(model, sampler, task.problems("dev"))


def test_dev_scores_are_those_of_one_process(tmp_path):
    one = dev_scores(tmp_path)
    assert 0 < one < 1
    assert ranks.together(2, dev_scores, tmp_path) == [one, one]
    assert ranks.together(2, dev_scores, tmp_path, True) == [one, one]


def test_each_item_is_done_once_and_known_in_order():
    assert processes.divided([3, 1, 2], lambda item: -item) == [-3, -1, -2]
    assert processes.divided([], lambda item: 1 / 0) == []
    assert processes.gathered("a") == ["a"] and processes.from_first(lambda: 7) == 7
    assert (processes.rank(), processes.world_size()) == (0, 1)
    processes.wait()


def shared_out(items):
    done = []
    found = processes.divided(items, lambda item: done.append(item) or 10 * item)
    return found, done, processes.from_first(processes.rank)


def test_processes_do_as_many_items_each():
    (found, first, zero), (same, second, also_zero) = ranks.together(2, shared_out, [1, 2, 3])
    assert found == same == [10, 20, 30] and zero == also_zero == 0
    assert (first, second) == ([1, 3], [2, 3])  # the last one twice, so that both do two


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.processes=3"], "train.batch: a multiple of train.processes x train.micro_batch .3 x 2 = 6., got 8"),
        (["train.processes=16"], "train.batch: at least one pair for each of train.processes=16"),
        (["train.processes=0"], "train.processes: at least 1"),
        (["train.processes=2", "train.engine=trl"], "train.processes: trl trains in one process; set train.engine=own"),
        (["train.shard=true"], "train.shard: there is one process; set train.processes"),
        (["train.processes=2", "train.shard=true", "model.tuning=full"], "train.shard: .*set model.quantize=none and"),
        (["train.processes=2", "train.shard=true", "train.optimizer=paged_adamw_8bit"], "set train.optimizer=adamw"),
    ],
)
def test_what_cannot_be_dealt_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("micro", settings)


def test_a_process_has_its_part_of_the_batch():
    train = load_preset("micro", ["train.batch=16", "train.micro_batch=8"]).train
    assert [train.own_micro_batch(p) for p in (1, 2, 4, 8)] == [8, 8, 4, 2]


def configure(run, *settings):
    write_text(run / "config.yaml", dump(load_preset("micro", settings)))
    return run


def test_their_number_is_in_the_key_only_where_there_are_several(tmp_path):
    plain = TrainStage(configure(tmp_path, "train.micro_batch=4"))
    assert not {"train.processes", "train.shard"} & plain.parameters().keys()
    assert not {"run/launch.py", "run/rank.py"} & plain.code().keys()
    for kind in (TrainStage, WarmStartStage):
        several = kind(configure(tmp_path, "train.micro_batch=4", "train.processes=2", "warm_start.problems=8"))
        assert several.parameters()["train.processes"] == 2
        assert {"run/launch.py", "run/rank.py", "model/processes.py"} <= several.code().keys()


@pytest.fixture
def stage(tmp_path):
    """A training stage that has its pairs, for two processes."""
    tokenizer, end = load.load_tokenizer(ModelConfig()), load.load_tokenizer(ModelConfig()).eos_token_id
    pairs = []
    for number, left in enumerate((12, 8, 6, 4)):
        prompt = f"Question: Ann has {left} pens. Ann sells half of them. How many pens does Ann have?\nAnswer:\n"
        right, wrong = (f"{left} / 2 = {found}\nFinal answer: {found}" for found in (left // 2, left))
        ids = [(*tokenizer(text, add_special_tokens=False).input_ids, end) for text in (right, wrong)]
        pairs.append(Pair(f"p{number}", prompt, right, wrong, tuple(tokenizer(prompt).input_ids), *ids, None, None))
    found = TrainStage(
        configure(tmp_path, "train.batch=4", "train.micro_batch=2", "train.processes=2", "train.max_steps=3")
    )
    Pair.write(found.folder / "pairs.jsonl", pairs)
    return found


TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node"


def adapter(stage):
    return load.load_file(stage.path("adapter") / "adapter_model.safetensors")


def test_the_stage_starts_its_processes_and_keeps_what_they_made(stage, tmp_path, capsys, monkeypatch):
    facts = stage.begin().run()
    stage.finish()
    assert "step 3/3  loss" in capsys.readouterr().out
    weights = adapter(stage)
    monkeypatch.setenv("IRPO_LAUNCHER", f"{TORCHRUN} 2")  # the usual environment, and nothing of accelerate's own
    assert stage.begin(again=True).run() == facts
    stage.finish()
    assert all(torch.equal(weights[name], weight) for name, weight in adapter(stage).items())
    one = TrainStage(configure(tmp_path, "train.batch=4", "train.micro_batch=2", "train.max_steps=3"))
    two = stage.curve()
    assert [line for line in one.why_not_done() if "processes" in line] == ["train.processes 2 -> none"]
    assert one.begin(again=True).run() == pytest.approx(facts, abs=1e-5)
    one.finish()
    for ours, theirs in zip(one.curve()[1:], two[1:], strict=True):
        assert {**theirs, "accuracy": 0} == pytest.approx({**ours, "accuracy": 0}, abs=1e-5)
    assert all(torch.allclose(weights[name], weight, rtol=0, atol=1e-5) for name, weight in adapter(one).items())


def test_weights_are_divided_over_gpus_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="train.shard: weights are divided over GPUs, and none is here"):
        processes.join(2, shard=True)


def test_a_launcher_that_starts_a_wrong_number_is_refused(stage, monkeypatch):
    monkeypatch.setenv("IRPO_LAUNCHER", f"{TORCHRUN} 1")
    stage.begin()
    with pytest.raises(ConfigError, match="train.processes: it is 2, and the launcher started 1"):
        stage.run()


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("import sys; print('out of it', file=sys.stderr); sys.exit(3)", RuntimeError, "exit code 3.*\nout of it"),
        ("write('ConfigError', 'train.x: wrong')", ConfigError, "^train.x: wrong$"),
        (
            "write('FloatingPointError', 'lower train.lr'); raise SystemExit(1)",
            RuntimeError,
            "FloatingPointError: lower",
        ),
        ("pass", RuntimeError, "ended with exit code 0"),
    ],
)
def test_what_went_wrong_in_a_process_is_said(stage, tmp_path, monkeypatch, program, error, message):
    stage.begin()
    write = f"def write(kind, message): open({str(stage.partial / 'failure.json')!r}, 'w').write("
    write += "__import__('json').dumps({'kind': kind, 'message': message}))\n"
    (tmp_path / "launcher.py").write_text(write + program)
    monkeypatch.setenv("IRPO_LAUNCHER", f"{sys.executable} {tmp_path / 'launcher.py'}")
    with pytest.raises(error, match=message):
        stage.run()


def test_the_package_s_own_launchers():
    train = load_preset("micro", ["train.processes=2"]).train
    for config, file in ((train, "ddp"), (train.but(shard=True), "fsdp2")):
        command = launch.launcher(config)
        assert command[-2:] == ["--num_processes", "2"] and command[-3].endswith(f"assets/accelerate/{file}.yaml")


def test_a_process_ends_when_nobody_waits_for_it_any_more():
    waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = f"from irpo_utils.run.rank import watch; import socket; watch(socket.gethostname() + ':{waiting.pid}')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    waiting.kill()
    waiting.wait()
    assert process.wait(timeout=60) == -signal.SIGKILL
