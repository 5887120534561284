"""Execute a notebook with papermill: what the driver does with every stage, and with the reports."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ..files import NOTEBOOKS, ConfigError, load_object, relative

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # its retries are printed line by line otherwise
    "TRANSFORMERS_VERBOSITY": "error",
}


class StageFailed(RuntimeError):
    """A notebook's cell failed, or its kernel died."""


def can_fork() -> bool:
    """Whether kernels are forked here: on a Linux that can tell when another process's child ends, without a GPU."""
    if sys.platform != "linux" or Path("/proc/driver/nvidia").exists():
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def run_notebook(source: Path, target: Path, parameters: dict, threads: int, uses: Iterable[str] = ()) -> None:
    """Execute a notebook with papermill. Where a cell fails the executed copy is `target` with "failed" in its name.

    Args:
        uses: modules that it will load by name, besides those that it imports.

    Raises:
        ConfigError: a parameter that the notebook does not have (papermill itself would only log it).
        StageFailed: a cell failed, or the kernel died.
    """
    import papermill  # takes a second, which `why` and `grade` need not wait
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    unknown = set(parameters) - set(papermill.inspect_notebook(str(source)))
    if unknown:
        raise ConfigError(f"{source.name} has no parameter {', '.join(sorted(unknown))}")
    os.environ.update(
        OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false", PYDEVD_DISABLE_FILE_VALIDATION="1", **QUIET
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    part, failed = target.with_name(f".{target.stem}.part.ipynb"), target.with_stem(f"{target.stem}-failed")
    try:
        papermill.execute_notebook(
            str(source),
            str(part),
            parameters=parameters,
            progress_bar=False,
            cwd=str(NOTEBOOKS.parent),
            kernel_manager_class=load_object("irpo_utils.run.kernels:manager")(source, uses),
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        os.replace(part, target)
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        where = f"cell {error.exec_count} of {source.name}"
        if is_whole(part):
            os.replace(part, failed)
            where += f", executed: {relative(failed)}"
        raise StageFailed(f"{error.ename}: {error.evalue.strip() or 'no message'}\n({where})") from error
    except OSError as error:  # papermill's own writing, which does not say where
        raise OSError(error.errno, error.strerror, str(part)) from None
    except RuntimeError as error:
        if not isinstance(error, DeadKernelError) and "Kernel died" not in str(error):  # the latter: while it starts
            raise StageFailed(f"{source.name} could not be run: {error}; the same command goes on") from error
        raise StageFailed(
            f"the process that ran {source.name} was ended from outside, often for want of memory "
            "(sampling.max_rows and train.micro_batch say how much it takes); the same command goes on"
        ) from None


def is_whole(notebook: Path) -> bool:
    """Whether a notebook was written to its end."""
    try:
        return bool(json.loads(notebook.read_text())["cells"])
    except (OSError, ValueError, KeyError):
        return False
