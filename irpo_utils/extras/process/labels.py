"""Process feedback (SIPF, arXiv 2412.08393): a reward for every step of a solution, from nothing but final answers.

A step's label comes from simulation: from where the step ends, K continuations are drawn, and it is right if more than
delta of them reach the right answer. A reward model (`reward_model.py`) learns the labels; a solution's reward is the mean
of its steps' scores.

Left out of the paper: a prompt that numbers the steps. A step is a line that is not empty, of a solution or of code.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import write_jsonl
from ...methods import select
from ...model.prompts import encode_prompts, stop_ids
from ...run import stages
from ...tasks.base import Problem, Task
from . import reward_model
from .simulation import simulate, tokens_drawn

Record = dict[str, Any]
PATHS: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}


def step_ends(tokenizer, token_ids: list[int], finished: bool = True) -> list[int]:
    """Numbers of the response tokens that end a step, [steps]: what they and the tokens before say is the step's prefix.

    A step is a line that is not empty. A token that ends a line may say more than "\\n" (".\\n", "\\n\\n", "\\n    "); lines that
    end in one token are one step.
    The last line of a finished response ends before its EOS; of an unfinished one it is no step, since it was cut.
    """
    ends, blank = [], True
    body = token_ids[:-1] if finished else token_ids
    for i, text in enumerate(tokenizer.batch_decode([[t] for t in body])):
        *ended, rest = text.split("\n")
        if ended and (not blank or any(line.strip() for line in ended)):
            ends.append(i)
        blank = not rest.strip() and (blank or bool(ended))
    if finished and not blank and ends[-1:] != [len(body) - 1]:
        ends.append(len(body) - 1)
    return ends


def path_reward(scores: list[float], how: str) -> float:
    """A solution's reward from its steps' scores, [steps]: one of `PATHS`; 0 for a solution that has no whole step."""
    return float(PATHS[how](scores)) if scores else 0.0


def label(outcomes: str, delta: int, k: int | None = None) -> int:
    """1 if more than `delta` of the first `k` `outcomes` ("0110": the second and third of four were right) are right."""
    return int(outcomes[:k].count("1") > delta)


def label_steps(
    config,
    policy: Path | None,
    tokenizer,
    task: Task,
    problems: list[Problem],
    samples: dict[str, list[Record]],
    folder: Path,
    seed: int,
    labels: str = "process",
) -> list[Record]:
    """The distinct responses of each problem and its gold solution, with a label for every step.

    The last step of a finished response needs no simulation: its label is whether the answer is right. Steps of a gold
    solution are right. With `labels="outcome"`, the control, nothing is simulated: a step has the label of its answer.

    Returns:
        a record for each: problem, prompt_ids, token_ids, gold, answer_reward, and [steps] each ends, labels and outcomes
        ("" where nothing was simulated; `label` gives the labels of a smaller K or another delta).
    """
    end = stop_ids(config.model, tokenizer)[0]
    prompts = encode_prompts(task, tokenizer, problems)
    gold = stages.gold_samples(tokenizer, problems, end)
    rows, prefixes = [], {}
    for p in problems:
        mine = [dict(s, gold=False) for s in select.distinct(samples.get(p.id, []))]
        said = {tuple(s["token_ids"]) for s in mine}
        mine += [dict(gold[p.id], gold=True)] if p.id in gold and tuple(gold[p.id]["token_ids"]) not in said else []
        for s in mine:
            ends = step_ends(tokenizer, s["token_ids"], s["finished"])
            rows.append(
                {
                    "problem": p.id,
                    "prompt_ids": prompts[p.id],
                    "token_ids": s["token_ids"],
                    "gold": s["gold"],
                    "finished": s["finished"],
                    "answer_reward": s["reward"],
                    "ends": ends,
                    # Where continuations begin: a gold solution needs none.
                    "simulated": [] if s["gold"] or labels == "outcome" else ends[: len(ends) - s["finished"]],
                }
            )
            for at in rows[-1]["simulated"]:
                prefixes.setdefault(p.id, {})[tuple(s["token_ids"][: at + 1])] = None
    wanted = {name: [list(ids) for ids in found] for name, found in prefixes.items()}
    found = simulate(config, policy, tokenizer, task, problems, wanted, folder, seed) if wanted else {}
    for row in rows:
        simulated, right = row.pop("simulated"), int(row["answer_reward"] == 1)
        outcomes = [found[row["problem"], tuple(row["token_ids"][: at + 1])] for at in simulated]
        row["labels"] = [label(o, config.process.delta) for o in outcomes]
        row["labels"] += [right] * (len(row["ends"]) - len(outcomes))
        row["outcomes"] = outcomes + [""] * (len(row["ends"]) - len(outcomes))
    return rows


def score_samples(
    model, tokenizer, prompts: dict[str, list[int]], samples: list[Record], how: str, rows: int = 64
) -> list[Record]:
    """`samples` with `step_scores` [steps] and, as `reward`, the path reward; what the answer earned is `answer_reward`.

    An unfinished sample gets the reward of the steps that it has. `rows` responses are read at once.
    """
    distinct = {(s["problem"], tuple(s["token_ids"])): s["finished"] for s in samples}
    ends = [step_ends(tokenizer, list(ids), finished) for (_, ids), finished in distinct.items()]
    found = reward_model.score(
        model, [prompts[name] for name, _ in distinct], [list(ids) for _, ids in distinct], ends, rows
    )
    scores = dict(zip(distinct, found, strict=True))
    mine = ((s, scores[s["problem"], tuple(s["token_ids"])]) for s in samples)
    return [s | {"answer_reward": s["reward"], "step_scores": x, "reward": path_reward(x, how)} for s, x in mine]


def feedback(
    config,
    policy: Path | None,
    tokenizer,
    task: Task,
    problems: list[Problem],
    samples: dict[str, list[Record]],
    folder: Path,
    seed: int,
    labels: str = "process",
) -> tuple[dict[str, list[Record]], Record]:
    """Step labels, the reward model that learns them, and the path reward of every sample.

    Args:
        policy: the folder of M_t, which drew `samples` (problem id -> records of samples.jsonl); None is the base.
        folder: gets labels.jsonl, reward_model/ and, while it runs, what a killed run goes on from.
        labels: "process", or "outcome" for the control that differs in the labels alone.

    Returns:
        the samples as `score_samples` gives them, and what there is to report.
    """
    if labels not in ("process", "outcome"):
        raise ValueError(f"labels: process or outcome, not {labels!r}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = label_steps(config, policy, tokenizer, task, problems, samples, folder, seed, labels)
    write_jsonl(folder / "labels.jsonl", rows)
    if not (folder / "reward_model").exists():
        fitting = [r for r in rows if len(r["prompt_ids"]) + len(r["token_ids"]) <= config.pairs.max_tokens]
        reward_model.train(config, fitting, folder, seed)
        gc.collect()  # one base in memory at a time
    model = reward_model.load_reward_model(config, folder / "reward_model", threads=config.threads)
    prompts = encode_prompts(task, tokenizer, problems)
    flat = [s for mine in samples.values() for s in mine]
    scored: dict[str, list[Record]] = {name: [] for name in samples}
    for s in score_samples(model, tokenizer, prompts, flat, config.process.path, 2 * config.train.micro_batch):
        scored[s["problem"]].append(s)
    steps = [(row["problem"], *row["token_ids"][: end + 1]) for row in rows for end in row["ends"]]
    simulated = [bool(outcomes) for row in rows for outcomes in row["outcomes"]]
    facts = {
        "labels": labels,
        "solutions": len(rows),
        "steps": len(steps),
        "labelled_right": sum(sum(row["labels"]) for row in rows) / max(1, len(steps)),
        "prefixes_simulated": len({step for step, drawn in zip(steps, simulated, strict=True) if drawn}),
        "drawn_tokens": tokens_drawn(folder),
        "reward_model": json.loads((folder / "reward_model" / "facts.json").read_text()),
    }
    return scored, facts
