"""What the stage notebooks call on the real data, each function one arrow of the loop.

torch and what needs it are imported where a model is: the pairs need none, and the import takes longer than they do.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from .. import metrics
from ..extras.expo import extrapolate
from ..files import read_jsonl, relative, write_json, write_jsonl
from ..methods import select
from ..methods.sampler import Record, drawing, graded_samples, greedy_accuracy
from ..model import load, tokens, training
from ..model.load import load_line
from ..model.prompts import encode_prompts, encode_response, stop_ids
from ..tasks import get_task
from ..tasks.base import Problem, Task
from .rewards import REWARDS
from .store import Stage

SAMPLE_FIELDS = ("problem", "response", "reward", "finished", "logp", "token_ids")


def sample_stage(stage: Stage) -> list[Record]:
    """01: N graded samples of M_{t-1} for every training problem, a chunk at a time so that a kill loses one chunk."""
    config, task = stage.config, get_task(stage.config.task)
    tokenizer = tokens.load_tokenizer(config.model)
    problems = training_problems(task, config)
    # Chunks follow the sampler's own order, so that every batch is the same in a resumed run.
    prompts = encode_prompts(task, tokenizer, problems)
    order = sorted(problems, key=lambda p: (len(prompts[p.id]), p.id))
    size = max(1, config.sampling.max_rows // config.sampling.n) * 8
    chunks = {start: stage.partial / f"chunk_{start:07d}.jsonl" for start in range(0, len(order), size)}
    missing = {start: path for start, path in chunks.items() if not path.exists()}
    with drawing(config, stage.input("policy"), tokenizer, task, problems) if missing else nullcontext() as draw:
        for start, path in missing.items():
            rows = graded_samples(
                config,
                draw,
                tokenizer,
                task,
                order[start : start + size],
                n=config.sampling.n,
                temperature=config.temperature(stage.iteration),
                seed=stage_seed(stage),
                label=f"sampling M_{stage.iteration - 1}, problems {start + 1}-{min(start + size, len(order))} of {len(order)}",
            )
            write_jsonl(path, [row for batch in rows for row in batch])
    records = [row for path in sorted(stage.partial.glob("chunk_*.jsonl")) for row in read_jsonl(path, "01_sample")]
    rank = {p.id: i for i, p in enumerate(problems)}
    records.sort(key=lambda r: (rank[r["problem"]], r["sample"]))
    write_jsonl(stage.path("samples.jsonl"), records)
    if undecided := getattr(task, "undecided", 0):
        print(f"{undecided} answers took the symbolic check too long and count as wrong", file=sys.stderr)
    return records


def stage_seed(stage: Stage, purpose: int = 0) -> int:
    """A seed of its own for each (seed, iteration, purpose)."""
    return (stage.seed * 1000 + stage.iteration) * 10 + purpose


def training_problems(task: Task, config) -> list[Problem]:
    """The training problems; then the dev problems too, if training is repeated with them (`train.retrain_with_dev`)."""
    return task.problems("train") + (task.problems("dev") if config.train.retrain_with_dev else [])


def gold_samples(tokenizer, problems: list[Problem], end: int) -> dict[str, Record]:
    """The gold solutions, in the form of samples; problems without one are left out."""
    return {
        p.id: {
            "response": p.solution,
            "token_ids": encode_response(tokenizer, p.solution, end),
            "logp": None,
            "reward": 1.0,
            "finished": True,
        }
        for p in problems
        if p.solution
    }


def read_samples(stage: Stage) -> dict[str, list[Record]]:
    """Problem id -> its samples, with the rewards that the method gives them."""
    samples: dict[str, list[Record]] = {}
    for record in read_jsonl(stage.input("samples"), stage.inputs()["samples"][1], SAMPLE_FIELDS):
        samples.setdefault(record["problem"], []).append(record)
    return samples


def reward_stage(stage: Stage) -> tuple[list[Record], Record]:
    """01b: the samples with rewards beyond their answers', and the facts in reward.json; see rewards.py."""
    task = get_task(stage.config.task)
    tokenizer = tokens.load_tokenizer(stage.config.model)
    problems = training_problems(task, stage.config)
    records, facts = REWARDS[stage.choices.reward](stage, task, tokenizer, problems, read_samples(stage))
    write_jsonl(stage.path("rewarded.jsonl"), records)
    write_json(stage.path("reward.json"), facts)
    return records, facts


def extrapolate_stage(stage: Stage) -> Record:
    """03b: theta = M_{t-1} + a (M_{t-1} - M_{t-2}), no training; returns the facts in training.json."""
    config, a = stage.config, stage.config.train.extrapolation
    before = stage.input("before") if "before" in stage.inputs() else None
    shutil.rmtree(stage.partial / "adapter", ignore_errors=True)
    extrapolate(config.model, stage.input("policy"), before, a, stage.partial / "adapter")
    facts = {
        "a": a,
        "trained_tokens": 0,
        "best_step": 0,
        "load": load_line(config.model, Path(relative(stage.path("adapter")))),
    }
    write_json(stage.path("training.json"), facts)
    (stage.partial / "adapter").rename(stage.path("adapter"))
    return facts


