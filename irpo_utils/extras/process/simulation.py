"""Continue solutions from where their steps end, and see how many continuations reach the right answer.

Continuations from all steps of all samples of a problem are one tree for the sampler, so a step's prefix is not computed
again; and a prefix that several samples share is simulated once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...files import read_jsonl, resolve, write_jsonl
from ...methods import sampler
from ...model import tokens
from ...model.prompts import encode_prompts, stop_ids
from ...tasks.base import Problem, Task
from ...tasks.grading import grade

Record = dict[str, Any]
Prefixes = dict[str, list[list[int]]]  # problem id -> where continuations begin, response token ids
CHUNK = 8  # batches of continuations that a killed run loses at most


def simulator(config, policy: Path | None, tokenizer) -> tuple[Any, Path | None, Any, bool]:
    """Who continues: a `Config`, a policy's folder, a tokenizer, and whether it reads the policy's own token ids."""
    name = config.process.simulator
    if not name:
        return config, policy, tokenizer, True
    folder = resolve(Path(name).expanduser())
    if (folder / "adapter_config.json").exists():  # on the same base
        return config, folder, tokenizer, True
    other = config.but(model=config.model.but(path=name, tuning="lora"))
    try:
        return other, None, tokens.load_tokenizer(other.model), False
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "process.simulator")) from None


def simulate(
    config,
    policy: Path | None,
    tokenizer,
    task: Task,
    problems: list[Problem],
    prefixes: Prefixes,
    folder: Path,
    seed: int,
) -> dict[tuple[str, tuple[int, ...]], str]:
    """Draw `process.continuations` responses from every prefix and grade them; a chunk of problems at a time.

    Another simulator reads the prefix as text, through its own tokenizer and chat template. A prefix that leaves no token
    of `sampling.max_new_tokens` reaches no answer.

    Args:
        prefixes: distinct ones of each problem. folder: gets a file for each chunk, which a killed run finds again.

    Returns:
        (problem id, prefix) -> "1" or "0" for every continuation, in the order in which they were drawn.
    """
    k = config.process.continuations
    config, policy, reader, same = simulator(config, policy, tokenizer)
    start = lambda ids: ids if same else reader(tokenizer.decode(ids), add_special_tokens=False).input_ids  # noqa: E731
    asked = [p for p in problems if prefixes.get(p.id)]
    begin = {p.id: {tuple(start(ids)): None for ids in prefixes[p.id]} for p in asked}
    if not same:  # its tokens may be more than the policy's
        longest = max((len(ids) for mine in begin.values() for ids in mine), default=0)
        most = longest + config.sampling.max_new_tokens
        config = config.but(sampling=config.sampling.but(max_new_tokens=most))
    prompts = encode_prompts(task, reader, asked)
    asked.sort(key=lambda p: (len(prompts[p.id]), p.id))
    chunks: dict[Path, list[Problem]] = {}
    room = 0
    for number, p in enumerate(asked):
        if room <= 0:
            mine = chunks.setdefault(folder / f"continuations_{number:07d}.jsonl", [])
            room = CHUNK * config.sampling.max_rows
        mine.append(p)
        room -= k * len(begin[p.id])
    missing = {path: part for path, part in chunks.items() if not path.exists()}
    with sampler.drawing(config, policy, reader, task, asked) if missing else nullcontext() as draw:
        for number, (path, part) in enumerate(missing.items(), 1):
            said = f"simulating, part {number} of {len(missing)}"
            rows = continuations(config, draw, reader, task, part, prompts, begin, k, seed, said)
            write_jsonl(path, rows)
    found = {}
    for path in chunks:
        for row in read_jsonl(path, "01b_reward"):
            found[row["problem"], tuple(row["prefix"])] = row["outcomes"]
    return {(p.id, tuple(ids)): found[p.id, tuple(start(ids))] for p in asked for ids in prefixes[p.id]}


def tokens_drawn(folder: Path) -> int:
    """How many tokens the continuations in `folder` have, their beginnings not counted."""
    return sum(row["tokens"] for path in folder.glob("continuations_*.jsonl") for row in read_jsonl(path, "01b_reward"))


def continuations(config, draw, reader, task, problems, prompts, begin, k, seed, said) -> Iterator[Record]:
    """One chunk of `simulate`: a record for every prefix of `problems`."""
    most = config.sampling.max_new_tokens
    starts = {p.id: [list(ids) for ids in begin[p.id] if len(ids) < most] for p in problems}
    drawn = draw(
        {p.id: prompts[p.id] for p in problems if starts[p.id]},
        n=k,
        temperature=config.process.temperature,
        seed=seed,
        eos_id=stop_ids(config.model, reader),
        max_new_tokens=most,
        rows=config.sampling.max_rows,
        progress=sampler.Progress(said),
        starts=starts,
    )
    by_id = {p.id: p for p in problems}
    for name, completions in ((name, found) for batch in drawn for name, found in batch.items()):
        texts = reader.batch_decode([c.token_ids[:-1] if c.finished else c.token_ids for c in completions])
        verdicts = grade(task, texts, [by_id[name]] * len(texts), flexible=config.task.flexible)
        marks = "".join("1" if verdict.reward == 1 else "0" for verdict in verdicts)
        for i, ids in enumerate(starts[name]):
            mine = slice(k * i, k * i + k)
            tokens = sum(len(c.token_ids) - len(ids) for c in completions[mine])
            yield {"problem": name, "prefix": ids, "outcomes": marks[mine], "tokens": tokens}
    for p in problems:
        yield from (
            {"problem": p.id, "prefix": ids, "outcomes": "0" * k, "tokens": 0}
            for ids in map(list, begin[p.id])
            if len(ids) >= most
        )
