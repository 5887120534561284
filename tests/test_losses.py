"""The loss is the paper's equation; TRL's form differs where sequences differ in length, and only there."""

import inspect
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from irpo_utils.methods.parts import LOSSES, part
from irpo_utils.model.logprobs import collate, pair_batch, response_logps, token_logps
from irpo_utils.model.losses import (
    Scores,
    cpo,
    dpo,
    dpo_nll,
    dpo_norm,
    dpo_positive,
    exmate,
    latro,
    nll,
    orpo,
    orpo_term,
    simpo,
    weighted_dpo_nll,
)
from irpo_utils.model.packaged import SEED_MODEL
from irpo_utils.model.records import Pair
from irpo_utils.model.training import PreferenceTrainer, batch_losses
from irpo_utils.settings import TrainConfig

logp = st.floats(-200, -0.01)


@given(
    st.lists(st.tuples(logp, logp, logp, logp, st.integers(1, 300)), min_size=1, max_size=8),
    st.floats(0.01, 2),
    st.floats(0, 3),
)
def test_loss_is_equation_1_of_the_paper(rows, beta, alpha):
    """arXiv 2404.19733 v3, Eq. 1, written out in plain floats."""
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    total = dpo_nll(Scores(*columns), beta, alpha).total
    for value, (pc, pr, rc, rr, length) in zip(total.tolist(), rows, strict=True):
        z = beta * (pc - rc) - beta * (pr - rr)
        softplus = max(-z, 0.0) + math.log1p(math.exp(-abs(z)))  # -log sigma(z) without overflow
        assert value == pytest.approx(softplus + alpha * -pc / length, rel=1e-10, abs=1e-10)


def test_alpha_zero_is_dpo_and_the_parts_add_up():
    logps = [torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) - 9 for i in range(4)]
    scores = Scores(*logps, torch.arange(1, 6))
    both = dpo_nll(scores, 0.1, 0.7)
    assert torch.equal(dpo_nll(scores, 0.1, 0.0).total, dpo(scores, 0.1).total)
    assert torch.allclose(both.total, both.dpo + 0.7 * nll(scores).total)


def test_imitation_is_the_mean_of_token_log_probabilities_and_looks_at_nothing_else():
    scores = Scores(torch.tensor([-3.0, -40.0]), torch.zeros(2), None, None, torch.tensor([3, 20]), torch.zeros(2))
    terms = nll(scores)
    assert terms.total.tolist() == terms.nll.tolist() == [1.0, 2.0]
    assert terms.dpo is terms.odds is terms.chosen_reward is terms.rejected_reward is None


def test_at_the_reference_the_dpo_term_is_ln2_and_rewards_are_zero():
    logps = torch.tensor([-3.0, -70.0])
    scores = Scores(logps, logps - 5, logps, logps - 5, torch.tensor([3, 40]))
    for terms in (dpo_nll(scores, 0.5, 1.0), dpo(scores, 0.5)):
        assert torch.allclose(terms.dpo, torch.full((2,), math.log(2)))
        assert not terms.chosen_reward.any() and not terms.rejected_reward.any()


@given(
    st.lists(st.tuples(*[logp] * 4, *[st.integers(1, 300)] * 2), min_size=1, max_size=6),
    *[st.floats(0.01, 3)] * 2,
    *[st.floats(0, 60)] * 2,
)
def test_the_kin_of_dpo_are_their_formulas(rows, beta, alpha, margin, weight):
    """Each as its paper writes it, in plain floats."""
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    scores = Scores(*columns)

    def minus_log_sigmoid(z):
        return max(-z, 0.0) + math.log1p(math.exp(-abs(z)))

    def by_hand(win, lose, rw, rl, n, m):
        ratio_w, ratio_l = win - rw, lose - rl
        imitate, punish = -win / n, math.exp(lose / m)
        return {
            "cpo": minus_log_sigmoid(beta * win - beta * lose) + alpha * imitate,
            "simpo": minus_log_sigmoid(beta / n * win - beta / m * lose - margin),
            "dpo_norm": minus_log_sigmoid(beta * (ratio_w / n - ratio_l / m)),
            "dpo_positive": minus_log_sigmoid(beta * (ratio_w - ratio_l - weight * max(0.0, -ratio_w))),
            "exmate": imitate + weight * punish,
            "dpo+exmate": minus_log_sigmoid(beta * (ratio_w - ratio_l)) + alpha * (imitate + weight * punish),
        }

    wanted = [by_hand(*row) for row in rows]
    given_ = {"beta": beta, "alpha": alpha, "gamma": margin, "bar": weight, "penalty": weight}
    for name in wanted[0]:
        row = LOSSES[name]
        terms = row.load()(scores, **{parameter: given_[parameter] for parameter in row.parameters})
        assert terms.total.tolist() == pytest.approx([own[name] for own in wanted], rel=1e-9, abs=1e-9), name
        assert torch.allclose(terms.nll, nll(scores).total)


