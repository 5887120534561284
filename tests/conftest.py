"""Shared fixtures: the shipped seed model and a micro run made once by the driver."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from irpo_utils.extras.code.sandbox import ACCEPTED, ISOLATED, Refused, Sandbox
from irpo_utils.model import load
from irpo_utils.run.presets import load_preset
from irpo_utils.tasks import get_task

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
OUTPUTS = ROOT / "outputs"
DATA = ROOT.parent / "shared" / "data"


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


def drive(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    """The driver in a process of its own, without a terminal or standard input."""
    return subprocess.run(
        [sys.executable, "-m", "irpo_utils", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **kwargs,
    )


def remove_run(name: str) -> None:
    import shutil

    shutil.rmtree(ROOT / "outputs" / name, ignore_errors=True)


@pytest.fixture(scope="session")
def micro_run():
    """A finished run of the micro preset with two methods, in a folder of its own."""
    name = f"test-micro{os.environ.get('PYTEST_XDIST_WORKER', '')}"  # workers run side by side
    remove_run(name)
    done = drive("micro", f"run={name}", "methods=irpo,sft_gold", "iterations=2", "jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    yield OUTPUTS / name, done
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
