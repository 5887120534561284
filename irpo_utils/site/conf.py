"""Sphinx's configuration of the site. Sphinx runs in an environment of its own, without the project."""

import sys
from importlib.metadata import files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "interactive"))

project = "Iterative Reasoning Preference Optimization"
html_title = "IRPO notebooks"
language = "en"
extensions = ["myst_nb", "interactive_figures"]
exclude_patterns = ["outputs/**"]

nb_execution_mode = "off"
nb_output_stderr = "remove"  # progress
nb_merge_streams = True
nb_ipywidgets_js = {}  # its default is loaded from the network
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
myst_url_schemes = {
    "http": None,
    "https": None,
    "mailto": None,
    "checkout": "../../{{path}}",  # from outputs/site to the repository's root; see links.py
}

html_theme = "sphinx_book_theme"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "footer_content_items": [],
    "navbar_persistent": [],  # a second search field
    "show_navbar_depth": 1,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"**": ["navbar-logo", "search-button-field", "sbt-sidebar-nav"]}
html_show_search_summary = False  # it would be fetched, which a browser refuses for files on disk
html_copy_source = False
html_use_index = False
html_show_sphinx = False

# Of the package's two builds and 24 MB this file alone: equations need no network.
mathjax_file = next(Path(f.locate()) for f in files("sphinx-mathjax-offline") or [] if f.name == "tex-svg.js")
mathjax_path = mathjax_file.name
html_static_path = ["custom.css", str(mathjax_file)]
html_css_files = ["custom.css"]
