"""04: greedy accuracy of M_t on dev and test, maj@k and pass@k on test; which steps are wrong where a task knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files import read_jsonl, write_json, write_jsonl
from ...metrics import step_summary, summarize
from ...model.records import Sample
from ...tasks import get_task
from ...tasks.base import Problem, Task
from ...tasks.records import further_tests
from ..store import Stage, problem_files

Record = dict[str, Any]


class EvaluateStage(Stage):
    name = "04_evaluate"
    draws = True

    def reads(self) -> dict[str, tuple[Path, str]]:
        return self.policy_input(self.iteration)

    def writes(self) -> tuple[str, ...]:
        return ("evaluation.json", "responses.jsonl")

    def parameters(self) -> dict[str, Any]:
        return (
            # What is trained on is left out of further test sets.
            self.task_parameters(unused="" if self.config.evaluation.test else "train")
            | self.base_parameters()
            | self.section("evaluation", without=() if self.config.evaluation.test else ("test_size",))
            | self.section("sampling", only=["max_new_tokens", "max_rows", "engine", "calculator"])
            | self.common_parameters()
        )

    def uses(self) -> list[str]:
        return [self.sampler.where]

    def configured_files(self) -> dict[str, str]:
        return super().configured_files() | problem_files(self.config.evaluation.test)

    def make(self) -> None:
        task = get_task(self.config.task)
        dev = {"dev": task.problems("dev")}
        tests = {"test": task.problems("test")} | further_tests(task, self.config.evaluation)
        # Evaluation has the seed of its own split and no iteration, so that models are compared on the same draws.
        config, options = self.config.evaluation, {"seed": self.seed, "greedy_too": True}
        options |= {"n": config.samples, "temperature": config.temperature}
        with self.open_sampler(task, [p for problems in (dev | tests).values() for p in problems]) as sampler:
            # Dev chooses by greedy answers, here as while training; samples of it would serve nothing.
            drawn = sampler.in_chunks(dev, self.partial / "dev", n=1, temperature=0.0, seed=self.seed)
            drawn |= sampler.in_chunks(tests, self.partial, **options)
        summary, responses = {}, []
        for split, problems in (dev | tests).items():
            rows = responses_of(task, split, problems, drawn[split])
            summary[split] = summarize(rows) | task_facts(task, problems, rows)
            responses += rows
        write_json(self.path("evaluation.json"), summary)
        write_jsonl(self.path("responses.jsonl"), responses)

    def result(self) -> tuple[Record, list[Record]]:
        """The summary of each split, and a record for each problem."""
        return self.facts("evaluation.json"), read_jsonl(self.path("responses.jsonl"), self.name)


def responses_of(task: Task, split: str, problems: list[Problem], drawn: list[Sample]) -> list[Record]:
    """A record for each problem: its greedy response, and, but for dev, the answers and rewards of its samples."""
    records: dict[str, Record] = {
        p.id: {"split": split, "problem": p.id, "answers": [], "rewards": []} for p in problems
    }
    for s in drawn:
        if s.sample < 0 or split == "dev":
            records[s.problem] |= {"greedy": s.reward, "flexible": s.flexible, "response": s.response}
        else:
            records[s.problem]["answers"].append(task.vote(s.answer) if s.answer else s.answer)
            records[s.problem]["rewards"].append(s.reward)
    return list(records.values())


def task_facts(task: Task, problems: list[Problem], rows: list[Record]) -> Record:
    """What else a task knows: the accuracy of guessing, and the truth of every step."""
    facts: Record = {}
    chances = [task.chance(p) for p in problems]
    if None not in chances:
        facts["chance"] = sum(chances) / len(problems)
    steps = [task.check_steps(p, r["response"]) for p, r in zip(problems, rows, strict=True)]
    if None not in steps:
        facts |= step_summary(steps, [r["greedy"] for r in rows])
    return facts
