"""Log-probabilities of responses, each prompt run once and each distinct response once.

The K pairs of a problem share one prompt, and K pairs hold fewer than 2K distinct responses. Here the instruction that
a batch's prompts begin with runs first, then its distinct prompts, without their last token. Their cache, graph and
all, is expanded to the distinct responses as rows, and a row runs the prompt's last token and the response on it. So
all logits belong to response tokens, and none is made for a prompt. With activation checkpointing no cache can be kept;
there a prompt and its responses are one row with a tree mask (`tree_states`). The result is that of the padded rows
prompt + response (`padded_states`), which is the fall-back for a model that takes no such mask, and for batches in
which hardly a prompt is shared.

The vocabulary is the widest thing in a batch (Qwen2.5: 151,936). Hidden states of response tokens are projected to it a
chunk at a time, and the backward pass makes a chunk's logits anew instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from ..progress import counting
from .load import causal_model, passes
from .processes import divided, through, world_size
from .records import Ids, Pair
from .shape import sees_all
from .shared_prompt import repeated, run_prefix

CHUNK = 1 << 25  # logits that are made at once (128 MiB in float32); fewer than that are kept for the backward pass
# Tokens that a group of rows of its own must save. A GPU is hardly faster with few than with many.
GROUP_ON_CPU, GROUP_ON_GPU = 256, 2048
Row = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
Response = tuple[str, Ids, Ids]  # problem, its tokens, the numbers of those that the model did not draw


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Padded ids and mask, [rows, length]. The pad id is never looked at, so pad and EOS may be the same."""
    width = max(map(len, rows))

    def pad(row: Sequence[int]) -> list[int]:
        zeros = [0] * (width - len(row))
        return [*zeros, *row] if left else [*row, *zeros]

    return torch.tensor([pad(row) for row in rows]), torch.tensor([pad([1] * len(row)) for row in rows])


def collate(rows: list[Row], inserted: Sequence[Ids] = ()) -> dict[str, Tensor]:
    """Distinct prompts [prompts, length], and for every row its response [rows, length] and which prompt it has [rows].

    Prompts come without their last token, which begins its responses' rows: `fed` is what a row runs on the prompt's
    cache, and `responses` what it should say, EOS included. The prompt is conditioned on, never scored; nor are a
    response's tokens with the numbers in `inserted` [rows].
    """
    prompts = list(dict.fromkeys(tuple(prompt) for prompt, _ in rows))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    # On the left, so that a prompt's end and its responses' beginning are neighbours, as a sliding window wants them.
    prompt_ids, prompt_mask = padded([prompt[:-1] or (0,) for prompt in prompts], left=True)
    prompt_mask[[len(prompt) == 1 for prompt in prompts]] = 0  # a prompt of one token leaves nothing to share
    batch = {"prompts": prompt_ids, "prompt_mask": prompt_mask}
    batch["responses"], batch["scored"] = padded([response for _, response in rows])
    for row, numbers in enumerate(inserted):
        batch["scored"][row, list(numbers)] = 0
    batch["fed"], _ = padded([[prompt[-1], *response[:-1]] for prompt, response in rows])
    return batch | {"owner": torch.tensor([number[tuple(prompt)] for prompt, _ in rows])}


def response_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """log p(response | prompt), the sum over response tokens in nats, [rows], for a batch made by `collate`."""
    return summed_logps(model, response_states(model, batch), batch["responses"], batch["scored"])


