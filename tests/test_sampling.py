"""Greedy equals `generate`, sampling has the distribution softmax(logits / T), and a problem's samples are its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from irpo_utils import metrics
from irpo_utils.model import sampling, shared_prompt
from irpo_utils.model.logprobs import collate, response_logps
from irpo_utils.model.prompts import encode_prompts

SMALL = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
STOPS = [2, *range(20, 36)]  # many, so that rows end at different steps
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, sliding_window=16)),  # shorter than the rows
    # Its attention cannot be replaced: each row has its own copy of the prompt's cache.
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def network(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return model


def drawn_from(model, prompts, **settings):
    """The completions of every prompt, [samples]; greedy unless `settings` say otherwise."""
    settings = dict(n=1, temperature=0, seed=0, eos_id=STOPS, max_new_tokens=20) | settings
    batches = sampling.sample(model, prompts, **settings)
    return {name: completions for batch in batches for name, completions in batch.items()}


def ids_of(completions):
    return [c.token_ids for c in completions]


def test_greedy_is_generate_token_by_token(network):
    """500 prompts of 2 to 41 tokens; those of one length go through `generate` together, so that it pads nothing."""
    rng = np.random.default_rng(0)
    prompts = {str(i): [1, *rng.integers(3, 97, 1 + i % 40).tolist()] for i in range(500)}
    ours = {name: completions[0].token_ids for name, completions in drawn_from(network, prompts, max_rows=96).items()}
    assert len({len(ids) for ids in ours.values()}) > 3
    for length in range(2, 42):
        names = [name for name, prompt in prompts.items() if len(prompt) == length]
        ids = torch.tensor([prompts[name] for name in names])
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=STOPS
        )
        for name, row in zip(names, out[:, length:].tolist(), strict=True):
            assert ours[name] == row[: next((i + 1 for i, token in enumerate(row) if token in STOPS), 20)], name


def test_samples_are_the_same_one_problem_at_a_time(network):
    """Temperature 1 on random weights, where the samples of a problem part at once."""
    rng = np.random.default_rng(1)
    prompts = {str(i): [1, *rng.integers(3, 97, 3 + 2 * i).tolist()] for i in range(12)}

    def draw(some, max_rows):
        found = drawn_from(network, some, n=6, temperature=1.0, eos_id=2, max_rows=max_rows)
        return {name: ids_of(completions) for name, completions in found.items()}

    together = draw(prompts, 512)
    assert together == {k: v for name in prompts for k, v in draw({name: prompts[name]}, 4).items()}


def test_what_all_prompts_begin_with_is_run_once_and_changes_nothing(network):
    rng = np.random.default_rng(2)
    prompts = {str(i): [1, *range(40, 60), *rng.integers(3, 97, 1 + i % 7).tolist()] for i in range(20)}
    seen = []
    embedded = network.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].shape))
    together = drawn_from(network, prompts, n=4, temperature=1.0)
    embedded.remove()
    once = (1, 21) in seen and (20, 7) in seen
    assert once == (
        network.config.model_type in ("llama", "qwen2")
    )  # not under a window, nor an attention of its own kind
    for name, completions in together.items():
        alone = drawn_from(network, {name: prompts[name]}, n=4, temperature=1.0)[name]
        assert ids_of(completions) == ids_of(alone)
        assert np.allclose([c.logp for c in completions], [c.logp for c in alone], atol=1e-3)


@pytest.mark.parametrize("beginning", [[1], [1, *range(40, 60)]])
def test_longer_prompts_are_run_apart_and_draw_the_same(network, beginning, monkeypatch):
    """Little of what is run is padding, whatever the lengths of a batch."""
    rng = np.random.default_rng(5)
    prompts = {str(i): [*beginning, *rng.integers(3, 97, 1 + i).tolist()] for i in range(40)}
    settings = dict(n=4, temperature=1.0, max_rows=256)
    together = drawn_from(network, prompts, **settings)
    monkeypatch.setattr(sampling, "ENOUGH_TOKENS", 32)
    seen = []
    embedded = network.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].shape))
    apart = drawn_from(network, prompts, **settings)
    embedded.remove()
    assert {name: ids_of(own) for name, own in apart.items()} == {name: ids_of(own) for name, own in together.items()}
    run = sum(rows * width for rows, width in seen if width > 1)
    assert run < 1.25 * sum(map(len, prompts.values())) < 40 * max(map(len, prompts.values()))


def test_a_greedy_response_comes_along_and_changes_no_sample(network):
    rng = np.random.default_rng(4)
    prompts = {str(i): [1, *rng.integers(3, 97, 3 + i % 4).tolist()] for i in range(10)}
    both = drawn_from(network, prompts, n=3, temperature=1.0, greedy_too=True)
    alone, drawn = drawn_from(network, prompts), drawn_from(network, prompts, n=3, temperature=1.0)
    assert {name: ids_of(own) for name, own in both.items()} == {
        name: ids_of([*alone[name], *drawn[name]]) for name in prompts
    }
    starts = {name: [[], [40, 41]] for name in prompts}
    begun = drawn_from(network, prompts, n=2, temperature=1.0, greedy_too=True, starts=starts)
    expected = drawn_from(network, prompts, starts=starts)
    for name, own in begun.items():
        assert len(own) == 6 and ids_of([own[0], own[3]]) == ids_of(expected[name])


def test_an_attention_that_measures_distance_in_the_cache_has_no_padding_put_before_it():
    """MPT's: what all prompts begin with is not run apart, since padding would stand behind it."""
    config = MptConfig(d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128, vocab_size=97)
    torch.manual_seed(0)
    model, rng = MptForCausalLM(config).eval(), np.random.default_rng(3)
    prompts = {str(i): [1, *range(40, 60), *rng.integers(3, 97, 1 + 2 * i).tolist()] for i in range(8)}
    together = drawn_from(model, prompts)
    assert {name: ids_of(own) for name, own in together.items()} == {
        name: ids_of(drawn_from(model, {name: prompt})[name]) for name, prompt in prompts.items()
    }


