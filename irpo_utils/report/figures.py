"""The figures. Each takes plain records, so that they render wherever the small artefacts are.

A figure of several methods takes the run's catalogue, `config.catalogue`: a method has the look of its place there, the
same in every figure. The colours are those of Okabe and Ito (2008), which differ for people who see no red or no green,
but for their yellow, which is too faint on white. No figure is wider than `WIDE`, so that a phone shows it legibly.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from importlib.metadata import version
from statistics import mean
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..metrics import KS, bootstrap, pass_at_k

if TYPE_CHECKING:  # named in annotations only; pandas takes a second to import
    import pandas as pd

    from ..methods.recipes import Method
    from ..model.records import Sample

plt.rcParams["text.parse_math"] = False  # a label with dollar signs is text
Steps = list[dict[str, float]]
Record = dict[str, Any]
Catalogue = dict[str, "Method"]

COLORS = BLUE, RED, GREEN, BLACK, ORANGE, SKY, PURPLE = (
    "#0072B2", "#D55E00", "#009E73", "#000000", "#E69F00", "#56B4E9", "#CC79A7",
)  # fmt: skip
# Marker and style: the next where the colours are used up.
LINES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (6, 2, 1, 2, 1, 2))))
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLORS)  # of what a notebook draws itself

WIDE = 5.6  # inches
BELOW = {"loc": "outside lower center", "frameon": False, "fontsize": 9}  # a legend under the axes of a figure


def look(number: int) -> dict[str, str]:
    """Colour, marker and line style of the n-th line of a figure, from 0; no two are the same."""
    marker, style = LINES[number // len(COLORS) % len(LINES)]
    return {"color": COLORS[number % len(COLORS)], "marker": marker, "linestyle": style}


def look_of(method: str, catalogue: Catalogue) -> dict[str, str]:
    """The look of a method, by its place in the catalogue, and its label."""
    return look(list(catalogue).index(method)) | {"label": catalogue[method].label}


def versions(torch: bool = True) -> str:
    """The versions that a reader needs to repeat a notebook, on one line."""
    names = ("irpo-utils", *(("torch", "transformers", "peft") if torch else ("pandas", "matplotlib")))
    return ", ".join(f"{name} {version(name)}" for name in names)


def show(fig: Figure) -> None:
    """Display a figure once, with a text for those who do not see it, and free it."""
    display(fig, metadata={"image/png": {"alt": described(fig)}})
    plt.close(fig)


def described(fig: Figure) -> str:
    """What a figure shows, from its own titles, axes and legends: the alt text of its image."""
    panels = []
    for ax in (ax for ax in fig.axes if ax.axison):
        what = ": ".join(filter(None, (ax.get_title(), ax.get_ylabel())))
        against = f" against {ax.get_xlabel()}" if ax.get_xlabel() else ""
        lines = ", ".join(dict.fromkeys(ax.get_legend_handles_labels()[1]))
        panels.append(what + against + (f", lines: {lines}" if lines else ""))
    return "; ".join(panels)


def correct_counts(counts: list[int], n: int, title: str) -> Figure:
    """Histogram of how many of a problem's n samples are right."""
    fig, ax = plt.subplots(figsize=(WIDE, 3), layout="constrained")
    heights = [counts.count(i) for i in range(n + 1)]
    ax.bar(range(n + 1), heights, color=[RED, *[BLUE] * (n - 1), "#999999"])
    ax.set(xlabel=f"right samples of {n}", ylabel="problems", title=f"{title} (red: none right, grey: all)")
    return fig


def loss_curves(steps: Steps, best_step: int) -> Figure:
    """Loss terms, margin and dev accuracy against steps; the kept step is marked."""
    fig, axes = plt.subplots(3, 1, figsize=(WIDE, 6.5), layout="constrained", sharex=True)
    x = [s["step"] for s in steps]
    for name, color in (("loss", BLACK), ("dpo", BLUE), ("odds", PURPLE), ("nll", GREEN)):
        if name in steps[0]:  # a loss has not every term
            axes[0].plot(x, [s[name] for s in steps], label=name, color=color)
    axes[0].set(ylabel="nats", title="loss and its terms")
    axes[0].legend(frameon=False)
    if "margin" in steps[0]:
        axes[1].plot(x, [s["margin"] for s in steps], color=BLUE)
        axes[1].set(title="margin (chosen minus rejected reward)")
    else:  # the NLL compares nothing
        axes[1].plot(x, [s["chosen_logp"] for s in steps], color=BLUE)
        axes[1].set(title="log-probability of the chosen (nats)")
    scored = [s for s in steps if "dev_greedy" in s]
    axes[2].plot([s["step"] for s in scored], [s["dev_greedy"] * 100 for s in scored], "o-", color=GREEN)
    axes[2].axvline(best_step, color="grey", linestyle=":")
    axes[2].set(xlabel="step", title="greedy accuracy on dev (%); dotted: kept")
    return fig


