"""The recipes: what each method's rounds take, start from, and are held against; bad entries are named."""

import pytest

from irpo_utils.files import ConfigError, write_text
from irpo_utils.methods.recipes import catalogue, read
from irpo_utils.run.config import dump
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import STAGES, plan

# PAPERS: method -> (reward, selection, loss, start, reference) of its rounds 1 to 4
TABLE = {
    "irpo": ["answer pairs dpo+nll M_t moving"] * 4,
    "dpo": ["answer pairs dpo M_t moving"] * 4,
    "sft_chosen": ["answer chosen nll M_0 none"] * 4,
    "sft_gold": ["none gold nll M_0 none"],
    "irpo_gold": ["answer pairs_with_gold dpo+nll M_t moving"] * 4,
    "star": ["rationalized correct nll M_0 none"] * 4,
    "rft": ["answer distinct nll M_t none"] * 4,
    "rest_em": ["answer capped nll M_0 none"] * 4,
    "spin": ["none gold_against_own dpo M_t moving"] * 4,
    "self_rewarding": ["judge best_against_worst dpo M_t moving"] * 4,
    "dpo_st": [
        "none gold nll M_0 none",
        "answer pairs dpo M_t moving",
        "answer pseudo nll M_0 none",
        "answer pairs dpo M_t moving",
    ],
    "self_refine": ["none gold nll M_0 none", *["answer pairs dpo M_t moving"] * 3],
    "orpo": ["none gold nll M_0 none", *["answer margin orpo M_0 none"] * 3],
    "sipf": ["none gold nll M_0 none", *["process margin orpo M_0 none"] * 3],
    "step_dpo": ["process first_wrong_step dpo M_t moving"] * 4,
    "sipf_without_or": ["none gold nll M_0 none", *["process margin nll M_0 none"] * 3],
    "expo": ["answer pairs dpo+nll M_t moving", "none none extrapolate M_t none"],
    "rloo": ["answer group policy_gradient M_t none"] * 4,
    "grpo": ["answer group_scaled policy_gradient_mean M_t none"] * 4,
    "divpo": ["answer diverse dpo M_t moving"] * 4,
    "rationalized_pairs": ["rationalized pairs dpo+nll M_t moving"] * 4,
    "latro": ["likelihood thoughts latro M_t none"] * 4,
    "scpo": ["votes voted weighted dpo+nll M_t moving"] * 4,
    **{name: [f"answer pairs {name} M_t none"] * 4 for name in ("cpo", "simpo", "exmate")},
    **{name: [f"answer pairs {name} M_t moving"] * 4 for name in ("dpo_norm", "dpo_positive")},
    "dpo_exmate": ["answer pairs dpo+exmate M_t moving"] * 4,
}


@pytest.mark.parametrize("name", TABLE)
def test_a_method_makes_the_rounds_of_its_paper(name):
    recipe = catalogue()[name]
    rounds = [recipe.round(t) for t in range(1, recipe.count(4) + 1)]
    assert [f"{r.reward} {r.selection} {r.loss} {r.start} {r.reference}" for r in rounds] == TABLE[name]


def test_the_table_is_whole():
    assert set(TABLE) == set(catalogue())


@pytest.fixture
def family(tmp_path):
    """A run with every method whose stages are planned, and none run."""
    config = load_preset("tiny", ["methods=all"])
    write_text(tmp_path / "config.yaml", dump(config))
    return config, tmp_path


def test_stages_start_from_and_read_what_the_recipe_says(family):
    config, run = family

    def stage(name, method, t):
        reads = STAGES[name](run, method, 0, t, config).reads()
        return {k: path.relative_to(run).as_posix() for k, (path, _) in reads.items() if k != "prompts"}

    at = "{}/seed_0/iteration_{}/{}".format
    assert stage("03_train", "irpo", 2) == {"pairs": at("irpo", 2, "pairs.jsonl"), "policy": at("irpo", 1, "adapter")}
    assert stage("03_train", "rest_em", 2) == {"pairs": at("rest_em", 2, "pairs.jsonl")}  # from M_0, every round
    assert stage("01_sample", "rest_em", 2) == {"policy": at("rest_em", 1, "adapter")}  # though M_1 is sampled
    assert stage("02_pairs", "star", 1) == {"samples": at("star", 1, "rewarded.jsonl")}
    assert stage("01b_reward", "star", 1) == {"samples": "m0/seed_0/samples.jsonl"}
    assert stage("02_pairs", "sft_gold", 1) == {}
    assert stage("02_pairs", "sipf", 2) == {"samples": at("sipf", 2, "rewarded.jsonl")}  # the warm start's are not kept
    assert stage("02_pairs", "sipf", 3)["earlier"] == at("sipf", 2, "pairs.jsonl")
    assert stage("03_train", "self_refine", 2)["policy"] == at("self_refine", 1, "adapter")  # from what gold has taught
    assert stage("02_pairs", "sipf_without_or", 3)["earlier"] == at("sipf_without_or", 2, "pairs.jsonl")
    assert stage("03_train", "spin", 2)["policy"] == at("spin", 1, "adapter")
    assert stage("02_pairs", "irpo", 3) == {"samples": at("irpo", 3, "samples.jsonl")}
    assert stage("03b_extrapolate", "expo", 2) == {"policy": at("expo", 1, "adapter")}  # away from the base
    assert stage("04_evaluate", "expo", 2) == {"policy": at("expo", 2, "adapter")}