def pairs_stage(stage: Stage) -> tuple[list[Record], Record]:
    """02: what the iteration trains on, pairs or single responses; returns (pairs, audit)."""
    config, task = stage.config, get_task(stage.config.task)
    tokenizer = tokens.load_tokenizer(config.model)
    problems = training_problems(task, config)
    end = stop_ids(config.model, tokenizer)[0]
    ids = encode_prompts(task, tokenizer, problems)
    prompts = {p.id: (task.prompt(p), ids[p.id]) for p in problems}
    gold = gold_samples(tokenizer, problems, end)
    samples = read_samples(stage) if stage.choices.samples else {}
    rows, audit = select.select(stage.choices.selection, samples, prompts, gold, config.pairs, stage_seed(stage, 1))
    if samples:
        audit["drawn_tokens"] = sum(
            len(s["token_ids"]) for drawn in samples.values() for s in drawn if not s.get("extra")
        )
    if "earlier" in stage.inputs():
        # Whoever drew them, it was not the model that is trained now: their log-probabilities are not to be compared.
        earlier = read_jsonl(stage.input("earlier"), "02_pairs.ipynb")
        rows = [row | {"chosen_logp": None, "rejected_logp": None} for row in earlier] + rows
        audit["accumulated"] = len(rows)
    write_jsonl(stage.path("pairs.jsonl"), rows)
    write_json(stage.path("audit.json"), audit)
    return rows, audit


def train_stage(stage: Stage, show: Callable[[str], None] = print) -> Record:
    """03: train M_t on the pairs, keep the step that is best on dev; returns the facts in training.json."""
    import torch

    config, task = stage.config, get_task(stage.config.task)
    tokenizer = tokens.load_tokenizer(config.model)
    rows = read_jsonl(stage.input("pairs"), "02_pairs.ipynb")
    model = load.load_policy(
        config.model, stage.input("policy"), trainable=True, seed=stage.seed, threads=config.threads
    )
    dev = task.problems("dev")
    held_out = {p.id for p in dev}
    settings = {
        "loss": stage.choices.loss,
        "config": config.train,
        "seed": stage_seed(stage, 2),
        "sampled_by_start": stage.choices.samples and (stage.choices.start == "M_t" or stage.iteration == 1),
        "show": show,
    }
    # Who gives the reference log-probabilities; the rate and the like have no part in it.
    named = {**stage.key(), "parameters": {"model": asdict(config.model), "threads": config.threads}}
    facts = training.train(
        model,
        [row for row in rows if row["problem"] not in held_out],
        stage.partial,
        score=lambda policy: greedy_accuracy(config, policy, tokenizer, task, dev),
        keep_reference=(stage.path("reference.json"), named),
        **settings,
    )
    kept = stage.partial
    if config.train.retrain_with_dev:
        show(
            f"step {facts['best_step']} is best on dev; training anew for as many steps with the dev problems included"
        )
        del model
        gc.collect()  # one base in memory at a time
        torch.cuda.empty_cache()
        model = load.load_policy(config.model, stage.input("policy"), trainable=True, seed=stage.seed)
        kept = stage.partial / "retrained"
        again = training.train(model, rows, kept, stop_after=facts["best_step"], **settings)
        facts["trained_tokens"] += again["trained_tokens"]
    facts["retrained_with_dev"] = config.train.retrain_with_dev
    facts["load"] = load.load_line(config.model, Path(relative(stage.path("adapter"))))
    facts["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write_jsonl(stage.path("steps.jsonl"), training.read_steps(stage.partial / "steps.jsonl"))
    write_json(stage.path("training.json"), facts)
    shutil.rmtree(stage.path("adapter.tmp"), ignore_errors=True)
    shutil.copytree(kept / "best", stage.path("adapter.tmp"))
    stage.path("adapter.tmp").rename(stage.path("adapter"))
    return facts


def evaluate_stage(stage: Stage) -> tuple[Record, list[Record]]:
    """04: greedy, maj@k and pass@k on dev and test, and what is wrong step by step; returns (summary, records)."""
    config, task = stage.config, get_task(stage.config.task)
    tokenizer = tokens.load_tokenizer(config.model)
    summary, judged = {}, []
    both = [p for split in ("dev", "test") for p in task.problems(split)]
    with drawing(config, stage.input("policy"), tokenizer, task, both) as draw:
        for split in ("dev", "test"):
            problems = task.problems(split)
            records: dict[str, Record] = {
                p.id: {"split": split, "problem": p.id, "answers": [], "rewards": []} for p in problems
            }
            # Evaluation has the seed of its own split and no iteration, so that models are compared on the same draws.
            for n, temperature in ((1, 0.0), (config.evaluation.samples, config.evaluation.temperature)):
                batches = graded_samples(
                    config,
                    draw,
                    tokenizer,
                    task,
                    problems,
                    n=n,
                    temperature=temperature,
                    seed=stage.seed,
                    label=split,
                )
                for row in (row for batch in batches for row in batch):
                    record = records[row["problem"]]
                    if n == 1 and temperature == 0:
                        record |= {"greedy": row["reward"], "flexible": row["flexible"], "response": row["response"]}
                    else:
                        answer = row["answer"]
                        record["answers"].append(task.vote(answer) if answer and hasattr(task, "vote") else answer)
                        record["rewards"].append(row["reward"])
            rows = list(records.values())
            summary[split] = metrics.summarize(rows)
            if hasattr(task, "chance"):
                summary[split]["chance"] = sum(task.chance(p) for p in problems) / len(problems)
            if hasattr(task, "judge_steps"):
                steps = [task.judge_steps(p, r["response"]) for p, r in zip(problems, rows, strict=True)]
                summary[split] |= metrics.step_summary(steps, [r["greedy"] for r in rows])
            judged += rows
    write_json(stage.path("evaluation.json"), summary)
    write_jsonl(stage.path("judged.jsonl"), judged)
    return summary, judged


def read_evaluation(stage: Stage) -> Record:
    return json.loads(stage.path("evaluation.json").read_text())
