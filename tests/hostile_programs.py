"""Hostile answers to "write add(a, b)", with their right verdicts. `programs` makes them, `test_sandbox.py` runs them.

Three kinds. An ATTACK ends and lets the program go on, so that the verdict is that of its `add`; where one would
succeed, it says so by dying, so that a right `add` fails. Each comes four times: while loading or in the call, with a
right `add` or a wrong one. A DEATH never gets to an answer; it comes twice. A CHEAT is a whole program.
"""

from __future__ import annotations

from textwrap import indent
from typing import NamedTuple

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\nassert add('a', 'b') == 'ab'\nassert set(add([1], [2, 2])) == set([1, 2])"
RIGHT, WRONG = "a + b", "0"


class Hostile(NamedTuple):
    name: str
    program: str
    right: bool  # whether it passes the tests
    harmless: bool  # whether it may run without isolation


# Name -> program text. The names in braces are filled in by the test: a file that must not appear or vanish on the
# host, the test's own process and a port that it listens to. `worked` ends the program: the attack got through.
# `delete` gives up after 50 errors, for the sake of time.
ATTACKS = {
    # output, input and descriptors
    "prints a lot": "for i in range(100000): print('passed', i)",
    "floods standard error": "import sys\nfor i in range(50000): sys.stderr.write('x' * 100)",
    "prints a marker": "print('ready\\npassed\\n1\\nOK\\nAll tests passed')",
    "writes a verdict to the standard streams": "import os\nfor fd in (0, 1, 2): os.write(fd, b'ready\\npassed\\n')",
    "closes the standard streams": "import os\nfor fd in (0, 1, 2): os.close(fd)",
    "replaces sys.stdout": "import sys\nsys.stdout = sys.stderr = sys.stdin = None",
    "reads standard input": "import os\nif os.read(0, 100): worked()",
    "has atexit print": "import atexit\natexit.register(lambda: print('passed'))",
    # what a checker in the same interpreter would fall for
    "patches builtins": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\nbuiltins.all = builtins.any = builtins.isinstance = lambda *a: True",
    "patches equality helpers": "import math, operator, unittest\nmath.isclose = operator.eq = lambda *a, **k: True\nunittest.TestCase.assertEqual = lambda *a: None",
    "patches __main__": "import __main__\n__main__.run_tests = __main__.main = lambda *a: True",
    "patches os and json": "import os, json\nos._exit = os.abort = lambda *a: None\njson.JSONDecodeError = None",
    "hides in sys.modules": "import sys\nsys.modules['tests'] = sys.modules['test_runner'] = sys.modules['math'] = sys.modules[__name__]",
    "sets a trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\nsys.excepthook = lambda *a: None",
    "defines the tests' names": "global check, candidate, tests, set, sorted\ncheck = candidate = tests = lambda *a: True\nset = sorted = lambda *a: 7",
    # looking for the tests
    "looks for the tests in frames": "import sys\nframe = sys._getframe()\nwhile frame:\n    if 'assert' + ' add' in repr(frame.f_locals.get('tests')): worked()\n    frame = frame.f_back",
    "looks for the tests in memory": "import gc\nfor x in gc.get_objects():\n    if type(x) is dict and 'assert' + ' add' in str(x.get('tests')): worked()",
    "looks for the tests in files": "import os\nfor folder in ('/proc', '/proc/1', '/proc/self', '/proc/1/fd', '/tmp', '.', '/home', '/work'):\n    try: found = os.listdir(folder)\n    except OSError: continue\n    if found and folder not in ('/tmp', '.'): worked()",
    "opens the test runner's descriptors": "import os\nfor fd in range(20):\n    try: os.open(f'/proc/{os.getppid()}/fd/{fd}', os.O_RDONLY)\n    except OSError: continue\n    worked()",
    "traces the test runner": "import ctypes, os\nlibc = ctypes.CDLL(None)\nif libc.ptrace(16, os.getppid(), 0, 0) != -1: worked()",
    "reads the test runner's memory": "import ctypes, os\nclass V(ctypes.Structure): _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\nb = ctypes.create_string_buffer(8)\nv = V(ctypes.addressof(b), 8)\nif ctypes.CDLL(None).process_vm_readv(os.getppid(), ctypes.byref(v), 1, ctypes.byref(v), 1, 0) != -1: worked()",
    # the file system
    "deletes the home folder": "import os\nfor home in (os.path.expanduser('~'), os.environ.get('HOME', '/root'), '/root', '/home'): delete(home)",
    "deletes everything": "import os\nfor name in os.listdir('/'): delete('/' + name)",
    "deletes a file of the host": "import os\ntry: os.remove('{kept}')\nexcept OSError: pass\nelse: worked()",
    "reads a file of the host": "try: open('{kept}').read()\nexcept OSError: pass\nelse: worked()",
    "writes files outside": "for path in ('{mark}', '/etc/x', '/usr/lib/x', '/root/x', '/x', '/dev/x'):\n    try: open(path, 'w').write('x')\n    except OSError: continue\n    worked()",
    "writes Python's own library": "import json\ntry: open(json.__file__, 'a').write('#')\nexcept OSError: pass\nelse: worked()",
    "fills the temporary folder": "try:\n    for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\nexcept OSError: pass\nelse: worked()",
    "writes one large file": "try:\n    with open('large', 'wb') as f:\n        for i in range(200): f.write(bytes(1 << 20))\nexcept OSError: pass\nelse: worked()",
    "makes many files": "try:\n    for i in range(3000): open(f'f{i}', 'w').close()\nexcept OSError: pass",
    "opens many files": "kept = []\ntry:\n    for i in range(5000): kept.append(open('/dev/null'))\nexcept OSError: kept.clear()\nelse: worked()",
    "leaves a deep folder": "import os\ntry:\n    for i in range(300): os.mkdir('d'); os.chdir('d')\nexcept OSError: pass",
    # the network and other processes
    "connects to the host": "import socket\ntry: socket.create_connection(('127.0.0.1', {port}), timeout=1)\nexcept OSError: pass\nelse: worked()",
    "connects to the world": "import socket\ntry: socket.create_connection(('1.1.1.1', 53), timeout=1)\nexcept OSError: pass\nelse: worked()",
    "asks for a name": "import socket\ntry: socket.gethostbyname('example.org')\nexcept OSError: pass\nelse: worked()",
    "kills the test runner": "import os\nos.kill(os.getppid(), 9)",
    "stops the test runner": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
    "signals the test runner": "import os\nfor s in (1, 2, 3, 6, 10, 11, 12, 13, 14, 15, 24, 25):\n    os.kill(os.getppid(), s)",
    "kills all it can": "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass",
    "kills the test": "import os\ntry: os.kill({pid}, 9)\nexcept OSError: pass\nelse: worked()",
    "leaves a sleeping child": "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\n    os._exit(0)",
    "leaves a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)",
    "leaves a child that ignores signals": "import os, signal, time\nif os.fork() == 0:\n    for s in range(1, 32):\n        try: signal.signal(s, signal.SIG_IGN)\n        except OSError: pass\n    time.sleep(1000)",
    "starts a shell": "import os\nif os.system('echo passed; sleep 1000') == 0: worked()",
    "leaves threads": "import threading, time\nfor i in range(3): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
    # privileges and limits
    "becomes root": "import os\nfor become in (os.setuid, os.setgid):\n    try: become(0)\n    except OSError: continue\n    worked()",
    "mounts": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, b'') != -1: worked()",
    "lifts the limits": "import resource\nfor name in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_NPROC', 'RLIMIT_FSIZE'):\n    try: resource.setrlimit(getattr(resource, name), (-1, -1))\n    except (ValueError, OSError): continue\n    worked()",
    "asks for 100 GB": "try: x = bytearray(100 << 30)\nexcept MemoryError: pass\nelse: worked()",
    # what has no walls but a filter of system calls; as root some of it worked without one
    "shares a kernel key": "for ring in (-3, -4, -5):\n    if call('keyctl', 10, ring, b'user', b'irpo-test', 0) >= 0: worked()\nfor ring in (-3, -4, -5): call('add_key', b'user', b'irpo-test', b'kept', 4, ring)",
    "makes a socket to the host of a virtual machine": "import socket\ntry: socket.socket(40, socket.SOCK_STREAM)\nexcept OSError: pass\nelse: worked()",
    "makes sockets of every family": "import socket\nfor family in range(2, 50):\n    for kind in (1, 2, 3, 5):\n        try: socket.socket(family, kind)\n        except OSError: continue\n        worked()",
    "makes a socket with a high bit": "if call('socket', (1 << 32) + 40, 1, 0) >= 0 or call('socket', (1 << 32) + 2, 1, 0) >= 0: worked()",
    "makes an io_uring": "import ctypes\nif call('io_uring_setup', 1, ctypes.create_string_buffer(120)) >= 0: worked()",
    "traces a child": "import os\npid = os.fork()\nif not pid: os._exit(call('ptrace', 0, 0, 0, 0) == 0)\nif os.waitpid(pid, 0)[1]: worked()",
    "reads memory by process": "import ctypes, os\nb = ctypes.create_string_buffer(8)\nv = (ctypes.c_ulong * 2)(ctypes.addressof(b), 8)\nif call('process_vm_readv', os.getpid(), v, 1, v, 1, 0) >= 0: worked()",
    "makes a user namespace": "if call('unshare', 0x10000000) >= 0: worked()",
    "makes every other namespace": "for flag in (0x20000, 0x80, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000):\n    if call('unshare', 0x10000000 | flag) >= 0: worked()",
    "clones into a user namespace": "import os\npid = call('clone', 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nif pid > 0: worked()",
    "clones into a user namespace by clone3": "import ctypes, os\npid = call('clone3', (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17), 64)\nif pid == 0: os._exit(0)\nif pid > 0: worked()",
    "joins its own namespace": "import ctypes, os\npid = os.getpid()\nfd = call('pidfd_open', pid, 0)\nif call('setns', fd, 0x10000000) >= 0: worked()",
    "opens a performance counter": "import ctypes\nif call('perf_event_open', (ctypes.c_uint64 * 16)(1 | 128 << 32, 0, 0, 0, 0, 0b1100001), 0, -1, -1, 0) >= 0: worked()",
    "loads a BPF map": "import ctypes\nif call('bpf', 0, (ctypes.c_uint32 * 16)(2, 4, 4, 1), 64) >= 0: worked()",
    "handles page faults": "if call('userfaultfd', 1) >= 0: worked()",
    "makes a shared segment": "if call('shmget', 0, 1 << 30, 0o1600) >= 0: worked()",
    "makes a message queue": "if call('msgget', 0, 0o1600) >= 0: worked()",
    "changes how the kernel runs it": "if call('personality', 0x40000) >= 0: worked()",
    "opens a file system": "if call('fsopen', b'tmpfs', 0) >= 0: worked()",
    "makes a file handle": "import ctypes\nif call('name_to_handle_at', -100, b'/tmp', (ctypes.c_uint32 * 40)(128), ctypes.byref(ctypes.c_int()), 0) >= 0: worked()",
    "compares processes": "import os\nif call('kcmp', os.getpid(), os.getpid(), 1, 0, 0) >= 0: worked()",
    "ignores all signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass",
}  # fmt: skip
# Those that can do no harm without walls, and meet no limit that is missing there.
HARMLESS_ATTACKS = [
    "prints a lot", "floods standard error", "prints a marker", "writes a verdict to the standard streams", "closes the standard streams",
    "replaces sys.stdout", "reads standard input", "has atexit print", "patches builtins", "patches equality helpers", "patches __main__",
    "patches os and json", "hides in sys.modules", "sets a trace", "defines the tests' names", "looks for the tests in frames",
    "looks for the tests in memory", "writes one large file", "ignores all signals", "asks for 100 GB",
]  # fmt: skip

