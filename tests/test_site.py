"""The site without Sphinx: what becomes of a notebook's cells, links and tables, and the pages that are generated."""

import dataclasses
import json
import re

import pandas as pd
import pytest
from conftest import ROOT

from irpo_utils.extras.process.reward_model import Solution
from irpo_utils.files import ConfigError, MissingArtefact
from irpo_utils.methods.select import AUDIT_KEYS
from irpo_utils.model.records import Pair, Prompt, Sample
from irpo_utils.run.config import Config
from irpo_utils.settings import names_of
from irpo_utils.site import build, chapters, links, parameters, prepare

PLACE = "irpo_utils/site/pages"
PAGES = {"notebooks/01_sample.ipynb": "01_sample.ipynb", f"{PLACE}/family.md": "family.md"}


def cell(kind, source, tags=(), outputs=()):
    made = {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}}
    return made | ({"outputs": list(outputs)} if kind == "code" else {})


def figure(**metadata):
    return {
        "output_type": "display_data",
        "data": {"image/png": "AAAA", "text/plain": "<Figure>"},
        "metadata": metadata,
    }


# The book.


def test_the_book_has_every_page_and_every_notebook_once():
    named = [p.name if isinstance(p, chapters.Notebook) else p for pages in chapters.BOOK.values() for p in pages]
    assert len(named) == len(set(named))
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} <= set(named)
    texts = {p for pages in chapters.BOOK.values() for p in pages if isinstance(p, str)}
    assert {path.stem for path in chapters.PAGES.glob("*.md")} == texts | {"index"}


