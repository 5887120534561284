"""A calculator that writes into responses: what it writes, what a draw keeps of it, and that nothing trains on it."""

from dataclasses import replace

import pytest
import torch

from irpo_utils.answers.arithmetic import result_behind
from irpo_utils.files import ConfigError
from irpo_utils.methods.sampler import Sampler, calculator_of
from irpo_utils.methods.select import pair_of
from irpo_utils.model import packaged
from irpo_utils.model.load import load_tokenizer
from irpo_utils.model.logprobs import collate, pair_batch, reference_logps, response_logps
from irpo_utils.model.losses import nll
from irpo_utils.model.records import Prompt
from irpo_utils.model.training import batch_losses
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import EvaluateStage, SampleStage, TrainStage
from irpo_utils.settings import ModelConfig


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Half: 12 / 2 =", " 6"),
        ("She has <<48/2=", "24"),
        ("Half: 12 / 2 = ", "6"),
        ("1 + 1 = 2\n(3 + 4) * 2 =", " 14"),
        ("7 / 2 =", " 3.5"),
        ("5 + 3 =8, so", ""),
        ("5 =", ""),  # nothing to compute
        ("x + 3 =", ""),
        ("a2 + 3=", ""),
        ("At 10:30 + 15 =", ""),
        ("Ratio 2:3 * 4 =", ""),
        ("4 / 0 =", ""),
        ("9" * 150 + " * " + "9" * 150 + " =", ""),
        ("", ""),
        ("He has 5 apples. 5 + 3 =", " 8"),
        ("-3 + 5 =", " 2"),
        ("0 * -3 =", " 0"),
        ("6 = 2 * 3 =", " 6"),
        # Parts of something longer, of which it would write the result.
        *[
            (text, "")
            for text in (
                "$5 * 4 + $3 * 2 =",
                "$20 - $5 - 3 =",
                "£5 + £3 + 2=",
                "20 dollars - 5 - 3 =",
                "- 16 - 3 - 4 =",
                "10 x 5 + 3 =",
                "10 × 3 + 2 =",
                "2 times 5 + 3 =",
                "twice 5 + 3 =",
                "20% of 50 + 10 =",
                "2 ^ 3 + 1 =",
                "1, 200 / 3 =",
                "1. 5 + 3 =",
            )
        ],
    ],
)
def test_the_result_is_written_behind_an_expression_and_nothing_else(text, written):
    assert result_behind(text) == written


@pytest.fixture(scope="module")
def asked(config):
    return config.but(sampling=config.sampling.but(calculator=True))


def drawn(model, tokenizer, task, config, **options):
    sampler = Sampler.of(model, tokenizer, task, config)
    settings = {"n": 6, "temperature": 1.5, "seed": 3, "label": ""} | options
    samples = [s for batch in sampler.samples(task.problems("train")[:12], **settings) for s in batch]
    return {(s.problem, s.sample): s for s in samples}, sampler


def test_every_equation_s_result_is_right_and_the_rest_is_drawn_as_ever(seed_model, tokenizer, task, config, asked):
    plain, _ = drawn(seed_model, tokenizer, task, config)
    found, _ = drawn(seed_model, tokenizer, task, asked)
    assert any(s.inserted for s in found.values()) and not any(s.inserted for s in plain.values())
    slips = {True: 0, False: 0}
    for name, s in found.items():
        written = "".join(tokenizer.decode([s.token_ids[i]]) for i in s.inserted)
        assert len(written.split()) == len(s.inserted)  # a number is one token here
        both = zip(s.token_ids, plain[name].token_ids, strict=False)
        first = next((i for i, (a, b) in enumerate(both) if a != b), None)
        assert first is None or not s.inserted or first >= s.inserted[0]  # alike up to what is written
        for response, own in ((plain[name].response, False), (s.response, True)):
            for at in (i + 1 for i, letter in enumerate(response) if letter == "="):
                slips[own] += not response[at:].startswith(result_behind(response[:at]))
    assert slips[False] > 0 == slips[True]


