"""What runs inside the sandbox: the test runner, and the program in a process of its own. Started by source.

The test runner forks before it reads the tests. The program is loaded in the fork, and the tests run in the test
runner. A name that they take from the program is a stand-in, whose calls go over a pipe as data and come back as data.
So the program's process never holds an expected value, an assertion or the verdict's descriptor. There is nothing in it
to patch, and what comes back is compared by the test runner's own `==`. What is no data (an object of a class of the
program's) stays there and is named by a number. The tests see none of the program's own operators, so that such an
object equals nothing but itself.

Standard library only, and quick to import: it starts anew for every program.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import signal
import sys
import time
from types import ModuleType

LONGEST = 4 << 20  # bytes of a message
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "loongarch64": 219, "ppc64le": 271, "s390x": 280}
TYPES = {t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}


class Gone(BaseException):
    """The program's process is dead, or says what is no message. No `except Exception` in a test hides it."""


class Far:
    """An object in the program's process."""

    def __init__(self, ask, number):
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, *args, **kwargs):
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):  # what Python looks for by itself
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._ask("setattr", self, name, value)

    def __iter__(self):
        return iter(self._ask("list", self))

    def __eq__(self, other):
        return type(other) is Far and other._number == self._number

    def __hash__(self):
        return self._number


def pack(value, hold):
    """A value as JSON that keeps its type; what is no data as the number that `hold` gives for it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [pack(x, hold) for x in value]
    if isinstance(value, dict):
        return {"dict": [[pack(k, hold), pack(v, hold)] for k, v in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(x, hold) for x in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": list(value)}
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    return {"far": hold(value)}


def unpack(value, held):
    """The value that `pack` packed; `held` gives the object of a number."""
    if type(value) is list:
        return [unpack(x, held) for x in value]
    if type(value) is not dict:
        return value
    ((kind, inside),) = value.items()
    if kind == "dict":
        return {unpack(k, held): unpack(v, held) for k, v in inside}
    if kind == "far":
        return held(inside)
    if kind == "type":
        return TYPES[inside]
    if kind == "complex":
        return complex(*inside)
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes}[kind](unpack(inside, held))


def write(fd, message):
    data = message if type(message) is bytes else json.dumps(message).encode()
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(fd, data) :]


def read(fd, longest=LONGEST):
    """The next message as bytes; None at the end of the pipe, or for one that is too long."""
    size = _exactly(fd, 4)
    size = None if size is None else int.from_bytes(size, "big")
    return None if size is None or size > longest else _exactly(fd, size)


def _exactly(fd, size):
    found = bytearray()
    while len(found) < size:
        part = os.read(fd, min(1 << 16, size - len(found)))
        if not part:
            return None
        found += part
    return bytes(found)


def serve(program, inbox, outbox):
    """The life of the program's process: load the program, then do what the test runner asks, one request at a time."""
    held = []
    for user in (json, json.encoder, json.decoder, sys.modules[__name__]):  # a program may put others in builtins
        vars(user).update((name, x) for name, x in vars(builtins).items() if not name.startswith("_"))

    def hold(value):
        held.append(value)  # which keeps it alive, so that no two have one number
        return next(i for i, x in enumerate(held) if x is value)

    module = ModuleType("solution")  # not "__main__": what a program does when it is run as one is no part of it
    sys.modules["solution"] = module
    do = {
        "get": lambda name: getattr(module, name),
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "getattr": getattr,
        "setattr": setattr,
        "list": lambda values: list(values),
    }
    try:
        exec(compile(program, "solution.py", "exec"), module.__dict__)
    except BaseException as error:
        write(outbox, ["error", type(error).__name__])
        return
    write(outbox, ["ok", None])
    while (message := read(inbox)) is not None:
        try:
            what, *args = unpack(json.loads(message), held.__getitem__)
            reply = json.dumps(["ok", pack(do[what](*args), hold)]).encode()
        except BaseException as error:  # SystemExit too: it is the call that failed
            reply = ["error", type(error).__name__]
        write(outbox, reply)


