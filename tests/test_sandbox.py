"""Programs in the sandbox: hostile ones get the right verdict and leave nothing, and without walls none is run."""

import ctypes.util
import errno
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT
from hostile_programs import ATTACKS, CHEATS, DEATHS, TESTS, programs

from irpo_utils.extras.code import sandbox, syscalls, test_runner
from irpo_utils.extras.code.sandbox import ACCEPTED, ISOLATED, Job, Refused, Sandbox

ADD = ("add",)


@pytest.fixture(scope="module")
def walls(execution):
    if execution != ISOLATED:
        pytest.skip("bwrap is not installed or does not work here, so that nothing that could do harm is run")


@pytest.fixture
def filtered(walls):
    """The filter of system calls, and pyseccomp, that made it."""
    try:
        return syscalls.seccomp_filter(), pytest.importorskip("pyseccomp")
    except syscalls.Missing as why:
        pytest.skip(f"there is no filter of system calls: {why}")


@pytest.fixture
def host(tmp_path):
    """What a program would have to reach on the host, and a look at whether it did."""
    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "kept": tmp_path / "kept",
            "mark": tmp_path / "mark",
            "pid": os.getpid(),
            "port": server.getsockname()[1],
        }
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert (tmp_path / "kept").read_text() == "kept" and os.listdir(tmp_path) == ["kept"]


def strangers() -> set[int]:
    """Processes in another process namespace than this one, or with the test runner's command line."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            runner = b"What runs inside the sandbox" in (folder / "cmdline").read_bytes()
            if runner or os.readlink(folder / "ns/pid") != os.readlink("/proc/self/ns/pid"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def nothing_left(before: set[int], folders: set[str]) -> bool:
    for _ in range(50):  # the kernel takes a namespace down in its own time
        left = strangers() - before
        if not left and not {f for f in os.listdir(tempfile.gettempdir()) if f.startswith("irpo-")} - folders:
            return True
        time.sleep(0.1)
    return False


def grade(chosen, execution, **limits):
    before, folders = strangers(), {f for f in os.listdir(tempfile.gettempdir()) if f.startswith("irpo-")}
    passed = Sandbox(execution, **limits)([Job(p.program, TESTS, ADD) for p in chosen])
    wrong = [(p.name, p.right) for p, found in zip(chosen, passed, strict=True) if found != p.right]
    assert not wrong, wrong
    assert nothing_left(before, folders)


def test_every_hostile_program_gets_the_right_verdict_and_leaves_nothing(walls, host):
    chosen = programs(**host)
    assert len(chosen) >= 200 and len(ATTACKS) + len(DEATHS) + len(CHEATS) >= 100
    home = sorted(os.listdir(Path.home()))
    grade(chosen, ISOLATED, cpu=1, wall=4.0, workers=4)
    assert sorted(os.listdir(Path.home())) == home


def test_those_that_can_do_no_harm_get_it_without_walls_too(execution, host):
    chosen = [p for p in programs(**host) if p.harmless]
    if execution == ISOLATED:  # then the test above has had them all
        chosen = chosen[::4]
    grade(chosen, ACCEPTED, cpu=1, wall=4.0, workers=4)


def test_the_walls_are_what_stops_an_attack(host):
    """Two that only read get through without them, so that the test above tests something."""
    names = [f"{attack}, loading, a + b" for attack in ("reads a file of the host", "looks for the tests in files")]
    chosen = [p for p in programs(**host) if p.name in names]
    assert len(chosen) == 2
    assert Sandbox(ACCEPTED)([Job(p.program, TESTS, ADD) for p in chosen]) == [False, False]


def join_session_keyring():
    ctypes.CDLL(None).syscall(test_runner.KEYCTL[os.uname().machine], 1, None)


ERRNOS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def errno(number, *args):
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args)) < 0 else 0
"""


def test_every_call_on_the_list_is_denied(filtered):
    _, seccomp = filtered
    numbers = {}
    for number in range(syscalls.NUMBERS):
        with suppress(ValueError):
            numbers[seccomp.resolve_syscall(seccomp.Arch.NATIVE, number).decode()] = number
    denied = [number for name, number in numbers.items() if name in syscalls.DENIED]
    assert len(denied) >= 70
    tests = [
        *(f"assert errno({number}, *[-1] * 6) == {errno.EPERM}" for number in denied),
        *(f"assert errno({n}, *[-1] * 6) == {errno.ENOSYS}" for n in (numbers["clone3"], 600, syscalls.NUMBERS + 1)),
        *(f"assert errno({numbers['socket']}, {n}, 1, 0) == {errno.EAFNOSUPPORT}" for n in (2, 10, 16, 40, 1 << 32)),
        *(f"assert errno({numbers['clone']}, {1 << n}, 0, 0, 0, 0) == {errno.ENOSYS}" for n in (17, *range(25, 31))),
        f"assert errno({numbers['getpid']}) == 0",
    ]
    box = Sandbox(workers=1)
    assert box([Job(ERRNOS, "\n".join(tests), ("errno",))]) == [True] and box.filter
    wrong = [Job(ERRNOS, test, ("errno",)) for test in (tests[-1].replace("== 0", f"== {errno.EPERM}"), "assert 0")]
    assert box(wrong) == [False, False]


def without_pyseccomp(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    return "pyseccomp is not installed: pip install pyseccomp"


def without_libseccomp(monkeypatch):
    monkeypatch.delitem(sys.modules, "pyseccomp", raising=False)
    found = ctypes.util.find_library
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None if name == "seccomp" else found(name))
    return "libseccomp cannot be used: .*libseccomp; apt install libseccomp2"


