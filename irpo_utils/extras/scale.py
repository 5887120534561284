"""A simulation of chunks that are drawn by many workers, for machines that nobody has tried: notebooks/32_scale.ipynb.

It does what `workers.py` does with a pool of Ray's actors: a worker gets the next chunk when the driver takes its
result, and the driver takes one result at a time and writes it. One worker is the stage's own process, which draws and
writes in turn. A worker that is lost comes back, loads the model anew and draws its chunk again.

What is left out: time on the network, machines that differ in more than their speed, and losses that come together.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workers:
    """Those that draw; times are in seconds."""

    count: int
    start: float = 0.0  # until one draws: its process starts and loads the model
    slow: float = 0.0  # share of workers, rounded, that take `factor` times as long
    factor: float = 1.0
    back: float = 0.0  # until the place of a lost one is filled, which then starts
    write: float = 0.0  # of the driver for each chunk


@dataclass(frozen=True)
class Outcome:
    """What came of it; all but `seconds` is summed over the workers."""

    seconds: float  # until the last chunk is written
    busy: float  # drawing what was kept
    lost: float  # drawing what was lost
    waited: float  # for the driver to take a result
    losses: tuple[int, ...]  # of each worker, while it had something to do


def lifetimes(per_hour: float, seed: int) -> Callable[[], float]:
    """Seconds until a worker is lost, drawn anew at each call, where each is lost `per_hour` times in an hour."""
    rng = np.random.default_rng(seed)
    return lambda: rng.exponential(3600 / per_hour) if per_hour else math.inf


def simulate(chunks: Sequence[float], workers: Workers, lifetime: Callable[[], float] = lambda: math.inf) -> Outcome:
    """Let workers draw `chunks`, given by the seconds that each takes an ordinary worker, in their order.

    Args:
        lifetime: seconds until a worker that starts is lost, asked whenever one starts; never by default.
    """
    pace = [workers.factor if i < round(workers.slow * workers.count) else 1.0 for i in range(workers.count)]
    gone = [lifetime() for _ in pace]  # when each worker will be lost
    losses, busy, lost, waited = [0] * len(pace), 0.0, 0.0, 0.0
    waiting = deque(chunks)

    def result(i: int, begin: float) -> tuple[float, int]:
        """When worker i has the result of the next chunk, which it gets at `begin`."""
        nonlocal busy, lost
        takes = pace[i] * waiting.popleft()
        while gone[i] < begin + takes:
            losses[i] += 1
            lost += max(0.0, gone[i] - begin)
            begin = max(begin, gone[i] + workers.back + workers.start)
            gone[i] += workers.back + lifetime()
        busy += takes
        return begin + takes, i

    results = [result(i, workers.start) for i in range(min(len(pace), len(chunks)))]
    heapq.heapify(results)
    driver = 0.0  # when it has written what it took
    while results:
        ready, i = heapq.heappop(results)
        taken = max(ready, driver)
        waited, driver = waited + taken - ready, taken + workers.write
        if waiting:
            heapq.heappush(results, result(i, driver if len(pace) == 1 else taken))
    return Outcome(driver, busy, lost, waited, tuple(losses))