def logp_curves(curves: dict[str, Steps], catalogue: Catalogue) -> Figure:
    """The paper's figure: mean log-probability of chosen (solid) and rejected (dashed) responses against steps.

    The responses are those of each method's watched pairs, the same at every step.
    """
    fig, ax = plt.subplots(figsize=(WIDE, 3.6 + 0.1 * len(curves)), layout="constrained")
    for method, steps in curves.items():
        own = look_of(method, catalogue) | {"markersize": 4}
        watched = [s for s in steps if "watched_chosen_logp" in s]
        for side, style in (("chosen", "-"), ("rejected", "--")):
            values = [s[f"watched_{side}_logp"] for s in watched]
            if side == "rejected" and not any(values):  # nothing is rejected
                continue
            x = [s["step"] for s in watched]
            ax.plot(x, values, **own | {"linestyle": style, "label": own["label"] if side == "chosen" else None})
    ax.set(
        xlabel="step",
        ylabel="log-probability of a response (nats)",
        title="The same pairs at every step: chosen (solid), rejected (dashed)",
    )
    fig.legend(ncols=2, **BELOW)
    return fig


def at_k(summary: dict[str, float], title: str) -> Figure:
    """maj@k and pass@k against k with their 95 % intervals, and the greedy accuracy as a line."""
    ks = [k for k in KS if f"maj{k}" in summary]
    fig, ax = plt.subplots(figsize=(WIDE, 3), layout="constrained")
    for name, style, color in (("pass", "o-", BLUE), ("maj", "s-", GREEN)):
        ax.plot(ks, [summary[f"{name}{k}"] * 100 for k in ks], style, label=f"{name}@k", color=color)
        low, high = ([summary[f"{name}{k}_{end}"] * 100 for k in ks] for end in ("low", "high"))
        ax.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
    ax.axhline(summary["greedy"] * 100, color="grey", linestyle=":", label="greedy")
    ax.set(xscale="log", xticks=ks, xticklabels=ks, xlabel="samples k", ylabel="%", title=title)
    ax.minorticks_off()
    ax.legend(frameon=False)
    return fig


def pass_curves(right: dict[str, list[int]], n: int) -> Figure:
    """pass@k against k, a line for each model in the band of its 95 % interval over problems.

    Args:
        right: model -> how many of a problem's n samples are right, [problems].
    """
    ks = [k for k in (2**i for i in range(20)) if k <= n]
    fig, ax = plt.subplots(figsize=(WIDE, 4), layout="constrained")
    for number, (name, counts) in enumerate(right.items()):
        own = look(number)
        values = [[pass_at_k(count, n, k) for count in counts] for k in ks]
        ax.plot(ks, [mean(found) * 100 for found in values], fillstyle="none", label=name, **own)
        low, high = zip(*map(bootstrap, values), strict=True)
        ax.fill_between(ks, [x * 100 for x in low], [x * 100 for x in high], color=own["color"], alpha=0.1)
    title = f"pass@k: one of k samples is right\n({len(counts)} problems, {n} samples each; 95 % bands)"
    ax.set(xscale="log", xticks=ks, xticklabels=ks, xlabel="samples k", ylabel="%", ylim=(0, None))
    ax.set_title(title, fontsize=10)
    ax.minorticks_off()
    fig.legend(ncols=3, **BELOW)
    return fig


def error_bars(table: pd.DataFrame) -> Figure:
    """Wrong answers by kind of error, a bar for each model (`equations.error_table` without its first row)."""
    fig, ax = plt.subplots(figsize=(WIDE, 1.6 + 0.4 * len(table)), layout="constrained")
    table.plot.barh(ax=ax, color=COLORS, width=0.8, legend=False)
    for bars in ax.containers:
        ax.bar_label(bars, [f"{count:g}" if count else "" for count in bars.datavalues], padding=2, fontsize=9)
    ax.set(xlabel="problems", title="What is wrong in the wrong answers")
    ax.invert_yaxis()
    fig.legend(ncols=3, **BELOW)
    return fig


def flips(before: list[Record], after: list[Record]) -> str:
    """How many greedy answers turned right, and wrong, on each split."""
    old = {(r["split"], r["problem"]): r["greedy"] == 1 for r in before}
    lines = []
    for split in ("dev", "test"):
        pairs = [(old[r["split"], r["problem"]], r["greedy"] == 1) for r in after if r["split"] == split]
        lines.append(f"{split}: {pairs.count((False, True))} turned right, {pairs.count((True, False))} turned wrong")
    return "\n".join(lines)