def test_every_round_draws_and_trains_as_much(family):
    config, run = family
    for method in config.methods:
        stages = plan(config, run, method, 0)
        rounds = [config.recipe(method).round(t) for t in range(1, config.rounds(method) + 1)]
        drawn = [s for s in stages if s.name == "01_sample" and "samples.jsonl" in s.writes()]
        assert len(drawn) == sum(r.draws for r in rounds)
        steps = [config.for_round(method, t).train.max_steps for t in range(1, len(rounds) + 1)]
        assert sum(steps) == config.iterations * config.train.max_steps or method == "expo"


def test_hyper_parameters_are_those_of_the_method_it_inherits_from_then_its_own():
    config = load_preset(
        "tiny", ["dpo.train.lr=1e-5", "sft_gold.train.lr=2e-5", "orpo.train.lr=3e-5", "sipf.pairs.eta=0.4"]
    )
    assert config.for_round("spin", 2).train.lr == 1e-5
    assert [config.for_round("sipf", t).train.lr for t in (1, 2, 3)] == [2e-5, 3e-5, 3e-5]
    assert [config.for_round("sipf", t).pairs.eta for t in (1, 2)] == [config.pairs.eta, 0.4]  # not in the warm start
    assert config.for_round("orpo", 2).pairs.eta == config.pairs.eta


GOOD = "m:\n  label: M\n  rounds: [{reward: answer, selection: pairs, loss: dpo, start: M_t, reference: moving}]\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("loss: dpo", "loss: dppo", "m: no loss is called 'dppo'; there is: dpo"),
        ("selection: pairs, ", "", "m: rounds.selection is missing"),
        ("selection: pairs, ", "selektion: pairs, ", "'rounds.selektion'; did you mean 'rounds.selection'"),
        ("  label: M\n", "", "m: label is missing"),
        ("}]", ", inherits: n}]", "inherits: no method is called 'n'"),
        ("}]", "}]\n  repeat: 2", "repeat: 0 to 1"),
        ("}]", ", accumulate: 1}]", "m: rounds.accumulate: expected true or false, got 1"),
        ("[{", "{", "not YAML"),
        ("selection: pairs, loss: dpo", "selection: gold, loss: dpo", "the loss 'dpo' needs pairs"),
        ("reward: answer", "reward: judge", "the reward 'judge' is a number"),
        ("reward: answer", "reward: none", "the selection 'pairs' needs a reward"),
        ("label: M", "label: [M]", r"label: expected text, got \['M'\]"),
        ("label: M", "label: M\n  label: N", "'label' is given twice"),
        ("}]", ", inherits: [m]}]", r"rounds.inherits: expected text, got \['m'\] \(the name of a method\)"),
        ("reference: moving", "reference: none", "needs a reference: moving or M_0"),
        ("reference: moving", "reference: M_1", "rounds.reference: one of moving, M_0, none, got 'M_1'"),
        ("selection: pairs", "selection: nowhere.py:mine", "nowhere.py:mine: .* is missing"),
        ("m:", "train:", "'train' is no name for a method"),
        (
            "reward: answer, selection: pairs",
            "reward: likelihood, selection: thoughts",
            "'dpo' and the selection 'thoughts' do not fit",
        ),
        (
            "loss: dpo, start: M_t, reference: moving",
            "loss: latro, start: M_t, reference: none",
            "'latro' and the selection 'pairs' do not fit",
        ),
        ("}]", "}]\n  repeat: true", "repeat: expected a whole number, got True"),
        (
            "loss: dpo, start: M_t, reference: moving",
            "loss: extrapolate, start: M_t, reference: none",
            "has no selection",
        ),
        (
            "selection: pairs, loss: dpo, start: M_t, reference: moving",
            "selection: none, loss: extrapolate, start: M_t, reference: none",
            "the first round cannot extrapolate",
        ),
        ("m:", "a b:", "'a b' is no name for a method"),
    ],
)
def test_bad_entry(tmp_path, old, new, message):
    (tmp_path / "methods.yaml").write_text(GOOD)
    assert list(read(tmp_path / "methods.yaml")) == ["m"]
    (tmp_path / "methods.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "methods.yaml")


def test_a_method_needs_as_many_iterations_as_it_has_kinds_of_rounds():
    with pytest.raises(
        ConfigError, match="iterations: dpo_st needs 3 rounds before it repeats; set iterations=3, or leave it out"
    ):
        load_preset("tiny", ["methods=irpo,dpo_st", "iterations=2"])


def test_all_takes_every_method():
    assert load_preset("tiny", ["methods=all"]).methods == tuple(catalogue())
    assert load_preset("tiny", ["methods=irpo,all"]).methods == tuple(catalogue())


def test_a_stage_that_the_round_does_not_have_touches_nothing(family):
    _, run = family
    adapter = STAGES["03_train"](run, "irpo", 0, 2).path("adapter")
    adapter.mkdir(parents=True)
    wrong = [
        ("03b_extrapolate", "irpo", 2, "it has 01_sample, 02_pairs"),
        ("01b_reward", "sipf", 1, "it has 01_sample, 02_pairs"),
        ("02_pairs", "expo", 2, "it has 03b"),
        ("03_train", "irpo", 0, "M_0 has no such stage; it has 04"),
    ]
    for name, method, t, message in wrong:
        with pytest.raises(ConfigError, match=message):
            STAGES[name](run, method, 0, t).begin()
    assert adapter.exists()
    with pytest.raises(ConfigError, match="SFT on gold makes 1 round, there is no round 2"):
        STAGES["03_train"](run, "sft_gold", 0, 2)
