"""math-verify in worker processes that can be killed: a limit on CPU time, on memory, and on the wall clock.

math-verify's own limits are signals, which work in a main thread only and do not stop native code. Here a worker
(`python -m irpo_utils.answers.verify`) reads a pair a line, writes 1 or 0, and dies when its CPU timer fires. A hostile
answer (a power tower) costs one worker, which the next question starts anew.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

MEMORY = 2 << 30  # bytes of address space of a worker


class Worker:
    """One process; `ask` gives its answer, or None when it ran out of time or died."""

    def __init__(self, seconds: float):
        self.seconds, self.process = seconds, None

    def ask(self, answer: str, gold: str) -> bool | None:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "irpo_utils.answers.verify", str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if not self._reply(120):  # "ready", after the imports
                raise RuntimeError(
                    "the symbolic check does not start; is math-verify installed? (python -m irpo_utils.answers.verify)"
                )
        try:
            self.process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        # CPU time is the limit, so that a busy machine grades as an idle one; this one is for a worker that sleeps.
        reply = self._reply(self.seconds * 60)
        if reply not in (b"0\n", b"1\n"):
            self.close()
            return None
        return reply == b"1\n"

    def _reply(self, patience: float) -> bytes:
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        return self.process.stdout.readline() if ready else b""

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self.process = None


class Verifier:
    """A few workers that share the questions. `seconds` is the CPU time that one question may take."""

    def __init__(self, seconds: float):
        count = max(1, min(4, os.cpu_count() or 1))
        self.workers = [Worker(seconds) for _ in range(count)]
        self.gave_up = 0  # questions without an answer so far
        atexit.register(self.close)

    def __call__(self, pairs: list[tuple[str, str]]) -> list[bool]:
        """For every (answer, gold), whether math-verify finds them equal; one that it does not finish is a no."""
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            idle.put(worker)

        def ask(pair: tuple[str, str]) -> bool | None:
            worker = idle.get()
            try:
                return worker.ask(*pair)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(self.workers)) as threads:
            found = list(threads.map(ask, pairs))
        self.gave_up += found.count(None)
        return [bool(result) for result in found]

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


def work(seconds: float) -> None:
    """A worker's life: a pair a line in, 1 or 0 a line out."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401 - loaded before the first question's time runs

    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer, gold = json.loads(line)
        try:
            found = same(answer, gold)
        except Exception:  # whatever a parser raises on sampled text, including RecursionError and MemoryError
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(bool(found)), flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