def response_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The last hidden states at the `fed` tokens of a batch made by `collate`, [rows, length, width].

    State number i of a row has read the prompt and the response's tokens before number i, which it predicts.
    """
    # No cache outlives a layer then. Nor where a model is sharded, which is also to run as often in every process.
    if (model.training and getattr(model, "is_gradient_checkpointing", False)) or isinstance(model, FSDPModule):
        one_row_a_prompt = tree_is_cheaper(model, batch) and takes_trees(model)
        return tree_states(model, batch) if one_row_a_prompt else padded_states(model, batch)
    owner, fed = batch["owner"], batch["fed"]
    backbone = causal_model(model).base_model
    prefix, mask = run_prefix(model, batch["prompts"], batch["prompt_mask"])
    if len(owner) == len(mask):  # a response to each prompt
        return padded_states(model, batch, prefix)
    length, cache = prefix.get_seq_length(), repeated(prefix, len(mask))
    backbone(
        input_ids=batch["prompts"][:, length:],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_(min=0)[:, length:],
        past_key_values=cache,
        use_cache=True,
    )
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
    start = mask.sum(-1)[owner].unsqueeze(-1)
    return backbone(
        input_ids=fed,
        attention_mask=torch.cat([mask[owner], torch.ones_like(fed)], -1),
        position_ids=start + torch.arange(fed.shape[1], device=fed.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def tree_is_cheaper(model: PreTrainedModel, batch: dict[str, Tensor]) -> bool:
    """Whether one row for each prompt is less work than one for each response."""
    rows, response_length = batch["fed"].shape
    prompts, prompt_length = batch["prompts"].shape
    branches = int(torch.bincount(batch["owner"]).max())  # responses to one prompt, at most
    hidden = causal_model(model).config.get_text_config().hidden_size

    def cost(count: int, length: int) -> int:
        # Weights cost 24 h^2 operations per token and layer, attention 4 h for each token that it looks at.
        return count * length * (6 * hidden + length)

    tree_length = prompt_length + branches * response_length
    return cost(prompts, tree_length) < cost(rows, prompt_length + response_length)


def tree_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`response_states` from one row for each prompt: the prompt, then its responses side by side.

    A response sees the prompt and itself only.
    """
    prompts, mask, owner, fed = batch["prompts"], batch["prompt_mask"], batch["owner"], batch["fed"]
    prompt_count, prompt_length = prompts.shape
    rows, width = fed.shape
    branch = torch.stack([(owner[:i] == owner[i]).sum() for i in range(rows)])  # number among its prompt's responses
    length = prompt_length + (int(branch.max()) + 1) * width
    token = torch.arange(width, device=fed.device)
    columns = prompt_length + branch.unsqueeze(-1) * width + token  # [rows, width]
    places = (owner.unsqueeze(-1).expand_as(columns), columns)  # of the responses' tokens in the tree

    ids, positions = prompts.new_zeros(prompt_count, length), prompts.new_zeros(prompt_count, length)
    ids[:, :prompt_length], ids[places] = prompts, fed
    positions[:, :prompt_length] = (mask.cumsum(-1) - 1).clamp_(min=0)
    positions[places] = mask.sum(-1)[owner].unsqueeze(-1) + token
    part = torch.arange(length, device=fed.device).sub(prompt_length)
    part = part.div(width, rounding_mode="floor").clamp_(min=-1)  # -1 is the prompt
    visible = (part.unsqueeze(-1) == part) | (part == -1)  # of the same response, or of the prompt
    real = torch.cat([mask.bool(), mask.new_ones(prompt_count, length - prompt_length).bool()], -1)
    visible = visible.tril() & real.unsqueeze(1)
    # Padding sees itself: seeing nothing, it would be NaN.
    visible = visible | torch.eye(length, dtype=torch.bool, device=fed.device)

    hidden = causal_model(model).base_model(
        input_ids=ids, attention_mask=tree_bias(model, visible, positions), position_ids=positions, use_cache=False
    )
    return hidden.last_hidden_state[places]