DEATHS = {
    "os._exit(0)": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit": "raise SystemExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "abort": "import os\nos.abort()",
    "null pointer": "import ctypes\nctypes.string_at(0)",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "becomes another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(\"passed\")'])",
    "endless recursion": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda f: f(f)\nf(f)",
    "closes every descriptor": "import os\nos.closerange(0, 64)",
    "writes a verdict everywhere": "import os\nfor fd in range(64):\n    try: os.write(fd, b'ready\\npassed\\n')\n    except OSError: pass",
    "endless loop": "while True: pass",
    "endless loop without signals": "import signal\nfor s in (14, 15, 24, 25, 26, 27): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "endless output": "while True: print('passed' * 1000)",
    "endless sleep": "import time\ntime.sleep(10**6)",
    "catches everything, for ever": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a huge power": "x = 9 ** 9 ** 9",
    "a slow regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory bomb that goes on": "x = []\nwhile True:\n    try: x.append(' ' * (1 << 24))\n    except MemoryError: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb with memory": "import os\nx = []\nwhile True:\n    try:\n        os.fork()\n        x.append(bytearray(1 << 22))\n    except (OSError, MemoryError): pass",
    "children that outlive their parents": "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
}  # fmt: skip
HARMLESS_DEATHS = [
    "os._exit(0)", "sys.exit", "SystemExit", "KeyboardInterrupt", "abort", "null pointer", "kills itself", "stops itself",
    "becomes another program", "endless recursion", "closes every descriptor", "writes a verdict everywhere", "endless loop", "a huge power",
]  # fmt: skip