def accuracy_curves(metrics: pd.DataFrame, catalogue: Catalogue) -> Figure:
    """Greedy test accuracy against iteration, a line per method of a `tables.metrics_table`."""
    count = metrics.method.nunique()
    fig, ax = plt.subplots(figsize=(WIDE, 3.8 + 0.1 * count), layout="constrained")
    test = metrics[metrics.split == "test"]
    for i, (method, frame) in enumerate(test.groupby("method", sort=False)):
        by = frame.groupby("iteration")
        middle, several = by.greedy.mean() * 100, frame.seed.nunique() > 1
        low = (by.greedy.min() if several else by.greedy_low.mean()) * 100
        high = (by.greedy.max() if several else by.greedy_high.mean()) * 100
        bars = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
        x = middle.index + (i - (count - 1) / 2) * min(0.04, 0.3 / count)
        ax.errorbar(x, middle, bars, capsize=3, markersize=5, **look_of(method, catalogue))
    ax.set(xlabel="iteration (0 is M_0)", ylabel="greedy accuracy on test (%)", xticks=sorted(test.iteration.unique()))
    ax.grid(axis="y", alpha=0.3)
    longest = max(len(catalogue[method].label) for method in test.method.unique())
    fig.legend(ncols=1 if longest > 32 else 2, **BELOW)
    return fig


