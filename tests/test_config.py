"""Bad parameters give one clear error that names the thing and the mend."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpo_utils.files import ConfigError
from irpo_utils.run.config import dump, read_config
from irpo_utils.run.presets import FOLDER, load_preset, presets


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_read_back_the_same(name, tmp_path):
    config = load_preset(name)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_a_preset_has_what_is_different_from_the_one_that_it_inherits_from():
    tiny, claims = load_preset("tiny"), load_preset("claims")
    assert (claims.seeds, claims.task.by_seed, claims.evaluation.samples) == (5, True, 32)
    assert (claims.method_settings, claims.task.train_size, claims.train) == (
        tiny.method_settings,
        tiny.task.train_size,
        tiny.train,
    )


@given(st.floats(1e-8, 1.0), st.integers(1, 99))
def test_overrides_arrive_and_survive_yaml(lr, n):
    config = load_preset("tiny", [f"train.lr={lr!r}", f"sampling.n={n}", f"dpo.train.lr={lr!r}"])
    assert (config.train.lr, config.sampling.n, config.for_round("dpo", 1).train.lr) == (lr, n, lr)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "did you mean 'train.lr'"),
        ("tempreature=1", "no parameter is called 'tempreature'"),
        ("train.lr=fast", "train.lr: expected a number, got 'fast'"),
        ("sampling.n=1.5", "sampling.n: expected a whole number, got '1.5'"),
        ("sampling.n=0", "sampling.n: at least 1"),
        ("methods=irpo,dop", "no method is called 'dop'; there is: all, irpo"),
        ("pairs.gold=maybe", "pairs.gold: expected true or false"),
        ("sampling.temperature=0.8,hot", "sampling.temperature: expected a number, got 'hot'"),
        ("sampling.temperature=0", "sampling.temperature: above 0"),
        ("iterations", "not key=value"),
        ("train.micro_batch=5", "train.batch: a multiple of train.micro_batch"),
        ("task.name=gsm9k", "'gsm9k'; there is: arc_challenge, gsm8k, humaneval, jsonl"),
        ("task.execution=yes", "task.execution: one of isolated, i-accept-the-risk, got 'yes'"),
        ("task.name=jsonl", "task.train: the jsonl task needs a file"),
        ("task.name=refined", "task.train: the refined task needs a file"),
        ("task.dev_size=-1", "task.dev_size: at least 0, got -1"),
        ("train.lr=inf", "train.lr: expected a finite number, got inf"),
        ("train.beta=nan", "train.beta: expected a finite number"),
        ("train.micro_batch=0", "train.micro_batch: at least 1"),
        ("pairs.max_tokens=0", "pairs.max_tokens: at least 1"),
        ("pairs.eta=0", "pairs.eta: above 0"),
        ("rest_em.pairs.max_per_problem=0", "rest_em: pairs.max_per_problem: at least 1"),
        ("pairs.max_pairs=-1", "pairs.max_pairs: at least 0, got -1"),
        ("irpo.train.lr=-1", "irpo: train.lr: above 0, got -1"),
        ("dpo.train.eval_every=0", "train.eval_every: at least 1"),
        ("irpo.train.retrain_with_dev=true", "is for all methods"),
        ("evaluation.test=a.jsonl,./a.jsonl", "evaluation.test: a.jsonl is there twice"),
        ("evaluation.test=test", "evaluation.test: test is what the run's own problems are called; rename the file"),
        ("model.quantize=int8", "model.quantize: one of none, nf4, auto"),
        ("sampling.engine=vlm", "sampling.engine: one of transformers, vllm"),
        ("methods=irpo,irpo", "methods: each one once"),
        ("train.warmup=7", "train.warmup: between 0 and 1"),
        ("irpo.sampling.n=3", "only pairs.\\*, process.\\*, judge.\\*, train.\\* can differ between methods"),
        ("train=3", "no parameter is called 'train'"),
    ],
)
def test_bad_override(override, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("tiny", [override])


def test_a_general_override_reaches_methods_with_settings_of_their_own():
    config = load_preset("tiny", ["irpo.train.lr=3e-3", "train.lr=5e-4", "train.beta=1"])
    assert config.for_round("dpo", 1).train.lr == 5e-4
    assert config.for_round("irpo", 1).train.lr == 3e-3  # the more particular wins, in any order
    assert config.for_round("irpo", 1).train.beta == config.for_round("dpo", 1).train.beta == 1.0


def test_an_override_given_twice_is_refused():
    with pytest.raises(ConfigError, match="train.lr is given twice"):
        load_preset("tiny", ["train.lr=1", "train.lr=2"])


def test_a_method_s_own_file_of_pairs_is_that_of_all_its_rounds_and_of_no_other_method():
    config = load_preset(
        "micro", ["methods=self_refine,irpo,irpo_gold", "self_refine.pairs.file=x", "irpo.pairs.file=y"]
    )
    files = {m: [config.for_round(m, t).pairs.file for t in (1, 2)] for m in config.methods}
    assert files == {"self_refine": ["x", "x"], "irpo": ["y", "y"], "irpo_gold": ["", ""]}


def test_unknown_preset_lists_the_known():
    known = "claims, format-only, micro, online, own, refine, smollm2, smollm2-paper, tiny, and <task>"
    with pytest.raises(ConfigError, match=f"'big'; There is: {known}"):
        load_preset("big")


def test_a_preset_that_inherits_from_none_is_refused(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "presets")
    monkeypatch.setattr("irpo_utils.run.presets.FOLDER", tmp_path / "presets")
    (tmp_path / "presets" / "mine.yaml").write_text("# Mine.\ninherits: tniy\n")
    with pytest.raises(ConfigError, match="no preset is called 'tniy'; did you mean 'tiny'"):
        load_preset("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1e-5}", "YAML reads 1e-5 as text, write 1.0e-5"),
        ("train: {lr: true}", "train.lr: expected a number"),
        ("sampling: {n: '16'}", "sampling.n: expected a whole number, got '16'"),
        ("pairs: {k: 2.0}", "pairs.k: expected a whole number"),
        ("trian: {lr: 1.0}", "no parameter is called 'trian.lr'; did you mean 'train.lr'"),
        ("train: {lr: 0.1, lr: 0.2}", "'lr' is given twice"),
        ("method_settings: 5", "method_settings: expected"),
        ("method_settings: {irpo: }", "method_settings: expected"),
        ("- a", "expected parameters as `key: value`"),
        ("train: {lr: [", "not YAML"),
        ("methods: []", "methods: expected at least one value"),
    ],
)
def test_bad_yaml(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "c.yaml")


def test_temperature_by_iteration_goes_on_with_the_last():
    config = load_preset("tiny", ["sampling.temperature=0.8,1.3"])
    assert [config.temperature(t) for t in (1, 2, 3)] == [0.8, 1.3, 1.3]
