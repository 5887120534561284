"""What runs inside the sandbox: the test runner, and the program in a process of its own. Started by its bytecode.

The test runner forks before it reads the tests. The program is loaded in the fork, and the tests run in the test
runner. A name that they take from the program is a stand-in, whose calls go over a pipe as data and come back as data.
So the program's process never holds an expected value, an assertion or the verdict's descriptor. There is nothing in it
to patch, and what comes back is compared by the test runner's own `==`.

* A value of the standard library's (`BOXES`, `PARTS`) comes back as parts, of which the test runner makes it anew.
* An argument that can change (a box) comes back with the answer, if it did change, and is changed here as well.
* What is no data (an object of a class of the program's) stays there and is named by a number. The tests may ask it for
  what `Far` has. They see none of its own comparisons and arithmetic, so that it equals nothing but itself.

Which right programs fail for that is said in `site/pages/programs.md`.

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
from collections import Counter, OrderedDict, defaultdict, deque
from operator import delitem, getitem, is_not, setitem
from types import ModuleType

LONGEST = 4 << 20  # bytes of a message
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "loongarch64": 219, "ppc64le": 271, "s390x": 280}
TYPES = {t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}


class Gone(BaseException):
    """The program's process is dead, or says what is no message. No `except Exception` in a test hides it."""


