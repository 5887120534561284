"""An executed notebook as a page: what is shown of its cells and outputs.

Each function is one change, made in place on a copy. What a model wrote is text. Of HTML only pandas' tables stay, and
they are built anew.
"""

from __future__ import annotations

import ast
import html
import re
from html.parser import HTMLParser
from typing import Any

from ..files import ConfigError
from .links import in_prose

Cell = dict[str, Any]
# Kinds of output that are shown. An image in SVG would be a document of its own, with scripts.
SHOWN = ("image/png", "image/jpeg", "text/html", "text/markdown", "text/plain")
TABLE_TAGS = {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"}
AROUND = {"div", "style"}  # what pandas puts around a table; left out
SPANS = {"rowspan", "colspan"}
_PLUS_MINUS = re.compile(r"(?<=\S)\s?±\s?(?=\d)")
_PERCENT = re.compile(r"(?<=\d)\s%")
_MARKUP = re.compile(r"<[a-zA-Z/!?]|\]\s*[(:\[]")  # HTML, links and images
_HEADING = re.compile(r"^#{1,6}\s+(.+)$", re.MULTILINE)


def prepared(cells: list[Cell], note: str) -> list[Cell]:
    """The cells as the page shows them. `note` stands below the title."""
    cells = with_used_parameters(cells)
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = in_prose(cell["source"], unbroken)
        for output in cell.get("outputs", []):
            make_safe(output)
    add_alt_texts(cells)
    add_note(cells, note)
    return cells


def with_used_parameters(cells: list[Cell]) -> list[Cell]:
    """Without the cells that papermill injected; the cell of parameters shows their values instead of its own."""
    injected = [c for c in cells if "injected-parameters" in c["metadata"].get("tags", [])]
    values = {name: value for c in injected for name, value, _ in assignments(c["source"])}
    kept = [c for c in cells if c not in injected]
    for cell in kept:
        if "parameters" in cell["metadata"].get("tags", []):
            lines = cell["source"].split("\n")
            for name, old, line in assignments(cell["source"]):
                if name in values:
                    lines[line] = lines[line].replace(old, values[name], 1)
            cell["source"] = "\n".join(lines)
    return kept


def assignments(source: str) -> list[tuple[str, str, int]]:
    """The assignments `name = value` of a cell that take one line each: name, value as it is written, line from 0."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.lineno == node.end_lineno:
            found.append((node.targets[0].id, ast.get_source_segment(source, node.value) or "", node.lineno - 1))
    return found


def unbroken(text: str) -> str:
    """Text in which no line ends beside a ± or before a %. (A line of MyST that begins with % would not be shown.)"""
    return _PERCENT.sub("\u00a0%", _PLUS_MINUS.sub("\u00a0±\u00a0", text))


def make_safe(output: dict[str, Any]) -> None:
    """Keep of an output what cannot be markup of somebody else: text, pixels, tables that are built anew."""
    data = output.get("data")
    if data is None:
        return
    for kind in [kind for kind in data if kind not in SHOWN]:
        del data[kind]
    if "text/html" in data:
        table = rebuilt_table(data.pop("text/html"))
        if table:
            data["text/html"] = table
    if _MARKUP.search(data.get("text/markdown", "")):
        data["text/plain"] = data.pop("text/markdown")  # its source, to be read
    data.setdefault("text/plain", "(not shown)")


class _Tables(HTMLParser):
    """Reads HTML that is nothing but tables, and writes them anew: known tags, escaped text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[str] = []
        self.foreign = False  # something was met that is no table of pandas'

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in AROUND | TABLE_TAGS:
            self.open.append(tag)
        else:
            self.foreign = True
        if tag in TABLE_TAGS:
            spans = "".join(f' {k}="{v}"' for k, v in attributes if k in SPANS and (v or "").isdigit())
            self.parts.append(f'<{tag} class="dataframe">' if tag == "table" else f"<{tag}{spans}>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.foreign = True
        elif tag in TABLE_TAGS:
            self.parts.append(f"</{tag}>")

    def handle_data(self, text: str) -> None:
        if "table" in self.open:
            self.parts.append(html.escape(unbroken(text)))
        elif text.strip() and self.open[-1:] != ["style"] and "div" not in self.open:
            self.foreign = True

    def handle_comment(self, data: str) -> None:
        self.foreign = True

    handle_decl = handle_pi = unknown_decl = handle_comment


def rebuilt_table(source: str) -> str | None:
    """A table that pandas wrote, without its own style, in a wrapper that scrolls; None for any other HTML."""
    reader = _Tables()
    reader.feed(source)
    reader.close()
    table = "".join(reader.parts).strip()
    if reader.foreign or reader.open or not table.startswith("<table"):
        return None
    return f'<div class="table-scroll" tabindex="0">{table}</div>'


def add_alt_texts(cells: list[Cell]) -> None:
    """Give each figure an alt text: the notebook's own, else the heading above it and the first sentence below that."""
    heading, sentence = "A figure", ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            found = _HEADING.split(cell["source"])
            if len(found) > 1:
                heading, sentence = plain(found[-2]), ""
            sentence = sentence or first_sentence(found[-1])
        for output in cell.get("outputs", []):
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                image = cell["metadata"].setdefault("mystnb", {}).setdefault("image", {})
                given = output.get("metadata", {})
                own = given.get("alt") or next((v["alt"] for v in given.values() if "alt" in v), None)
                image.setdefault("alt", own or f"Figure: {heading}. {sentence}".strip())


def first_sentence(markdown: str) -> str:
    """The first sentence of the first paragraph of prose; "" where there is none."""
    for paragraph in re.split(r"\n\s*\n", markdown):
        text = plain(paragraph)
        if text and not re.match(r"[|$<*`\d-]", paragraph.lstrip()):
            return re.split(r"(?<=[.?!:])\s", text)[0]
    return ""


def plain(markdown: str) -> str:
    """Inline Markdown as plain text, on one line."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"\s+", " ", re.sub(r"[*`$]", "", text)).strip()


def add_note(cells: list[Cell], note: str) -> None:
    """Put a note below the title. Raises ConfigError for a notebook that does not begin with one."""
    first = cells[0]["source"] if cells else ""
    if not first.startswith("# "):
        raise ConfigError("a notebook of the site begins with its title, a Markdown cell with # Title")
    title, _, rest = first.partition("\n")
    cells[0]["source"] = f"{title}\n\n{note}\n{rest}"
