"""Full disks, killed processes, failing renames: after any of them the same command ends with the same bytes.

`./run_all.sh --test -m long tests/test_faults.py` tries a thousand; FAULTS=100 as many as it says.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import OUTPUTS, ROOT, drive, remove_run
from faults import Faults, compiler

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not compiler(), reason="faults are injected by a small C library: a compiler, and Linux"
)
RUN = OUTPUTS / "test-faults"
COMMAND = (
    "micro",
    f"run={RUN.name}",
    "iterations=2",
    "jobs=2",
    "sipf.pairs.eta=1e-6",
)  # else micro is too small for SIPF


def trials(folder, count: int, seed: int, *level: str) -> list[dict]:
    """What came of so many faults; see `fault_trials.py`."""
    faults = Faults(folder, RUN)
    command = [sys.executable, str(ROOT / "tests" / "fault_trials.py"), str(RUN), str(folder / "whole"), str(folder)]
    rows, log = [], folder / "stderr"
    with log.open("w") as stderr, subprocess.Popen(
        [*command, str(count), str(seed), *level],
        cwd=ROOT,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1", **faults.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print({key: rows[-1][key] for key in ("number", "where", "kind", "at", "wrong")}, flush=True)  # with -s
    assert process.returncode == 0, log.read_text()[-2000:]
    return rows


@pytest.fixture
def whole(tmp_path, request):
    """A finished run to work in, and a copy of it to compare with, in the folder that is given back."""
    remove_run(RUN.name)
    methods = request.param
    if methods == "irpo,sft_gold":
        shutil.copytree(request.getfixturevalue("micro_run")[0], RUN)
    done = drive(*COMMAND, f"methods={methods}")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(RUN, tmp_path / "whole")
    yield tmp_path
    remove_run(RUN.name)


def check(rows: list[dict], count: int) -> None:
    assert len(rows) == count
    wrong = [row for row in rows if row["wrong"]]
    assert not wrong, json.dumps(wrong[:3], indent=1)
    came = Counter(row["kind"] for row in rows if row["happened"])
    print(f"{sum(came.values())} of {count} faults came: {dict(came)}")
    assert sum(came.values()) > 0.6 * count


@pytest.mark.parametrize("whole", ["irpo,sft_gold"], indirect=True)
def test_after_a_fault_a_stage_ends_with_the_same_bytes(whole):
    check(trials(whole, 12, 0), 12)


@pytest.mark.long
@pytest.mark.parametrize("whole", ["irpo,sft_gold"], indirect=True)
def test_after_a_fault_the_same_command_ends_with_the_same_bytes(whole):
    check(trials(whole, 1, 0, "commands"), 1)


@pytest.mark.long
@pytest.mark.parametrize("whole", ["irpo,sipf"], indirect=True)
def test_a_thousand_faults(whole):
    count = int(os.environ.get("FAULTS", "1000"))
    commands = count // 40
    check(trials(whole, count - commands, 1), count - commands)
    check(trials(whole, commands, 2, "commands"), commands)
