"""An executed notebook as a page: one file that loads nothing, runs nothing, and shows text as text."""

from __future__ import annotations

import html
import re
from pathlib import Path

from ..files import PACKAGE

# The browser's own lock, should markup come through: styles of the page and images that are part of it, nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
# Beside those that bleach allows.
TAGS = {"h1", "h2", "h3", "p", "br", "hr", "pre", "div", "span", "table", "thead", "tbody", "tr", "th", "td"}


def visible(text: str) -> str:
    r"""The text with its control characters spelled out, as "\x1b" for the one that begins an ANSI code."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def page(notebook: Path, title: str) -> str:
    """The page of an executed notebook: its headings, prose and outputs, without cells tagged "notebook".

    It has no equation: the loss is explained in other notebooks, and so nothing here has to render TeX.
    """
    import bleach  # it comes with nbconvert; they take half a second, which `why` and `grade` need not wait
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    def shown(markup: str) -> str:
        """Markup of a cell or output. A tag that is not allowed is shown as text; a link to a script leads nowhere."""
        allowed = {*bleach.ALLOWED_TAGS, *TAGS}
        return bleach.clean(
            visible(markup), allowed, {"*": ["id", "class"], "a": ["href"]}, protocols=["http", "https"]
        )

    source = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(
        config=Config(TagRemovePreprocessor={"enabled": True, "remove_cell_tags": {"notebook"}}),
        extra_template_basedirs=[str(PACKAGE / "assets")],
        template_name="report",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        sanitize_html=True,
        # nbconvert's own filters allow no table head and no paragraph, and turn ANSI codes into colours.
        filters={"clean_html": shown, "ansi2html": html.escape},
    )
    markdown = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
    sections = re.findall(r"^## (.+)$", markdown, re.MULTILINE)
    made, _ = exporter.from_notebook_node(source, {"title": title, "sections": sections, "policy": POLICY})
    return visible(made)
