"""Kernels for the driver's notebooks that are forked from one process which has imported their libraries already.

PyTorch, transformers and peft take ten seconds of a CPU to import, longer than many a stage takes. A run starts one
process that imports what its notebooks import, and forks a kernel for each of them.

On Linux, and where no GPU is: a process forked from one that has looked at CUDA cannot use it, and with a GPU the
stages are long. Elsewhere every kernel is started anew. What a notebook computes is the same.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from ..files import ROOT
from .code import parsed, written
from .notebooks import can_fork


def imported(source: Path) -> list[str]:
    """The modules that a notebook's cells import."""
    found: dict[str, None] = {}
    for cell in json.loads(source.read_text())["cells"]:
        try:
            tree = parsed("".join(cell["source"]) if cell["cell_type"] == "code" else "")
        except SyntaxError:  # which the kernel will report
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= dict.fromkeys(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= dict.fromkeys([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return list(found)


class Forker:
    """The process that kernels are forked from. It ends when this one does, and its kernels a second later.

    Args:
        threads: CPU threads of a kernel; libraries read them when they are imported.
    """

    def __init__(self, threads: int):
        self._channel, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": str(threads), "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._answers, self._turn = self._channel.makefile(), threading.Lock()

    def fork(self, arguments: list[str], env: dict[str, str], cwd: str, modules: Iterable[str]) -> Forked:
        """A kernel with command-line `arguments`, in a process that has imported `modules` (those that there are)."""
        request = {"arguments": arguments, "env": env, "cwd": cwd, "modules": list(modules)}
        with self._turn, contextlib.suppress(OSError):
            self._channel.sendall((json.dumps(request) + "\n").encode())
            if answer := self._answers.readline():
                return Forked(int(answer))
        raise RuntimeError("the process that kernels are forked from is gone; the same command goes on")


class Forked:
    """A forked kernel, with what `subprocess.Popen` offers and the kernel's manager asks for."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None
        try:
            self._end = os.pidfd_open(pid)
        except ProcessLookupError:
            self.returncode = 1

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self) -> int:
        return self._ended(None)

    def _ended(self, patience: float | None) -> int | None:
        if self.returncode is None:
            end = select.poll()  # select itself knows the first 1,024 files alone
            end.register(self._end, select.POLLIN)
            if end.poll(patience):
                os.close(self._end)
                self.returncode = 1  # another process is its parent, and knows which it was
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._end, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def forker(threads: int, package: tuple[tuple[str, int], ...]) -> Forker:
    """One for each number of threads; and a new one where the package was edited, since the old one has imported it."""
    return Forker(threads)


_first = threading.Lock()  # notebooks may be run in several threads


class ForkedProvisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        env, cwd = kwargs["env"], kwargs.get("cwd") or os.getcwd()
        with _first:
            source = forker(int(env["OMP_NUM_THREADS"]), tuple(written().items()))
        self.process = source.fork(cmd[cmd.index("ipykernel_launcher") + 1 :], env, str(cwd), self.parent.modules)
        self.pid = self.pgid = self.process.pid
        self.cwd = cwd
        return self.connection_info


class Manager(AsyncKernelManager):
    """Starts the driver's kernels, and ends them without the interrupt that an idle kernel would complain of."""

    modules: tuple[str, ...] = ()

    async def _async_pre_start_kernel(self, **kwargs: Any) -> Any:
        if self.provisioner is None and can_fork():
            self.kernel_id = self.kernel_id or os.urandom(8).hex()
            self.provisioner = ForkedProvisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**kwargs)

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        kw["env"].pop("JPY_SESSION_NAME", None)  # the open notebook that started the driver, and not this kernel's
        await super()._async_launch_kernel(kernel_cmd, **kw)

    async def _async_interrupt_kernel(self) -> None:
        pass


def manager(notebook: Path, modules: Iterable[str]) -> type[Manager]:
    """A manager of the notebook's kernel, which will load `modules` beside those that its cells import."""
    return type("Manager", (Manager,), {"modules": (*imported(notebook), *modules)})


def serve(channel: socket.socket) -> None:
    """Fork a kernel for every request; the parent's end of `channel` is a `Forker`'s."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kernels that have ended leave nothing to wait for
    with channel, channel.makefile() as requests:
        for line in requests:
            request = json.loads(line)
            for module in request["modules"]:
                with contextlib.suppress(Exception):  # the kernel itself will say it where it matters
                    importlib.import_module(module)
            if select.select([channel], [], [], 0)[0]:  # it was closed while libraries were imported
                return
            pid = os.fork()
            if not pid:
                break
            with contextlib.suppress(BrokenPipeError):  # then there is no further request
                channel.sendall(f"{pid}\n".encode())
        else:
            return
    become_kernel(request)


def become_kernel(request: dict[str, Any]) -> None:
    from ipykernel import kernelapp

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["ipykernel_launcher", *request["arguments"]]
    kernelapp.launch_new_instance()
    # What is left, taking down every module of the libraries, takes two seconds, and nothing comes of it.
    atexit._run_exitfuncs()
    os._exit(0)


if __name__ == "__main__":
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # a kernel ends when the process with this number does
    importlib.import_module("ipykernel.kernelapp")
    serve(socket.socket(fileno=int(sys.argv[1])))
