"""math-verify in worker processes that can be killed: limits on CPU time, on memory, and on the wall clock.

math-verify's own limits are signals, which work in a main thread only and do not stop native code. Here a worker
(`python -m irpo_utils.answers.verify`) loads math-verify once and forks a child, which reads a pair a line, writes 1 or
0 and the CPU time it took, and dies when its timer fires; the worker forks the next one in milliseconds.

Every check first gets `QUICK` seconds, which honest ones hardly ever exceed. Those that need more share a budget, the
shortest first, with `seconds` at most for each. So an answer that takes less than `QUICK` is decided whatever stands
beside it, and as long as the budget lasts, every verdict is what a limit of `seconds` alone would give. Where it does
not last, the checks that are left are undecided, which is neither right nor wrong, and are counted. All of these limits
are CPU time: a busy machine decides as an idle one, a slower one may leave more undecided.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

MEMORY = 2 << 30  # bytes of address space of a worker


# Seconds of CPU time: a check's first try, and what a file or a batch of samples may take beyond that, for all of its
# checks together. 20,000 checks that never end take QUICK each and the budget once.
QUICK = 0.2
BUDGET = 120.0
# What is known to take long has no first try: powers of powers of powers, powers and factorials of large numbers, sums
# and products, deep nests.
_COSTLY = re.compile(
    r"\^[^=,]{0,40}?\^[^=,]{0,40}?\^|[0-9]{4,}\)?\}?!|[!)}]!|\^\s?\{?\s?[0-9]{4,}|\)\s?\^\s?\{?\s?[0-9]{2,}"
    r"|\\(?:sum|prod|int)(?![a-z])|binom\{?[0-9]{4,}|(?:[({][^(){}]{0,9}){12}"
)


class Worker:
    """One process; `ask` gives its answer, or None when it ran out of time or died."""

    def __init__(self):
        self.process = None

    def ask(self, answer: str, gold: str, seconds: float) -> tuple[bool | None, float]:
        """(are they the same, seconds of CPU time that the answer took)"""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "irpo_utils.answers.verify"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            if not self._reply(120):  # "ready", after the imports
                raise RuntimeError(
                    "the symbolic check does not start; is math-verify installed? (python -m irpo_utils.answers.verify)"
                )
        try:
            self.process.stdin.write(json.dumps([answer, gold, seconds]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        # CPU time is the limit, so that a busy machine grades as an idle one; this one is for a worker that sleeps.
        reply = self._reply(seconds * 60 + 60).split()
        if not reply:
            self.close()
        return (reply[0] == b"1", float(reply[1])) if len(reply) == 2 else (None, seconds)

    def _reply(self, patience: float) -> bytes:
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        return self.process.stdout.readline() if ready else b""

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and its child
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self.process = None


class Verifier:
    """A few workers that share the questions.

    `seconds` is the CPU time that one question may take, `budget` what those that are not quick may take together.
    """

    def __init__(self, seconds: float = 5.0, workers: int | None = None, budget: float = BUDGET):
        self.seconds, self.budget = seconds, budget
        self.workers = [Worker() for _ in range(workers or max(1, min(4, os.cpu_count() or 1)))]
        self.gave_up = 0  # questions without an answer so far
        self.cut: set[tuple[str, str]] = set()  # those of the last call that the budget did not reach
        atexit.register(self.close)

    def __call__(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        """For every (answer, gold), whether math-verify finds them equal; None for one that it does not finish."""
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            idle.put(worker)
        found: dict[tuple[str, str], bool | None] = {}
        left, self.cut = self.budget, set()

        def ask(pair: tuple[str, str], seconds: float) -> float:
            worker = idle.get()
            try:
                found[pair], took = worker.ask(*pair, seconds)
                return took
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(self.workers)) as threads:
            asked = {pair: any(map(_COSTLY.search, pair)) for pair in pairs}
            quick = [pair for pair, costly in asked.items() if not costly]
            list(threads.map(lambda pair: ask(pair, min(QUICK, self.seconds)), quick))
            found |= {pair: None for pair, costly in asked.items() if costly}
            slow = sorted((p for p in asked if found[p] is None), key=lambda p: (asked[p], len(p[0]) + len(p[1])))
            if self.seconds > QUICK:
                while slow and left > 0:
                    part, slow = slow[: len(self.workers)], slow[len(self.workers) :]
                    left -= sum(threads.map(lambda pair: ask(pair, self.seconds), part))
                self.cut = set(slow)
        self.gave_up += sum(found[pair] is None for pair in pairs)
        return [found[pair] for pair in pairs]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def same(answer: str, gold: str) -> bool:
    """Whether two answers are mathematically equal. Constants must agree exactly, not to some decimals.

    math-verify compares numbers to six decimals, so that 3.14159265 would be pi and 1/2005! would be 1/2004!.
    """
    import sympy
    from math_verify import parse, verify

    one, two = (parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))
    if not one or not two:
        return False
    equal = verify(one, two, timeout_seconds=None)
    if not (isinstance(one[0], sympy.Expr) and isinstance(two[0], sympy.Expr)):
        return equal
    sides = (x[0].subs({s: sympy.I for s in x[0].free_symbols if s.name == "i"}) for x in (one, two))
    left, right = (sympy.nsimplify(side, rational=True) for side in sides)
    if not equal:  # it misses some forms of complex numbers
        return bool(left.has(sympy.I) and sympy.simplify(left - right) == 0)
    if left.free_symbols or right.free_symbols:
        return True
    gap, size = (abs(sympy.N(x, 40, maxn=400)) for x in (left - right, right))
    return bool(gap <= size * sympy.Float(10) ** -30)


def work() -> None:
    """A worker's life: it keeps one child that answers, and says "?" for the question that one died of."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    for pair in (("1+x", "x+1"), ("\\frac{1}{2}", "[1,2)"), ("\\sqrt{8}", "2\\sqrt{2}")):
        same(*pair)  # what is loaded at the first use is loaded before the first question's time runs
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    os.write(1, b"ready\n")
    while child := os.fork():
        _, status = os.waitpid(child, 0)
        if status == 0:  # no more questions
            return
        os.write(1, b"?\n")
    questions = sys.stdin.buffer.raw
    while line := questions.readline():  # unbuffered: the next child reads on where this one dies
        answer, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        started = time.process_time()
        try:
            found = same(answer, gold)
        except Exception:  # whatever a parser raises on sampled text, including RecursionError and MemoryError
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(1, f"{int(bool(found))} {time.process_time() - started:.4f}\n".encode())


if __name__ == "__main__":
    work()