def test_a_pair_s_reward_gap_is_its_weight(seed_model, tokenizer):
    pairs = [replace(p, reward_gap=gap) for p, gap in zip(make_pairs(tokenizer), (0.25, 1.0), strict=True)]
    with torch.no_grad():
        plain, weighted = (
            batch_losses(seed_model, pair_batch(pairs), loss, {"beta": 0.1, "alpha": 1.0})[0].total
            for loss in (dpo_nll, weighted_dpo_nll)
        )
    assert torch.allclose(weighted, plain * torch.tensor([0.25, 1.0]))


def test_cpo_and_simpo_are_trl_s():
    """The preference terms of TRL's CPOTrainer; its NLL is a mean over a batch's tokens."""
    from trl.experimental.cpo import CPOTrainer

    scores = Scores(
        *[torch.tensor(x) for x in ([-9.0, -30.0], [-12.0, -25.0])], None, None, *[torch.tensor([3, 20])] * 2
    )
    trainer = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    sums = CPOTrainer.cpo_loss(SimpleNamespace(**trainer, loss_type="sigmoid", beta=0.3), *scores[:2])
    assert torch.allclose(cpo(scores, 0.3, 0.0).total, sums[0])
    means = [logps / scores.chosen_lengths for logps in scores[:2]]  # as it hands them over for SimPO
    with_margin = CPOTrainer.cpo_loss(SimpleNamespace(**trainer, loss_type="simpo", beta=2.0, simpo_gamma=1.2), *means)
    assert torch.allclose(simpo(scores, 2.0, 1.2).total, with_margin[0])


def test_what_each_of_the_kin_of_dpo_changes():
    """No reference, lengths that cancel, a bar that acts below the reference alone, and a loser that is let go."""
    winner, loser, lengths = torch.tensor([-9.0], requires_grad=True), torch.tensor([-12.0]), torch.tensor([3])
    at = Scores(winner, loser, torch.tensor([-9.0]), torch.tensor([-12.0]), lengths, lengths)
    for loss, weights in ((dpo_norm, {"beta": 5.0}), (dpo_positive, {"beta": 0.1, "bar": 50.0})):
        assert loss(at, **weights).dpo.item() == pytest.approx(math.log(2))  # at the reference, as DPO
    below = at._replace(reference_chosen=torch.tensor([-8.0]), reference_rejected=torch.tensor([-11.0]))
    assert dpo(below, 0.1).total == dpo(at, 0.1).total  # both have fallen by one: DPO sees nothing
    assert dpo_positive(below, 0.1, 50.0).total > 3 * dpo_positive(at, 0.1, 50.0).total
    above = at._replace(reference_chosen=torch.tensor([-10.0]))
    assert torch.equal(dpo_positive(above, 0.1, 50.0).total, dpo(above, 0.1).total)
    pulls = []
    for logp in (-1.0, -60.0):  # of a loser that is likely, and of one that is not
        likely = torch.tensor([logp], requires_grad=True)
        exmate(at._replace(rejected=likely), 0.05).total.sum().backward()
        pulls.append(likely.grad.item())
    assert pulls[0] > 1e-3 and 0 <= pulls[1] < 1e-9


def test_what_two_responses_share_cancels_in_dpo_as_if_it_were_part_of_the_prompt(seed_model, tokenizer):
    prompt = "Question: Ann has 12 pens. Ann sells half of them. How many pens does Ann have?\nAnswer:\n"
    prompt = tuple(tokenizer(prompt).input_ids)
    begin, win, lose = ((tokenizer(s, add_special_tokens=False).input_ids) for s in ("12", " / 2", " - 2 = 10"))
    with torch.no_grad():
        totals = [
            batch_losses(
                seed_model, pair_batch([replace(p, reference_chosen=0.0, reference_rejected=-1.0)]), dpo, {"beta": 0.5}
            )[0].total
            for p in (pair(prompt, begin + win, begin + lose), pair((*prompt, *begin), win, lose))
        ]
    assert torch.allclose(*totals, atol=1e-5) and abs(totals[0] - math.log(2)) > 0.1


