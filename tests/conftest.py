"""Shared fixtures: the shipped seed model and a micro run made once by the driver."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock

from irpo_utils.__main__ import main
from irpo_utils.extras.code.sandbox import ACCEPTED, ISOLATED, Refused, Sandbox
from irpo_utils.model import load
from irpo_utils.run.presets import load_preset
from irpo_utils.tasks import get_task

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
OUTPUTS = ROOT / "outputs"
DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that two processes end at about the same time."""
    long = (
        "test_run",
        "test_real",
        "test_faults",
        "test_house",
        "test_kept",
        "test_own_parts",
        "test_family",
        "test_workers",
        "test_processes",
    )
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


@pytest.fixture(scope="session")
def config():
    return load_preset("micro")


@pytest.fixture(scope="session")
def tokenizer(config):
    return load.load_tokenizer(config.model)


@pytest.fixture(scope="session")
def seed_model(config):
    return load.load_policy(config.model, threads=1)


@pytest.fixture(scope="session")
def task(config):
    return get_task(config.task)


def drive_apart(*arguments: str) -> subprocess.CompletedProcess:
    """The driver in a process of its own, without a terminal or standard input."""
    command = [sys.executable, "-m", "irpo_utils", *arguments]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def drive(*arguments: str) -> subprocess.CompletedProcess:
    """The driver in this process: kernels are forked from one that stays, which has imported their libraries once.

    One job, unless more are asked for: others have processes of their own, which import them again.
    """
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    out, err = io.StringIO(), io.StringIO()
    try:
        alone = mock.patch("irpo_utils.run.driver.default_jobs", return_value=1)
        with alone, mock.patch.dict(os.environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(arguments))
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def remove_run(name: str) -> None:
    shutil.rmtree(ROOT / "outputs" / name, ignore_errors=True)


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory):
    """A finished run of the micro preset with two methods, made once and copied for each of the processes that test."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    shared = tmp_path_factory.getbasetemp()
    shared, name = (shared.parent if worker else shared) / "micro", f"test-micro{worker}"
    remove_run(name)
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            done = drive_apart("micro", f"run={name}", "methods=irpo,sft_gold", "iterations=2", "jobs=2")
            assert done.returncode == 0, done.stdout + done.stderr
            Path(f"{shared}.stdout").write_text(done.stdout)
            shutil.move(OUTPUTS / name, shared)
    shutil.copytree(shared, OUTPUTS / name)
    yield OUTPUTS / name, Path(f"{shared}.stdout").read_text()
    remove_run(name)


@pytest.fixture(scope="session")
def execution():
    """How programs are run here that are known to mean no harm: isolated, where that works."""
    try:
        _ = Sandbox().command
    except Refused:
        return ACCEPTED
    return ISOLATED


def pytest_terminal_summary(terminalreporter):
    """One line that says what was skipped, and why."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.write_line("skipped: " + "; ".join(f"{count} ({why})" for why, count in reasons.items()))
