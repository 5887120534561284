"""The losses as pure functions of sequence log-probabilities. A method picks one of `LOSSES`.

Iterative Reasoning Preference Optimization, arXiv 2404.19733 v3, Eq. 1, for a chosen (w) and a rejected (l) response:

    L =       -log sigma( beta * [log M_th(w|x) - log M_t(w|x)] - beta * [log M_th(l|x) - log M_t(l|x)] )
        + alpha * ( -log M_th(w|x) / |w| )

The DPO term (arXiv 2305.18290, Eq. 7) takes *sums* over response tokens. Only the NLL term is divided by the response
length, sequence by sequence, and only then averaged over pairs. TRL's `loss_type=["sigmoid", "sft"]` averages the NLL
over all chosen tokens of a micro-batch instead, so that long solutions weigh more; the two agree for a batch of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("dpo+nll", "dpo", "nll")


class PairLosses(NamedTuple):
    """Per-pair terms, each of shape [pairs]. `total` is what is averaged and minimised."""

    total: Tensor
    dpo: Tensor
    nll: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of `tokens` [..., length] under `logits` [..., length, vocabulary] that predict them, in float32 or wider."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    picked = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(-1)


def dpo_term(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO term and the implicit rewards of both responses (arXiv 2305.18290, Eq. 7 and sec. 4).

    Args are sequence log-probabilities, sums over response tokens in nats, each [pairs].
    Returns (loss, chosen reward, rejected reward), each [pairs]. At theta = reference the loss is ln 2, the rewards 0.
    """
    chosen_reward = beta * (policy_chosen - reference_chosen)
    rejected_reward = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward), chosen_reward, rejected_reward


def nll_term(policy_chosen: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Length-normalised negative log-likelihood of the chosen responses, nats per token, [pairs] (Eq. 1, second term)."""
    return -policy_chosen / chosen_lengths


def pair_losses(
    loss: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_lengths: Tensor,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> PairLosses:
    """The loss of each pair: "dpo+nll" is IRPO, "dpo" its first term alone, "nll" its second alone (SFT, STaR).

    Args:
        loss: one of `LOSSES`.
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: sequence log-probabilities, [pairs], nats.
        chosen_lengths: number of response tokens of the chosen responses, EOS included, [pairs].
        beta: strength of the KL constraint in the DPO term.
        alpha: weight of the NLL term in "dpo+nll".

    Raises:
        ValueError: `loss` is not one of `LOSSES`.
    """
    if loss not in LOSSES:
        raise ValueError(f"no loss is called {loss!r}; there is: {', '.join(LOSSES)}")
    dpo, chosen_reward, rejected_reward = dpo_term(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta
    )
    nll = nll_term(policy_chosen, chosen_lengths)
    total = {"dpo+nll": dpo + alpha * nll, "dpo": dpo, "nll": nll}[loss]
    return PairLosses(total, dpo, nll, chosen_reward, rejected_reward)
