"""Figures: the run of a callback, and the look that all figures of this package share.

Colours are those of Okabe and Ito, which people with any colour vision tell apart; every line also has a dash pattern
of its own, for greyscale. matplotlib is imported when a figure is drawn, not before, and ``pyplot`` never: no window,
no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ordered by how different they are in greyscale as well.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": (0, (1, 1))},
    {"color": "#E69F00", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": "#56B4E9", "linestyle": (0, (3, 3))},
)

# What is drawn below the rates: label of the axis, and the values of a record with the labels of their lines.
_PANELS = {
    "cosine": {"cosine": "training gradients", "held_out_cosine": "held-out gradients"},
    "meta-objective": {"meta_objective": "meta-objective"},
    "loss": {"training_loss": "training", "held_out_loss": "held-out"},
}

# Beyond this many lines nobody reads a legend: the middle of them and their range are drawn instead.
_MOST_LINES = len(STYLES)


def require_matplotlib() -> None:
    """Refuse before anything is computed where its figure could not be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError('Figures need matplotlib, which is not installed: pip install "lightning-l2l[plots]".')


def new_figure(rows: int = 1, columns: int = 1, *, width: float = 4.3, height: float = 3.0) -> tuple[Figure, Any]:
    """An empty figure in the shared look.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Inches for each column.
        height: Inches for each row.

    Returns:
        The figure, and its axes as an array ``[rows, columns]``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_history(history: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """The learning rates of a run, and the evidence that moved them, over its training steps.

    Below the rates are the cosines of gradient and displacement (below zero is progress, above it the steps overshoot)
    or, with an exact estimator, its meta-objective; and the losses. A cross at the bottom marks where the training was
    taken back, or where there was no gradient to apply; ``diagnostics["note"]`` says why. What cannot be drawn, such as
    an infinite objective, is left out.

    Args:
        history: :attr:`LearnToLearn.history`, one record for each update.
        path: Where to write the figure as well; the suffix decides the format.

    Returns:
        A matplotlib figure, not attached to any window. In a notebook, its last expression shows it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There has been no update yet.

    Example:
        >>> record = {"step": 20, "learning_rates": [0.1], "cosine": [-0.4], "diagnostics": {"trouble": ""}}
        >>> figure = plot_history([record, {**record, "step": 40, "learning_rates": [0.13]}])
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['learning rate', 'cosine']
    """
    if not history:
        raise ValueError(
            "There is nothing to plot: the history is empty, since there has been no update yet. Fit first; with "
            "meta_learning_rate=0 the callback observes without changing anything."
        )
    panels = [(label, lines) for label, names in _PANELS.items() if (lines := _lines(history, names))]
    figure, axes = new_figure(1 + len(panels), width=6.5, height=2.3)
    rates, *others = axes[:, 0]
    steps = [record["step"] for record in history]
    _draw_rates(rates, steps, [record["learning_rates"] for record in history])
    rates.set(ylabel="learning rate", yscale="log")
    for axis, (label, lines) in zip(others, panels, strict=True):
        for style, (name, values) in zip(STYLES, lines.items(), strict=False):
            axis.plot(steps, values, marker=".", label=name, **style)
        axis.set(ylabel=label)
        if label == "cosine":
            axis.axhline(0.0, color="black", linewidth=0.5)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize="small")
    troubled = [record["step"] for record in history if record["diagnostics"]["trouble"]]
    if troubled:
        at_the_bottom = {"transform": rates.get_xaxis_transform(), "label": "taken back, or no gradient applied"}
        rates.plot(troubled, [0.03] * len(troubled), linestyle="none", marker="x", color="black", **at_the_bottom)
    for axis in axes[:-1, 0]:
        axis.sharex(axes[-1, 0])
        axis.tick_params(labelbottom=False)
    axes[-1, 0].set(xlabel="training step")
    if len(rates.get_legend_handles_labels()[1]) > 0:
        rates.legend(frameon=False, fontsize="small")
    if path is not None:
        figure.savefig(path)
    return figure


def _lines(history: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, list[float]]:
    """By its label, each value that some record has; of one for each parameter group, the first."""
    found = {}
    for key, label in names.items():
        values = [record.get(key, math.nan) for record in history]
        numbers = [_drawable((value or [math.nan])[0] if isinstance(value, list) else value) for value in values]
        if any(map(math.isfinite, numbers)):
            found[label] = numbers
    return found


def _draw_rates(axis: Axes, steps: list[int], rates: list[list[float]]) -> None:
    # A group may be added during the run; its line starts where it does.
    count = max(len(record) for record in rates)
    lines = [
        [_drawable(record[which]) if which < len(record) else math.nan for record in rates] for which in range(count)
    ]
    if count > _MOST_LINES:
        middle = [sorted(record)[len(record) // 2] for record in rates]
        axis.plot(steps, middle, marker=".", label=f"median of {count} groups", **STYLES[0])
        axis.fill_between(steps, [min(r) for r in rates], [max(r) for r in rates], alpha=0.2, label="their range")
        return
    for which, line in enumerate(lines):
        label = f"group {which}" if count > 1 else None
        axis.plot(steps, line, marker=".", label=label, **STYLES[which])


def _drawable(value: float) -> float:
    return value if math.isfinite(value) else math.nan