def error_heatmap(rows: list[Record], names: list[str]) -> Figure:
    """Share of wrong steps by kind and iteration, a panel for each method in `names` (test, mean over seeds).

    Args:
        rows: as `run.stages.evaluations` gives them.
    """
    high = -(-len(names) // 2)
    fig, axes = plt.subplots(high, 2, figsize=(WIDE, 2.6 * high), squeeze=False, layout="constrained")
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax, method in zip(axes.flat, names, strict=False):
        errors: dict[int, list[Record]] = {}  # of each iteration, those of its seeds
        for r in rows:
            if r["method"] == method and "errors" in r["test"]:
                errors.setdefault(r["iteration"], []).append(r["test"]["errors"])
        every = [set(seed) for found in errors.values() for seed in found]
        kinds = set.intersection(*every) - {"extra"} if every else set()  # lines too many are no event of a story
        if not kinds:
            ax.set_axis_off()
            continue
        wrong = {
            kind: [100 * mean(seed[kind]["wrong"] for seed in found) for found in errors.values()] for kind in kinds
        }
        kinds = sorted(kinds, key=lambda kind: (-wrong[kind][0], kind))
        grid = [wrong[kind] for kind in kinds]
        ax.imshow(grid, vmin=0, vmax=100, cmap="Reds", aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
        ax.set(xticks=range(len(errors)), xticklabels=errors, xlabel="iteration")
        ax.set(yticks=range(len(kinds)), yticklabels=kinds)
        ax.set_title(f"{method}: steps wrong (%)", fontsize=9)
    return fig


def differences(table: pd.DataFrame) -> Figure:
    """How many points each method is ahead of each other: a row's of a column's, the best method first.

    A cell has a colour where the two can be told apart, and a mark where they cannot.

    Args:
        table: as `comparison.differences` gives it.
    """
    names = list(dict.fromkeys(table.method))
    count, most = len(names), table.points.abs().max() or 1
    shades = LinearSegmentedColormap.from_list("ahead", [ORANGE, "white", BLUE])
    fig, ax = plt.subplots(figsize=(WIDE, 1 + 0.34 * count), layout="constrained")
    cells = np.full((count, count, 3), 0.85)
    for row in table.itertuples():
        at = names.index(row.method), names.index(row.against)
        # Never so pale that it passes for white, nor so dark that black is hard to read.
        shade = (0.3 + 0.6 * abs(row.points) / most) * np.sign(row.points) * row.told_apart
        cells[at] = shades(0.5 + shade / 2)[:3]
        value = f"{row.points:+.1f}" if count <= 10 else f"{round(row.points)}"
        text = value if row.told_apart else f"{value}\n≈"
        ax.text(at[1], at[0], text, ha="center", va="center", fontsize=8.5, linespacing=0.9)
    ax.imshow(cells, aspect="auto")
    ax.set_xticks(range(count), range(1, count + 1), fontsize=9)
    ax.set_yticks(range(count), [f"{name} {i}" for i, name in enumerate(names, 1)], fontsize=9)
    ax.set_xticks([i + 0.5 for i in range(count - 1)], minor=True)
    ax.set_yticks([i + 0.5 for i in range(count - 1)], minor=True)
    ax.grid(which="minor", color="0.8")
    ax.tick_params(which="both", length=0, labeltop=True)
    ax.set_title("Points by which a row's method is ahead of a column's", fontsize=10)
    for label, color in (("row ahead", BLUE), ("row behind", ORANGE), ("≈ cannot be told apart", "white")):
        ax.scatter([], [], s=60, marker="s", color=color, edgecolor="grey", label=label)
    fig.legend(ncols=3, **BELOW)
    return fig


def watched_logps(table: pd.DataFrame) -> Figure:
    """Mean log-probability of fixed chosen (solid) and rejected (dashed) responses against steps, a look per loss."""
    looks = {"dpo+nll": look(0), "dpo": look(1), "nll": look(2)}  # those of IRPO, Iterative DPO and SFT on chosen
    fig, ax = plt.subplots(figsize=(WIDE, 3.8), layout="constrained")
    for loss, rows in table.groupby("loss", sort=False):
        for side, style in (("chosen", "-"), ("rejected", "--")):
            own = looks[loss] | {"linestyle": style, "label": f"{loss}, {side}"}
            ax.plot(rows.step, rows[side], markersize=4, **own)
    ax.set(xlabel="step", ylabel="log-probability of a response (nats)", title="The same pairs under three losses")
    fig.legend(ncols=3, **BELOW)
    return fig


def loss_panels(table: pd.DataFrame) -> Figure:
    """Mean log-probability of fixed chosen (solid) and rejected (dashed) responses against steps, a panel per loss.

    Args:
        table: `loss`, `step`, `chosen`, `rejected`. Axes end ten nats below the start; what falls further leaves them.
    """
    losses = list(dict.fromkeys(table.loss))
    high = -(-len(losses) // 2)
    size = (WIDE, 0.4 + 1.6 * high)
    fig, axes = plt.subplots(high, 2, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
    for ax in axes.flat[len(losses) :]:
        ax.set_axis_off()
    for ax, loss in zip(axes.flat, losses, strict=False):
        own = table[table.loss == loss]
        ax.plot(own.step, own.chosen, marker="o", markersize=3, color=BLUE, label="chosen")
        ax.plot(own.step, own.rejected, "--", marker="s", markersize=3, color=RED, label="rejected")
        ax.set_title(loss, fontsize=9)
    ends = table[["chosen", "rejected"]]
    ax.set_ylim(max(ends.min(axis=None), table.rejected.iloc[0] - 10) - 0.5, ends.max(axis=None) + 0.5)
    for ax in axes.flat[max(0, len(losses) - 2) : len(losses)]:  # one of the figure would stand in the legend
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelbottom=True)
    fig.supylabel("log-probability of a response (nats)", fontsize=9)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), ncols=2, **BELOW)
    return fig


def ablations(table: pd.DataFrame, changes: pd.DataFrame) -> Figure:
    """Greedy dev accuracy against a knob's values, a panel for each knob: points are seeds, the line is their mean.

    Args:
        table: a row for each knob, value and seed: `dev_greedy` (nan where there is no model), `default`.
        changes: for each knob and value the `low` and `high` of its difference to the default, in percentage points.
    """
    knobs = list(dict.fromkeys(table.knob))
    high = -(-len(knobs) // 2)
    size = (WIDE, 0.3 + 2.1 * high)
    fig, axes = plt.subplots(high, 2, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for ax in axes.flat[len(knobs) :]:
        ax.set_axis_off()
    for ax, knob in zip(axes.flat, knobs, strict=False):
        own = table[table.knob == knob].astype({"dev_greedy": float})  # nan, where pandas has NA
        values = list(dict.fromkeys(own.value))
        places, middle = own.value.map(values.index), own.groupby("value", sort=False).dev_greedy.mean() * 100
        (default,) = own[own.default].value.unique()
        ax.plot(places, own.dev_greedy * 100, "o", color=BLUE, markersize=4, alpha=0.5)
        ax.plot(range(len(values)), middle, color=BLUE)
        ax.axhline(middle[default], color="grey", linestyle=":", linewidth=1)
        ax.axvline(values.index(default), color="grey", linestyle=":", linewidth=1)
        for change in changes[(changes.knob == knob) & (changes.seeds > 0)].itertuples():
            ends = [middle[default] + end for end in (change.low, change.high)]
            ax.plot([values.index(change.value) + 0.12] * 2, ends, "_-", color=RED, linewidth=1, markersize=5)
        ax.set_xticks(range(len(values)), values, fontsize=9)
        ax.set_title(f"{knob} (dotted: {default})", fontsize=9)
        ax.set_xlim(-0.5, len(values) - 0.5)
    fig.supylabel("greedy accuracy on dev (%)", fontsize=9)
    return fig


def claims(table: pd.DataFrame) -> Figure:
    """Differences that claims say are above zero, with their intervals: a line each, a panel for each unit.

    Args:
        table: `claim`, `difference`, `world`, `unit`, `mean`, `low` and `high`.
    """
    worlds, units = list(dict.fromkeys(table.world)), list(dict.fromkeys(table.unit))
    lines = {
        unit: list(dict.fromkeys(zip(own.claim, own.difference, strict=True))) for unit, own in table.groupby("unit")
    }
    heights = [len(lines[unit]) + 1 for unit in units]
    size = (WIDE, 0.6 + 0.42 * sum(heights))
    fig, axes = plt.subplots(len(units), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    for ax, unit in zip(axes.flat, units, strict=True):
        for number, world in enumerate(worlds):
            own, style = table[(table.unit == unit) & (table.world == world)], look(number) | {"linestyle": ""}
            places = [lines[unit].index(line) + 0.2 * number for line in zip(own.claim, own.difference, strict=True)]
            around = [own["mean"] - own.low, own.high - own["mean"]]
            ax.errorbar(own["mean"], places, xerr=around, markersize=5, label=world, **style)
        ax.axvline(0, color="grey", linestyle=":", linewidth=1)
        names = [f"{claim}  {textwrap.fill(text, 34)}" for claim, text in lines[unit]]
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.invert_yaxis()
        ax.set_xlabel({"points": "percentage points", "nats": "nats"}[unit], fontsize=9)
    if len(worlds) > 1:
        fig.legend(*axes.flat[0].get_legend_handles_labels(), ncols=len(worlds), **BELOW)
    return fig


def bench_ratios(times: dict[str, pd.Series]) -> Figure:
    """How many times faster than the best other: a bar for each shape (index), a panel for each kind of work (key)."""
    fig, axes = plt.subplots(len(times), 1, figsize=(WIDE, 2.4 * len(times)), layout="constrained", squeeze=False)
    for ax, (kind, series) in zip(axes.flat, times.items(), strict=True):
        bars = ax.barh(series.index, series, color=BLUE)
        ax.bar_label(bars, fmt="%.1f", padding=3)
        ax.axvline(1, color=BLACK, linewidth=1)
        ax.set(title=f"{kind}: times the speed of the best other", xlim=(0, 1.15 * series.max()))
        ax.invert_yaxis()
    return fig


def accuracy_against_compute(
    results: pd.DataFrame, passes: Callable[[pd.DataFrame], pd.Series], catalogue: Catalogue
) -> Figure:
    """Mean greedy test accuracy against compute, a line per method from M_0 on.

    Args:
        results: as `comparison.by_seed` gives them. passes: their compute in forward passes of one token.
    """
    fig, ax = plt.subplots(figsize=(WIDE, 5 + 0.1 * results.method.nunique()), layout="constrained")
    for method, own in results.assign(passes=passes(results) / 1e6).groupby("method", sort=False):
        means = own.groupby("iteration")[["passes", "greedy"]].mean()
        means["greedy"] = means.greedy.clip(0.002, 0.998)  # which has no place for 0 and 100 %
        ax.plot(means.passes, means.greedy, markersize=4, **look_of(method, catalogue))
    ax.set_yscale("logit")  # what is left to solve counts: from 98 to 99 % is half of it
    low, high = ax.get_ylim()
    ticks = [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
    below, above = bisect_right(ticks, low) - 1, bisect_left(ticks, high)  # the first and the last that are shown
    ticks = ticks[max(below, 0) : above + 1]
    ax.set_yticks(ticks, [f"{tick * 100:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(
        xlabel="forward passes of one token (millions): drawn + 3 x trained on",
        ylabel="greedy accuracy on test (%, logit scale)",
    )
    ax.grid(alpha=0.3)
    fig.legend(ncols=2, **BELOW)
    return fig


def reward_histogram(samples: list[Sample], title: str) -> Figure:
    """How the rewards of samples with a right and with a wrong answer are distributed."""
    fig, ax = plt.subplots(figsize=(WIDE, 3), layout="constrained")
    scored = [s for s in samples if s.reward is not None]
    sides = [[s.reward for s in scored if (s.answer_reward == 1) == ok] for ok in (True, False)]
    ax.hist(sides, bins=24, color=[BLUE, RED], label=["right answer", "wrong answer"], density=True)
    ax.set(xlabel="reward", ylabel="density", title=title)
    ax.legend(frameon=False)
    return fig
