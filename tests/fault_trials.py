"""Faults in a run that is known: after each, the same stage or command ends with the same bytes.

    python tests/fault_trials.py RUN WHOLE PAGES COUNT SEED [commands]

RUN is a run's folder that is done and worked in, WHOLE a copy of it, PAGES a folder for the compiled library. A JSON
line is printed for each trial. Without `commands` a stage is run in a fork of this process, which has imported what it
needs; with it the driver, its kernels and its report. This process is started with the library (`Faults`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from faults import COUNTER, KINDS, Faults

from irpo_utils.files import ROOT, file_hash, read_yaml, remove
from irpo_utils.run.stages import method_seeds, plan
from irpo_utils.run.store import Stage, open_run

REPORT = ("metrics.csv", "table.txt")


def stages_of(run: Path) -> list[Stage]:
    config = open_run(run)
    return [stage for method, seed in method_seeds(config) for stage in plan(config, run, method, seed)]


def restore(run: Path, whole: Path) -> None:
    remove(run)
    shutil.copytree(whole, run)


def forget(stage: Stage) -> None:
    """As if the stage had not run."""
    for name in (*stage.writes(), f"{stage.name}.manifest.json", f"{stage.name}.ipynb"):
        remove(stage.folder / name)


def differences(stages: list[Stage], run: Path, whole: Path) -> list[str]:
    """What is not done, or not as it is in `whole`."""
    found = []
    for stage in stages:
        names = [(stage.folder / name).relative_to(run) for name in stage.writes()]
        found += [f"{stage.label()}: {line}" for line in stage.why_not_done()]
        found += [str(n) for n in names if not (run / n).exists() or file_hash(run / n) != file_hash(whole / n)]
    return found


def forked(work, log: Path) -> int:
    """Run `work` in a process of its own; returns its exit status."""
    pid = os.fork()
    if not pid:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        try:
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
            status = 3
        sys.stdout.flush()
        os._exit(status)
    return os.waitpid(pid, 0)[1]


class Trials:
    def __init__(self, run: Path, whole: Path, folder: Path):
        self.run, self.whole, self.log = run, whole, folder / "log"
        self.faults = Faults(folder, run)
        self.stages = list({stage.manifest_path(): stage for stage in stages_of(run)}.values())
        self.totals: dict[str, dict[str, int]] = {}

    def do(self, stage: Stage, again: bool) -> int:
        # A stage of its own, as in a notebook that is run again.
        own = type(stage)(self.run, stage.method, stage.seed, stage.iteration)

        def work() -> None:
            own.begin(again)
            own.run()
            own.finish()

        return forked(work, self.log)

    def prepare(self, stage: Stage, again: bool) -> None:
        restore(self.run, self.whole)
        if not again:
            forget(stage)

    def total(self, stage: Stage, kind: str) -> int:
        """How far the counter of a kind of fault comes in an undisturbed stage (a few more where it is done again)."""
        if stage.label() not in self.totals:
            self.prepare(stage, again=False)
            self.faults.set()
            assert self.do(stage, again=False) == 0, self.log.read_text()
            self.totals[stage.label()] = {kind: self.faults.total(kind) for kind in KINDS}
        return self.totals[stage.label()][kind]

    def of_a_stage(self, rng: random.Random) -> dict:
        stage, again = rng.choice(self.stages), rng.random() < 0.3
        kind = rng.choice([k for k in KINDS if k not in ("none", "terminate", "kill_driver")])
        at = rng.randint(1, max(1, self.total(stage, kind)))
        self.prepare(stage, again)
        self.faults.set(kind, at)
        status, happened = self.do(stage, again), self.faults["happened"]
        message = self.log.read_text()[-300:]
        self.faults.set()
        second = self.do(stage, again=False)
        wrong = differences([stage], self.run, self.whole)
        if second:
            wrong.append(f"the second time: {self.log.read_text()[-300:]}")
        where = f"{stage.label()}{', again' * again}"
        return {
            "where": where, "kind": kind, "at": at, "happened": happened, "status": status, "wrong": wrong,
            "message": message,
        }  # fmt: skip

    def of_a_command(self, rng: random.Random) -> dict:
        """The driver goes on from a stage; those behind it and what hangs on them are done with a fault among them."""
        first = rng.randrange(len(self.stages))
        kind = rng.choice(KINDS[1:])
        # Up to as many operations as two stages or so have: a fault that does not come tells nothing.
        most = {"bytes": 3_000_000, "renames": 40, "syncs": 40}.get(COUNTER.get(kind), 300)
        at = rng.randint(1, most)
        restore(self.run, self.whole)
        for stage in self.stages[first : first + 2]:
            forget(stage)
        self.faults.set(kind, at)
        status, message = self.command(with_faults=True)
        happened = self.faults["happened"]
        self.faults.set()
        second, again = self.command(with_faults=False)
        wrong = differences(self.stages, self.run, self.whole)
        wrong += [
            n for n in REPORT if not (self.run / n).exists() or file_hash(self.run / n) != file_hash(self.whole / n)
        ]
        if second:
            wrong.append(f"the second time: {again[-400:]}")
        if "Traceback" in message or (status > 0 and not message.strip()):  # below 0 it was killed, and can say nothing
            wrong.append("no plain message")
        where = f"command from {self.stages[first].label()}"
        return {
            "where": where, "kind": kind, "at": at, "happened": happened, "status": status, "wrong": wrong,
            "message": message[-300:],
        }  # fmt: skip

    def command(self, with_faults: bool) -> tuple[int, str]:
        raw = read_yaml(self.whole / "config.yaml")
        methods = ",".join(raw["methods"])
        command = [sys.executable, "-m", "irpo_utils", "micro", f"run={self.run.name}", f"methods={methods}"]
        command += [f"iterations={raw['iterations']}", f"jobs={min(2, len(raw['methods']))}", "sipf.pairs.eta=1e-6"]
        env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "FAULTS_PAGE")}
        with open(self.log, "w") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env | (self.faults.environment if with_faults else {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
            self.faults["driver"] = process.pid
            status = process.wait(timeout=900)
        return status, self.log.read_text()


def main(arguments: list[str]) -> None:
    run, whole, folder = map(Path, arguments[:3])
    trials, rng = Trials(run, whole, folder), random.Random(int(arguments[4]))
    commands = arguments[5:] == ["commands"]
    if not commands:
        import irpo_utils.extras.process.labels
        import irpo_utils.methods.sampler
        import irpo_utils.methods.trainer  # noqa: F401
    for number in range(int(arguments[3])):
        started = time.monotonic()
        facts = trials.of_a_command(rng) if commands else trials.of_a_stage(rng)
        print(json.dumps({"number": number, **facts, "seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
