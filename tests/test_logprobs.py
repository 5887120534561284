"""Shared prompts change nothing: log-probabilities and gradients are those of one padded row for each response."""

from dataclasses import replace
from itertools import chain, combinations, groupby, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SHAPE
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig, Qwen2Config

from irpo_utils.model import logprobs
from irpo_utils.model.losses import dpo, dpo_nll, nll, orpo
from irpo_utils.model.records import Pair
from irpo_utils.model.schedule import training_order
from irpo_utils.model.training import batch_losses, kept_reference_logps
from irpo_utils.settings import TrainConfig

KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}
WEIGHTS = {dpo_nll: {"beta": 0.1, "alpha": 1.0}, dpo: {"beta": 0.1}, nll: {}, orpo: {"odds_weight": 0.1}}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    found = {}
    for name, kind in KINDS.items():
        more = {"sliding_window": 8} if name == "gemma2" else {}  # shorter than the rows below
        found[name] = AutoModelForCausalLM.from_config(kind(vocab_size=40, **SHAPE, **more)).train()
    return found


@pytest.fixture(scope="module", autouse=True)
def rows_of_like_length_run_together():
    """However few tokens that saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "GROUP_ON_CPU", 1)
        yield


def make_pairs(lengths: list[tuple[int, int, int]]) -> list[Pair]:
    """Pairs with (prompt, chosen, rejected) of these lengths; equal numbers give equal prompts and responses."""

    def ids(count, first):
        return tuple((first + i) % 37 + 3 for i in range(count))

    return [
        Pair(
            f"p{prompt}",
            *("", "", ""),
            *(ids(prompt, 1), ids(chosen, 5), ids(rejected, 11)),
            *(None, None),
            reference_chosen=-3.0 * chosen,
            reference_rejected=-3.5 * rejected,
        )
        for prompt, chosen, rejected in lengths
    ]


def tree_logps(model, batch):
    return logprobs.summed_logps(model, logprobs.tree_states(model, batch), batch["responses"], batch["scored"])


def padded_logps(model, batch):
    return logprobs.summed_logps(model, logprobs.padded_states(model, batch), batch["responses"], batch["scored"])


def gradients(model, pairs, loss, score, monkeypatch):
    monkeypatch.setattr("irpo_utils.model.training.response_logps", score)
    model.zero_grad()
    terms, chosen, rejected = batch_losses(model, logprobs.pair_batch(pairs), loss, WEIGHTS[loss])
    terms.total.mean().backward()
    return torch.stack([chosen, rejected]).detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "shape",
    [
        [(9, 5, 7), (9, 5, 3), (4, 12, 7), (1, 6, 2), (30, 1, 4)],
        [(20, 5, 7), (33, 5, 3), (33, 12, 7), (24, 6, 2)],  # prompts that begin with the same 19 tokens
    ],
)
@pytest.mark.parametrize("loss", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_padded_rows(kind, loss, shape, networks, monkeypatch):
    """Unequal lengths, a response in several pairs, two prompts, a prompt of one token, and a pair without a loser."""
    pairs = make_pairs(shape if loss is not nll else [*shape, (9, 8, 0)])
    wanted = gradients(networks[kind], pairs, loss, padded_logps, monkeypatch)
    for score in (logprobs.response_logps, tree_logps):
        found = gradients(networks[kind], pairs, loss, score, monkeypatch)
        assert torch.allclose(found[0], wanted[0], rtol=1e-5, atol=1e-4)
        assert len(found[1]) == len(wanted[1]) > 10
        for shared, padded in zip(found[1], wanted[1], strict=True):
            assert (shared - padded).norm() <= 1e-5 * padded.norm() + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_one_response_to_each_prompt_is_one_row_behind_what_all_begin_with(kind, networks, monkeypatch):
    pairs = make_pairs([(20, 5, 0), (33, 6, 0), (24, 3, 0)])
    wanted = gradients(networks[kind], pairs, nll, padded_logps, monkeypatch)
    found = gradients(networks[kind], pairs, nll, logprobs.response_logps, monkeypatch)
    assert torch.allclose(found[0], wanted[0], rtol=1e-5, atol=1e-4)
    for shared, padded in zip(found[1], wanted[1], strict=True):
        assert (shared - padded).norm() <= 1e-5 * padded.norm() + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_any_lengths_score_as_each_response_alone(networks, lengths):
    pairs, model = make_pairs(lengths), networks["llama"]
    rows = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    with torch.no_grad():
        together = logprobs.response_logps(model, logprobs.collate(rows))
        alone = torch.cat([padded_logps(model, logprobs.collate([row])) for row in rows])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-4)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(0, 20))
def test_groups_of_rows_of_like_length_leave_the_least_to_run(lengths, overhead):
    def cost(groups):
        return sum(overhead + len(group) * max(group) for group in groups)

    order, sizes = logprobs.groups_of_like_length(lengths, overhead)
    assert sorted(order) == list(range(len(lengths)))
    ordered = [lengths[row] for row in order]
    found = [ordered[sum(sizes[:i]) :][:size] for i, size in enumerate(sizes)]
    assert list(chain.from_iterable(found)) == sorted(lengths)
    every = ([0, *cuts, len(ordered)] for n in range(len(ordered)) for cuts in combinations(range(1, len(ordered)), n))
    assert cost(found) == min(cost([ordered[a:b] for a, b in pairwise(ends)]) for ends in every)


def test_what_prompts_begin_with_is_run_once(networks):
    """By the tokens that are run: the prefix, the prompts' rests, and prompt's last token and response of each row."""
    seen, model = [], networks["llama"]
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(tuple(ids[0].shape)))
    logprobs.response_logps(model, logprobs.pair_batch(make_pairs([(20, 5, 7), (33, 5, 3), (33, 12, 7)])))
    hook.remove()
    assert seen == [(1, 18), (2, 32 - 18), (6, 12)]


def test_a_response_in_several_pairs_is_one_row():
    batch = logprobs.pair_batch(make_pairs([(9, 5, 7), (9, 5, 3), (9, 6, 7)]))
    assert len(batch["prompts"]) == 1 and len(batch["responses"]) == 4
    assert batch["chosen"].tolist() == [0, 0, 1] and batch["rejected"].tolist() == [2, 3, 2]


@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=40), st.integers(1, 5), st.integers(0, 9))
def test_pairs_of_a_problem_come_together_and_every_pass_has_every_pair_once(problems, together, seed):
    count = len(problems)
    config = TrainConfig(batch=count, micro_batch=1, max_steps=2, max_epochs=9, pairs_together=together)
    order = training_order(problems, config, seed)
    assert sorted(order[:count]) == sorted(order[count:]) == list(range(count))
    runs = [len(list(group)) for _, group in groupby(problems[i] for i in order[:count])]
    if together > 1 and len(set(problems)) > 1:
        assert len(runs) <= sum(-(-problems.count(p) // together) for p in set(problems))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunked_head_changes_nothing(kind, networks, monkeypatch):
    pairs = make_pairs([(9, 5, 7), (4, 12, 7)])
    whole = gradients(networks[kind], pairs, dpo_nll, logprobs.response_logps, monkeypatch)
    monkeypatch.setattr(logprobs, "CHUNK", 3 * 40)  # three tokens at a time
    parts = gradients(networks[kind], pairs, dpo_nll, logprobs.response_logps, monkeypatch)
    assert torch.allclose(whole[0], parts[0], rtol=1e-6, atol=1e-5)
    for one, other in zip(whole[1], parts[1], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9


def test_a_model_with_a_head_of_its_own_kind_is_refused(networks, monkeypatch):
    logprobs.check_head(networks["gemma2"])
    monkeypatch.setattr(networks["gemma2"].config, "final_logit_softcapping", 0.01)
    logprobs.check_head(networks["gemma2"])  # the cap is known
    monkeypatch.setattr(logprobs, "soft_cap", lambda model: None)
    with pytest.raises(ValueError, match="a gemma2 computes its logits in a way that is not known here"):
        logprobs.check_head(networks["gemma2"])


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_model_s_own_logits(kind, networks):
    model, prompt, response = networks[kind].eval(), [5, 6, 7, 8], [9, 10, 2]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(response).unsqueeze(-1)).sum()
        got = logprobs.response_logps(model, logprobs.collate([(prompt, response)]))
    model.train()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_every_pair_has_the_log_probabilities_of_both_its_responses(networks):
    model, pairs = networks["llama"], make_pairs([(9, 5, 7), (9, 5, 3), (4, 12, 7)])
    pairs.append(replace(pairs[0], rejected="", rejected_ids=()))

    def alone(pair, response):
        with torch.no_grad():
            return logprobs.response_logps(model, logprobs.collate([(pair.prompt_ids, response)])).item()

    for rows in (1, 2, 64):
        found = logprobs.reference_logps(model, pairs, rows)
        wanted = [[alone(p, p.chosen_ids), alone(p, p.rejected_ids) if p.rejected_ids else 0.0] for p in pairs]
        assert np.allclose(found, wanted, rtol=1e-5)
    model.train()


def test_reference_is_scored_once_for_the_same_pairs_and_model(networks, tmp_path):
    pairs, runs = make_pairs([(9, 5, 7), (9, 5, 3), (4, 12, 7)]), []
    handle = networks["llama"].base_model.register_forward_hook(lambda *_: runs.append(1))
    try:

        def kept(pairs, named):
            return kept_reference_logps(networks["llama"], pairs, 8, (tmp_path / "r.json", named))

        first, once = kept(pairs, {"policy": "a"}), len(runs)
        assert kept(pairs, {"policy": "a"}) == first and len(runs) == once
        assert np.allclose(kept(pairs[:2], {"policy": "a"}), first[:2], rtol=1e-5) and len(runs) > once  # other pairs
        (tmp_path / "r.json").write_text('{"key": ')  # damaged
        assert np.allclose(kept(pairs[:2], {"policy": "a"}), first[:2], rtol=1e-5)
        again = len(runs)
        kept(pairs[:2], {"policy": "b"})
        assert len(runs) > again  # another model
    finally:
        handle.remove()


def test_activation_checkpointing_shares_prompts_too(networks, monkeypatch):
    """Ten responses to one prompt are one row with a tree mask."""
    model, widths = networks["gemma2"], []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        pairs = make_pairs([(30, c, c + 1) for c in range(2, 12, 2)])
        found = gradients(model, pairs, dpo_nll, logprobs.response_logps, monkeypatch)
        assert widths[-1][0] == 1 and widths[-1][1] > 30 + 2 * 11
    finally:
        handle.remove()
        model.gradient_checkpointing_disable()
    wanted = gradients(model, pairs, dpo_nll, padded_logps, monkeypatch)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9


def test_a_model_without_tree_masks_says_so():
    """Bloom's attention biases come from a two-dimensional mask."""
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2)).train()
    with pytest.warns(UserWarning, match="every response runs its prompt again, since a bloom"):
        assert not logprobs.takes_trees(bloom)
    assert all(
        logprobs.takes_trees(AutoModelForCausalLM.from_config(kind(vocab_size=40, **SHAPE))) for kind in KINDS.values()
    )
