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

import psutil
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
            runner = b"# test_runner.py" in (folder / "cmdline").read_bytes()
            if runner or os.readlink(folder / "ns/pid") != os.readlink("/proc/self/ns/pid"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def folders_of_programs() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("irpo-")}


def nothing_left(before: set[int], folders: set[str]) -> bool:
    """Whether all that has come goes again; other tests' programs, which may run beside these, come and go as well."""
    processes, left = strangers() - before, folders_of_programs() - folders
    for _ in range(100):  # the kernel takes a namespace down in its own time
        if not processes and not left:
            return True
        time.sleep(0.1)
        processes &= strangers()
        left &= folders_of_programs()
    return False


def descendants(process: subprocess.Popen) -> int:
    with suppress(psutil.NoSuchProcess):
        return len(psutil.Process(process.pid).children(recursive=True))
    return 0


def grade(chosen, execution, **limits):
    before, folders = strangers(), folders_of_programs()
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
    box = Sandbox(cpu=1, wall=2.0, workers=1)
    assert not box.run(Job(FORKS, TESTS, ADD))
    most = 0
    run = subprocess.Popen([sys.executable, "-c", BOMB], cwd=ROOT, stdout=subprocess.PIPE)
    while run.poll() is None:
        most = max(most, descendants(run))
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
    while not descendants(grader) >= 2:
        time.sleep(0.05)
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    assert nothing_left(before, folders_of_programs())


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


