"""Figures that answer to the hand, as a Sphinx directive: ```{interactive} NAME``` draws the function NAME with Bokeh.

Sphinx loads this file in an environment of its own, without the project. What was measured comes from
`interactive.json`, which `build.py` writes beside the pages. Bokeh's script is one file of the site; it is loaded by
the pages that have a figure.
"""

import json
from pathlib import Path

import bokeh
import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, CustomJS, DataRange1d, HoverTool, Legend, LinearColorMapper, Select, Slider
from bokeh.plotting import figure
from docutils import nodes
from docutils.parsers.rst import Directive

SCRIPTS = [Path(bokeh.__file__).parent / f"server/static/js/{name}.min.js" for name in ("bokeh", "bokeh-widgets")]
MARKERS, DASHES = (
    {"o": "circle", "s": "square", "^": "triangle", "D": "diamond", "v": "inverted_triangle"},
    {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashdot"},
)
LEGEND = {"border_line_color": None, "label_text_font_size": "8pt", "glyph_width": 14, "margin": 0, "padding": 0}
AT_FIRST = ("irpo", "dpo", "sft_chosen", "sft_gold")  # the methods whose lines are shown before a click
WIDE = {"sizing_mode": "stretch_width", "toolbar_location": None}

TOKENS, AT_START, LARGER = 20, -8.0, 1.5  # of the chosen response; how much larger the rejected one's gradient is
SURFACE_JS = """
const [b, a, o] = [beta.value, alpha.value, overlap.value], {x, y} = grid.data, z = surface.data.image[0]
const nll = c => -(start + c) / tokens, softplus = t => Math.log1p(Math.exp(-Math.abs(t))) + Math.max(t, 0)
for (let i = 0; i < z.length; i++) z[i] = softplus(-b * (x[i] - y[i])) + a * nll(x[i])
surface.change.emit()
const c = [0], r = [0]
while (c.length < 4000 && c.at(-1) < -start && c.at(-1) > -8 && r.at(-1) > -12) {
  const pull = b / (1 + Math.exp(b * (c.at(-1) - r.at(-1)))), up = pull + a / tokens, down = -pull
  const [dc, dr] = [up + o * larger * down, o * larger * up + larger * larger * down], size = Math.hypot(dc, dr)
  c.push(c.at(-1) + 0.02 * dc / size); r.push(r.at(-1) + 0.02 * dr / size)
}
path.data = {c, r}
end.text = `the chosen response ${c.at(-1) < 0 ? "loses" : "gains"} ${Math.abs(c.at(-1)).toFixed(1)} nats`
"""


def loss_of_a_pair(_):
    """The loss of one pair over what both responses have gained, and where training goes from the start."""
    chosen, rejected = np.meshgrid(np.linspace(-8, 8, 65), np.linspace(-12, 4, 65))
    grid = ColumnDataSource({"x": chosen.ravel(), "y": rejected.ravel()})
    surface, path = ColumnDataSource({"image": [np.zeros_like(chosen)]}), ColumnDataSource({"c": [0.0], "r": [0.0]})
    plot = figure(height=340, x_range=(-8, 8), y_range=(-12, 4), title=" ", **WIDE)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "chosen (nats, since the start)", "rejected"
    plot.image("image", x=-8, y=-12, dw=16, dh=16, source=surface, color_mapper=LinearColorMapper("Cividis256"))
    plot.line("c", "r", source=path, color="white", line_width=3)
    plot.scatter([0], [0], color="white", size=10)
    sliders = {
        "beta": Slider(start=0.02, end=1, step=0.02, value=0.1, title="beta"),
        "alpha": Slider(start=0, end=5, step=0.1, value=0, title="alpha"),
        "overlap": Slider(start=0, end=1, step=0.05, value=0.9, title="how alike the responses are"),
    }
    about = {"grid": grid, "surface": surface, "path": path, "end": plot.title}
    numbers = {"tokens": TOKENS, "start": AT_START, "larger": LARGER}
    redraw = CustomJS(args=about | sliders, code="\n".join(f"const {k} = {v}" for k, v in numbers.items()) + SURFACE_JS)
    for slider in sliders.values():
        slider.sizing_mode = "stretch_width"
        slider.js_on_change("value", redraw)
    return column(plot, *sliders.values(), sizing_mode="stretch_width"), redraw


def methods_at_a_budget(facts):
    """Accuracy against compute, a line for each method; a click on a name shows or hides it."""
    ranges = {"x_range": DataRange1d(only_visible=True), "y_range": (0, 103)}
    plot = figure(height=420, **ranges, **WIDE)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "forward passes of one token (millions)", "greedy, test (%)"
    items = []
    for method in facts["methods"]:
        numbers = {k: method[k] for k in ("passes", "greedy", "iteration")}
        data = ColumnDataSource(numbers | {"label": [method["label"]] * len(method["greedy"])})
        style = {"color": method["color"], "visible": method["name"] in AT_FIRST}
        dash = method["linestyle"]
        dash = DASHES[dash] if isinstance(dash, str) else dash[1]  # Matplotlib's (offset, lengths)
        line = plot.line("passes", "greedy", source=data, line_width=2, line_dash=dash, **style)
        points = plot.scatter("passes", "greedy", source=data, size=7, marker=MARKERS[method["marker"]], **style)
        items.append((method["label"], [line, points]))
    tips = [("", "@label, M_@iteration"), ("greedy", "@greedy{0.0} %"), ("passes", "@passes{0.0} M")]
    plot.add_tools(HoverTool(tooltips=tips))
    legend = Legend(items=items, click_policy="hide", ncols=2, **LEGEND)
    plot.add_layout(legend, "below")
    return plot, None


def sound_and_lucky(facts):
    """Right answers with every step right and those with a wrong one, by iteration, of the method that is chosen."""
    parts, methods = ("sound", "lucky", "wrong"), {m["label"]: m for m in facts["methods"]}

    def bars(method):
        return {part: method[part] for part in parts} | {"model": [f"M_{t}" for t in method["iteration"]]}

    every = {label: bars(method) for label, method in methods.items()}
    first = next(iter(every))
    source, models = ColumnDataSource(every[first]), max((own["model"] for own in every.values()), key=len)
    plot = figure(height=320, x_range=models, y_range=(0, 100), y_axis_label="test problems (%)", **WIDE)
    names = ["right, every step right", "right by luck", "wrong"]
    stacks = plot.vbar_stack(parts, x="model", width=0.8, source=source, color=["#0072B2", "#E69F00", "#BBBBBB"])
    plot.add_tools(HoverTool(tooltips="$name: @$name{0.0} %"))
    plot.add_layout(Legend(items=list(zip(names, [[part] for part in stacks], strict=True)), **LEGEND), "below")
    choice = Select(options=list(every), value=first, title="method", sizing_mode="stretch_width")
    show = CustomJS(args={"source": source, "every": every}, code="source.data = every[this.value]")
    choice.js_on_change("value", show)
    return column(choice, plot, sizing_mode="stretch_width"), None


FIGURES = {f.__name__: f for f in (loss_of_a_pair, methods_at_a_budget, sound_and_lucky)}


class Interactive(Directive):
    required_arguments = 1

    def run(self):
        environment = self.state.document.settings.env
        file = Path(environment.srcdir) / "interactive.json"
        draw = FIGURES[self.arguments[0]]
        model, first = draw(json.loads(file.read_text()))
        document = Document()
        document.add_root(model)
        if first:
            document.js_on_event("document_ready", first)
        script, place = components(model)
        environment.metadata[environment.docname]["interactive"] = True
        label = (draw.__doc__ or "").strip()
        return [
            nodes.raw(
                "", f'<div class="interactive" role="group" aria-label="{label}">{place}{script}</div>', format="html"
            )
        ]


def load_scripts(app, page, template, context, doctree):
    if app.env.metadata.get(page, {}).get("interactive"):
        for script in SCRIPTS:
            app.add_js_file(script.name)


def setup(app):
    app.add_directive("interactive", Interactive)
    app.connect("html-page-context", load_scripts)
    app.config.html_static_path += [str(script) for script in SCRIPTS]
    return {"parallel_read_safe": True}
