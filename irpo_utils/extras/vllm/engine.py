"""Sample with vLLM, `sampling.engine=vllm`: the interface of `sampling.sample`, with the model in a process of its own.

A process of its own, because vLLM does not give memory back. An interpreter of its own where `IRPO_VLLM_PYTHON` names
one, because vLLM pins other versions of transformers than this project; pyproject.toml says how to make that
environment.

What differs from `sampling.sample`: the random numbers (`remote.py`). The dev score while training stays with
`sampling.sample`, on the model in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...files import ROOT, ConfigError
from ...methods.sampler import Draw, Sampler, opened_when_asked
from ...model.load import DTYPES, base_path, is_adapter, load_shape, machine_bytes
from ...model.prompts import encode_prompts
from ...model.shape import Shape
from ...settings import LORA_RANKS, Settings
from ...tasks.base import Problem, Task
from ..remote import Answer, Orders, Remote, Request
from . import child

GIB = 1 << 30
MOST_ROWS = 1024  # vLLM's own choice for large GPUs; more rows than tokens of a batch would be refused
TAIL = 30  # lines of its log that are shown when it fails


class EngineError(RuntimeError):
    """The vLLM process did not start, or ended before it had answered; the message has the end of its log."""


def interpreter() -> str:
    """The Python that runs vLLM: `IRPO_VLLM_PYTHON` (a relative path is relative to the project), else this one."""
    named = os.environ.get("IRPO_VLLM_PYTHON")
    if not named:
        return sys.executable
    return str(ROOT / Path(named).expanduser()) if os.sep in named else named


def cache_gib(config: Settings, context: int) -> int:
    """GiB of a CPU engine's cache: room for all its rows of `context` tokens, or a quarter of the machine's memory."""
    shape = Shape.of(load_shape(config.model), config.model.trust_remote_code)
    wanted = min(config.sampling.max_rows, MOST_ROWS) * context * shape.cache * DTYPES[config.model.dtype].itemsize
    quarter = machine_bytes() // 4
    return max(1, min(math.ceil(wanted / GIB), quarter // GIB))


def environment(threads: int, cache: int) -> dict[str, str]:
    """The process's environment variables; threads and `cache` (GiB) are of an engine that computes on a CPU."""
    return {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # else the modules beside child.py could be taken for others of the same name
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, that ends with all that it holds
        # Threads are counted, not tied to cores: stages side by side would be tied to the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": str(cache),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


@cache
def _version(python: str) -> str | None:
    code = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=os.sep)
    except OSError:
        return None
    return done.stdout.strip() or None


def version() -> str | None:
    """vLLM's package and version as the interpreter has them, without importing it; None where it has none."""
    return _version(interpreter())


def check(config: Settings, jobs: int = 1) -> None:
    """Look, before a run, whether `jobs` stages side by side can sample with vLLM.

    Raises:
        ConfigError: they cannot; the message says what to change.
    """
    if version() is None:
        raise ConfigError(
            f"sampling.engine: {interpreter()} has no vLLM; make an environment that has it (pyproject.toml says how) "
            "and set IRPO_VLLM_PYTHON to its python, or set sampling.engine=transformers"
        )
    if jobs > 1 and torch.cuda.is_available():
        raise ConfigError("jobs: vLLM takes the whole GPU; set jobs=1, or sampling.engine=transformers")


