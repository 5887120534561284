"""Greedy equals `generate`, sampling has the distribution softmax(logits / T), and a problem's samples are its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from irpo_utils import sampling, stages
from irpo_utils.scoring import collate, response_logps

SMALL = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    # A window longer than any sequence here: the preallocated cache keeps every key.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, sliding_window=128)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate_token_by_token(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)  # so that rows end at different steps
    rng = np.random.default_rng(0)
    prompts = {str(i): [1, *rng.integers(3, 97, rng.integers(2, 30)).tolist()] for i in range(60)}
    ours = {}
    for batch in sampling.sample(model, prompts, n=1, temperature=0, seed=0, eos_id=2, max_new_tokens=24, rows=16):
        ours |= {name: c[0].token_ids for name, c in batch.items()}
    for name, prompt in prompts.items():
        wanted = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False, max_new_tokens=24)  # fmt: skip
        assert ours[name] == wanted[0, len(prompt) :].tolist(), name


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([0.5, 0.8, 1.0, 1.3]), st.integers(0, 99))
def test_pick_draws_from_softmax_of_logits_over_temperature(temperature, seed):
    """Chi-square on 40,000 seeded draws over 8 tokens; 40.5 is the 1e-6 point at 7 degrees of freedom."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=8), dtype=torch.float32)
    draws, _ = sampling.pick(logits.unsqueeze(0), temperature, np.zeros(40_000, dtype=int), rng.random(40_000))
    expected = (logits.double() / temperature).softmax(-1) * 40_000
    assert ((torch.bincount(torch.from_numpy(draws), minlength=8) - expected) ** 2 / expected).sum() < 40.5


def test_a_zero_probability_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 1e-16):
        assert sampling.pick(logits, 1.0, np.array([0]), np.array([u]))[0].item() == 1


@pytest.fixture(scope="module")
def drawn(seed_model, tokenizer, task):
    prompts = stages.encode_prompts(task, tokenizer, task.problems("train")[:24])

    def draw(rows, seed=3, names=None):
        chosen = prompts if names is None else {k: prompts[k] for k in names}
        out = {}
        for batch in sampling.sample(seed_model, chosen, n=8, temperature=0.9, seed=seed, eos_id=tokenizer.eos_token_id, max_new_tokens=64, rows=rows):  # fmt: skip
            out |= {k: [c.token_ids for c in cs] for k, cs in batch.items()}
        return out

    return prompts, draw


def test_samples_do_not_depend_on_the_batch_and_do_on_the_seed(drawn):
    prompts, draw = drawn
    all_at_once = draw(rows=512)
    assert draw(rows=16) == all_at_once
    alone = next(iter(prompts))
    assert draw(rows=8, names=[alone]) == {alone: all_at_once[alone]}
    assert draw(rows=512, seed=4) != all_at_once


def test_recorded_logps_are_the_model_s_own(seed_model, tokenizer, task):
    prompts = stages.encode_prompts(task, tokenizer, task.problems("train")[:4])
    for batch in sampling.sample(seed_model, prompts, n=4, temperature=1.0, seed=0, eos_id=tokenizer.eos_token_id, max_new_tokens=64):  # fmt: skip
        for name, completions in batch.items():
            with torch.no_grad():
                wanted = response_logps(seed_model, collate([(prompts[name], c.token_ids) for c in completions]))
            assert torch.allclose(torch.tensor([c.logp for c in completions]), wanted.double().float(), atol=1e-3)


def test_the_length_limit_leaves_a_response_unfinished(seed_model, tokenizer, task):
    prompts = stages.encode_prompts(task, tokenizer, task.problems("train")[:1])
    for batch in sampling.sample(seed_model, prompts, n=2, temperature=1.0, seed=0, eos_id=tokenizer.eos_token_id, max_new_tokens=3):  # fmt: skip
        for completion in next(iter(batch.values())):
            assert len(completion.token_ids) == 3 and not completion.finished


def test_greedy_with_many_samples_is_refused(seed_model):
    with pytest.raises(ValueError, match="set n=1 or a temperature above 0"):
        next(sampling.sample(seed_model, {"a": [1]}, n=2, temperature=0, seed=0, eos_id=2, max_new_tokens=3))
