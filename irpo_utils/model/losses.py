"""The losses as pure functions of sequence log-probabilities: `dpo_nll` (IRPO), `dpo`, `nll` and `orpo`.

Each takes `Scores` and its own parameters, and gives `PairLosses`. A loss of your own has the same form.

Iterative Reasoning Preference Optimization, arXiv 2404.19733 v3, Eq. 1, for a chosen (w) and a rejected (l) response:

    L =       -log sigma( beta * [log M_th(w|x) - log M_t(w|x)] - beta * [log M_th(l|x) - log M_t(l|x)] )
        + alpha * ( -log M_th(w|x) / |w| )

The DPO term (arXiv 2305.18290, Eq. 7) takes *sums* over response tokens. Only the NLL term is divided by the response
length, sequence by sequence, and only then averaged over pairs. TRL's `loss_type=["sigmoid", "sft"]` averages the NLL
over all chosen tokens of a micro-batch instead, so that long solutions weigh more; the two agree for a batch of one.

ORPO, arXiv 2403.07691, Eq. 6 and 7 (here as in Self-Iterative Process Feedback, arXiv 2412.08393), needs no reference:

    L = -log M_th(w|x) / |w|  -  lambda * log sigma( log odds(w|x) - log odds(l|x) ),   odds = P / (1 - P),

where P is the geometric mean of the token probabilities of a response, exp(log M_th(y|x) / |y|). TRL's ORPOTrainer
takes the NLL over the prompt's tokens as well as the chosen response's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores(NamedTuple):
    """What a loss sees of the pairs, each of shape [pairs].

    Log-probabilities are sums over response tokens, in nats. Lengths are numbers of response tokens, EOS included.
    """

    chosen: Tensor  # log-probabilities under the policy
    rejected: Tensor  # zeros where nothing is rejected
    reference_chosen: Tensor | None  # under the reference; None for a loss without one
    reference_rejected: Tensor | None
    chosen_lengths: Tensor
    rejected_lengths: Tensor | None = None  # None for a loss that does not look at them


class PairLosses(NamedTuple):
    """Per-pair terms, each of shape [pairs]. `total` is what is averaged and minimised.

    The rewards are what the preference term compares: DPO's implicit rewards, ORPO's log odds. What a loss does not
    have is None: `dpo` without a reference, `odds` except in ORPO, rewards where no term compares.
    """

    total: Tensor
    dpo: Tensor | None
    nll: Tensor
    chosen_reward: Tensor | None
    rejected_reward: Tensor | None
    odds: Tensor | None = None


def dpo_term(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO term and the implicit rewards of both responses (arXiv 2305.18290, Eq. 7 and sec. 4).

    Args are sequence log-probabilities, sums over response tokens in nats, each [pairs].
    Returns (loss, chosen reward, rejected reward), each [pairs]. At theta = reference the loss is ln 2, the rewards 0.
    """
    chosen_reward = beta * (policy_chosen - reference_chosen)
    rejected_reward = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward), chosen_reward, rejected_reward


def nll_term(policy_chosen: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Length-normalised negative log-likelihood of chosen responses, nats per token, [pairs] (Eq. 1, second term)."""
    return -policy_chosen / chosen_lengths


def log_odds(logps: Tensor, lengths: Tensor) -> Tensor:
    """log(P / (1 - P)) of responses, [responses], where P = exp(logps / lengths) (arXiv 2403.07691, Eq. 3 and 4)."""
    mean = logps / lengths
    # A response of probability 1 has infinite odds, and so would its gradient be: P ends one rounding step below 1.
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    # log(1 - P) for P near 1 is what expm1 is for; for P near 0 its rounding is far below that of `mean` itself.
    return mean - torch.log(-torch.expm1(mean))


def orpo_term(
    policy_chosen: Tensor, policy_rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The odds ratio term of ORPO and the log odds of both responses (arXiv 2403.07691, Eq. 7).

    Args are sequence log-probabilities (sums over response tokens, nats) and numbers of response tokens, each [pairs].
    Returns (loss, log odds of the chosen, log odds of the rejected), each [pairs]. For equal odds the loss is ln 2.
    """
    chosen, rejected = log_odds(policy_chosen, chosen_lengths), log_odds(policy_rejected, rejected_lengths)
    return -F.logsigmoid(chosen - rejected), chosen, rejected


def dpo(scores: Scores, beta: float) -> PairLosses:
    """DPO: the first term of Eq. 1 alone. `beta` is the strength of the KL constraint.

    Raises:
        ValueError: the reference's log-probabilities are missing.
    """
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_lengths, _ = scores
    if reference_chosen is None or reference_rejected is None:
        raise ValueError("the DPO term needs the reference's log-probabilities")
    term, *rewards = dpo_term(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    return PairLosses(term, term, nll_term(policy_chosen, chosen_lengths), *rewards)


def dpo_nll(scores: Scores, beta: float, alpha: float) -> PairLosses:
    """IRPO: both terms of Eq. 1. `alpha` is the weight of the NLL term.

    Raises:
        ValueError: the reference's log-probabilities are missing.
    """
    terms = dpo(scores, beta)
    return terms._replace(total=terms.dpo + alpha * terms.nll)


def nll(scores: Scores) -> PairLosses:
    """SFT, STaR: the second term of Eq. 1 alone. It imitates the chosen responses."""
    term = nll_term(scores.chosen, scores.chosen_lengths)
    return PairLosses(term, None, term, None, None)


def orpo(scores: Scores, odds_weight: float) -> PairLosses:
    """ORPO (Eq. 6 of its paper). `odds_weight` is lambda, the weight of the odds ratio term.

    Raises:
        ValueError: a rejected response, or its length, is missing.
    """
    policy_chosen, policy_rejected, _, _, chosen_lengths, rejected_lengths = scores
    if rejected_lengths is None or not rejected_lengths.all():
        raise ValueError("the odds ratio of ORPO needs a rejected response, and its length, for every chosen one")
    odds, *rewards = orpo_term(policy_chosen, policy_rejected, chosen_lengths, rejected_lengths)
    term = nll_term(policy_chosen, chosen_lengths)
    return PairLosses(term + odds_weight * odds, None, term, *rewards, odds)