HEADS = {
    "named": "from collections import namedtuple\nP = namedtuple('P', 'x y')\n",
    "data": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int\n",
    "lies": "class E:\n    def __getattr__(self, name): return 5\n"
    + "".join(
        f"    def __{name}__(self, *a): return {value}\n"
        for value, names in {
            "True": "eq lt le gt ge contains",
            "False": "ne",
            "0": "sub rsub add radd mul rmul truediv mod neg abs float int index round",
        }.items()
        for name in names.split()
    ),
}
SERVED = {
    # what a program changes
    "a list": ("def f(x): x.append(1)", "x = [3]\nassert f(x) is None and x == [3, 1]"),
    "a list that it sorts": ("def f(x): x.sort()\n", "x = [3, 1, 2]\nf(x)\nassert x == [1, 2, 3]"),
    "a list in a list": ("def f(x): x[0][0] = 9", "row = [1, 2]\nx = [row, row]\nf(x)\nassert row == [9, 2] and x[1] is row"),
    "a list in a tuple, by name": ("def f(*, x): x[0].append(1)", "x = [1]\nf(x=(x, 2))\nassert x == [1, 1]"),
    "a list by one that is new": ("def f(x): x[:] = [[x[0]]]", "x = [[1]]\nrow = x[0]\nf(x)\nassert x == [[[1]]] and x[0][0] is row"),
    "a dict": ("def f(x):\n    del x['a']\n    x['c'] = [1]", "x = {'a': 1, 'b': 2}\nf(x)\nassert x == {'b': 2, 'c': [1]}"),
    "a set": ("def f(x): x -= {1}", "x = {1, 2}\nf(x)\nassert x == {2}"),
    "a bytearray": ("def f(x): x[0] = 65", "x = bytearray(b'ba')\nf(x)\nassert x == b'Aa' and type(x) is bytearray"),
    "a deque": ("def f(x): x.rotate(1)", "from collections import deque\nx = deque([1, 2, 3], 3)\nf(x)\nassert x == deque([3, 1, 2]) and x.maxlen == 3"),
    "a defaultdict": ("def f(x): x['a'].append(1)", "from collections import defaultdict\nx = defaultdict(list)\nf(x)\nassert x == {'a': [1]} and x['b'] == []"),
    "a Counter": ("def f(x): x.update('ab')", "from collections import Counter\nx = Counter('a')\nf(x)\nassert x == Counter('aab') and x['z'] == 0"),
    "one of two arguments": ("def f(x, y): y += x", "x, y = [1], [2]\nf(x, y)\nassert (x, y) == ([1], [2, 1])"),
    "the same argument twice": ("def f(x, y):\n    x.append(1)\n    return x is y and len(y)", "x = []\nassert f(x, x) == 1 and x == [1] and f([], []) is False"),
    "an argument, before it fails": ("def f(x):\n    x.append(1)\n    raise ValueError", "x = []\ntry: f(x)\nexcept ValueError: assert x == [1]\nelse: assert False"),
    "an argument that comes back": ("def f(x): return [x, x[:]]", "x = [1]\na, b = f(x)\nassert a is x and b == x and b is not x"),
    "nothing": ("def f(x): return sorted(x)", "x = [2, 1]\nassert f(x) == [1, 2] and x == [2, 1]"),
    "a list that holds itself": ("def f(x): return x[0] is x and x[1]", "x = [0, 7]\nx[0] = x\nassert f(x) == 7"),
    # iterators
    "a generator and next": ("def f():\n    yield 1\n    yield 2", "g = f()\nassert next(g) == 1 and next(g) == 2 and next(g, None) is None\ntry: next(g)\nexcept StopIteration: pass\nelse: assert False"),
    "a generator without an end": ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1", "from itertools import islice\nassert list(islice(f(), 5)) == [0, 1, 2, 3, 4]\nfor x in f():\n    if x == 300: break\nassert x == 300"),
    "a generator that searches": ("def f():\n    yield from range(60)\n    while True: pass", "for x in f():\n    if x == 59: break\nassert x == 59"),
    "a generator of many": ("def f(): return (str(i) for i in range(50000))", "assert list(f()) == [str(i) for i in range(50000)]"),
    "a generator that fails": ("def f():\n    yield from range(200)\n    raise KeyError('k')", "n = 0\ntry:\n    for x in f(): n += 1\nexcept KeyError as error: assert (n, error.args) == (200, ('k',))\nelse: assert False"),
    "map, zip, range, views": ("def f(): return [map(str, [1]), zip('a', 'b'), range(3), {1: 2}.keys(), {1: 2}.items(), {1: 2}.values()]", "m, z, r, k, i, v = f()\nassert (list(m), list(z)) == (['1'], [('a', 'b')]) and (r, k, i, list(v)) == (range(3), {1}, {(1, 2)}, [2])"),
    "an iterator that goes on": ("def f(): return iter([1, 2, 3])", "i = f()\nassert next(i) == 1 and list(i) == [2, 3] and list(i) == []"),
    # values
    "Decimal": ("from decimal import Decimal as D\ndef f(x): return x / D(3)", "from decimal import Decimal\nassert f(Decimal(1)) == Decimal(1) / 3 and f(Decimal(3)) == 1 and str(f(Decimal('3.00'))) == '1.00'"),
    "Fraction": ("from fractions import Fraction\ndef f(x): return {x + 1: [Fraction(1, 3)]}", "from fractions import Fraction as F\nassert f(F(1, 2)) == {F(3, 2): [F(1, 3)]}"),
    "dates": ("from datetime import *\ndef f(x): return [x + timedelta(1), x.time(), x.date(), x.astimezone(timezone.utc), timedelta(2, 3)]", "from datetime import *\nx = datetime(2020, 2, 28, 1, 2, 3, 4, timezone(timedelta(hours=1)))\nassert f(x) == [x + timedelta(1), time(1, 2, 3, 4), date(2020, 2, 28), x, timedelta(2, 3)]"),
    "complex, sets and bytes": ("def f(x): return (x, {1, 2}, frozenset({3}), b'a', bytearray(b'b'))", "assert f(2j) == (2j, {1, 2}, frozenset({3}), b'a', b'b')"),
    "an OrderedDict, in order": ("from collections import OrderedDict as O\ndef f(): return O([(1, 2), (3, 4)])", "from collections import OrderedDict\nassert f() == OrderedDict([(1, 2), (3, 4)]) != OrderedDict([(3, 4), (1, 2)])"),
    "a deque as the answer": ("from collections import deque\ndef f(): return deque([1, 2])", "from collections import deque\nassert f() == deque([1, 2]) and f() != [1, 2]"),
    "a defaultdict of its own": ("from collections import defaultdict\ndef f(): return defaultdict(lambda: 7, a=1)", "assert f() == {'a': 1} and f()['z'] == 7"),
    "a named tuple": (HEADS["named"] + "def f(p=P(1, 2)): return p._replace(x=p.x + 1)", "p = f()\nassert p == (2, 2) == (p.x, p.y) and f(p) == (3, 2) and f(p).x == 3 and p._fields == ('x', 'y')"),
    # objects of the program's
    "a dataclass, by field": (HEADS["data"] + "def f(): return P(1, 2)", "p = f()\nassert (p.x, p.y, str(p)) == (1, 2, 'P(x=1, y=2)') and p == p and p != f()"),
    "len, items, text, truth": ("class S:\n    def __init__(self): self.a = {}\n    def __len__(self): return len(self.a)\n    def __getitem__(self, k): return self.a[k]\n    def __setitem__(self, k, v): self.a[k] = v\n    def __delitem__(self, k): del self.a[k]\n    def __str__(self): return 'S'\n    def __iter__(self): return iter(self.a)\ndef f(): return S()", "s = f()\nassert not s and len(s) == 0\ns['k'] = [1]\nassert s and s['k'] == [1] and str(s) == f'{s}' == 'S' and 'k' in s and list(s) == ['k']\ndel s['k']\ntry: s['k']\nexcept KeyError as e: assert e.args == ('k',)\nelse: assert False"),
    "isinstance": ("class S: pass\nclass T(S): pass\ndef f(): return [S, T, T()]", "S, T, t = f()\nassert isinstance(t, S) and isinstance(t, T) and not isinstance(S, S) and not isinstance(5, S)"),
    "an error's text and base": ("class E(ValueError): pass\ndef f(): raise E('no', 5)", "try: f()\nexcept ValueError as error: assert error.args == ('no', 5)\nelse: assert False"),
    "an error of the library's": ("import json\ndef f(): return open('/none') if 0 else json.loads('{')", "try: f()\nexcept ValueError as error: pass\nelse: assert False"),
    "functions of the library": ("def f(g, *a): return g(*a)", "import math, operator\nfrom decimal import Decimal\nassert f(len, [1]) == 1 and f(math.sqrt, 4) == 2 and f(operator.add, 1, 2) == 3 and f(max, 1, 2) == 2 and f(Decimal, '1') == 1"),
}  # fmt: skip
# What would pass if tests took the program's word for it, and what no protocol of data serves (site/pages/programs.md).
NOT_SERVED = {
    "its own arithmetic": (HEADS["lies"] + "def f(): return E()", "assert abs(f() - 5) < 1e-6"),
    "its own sum": (HEADS["lies"] + "def f(): return E()", "assert 5 - f() == 0"),
    "its own order": (HEADS["lies"] + "def f(): return E()", "assert f() < 5"),
    "its own number": (HEADS["lies"] + "def f(): return E()", "import math\nassert math.isclose(f(), 0)"),
    "its own containment": (HEADS["lies"] + "def f(): return E()", "assert 5 in f()"),
    "its own equality": (HEADS["lies"] + "def f(): return E()", "assert f() == 5 or f() == [] or not f() != 5"),
    "its own equality, in a list": (HEADS["lies"] + "def f(): return [E()]", "assert f() == [5]"),
    "its own instance": ("class M(type):\n    def __instancecheck__(c, x): return True\nclass C(metaclass=M): pass\ndef f(): return C", "assert isinstance(5, f())"),
    "two dataclasses": (HEADS["data"] + "def f(): return P(1, 2)", "assert f() == P(1, 2)"),
    "a function of the tests'": ("def f(g): return g(1)", "assert f(lambda x: x) == 1"),
    "an argument that it keeps": ("kept = []\ndef f(x): kept.append(x)\ndef g(): kept[0].append(1)", "x = []\nf(x)\ng()\nassert x == [1]"),
    "a list of an object's": ("class S:\n    def __init__(self): self.a = []\ndef f(): return S()", "s = f()\ns.a.append(1)\nassert s.a == [1]"),
    "an error of its own": ("class E(Exception): pass\ndef f(): raise E", "try: f()\nexcept E: pass"),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_what_honest_programs_do_is_served(name, execution):
    program, tests = SERVED[name]
    box = Sandbox(execution)
    assert box.run(Job(program, tests, ("f",)))
    assert not box.run(Job(program, tests + "\nassert False", ("f",)))


@pytest.mark.parametrize("name", NOT_SERVED)
def test_a_program_decides_no_comparison_and_shares_no_state(name, execution):
    program, tests = NOT_SERVED[name]
    names = tuple(n for n in ("f", "g", "P", "E") if f"{n}(" in tests or f" {n}:" in tests)
    assert not Sandbox(execution).run(Job(program, tests, names))


def test_programs_hash_alike_in_every_run(execution):
    job = Job("def f(): return list({'a', 'b', 'c', 'd', 'e'})", f"assert f() == {_order()}", ("f",))
    assert Sandbox(execution)([job, job]) == [True, True]


def _order() -> str:
    code = "print(list({'a', 'b', 'c', 'd', 'e'}))"
    return subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True
    ).stdout
