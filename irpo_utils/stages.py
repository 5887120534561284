"""What the stage notebooks call on the real data, each function one arrow of the loop."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import answers, evaluation, models, pairs, sampling, training
from .runs import Stage, read_jsonl, write_json, write_jsonl
from .tasks import Problem, Task, get_task

Record = dict[str, Any]


SAMPLE_FIELDS = ("problem", "response", "reward", "finished", "logp", "token_ids")


class Progress:
    """One line every few seconds on standard error: done, tokens per second, time left. No bars, which garble logs."""

    def __init__(self, label: str, every: float = 10.0):
        self.label, self.every, self.started = label, every, time.monotonic()
        self.shown = self.started

    def __call__(self, done: int, total: int, rate: float) -> None:
        now = time.monotonic()
        if now - self.shown > self.every:
            self.shown, left = now, (now - self.started) * (total - done) / max(1, done)
            print(
                f"{self.label}: {done}/{total} problems, {rate:,.0f} tokens/s, {left:.0f} s left",
                file=sys.stderr,
            )


def encode_prompts(task: Task, tokenizer, problems: list[Problem]) -> dict[str, list[int]]:
    """Problem id -> prompt token ids: through the chat template where there is one, else plain text. One BOS either way."""
    if not tokenizer.chat_template:
        return {p.id: tokenizer(task.prompt(p)).input_ids for p in problems}
    turns = ([{"role": "user", "content": task.prompt(p)}] for p in problems)
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return {p.id: tokenizer(t, add_special_tokens=False).input_ids for p, t in zip(problems, texts, strict=True)}


def encode_response(tokenizer, text: str) -> list[int]:
    """A response's token ids as the sampler would have drawn them: no BOS, EOS at the end."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def graded_samples(
    stage_config,
    model,
    tokenizer,
    task: Task,
    problems: list[Problem],
    *,
    n: int,
    temperature: float,
    seed: int,
    label: str,
) -> Iterator[list[Record]]:
    """Sample and grade, a batch of records at a time; each record is a line of samples.jsonl."""
    by_id = {p.id: p for p in problems}
    drawn = sampling.sample(
        model,
        encode_prompts(task, tokenizer, problems),
        n=n,
        temperature=temperature,
        seed=seed,
        eos_id=tokenizer.eos_token_id,
        max_new_tokens=stage_config.max_new_tokens,
        rows=stage_config.rows if n > 1 else min(256, stage_config.rows),
        progress=Progress(label),
    )
    for batch in drawn:
        rows = []
        for name, completions in batch.items():
            for i, c in enumerate(completions):
                text = tokenizer.decode(c.token_ids[:-1] if c.finished else c.token_ids)
                rows.append(
                    {
                        "problem": name,
                        "sample": i,
                        "response": text,
                        "reward": answers.reward(task, text, by_id[name].answer),
                        "finished": c.finished,
                        "logp": c.logp,
                        "token_ids": c.token_ids,
                    }
                )
        yield rows


