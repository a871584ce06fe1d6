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

# Of a record's signals, those that are drawn; docs, "reading the signals".
_SIGNALS = ("signal_to_noise", "agreement", "excess_growth")

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
    """The learning rates and the meta-objective of a run, over its training steps.

    A cross at the bottom marks a meta-update without a gradient to apply (``diagnostics["note"]`` says why): a loss had
    diverged or left the number range, the training was taken back, a batch was skipped. Below are the
    signals (docs, "reading the signals"), once there are any. What cannot be drawn, such as an infinite objective, is
    left out.

    Args:
        history: :attr:`LearnToLearn.history`, one record for each meta-update.
        path: Where to write the figure as well; the suffix decides the format.

    Returns:
        A matplotlib figure, not attached to any window. In a notebook, its last expression shows it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No meta-update has happened yet.

    Example:
        >>> record = {"step": 20, "learning_rates": [0.1], "meta_objective": -0.4, "diagnostics": {"trouble": ""}}
        >>> figure = plot_history([record, {**record, "step": 40, "learning_rates": [0.13]}])
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['learning rate', 'meta-objective']
    """
    if not history:
        raise ValueError(
            "There is nothing to plot: the history is empty, since no meta-update has happened. Fit first; with "
            "meta_learning_rate=0 the callback observes without changing anything."
        )
    has_signals = any(map(math.isfinite, [value for record in history for value in record.get("signals", {}).values()]))
    figure, axes = new_figure(3 if has_signals else 2, width=6.5, height=2.3)
    rates, objective, *rest = axes[:, 0]
    steps = [record["step"] for record in history]
    _draw_rates(rates, steps, [record["learning_rates"] for record in history])
    objective.plot(steps, [_drawable(record["meta_objective"]) for record in history], marker=".", **STYLES[0])
    refused = [record["step"] for record in history if _refused(record)]
    for axis in (rates, objective):
        axis.sharex(rates)
        if refused:
            axis.plot(
                refused,
                [0.03] * len(refused),
                transform=axis.get_xaxis_transform(),
                linestyle="none",
                marker="x",
                color="black",
                label="no gradient applied",
            )
    rates.set(ylabel="learning rate", yscale="log")
    objective.set(ylabel="meta-objective")
    for axis in rest:
        axis.sharex(rates)
        _draw_signals(axis, steps, history)
    for axis in axes[:-1, 0]:
        axis.tick_params(labelbottom=False)
    axes[-1, 0].set(xlabel="training step")
    if len(rates.get_legend_handles_labels()[1]) > 0:
        rates.legend(frameon=False, fontsize="small")
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


def _draw_signals(axis: Axes, steps: list[int], history: Sequence[Mapping[str, Any]]) -> None:
    for style, name in zip(STYLES, _SIGNALS, strict=False):
        values = [_drawable(record.get("signals", {}).get(name, math.nan)) for record in history]
        if any(map(math.isfinite, values)):  # the growth of a tangent is known to some estimators only
            axis.plot(steps, values, marker=".", label=name.replace("_", " "), **style)
    axis.axhline(0.0, color="black", linewidth=0.5)
    axis.set(ylabel="signals")
    axis.legend(frameon=False, fontsize="small")


def _refused(record: Mapping[str, Any]) -> bool:
    return bool(record["diagnostics"]["trouble"])


def _drawable(value: float) -> float:
    return value if math.isfinite(value) else math.nan