def run_tests(inbox, outbox):
    """Whether the tests, read from standard input once the program is loaded, all pass."""
    alive = True

    def receive():
        """The program's reply, as ("ok", value) or ("error", name)."""
        nonlocal alive
        try:
            how, value = unpack(json.loads(read(inbox) if alive else b""), lambda number: Far(ask, int(number)))
            alive = how in ("ok", "error")
        except Exception:  # the pipe's end, or whatever a forged message does
            alive = False
        if not alive:
            raise Gone
        return how, value

    def ask(*message):
        nonlocal alive
        request = json.dumps(pack(message, _number)).encode()
        try:
            write(outbox, request)
        except OSError:
            alive = False  # for good, even where a bare `except` in a test goes on
        how, value = receive()
        if how == "ok":
            return value
        raise next((kind for kind in RAISED if kind.__name__ == value), RuntimeError)

    if receive()[0] == "error":
        return False
    tests = json.loads(read(0, 1 << 30))
    space = {"__name__": "tests"}
    exec(compile(tests["before"], "before.py", "exec"), space)
    for name in tests["names"]:
        space[name] = ask("get", name)
    exec(compile(tests["tests"], "tests.py", "exec"), space)
    return alive


RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    LookupError,
    NameError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)


def _number(value):
    if type(value) is Far:
        return value._number
    raise TypeError("the tests pass the program something that is no data")


def restrict(limits):
    """Limits of this process and of those it starts; the memory of this process is closed to them."""
    for name, limit in limits["rlimits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        try:
            resource.setrlimit(kind, (limit, limit) if hard == resource.RLIM_INFINITY else (min(limit, hard),) * 2)
        except (ValueError, OSError):  # macOS knows, but does not set, some
            if limits["isolated"]:
                raise
    if limits["user"]:  # root has no limit on processes
        os.setgroups([])
        os.setgid(limits["user"])
        os.setuid(limits["user"])
    if limits["keyring"]:
        join_keyring()
    closed = control(4, 0) == 0 and control(1, 9) == 0  # after setuid, which would undo both
    if limits["isolated"] and not closed:
        raise OSError("the test runner's memory cannot be closed to the program")


def control(option, value):
    """Call prctl: option 4 is PR_SET_DUMPABLE (0: no ptrace, no /proc/PID/mem), 1 is PR_SET_PDEATHSIG.

    None on a system without prctl.
    """
    try:
        import ctypes

        return ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        return None


def join_keyring():
    """Join a session keyring of its own, so that a program does not read keys that another one added.

    The C library has no function for it. Raises OSError.
    """
    import ctypes

    number = KEYCTL.get(os.uname().machine)
    if number is None:
        raise OSError(f"how to join a keyring on {os.uname().machine} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    # A kernel without keyrings, or one whose keyrings are closed to this process, shares none.
    if libc.syscall(number, 1, None) < 0 and ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
        raise OSError(ctypes.get_errno(), "no session keyring of its own")


def main():
    limits = json.loads(sys.argv[1])
    sys.set_int_max_str_digits(0)  # the limit on CPU time is limit enough
    restrict(limits)
    # Nobody else may be able to: the one that started this may be dead, or another user. All end with process 1.
    end = time.monotonic() + limits["wall"]
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0) if time.monotonic() >= end else None)  # a program may send it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, limits["wall"] + 0.01)
    os.write(1, b"ready\n")
    program = read(0, 1 << 30).decode("utf-8", "surrogatepass")
    inbox, to_runner = os.pipe()
    to_program, outbox = os.pipe()
    if os.fork() == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            control(1, 9)
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nothing, fd)
            for fd in (inbox, outbox, nothing):
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"],) * 2)
            serve(program, to_program, to_runner)
        finally:
            os._exit(0)
    os.close(to_program)
    os.close(to_runner)
    try:
        passed = run_tests(inbox, outbox)
    except BaseException:
        passed = False
    os.write(1, b"passed\n" if passed else b"failed\n")
    os._exit(0)


if __name__ == "__main__":
    main()
