"""Attention as products of 16-bit matrices on a CPU: what it gives, its gradient, and which models have it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from irpo_utils.model import attention, load
from irpo_utils.settings import ModelConfig

TEXTS = ["Ann has 3 apples and gets 4 more.", "3 + 4 = 7", "Final answer: 7"] * 4


def off(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 9),
    before=st.integers(0, 9),
    scores=st.sampled_from([1, 200, 1 << 18]),
    seed=st.integers(0, 99),
)
def test_result_and_gradients_are_those_of_an_exact_computation(rows, heads, group, length, before, scores, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = before + length

    def drawn(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(rows, heads, tokens, 16, generator=generator).bfloat16()

    q, k, v = drawn(heads * group, length), drawn(heads, keys), drawn(heads, keys)
    seen = torch.ones(length, keys, dtype=torch.bool).tril(before).expand(rows, 1, -1, -1).clone()
    seen[..., :-1] &= torch.rand(rows, 1, 1, keys - 1, generator=generator) < 0.8  # some keys are padding
    seen |= torch.eye(length, keys, dtype=torch.bool).roll(before, -1)  # each token sees itself
    bias = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, torch.finfo(torch.bfloat16).min)
    grad = torch.randn(q.shape, generator=generator).bfloat16()

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = functional.scaled_dot_product_attention(*exact, attn_mask=seen, enable_gqa=True)
    wanted.backward(grad.double())
    own = [x.requires_grad_() for x in (q, k, v)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", scores)  # one row at a time, a few, or all
        got, _ = attention.attend(torch.nn.Module(), *own, bias)
        got.transpose(1, 2).backward(grad)
    assert off(got.transpose(1, 2), wanted.detach()) < 2e-2
    size = max(x.grad.norm().item() for x in exact)  # a gradient may be 0: of a query that sees one key, say
    for x, y in zip(own, exact, strict=True):
        assert (x.grad.double() - y.grad).norm() < 2e-2 * size


@pytest.fixture(autouse=True)
def a_cpu_that_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(load, "cpu_multiplies_bfloat16", lambda: True)


@pytest.mark.parametrize("family, dtype, kind", [
    ("llama", "bfloat16", "products"), ("qwen2", "bfloat16", "products"), ("llama", "float32", "sdpa"),
])  # fmt: skip
def test_a_16_bit_model_on_a_cpu_has_it_and_computes_the_same(tmp_path, family, dtype, kind):
    folder = build(family, tmp_path / family, TEXTS)
    model = load.load_base(ModelConfig(path=str(folder), dtype=dtype))
    assert model.config._attn_implementation == kind
    ids, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    got = model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
    whole = load.load_base(ModelConfig(path=str(folder), dtype="float32"))
    wanted = whole(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert off(got, wanted.double()) < 3e-2


def test_a_cpu_without_such_products_and_a_model_to_be_divided_keep_the_fused_kernel(tmp_path, monkeypatch):
    config = ModelConfig(path=str(build("llama", tmp_path / "llama", TEXTS)), dtype="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(load, "cpu_multiplies_bfloat16", lambda: False)
        assert load.load_base(config).config._attn_implementation == "sdpa"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert load.load_base(config).config._attn_implementation == "sdpa"


def asks_more(module, query, key, value, attention_mask, *, cap, **options):
    return attention.attend(module, query, key, value, attention_mask)


def sees_all(module, query, key, value, attention_mask, **options):
    return attention.attend(module, query, key, value, torch.zeros_like(attention_mask))


@pytest.mark.parametrize("attend, reason", [(asks_more, "asks more"), (sees_all, "computes other states")])
def test_a_model_for_which_it_does_not_fit_keeps_its_own(tmp_path, monkeypatch, attend, reason):
    config = ModelConfig(path=str(build("llama", tmp_path / "llama", TEXTS)), dtype="bfloat16")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "products", attend)
    with pytest.warns(UserWarning, match=f"attention stays PyTorch's, since a llama {reason}"):
        model = load.load_base(config)
    assert model.config._attn_implementation == "sdpa"