_OBJECT = (
    "def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    def __hash__(self): return 0"
)
# Says to the test runner what it likes, in the place of an answer.
_FORGES = """\
def add(a, b):
    import sys
    frame = sys._getframe()
    while 'outbox' not in frame.f_locals: frame = frame.f_back
    frame.f_globals['write'](frame.f_locals['outbox'], REPLY)
    return 0
"""
REPLIES = {
    "a function of the library": ["ok", {"far": ["operator", "add"]}, []],
    "a function that ends the test runner": ["ok", {"far": ["os", "_exit"]}, []],
    "a type that is none": ["ok", {"type": "exec"}, []],
    "a class that is no value": ["ok", {"os.system": ["true"]}, []],
    "a box that is not there": ["ok", {"again": 99}, []],
    "a change of a box that is not there": ["ok", 0, [[0, []], [-1, []], [99, []]]],
    "a change of everything": ["ok", 0, [["0", {}], "x", None]],
    "a number too large": ["ok", {"decimal.Decimal": ["1e999999999999999999"]}, []],
    "a fraction of nothing": ["ok", {"fractions.Fraction": [0, 0]}, []],
    "a date that is none": ["ok", {"datetime.datetime": [0, 99, -1]}, []],
    "a tuple without a class": ["ok", {"Named": [1, 2]}, []],
    "a default that is the test runner's": ["ok", {"defaultdict": [], "with": {"type": "exec"}}, []],
    "no answer": ["passed", None, []],
    "an error that is none": ["error", None, []],
    "an error without a class": ["error", {"tuple": [[], 5]}, []],
    "an error that ends all": ["error", {"tuple": [["SystemExit"], [0]]}, []],
    "an answer for every test": ["ok", {"Named": [5], "with": 0}, []],
    "no list": {},
}
CHEATS = {
    **{f"forges {name}": _FORGES.replace("REPLY", repr(reply)) for name, reply in REPLIES.items()},
    **{
        f"{kind} that equals everything": f"{head}\nclass E({base}):\n    {_OBJECT}\ndef add(a, b): return E({args})"
        for kind, head, base, args in (
            ("a named tuple", "from collections import namedtuple", "namedtuple('N', 'x')", "5"),
            ("a Decimal", "from decimal import Decimal", "Decimal", "4"),
            ("a Fraction", "from fractions import Fraction", "Fraction", "4"),
            ("a date", "from datetime import date", "date", "1, 1, 1"),
            ("a deque", "from collections import deque", "deque", ""),
            ("an OrderedDict", "from collections import OrderedDict", "OrderedDict", ""),
            ("an int of an enum", "from enum import IntEnum", "IntEnum", "'N', 'x'"),
        )
    },
    "a dataclass that equals everything": f"from dataclasses import dataclass\n@dataclass(eq=False)\nclass E:\n    x: int\n    {_OBJECT}\ndef add(a, b): return E(5)",
    "a Fraction with other parts": "from fractions import Fraction\nFraction.numerator = property(lambda x: [5])\ndef add(a, b): return Fraction(4)",
    "clears its arguments": "def add(a, b):\n    if type(a) is list:\n        a.clear()\n        b.clear()\n    return a",
    "a module that the tests use": "class math:\n    isclose = staticmethod(lambda *a: True)\ndef add(a, b): return math",
    **{
        f"a {kind} that equals everything": f"class E({kind}):\n    {_OBJECT}\ndef add(a, b): return E()"
        for kind in ("object", "int", "float", "str", "list", "tuple", "dict", "set", "bytes", "complex")
    },
    "a class that equals everything": f"class M(type):\n    {_OBJECT}\nclass C(metaclass=M): pass\ndef add(a, b): return C",
    "a class that claims to be int": "class I:\n    __class__ = int\n    def __eq__(self, other): return True\n    def __index__(self): return 5\ndef add(a, b): return I()",
    "mock.ANY": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "MagicMock": "from unittest.mock import MagicMock\nadd = MagicMock()",
    "not a number": "def add(a, b): return float('nan')",
    "None": "def add(a, b): pass",
    "an endless generator": "def add(a, b):\n    while True: yield a",
    "raises AssertionError": "def add(a, b): raise AssertionError",
    "raises StopIteration": "def add(a, b): raise StopIteration",
    "raises GeneratorExit": "def add(a, b): raise GeneratorExit",
    "raises an error of its own": "class E(BaseException): pass\ndef add(a, b): raise E",
    "an error that cannot be shown": "class E(Exception):\n    def __repr__(self): raise self\n    __str__ = __repr__\ndef add(a, b): raise E",
    "a list that holds itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "a list of lists of lists": "def add(a, b):\n    x = []\n    for i in range(100000): x = [x]\n    return x",
    "an answer of 50 MB": "def add(a, b): return 'x' * 50_000_000",
    "a number of 3 million digits": "def add(a, b): return 1 << 10_000_000",
    "a million empty lists": "def add(a, b): return [[] for i in range(1_000_000)]",
    "a list whose iterator lies": "class L(list):\n    def __iter__(self): return iter([1, 2])\n    def __len__(self): return 2\ndef add(a, b): return L()",
    "knows one test": "def add(a, b): return 5",
    "no add": "def ad(a, b): return a + b",
    "add is no function": "add = 5",
    "one argument": "def add(a): return a + a",
    "an async function": "async def add(a, b): return a + b",
    "nothing": "\n",
    "no Python": "def add(a, b) return a + b",
    "a null byte": "def add(a, b): return a + b\n\0",
    "a wrong encoding": "# -*- coding: utf-99 -*-\ndef add(a, b) return",
    "half of a surrogate pair": "def add(a, b): return '\ud800'",
    "open brackets": "(" * 200_000,
    "deep expression": "x = " + "-" * 100_000 + "1\ndef add(a, b): return a + b",
    "many digits": "x = " + "9" * 1_000_000 + "\ndef add(a, b): return 0",
    "half of the answer": "def add(a, b): return a + b if type(a) is int else a",
    "its own set": "class set(list): pass\ndef add(a, b): return a + b if type(a) is not list else set([9])",
    "a module that answers for all": "def __getattr__(name): return lambda *a: 5",
}  # fmt: skip
# Programs that look like the above and are right.
HONEST = {
    "an int of a class of its own": "class I(int): pass\ndef add(a, b): return I(a + b) if type(a) is int else a + b",
    "a callable object": "class Add:\n    def __call__(self, a, b): return a + b\nadd = Add()",
    "a lambda": "add = lambda a, b: a + b",
    "operator.add": "from operator import add",
    "changes its arguments": "def add(a, b):\n    if type(a) is list:\n        a += b\n        b.clear()\n        return a\n    return a + b",
    "recursion": "def add(a, b, deep=300): return a + b if not deep else add(a, b, deep - 1)",
    "runs as a script only": "def add(a, b): return a + b\nif __name__ == '__main__':\n    while True: pass",
    "uses the temporary folder": "import tempfile\ndef add(a, b):\n    with tempfile.TemporaryFile('w+') as f:\n        f.write('x')\n    return a + b",
    "threads": "from concurrent.futures import ThreadPoolExecutor\ndef add(a, b):\n    with ThreadPoolExecutor(2) as pool: return list(pool.map(lambda x: x, [a + b, 0]))[0]",
    "a child process": "import os, pickle\ndef add(a, b):\n    reader, writer = os.pipe()\n    pid = os.fork()\n    if pid == 0:\n        os.write(writer, pickle.dumps(a + b))\n        os._exit(0)\n    os.waitpid(pid, 0)\n    return pickle.loads(os.read(reader, 1000))",
    "multiprocessing": "import multiprocessing as m\ndef work(pipe, a, b): pipe.send(a + b)\ndef add(a, b):\n    here, there = m.get_context('fork').Pipe()\n    child = m.get_context('fork').Process(target=work, args=(there, a, b))\n    child.start()\n    found = here.recv()\n    child.join()\n    return found",
    "subprocess": "import json, subprocess, sys\ndef add(a, b):\n    run = [sys.executable, '-c', f'import json; print(json.dumps({a!r} + {b!r}))']\n    return json.loads(subprocess.run(run, capture_output=True, check=True).stdout)",
    "asyncio": "import asyncio\nasync def later(a, b):\n    await asyncio.sleep(0.01)\n    return a + b\ndef add(a, b): return asyncio.run(later(a, b))",
    "a local socket": "import pickle, socket\ndef add(a, b):\n    here, there = socket.socketpair()\n    here.send(pickle.dumps(a + b))\n    return pickle.loads(there.recv(1000))",
    "a dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: object\n    b: object\n    def sum(self): return self.a + self.b\ndef add(a, b): return P(a, b).sum()",
}  # fmt: skip


