"""Run a program on its tests in an isolated child process, and believe only the tests.

`bwrap` (bubblewrap) isolates: namespaces of its own for processes, network, IPC and host name, no capabilities, and a
file system that holds Python and the system's libraries, read-only, and an empty /tmp in memory. A seccomp filter
(`syscalls.py`) keeps it from what has no walls, such as kernel keyrings, and from large parts of the kernel: io_uring,
BPF, ptrace, further namespaces, mounts, shared segments, and every socket but a local one. Inside, there are limits on
CPU time, memory, processes, open files and file size; outside, one on the wall clock. What a program prints goes to
/dev/null. When the test runner ends or is killed, the kernel kills whatever is left in its process namespace.
Why the verdict cannot be forged is in `test_runner.py`.

Not covered:
* Flaws of the kernel in the calls that the filter allows: files, memory, processes, threads, pipes and local sockets.
* Memory in sum. It is limited for each process, so that `PROCESSES` of them can hold that many times `MEMORY`. Files in
  memory (`memfd_create`) that no process maps, and what waits in pipes and sockets, can hold more, until the wall clock
  ends it. A cgroup around the whole run would limit it.
* Timing. The CPU's caches and the clock are the host's, and a program near its limit may pass on an idle machine alone.
* Meaning. A program that fits the tests without solving the task passes, as does one that calls on chance and is lucky.

Without libseccomp or pyseccomp, or on other processors than x86_64 and aarch64, there is no filter, and a warning says
so. Then the test runner joins a session keyring of its own, so that no key is shared. Flaws of the whole kernel are not
covered, a program may make sockets of every family (those of AF_VSOCK reach the host of a virtual machine), as root it
may make user namespaces, and shared segments or a user namespace's own file systems can hold memory beyond the limits.

`execution="i-accept-the-risk"` goes without bwrap: the same test runner and limits in a plain child process, in a
temporary folder, killed with its process group. Such a program can read and delete files, use the network and signal
any process of the user's; as root the limit on processes does not bind. It is only for programs that are known to mean
no harm.
"""

from __future__ import annotations

import binascii
import json
import marshal
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

from ...settings import EXECUTIONS
from ...tasks.base import CannotGrade
from . import syscalls, test_runner

ISOLATED, ACCEPTED = EXECUTIONS
MEMORY = 512 << 20  # bytes of address space of a process
FILE = 4 << 20  # bytes of a file
FOLDER = 16 << 20  # bytes of all files
PROCESSES = 8  # and threads; without isolation none, since the limit counts all that the user runs
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache")
PATIENCE = 10  # seconds for starting and ending; the test runner ends itself when its time is up
TEST_RUNNER = Path(test_runner.__file__)


class Refused(CannotGrade):
    """Programs cannot be run in isolation on this machine; the message says what is missing."""


class Job(NamedTuple):
    """A program, and tests that take `names` from it. `before` is source of the tests' own that is run before them."""

    program: str
    tests: str
    names: tuple[str, ...]
    before: str = ""


PROBE = Job("import math, heapq\ndef twice(x): return 2 * x", "assert twice(2) == 4", ("twice",))


