"""The figures of process feedback. Each takes plain rows, so that they render wherever the small artefacts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
RIGHT, WRONG, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # of `report.figures.COLORS`
WIDE = 5.6  # inches, as there
QUALITIES = (
    ("recall", RIGHT, "recall: of right steps, labelled right"),
    ("precision", WRONG, "precision: of those labelled right, right"),
)
DELTAS: dict[str, tuple[Callable[[int], int], str, str]] = {  # how delta follows K, and its line
    "δ = 0: any continuation will do": (lambda k: 0, "-", "o"),
    "δ = K/2: most of them": (lambda k: k // 2, "--", "s"),
    "δ = K - 1: all of them": (lambda k: k - 1, ":", "^"),
}
WAYS = {
    "pass": ("one of N is right (the limit)", ":", "grey"),
    "weighted": ("weighted vote", "^-", PURPLE),
    "best_of_n": ("best of N", "o-", RIGHT),
    "majority": ("majority of N", "s-", GREEN),
}


def outcome_counts(steps: dict[str, list[Row]]) -> Figure:
    """How many of a step's K continuations reach the right answer, for right and for wrong prefixes.

    `steps` has a panel for each kind of answer: kind -> `truth.simulated_steps`.
    """
    fig, axes = plt.subplots(len(steps), 1, figsize=(WIDE, 3.2 * len(steps)), layout="constrained", squeeze=False)
    for ax, (kind, own) in zip(axes.flat, steps.items(), strict=True):
        if not own:  # no step of this kind was simulated
            ax.set_axis_off()
            continue
        k = len(own[0]["outcomes"])
        for truth, color, shift, name in ((True, RIGHT, -0.2, "right"), (False, WRONG, 0.2, "wrong")):
            counts = [s["outcomes"].count("1") for s in own if s["truth"] == truth]
            share = [100 * counts.count(i) / max(1, len(counts)) for i in range(k + 1)]
            label = f"prefix is {name} ({len(counts)})"
            ax.bar([i + shift for i in range(k + 1)], share, 0.4, color=color, label=label)
        ax.set(xticks=range(0, k + 1, max(1, k // 8)))
        ax.set(xlabel=f"continuations of {k} that reach the right answer", title=f"The answer is {kind}")
        ax.set(ylabel="% of such prefixes")
        ax.legend(frameon=False, loc="upper center")
    return fig


def label_quality(
    tables: dict[str, list[Row]], outcome: dict[str, Row], reasons: list[tuple[str, str, float]]
) -> Figure:
    """Precision and recall of simulated labels against K for three choices of delta, and what outcomes cannot see.

    Args:
        tables: kind of answer -> `truth.label_quality`.
        outcome: kind -> `truth.quality` of the answer's label.
        reasons: (policy, kind, share of its right answers that have a wrong step), for the last panel.
    """
    fig, axes = plt.subplots(len(tables) + 1, 1, figsize=(WIDE, 3.6 * len(tables) + 3.6), layout="constrained")
    for ax, (kind, table) in zip(axes, tables.items(), strict=False):
        _quality_panel(ax, table, outcome[kind])
        ax.set(ylabel="%", title=f"The answer is {kind}")
    lines = [plt.Line2D([], [], color=color, linewidth=3, label=label) for _, color, label in QUALITIES]
    lines += [
        plt.Line2D([], [], color="black", linestyle=style, marker=marker, markersize=5, label=label)
        for label, (_, style, marker) in DELTAS.items()
    ]
    fig.legend(handles=lines, frameon=False, fontsize=9, loc="outside lower left")
    names = [f"{policy},\n{kind}" for policy, kind, _ in reasons]
    bars = axes[-1].barh(names, [100 * share for *_, share in reasons], color=WRONG)
    axes[-1].bar_label(bars, fmt="%.0f %%", padding=3)
    axes[-1].set(xlim=(0, 118), xticks=range(0, 101, 25), xlabel="% of right answers")
    axes[-1].set_title("Right answers with a wrong step", fontsize=11)
    axes[-1].invert_yaxis()
    axes[-1].spines[["top", "right"]].set_visible(False)
    return fig


def _quality_panel(ax: Axes, table: list[Row], outcome: Row) -> None:
    """One kind's precision and recall against K, and, as stars, those of the answer's label."""
    ks = sorted({row["k"] for row in table})
    by = {(row["k"], row["delta"]): row for row in table}
    for delta, style, marker in DELTAS.values():
        for name, color, _ in QUALITIES:
            values = [(i, by[k, delta(k)][name]) for i, k in enumerate(ks, 1)]
            known = [(i, 100 * value) for i, value in values if value is not None]
            x, y = [i for i, _ in known], [value for _, value in known]
            ax.plot(x, y, style, marker=marker, markersize=5, color=color)
    for name, color, _ in QUALITIES:
        if outcome[name] is not None:
            ax.plot(-0.1, 100 * outcome[name], "*", color=color, markersize=15)
    right = 100 * table[0]["right"]
    ax.axhline(right, color="grey", linewidth=1)
    ax.text(len(ks) + 0.3, right - 1, "steps that are right", color="grey", fontsize=9, ha="right", va="top")
    ax.axvline(0.45, color="lightgrey", linewidth=1)
    ax.set(xlim=(-0.6, len(ks) + 0.35), ylim=(0, 104), xticks=[-0.1, *range(1, len(ks) + 1)])
    ax.set(xticklabels=["answer's\nverdict", *ks], xlabel="continuations K")
    ax.grid(axis="y", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def reliability(curves: dict[str, dict[str, tuple[list[Row], Row]]]) -> Figure:
    """Reliability curves: what a score says against how often it is so. Panel -> curve -> `truth.calibration`."""
    fig, axes = plt.subplots(len(curves), 1, figsize=(WIDE, 4 * len(curves)), layout="constrained", squeeze=False)
    colors = (GREEN, RIGHT, WRONG)
    for ax, (kind, own) in zip(axes.flat, curves.items(), strict=True):
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        for color, (name, (curve, facts)) in zip(colors, own.items(), strict=False):
            auc = "-" if facts["auc"] is None else f"{facts['auc']:.2f}"
            label = f"{name}: AUC {auc}, ECE {facts['ece']:.2f}"
            scores, right = [b["score"] for b in curve], [b["right"] for b in curve]
            ax.plot(scores, right, "-", color=color, linewidth=1, label=label)
            most = max(b["count"] for b in curve)
            sizes = [10 + 110 * b["count"] / most for b in curve]
            ax.scatter(scores, right, sizes, color=color, alpha=0.7)
        ax.set(xlabel="score of a step", xlim=(-0.03, 1.03), ylim=(-0.03, 1.2), title=f"The answer is {kind}")
        ax.legend(frameon=False, fontsize=9, loc="upper left")
        ax.set(ylabel="share of steps, all right so far")
        ax.grid(alpha=0.25)
    return fig


def against_n(tables: dict[str, list[Row]], greedy: dict[str, float], control: dict[str, list[Row]]) -> Figure:
    """Accuracy against N, a panel for each kind of answer: greedy, majority, best of N and the weighted vote.

    Args:
        tables: kind -> `metrics.against_n`.
        greedy: kind -> greedy accuracy.
        control: as `tables`, by another reward model; best of N alone is drawn.
    """
    fig, axes = plt.subplots(len(tables), 1, figsize=(WIDE, 3.8 * len(tables)), layout="constrained", squeeze=False)
    for ax, (kind, rows) in zip(axes.flat, tables.items(), strict=True):
        ns = [row["n"] for row in rows]
        for name, (label, style, color) in WAYS.items():
            ax.plot(ns, [100 * row[name] for row in rows], style, color=color, label=label, markersize=5)
            if name in ("best_of_n", "majority"):
                low, high = ([100 * row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
                ax.fill_between(ns, low, high, color=color, alpha=0.12, linewidth=0)
        best = [100 * row["best_of_n"] for row in control[kind]]
        ax.plot(ns, best, "o--", color=WRONG, label="best of N, outcome labels", markersize=4)
        ax.axhline(100 * greedy[kind], color="black", linestyle="--", linewidth=1, label="greedy")
        ax.set(xscale="log", xticks=ns, xticklabels=ns, xlabel="samples N", title=f"The answer is {kind}")
        ax.set(ylabel="right answers on test (%)")
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower left", ncols=2)
    return fig
