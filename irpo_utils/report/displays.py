"""Tables and paragraphs for a notebook, in which a text is never markup: a model or a user may have written it."""

from __future__ import annotations

import html
from collections.abc import Iterable

import pandas as pd
from IPython.display import HTML

from ..run.page import visible


def table(frame: pd.DataFrame) -> HTML:
    """A table without its index. (What `frame.style` makes does not escape what is in it.)"""
    plain = frame.map(_visible).rename(columns=_visible).rename_axis(columns=None)
    with pd.option_context("display.max_colwidth", None):
        return HTML(plain.to_html(index=False, border=0))


def paragraphs(texts: Iterable[str]) -> HTML:
    return HTML("\n".join(f"<p>{html.escape(visible(text))}</p>" for text in texts))


def _visible(value: object) -> object:
    return visible(value) if isinstance(value, str) else value