class Far:
    """An object in the program's process.

    What it is asked for takes nothing of what the tests expect along: attributes, calls, items, length, text, truth. It
    has no comparison and no arithmetic of the program's, which would see the other side.
    """

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

    def __getitem__(self, key):
        return self._ask("getitem", self, key)

    def __setitem__(self, key, value):
        self._ask("setitem", self, key, value)

    def __delitem__(self, key):
        self._ask("delitem", self, key)

    def __len__(self):
        return self._ask("len", self)

    def __bool__(self):
        return self._ask("bool", self)

    def __str__(self):
        return self._ask("str", self)

    def __repr__(self):
        return self._ask("repr", self)

    def __instancecheck__(self, value):
        return type(value) in (Far, Named) and self._ask("isinstance", value, self)

    def __iter__(self):
        """One item at a time, since there may be no end to them. Of many some at once: a 64th more than were used."""
        iterator, used, ended = self._ask("iter", self), 0, None
        while not ended:
            items, ended = self._ask("take", iterator, 1 + used // 64)
            yield from items
            used += len(items)
        if ended[0][0] != "StopIteration":
            raise raised(*ended)

    def __next__(self):
        items, ended = self._ask("take", self, 1)
        if items:
            return items[0]
        raise StopIteration if ended[0][0] == "StopIteration" else raised(*ended)

    def __eq__(self, other):
        return type(other) is Far and other._number == self._number

    def __hash__(self):
        return self._number


class Named(tuple):
    """A tuple of a class of the program's, such as a named one: a tuple here, whose fields and methods are there."""

    def __new__(cls, values, far):
        self = super().__new__(cls, values)
        self._far = far
        return self

    def __getattr__(self, name):
        return getattr(self._far, name)


# What can change is a box. A box that a message holds twice, or that comes back, is the same one on both sides. A class
# stands before the one that it is derived from.
BOXES = {t.__name__: t for t in (list, OrderedDict, Counter, defaultdict, dict, set, deque, bytearray)}
BOX = tuple(BOXES.values())
KEYS, ITEMS = type({}.keys()), type({}.items())
# What a value of the standard library is made of: its class makes it again of these.
PARTS = {
    "builtins.range": lambda x: (x.start, x.stop, x.step),
    "decimal.Decimal": lambda x: (str(x),),
    "fractions.Fraction": lambda x: (x.numerator, x.denominator),
    "datetime.date": lambda x: (x.year, x.month, x.day),
    "datetime.time": lambda x: (x.hour, x.minute, x.second, x.microsecond, x.tzinfo),
    "datetime.datetime": lambda x: (x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond, x.tzinfo),
    "datetime.timedelta": lambda x: (x.days, x.seconds, x.microseconds),
    "datetime.timezone": lambda x: x.__getinitargs__(),
}


def pack(value, hold, boxes):
    """A value as JSON that keeps its type; what is no data as the number that `hold` gives for it.

    `boxes` has those that the message holds already, as {id: (number, box)}, and gets more.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BOX):
        if id(value) in boxes:
            return {"again": boxes[id(value)][0]}
        boxes[id(value)] = len(boxes), value
        inside = pack_inside(value, hold, boxes)
        kind = next(name for name, kind in BOXES.items() if isinstance(value, kind))
        if kind == "list":
            return inside
        if kind == "deque":
            return {kind: inside, "with": value.maxlen}
        if kind == "defaultdict":
            return {kind: inside, "with": pack(value.default_factory, hold, boxes)}
        return {kind: inside}
    if type(value) is Named:
        return {"far": hold(value._far)}
    if isinstance(value, tuple):
        packed = {"tuple": [pack(x, hold, boxes) for x in value]}
        return packed if type(value) is tuple or hold is _number else {"Named": packed["tuple"], "with": hold(value)}
    for name, kind in (("frozenset", frozenset), ("bytes", bytes), ("keys", KEYS)):
        if isinstance(value, kind):
            return {name: [pack(x, hold, boxes) for x in value]}
    if isinstance(value, ITEMS):
        return {"items": [[pack(k, hold, boxes), pack(v, hold, boxes)] for k, v in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, type):
        return {"type": value.__name__} if TYPES.get(value.__name__) is value else {"far": hold(value)}
    for base in type(value).__mro__:
        name = f"{base.__module__}.{base.__name__}"
        if name in PARTS:
            parts = [pack(x, hold, boxes) for x in PARTS[name](value)]
            if not any(isinstance(part, dict) and "far" in part for part in parts):  # else this is no data either
                return {name: parts}
    return {"far": hold(value)}


def pack_inside(box, hold, boxes):
    if isinstance(box, dict):
        return [[pack(k, hold, boxes), pack(v, hold, boxes)] for k, v in box.items()]
    return [pack(x, hold, boxes) for x in box]


def unpack(value, held, boxes):
    """The value that `pack` packed; `held` gives the object of a number. `boxes` is a list, and gets more."""
    if type(value) is list:
        kind, inside = "list", value
    elif type(value) is dict:
        kind, inside = next(iter(value.items()))
    else:
        return value
    if kind in BOXES:
        extra = [unpack(value["with"], held, boxes)] if type(value) is dict and "with" in value else []
        box = deque(maxlen=extra[0]) if kind == "deque" else BOXES[kind](*extra)
        boxes.append(box)
        fill(box, unpack_inside(box, inside, held, boxes))
        return box
    if kind == "again":
        return boxes[inside]
    if kind == "far":
        return held(inside)
    if kind == "type":
        return TYPES[inside]
    if kind == "items":
        return {unpack(k, held, boxes): unpack(v, held, boxes) for k, v in inside}.items()
    parts = [unpack(x, held, boxes) for x in inside]
    if kind == "Named":
        return Named(parts, held(value["with"]))
    if kind == "keys":
        return dict.fromkeys(parts).keys()
    if kind == "complex":
        return complex(*parts)
    if kind in PARTS:
        return getattr(__import__(kind.split(".")[0]), kind.split(".")[1])(*parts)
    return {"tuple": tuple, "frozenset": frozenset, "bytes": bytes}[kind](parts)


def unpack_inside(box, inside, held, boxes):
    if isinstance(box, dict):
        return [(unpack(k, held, boxes), unpack(v, held, boxes)) for k, v in inside]
    return [unpack(x, held, boxes) for x in inside]


def fill(box, items):
    """Put these in the place of what is in the box."""
    box.clear()
    if isinstance(box, dict):
        for key, value in items:
            box[key] = value
    elif isinstance(box, set):
        box.update(items)
    else:
        box.extend(items)


def inside_of(box):
    return [*box, *box.values()] if isinstance(box, dict) else [*box]


def report(error):
    """An error as the names of its classes, the nearest first, and its arguments."""
    return [kind.__name__ for kind in type(error).__mro__], list(error.args)


def raised(names, args):
    """The error of a report, of the nearest class that the tests may know."""
    kind = next((kind for name in names for kind in RAISED if kind.__name__ == name), RuntimeError)
    return kind(*args)


def take(iterator, most):
    """The next items, at most so many, and the report of the error that ended them, if one did."""
    items = []
    try:
        while len(items) < most:
            items.append(next(iterator))
    except BaseException as error:
        return items, report(error)
    return items, None


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
    held, numbers = [], {}
    for user in (json, json.encoder, json.decoder, sys.modules[__name__]):  # a program may put others in builtins
        vars(user).update((name, x) for name, x in vars(builtins).items() if not name.startswith("_"))

    def hold(value):
        if id(value) not in numbers:
            numbers[id(value)] = len(held)
            held.append(value)  # which keeps it alive, so that no two have one number
        return numbers[id(value)]

    def find(number):
        return held[number] if type(number) is int else getattr(__import__(number[0]), number[1])

    module = ModuleType("solution")  # not "__main__": what a program does when it is run as one is no part of it
    sys.modules["solution"] = module
    do = {
        "get": lambda name: getattr(module, name),
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "getattr": getattr,
        "setattr": setattr,
        "getitem": getitem,
        "setitem": setitem,
        "delitem": delitem,
        "len": len,
        "bool": bool,
        "str": str,
        "repr": repr,
        "isinstance": isinstance,
        "iter": iter,
        "take": take,
    }

    def reply(how, value, boxes=(), before=()):
        """The answer as bytes, with what the boxes of the request hold now, where that is something else."""
        known = {id(box): (number, box) for number, box in enumerate(boxes)}
        value = pack(value, hold, known)
        changes = []
        for number, (box, was) in enumerate(zip(boxes, before, strict=True)):
            now = inside_of(box)
            if len(now) != len(was) or any(map(is_not, now, was)):
                changes.append([number, pack_inside(box, hold, known)])
        return json.dumps([how, value, changes]).encode()

    try:
        exec(compile(program, "solution.py", "exec"), module.__dict__)
    except BaseException:
        write(outbox, ["error", None, []])
        return
    write(outbox, ["ok", None, []])
    while (message := read(inbox)) is not None:
        boxes, before = [], []
        try:
            what, *args = [unpack(part, find, boxes) for part in json.loads(message)]
            before = [inside_of(box) for box in boxes]
            answer = reply("ok", do[what](*args), boxes, before)
        except BaseException as error:  # SystemExit too: it is the call that failed
            try:
                answer = reply("error", report(error), boxes[: len(before)], before)
            except BaseException:  # what it holds is no data
                answer = reply("error", ([type(error).__name__], []))
        write(outbox, answer)


def run_tests(inbox, outbox):
    """Whether the tests, read from standard input once the program is loaded, all pass."""
    alive = True

    def receive(boxes):
        """The program's reply, as ("ok", value) or ("error", an exception). Changes the boxes that were sent."""
        nonlocal alive
        try:
            how, value, changes = json.loads(read(inbox) if alive else b"")
            value = unpack(value, far, boxes)
            changed = [(boxes[n], unpack_inside(boxes[n], inside, far, boxes)) for n, inside in changes]
            for box, items in changed:
                fill(box, items)
            alive = how in ("ok", "error")
            if how == "error" and value:
                value = raised(*value)
        except Exception:  # the pipe's end, or whatever a forged message does
            alive = False
        if not alive:
            raise Gone
        return how, value

    def far(number):
        return Far(ask, int(number))

    def ask(*message):
        nonlocal alive
        sent = {}
        request = json.dumps([pack(part, _number, sent) for part in message]).encode()
        try:
            write(outbox, request)
        except OSError:
            alive = False  # for good, even where a bare `except` in a test goes on
        how, value = receive([box for _, box in sent.values()])
        if how == "ok":
            return value
        raise value

    if receive([])[0] == "error":
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
    """What the program's process finds a thing by: the number that it gave, or where the standard library has it.

    The latter goes from the tests to the program alone; a program could name `os._exit`.
    """
    if type(value) is Far:
        return value._number
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    known = callable(value) and isinstance(module, str) and module in sys.stdlib_module_names
    if known and getattr(sys.modules.get(module), name, None) is value:
        return [module, name]
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
