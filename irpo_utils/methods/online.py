"""Online rounds: the policy that is trained draws its own pairs, every `train.sync_every` optimizer steps.

With 1 it is online; with as many as the round has steps, the pairs are drawn once; between lies semi-online (arXiv
2506.21495). The reference stays the model that the round began with.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ..files import write_json
from ..model.records import Pair, Record, Sample
from ..model.schedule import pair_order, sorted_in_batches
from ..tasks.base import Problem
from . import parts
from .sampler import Sampler, opened
from .select import audited, made
from .trainer import Training, dev_score


@dataclass(frozen=True)
class Draws:
    """The pairs of an online round. Each draw is kept in files, so that a training that was killed goes on with it."""

    sampler: Sampler  # of the policy that is trained
    problems: list[Problem]  # asked in turn; every pass over them has an order of its own
    selection: str
    batch: int  # pairs, or single responses, of an optimizer step
    temperature: float
    seed: int
    folder: Path

    def __call__(self, step: int) -> list[Pair]:
        """The pairs of the next `train.sync_every` steps, from the policy as it is after `step` steps."""
        path = self.folder / f"{step:06d}.jsonl"
        if not path.exists():
            pairs, counted = self.fresh(step)
            write_json(path.with_suffix(".json"), counted)
            Record.write(path, pairs)
        return Pair.read(path, "03c_online")

    def counted(self, before: int) -> dict[int, Counter[str]]:
        """What was counted in each draw before a step: the step that it came after -> the counts."""
        files = {int(file.stem): file for file in sorted(self.folder.glob("*.json"))}
        return {step: Counter(json.loads(file.read_text())) for step, file in files.items() if step < before}

    def fresh(self, step: int) -> tuple[list[Pair], Counter[str]]:
        """Pairs enough, and what was counted. Where a pass over all problems makes too few, they come several times.

        Raises:
            ValueError: a pass over all problems makes none.
        """
        config, earlier, counted = self.sampler.config, sum(self.counted(step).values(), Counter()), Counter()
        steps = min(config.train.sync_every, config.train.max_steps - step)
        wanted, pairs, tried = steps * self.batch, [], set()
        most = config.sampling.n if parts.part("selection", self.selection).signed else config.pairs.k
        while len(pairs) < wanted and len(tried) < len(self.problems):
            both = earlier + counted
            rate = max(both["made"] / both["tried"], 1 / len(self.problems)) if both["tried"] else most
            part, place = self.next_problems(both["place"], math.ceil((wanted - len(pairs)) / rate), tried)
            own, found = self.drawn(part, step)
            pairs += own
            counted += found + Counter(tried=len(part), place=place - both["place"], made=len(own))
            tried |= {p.id for p in part}
        if not pairs:
            raise ValueError(
                f"no pair can be made of {counted['samples']} samples after step {step}: "
                f"{counted['all_right']} problems have no wrong answer, {counted['none_right']} no right one; "
                "lower train.max_steps, or take other problems"
            )
        shuffled = random.Random(f"{self.seed}/{step}").sample(pairs, len(pairs))
        pairs = list(islice(cycle(shuffled), wanted))
        order = sorted_in_batches(list(range(wanted)), self.batch, lambda i: pair_order(pairs[i]))
        return [pairs[i] for i in order], counted

    def drawn(self, problems: list[Problem], step: int) -> tuple[list[Pair], Counter[str]]:
        """What the selection makes of fresh samples of some problems."""
        config = self.sampler.config
        label, seed = f"sampling after step {step}", self.seed * 1_000_000 + step
        batches = self.sampler.samples(
            problems, n=config.sampling.n, temperature=self.temperature, seed=seed, label=label
        )
        samples = Sample.by_problem(s for batch in batches for s in batch)
        in_order = {p.id: samples[p.id] for p in problems}
        pairs, counted = made(self.selection, in_order, self.sampler.prompts(problems), config.pairs, seed)
        counted["drawn_tokens"] = sum(len(s.token_ids) for own in samples.values() for s in own)
        return pairs, counted

    def next_problems(self, place: int, count: int, tried: set[str]) -> tuple[list[Problem], int]:
        """Up to `count` problems from `place` on in the passes over all, none of `tried`; and the place behind them."""
        found, count = {}, min(count, len(self.problems) - len(tried))
        while len(found) < count:
            turn, first = divmod(place, len(self.problems))
            order = random.Random(f"{self.seed}/{turn}").sample(self.problems, len(self.problems))
            for problem in order[first:]:
                if len(found) < count:
                    place += 1
                    found |= {problem.id: problem} if problem.id not in tried else {}
        return list(found.values()), place


@dataclass(frozen=True)
class OnlineTraining(Training):
    """A round's training that draws what it trains on: `pairs` is empty."""

    problems: list[Problem] = field(kw_only=True)
    temperature: float = field(kw_only=True)

    def run(self, show: Callable[[str], None] = print) -> dict[str, Any]:
        """As `Training.run`; leaves all that was drawn and its audit beside, in `pairs.jsonl` and `audit.json`."""
        train, dev = self.config.train, self.task.problems("dev")
        single = not self.choices.part("selection").pairs  # a response without a rejected one is half a pair
        with opened(self.config, None, self.task, [*self.problems, *dev]) as sampler:
            model = self.start_model()
            draws = Draws(
                sampler=sampler.on(model),
                problems=self.problems,
                selection=self.choices.selection,
                batch=train.batch * (1 + single),
                temperature=self.temperature,
                seed=self.order_seed,
                folder=self.folder / "draws",
            )
            facts = self.engine(
                model,
                draws(0),
                self.folder,
                score=lambda policy: dev_score(policy, sampler, dev),
                keep_reference=self.kept_scores,
                draw=draws,
                **self.options(show),
            )
        pairs = [pair for step in range(0, facts["steps"], train.sync_every) for pair in draws(step)]
        pairs = pairs[: facts["steps"] * draws.batch]
        each = draws.counted(before=facts["steps"])
        total = sum(each.values(), Counter())
        Record.write(self.folder / "pairs.jsonl", pairs)
        audit = audited(pairs, total, drawn=True) | {"drawn_tokens": total["drawn_tokens"]}
        write_json(self.folder / "audit.json", audit)
        shown = ("tried", "samples", "right", "drawn_tokens")
        counts = [{"step": step, **{name: own[name] for name in shown}} for step, own in each.items()]
        return facts | self.kept(self.folder, model) | {"draws": counts}