# System calls' numbers on x86_64 and on aarch64.
CALLS = {
    "add_key": (248, 217), "keyctl": (250, 219), "socket": (41, 198), "io_uring_setup": (425, 425),
    "ptrace": (101, 117), "clone": (56, 220), "process_vm_readv": (310, 270), "unshare": (272, 97), "clone3": (435, 435),
    "pidfd_open": (434, 434), "setns": (308, 268), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282),
    "shmget": (29, 194), "msgget": (68, 186), "personality": (135, 92), "fsopen": (430, 430), "kcmp": (312, 272),
    "name_to_handle_at": (303, 264),
}  # fmt: skip
HEAD = f"""\
def worked():
    import os
    os._exit(1)
def call(name, *args):
    import ctypes, os
    number = {CALLS!r}[name][os.uname().machine == 'aarch64']
    args = [ctypes.c_long(x) if isinstance(x, int) else x for x in args]
    return ctypes.CDLL(None).syscall(ctypes.c_long(number), *args)
def delete(folder):
    import shutil
    left = [50]
    def failed(*_):
        left[0] -= 1
        if not left[0]: raise KeyError
    try: shutil.rmtree(folder, onerror=failed)
    except KeyError: pass
"""


def _whole(attack: str, answer: str, loading: bool) -> str:
    head = f"{HEAD}def attack():\n{indent(attack, '    ')}\n"
    if loading:
        return f"{head}attack()\ndef add(a, b): return {answer}\n"
    return f"{head}attacks = [attack]\ndef add(a, b):\n    while attacks: attacks.pop()()\n    return {answer}\n"


def programs(**host) -> list[Hostile]:
    """All of them, with `kept`, `mark`, `pid` and `port` of the host filled in."""
    found = []
    for name, attack in ATTACKS.items():
        for key, value in host.items():
            attack = attack.replace("{" + key + "}", str(value))
        for loading in (True, False):
            for answer in (RIGHT, WRONG):
                label = f"{name}, {'loading' if loading else 'called'}, {answer}"
                found.append(Hostile(label, _whole(attack, answer, loading), answer == RIGHT, name in HARMLESS_ATTACKS))
    for name, attack in DEATHS.items():
        for loading in (True, False):
            label = f"{name}, {'loading' if loading else 'called'}"
            found.append(Hostile(label, _whole(attack, RIGHT, loading), False, name in HARMLESS_DEATHS))
    found += [Hostile(name, text, False, True) for name, text in CHEATS.items()]
    found += [Hostile(name, text, True, True) for name, text in HONEST.items()]
    return found