def on_another_processor(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    return "it is made for x86_64 and aarch64, and this is riscv64"


def with_a_filter_that_the_kernel_refuses(monkeypatch):
    monkeypatch.setattr(syscalls, "seccomp_filter", lambda: bytes(8))
    return "bwrap does not work with it: .*SECCOMP"


@pytest.mark.parametrize(
    "how", [without_pyseccomp, without_libseccomp, on_another_processor, with_a_filter_that_the_kernel_refuses]
)
def test_without_a_filter_a_warning_says_so_once_and_keys_are_not_shared(how, walls, host, monkeypatch):
    if how is without_libseccomp:
        pytest.importorskip("pyseccomp")
    why = how(monkeypatch)
    sandbox.warn_once.cache_clear()
    chosen = [p for p in programs(**host) if p.name.startswith("shares a kernel key") or p.name == "threads"]
    assert len(chosen) == 5
    with pytest.warns(UserWarning, match=f"without a filter of system calls .{why}.*All of the kernel is open"):
        box = Sandbox()
        _ = box.command
    assert not box.filter
    with ThreadPoolExecutor(1, initializer=join_session_keyring) as thread:  # as a login does; keyrings are a thread's
        passed = list(thread.map(box.run, [Job(p.program, TESTS, ADD) for p in chosen]))
    assert passed == [p.right for p in chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = Sandbox().command


def test_a_fork_bomb_is_contained_and_the_next_program_runs(walls):
    before = strangers()
    box = Sandbox(cpu=1, wall=2.0, workers=1)
    assert not box.run(Job(FORKS, TESTS, ADD))
    most = 0
    run = subprocess.Popen([sys.executable, "-c", BOMB], cwd=ROOT, stdout=subprocess.PIPE)
    while run.poll() is None:
        most = max(most, len(strangers() - before))
        time.sleep(0.05)
    assert 2 <= most <= sandbox.PROCESSES + 3
    assert box.run(Job("def add(a, b): return a + b", TESTS, ADD))


FORKS = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
BOMB = f"from irpo_utils.extras.code.sandbox import *; Sandbox(cpu=1, wall=2.0).run(Job({FORKS!r}, '', ()))"


def test_nothing_outlives_a_grader_that_is_killed(walls):
    before = strangers()
    job = "Job('import time; time.sleep(1000)', '', ())"
    code = f"from irpo_utils.extras.code.sandbox import *; Sandbox(wall=3.0).run({job})"
    grader = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not len(strangers() - before) >= 2:
        time.sleep(0.05)
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    assert nothing_left(before, set(os.listdir(tempfile.gettempdir())))


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_without_walls_nothing_is_run_unless_the_user_says_so(how, tmp_path, monkeypatch):
    if how == "broken":
        (tmp_path / "bwrap").write_text(
            "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n"
        )
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / "bwrap") if how == "broken" else None)
    job = Job(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef add(a, b): return a + b", TESTS, ADD)
    message = "not installed" if how == "missing" else "No permissions to create a new namespace"
    with pytest.raises(Refused, match=f"{message}.*apt install bubblewrap.*task.execution=i-accept-the-risk"):
        Sandbox()([job])
    assert not (tmp_path / "ran").exists()
    assert Sandbox(ACCEPTED)([job]) == [True] and (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("program", "tests", "names", "before", "passes"),
    [
        ("class P:\n    def __init__(self, x): self.x = x\ndef f(p): return p.x", "p = P(1)\np.x = 3\nassert f(p) == 3", ("P", "f"), "", True),
        ("def f(t): return t(3.7)", "assert f(int) == 3", ("f",), "", True),
        ("def f(): return {(1, 2): {3}, None: b'x', 1.5: 2j, True: frozenset('a')}", "assert f() == {(1, 2): {3}, None: b'x', 1.5: 2j, True: frozenset('a')}", ("f",), "", True),
        ("def f(): return (1, [2])", "assert f() == [1, [2]]", ("f",), "", False),
        ("def f(x):\n    if x: raise ValueError", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False", ("f",), "", True),
        ("import os\ndef f(): os._exit(0)", "try: f()\nexcept: pass", ("f",), "", False),
        ("import os, threading\ndef f(): threading.Timer(0.05, os._exit, (0,)).start()", "f()\nimport time\ntime.sleep(0.3)\ntry: f()\nexcept: pass", ("f",), "", False),
        ("def f(x): return x\ndef g(x): return 0", "assert f(1) == g(1)", ("f",), "def g(x): return x", True),
        ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2]", ("f",), "", True),
        ("import random\nrandom.seed(0)\ndef f(): return [hash('a'), sorted({'a', 'b'})]", "assert f() == f()", ("f",), "", True),
        ("def f(*, a, b=2): return a - b", "assert f(a=1) == -1 and f(b=1, a=1) == 0", ("f",), "", True),
    ],
)  # fmt: skip
def test_what_goes_between_tests_and_program_keeps_its_type(program, tests, names, before, passes, execution):
    assert Sandbox(execution).run(Job(program, tests, names, before)) is passes


def test_programs_hash_alike_in_every_run(execution):
    job = Job("def f(): return list({'a', 'b', 'c', 'd', 'e'})", f"assert f() == {_order()}", ("f",))
    assert Sandbox(execution)([job, job]) == [True, True]


def _order() -> str:
    code = "print(list({'a', 'b', 'c', 'd', 'e'}))"
    return subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True
    ).stdout
