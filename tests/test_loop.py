"""IRPO in memory: the same parts as the stages, in one call."""

import pytest

from irpo_utils.loop import irpo
from irpo_utils.model.load import load_base
from irpo_utils.settings import SamplingConfig, Settings, TrainConfig


def test_a_round_in_memory_learns_from_its_own_samples(config, tokenizer, task):
    settings = Settings(
        model=config.model,
        sampling=SamplingConfig(n=8),
        train=TrainConfig(max_steps=4, batch=8, micro_batch=8, lr=2e-3),
        iterations=2,
    )
    model = load_base(config.model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first, second = irpo(model, tokenizer, task, settings)
    assert (first.iteration, second.iteration) == (1, 2) and first.pairs > 0
    assert first.sampled != second.sampled  # the second round samples what the first has trained
    assert first.facts["dpo_at_start"] == pytest.approx(
        second.facts["dpo_at_start"], abs=1e-3
    )  # ln 2: a moving reference
    assert first.facts["sampler_gap"] < 1e-3 and second.facts["sampler_gap"] < 1e-3
    after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    assert all(after[name].equal(weight) for name, weight in before.items())  # the base is frozen
    with pytest.raises(ValueError, match="has an adapter already; load it again"):
        next(irpo(model, tokenizer, task, settings))