def test_latro_pulls_a_thought_by_its_advantage_and_its_answer_always():
    """A thought of log-probability -6 or -5, its answer -3 or -1, advantages 2 and -0.5."""
    whole, thought = (torch.tensor(x, requires_grad=True) for x in ([-9.0, -6.0], [-6.0, -5.0]))
    scores = Scores(whole, thought, None, None, torch.ones(2), torch.ones(2), torch.tensor([2.0, -0.5]))
    terms = latro(scores)
    assert terms.total.tolist() == [2 * 6 + 3, -0.5 * 5 + 1] and terms.nll.tolist() == [3, 1] and terms.dpo is None
    terms.total.sum().backward()
    # The gradient of A log p(z) + log p(y|z), where log p(y|z) is the whole minus the thought.
    assert whole.grad.tolist() == [-1, -1] and thought.grad.tolist() == [-2 + 1, 0.5 + 1]
    assert latro(scores._replace(rejected=torch.zeros(2))).total.tolist() == [9, 6]  # no thought: the answer's NLL


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="'rpo'.*dpo\\+nll"):
        part("loss", "rpo")


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "extrapolate"])
def test_the_table_says_what_each_loss_takes_and_whether_it_needs_a_reference(name):
    row = LOSSES[name]
    function, config = row.load(), TrainConfig()
    assert tuple(inspect.signature(function).parameters)[1:] == row.parameters
    weights = {weight: getattr(config, weight) for weight in row.parameters}
    logps, lengths = torch.tensor([-3.0]), torch.tensor([3])
    whole = Scores(logps, logps - 5, logps, logps - 5, lengths, lengths)
    assert torch.isfinite(function(whole, **weights).total).all()
    alone = whole._replace(reference_chosen=None, reference_rejected=None)
    if row.reference:
        with pytest.raises(ValueError, match="needs the reference's log-probabilities"):
            function(alone, **weights)
        with pytest.raises(ValueError, match="needs the reference's log-probabilities"):
            function(whole._replace(reference_chosen=None), **weights)
    else:
        assert torch.equal(function(alone, **weights).total, function(whole, **weights).total)


@example([(-7e-15, -1e-9, 1, 3), (-1e-9, -3e-14, 1, 1)], 1.0)  # where 1 - P cancels
@given(
    st.lists(st.tuples(logp, logp, st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8), st.floats(0, 2)
)
def test_orpo_is_equations_6_and_7_of_its_paper(rows, weight):
    """arXiv 2403.07691, written out with probabilities in 50 digits, where nothing cancels."""
    from decimal import Decimal, localcontext

    pc, pr, lc, lr = (torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True))
    total = orpo(Scores(pc, pr, None, None, lc, lr), weight).total
    for value, row in zip(total.tolist(), rows, strict=True):
        with localcontext(prec=50):
            pc, pr, lc, lr = map(Decimal, row)
            p, q = (pc / lc).exp(), (pr / lr).exp()
            ratio = (p / (1 - p)) / (q / (1 - q))
            wanted = -pc / lc - Decimal(weight) * (ratio / (1 + ratio)).ln()
        assert value == pytest.approx(float(wanted), rel=1e-10, abs=1e-10)


@given(st.sampled_from([torch.float32, torch.float64]), *[st.floats(0, 1e4)] * 2, *[st.integers(-18, 0)] * 2)
def test_orpo_s_gradient_is_finite_for_probabilities_near_0_and_near_1(dtype, chosen, rejected, small, tiny):
    """Mean log-probabilities from 0 (probability 1) over -1e-18 to -10,000."""
    logps = torch.tensor([[-chosen * 10.0**small], [-rejected * 10.0**tiny]], dtype=dtype, requires_grad=True)
    terms = orpo(Scores(*logps, None, None, torch.ones(1), torch.ones(1)), 0.1)
    terms.total.sum().backward()
    assert torch.isfinite(terms.total).all() and torch.isfinite(logps.grad).all()
    # A likelier chosen response is never worse, a likelier rejected one never better.
    assert logps.grad[0] <= 0 <= logps.grad[1]