def test_a_result_of_several_tokens_is_written_as_a_model_s_own_tokenizer_writes_it():
    if not packaged.available("smollm2"):
        pytest.skip(packaged.install("smollm2"))
    tokenizer = load_tokenizer(ModelConfig(path="smollm2"))
    for text, result in (("12 / 2 =", " 6"), ("12 * 12 = ", "144"), ("7 / 2 =", " 3.5"), ("2 - 31 =", " -29")):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        written = calculator_of(tokenizer)(ids)
        assert tokenizer.decode(ids + written) == text + result and len(written) >= len(result.strip())


def test_responses_do_not_depend_on_the_rows_that_are_run_at_once(seed_model, tokenizer, task, asked):
    few = asked.but(sampling=asked.sampling.but(max_rows=8))
    both = (drawn(seed_model, tokenizer, task, own)[0].values() for own in (asked, few))
    assert all((a.token_ids, a.inserted) == (b.token_ids, b.inserted) for a, b in zip(*both, strict=True))


def test_what_is_written_is_neither_scored_nor_trained_on(seed_model, tokenizer, task, asked):
    found, sampler = drawn(seed_model, tokenizer, task, asked)
    prompts = sampler.prompts(task.problems("train")[:12])
    some = [s for s in found.values() if s.inserted][:6]
    for s in some:
        batch = collate([(prompts[s.problem].prompt_ids, s.token_ids)], [s.inserted])
        assert response_logps(seed_model, batch).item() == pytest.approx(s.logp, abs=1e-3)
        whole = collate([(prompts[s.problem].prompt_ids, s.token_ids)])
        assert response_logps(seed_model, whole).item() < s.logp
    pairs = [pair_of(prompts[s.problem], s, None) for s in some]
    assert [reference[0] for reference in reference_logps(seed_model, pairs)] == pytest.approx(
        [s.logp for s in some], abs=1e-3
    )
    batch = pair_batch(pairs)
    assert batch["lengths"].tolist() == [len(s.token_ids) - len(s.inserted) for s in some]
    with torch.no_grad():
        losses = batch_losses(seed_model, batch, nll, {})[0]
    by_hand = [-s.logp / (len(s.token_ids) - len(s.inserted)) for s in some]
    assert losses.nll.tolist() == pytest.approx(by_hand, abs=1e-4)

    # The same tokens where somebody wrote them all: another response, though in the same batch.
    alike = [pairs[0], replace(pairs[0], chosen_inserted=())]
    (drawn_by_model, _), (written_by_hand, _) = reference_logps(seed_model, alike)
    assert written_by_hand < drawn_by_model
    with torch.no_grad():
        both, one, other = (
            batch_losses(seed_model, pair_batch(p), nll, {})[0].nll for p in (alike, alike[:1], alike[1:])
        )
    assert both.tolist() == pytest.approx([one.item(), other.item()], abs=1e-4)


def test_a_response_that_is_cut_keeps_the_numbers_that_it_has(seed_model, tokenizer, task, asked):
    found, _ = drawn(seed_model, tokenizer, task, asked)
    s = next(s for s in found.values() if len(s.inserted) > 1)
    short = replace(s, token_ids=s.token_ids[: s.inserted[1]])
    pair = pair_of(Prompt(s.problem, "", (1, 2)), s, short)
    assert pair.chosen_inserted == s.inserted and pair.rejected_inserted == s.inserted[:1]


def test_a_training_engine_that_would_train_on_it_is_refused_before_anything_is_drawn():
    with pytest.raises(ConfigError, match="sampling.calculator: trl would train on what it writes"):
        load_preset("micro", ["sampling.calculator=true", "train.engine=trl"])


def test_it_is_in_the_keys_of_stages_that_draw_and_another_engine_refuses_it(tmp_path):
    on, off = (load_preset("micro", [f"sampling.calculator={flag}"]) for flag in ("true", "false"))
    for kind in (SampleStage, TrainStage, EvaluateStage):
        assert kind(tmp_path, config=on).parameters() != kind(tmp_path, config=off).parameters()
    with pytest.raises(ConfigError, match="sampling.calculator: .*engine=transformers"):
        load_preset("micro", ["sampling.calculator=true", "sampling.engine=vllm"])