class Sandbox:
    """Runs jobs, some side by side. `cpu` and `wall` are the seconds that a program and its tests may take.

    Raises (from a call):
        Refused: `execution` is "isolated", and bwrap is missing or does not work here.
    """

    def __init__(self, execution: str = ISOLATED, cpu: int = 3, wall: float = 15.0, workers: int | None = None):
        self.execution, self.cpu, self.wall = execution, cpu, wall
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.filter = b""  # of system calls, as bwrap reads it; `command` makes it

    def __call__(self, jobs: list[Job]) -> list[bool]:
        """For every job, whether its program passes its tests."""
        _ = self.command
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self.run, jobs))

    @cached_property
    def command(self) -> list[str]:
        """What stands before the test runner's arguments. Tried once. Raises Refused."""
        python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        # -I without the part that would ignore PYTHONHASHSEED: the order of a set is the same in every run.
        runner = [python, "-s", "-S", "-P", "-B", "-c", bytecode(TEST_RUNNER)]
        if self.execution == ACCEPTED:
            return runner
        hint = (
            "Programs are not run without isolation. Install bubblewrap 0.8 or newer (apt install bubblewrap) on a "
            "Linux that lets you make namespaces; or, for programs that are known to mean no harm, "
            f"set task.execution={ACCEPTED} (grade: --execution {ACCEPTED})"
        )
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise Refused(f"bwrap is not installed. {hint}")
        command = [bwrap, *isolation(python), "--", *runner]
        unfiltered = ""
        try:
            self.filter = syscalls.seccomp_filter()
        except syscalls.Missing as error:
            unfiltered = str(error)
        wrong = self._wrong(command)
        if wrong and self.filter:
            self.filter, unfiltered = b"", f"bwrap does not work with it: {wrong}"
            wrong = self._wrong(command)
        if wrong:
            raise Refused(f"bwrap does not work on this machine ({wrong}). {hint}")
        if unfiltered:
            warn_once(
                f"programs run without a filter of system calls ({unfiltered}). All of the kernel is open to them, and "
                "sockets of every family; what that means stands at the top of extras/code/sandbox.py"
            )
        return command

    def _wrong(self, command: list[str]) -> str:
        """Why a program that is right does not pass; empty if it does."""
        try:
            return "" if self._attempt(command, PROBE) else "a program that is right fails in it"
        except RuntimeError as error:
            return str(error)

    def run(self, job: Job) -> bool:
        """Whether a program passes its tests. Raises RuntimeError where the test runner does not start, three times."""
        for last in (False, False, True):
            try:
                return self._attempt(self.command, job)
            except RuntimeError:
                if last:
                    raise

    def _attempt(self, command: list[str], job: Job) -> bool:
        isolated = self.execution == ISOLATED
        limits = {
            "isolated": isolated,
            "keyring": isolated and not self.filter,
            # A user that nobody is, so that a limit on its processes counts those of this program alone.
            "user": (1 << 30) + secrets.randbelow(1 << 29) if isolated and os.getuid() == 0 else 0,
            "processes": PROCESSES if isolated else 0,
            "wall": self.wall,
            "rlimits": {"CPU": self.cpu, "AS": MEMORY, "FSIZE": FILE, "NOFILE": 64, "CORE": 0},
        }
        tests = json.dumps({"before": job.before, "tests": job.tests, "names": job.names})
        frames = [job.program.encode("utf-8", "surrogatepass"), tests.encode()]
        request = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)
        temporary = partial(tempfile.TemporaryDirectory, prefix="irpo-", ignore_cleanup_errors=True)
        # Isolated, it has a /tmp of its own.
        with nullcontext("/") if isolated else temporary() as folder, readable(self.filter) as fds:
            filtered = [part for fd in fds for part in ("--seccomp", str(fd))]
            process = subprocess.Popen(
                [*command[:1], *filtered, *command[1:], json.dumps(limits)],
                pass_fds=fds,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            try:
                out, err = process.communicate(request, self.wall + PATIENCE)
            except subprocess.TimeoutExpired as error:
                out, err = error.stdout or b"", error.stderr or b""
                process.kill()
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=PATIENCE)
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        reports = out.split()
        if reports[:1] != [b"ready"]:
            last = err.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise RuntimeError(f"the test runner does not start: {last[0]}")
        return reports == [b"ready", b"passed"]


def bytecode(path: Path) -> str:
    """Source that runs a file's bytecode. To compile the file for every program would take a tenth of the time."""
    code = marshal.dumps(compile(path.read_text(), path.name, "exec"))
    text = binascii.b2a_base64(code, newline=False).decode()
    return f"# {path.name}\nimport binascii, marshal\nexec(marshal.loads(binascii.a2b_base64('{text}')))"


@contextmanager
def readable(data: bytes) -> Iterator[tuple[int, ...]]:
    """A descriptor to read `data` from; none if it is empty. A pipe holds 64 KB, and a filter is smaller than that."""
    if not data:
        yield ()
        return
    reader, writer = os.pipe()
    try:
        with open(writer, "wb") as file:
            file.write(data)
        yield (reader,)
    finally:
        os.close(reader)


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def isolation(python: str) -> list[str]:
    """The arguments that make bwrap isolate: only Python and libraries, read-only, and an empty /tmp."""
    visible = [p for p in LIBRARIES if os.path.exists(p)]
    visible += [p for p in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix)) if p not in visible]
    if not python.startswith(tuple(f"{p}/" for p in visible)):
        visible.append(python)
    above = dict.fromkeys(str(folder) for path in visible for folder in [*Path(path).parents][-2::-1])
    binds = [text for folder in above for text in ("--dir", folder)]  # which others than root may enter, too
    binds += [text for path in visible for text in ("--ro-bind", path, path)]
    devices = ["--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
    # As root the test runner becomes a user of its own, which takes two capabilities: root's processes are not counted.
    as_root = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    user = as_root if os.getuid() == 0 else ["--unshare-user", "--disable-userns"]
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    # Nobody inside can kill process 1, and all end with it.
    ends = ["--die-with-parent", "--new-session", "--as-pid-1"]
    scratch = ["--perms", "1777", "--size", str(FOLDER), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*namespaces, "--cap-drop", "ALL", *user, *ends, *binds, *devices, *scratch]