def test_equal_odds_cost_ln2_and_orpo_has_no_reference():
    logps, lengths = torch.tensor([-3.0, -40.0]), torch.tensor([3, 40])
    assert torch.allclose(orpo_term(logps, 2 * logps, lengths, 2 * lengths)[0], torch.full((2,), math.log(2)))
    scores = Scores(logps, logps, None, None, lengths, lengths)
    terms = orpo(scores, 0.1)
    assert terms.dpo is None and torch.allclose(terms.total, 1 + 0.1 * terms.odds)
    assert torch.equal(orpo(scores, 0.0).total, nll(scores).total)  # without the odds ratio
    for missing in (torch.tensor([3, 0]), None):
        with pytest.raises(ValueError, match="needs a rejected response"):
            orpo(scores._replace(rejected_lengths=missing), 0.1)
    with pytest.raises(ValueError, match="the DPO term needs the reference"):
        dpo(scores, 0.1)


PAIRS = [("half", (5, 6, 7, 2), (5, 9, 2)), ("long", (8, 9, 10, 11, 12, 13, 2), (5, 2))]


def pair(prompt_ids, chosen_ids, rejected_ids, problem=""):
    """A pair of token ids; its texts are empty."""
    ids = map(tuple, (prompt_ids, chosen_ids, rejected_ids))
    return Pair(problem, "", "", "", *ids, chosen_logp=None, rejected_logp=None)


def make_pairs(tokenizer):
    prompt = tokenizer("Question: Ann has 12 pens. How many pens does Ann have?\nAnswer:\n").input_ids
    pairs = [pair(prompt[: 5 + 3 * i], chosen, rejected, name) for i, (name, chosen, rejected) in enumerate(PAIRS)]
    return [replace(p, reference_chosen=-9.0, reference_rejected=-8.0) for p in pairs]


def test_response_logps_score_the_response_and_all_of_it(seed_model, tokenizer):
    """Against one unpadded forward pass per sequence: no prompt, no padding, no shift by one; EOS is scored."""
    rows = [(p.prompt_ids, p.chosen_ids) for p in make_pairs(tokenizer)]
    got = response_logps(seed_model, collate(rows))
    for value, (prompt, response) in zip(got, rows, strict=True):
        logits = seed_model(torch.tensor([prompt + response])).logits[0]
        wanted = sum(logits[len(prompt) + i - 1].log_softmax(-1)[t] for i, t in enumerate(response))
        assert value.item() == pytest.approx(wanted.item(), abs=1e-4)


