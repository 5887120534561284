"""The losses as pure functions of sequence log-probabilities.

They are `dpo_nll` (IRPO), `dpo`, `nll`, `orpo`, seven of their kin, policy gradients and `latro`. Each takes `Scores`
and its own parameters, and gives `PairLosses`. A loss of your own has the same form.

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

The kin differ from DPO by little: no reference (`cpo`), no reference and lengths (`simpo`), lengths alone (`dpo_norm`),
a bar below the winner (`dpo_positive`), another way to push the loser down (`exmate`, `dpo_exmate`), or IRPO's loss
with a weight for each pair (`weighted_dpo_nll`). The policy gradients look at single responses and their advantages,
`latro` at thoughts and the gold answers behind them.
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
    reward_gaps: Tensor | None = None  # differences of the rewards; None counts as 1


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
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_lengths, *_ = scores
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


def weighted_dpo_nll(scores: Scores, beta: float, alpha: float) -> PairLosses:
    """ScPO (arXiv 2411.04109): IRPO's loss, each pair weighted by the difference of votes. Raises as `dpo_nll`."""
    terms = dpo_nll(scores, beta, alpha)
    return terms if scores.reward_gaps is None else terms._replace(total=scores.reward_gaps * terms.total)


def nll(scores: Scores) -> PairLosses:
    """SFT, STaR: the second term of Eq. 1 alone. It imitates the chosen responses."""
    term = nll_term(scores.chosen, scores.chosen_lengths)
    return PairLosses(term, None, term, None, None)


def orpo(scores: Scores, odds_weight: float) -> PairLosses:
    """ORPO (Eq. 6 of its paper). `odds_weight` is lambda, the weight of the odds ratio term.

    Raises:
        ValueError: a rejected response, or its length, is missing.
    """
    odds, *rewards = orpo_term(scores.chosen, scores.rejected, *both_lengths(scores))
    term = nll_term(scores.chosen, scores.chosen_lengths)
    return PairLosses(term + odds_weight * odds, None, term, *rewards, odds)


def both_lengths(scores: Scores) -> tuple[Tensor, Tensor]:
    """The lengths of the chosen and the rejected responses. Raises ValueError where a rejected response is missing."""
    if scores.rejected_lengths is None or not scores.rejected_lengths.all():
        raise ValueError("this loss needs a rejected response, and its length, for every chosen one")
    return scores.chosen_lengths, scores.rejected_lengths


def cpo(scores: Scores, beta: float, alpha: float) -> PairLosses:
    """CPO (arXiv 2401.08417): DPO against a uniform reference, and an NLL. `alpha` is the weight of the latter.

        L = -log sigma( beta * log M_th(w|x) - beta * log M_th(l|x) ) - alpha * log M_th(w|x) / |w|

    The NLL is per token, as in TRL's CPOTrainer.
    """
    chosen, rejected = beta * scores.chosen, beta * scores.rejected
    term = nll_term(scores.chosen, scores.chosen_lengths)
    return PairLosses(-F.logsigmoid(chosen - rejected) + alpha * term, None, term, chosen, rejected)


def simpo(scores: Scores, beta: float, gamma: float) -> PairLosses:
    """SimPO (arXiv 2405.14734): log-probabilities per token, no reference, and a target margin `gamma`.

        L = -log sigma( beta / |w| * log M_th(w|x) - beta / |l| * log M_th(l|x) - gamma )

    Raises:
        ValueError: a rejected response, or its length, is missing.
    """
    chosen, rejected = (beta * p / n for p, n in zip(scores[:2], both_lengths(scores), strict=True))
    term = nll_term(scores.chosen, scores.chosen_lengths)
    return PairLosses(-F.logsigmoid(chosen - rejected - gamma), None, term, chosen, rejected)


def dpo_norm(scores: Scores, beta: float) -> PairLosses:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): log-ratios are means over tokens. Raises as `dpo`, `simpo`."""
    chosen, rejected = both_lengths(scores)
    over = scores._replace(
        chosen=scores.chosen / chosen,
        rejected=scores.rejected / rejected,
        reference_chosen=None if scores.reference_chosen is None else scores.reference_chosen / chosen,
        reference_rejected=None if scores.reference_rejected is None else scores.reference_rejected / rejected,
    )
    return dpo(over, beta)._replace(nll=nll_term(scores.chosen, chosen))


def dpo_positive(scores: Scores, beta: float, bar: float) -> PairLosses:
    """DPO-Positive (arXiv 2402.13228): a winner below its reference costs `bar` (lambda) times what it lacks.

        L = -log sigma( beta * ( log-ratio(w) - log-ratio(l) - lambda * max(0, -log-ratio(w)) ) )

    Raises:
        ValueError: the reference's log-probabilities are missing.
    """
    plain = dpo(scores, beta)
    lacking = F.relu(scores.reference_chosen - scores.chosen)
    return plain._replace(total=-F.logsigmoid(plain.chosen_reward - plain.rejected_reward - beta * bar * lacking))


def exmate(scores: Scores, penalty: float) -> PairLosses:
    """ExMATE (arXiv 2212.10515, and its code): imitate the winner, and pay for the loser's probability per token.

        L = -log M_th(w|x) / |w| + penalty * exp( log M_th(l|x) / |l| )

    A loser's pull fades as it gets improbable, so the loss is bounded below. Raises as `simpo`.
    """
    chosen, rejected = both_lengths(scores)
    term = nll_term(scores.chosen, chosen)
    return PairLosses(term + penalty * torch.exp(scores.rejected / rejected), None, term, None, None)


def dpo_exmate(scores: Scores, beta: float, alpha: float, penalty: float) -> PairLosses:
    """DPO and `alpha` times ExMATE in place of the NLL (arXiv 2408.16751). Raises as `dpo` and `simpo`."""
    plain, other = dpo(scores, beta), exmate(scores, penalty)
    return plain._replace(total=plain.dpo + alpha * other.total)


def policy_gradient(scores: Scores) -> PairLosses:
    """RLOO, Dr. GRPO (arXiv 2402.14740, 2503.20783): a response's log-probability times its advantage, its reward gap.

        L = -A(y) * log M_th(y|x)

    It is the policy gradient where one optimizer step follows a draw at temperature 1: the ratio to the model that drew
    is 1 there, and GRPO's clipping never acts. Another temperature and further steps go without a correction.
    """
    advantages = 1.0 if scores.reward_gaps is None else scores.reward_gaps
    return PairLosses(-advantages * scores.chosen, None, nll_term(scores.chosen, scores.chosen_lengths), None, None)


def policy_gradient_mean(scores: Scores) -> PairLosses:
    """GRPO (arXiv 2402.03300), without its KL term: `policy_gradient` over each response's length."""
    terms = policy_gradient(scores)
    return terms._replace(total=terms.total / scores.chosen_lengths)


def latro(scores: Scores) -> PairLosses:
    """LaTRO (arXiv 2411.04282): a policy gradient for the thought z, and the NLL of the gold answer y after it.

        L = -A * log M_th(z|x) - log M_th(y|x, z)

    The chosen response is thought and answer, the rejected the thought alone, `reward_gaps` are the advantages A. There
    is no ratio to the model that drew the thought, and nothing bounds the first term: short rounds, small steps.
    """
    answer = scores.chosen - scores.rejected
    advantage = 1.0 if scores.reward_gaps is None else scores.reward_gaps
    return PairLosses(-advantage * scores.rejected - answer, None, -answer, None, None)