def tree_bias(model: PreTrainedModel, visible: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """What attention adds to its scores so that a token sees what is `visible` [prompts, length, length] to it.

    A model with layers of several kinds takes a dictionary. `positions` [prompts, length] decide what a sliding layer's
    window leaves out.
    """

    def bias(seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(model.dtype).min).unsqueeze(1)

    config = causal_model(model).config.get_text_config()
    if sees_all(config):
        return bias(visible)
    sliding = bias(visible & (positions.unsqueeze(-1) - positions.unsqueeze(1) < config.sliding_window))
    kinds = getattr(config, "layer_types", None)
    return {"full_attention": bias(visible), "sliding_attention": sliding} if kinds else sliding


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether `tree_states` gives what padded rows give for this model. Says so, once, if it does not."""
    return passes(model, tree_trial, "every response runs its prompt again")


@torch.no_grad()
def tree_trial(model: PreTrainedModel) -> str | None:
    """What is wrong with `tree_states` for this model, tried on a few tokens; None if nothing is."""
    ids = [i % causal_model(model).config.get_text_config().vocab_size for i in range(3, 12)]
    batch = to_device(collate([(ids[:4], ids[4:6]), (ids[:4], ids[5:9]), (ids[:2], ids[6:8])]), model)
    try:
        scored = batch["scored"].bool()
        tree, rows = (states(model, batch)[scored].float() for states in (tree_states, padded_states))
    except Exception as error:
        if should_reduce_batch_size(error):  # that says nothing of the model
            raise
        return f"takes no tree mask ({type(error).__name__}: {error})"
    off = ((tree - rows).norm() / rows.norm()).item()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return None if off < tolerance else f"computes other states with a tree mask (off by {off:.1e} of their size)"


def padded_states(model: PreTrainedModel, batch: dict[str, Tensor], prefix: DynamicCache | None = None) -> Tensor:
    """`response_states` from one row of prompt and response for each response; rows of like length run together.

    `prefix` is the cache of what all prompts begin with, which is not run again then.
    """
    prompts, mask, owner, fed = batch["prompts"], batch["prompt_mask"], batch["owner"], batch["fed"]
    shared = prefix.get_seq_length() if prefix else 0
    own = mask.sum(-1)[owner]  # of each row: tokens of the prompt
    token = torch.arange(1, fed.shape[1] + 1, device=fed.device)
    ends = own + (batch["scored"] * token).amax(-1)  # behind the last state that is looked at
    ids = fed.new_zeros(len(fed), prompts.shape[1] + fed.shape[1])
    for row, (prompt, length) in enumerate(zip(prompts[owner], own.tolist(), strict=True)):
        ids[row, :length] = prompt[prompts.shape[1] - length :]
    columns = own.unsqueeze(-1) + token - 1
    ids.scatter_(1, columns, fed)
    if isinstance(model, FSDPModule):  # each process has a batch of its own, and is to run as often as the others
        order, sizes = list(range(len(fed))), [len(fed)]
    else:
        overhead = GROUP_ON_CPU if fed.device.type == "cpu" else GROUP_ON_GPU
        order, sizes = groups_of_like_length((ends - shared).tolist(), overhead)
    backbone, states = causal_model(model).base_model, []
    for rows in torch.tensor(order, device=fed.device).split(sizes):
        cache = repeated(prefix, len(rows)) if shared else None
        here = ids[rows, shared : int(ends[rows].max())]  # what is right of a row's end is seen by nothing before it
        hidden = backbone(input_ids=here, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        where = (columns[rows] - shared).clamp_(max=hidden.shape[1] - 1).unsqueeze(-1)
        states.append(hidden.gather(1, where.expand(-1, -1, hidden.shape[-1])))
    return torch.cat(states)[torch.tensor(order, device=fed.device).argsort()]


def groups_of_like_length(lengths: list[int], overhead: int) -> tuple[list[int], list[int]]:
    """An order of rows by length, and the sizes of groups in it that leave the least to run.

    A group costs its rows times its longest one, padding and all, and `overhead` tokens for being one more.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    least, begins = [0], [0]  # of the first n rows in order: the least cost, and where the last group begins
    for end, row in enumerate(order, 1):
        costs = [least[i] + (end - i) * lengths[row] + overhead for i in range(end)]
        begins.append(min(range(end), key=costs.__getitem__))
        least.append(costs[begins[-1]])
    sizes, end = [], len(order)
    while end:
        sizes.append(end - begins[end])
        end = begins[end]
    return order, sizes[::-1]


def summed_logps(model: PreTrainedModel, hidden: Tensor, tokens: Tensor, scored: Tensor) -> Tensor:
    """The sum of the log-probabilities of `tokens` [rows, length] where `scored`, [rows].

    `hidden` are the states that predict them, [rows, length, width].
    """
    where = scored.bool()
    states, wanted = hidden[where], tokens[where]
    head, cap = causal_model(model).get_output_embeddings(), soft_cap(model)
    vocabulary = causal_model(model).config.get_text_config().vocab_size
    size = max(1, CHUNK // vocabulary)
    again = len(states) > size and torch.is_grad_enabled()
    run = partial(checkpoint, _logps, use_reentrant=False) if again else _logps
    parts = zip(states.split(size), wanted.split(size), strict=True)
    logps = torch.cat([run(head, cap, h, w) for h, w in parts])
    return torch.zeros_like(scored, dtype=logps.dtype).masked_scatter(where, logps).sum(-1)


def soft_cap(model: PreTrainedModel) -> float | None:
    """The bound that Gemma 2 and 3 put on their logits, tanh-wise."""
    return getattr(causal_model(model).config.get_text_config(), "final_logit_softcapping", None)


def _logps(head: torch.nn.Module, cap: float | None, states: Tensor, tokens: Tensor) -> Tensor:
    logits = head(states)
    return token_logps(logits if cap is None else torch.tanh(logits / cap) * cap, tokens)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """See that hidden states and output embeddings give the model's own logits; some architectures scale them as well.

    Raises:
        ValueError: they do not, so that this module cannot score the model's responses.
    """
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device).unsqueeze(0)
    causal = causal_model(model)
    wanted = token_logps(causal(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    got = _logps(causal.get_output_embeddings(), soft_cap(model), hidden, ids[:, 1:])
    near = 1e-3 if wanted.dtype == causal.dtype else 5e-2  # 16-bit weights round
    if not torch.allclose(wanted, got, rtol=near, atol=near):
        raise ValueError(
            f"a {causal.config.model_type} computes its logits in a way that is not known here; "
            "use another architecture"
        )


def to_device(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def reference_logps(model: PreTrainedModel, pairs: list[Pair], max_rows: int = 64) -> list[tuple[float, float]]:
    """log M_t of every pair's chosen and rejected response, in nats (0 where there is none).

    Each distinct response is scored once, `max_rows` of them at a time.
    """
    rows = [
        ((p.problem, p.chosen_ids, p.chosen_inserted), (p.problem, p.rejected_ids, p.rejected_inserted)) for p in pairs
    ]
    prompts = {row: p.prompt_ids for p, both in zip(pairs, rows, strict=True) for row in both if row[1]}
    scores = distinct_logps(model, prompts, max_rows)
    return [(scores.get(chosen, 0.0), scores.get(rejected, 0.0)) for chosen, rejected in rows]


@torch.no_grad()
def distinct_logps(model: PreTrainedModel, prompts: dict[Response, Ids], max_rows: int) -> dict[Response, float]:
    """log p of every response, in nats, given the prompt of each.

    `max_rows` responses are run at a time. Where several processes train, each runs a part of them.
    """
    # A problem's responses come together, so that they share its prompt; problems by length, so that padding is small.
    todo = sorted(prompts, key=lambda k: (len(prompts[k]), k[0], len(k[1]), k))
    model.eval()

    parts = [todo[i : i + max_rows] for i in range(0, len(todo), max_rows)]
    with counting("log-probabilities", -(-len(parts) // world_size()), "batches") as count:

        def score(part: list[Response]) -> list[float]:
            rows = [(prompts[response], response[1]) for response in part]
            batch = to_device(collate(rows, [inserted for *_, inserted in part]), model)
            logps = through(model, response_logps, batch).tolist()
            count()
            return logps

        return dict(zip(todo, chain.from_iterable(divided(parts, score)), strict=True))


def with_reference(pairs: list[Pair], logps: list[tuple[float, float]]) -> list[Pair]:
    """The pairs with the `reference_logps` of their chosen and rejected responses."""
    both = zip(pairs, logps, strict=True)
    return [replace(p, reference_chosen=chosen, reference_rejected=rejected) for p, (chosen, rejected) in both]


def pair_batch(pairs: list[Pair]) -> dict[str, Tensor]:
    """A batch of pairs: the distinct responses of `collate`, and where each pair finds its two.

    `chosen` and `rejected` [pairs] are row numbers (`rejected` is -1 where there is none). `reference` [pairs, 2] are
    the reference's log-probabilities, where the pairs have them. `lengths` and `rejected_lengths` [pairs] are the
    chosen and rejected responses' numbers of scored tokens, `reward_gaps` [pairs] their rewards' differences.
    """
    number: dict[tuple[Ids, Ids, Ids], int] = {}  # of a row, by its prompt, response and what of it is not scored

    def row(*own: Ids) -> int:
        return number.setdefault(own, len(number))

    chosen = [row(p.prompt_ids, p.chosen_ids, p.chosen_inserted) for p in pairs]
    rejected = [row(p.prompt_ids, p.rejected_ids, p.rejected_inserted) if p.rejected_ids else -1 for p in pairs]
    batch = {
        **collate([(prompt, response) for prompt, response, _ in number], [inserted for *_, inserted in number]),
        "chosen": torch.tensor(chosen),
        "rejected": torch.tensor(rejected),
        "lengths": torch.tensor([len(p.chosen_ids) - len(p.chosen_inserted) for p in pairs]),
        "rejected_lengths": torch.tensor([len(p.rejected_ids) - len(p.rejected_inserted) for p in pairs]),
        "reward_gaps": torch.tensor([p.reward_gap for p in pairs]),
    }
    if pairs[0].reference_chosen is not None:  # a loss without a reference has none scored
        batch["reference"] = torch.tensor([[p.reference_chosen, p.reference_rejected] for p in pairs])
    return batch


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of `tokens` [..., length] under the `logits` [..., length, vocabulary] before them, in float32 or wider."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    picked = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(-1)
