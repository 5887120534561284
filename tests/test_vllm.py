"""vLLM draws what `sampling.sample` draws, from the same model. Skipped without vLLM; the refusals run anywhere.

IRPO_VLLM_PYTHON=vllm-env/bin/python ./run_all.sh --test tests/test_vllm.py
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, drive
from psutil import pid_exists

from irpo_utils import files
from irpo_utils.extras import remote
from irpo_utils.extras.vllm import engine as vllm
from irpo_utils.files import ConfigError
from irpo_utils.methods import parts
from irpo_utils.model import load, sampling
from irpo_utils.model.logprobs import collate, response_logps
from irpo_utils.model.prompts import encode_prompts
from irpo_utils.run import store
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages.evaluate import EvaluateStage
from irpo_utils.run.stages.sample import SampleStage

HERE = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not (HERE or os.environ.get("IRPO_VLLM_PYTHON")), reason="no vLLM (IRPO_VLLM_PYTHON)")
GREEDY = dict(n=1, temperature=0, seed=0, eos_id=2, max_new_tokens=64)
DRAWN = dict(n=8, temperature=0.8, seed=3, eos_id=2, max_new_tokens=64)


def collected(batches):
    return {name: completions for batch in batches for name, completions in batch.items()}


def ids(completions):
    return {name: [c.token_ids for c in cs] for name, cs in completions.items()}


@pytest.fixture(scope="module")
def prompts(tokenizer, task):
    return encode_prompts(task, tokenizer, task.problems("train")[:20])


@pytest.fixture(scope="module")
def longest(prompts):
    return max(map(len, prompts.values()))


@pytest.fixture(scope="module")
def engine(config, longest):
    with vllm.Engine(config, None, longest) as engine:
        yield engine


@needs_vllm
def test_greedy_is_the_other_sampler_s(engine, seed_model, prompts):
    calls = []
    ours = collected(engine.sample(prompts, **GREEDY, progress=lambda *facts: calls.append(facts)))
    assert ids(ours) == ids(collected(sampling.sample(seed_model, prompts, **GREEDY)))
    assert all(c.finished and c.token_ids[-1] == 2 for (c,) in ours.values())
    assert calls[-1][:2] == (20, 20)


@needs_vllm
def test_samples_do_not_depend_on_the_batch_and_do_on_the_seed(engine, prompts):
    together = ids(collected(engine.sample(prompts, **DRAWN)))
    alone = list(prompts)[7]
    assert ids(collected(engine.sample({alone: prompts[alone]}, **DRAWN))) == {alone: together[alone]}
    assert ids(collected(engine.sample(prompts, **DRAWN, max_rows=16))) == together
    assert ids(collected(engine.sample(prompts, **DRAWN | {"seed": 4}))) != together


@needs_vllm
def test_recorded_logps_are_the_model_s_own_at_temperature_1(engine, seed_model, prompts):
    drawn = collected(engine.sample(prompts, **DRAWN))
    assert all(len(cs) == 8 for cs in drawn.values())
    with torch.no_grad():
        wanted = response_logps(seed_model, collate([(prompts[k], c.token_ids) for k, cs in drawn.items() for c in cs]))
    assert torch.allclose(torch.tensor([c.logp for cs in drawn.values() for c in cs]), wanted.float(), atol=1e-3)


@needs_vllm
def test_a_greedy_response_comes_before_each_problem_s_samples(engine, prompts):
    drawn, greedy = (ids(collected(engine.sample(prompts, **options))) for options in (DRAWN, GREEDY))
    both = ids(collected(engine.sample(prompts, **DRAWN, greedy_too=True)))
    assert both == {name: greedy[name] + drawn[name] for name in prompts}


def test_greedy_responses_go_before_the_samples_of_their_beginnings():
    assert remote.with_greedy(["a", "b"], ["a1", "a2", "b1", "b2"], 2) == ["a", "a1", "a2", "b", "b1", "b2"]


@needs_vllm
def test_samples_have_the_other_sampler_s_distribution(engine, seed_model, prompts):
    """The mean log-probability over 20 x 64 samples; six standard errors of the difference."""
    means, variances = [], []
    for draw in (engine.sample, lambda *a, **k: sampling.sample(seed_model, *a, **k)):
        logps = torch.tensor([[c.logp for c in cs] for cs in collected(draw(prompts, **DRAWN | {"n": 64})).values()])
        means.append(logps.mean())
        variances.append(logps.var(1).mean() / logps.numel())
    assert abs(means[0] - means[1]) < 6 * sum(variances) ** 0.5


@needs_vllm
def test_the_length_limit_leaves_a_response_unfinished(engine, prompts):
    for (completion,) in collected(engine.sample(prompts, **GREEDY | {"max_new_tokens": 3})).values():
        assert len(completion.token_ids) == 3 and not completion.finished


@needs_vllm
def test_it_goes_on_from_given_beginnings(engine, seed_model, prompts):
    whole = collected(sampling.sample(seed_model, prompts, **GREEDY))
    starts = {name: [c.token_ids[:length] for length in (0, 3, 7)] for name, (c,) in whole.items()}
    found = ids(collected(engine.sample(prompts, **GREEDY, starts=starts)))
    assert found == {name: [c.token_ids] * 3 for name, (c,) in whole.items()}
    drawn = ids(collected(engine.sample(prompts, **DRAWN, starts=starts)))
    alone = {name: starts[name][1:2] for name in prompts}
    assert ids(collected(engine.sample(prompts, **DRAWN, starts=alone))) == {k: v[8:16] for k, v in drawn.items()}


@needs_vllm
def test_what_vllm_would_silently_change_is_refused(engine, prompts, longest):
    for settings, message in (
        (GREEDY | {"n": 2}, "set n=1 or a temperature above 0"),
        (DRAWN | {"temperature": 0.001}, "at least 0.01, not 0.001"),
        (GREEDY | {"max_new_tokens": 65}, f"exceed the {longest + 64} that the engine was started for"),
    ):
        with pytest.raises(ValueError, match=message):
            next(engine.sample(prompts, **settings))


@needs_vllm
def test_an_adapter_by_its_path_and_a_process_that_is_killed(config, prompts, longest, seed_model, tmp_path):
    policy = load.load_policy(config.model, trainable=True, seed=0)
    torch.manual_seed(1)
    for name, weights in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.2)
    policy.save_pretrained(tmp_path)
    wanted = ids(collected(sampling.sample(load.load_policy(config.model, tmp_path, threads=1), prompts, **GREEDY)))
    assert wanted != ids(collected(sampling.sample(seed_model, prompts, **GREEDY)))
    with vllm.Engine(config, tmp_path, longest) as engine:
        assert ids(collected(engine.sample(prompts, **GREEDY))) == wanted
        os.kill(engine._process.pid, signal.SIGKILL)
        with pytest.raises(vllm.EngineError, match="ended by signal 9"):
            next(engine.sample(prompts, **GREEDY))


@needs_vllm
def test_a_whole_model_by_its_path(config, prompts, longest, tmp_path):
    full = config.but(model=config.model.but(tuning="full"))
    policy = load.load_policy(full.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    policy.save_pretrained(tmp_path)
    wanted = ids(collected(sampling.sample(policy, prompts, **GREEDY)))
    with vllm.Engine(full, tmp_path, longest) as engine:
        assert ids(collected(engine.sample(prompts, **GREEDY))) == wanted


@needs_vllm
def test_a_model_that_vllm_cannot_load_is_told_with_its_log(config, longest, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["Unheard"]}')
    with pytest.raises(vllm.EngineError, match="(?s)ended with exit code 1.*Unheard"):
        vllm.Engine(config, tmp_path, longest)


@needs_vllm
def test_the_stages_sample_and_evaluate_with_it(tmp_path):
    settings = ["sampling.engine=vllm", "task.train_size=6", "task.dev_size=4", "task.test_size=4", "sampling.n=4"]
    files.write_text(tmp_path / "config.yaml", store.dump(load_preset("micro", [*settings, "evaluation.samples=4"])))
    stage = SampleStage(tmp_path, iteration=1).begin()
    samples = stage.run()
    assert len(samples) == 24 and all((s.token_ids[-1] == 2) == s.finished for s in samples)
    assert stage.finish()["key"]["versions"]["vllm"].startswith("vllm")
    assert stage.is_done()
    summary, responses = EvaluateStage(tmp_path, iteration=0).begin().run()
    assert len(responses) == 8 and all(len(r["answers"]) == 4 and "greedy" in r for r in responses)
    assert set(summary) == {"dev", "test"}


@needs_vllm
def test_it_is_opened_as_a_sampler(config, seed_model, task, prompts):
    problems = task.problems("train")[:20]
    with vllm.opened(config, None, task, problems) as sampler:
        assert ids(collected(sampler.draw(prompts, **GREEDY))) == ids(
            collected(sampling.sample(seed_model, prompts, **GREEDY))
        )
        assert sampler.greedy_accuracy(problems) == sampler.on(seed_model).greedy_accuracy(problems)


class Started:
    """Stands in for an engine: what it was started with, what was drawn, and whether it was ended."""

    def __init__(self, config, policy, longest):
        self.policy, self.longest, self.calls, self.ended = policy, longest, [], False
        engines.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended = True

    def sample(self, prompts, **options):
        self.calls.append((prompts, options))
        return iter([])


engines = []


def test_the_process_is_started_by_the_first_draw_and_ends_with_the_block(config, task, prompts, longest, monkeypatch):
    monkeypatch.setattr(vllm, "Engine", Started)
    engines.clear()
    problems = task.problems("train")[:20]
    with pytest.raises(KeyboardInterrupt), vllm.opened(config, None, task, problems) as sampler:
        assert {name: list(p.prompt_ids) for name, p in sampler.prompts(problems).items()} == prompts and not engines
        for _ in range(2):
            assert list(sampler.samples(problems, n=4, temperature=0.8, seed=3, label="")) == []
        (engine,) = engines
        assert (engine.policy, engine.longest) == (None, longest)
        drawn, options = engine.calls[1]
        assert drawn == prompts and not engine.ended
        assert {name: options[name] for name in ("n", "seed", "eos_id", "max_new_tokens", "max_rows")} == {
            "n": 4,
            "seed": 3,
            "eos_id": sampler.stops,
            "max_new_tokens": config.sampling.max_new_tokens,
            "max_rows": config.sampling.max_rows,
        }
        raise KeyboardInterrupt
    assert engine.ended
    with vllm.opened(config, None, task, problems):
        pass
    assert len(engines) == 1  # nothing was drawn


def test_the_table_names_it():
    row = parts.SAMPLERS["vllm"]
    assert row.load() is vllm.opened
    assert files.load_object(row.check) is vllm.check and files.load_object(row.version) is vllm.version


def test_a_missing_vllm_is_refused_before_the_run(monkeypatch):
    monkeypatch.setenv("IRPO_VLLM_PYTHON", "no/such/python")
    done = drive("micro", "run=test-vllm", "sampling.engine=vllm")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"error: sampling.engine: {ROOT}/no/such/python has no vLLM; make an environment" in done.stderr
    assert "set IRPO_VLLM_PYTHON to its python, or set sampling.engine=transformers" in done.stderr
    assert not (ROOT / "outputs" / "test-vllm").exists()


def test_an_engine_without_vllm_says_so(config, monkeypatch):
    monkeypatch.setenv("IRPO_VLLM_PYTHON", "no/such/python")
    with pytest.raises(vllm.EngineError, match="no/such/python cannot be run .*; see IRPO_VLLM_PYTHON"):
        vllm.Engine(config, None, 50)
    monkeypatch.setenv("IRPO_VLLM_PYTHON", sys.executable)
    if not HERE:
        with pytest.raises(vllm.EngineError, match="ended with exit code 1. Is it installed there"):
            vllm.Engine(config, None, 50)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantize=nf4", "set model.quantize=none or sampling.engine=transformers"),
        ("model.lora_r=513", "vLLM takes a model.lora_r of up to 512"),
    ],
)
def test_what_vllm_cannot_run_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("micro", ["sampling.engine=vllm", override])


# Stands in for vLLM: each draw takes a minute, and one process holds a part of the model.
STALLED = """
import os, subprocess, sys, time
from types import SimpleNamespace as Names
sys.modules |= dict.fromkeys(["vllm.lora.request", "vllm.platforms", "vllm.sampling_params"], sys.modules["vllm"])
LoRARequest, RequestOutputKind, current_platform = None, Names(FINAL_ONLY=0), Names(is_cpu=lambda: False)
SamplingParams = dict

