"""The page of parameters, from the settings' own fields: names, defaults, ranges, and the comments beside them."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ..run.config import Config
from ..run.presets import presets
from ..settings import Section, section_of

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def tables() -> str:
    """All parameters and presets as Markdown: a section for each section of the configuration."""
    sections = {name: kind for name, field in Config.model_fields.items() if (kind := section_of(field))}
    parts = [table("The run", "", Config, sections)]
    parts += [table(f"`{name}`", f"{name}.", kind) for name, kind in sections.items()]
    parts.append("## Presets\n\n" + rows(("preset", "what it is"), ((f"`{n}`", text) for n, text in presets().items())))
    return "\n".join(parts)


def table(title: str, prefix: str, section: type[Section], without: Any = ()) -> str:
    """A section: its title, its docstring, and a row for each parameter."""
    about = inspect.cleandoc(vars(section).get("__doc__") or "")
    said = {name: text for kind in reversed(section.__mro__) for name, text in comments(kind).items()}
    lines = []
    for name, field in section.model_fields.items():
        if name in without or name == "method_settings":  # what `METHOD.train.lr` sets
            continue
        text = "; ".join(t for t in (said.get(name), field.description) if t)
        lines.append((f"`{prefix}{name}`", written(field.default), takes(field), text))
    return f"## {title}\n\n{about}\n\n" + rows(("parameter", "default", "takes", "what it is"), lines)


def rows(head: tuple[str, ...], lines: Any) -> str:
    """A Markdown table."""
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in cells) + "\n"


def written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if value == "":
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def takes(field: FieldInfo) -> str:
    """What a parameter may be: its kind and its range."""
    kind, limits = field.annotation, limits_of(field.metadata)
    if get_origin(kind) is tuple:
        return f"a list: {item(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    return KINDS[kind] + limits


def item(kind: Any) -> str:
    """What the items of a list may be."""
    base = getattr(kind, "__origin__", kind)
    metadata = [m for given in getattr(kind, "__metadata__", ()) for m in getattr(given, "metadata", ())]
    return KINDS[base] + limits_of(metadata)


def limits_of(metadata: list[Any]) -> str:
    found = {name: getattr(m, name) for m in metadata for name in ("ge", "gt", "le") if hasattr(m, name)}
    if {"ge", "le"} <= set(found):
        return f", {found['ge']:,} to {found['le']:,}"
    return f", at least {found['ge']:,}" if "ge" in found else f", above {found['gt']:,}" if "gt" in found else ""


def comments(section: type) -> dict[str, str]:
    """Field -> what the comments above and beside it say; none for a class that is no section of the configuration."""
    if not issubclass(section, Section):
        return {}
    source = textwrap.dedent(inspect.getsource(section))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    at = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    alone = {n for n in at if source.splitlines()[n - 1].lstrip().startswith("#")}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            found[node.target.id] = " ".join(at[n] for n in range(first, node.end_lineno + 1) if n in at)
    return found
