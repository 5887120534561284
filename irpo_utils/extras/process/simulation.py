"""Continue solutions from where their steps end, and see how many continuations reach the right answer.

Continuations from all steps of all samples of a problem are one tree for the sampler, so a step's prefix is not
computed again. A prefix that several samples share is simulated once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ...files import resolve
from ...methods.rewards import Job
from ...methods.sampler import Sampler
from ...model.load import is_adapter, load_tokenizer
from ...model.prompts import encode_prompts
from ...model.records import Ids, Record
from ...progress import counting
from ...tasks.base import Problem
from ...tasks.grading import grade

Prefixes = dict[str, list[Ids]]  # problem id -> where continuations begin, response token ids
CHUNK = 8  # batches of continuations that a killed run loses at most


@dataclass(frozen=True)
class Continued(Record):
    """A prefix in the simulator's tokens, and what its continuations came to."""

    problem: str
    prefix: Ids
    outcomes: str  # "0110": the second and the third of four reached the right answer
    tokens: int  # of the continuations alone


class Chunk(NamedTuple):
    """Problems that are simulated together."""

    problems: list[Problem]
    starts: Prefixes  # in the simulator's tokens
    label: str


def simulator(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[Job, PreTrainedTokenizerBase]:
    """The job with the model that continues in place of the policy, and that model's tokenizer.

    `process.simulator` is empty for the policy itself, an adapter on the same base, or another model. The first two
    read the policy's own token ids: their tokenizer is `tokenizer` itself.

    Raises:
        ValueError: there is no such model, or its tokenizer has no EOS.
    """
    name = job.config.process.simulator
    if not name:
        return job, tokenizer
    folder = resolve(name)
    if is_adapter(folder):
        return replace(job, policy=folder), tokenizer
    config = job.config.but(model=job.config.model.but(path=name, tuning="lora"))
    try:
        return replace(job, config=config, policy=None), load_tokenizer(config.model)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "process.simulator")) from None


def simulate(job: Job, tokenizer: PreTrainedTokenizerBase, prefixes: Prefixes) -> dict[tuple[str, Ids], str]:
    """Draw `process.continuations` responses from every prefix and grade them, a chunk of problems at a time.

    Another model reads the prefix as text, through its own tokenizer and chat template. A prefix that leaves no token
    of `sampling.max_new_tokens` reaches no answer.

    Args:
        job: its `seed` is that of the continuations. Its `folder` gets a file a chunk, so that a killed run goes on.
        tokenizer: the policy's.
        prefixes: distinct ones of each problem.

    Returns:
        (problem id, prefix) -> "1" or "0" for every continuation, in the order in which they were drawn.
    """
    job, reader = simulator(job, tokenizer)

    def start(ids: Ids) -> Ids:
        return ids if reader is tokenizer else tuple(reader(tokenizer.decode(ids), add_special_tokens=False).input_ids)

    problems = [p for p in job.problems if prefixes.get(p.id)]
    starts = {p.id: list(dict.fromkeys(map(start, prefixes[p.id]))) for p in problems}
    if reader is not tokenizer:  # its tokens may be more than the policy's
        longest = max((len(ids) for own in starts.values() for ids in own), default=0)
        sampling = job.config.sampling
        longer = sampling.but(max_new_tokens=longest + sampling.max_new_tokens)
        job = replace(job, config=job.config.but(sampling=longer))
    prompts = encode_prompts(job.task, reader, problems)
    problems.sort(key=lambda p: (len(prompts[p.id]), p.id))
    parts = chunked(job, problems, starts)
    chunks = {
        path: Chunk(part, {p.id: starts[p.id] for p in part}, f"simulating, part {number} of {len(parts)}")
        for number, (path, part) in enumerate(parts.items(), 1)
    }
    with job.sampler(problems=problems) as sampler:
        sampler.fill(chunks, partial(continuations, seed=job.seed), "simulating")
    found = {(row.problem, row.prefix): row.outcomes for path in chunks for row in Continued.read(path, "01b_reward")}
    return {(p.id, ids): found[p.id, start(ids)] for p in problems for ids in prefixes[p.id]}


def chunked(job: Job, problems: list[Problem], starts: Prefixes) -> dict[Path, list[Problem]]:
    """The file of each chunk -> its problems: as many as fill `CHUNK` batches."""
    chunks: dict[Path, list[Problem]] = {}
    free_rows = 0
    for number, p in enumerate(problems):
        if free_rows <= 0:
            chunk = chunks.setdefault(job.folder / f"continuations_{number:07d}.jsonl", [])
            free_rows = CHUNK * job.config.sampling.max_rows
        chunk.append(p)
        free_rows -= job.config.process.continuations * len(starts[p.id])
    return chunks


def tokens_drawn(folder: Path) -> int:
    """How many tokens the continuations in `folder` have, their beginnings not counted."""
    files = folder.glob("continuations_*.jsonl")
    return sum(row.tokens for path in files for row in Continued.read(path, "01b_reward"))


def continuations(sampler: Sampler, chunk: Chunk, seed: int) -> list[Continued]:
    """One chunk of `simulate`: a record for every prefix."""
    config, tokenizer, found = sampler.config, sampler.tokenizer, []
    k, limit = config.process.continuations, config.sampling.max_new_tokens
    going_on = {name: [ids for ids in own if len(ids) < limit] for name, own in chunk.starts.items()}
    with counting(chunk.label, len(chunk.problems), "problems") as count:
        drawn = sampler.ask(
            [p for p in chunk.problems if going_on[p.id]],
            n=k,
            temperature=config.process.temperature,
            seed=seed,
            progress=count.problems,
            starts={name: [list(ids) for ids in own] for name, own in going_on.items()},
        )
        by_id = {p.id: p for p in chunk.problems}
        for name, completions in ((name, batch[name]) for batch in drawn for name in batch):
            texts = tokenizer.batch_decode([c.token_ids[:-1] if c.finished else c.token_ids for c in completions])
            verdicts = grade(sampler.task, texts, [by_id[name]] * len(texts), flexible=config.task.flexible)
            outcomes = "".join("1" if verdict.reward == 1 else "0" for verdict in verdicts)
            for i, prefix in enumerate(going_on[name]):
                own = slice(k * i, k * i + k)
                tokens = sum(len(c.token_ids) - len(prefix) for c in completions[own])
                found.append(Continued(name, prefix, outcomes[own], tokens))
    for name, own in chunk.starts.items():
        found += [Continued(name, prefix, "0" * k, 0) for prefix in own if len(prefix) >= limit]
    return found