def sample_stage(stage: Stage) -> list[Record]:
    """01: N graded samples of M_{t-1} for every training problem, a chunk at a time so that a kill loses one chunk."""
    config, task = stage.config, get_task(stage.config.task)
    tokenizer = models.load_tokenizer(config.model)
    problems = task.problems("train")
    model = None
    chunks = sorted(stage.partial.glob("chunk_*.jsonl"))
    # Chunks follow the sampler's own order, so that every batch is the same in a resumed run.
    prompts = encode_prompts(task, tokenizer, problems)
    order = sorted(problems, key=lambda p: (len(prompts[p.id]), p.id))
    size = max(1, config.sampling.rows // config.sampling.n) * 8
    for start in range(0, len(order), size):
        path = stage.partial / f"chunk_{start:07d}.jsonl"
        if path in chunks:
            continue
        model = model or models.load_policy(config.model, stage.input("policy"), threads=config.threads)
        rows = graded_samples(
            config.sampling,
            model,
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
    return records


def stage_seed(stage: Stage, purpose: int = 0) -> int:
    """A seed of its own for each (seed, iteration, purpose)."""
    return (stage.seed * 1000 + stage.iteration) * 10 + purpose


def gold_samples(task: Task, tokenizer, problems: list[Problem]) -> dict[str, Record]:
    """The gold solutions, in the form of samples; problems without one are left out."""
    return {
        p.id: {
            "response": p.solution,
            "token_ids": encode_response(tokenizer, p.solution),
            "logp": None,
            "reward": 1.0,
            "finished": True,
        }
        for p in problems
        if p.solution
    }


def pairs_stage(stage: Stage) -> tuple[list[Record], Record]:
    """02: pairs of the iteration, or the gold solutions for a method that trains on those; returns (pairs, audit)."""
    config, task = stage.config, get_task(stage.config.task)
    tokenizer = models.load_tokenizer(config.model)
    problems = task.problems("train")
    ids = encode_prompts(task, tokenizer, problems)
    prompts = {p.id: (task.prompt(p), ids[p.id]) for p in problems}
    if stage.choices.selection == "gold":
        rows, audit = pairs.gold_only(gold_samples(task, tokenizer, problems), prompts, config.pairs.max_tokens)
    else:
        samples: dict[str, list[Record]] = {}
        for record in read_jsonl(stage.input("samples"), "01_sample.ipynb", SAMPLE_FIELDS):
            samples.setdefault(record["problem"], []).append(record)
        gold = gold_samples(task, tokenizer, problems) if config.pairs.gold else None
        rows, audit = pairs.build_pairs(
            samples,
            prompts,
            gold,
            config.pairs.k,
            config.pairs.max_tokens,
            config.pairs.max_pairs,
            stage_seed(stage, 1),
        )
    write_jsonl(stage.path("pairs.jsonl"), rows)
    write_json(stage.path("audit.json"), audit)
    return rows, audit


def greedy_accuracy(config, model, tokenizer, task: Task, problems: list[Problem]) -> float:
    batches = graded_samples(config.sampling, model, tokenizer, task, problems, n=1, temperature=0, seed=0, label="dev")
    return sum(row["reward"] == 1 for batch in batches for row in batch) / len(problems)


def train_stage(stage: Stage, show: Callable[[str], None] = print) -> Record:
    """03: train M_t on the pairs, keep the step that is best on dev; returns the facts in training.json."""
    config, task = stage.config, get_task(stage.config.task)
    tokenizer = models.load_tokenizer(config.model)
    rows = read_jsonl(stage.input("pairs"), "02_pairs.ipynb")
    model = models.load_policy(
        config.model, stage.input("policy"), trainable=True, seed=stage.seed, threads=config.threads
    )
    dev = task.problems("dev")
    facts = training.train(
        model,
        rows,
        stage.partial,
        loss=stage.choices.loss,
        config=config.train,
        seed=stage_seed(stage, 2),
        sampled_by_start=stage.choices.start == "M_t" or stage.iteration == 1,
        score=lambda policy: greedy_accuracy(config, policy, tokenizer, task, dev),
        show=show,
    )
    facts["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write_jsonl(stage.path("steps.jsonl"), training.read_steps(stage.partial / "steps.jsonl"))
    write_json(stage.path("training.json"), facts)
    shutil.rmtree(stage.path("adapter.tmp"), ignore_errors=True)
    shutil.copytree(stage.partial / "best", stage.path("adapter.tmp"))
    stage.path("adapter.tmp").rename(stage.path("adapter"))
    return facts


def evaluate_stage(stage: Stage) -> tuple[Record, list[Record]]:
    """04: greedy, maj@k and pass@k on dev and test, and what is wrong step by step; returns (summary, records)."""
    config, task = stage.config, get_task(stage.config.task)
    tokenizer = models.load_tokenizer(config.model)
    model = models.load_policy(config.model, stage.input("policy"), threads=config.threads)
    summary, judged = {}, []
    for split in ("dev", "test"):
        problems = task.problems(split)
        records: dict[str, Record] = {
            p.id: {"split": split, "problem": p.id, "answers": [], "rewards": []} for p in problems
        }
        # Evaluation has the seed of its own split and no iteration, so that models are compared on the same draws.
        for n, temperature in ((1, 0.0), (config.evaluation.samples, config.evaluation.temperature)):
            batches = graded_samples(
                config.sampling,
                model,
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
                    record |= {"greedy": row["reward"], "response": row["response"]}
                else:
                    record["answers"].append(task.extract(row["response"]))
                    record["rewards"].append(row["reward"])
        rows = list(records.values())
        summary[split] = evaluation.summarize(rows)
        if hasattr(task, "judge_steps"):
            steps = [task.judge_steps(p, r["response"]) for p, r in zip(problems, rows, strict=True)]
            summary[split] |= evaluation.step_summary(steps, [r["greedy"] for r in rows])
        judged += rows
    write_json(stage.path("evaluation.json"), summary)
    write_jsonl(stage.path("judged.jsonl"), judged)
    return summary, judged


def read_evaluation(stage: Stage) -> Record:
    return json.loads(stage.path("evaluation.json").read_text())
