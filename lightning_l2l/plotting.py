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
    """The learning rates of a run, the evidence that moved them, and the losses, over the training steps.

    The evidence is the cosine of gradient and displacement with its standard error, and that of held-out gradients; of
    an exact estimator, the meta-objective. A cross at the bottom marks an update at which something went wrong
    (``diagnostics["note"]`` says what). What cannot be drawn, such as an infinite loss, is left out.

    Args:
        history: :attr:`LearnToLearn.history`, one record for each update.
        path: Where to write the figure as well; the suffix decides the format.

    Returns:
        A matplotlib figure, not attached to any window. In a notebook, its last expression shows it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No update has happened yet.

    Example:
        >>> record = {"step": 10, "learning_rates": [0.1], "cosine": [-0.4], "diagnostics": {"trouble": ""}}
        >>> figure = plot_history([record, {**record, "step": 12, "learning_rates": [0.13]}])
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['learning rate', 'cosine', 'loss']
    """
    if not history:
        raise ValueError(
            "There is nothing to plot: the history is empty, since no update has happened. Fit first; with "
            "meta_learning_rate=0 the callback observes without changing anything."
        )
    figure, axes = new_figure(3, width=6.5, height=2.3)
    rates, evidence, losses = axes[:, 0]
    steps = [record["step"] for record in history]
    _draw_rates(rates, steps, [record["learning_rates"] for record in history])
    if any("meta_objective" in record for record in history):
        evidence.plot(steps, _column(history, "meta_objective"), marker=".", **STYLES[0])
        evidence.set(ylabel="meta-objective")
    else:
        _draw_cosines(evidence, steps, history)
    _draw_columns(losses, steps, {name: _column(history, f"{name}_loss") for name in ("training", "held_out")})
    losses.set(ylabel="loss", xlabel="training step")
    failed = [record["step"] for record in history if record["diagnostics"]["trouble"]]
    for axis in axes[:, 0]:
        axis.sharex(rates)
        if failed:
            place = axis.get_xaxis_transform()
            axis.plot(failed, [0.03] * len(failed), "kx", transform=place, label="see diagnostics")
        axis.tick_params(labelbottom=axis is losses)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize="small")
    rates.set(ylabel="learning rate", yscale="log")
    if path is not None:
        figure.savefig(path)
    return figure


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


def _draw_cosines(axis: Axes, steps: list[int], history: Sequence[Mapping[str, Any]]) -> None:
    # Of several factors, the mean; each has its number in the records.
    cosines, errors, held_out = (_column(history, name) for name in ("cosine", "cosine_error", "held_out_cosine"))
    _draw_columns(axis, steps, {"training": cosines, "held_out": held_out})
    lower, upper = ([c + sign * e for c, e in zip(cosines, errors, strict=True)] for sign in (-1, 1))
    axis.fill_between(steps, lower, upper, alpha=0.2)
    axis.axhline(0.0, color="black", linewidth=0.5)
    axis.set(ylabel="cosine", ylim=(-1.05, 1.05))


def _draw_columns(axis: Axes, steps: list[int], columns: Mapping[str, list[float]]) -> None:
    for style, (name, values) in zip(STYLES, columns.items(), strict=False):
        if any(map(math.isfinite, values)):
            axis.plot(steps, values, marker=".", label=name.replace("_", "-"), **style)


def _column(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    found = []
    for record in history:
        value = record.get(name, math.nan)
        values = [_drawable(one) for one in value] if isinstance(value, list) else [_drawable(value)]
        found.append(sum(values) / len(values) if values else math.nan)
    return found


def _drawable(value: float) -> float:
    return value if math.isfinite(value) else math.nan
