"""Links of the repository as links of the site: to a page where there is one, else to the file's place in the checkout.

The latter are written `checkout:path`, a scheme of `conf.py`, and work for whoever opens the site from outputs/site.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from ..files import ROOT, MissingArtefact

_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!\[[^\]]*)?\]\((?P<target>[^)\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z][a-z+.-]*:|#", re.IGNORECASE)


def relinked(text: str, folder: str, pages: dict[str, str]) -> str:
    """Markdown with its links rewritten; what stands in code stays.

    Args:
        folder: that of the text, relative to the repository's root.
        pages: file of the repository -> file of the site that shows it.

    Raises:
        MissingArtefact: a link names a file that is not there.
    """

    def rewritten(link: re.Match[str]) -> str:
        return f"{link[1] or ''}]({destination(link['target'], folder, pages, bool(link[1]))})"

    return in_prose(text, lambda prose: _LINK.sub(rewritten, prose))


def in_prose(text: str, change: Callable[[str], str]) -> str:
    """Markdown with a change made in what is not code."""
    parts = _CODE.split(text)
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


def destination(target: str, folder: str, pages: dict[str, str], is_image: bool = False) -> str:
    """Where a link of a text in `folder` leads in the site."""
    if _ELSEWHERE.match(target):
        return target
    path, _, section = target.partition("#")
    path = os.path.normpath(os.path.join(folder, path))
    if path == "README.md":
        return "index.md"
    if path in pages:
        return pages[path] + (f"#{section}" if section else "")
    if not (ROOT / path).exists():
        raise MissingArtefact(f"a link leads to {path}, which is not there")
    return path if is_image else f"checkout:{path}"


def figures(text: str) -> list[str]:
    """The files of the repository that a rewritten text shows as images."""
    prose = "".join(_CODE.split(text)[::2])
    return [link["target"] for link in _LINK.finditer(prose) if link[1] and not _ELSEWHERE.match(link["target"])]