class LLM:
    def __init__(self, **options):
        self.llm_engine = self

    def add_request(self, *arguments, **options):
        self.part = subprocess.Popen(["sleep", "60"])

    def has_unfinished_requests(self):
        return True

    def step(self):
        print(os.getpid(), self.part.pid, file=open(os.environ["DRAWING"], "w"), flush=True)
        time.sleep(60)
"""
DRAW = """
from irpo_utils.extras import remote
from irpo_utils.extras.vllm.engine import Engine
from irpo_utils.run.presets import load_preset
with Engine(load_preset("micro"), None, 50) as engine:
    next(engine.answers([remote.Request([3, 4], 0, 8)], remote.Orders(1, 1.0, [2])))
"""


def test_its_processes_end_in_the_midst_of_a_draw_with_the_one_that_is_killed(tmp_path):
    (tmp_path / "vllm.py").write_text(STALLED)
    here = {"IRPO_VLLM_PYTHON": sys.executable, "DRAWING": str(tmp_path / "drawing"), "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", DRAW], cwd=ROOT, env=os.environ | here) as parent:
        while not (tmp_path / "drawing").exists() or not (pids := (tmp_path / "drawing").read_text().split()):
            assert parent.poll() is None
            time.sleep(0.05)
        assert all(pid_exists(int(pid)) for pid in pids)
        parent.kill()
    end = time.monotonic() + 10
    while any(pid_exists(int(pid)) for pid in pids):
        assert time.monotonic() < end, "a child outlives its parent"
        time.sleep(0.05)