class Engine(Remote):
    """A vLLM process that holds M_t. `with Engine(...) as engine` ends it, and gives its memory back.

    Args:
        policy: the folder of M_t (an adapter or a whole model), None for the base.
        longest: tokens of the longest prompt that will be sampled; vLLM sizes its cache and batches by it.

    Raises:
        EngineError: vLLM is not there, or cannot load the model.
    """

    def __init__(self, config: Settings, policy: Path | None, longest: int):
        self._orders = 0
        self.context = longest + config.sampling.max_new_tokens
        adapter = policy if policy is not None and is_adapter(policy) else None
        path = Path(base_path(config.model) if policy is None or adapter else policy).expanduser()
        settings: dict[str, Any] = {
            "model": str(path.absolute()) if path.is_dir() else base_path(config.model),
            "dtype": config.model.dtype,
            "trust_remote_code": config.model.trust_remote_code,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # else the model's own could change temperature, top-p and so on
            "max_model_len": self.context,
            "max_num_seqs": min(config.sampling.max_rows, MOST_ROWS),
            "enable_prefix_caching": True,
            "logprobs_mode": "raw_logprobs",  # before the temperature
            "seed": 0,
        }
        if config.sampling.tensor_parallel > 1:
            settings |= {"tensor_parallel_size": config.sampling.tensor_parallel, "distributed_executor_backend": "mp"}
        if adapter:
            own = json.loads((adapter / "adapter_config.json").read_text())["r"]  # ExPO's is up to twice model.lora_r
            rank = next((r for r in LORA_RANKS if r >= own), None)
            if rank is None:
                raise EngineError(
                    f"vLLM takes adapters of a rank up to {LORA_RANKS[-1]}, not {own}; lower model.lora_r"
                )
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        reading, writing = os.pipe()
        self._replies = os.fdopen(reading)
        try:
            self._process = subprocess.Popen(
                [interpreter(), child.__file__, str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[writing],
                env=environment(config.threads, cache_gib(config, self.context)),
                text=True,
                start_new_session=True,  # a model that is split over GPUs has processes of its own, which end with it
            )
        except OSError as error:
            raise EngineError(f"{interpreter()} cannot be run ({error.strerror}); see IRPO_VLLM_PYTHON") from None
        finally:
            os.close(writing)
        try:
            self._order({"model": settings, "adapter": str(adapter.absolute()) if adapter else None})
            self._reply()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        for pipe in (self._replies, self._process.stdin):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _order(self, order: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _reply(self) -> dict[str, Any]:
        line = self._replies.readline()
        return json.loads(line) if line.endswith("\n") else self._fail()

    def _fail(self) -> Any:
        try:
            code = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # it hangs while it ends
            self._process.kill()
            code = self._process.wait()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace").splitlines()
        how = f"by signal {-code}" + " (out of memory?)" * (code == -9) if code < 0 else f"with exit code {code}"
        missing = "No module named 'vllm'" in "".join(log[-1:])
        hint = " Is it installed there? See IRPO_VLLM_PYTHON." if missing else ""
        tail = "\n".join(log[-TAIL:])
        raise EngineError(f"vLLM ({interpreter()}) ended {how}.{hint} The end of its log:\n{tail}")

    def answers(self, requests: list[Request], orders: Orders) -> Iterator[Answer]:
        """All requests go to vLLM at once.

        Raises:
            ValueError: responses may exceed what the engine was started for. EngineError: the process ended.
        """
        longest = max((len(request.prompt) + request.max_new_tokens for request in requests), default=0)
        if longest > self.context:
            raise ValueError(
                f"prompts and responses of up to {longest} tokens exceed the {self.context} "
                "that the engine was started for"
            )
        self._orders += 1
        prompts, seeds, max_new_tokens = ([r[i] for r in requests] for i in range(3))
        order = {"order": self._orders, "prompts": prompts, "seeds": seeds, "max_new_tokens": max_new_tokens}
        self._order(order | orders._asdict())
        for _ in requests:
            while (reply := self._reply())["order"] != self._orders:
                pass  # of a call that was left before its end
            yield reply["number"], reply["samples"]


@contextmanager
def opened(config: Settings, policy: Path | None, task: Task, problems: list[Problem]) -> Iterator[Sampler]:
    """A sampler of M_t (None: the base) in a vLLM process, which is started by the first draw and ended with the block.

    Args:
        problems: those that will be sampled; the engine is started for their longest prompt.
    """
    with ExitStack() as stack:

        def start() -> Draw:
            longest = max(map(len, encode_prompts(task, sampler.tokenizer, problems).values()))
            return stack.enter_context(Engine(config, policy, longest)).sample

        sampler = opened_when_asked(config, task, start)
        yield sampler
