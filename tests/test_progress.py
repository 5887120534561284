"""How far it is: counts within counts, the file of a stage, a terminal, a log, a live notebook."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from conftest import OUTPUTS, ROOT, drive, remove_run
from jupyter_client.manager import start_new_kernel

from irpo_utils import progress
from irpo_utils.progress import counting, described, duration, kept, share
from irpo_utils.run import watch
from irpo_utils.run.presets import load_preset
from irpo_utils.run.stages import PairsStage

RUN = "test-progress"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """Every call is written."""
    monkeypatch.setattr(progress, "EVERY", 0.0)


def test_a_part_counts_for_as_many_units_as_it_is_worth(tmp_path):
    """Two of four chunks, 30 of 60 problems, and half of a batch of ten: 2 + (30 + 5) / 60 of 4."""
    with (
        kept(tmp_path / "counts", "who"),
        counting("all", 4, "parts", done=1) as chunks,
        counting("chunk", 60, "problems") as problems,
        counting("", 8, worth=10) as steps,
    ):
        chunks(2), problems(30), steps(4)
        found = progress.read(tmp_path / "counts", 0.0)
        assert found["label"] == "who" and found["process"] == os.getpid()
        assert share(found["counts"]) == pytest.approx((2 + 35 / 60) / 4)
        assert re.fullmatch(
            r" 65 %  chunk: 30/60 problems, [\d,.]+ problems/s, about 0 s left", described(found["counts"])
        )
    assert not (tmp_path / "counts").exists()


def test_what_was_done_before_says_nothing_of_the_pace():
    now = time.time()
    count = {"label": "training", "total": 60, "unit": "steps", "worth": 1, "note": "", "started": now - 40}
    assert described([count | {"done": 40, "first": 40}]) == " 67 %  training: 40/60 steps"
    slow = described([count | {"done": 50, "first": 40}])
    assert slow == " 83 %  training: 50/60 steps, 4.0 s each, about 40 s left"
    dev = {
        "label": "dev",
        "total": 9,
        "unit": "problems",
        "worth": 1,
        "note": "",
        "started": now,
        "done": 0,
        "first": 0,
    }
    inside = described([count | {"done": 40, "first": 40}, dev])
    assert inside == " 67 %  training: 40/60 steps, dev: 0/9 problems"
    assert [duration(s) for s in (8, 99, 600, 30_000)] == ["8 s", "99 s", "10 min", "8.3 h"]


def test_a_folder_that_is_gone_or_full_fails_nothing(tmp_path, monkeypatch):
    with kept(tmp_path / "gone" / "counts", "who"), counting("all", 2, "parts") as count:
        count()
    monkeypatch.setattr(progress.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with kept(tmp_path / "counts", "who"), counting("all", 2, "parts") as count:
        count()
    for text in ("", "{", "[]", '{"written": "x"}', '{"written": 9e9, "counts": []}'):
        (tmp_path / "counts").write_text(text)
        assert progress.read(tmp_path / "counts", 0.0) is None


def test_counts_of_an_earlier_attempt_are_not_shown(tmp_path):
    stage = PairsStage(tmp_path, "irpo", 0, 1, load_preset("micro"))
    stage.partial_folder().mkdir(parents=True)
    text, before = watch.of_stage(stage), time.time()
    with kept(stage.partial_folder() / "progress.json", stage.label()), counting("pairing", 8, "pairs") as count:
        count(2)
        assert text(before, False).startswith("irpo, seed 0, iteration 1, 02_pairs: 25 %  pairing: 2/8 pairs")
        assert text(before, True).startswith("█████" + 15 * "░" + "  25 %  pairing: 2/8 pairs")
        assert text(time.time() + 1, False) == "irpo, seed 0, iteration 1, 02_pairs: at work for -1 s"


def test_one_line_for_several_stages_that_live(tmp_path):
    counts = [{"label": "x", "total": 4, "unit": "parts", "done": 1, "first": 0, "worth": 1, "note": "", "started": 0}]
    for folder, process in (
        ("m0/seed_0", os.getpid()),
        ("irpo/seed_1/iteration_2", os.getpid()),
        ("dpo/seed_0/iteration_1", 1 << 30),
    ):
        file = tmp_path / folder / ".03_train.partial" / "progress.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"label": folder, "process": process, "written": 1.0, "counts": counts}))
    assert watch.of_run(tmp_path)(0.0, True) == "irpo/seed_1/iteration_2 25 % | m0/seed_0 25 %"


def test_a_log_has_plain_lines_and_the_executed_copy_none(monkeypatch):
    """Started from an open notebook, too, whose name the kernels of the driver must not inherit."""
    for name in ("FIRST", "AGAIN", "DRAWN"):
        monkeypatch.setattr(watch, name, 0.05)
    monkeypatch.setenv("JPY_SESSION_NAME", "/somebody/open.ipynb")
    remove_run(RUN)
    try:
        done = drive("micro", f"run={RUN}", "iterations=1", "task.train_size=300")
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("irpo, seed 0, ")]
        counted = r"iteration 1, \d\d_\w+: +\d+ %  [^:]+: \d+/\d+ (parts|problems|batches|steps)"
        assert any(re.search(counted, line) for line in lines), done.stderr
        assert any("iteration 0, 04_evaluate: at work for" in x for x in lines)
        assert not CONTROL.search(done.stderr)
        copies = list((OUTPUTS / RUN).rglob("*.ipynb"))
        outputs = [json.dumps(c.get("outputs")) for f in copies for c in json.loads(f.read_text())["cells"]]
        assert len(copies) == 6 and not [o for o in outputs if "tokens/s" in o or " left" in o or "stderr" in o]
        assert not list((OUTPUTS / RUN).rglob("progress.json"))
        manifests = [f.read_text() for f in (OUTPUTS / RUN).rglob("*.manifest.json")]
        assert manifests and not [m for m in manifests if "progress" in m]
    finally:
        remove_run(RUN)


def terminal_of(*arguments: str):
    """The driver on a terminal of its own: the process, and what it shows."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "irpo_utils", *arguments]
    options = {"stdin": subprocess.DEVNULL, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TERM": "xterm"}, **options)
    os.close(theirs)
    return process, open(ours, "rb", buffering=0)


@pytest.mark.parametrize("jobs", ["jobs=1", "jobs=2"])
def test_a_terminal_shows_progress_within_ten_seconds(jobs):
    remove_run(RUN)
    process, screen = terminal_of(
        "micro", f"run={RUN}", "iterations=1", "methods=irpo,sft_gold", "task.train_size=300", jobs
    )
    stop = threading.Timer(240, process.kill)
    stop.start()
    shown, begun, first = b"", None, None
    wanted = (
        r"\r█*░* +\d+ %  [^\n]*\d+/\d+ (parts|problems|batches|steps)"
        if jobs == "jobs=1"
        else r"\r[^\n]*, \d\d_\w+ \d+ %"
    )
    try:
        with closing(screen):
            while not re.search(wanted, shown.decode(errors="ignore")):
                shown += os.read(screen.fileno(), 4096)  # raises where the driver has ended
                begun = begun or (time.monotonic() if b"[1/" in shown else None)
                first = first or (time.monotonic() if b"at work for " in shown or b" %" in shown else None)
        assert begun and first - begun < 10
        assert b"\x1b[K" in shown
    finally:
        stop.cancel()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        remove_run(RUN)


SLOW = """
import time
from irpo_utils.progress import counting
with counting("reading", 4, "pages") as count:
    for page in range(4):
        count(page)
        time.sleep(0.7)
"""


@pytest.mark.parametrize("live", [True, False])
def test_a_live_notebook_has_a_line_that_is_gone_in_the_end(live):
    env = {name: value for name, value in os.environ.items() if name != "JPY_SESSION_NAME"}
    manager, client = start_new_kernel(env=env | ({"JPY_SESSION_NAME": "/open.ipynb"} if live else {}), cwd=str(ROOT))
    found = []
    try:
        client.execute_interactive(SLOW, output_hook=found.append, timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    texts = [m["content"]["data"]["text/plain"] for m in found if m["msg_type"].endswith("display_data")]
    assert not [m for m in found if m["msg_type"] in ("error", "stream")]
    if live:
        assert re.fullmatch(r" 50 %  reading: 2/4 pages, 1\.\d pages/s, about \d s left", texts[0])
        assert (
            texts[-1] == "" and [m["msg_type"] for m in found if "display" in m["msg_type"]].count("display_data") == 1
        )
    else:
        assert texts == []
