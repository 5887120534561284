"""The built site: what Sphinx makes of it, and every page in a browser."""

import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from conftest import ROOT
from nbformat import v4

from irpo_utils.files import MissingArtefact, write_text
from irpo_utils.site import build, chapters


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built anew."""
    try:
        build.site_python()
    except MissingArtefact as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "WORK", folder / "work")
        patch.setattr(build, "SITE", folder / "site")
        assert build.main([]) == 0
    return folder / "site"


def test_what_a_model_wrote_is_text_on_the_page(site, tmp_path, monkeypatch):
    attacks = "<script>alert(1)</script> <img src=x onerror=alert(1)> [x](javascript:alert(1)) \x1b[31mred\x1b[0m $$x$$"
    outputs = [v4.new_output("stream", text=attacks)]
    for kind in ("text/plain", "text/html", "text/markdown", "text/latex", "image/svg+xml", "application/javascript"):
        outputs.append(v4.new_output("display_data", {kind: attacks}))
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("print(response)", outputs=outputs)]
    language = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"language_info": language}), tmp_path / "executed.ipynb")

    def sources(target):
        write_text(target / "index.md", "# Index\n\n```{toctree}\n01_sample\n```\n")
        build.write_notebook(chapters.Notebook("01_sample"), tmp_path / "executed.ipynb", target, {})

    monkeypatch.setattr(build, "write_sources", sources)
    monkeypatch.setattr(build, "WORK", tmp_path / "work")
    monkeypatch.setattr(build, "SITE", tmp_path / "site")
    assert build.main([]) == 0
    page = (tmp_path / "site/01_sample.html").read_text()
    assert page.count("&lt;script&gt;alert(1)") == 3  # the stream, the plain text, and the Markdown as its source
    assert "<script>alert" not in page and "<img src=x" not in page and 'href="javascript' not in page
    assert "MathJax" not in page and "tex-svg" not in page


class Anchors(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


def test_every_link_of_the_site_leads_somewhere(site):
    pages = {path: Anchors(path) for path in site.glob("*.html")}
    for page, anchors in pages.items():
        for link in anchors.links:
            if re.match(r"[a-z]+:", link):
                assert link.startswith("https://") or link.startswith("http://"), (page.name, link)
                continue
            path, _, section = unquote(link).partition("#")
            if path.startswith("../../"):  # from outputs/site to the checkout
                assert (ROOT / path.removeprefix("../../")).exists(), (page.name, link)
                continue
            target = site / path if path else page
            assert target.is_file(), (page.name, link)
            assert not section or section in pages[target].names, (page.name, link)


@pytest.fixture
def browser():
    """Headless Chromium: IRPO_CHROMIUM is its path, IRPO_CHROMIUM_ARGS what it is started with besides."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = os.environ.get("IRPO_CHROMIUM")
    if not path or not Path(path).is_file():
        pytest.skip("IRPO_CHROMIUM names no Chromium")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", *shlex.split(os.environ.get("IRPO_CHROMIUM_ARGS", ""))]
        found = playwright.chromium.launch(executable_path=path, args=arguments, timeout=60_000)
        yield found
        found.close()


FAULTS = """() => {
    const faults = [], root = document.documentElement, text = document.querySelector("main").cloneNode(true);
    if (root.scrollWidth > root.clientWidth) faults.push(`scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}`);
    for (const image of document.querySelectorAll("main img"))
        if (!image.alt.trim() || !image.naturalWidth) faults.push(`image: ${image.src}`);
    for (const equation of document.querySelectorAll("main .math"))
        if (!equation.querySelector("mjx-container svg")) faults.push(`equation: ${equation.textContent}`);
    if (document.querySelector("mjx-merror, [data-mjx-error]")) faults.push("an equation has an error");
    for (const code of text.querySelectorAll("pre, code, mjx-container")) code.remove();
    if (text.textContent.includes("$$")) faults.push("a raw $$");
    return faults;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_in_a_browser(site, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    page.on("request", lambda request: None if request.url.startswith("file:") else faults.append(request.url))
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri())
        page.wait_for_function("!window.MathJax || window.MathJax.startup?.promise")
        page.evaluate("() => window.MathJax?.startup?.promise")
        faults += page.evaluate(FAULTS)
        assert not faults, (path.name, faults)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.goto((site / "search.html").as_uri() + "?q=rationalized")
    page.wait_for_selector("#search-results li a")
    assert "family" in page.inner_html("#search-results")
    assert not faults


CHANGE = """([title, value]) => {
    const models = [...Bokeh.documents.flatMap(d => [...d._all_models.values()])];
    models.find(m => m.title === title).value = value;
}"""


def test_the_figures_answer_to_the_hand(site, browser):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((site / "10_loss_from_scratch.html").as_uri())
    end = """() => Bokeh.documents.flatMap(d => [...d._all_models.values()]).find(m => m.type === "Title").text"""
    page.wait_for_function("() => window.Bokeh?.documents.length && (" + end + ")().includes('nats')")
    assert "the chosen response loses" in page.evaluate(end)
    page.evaluate(CHANGE, ["alpha", 4])
    assert "the chosen response gains" in page.evaluate(end)
    page.evaluate(CHANGE, ["alpha", 0])
    page.evaluate(CHANGE, ["how alike the responses are", 0])
    assert "the chosen response gains" in page.evaluate(end)

    page.goto((site / "06_methods.html").as_uri())
    page.wait_for_function("() => window.Bokeh?.documents.length === 2")
    shares = """() => Bokeh.documents.flatMap(d => [...d._all_models.values()])
        .find(m => m.type === "ColumnDataSource" && m.data.sound && m.data.model).data.sound"""
    irpo = page.evaluate(shares)
    page.evaluate(CHANGE, ["method", "SFT on chosen"])
    assert page.evaluate(shares) != irpo
