"""A run beside another one: the same with some parameters changed, and with all that the change does not touch."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..files import ConfigError, MissingArtefact, locked, relative, resolve, write_text
from .config import Config, differences, dump, read_config
from .presets import key_values
from .stages import method_seeds, plan
from .store import Stage, open_run


def opened(run: str | Path, overrides: Sequence[str] = ()) -> Path:
    """The folder of a run; with `overrides` (`key=value`, as on the command line) that of a run of its own beside it.

    The other run starts with the stages of this one that the change does not touch. Asked for again, it is found again.

    Raises:
        ConfigError: there is no such run, an override is unknown or mistyped, or the other run is not what it was.
    """
    if isinstance(overrides, str):
        raise ConfigError(f'overrides: a list, as ["{overrides}"], got {overrides!r}')
    folder, config = resolve(run), open_run(run)
    wanted = read_config(folder / "config.yaml", key_values(overrides).items())
    if wanted == config:
        return folder
    other = folder.parent / other_name(folder.name, overrides)
    if not (other / "config.yaml").exists():
        write_text(other / "config.yaml", dump(wanted))
    elif found := differences(open_run(other), wanted):
        raise ConfigError(
            f"overrides: {relative(other)} is there, and one of the two runs was changed since ({'; '.join(found)}); "
            f'go on with it as run = "{relative(other)}" without overrides, or rename it to open another'
        )
    with locked(other / ".opened.lock", patience=60.0):  # two notebooks may be opened at once
        take_over(folder, config, other, wanted)
    print(f"{relative(other)}: a run of its own, with {', '.join(overrides)}")
    return other


def other_name(name: str, overrides: Sequence[str]) -> str:
    """A folder's name that says what is changed."""
    readable = "+".join([name, *sorted(overrides)])
    if re.fullmatch(r"[\w.,=+-]{1,80}", readable):
        return readable
    return f"{name[:60]}+{hashlib.sha256(readable.encode()).hexdigest()[:12]}"


def take_over(run: Path, config: Config, other: Path, wanted: Config) -> None:
    """Copy the stages of `run` that are done and would be made just so in `other`."""
    for method, seed in method_seeds(wanted):
        if method not in config.methods:
            continue
        theirs = {stage.manifest_path().relative_to(run): stage for stage in plan(config, run, method, seed)}
        for stage in plan(wanted, other, method, seed):
            twin = theirs.get(stage.manifest_path().relative_to(other))
            if twin and not stage.manifest_path().exists() and is_same(stage, twin):
                copy(twin, stage)


def is_same(stage: Stage, twin: Stage) -> bool:
    """Whether `twin` is done, and was made from what `stage` would be made from."""
    try:
        return twin.is_done() and twin.manifest()["key"] == stage.key()
    except MissingArtefact:  # an input that is to be made anew
        return False


def copy(twin: Stage, stage: Stage) -> None:
    """Copy what `twin` has left, and its executed notebook, to where `stage` would leave it."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    for name in (*twin.writes(), f"{twin.name}.ipynb"):
        source = twin.folder / name
        if source.is_dir():
            shutil.copytree(source, stage.folder / name, dirs_exist_ok=True)
        elif source.exists():
            shutil.copyfile(source, stage.folder / name)
    write_text(stage.manifest_path(), twin.manifest_path().read_text())  # last: from now on it is done