def test_fewer_problems_when_their_samples_need_more_rows_than_there_are(network):
    """What goes into few rows is what comes of many, for as many problems as fit."""
    rng = np.random.default_rng(2)
    prompts = [[1, *rng.integers(3, 97, 3 + i).tolist()] for i in range(10)]
    noise = rng.random((10, 6, 16))
    decoding = sampling.Decoding(1.0, STOPS, 16)
    whole, _ = sampling.sample_batch(network, prompts, noise, decoding, 60)
    for capacity in (10, 17, 30):
        part, peak_rows = sampling.sample_batch(network, prompts, noise, decoding, capacity)
        assert 0 < len(part) < 10 and peak_rows <= capacity
        assert list(map(ids_of, part)) == list(map(ids_of, whole))[: len(part)]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=8))
def test_prefixes_are_counted_once(responses):
    assert metrics.distinct_prefixes(responses) == len({tuple(ids[:i]) for ids in responses for i in range(len(ids))})


def test_a_window_that_attention_is_not_told_is_found_out():
    shape = dict(SMALL, num_local_experts=2, sliding_window=6)
    with pytest.warns(UserWarning, match="since a phimoe does not tell its attention its window"):
        assert not shared_prompt.shares_prompts(PhimoeForCausalLM(PhimoeConfig(**shape)).eval())