def headings(notebook):
    """The anchors of a notebook's headings, as MyST makes them of three levels."""
    cells = json.loads(notebook.read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    found = re.findall(r"^#{1,3} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in found}


def test_a_link_to_a_heading_of_a_notebook_finds_it_there_and_in_its_executed_copy():
    executed = {notebook.name: notebook.executed() for notebook in chapters.notebooks()}
    for path in chapters.PAGES.glob("*.md"):
        for name, section in re.findall(r"notebooks/(\w+)\.ipynb#([\w-]+)\)", path.read_text()):
            for notebook in filter(None, (ROOT / f"notebooks/{name}.ipynb", executed[name])):
                assert section in headings(notebook), (path.name, name, section)


def test_the_contents_hold_what_is_present_and_no_empty_part():
    contents = chapters.toctrees({"results", "01_sample", "02_pairs"})
    assert re.findall(r":caption: (.*)", contents) == ["Begin", "The stages, as executed"]
    assert contents.index("01_sample") < contents.index("02_pairs") and "quickstart" not in contents


def test_a_notebook_that_was_not_executed_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chapters, "REFERENCE", tmp_path / "none")
    monkeypatch.setattr(links, "ROOT", ROOT)
    build.write_sources(tmp_path / "source")
    assert "quickstart is left out: no executed copy in outputs/reference" in capsys.readouterr().out
    assert not list((tmp_path / "source").glob("*.ipynb"))
    assert "checkout:notebooks/01_sample.ipynb" in (tmp_path / "source/index.md").read_text()


# A notebook's cells.


def test_the_cell_of_parameters_shows_what_was_used():
    cells = [
        cell("code", 'run = "outputs/tiny"  # the folder\nseed = 0\nrates = [1,\n 2]', ["parameters"]),
        cell("code", '# Parameters\nrun = "outputs/mine"\nseed = 3\nrates = [3]', ["injected-parameters"]),
        cell("code", "print(run)"),
    ]
    shown = prepare.with_used_parameters(cells)
    assert [c["source"] for c in shown] == [
        'run = "outputs/mine"  # the folder\nseed = 3\nrates = [1,\n 2]',
        "print(run)",
    ]


def test_a_figure_has_an_alt_text_of_its_own_or_of_its_place():
    cells = [
        cell("markdown", "# Title\n\n| a | table |\n\nThe *first* sentence. The second."),
        cell("code", "plot()", outputs=[figure()]),
        cell("markdown", "## How many\n\nOf `N` samples: see [there](x.md)."),
        cell("markdown", "Another cell."),
        cell("code", "plot()", outputs=[figure()]),
        cell("code", "plot()", outputs=[figure(**{"image/png": {"alt": "its own", "width": 3}})]),
        cell("code", "plot()", outputs=[figure()]) | {"metadata": {"mystnb": {"image": {"alt": "the cell's"}}}},
    ]
    prepare.add_alt_texts(cells)
    assert [c["metadata"]["mystnb"]["image"]["alt"] for c in cells if c["cell_type"] == "code"] == [
        "Figure: Title. The first sentence.",
        "Figure: How many. Of N samples:",
        "its own",
        "the cell's",
    ]


def test_no_line_ends_beside_a_plus_minus():
    assert prepare.unbroken("88.7 ± 5.9, mean ± deviation") == "88.7\u00a0±\u00a05.9, mean ± deviation"
    assert prepare.unbroken("after three 96.3\n% (means)") == "after three 96.3\u00a0% (means)"
    code = "```\n7 % 2\n```\n`7 % 2`"
    assert links.in_prose(code, prepare.unbroken) == code


def test_the_note_stands_below_the_title():
    cells = [cell("markdown", "# Title\n\nText.")]
    prepare.add_note(cells, "Note.")
    assert cells[0]["source"] == "# Title\n\nNote.\n\nText."
    with pytest.raises(ConfigError, match="begins with its title"):
        prepare.add_note([cell("code", "1")], "Note.")


# What a model wrote is text.


def test_tables_of_pandas_are_built_anew():
    frame = pd.DataFrame({"a & b": ["1.0 ± 0.5", "<b>x</b>"]}, index=pd.MultiIndex.from_product([["i"], ["j", "k"]]))
    for html in (frame.to_html(), frame._repr_html_(), frame.style.hide(axis="index").format(escape="html").to_html()):
        table = prepare.rebuilt_table(html)
        assert table.startswith('<div class="table-scroll" tabindex="0"><table class="dataframe">')
        assert "a &amp; b" in table
        assert "1.0\u00a0±\u00a00.5" in table and "&lt;b&gt;x&lt;/b&gt;" in table and "style" not in table
    assert 'rowspan="2"' in prepare.rebuilt_table(frame._repr_html_())


@pytest.mark.parametrize(
    "html",
    [
        "<p>text</p>",
        "<table><tr><td><script>alert(1)</script></td></tr></table>",
        "<table><tr><td><img src=x onerror=alert(1)></td></tr></table>",
        "<table><tr><td><a href='javascript:alert(1)'>x</a></td></tr></table>",
        "<table><tr><td>x</td></tr></table><script>alert(1)</script>",
        "<table><tr><td>x</td></tr></table><!-- <script>alert(1)</script> -->",
        "<table><tr><td>x</div></td></tr></table>",
        "<table><tr><td>not closed",
        "text <table><tr><td>x</td></tr></table>",
        "<svg onload=alert(1)><table><tr><td>x</td></tr></table></svg>",
        "",
    ],
)
def test_other_html_is_not_shown(html):
    assert prepare.rebuilt_table(html) is None
    output = {"data": {"text/html": html, "text/plain": "its text"}}
    prepare.make_safe(output)
    assert output["data"] == {"text/plain": "its text"}


def test_attributes_and_styles_of_a_table_are_left_out():
    html = (
        '<style>@import "https://x"</style><table onclick="a()" style="background:url(https://x)">'
        '<tr><td colspan="2" id="x">1</td></tr></table>'
    )
    table = '<table class="dataframe"><tr><td colspan="2">1</td></tr></table>'
    assert prepare.rebuilt_table(html) == f'<div class="table-scroll" tabindex="0">{table}</div>'


def test_a_cell_of_a_table_that_was_not_escaped_is_no_markup():
    styled = pd.DataFrame({"response": ["<script>alert(1)</script>"]}).style.to_html()
    assert "<script>" in styled and prepare.rebuilt_table(styled) is None


def test_of_other_kinds_of_output_none_is_shown():
    output = {"data": {"application/javascript": "alert(1)", "image/svg+xml": "<svg/>"}}
    prepare.make_safe(output)
    assert output["data"] == {"text/plain": "(not shown)"}
    for source in ("a <b>word</b>", "![x](https://somewhere/x.png)", "<!-- x -->", "[x]: javascript:alert(1)"):
        output = {"data": {"text/markdown": source, "text/plain": "<Markdown object>"}}
        prepare.make_safe(output)
        assert output["data"] == {"text/plain": source}
    output = {"data": {"text/markdown": "p < 0.05 and **bold**", "text/plain": "x"}}
    prepare.make_safe(output)
    assert output["data"]["text/markdown"] == "p < 0.05 and **bold**"


# Links.


@pytest.mark.parametrize(
    ("text", "folder", "expected"),
    [
        ("[x](01_sample.ipynb#by-hand)", "notebooks", "[x](01_sample.ipynb#by-hand)"),
        ("[`x`](../../../notebooks/01_sample.ipynb)", PLACE, "[`x`](01_sample.ipynb)"),
        ("[x](../README.md#what-comes-out)", "notebooks", "[x](index.md)"),
        ("[x](README.md)", "", "[x](index.md)"),
        ("[x](../irpo_utils/loop.py)", "notebooks", "[x](checkout:irpo_utils/loop.py)"),
        ("[x](../../../notebooks/31_speed.ipynb)", PLACE, "[x](checkout:notebooks/31_speed.ipynb)"),
        ("[x](family.md)", PLACE, "[x](family.md)"),
        ("[x](../../../notebooks/01_sample.ipynb#by-hand)", PLACE, "[x](01_sample.ipynb#by-hand)"),
        ("[x](../../loop.py)", PLACE, "[x](checkout:irpo_utils/loop.py)"),
        ("[x](../irpo_utils/site/pages/family.md)", "notebooks", "[x](family.md)"),
        ("[x](https://arxiv.org/abs/2404.19733) [y](#here)", "", "[x](https://arxiv.org/abs/2404.19733) [y](#here)"),
        ("![a figure](outputs/reference/tune/nll.png)", "", "![a figure](outputs/reference/tune/nll.png)"),
        ("[f](outputs/reference/tune/nll.png)", "", "[f](checkout:outputs/reference/tune/nll.png)"),
        ("```\n[x](no.md)\n```", "", "```\n[x](no.md)\n```"),
    ],
)
def test_links_lead_to_pages_or_into_the_checkout(text, folder, expected):
    assert links.relinked(text, folder, PAGES) == expected


def test_a_link_to_nothing_is_refused():
    with pytest.raises(MissingArtefact, match=r"notebooks/no\.ipynb"):
        links.relinked("[x](no.ipynb)", "notebooks", PAGES)


def test_the_figures_of_a_page_are_found():
    assert links.figures("![a](x/y.png) [b](z.png) ![c](https://d/e.png)\n```\n![f](g.png)\n```\n") == ["x/y.png"]


# Pages that say what the code says.


def test_the_configuration_has_every_parameter_with_its_range_and_comment():
    text = parameters.tables()
    shown = re.findall(r"^\| `([\w.]+)` \| ", text.partition("## Presets")[0], re.MULTILINE)
    assert set(shown) == set(names_of(Config)) - {"method_settings"} and len(shown) == len(set(shown))
    assert "| `train.beta` | `0.1` | a number, above 0 | how strongly" in text
    assert '| `model.tuning` | `lora` | `lora` or `full` | "full" for a model small enough to save whole |' in text
    assert "a list: a number, above 0 | per iteration; the last one goes on" in text
    assert "| `train.batch` | `16` | a whole number, 1 to 1,000,000 | Pairs per optimizer step; where" in text
    assert "| `threads` | `2` | a whole number, 1 to 1,024 | CPU threads of a stage; part of what" in text
    assert "| `tiny` |" in text
    assert not re.findall(r"^\| `([\w.]+)` .*\|  \|$", text, re.MULTILINE)  # each says what it is


def test_the_page_of_artefacts_names_every_field():
    named = set(re.findall(r"`([\w.]+)`", (chapters.PAGES / "artefacts.md").read_text()))
    wanted = {f.name for kind in (Prompt, Sample, Pair, Solution) for f in dataclasses.fields(kind)} | set(AUDIT_KEYS)
    for path in chapters.REFERENCE.rglob("*.json"):
        facts = json.loads(path.read_text())
        if path.name == "evaluation.json":
            wanted |= {re.sub(r"^(maj|pass)\d+.*", r"\g<1>32", name) for split in facts.values() for name in split}
        elif path.name in ("audit.json", "training.json", "reward.json"):
            nested = facts.get("reward_model", {})
            wanted |= {re.sub(r"^(auc|ranked)_(low|high)$", r"\1", name) for name in (*facts, *nested)}
    for name in ("metrics", "methods", "timing"):
        for path in chapters.REFERENCE.rglob(f"{name}.csv"):
            header = path.read_text().partition("\n")[0].split(",")
            wanted |= {re.sub(r"^(maj|pass)\d+$", r"\g<1>32", name) for name in header}
    assert not wanted - named


# The command.


def test_the_command_takes_nothing_else_and_names_what_is_missing(monkeypatch):
    with pytest.raises(ConfigError, match="--site: takes nothing else"):
        build.main(["tiny"])
    monkeypatch.setenv(build.PYTHON, "/no/such/python")
    with pytest.raises(MissingArtefact, match=r"run_all\.sh --site"):
        build.main([])
