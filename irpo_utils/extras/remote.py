"""What engines in other processes share: a request for every problem, or every beginning, with a seed of its own.

Such an engine draws what `sampling.sample` draws, with other random numbers: other samples of the same distribution,
and greedy ones that agree up to rounding. Each problem has seeds of its own, so its samples do not depend on its batch
where logits do not: in float32.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..model.sampling import Completion, check_greedy, check_starts, stream

COLDEST = 0.01  # vLLM takes a temperature below this, 0 apart, for this one


class Request(NamedTuple):
    """Draw n responses that go on from these tokens."""

    prompt: list[int]  # with the beginning of the response, if it has one
    seed: int
    max_new_tokens: int


class Orders(NamedTuple):
    """How all responses of one call are drawn."""

    n: int
    temperature: float
    stops: list[int]


# The number of a request, and (token ids, log-probability) of its n responses
Answer = tuple[int, list[tuple[list[int], float]]]


def problem_seed(seed: int, problem_id: str) -> int:
    """The seed of the problem's first sample, whatever batch it is in; vLLM counts on from there."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()[:6], "little")


class Remote(ABC):
    """An engine that answers requests."""

    @abstractmethod
    def answers(self, requests: list[Request], orders: Orders) -> Iterator[Answer]:
        """The answer to every request, as soon as the last of its responses has ended."""

    def sample(
        self,
        prompts: dict[str, list[int]],
        *,
        n: int,
        temperature: float,
        seed: int,
        eos_id: int | Sequence[int],
        max_new_tokens: int,
        max_rows: int = 512,
        greedy_too: bool = False,
        progress: Callable[[int, int, float], None] | None = None,
        starts: dict[str, list[list[int]]] | None = None,
    ) -> Iterator[dict[str, list[Completion]]]:
        """Sample `n` responses for every prompt, or beginning, with the arguments and completions of `sampling.sample`.

        The engine gets all prompts and fills its own batches (of up to `sampling.max_rows` responses). `max_rows` is
        about how many responses are yielded at a time, a problem's together, in the order in which problems are done. A
        beginning is one more part of the prompt, whose cache the engine itself shares.

        Raises:
            ValueError: greedy decoding with n > 1, or a temperature that the engine would change.
        """
        check_greedy(n, temperature)
        if 0 < temperature < COLDEST:
            raise ValueError(f"vLLM samples at a temperature of at least {COLDEST}, not {temperature}; 0 is greedy")
        if greedy_too:
            options: dict[str, Any] = {"seed": seed, "eos_id": eos_id, "max_new_tokens": max_new_tokens}
            options |= {"max_rows": max_rows, "starts": starts}
            first: dict[str, list[Completion]] = {}
            for batch in self.sample(prompts, n=1, temperature=0, **options):
                first |= batch
            for batch in self.sample(prompts, n=n, temperature=temperature, progress=progress, **options):
                yield {name: with_greedy(first[name], drawn, n) for name, drawn in batch.items()}
            return
        names = sorted(prompts, key=lambda name: (len(prompts[name]), name))
        stops = [eos_id] if isinstance(eos_id, int) else list(eos_id)
        begin = {name: [[]] for name in prompts} if starts is None else starts
        check_starts(begin, prompts, stops, max_new_tokens)
        asked = [(name, start) for name in names for start in begin[name]]
        requests = [
            Request(prompts[name] + start, problem_seed(seed, stream(name, start)), max_new_tokens - len(start))
            for name, start in asked
        ]
        batch: dict[str, list[Completion]] = {}
        parts: dict[str, dict[int, list[Completion]]] = {name: {} for name in names}  # of problems that are not done
        started, tokens, done = time.perf_counter(), 0, 0
        for number, drawn in self.answers(requests, Orders(n, temperature, stops)):
            name, start = asked[number]
            parts[name][number] = [Completion(start + ids, logp, ids[-1] in stops) for ids, logp in drawn]
            tokens += sum(len(ids) for ids, _ in drawn)
            if len(parts[name]) < len(begin[name]):
                continue
            done += 1
            batch[name] = [c for _, completions in sorted(parts.pop(name).items()) for c in completions]
            if sum(map(len, batch.values())) >= max_rows or done == len(names):
                if progress:
                    progress(done, len(names), tokens / (time.perf_counter() - started))
                yield batch
                batch = {}


def with_greedy(greedy: list[Completion], drawn: list[Completion], n: int) -> list[Completion]:
    """The completions of a problem's beginnings, each one's greedy response before its `n` that were drawn."""
    return [c for i, one in enumerate(greedy) for c in (one, *drawn[i * n : (i + 1) * n])]