def test_agrees_with_trl_for_a_batch_of_one_and_differs_for_unequal_lengths(seed_model, tokenizer, tmp_path):
    """TRL's own DPOTrainer with loss_type ["sigmoid", "sft"] on the same token ids and reference."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    # The texts go through TRL's tokenization, so the pairs are made of real words.
    texts = [
        (
            "Question: Ann has 12 pens. Ann sells half of them. How many pens does Ann have?\nAnswer:\n",
            "12 / 2 = 6\nFinal answer: 6",
            "12 - 2 = 10\nFinal answer: 10",
        ),
        (
            "Question: Ben has 3 eggs. Ben gets 4 from Ann. Ben gives Dan 2. How many eggs does Ben have?\nAnswer:\n",
            "3 + 4 = 7\n7 - 2 = 5\nFinal answer: 5",
            "Final answer: 9",
        ),
    ]
    reference = AutoModelForCausalLM.from_pretrained(SEED_MODEL)
    policy = AutoModelForCausalLM.from_pretrained(SEED_MODEL)
    with torch.no_grad():  # a policy that has moved away from its reference
        generator = torch.Generator().manual_seed(0)
        for p in policy.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator)

    def trl_loss(chosen, kinds=("sigmoid", "sft"), beta=0.1):
        data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in chosen])
        args = DPOConfig(
            output_dir=str(tmp_path),
            loss_type=list(kinds),
            loss_weights=[1.0] * len(kinds),
            beta=beta,
            report_to=[],
            per_device_train_batch_size=len(chosen),
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        policy.eval()
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, batch).item(), batch

    def our_loss(chosen, loss=dpo_nll, **weights):
        pairs = []
        for prompt, w, loser in chosen:
            prompt = tokenizer(prompt).input_ids
            ids = [[*tokenizer(r, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for r in (w, loser)]
            with torch.no_grad():
                ref = [response_logps(reference, collate([(prompt, r)])).item() for r in ids]
            pairs.append(replace(pair(prompt, *ids), reference_chosen=ref[0], reference_rejected=ref[1]))
        with torch.no_grad():
            return batch_losses(policy, pair_batch(pairs), loss, weights or {"beta": 0.1, "alpha": 1.0})[0], pairs

    for text in texts:
        assert our_loss([text])[0].total.mean().item() == pytest.approx(trl_loss([text])[0], abs=1e-4)
    ours, pairs = our_loss(texts)
    lengths = torch.tensor([float(len(p.chosen_ids)) for p in pairs])
    assert lengths[0] != lengths[1]
    # TRL averages the NLL over the batch's tokens: the difference is exactly that of the two means.
    difference = (ours.nll * lengths).sum() / lengths.sum() - ours.nll.mean()
    assert abs(difference) > 1e-3
    assert trl_loss(texts)[0] - ours.total.mean().item() == pytest.approx(difference.item(), abs=1e-4)
    # Means over the tokens of each response are the same in both.
    normed = our_loss(texts, dpo_norm, beta=5.0)[0].total.mean().item()
    assert normed == pytest.approx(trl_loss(texts, ["sigmoid_norm"], 5.0)[0], abs=1e-4)


def test_orpo_differs_from_trl_s_by_where_the_nll_is_averaged_and_by_nothing_else(seed_model, tokenizer, tmp_path):
    """TRL takes the NLL over all tokens of prompts and chosen responses of a batch; the paper's is of the responses."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    texts = [
        (
            "Question: Ann has 12 pens. Ann sells half of them. How many pens does Ann have?\nAnswer:\n",
            "12 / 2 = 6\nFinal answer: 6",
            "12 - 2 = 10\nFinal answer: 10",
        ),
        (
            "Question: Ben has 3 eggs. Ben has 4 more now. How many eggs does Ben have?\nAnswer:\n",
            "3 + 4 = 7\n7 - 2 = 5\nFinal answer: 5",
            "Final answer: 9",
        ),
    ]
    args = ORPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        report_to=[],
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in texts])
    policy = AutoModelForCausalLM.from_pretrained(SEED_MODEL)
    trainer = ORPOTrainer(policy, args, train_dataset=data, processing_class=tokenizer)
    pairs = []
    for row in trainer.train_dataset:
        prompt = row["prompt_input_ids"]
        pairs.append(pair(prompt, *(row[f"{side}_input_ids"][len(prompt) :] for side in ("chosen", "rejected"))))
    end = tokenizer.eos_token_id
    for found, (prompt, *answers) in zip(pairs, texts, strict=True):  # the same tokens as ours
        assert found.prompt_ids == tuple(tokenizer(prompt).input_ids)
        for ids, answer in zip((found.chosen_ids, found.rejected_ids), answers, strict=True):
            assert ids == (*tokenizer(answer, add_special_tokens=False).input_ids, end)
    policy.eval()
    with torch.no_grad():
        theirs, metrics = trainer.get_batch_loss_metrics(policy, trainer.data_collator(list(trainer.train_dataset)))
        ours = batch_losses(seed_model, pair_batch(pairs), orpo, {"odds_weight": 0.3})[0]
        whole = [p.prompt_ids + p.chosen_ids for p in pairs]
        logps = [token_logps(seed_model(torch.tensor([r])).logits[0, :-1], torch.tensor(r[1:])) for r in whole]
    assert metrics["log_odds_ratio"] == pytest.approx(-ours.odds.mean().item(), abs=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(-ours.nll.mean().item(), abs=1e-5)
    difference = -torch.cat(logps).mean() - ours.nll.mean()
    assert difference > 0.5  # the prompts are not what the policy was trained to say
    assert theirs.item() - ours.total.mean().item() == pytest.approx(difference.item(), abs=1e-5)


def test_a_nan_loss_stops_training_and_says_at_which_step_and_what_to_do(seed_model, tokenizer):
    broken = SimpleNamespace(
        loss=dpo_nll,
        weights={"beta": float("nan"), "alpha": 1.0},
        terms=[],
        state=SimpleNamespace(global_step=6),
        args=SimpleNamespace(learning_rate=0.5),
    )
    with pytest.raises(FloatingPointError, match=r"nan at step 7; lower train.lr \(it is 0.5\)"):
        PreferenceTrainer.compute_loss(broken, seed_model, pair_batch(make_pairs(tokenizer)))


def test_token_logps_widen_half_precision():
    logits = torch.tensor([[10.0, 0.0, -10.0]], dtype=torch.bfloat16)
    assert token_logps(logits, torch.tensor([0])).dtype == torch.float32