def test_a_model_that_cannot_share_prompts_says_so():
    with pytest.warns(UserWarning, match="since a falcon does not let its attention be replaced"):
        assert not shared_prompt.shares_prompts(FAMILIES["falcon"]())
    assert shared_prompt.shares_prompts(FAMILIES["gemma2"]())


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([0.5, 0.8, 1.0, 1.3]), st.integers(0, 99))
def test_pick_draws_from_softmax_of_logits_over_temperature(temperature, seed):
    """Chi-square on 40,000 seeded draws over 8 tokens; 40.5 is the 1e-6 point at 7 degrees of freedom."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=8), dtype=torch.float32)
    draws, _ = sampling.pick(logits.unsqueeze(0), temperature, np.zeros(40_000, dtype=int), rng.random(40_000))
    expected = (logits.double() / temperature).softmax(-1) * 40_000
    assert ((torch.bincount(torch.from_numpy(draws), minlength=8) - expected) ** 2 / expected).sum() < 40.5


@settings(max_examples=20, deadline=None)
@given(st.integers(4097, 9000), st.sampled_from([1.0, 8.0, 30.0]), st.integers(0, 99))
def test_a_word_of_a_large_vocabulary_is_that_of_its_distribution_function(words, spread, seed):
    """The word drawn is the one whose share of [0, 1) holds the random number, up to the rounding of float32."""
    rng = np.random.default_rng(seed)
    likely = torch.from_numpy(rng.normal(size=(3, words)) * spread).float().softmax(-1)
    uniform = torch.from_numpy(np.concatenate([rng.random((3, 20)), np.full((3, 1), 1 - 2**-53), np.zeros((3, 1))], 1))
    found, ends = sampling.inverse(likely, uniform), likely.double().cumsum(-1)
    share = ends.gather(-1, found) / ends[:, -1:]
    before = share - likely.gather(-1, found) / ends[:, -1:]
    assert (before - 1e-6 <= uniform).all() and (uniform <= share + 1e-6).all()
    assert (likely.gather(-1, found) > 0).all()


def test_logits_that_are_no_numbers_are_refused():
    for temperature in (0, 0.8, 1.0):
        with pytest.raises(FloatingPointError, match="are not numbers"):
            sampling.pick(torch.tensor([[torch.nan, 1.0]]), temperature, np.array([0]), np.array([0.5]))


def test_a_point_on_a_block_s_end_draws_no_word_without_probability():
    likely = torch.zeros(1, 5000)
    likely[0, [3, 2000]] = 0.5
    points = torch.tensor([[np.nextafter(0.5, 0), 0.5, np.nextafter(1, 0), 0.0]])
    assert (likely.gather(-1, sampling.inverse(likely, points)) > 0).all()


def test_a_zero_probability_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 1e-16):
        assert sampling.pick(logits, 1.0, np.array([0]), np.array([u]))[0].item() == 1


@pytest.fixture(scope="module")
def drawn(seed_model, tokenizer, task):
    prompts = encode_prompts(task, tokenizer, task.problems("train")[:24])

    settings = dict(n=8, temperature=0.9, eos_id=tokenizer.eos_token_id, max_new_tokens=64)

    def draw(max_rows, seed=3, names=prompts):
        some = {name: prompts[name] for name in names}
        found = drawn_from(seed_model, some, seed=seed, max_rows=max_rows, **settings)
        return {name: ids_of(completions) for name, completions in found.items()}

    return prompts, draw


def test_samples_do_not_depend_on_the_batch_and_do_on_the_seed(drawn):
    prompts, draw = drawn
    all_at_once = draw(max_rows=512)
    assert draw(max_rows=16) == all_at_once
    alone = next(iter(prompts))
    assert draw(max_rows=8, names=[alone]) == {alone: all_at_once[alone]}
    assert draw(max_rows=512, seed=4) != all_at_once


def test_every_problem_sample_and_step_has_random_numbers_of_its_own(seed_model, tokenizer, task):
    """Two problems in the same words would else be answered alike, and all problems be right or wrong together."""
    ids = next(iter(encode_prompts(task, tokenizer, task.problems("train")[:1]).values()))
    settings = dict(n=8, temperature=1.0, eos_id=tokenizer.eos_token_id, max_new_tokens=40)
    first, second = drawn_from(seed_model, {"a": ids, "b": ids}, **settings).values()
    assert first != second
    numbers = np.concatenate([sampling.uniforms(seed, name, 3, 5).ravel() for seed in (0, 1) for name in ("a", "b")])
    assert len(set(numbers)) == 2 * 2 * 3 * 5 and ((numbers >= 0) & (numbers < 1)).all()


def test_recorded_logps_are_the_model_s_own(seed_model, tokenizer, task):
    prompts = encode_prompts(task, tokenizer, task.problems("train")[:4])
    settings = dict(n=4, temperature=1.0, eos_id=tokenizer.eos_token_id, max_new_tokens=64)
    for name, completions in drawn_from(seed_model, prompts, **settings).items():
        with torch.no_grad():
            wanted = response_logps(seed_model, collate([(prompts[name], c.token_ids) for c in completions]))
        assert torch.allclose(torch.tensor([c.logp for c in completions]), wanted.double().float(), atol=1e-3)


def test_the_length_limit_leaves_a_response_unfinished(seed_model, tokenizer, task):
    prompts = encode_prompts(task, tokenizer, task.problems("train")[:1])
    settings = dict(n=2, temperature=1.0, eos_id=tokenizer.eos_token_id, max_new_tokens=3)
    (completions,) = drawn_from(seed_model, prompts, **settings).values()
    assert len(completions) == 2
    for completion in completions:
        assert len(completion.token_ids) == 3 and not completion.finished


def test_greedy_with_many_samples_is_refused(seed_model):
    with pytest.raises(ValueError, match="set n=1 or a temperature above 0"):
        next(sampling.sample(seed_model, {"a": [1]}, n=2, temperature=0, seed=0, eos_id=2, max_new_tokens=3))


def test_half_the_rows_when_memory_runs_out(drawn, seed_model):
    """An allocator that gives out at 40 rows: the same samples come, and one line says what happened."""
    _, draw = drawn
    wanted, seen = draw(max_rows=512), []

    def refuse(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > 40:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
            )

    handle = seed_model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        with pytest.warns(UserWarning, match="memory ran out with 512 rows at once; going on with 256"):
            assert draw(max_rows=512) == wanted
    finally:
        handle.remove()
    assert max(seen) > 40


def test_samples_that_say_the_same_are_one_row(drawn, seed_model, tokenizer):
    _, draw = drawn
    fed = []
    handle = seed_model.register_forward_pre_hook(lambda m, a, k: fed.append(k["input_ids"].shape), with_kwargs=True)
    try:
        responses = draw(max_rows=512)
    finally:
        handle.remove()
    tokens = sum(len(ids) for completions in responses.values() for ids in completions)
    prefixes = sum(
        len({tuple(ids[:i]) for ids in completions for i in range(1, len(ids))}) for completions in responses.values()
    )
    run = sum(rows for rows, width in fed if width == 1)
    assert prefixes <= run < 1.4 * prefixes < tokens  # ended rows run along for a while


def test_greedy_from_any_start_is_generate_from_prompt_and_start(network):
    """Nested starts, ones that part, none at all; prompts of different lengths; more of them than rows."""
    rng = np.random.default_rng(3)
    prompts = {str(i): [1, *rng.integers(3, 97, 1 + 3 * i).tolist()] for i in range(6)}
    starts = {}
    for i, name in enumerate(prompts):
        ids = rng.integers(40, 97, 12).tolist()
        starts[name] = [ids[:length] for length in range(0, 12, 1 + i % 3)] + [[39, *ids[:3]], [39, *ids[:5]]]
    wanted = {name: [] for name in prompts}
    for name, start in ((own, start) for own in prompts for start in starts[own]):
        ids = torch.tensor([prompts[name] + start])
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20 - len(start),
            eos_token_id=STOPS,
        )
        wanted[name].append(out[0, len(prompts[name]) :].tolist())
    for max_rows in (96, 5):
        found = drawn_from(network, prompts, starts=starts, max_rows=max_rows)
        assert {name: ids_of(own) for name, own in found.items()} == wanted


def test_problems_may_have_few_starts_and_many(network):
    """Those of few, whose neighbours have more than there are rows, are drawn without them."""
    prompts = {"0": [1], "1": [1, 5], "2": [1, 5, 6]}
    starts = {"0": [[]], "1": [[50], [51]], "2": [[i] for i in range(52, 64)]}
    wide, narrow = (drawn_from(network, prompts, starts=starts, max_rows=rows) for rows in (96, 8))
    assert {name: ids_of(own) for name, own in narrow.items()} == {name: ids_of(own) for name, own in wide.items()}
    assert drawn_from(network, {}, starts={"0": []}) == {}


def test_what_a_start_draws_does_not_depend_on_the_others(network):
    prompts = {"a": [1, 5, 6], "b": [1, 7]}
    starts = {"a": [[], [50], [50, 51], [60, 61, 62]], "b": [[50]]}
    assert len({sampling.stream(name, start) for name in starts for start in starts[name]}) == 5
    settings = dict(n=6, temperature=1.0, seed=5)
    together = drawn_from(network, prompts, starts=starts, **settings)
    for i, start in enumerate(starts["a"]):
        alone = drawn_from(network, {"a": prompts["a"]}, starts={"a": [start]}, max_rows=4, **settings)["a"]
        assert ids_of(alone) == ids_of(together["a"][6 * i : 6 * i + 6])
        assert all(c.token_ids[: len(start)] == start for c in alone)
    plain = drawn_from(network, {"a": prompts["a"]}, **settings)
    assert ids_of(plain["a"]) == ids_of(together["a"][:6])  # the empty start is none at all


def test_continuations_have_the_distribution_of_the_next_token(seed_model, tokenizer, task):
    """Chi-square on 4,000 draws of the token behind a given one; logp is that of the drawn token alone."""
    name, prompt = next(iter(encode_prompts(task, tokenizer, task.problems("train")[:1]).items()))
    start = drawn_from(seed_model, {name: prompt}, eos_id=2, max_new_tokens=9)[name][0].token_ids[:4]
    settings = dict(n=4000, temperature=1.5, max_new_tokens=5, eos_id=2)
    drawn = drawn_from(seed_model, {name: prompt}, starts={name: [start]}, **settings)
    with torch.no_grad():
        logits = seed_model(torch.tensor([prompt + start])).logits[0, -1].double()
    expected = (logits / 1.5).softmax(-1) * 4000
    counts = torch.bincount(torch.tensor([c.token_ids[4] for c in drawn[name]]), minlength=len(expected))
    common = expected > 5
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() < common.sum() + 6 * (2 * common.sum()) ** 0.5
    assert counts[~common].sum() < 3 * expected[~common].sum() + 10
    for c in drawn[name][:20]:
        assert c.logp == pytest.approx(logits.log_softmax(-1)[c.token_ids[4]].item(), abs=1e-4)


def test_every_token_of_nested_starts_is_run_once(seed_model, tokenizer, task):
    """Four continuations from each of ten prefixes of one solution: 1 + 2 + ... tokens of prefixes, and ten are run."""
    name, prompt = next(iter(encode_prompts(task, tokenizer, task.problems("train")[:1]).items()))
    solution, fed = tokenizer(task.problems("train")[0].solution).input_ids[:10], []
    handle = seed_model.register_forward_pre_hook(lambda m, a, k: fed.append(k["input_ids"].shape), with_kwargs=True)
    try:
        starts = {name: [solution[: i + 1] for i in range(10)]}
        settings = dict(n=4, temperature=1.0, eos_id=2, max_new_tokens=60)
        drawn = drawn_from(seed_model, {name: prompt}, starts=starts, **settings)[name]
    finally:
        handle.remove()
    run = sum(rows for rows, width in fed if width == 1)
    assert run < 1.4 * len({tuple(c.token_ids[:i]) for c in drawn for i in range(1, len(c.token_ids))})
    assert [rows for rows, width in fed if width > 1] == [1]  # the prompt


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ({}, "a has none"),
        ({"a": []}, "a has none"),
        ({"a": [[50], [50]]}, "the same one twice"),
        ({"a": [[50] * 20]}, "leaves nothing of max_new_tokens=20"),
        ({"a": [[50, 2]]}, "has ended already"),
    ],
)
def test_a_start_that_nothing_can_follow_is_refused(seed_model, starts, message):
    with pytest.raises(ValueError, match=message):
        drawn_from(seed_model, {"a": [1]}, starts=starts)


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_rows_that_are_worked_on_apart_draw_the_same(monkeypatch, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5000, generator=generator).bfloat16()
    rows = np.array([0, 0, 1, 2, 2, 2, 4, 6])
    uniform = np.random.default_rng(0).random(len(rows))
    uniform[3] = -1.0  # greedy
    whole = sampling.pick(logits, temperature, rows, uniform)
    monkeypatch.setattr(sampling, "CACHED", 2 * 5000)
    parts = sampling.pick(logits, temperature, rows, uniform)
    assert (whole[0] == parts[0]).all() and np.allclose(whole[1], parts[1])
    assert whole[0][3] == logits[2].argmax()
