"""Figures of the quadratic experiment. Black, blue and orange of Okabe and Ito, which also differ in grey."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_l2l.experiments.quadratic import QuadraticReport

_BLACK, _BLUE, _ORANGE = "#000000", "#0072B2", "#E69F00"
# (key, colour, line style, line width, label); thick pale lines go first so that a line on top stays visible
_METHODS = [
    ("float32_backprop", _ORANGE, "-", 4.0, "float32 back-propagation, paper's schedule"),
    ("exact", _BLUE, "-", 1.2, "exact meta-gradient, paper's schedule"),
    ("bisection", _BLACK, ":", 1.8, "bisection on the sign"),
]


def draw(report: QuadraticReport, output: Path, steps: int, initial_step_size: float) -> list[Path]:
    """Write the three figures into ``output`` as PNG files and return their paths."""
    return [
        _step_sizes(report, output / "step_size.png", steps),
        _optima(report, output / "optimal_step_size.png"),
        _gradients(report, output / "meta_gradient.png", initial_step_size),
    ]


def require_matplotlib() -> None:
    """Raise ImportError with advice if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("The figures need matplotlib: pip install 'lightning-l2l[plots]', or run with plots=False.")


def _new_figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")  # hides no curve
    figure.savefig(path, dpi=150)
    return path


def _seeds(report: QuadraticReport) -> list[int]:
    return sorted({row.seed for row in report.optima})


def _step_sizes(report: QuadraticReport, path: Path, steps: int) -> Path:
    figure, axes = _new_figure()
    for seed in _seeds(report):
        for method, colour, style, width, label in _METHODS:
            rows = [row for row in report.meta_steps if row.seed == seed and row.method == method]
            axes.plot(
                [row.meta_step + 1 for row in rows],
                [row.step_size for row in rows],
                color=colour,
                linestyle=style,
                linewidth=width,
                marker="o" if method == "bisection" else None,
                markersize=3,
                label=label if seed == _seeds(report)[0] else None,
            )
    axes.set_xscale("log")
    # The schedule visits zero, which a logarithmic axis cannot show: linear below a tenth of the smallest
    # optimum.
    axes.set_yscale("symlog", linthresh=min(row.optimal_step_size for row in report.optima) / 10)
    axes.set_ylim(0, 2 * max(row.step_size for row in report.meta_steps))
    axes.set_xlabel("evaluations of the meta-gradient")
    axes.set_ylabel("step size")
    axes.set_title(f"Learning the step size of {steps} steps of gradient descent", fontsize="medium")
    return _save(figure, path)


def _optima(report: QuadraticReport, path: Path) -> Path:
    figure, axes = _new_figure()
    for seed in _seeds(report):
        rows = [row for row in report.optima if row.seed == seed]
        first = seed == _seeds(report)[0]
        horizons = [row.steps for row in rows]
        axes.axhline(
            rows[0].stability_limit, color=_ORANGE, linewidth=4.0, label="stability limit 2 / L" if first else None
        )
        axes.axhline(
            rows[0].limiting_step_size,
            color=_BLUE,
            linestyle="--",
            linewidth=1.4,
            label="2 / (L + smallest curvature)" if first else None,
        )
        axes.plot(
            horizons,
            [row.optimal_step_size for row in rows],
            color=_BLACK,
            marker="o",
            markersize=4,
            linewidth=1.4,
            label="optimal step size" if first else None,
        )
    axes.set_xscale("log")
    axes.set_xlabel("inner steps t")
    axes.set_ylabel("step size")
    axes.set_title("The optimal step size depends on the horizon", fontsize="medium")
    return _save(figure, path)


def _gradients(report: QuadraticReport, path: Path, step_size: float) -> Path:
    """Draw log10 of the size of each gradient; a dead one becomes a cross at the foot of the picture."""
    figure, axes = _new_figure()
    for seed in _seeds(report):
        first = seed == _seeds(report)[0]
        rows = [row for row in report.gradients if row.seed == seed]
        horizons = [row.steps for row in rows]
        alive = [row for row in rows if row.float32_backprop_status == "ok" and row.float32_backprop != 0]
        dead = [row.steps for row in rows if row not in alive]
        axes.plot(
            horizons,
            [row.naive_log10 for row in rows],
            color=_BLACK,
            linestyle="--",
            marker="s",
            markersize=4,
            label="naive objective, exact" if first else None,
        )
        axes.plot(
            [row.steps for row in alive],
            [math.log10(abs(row.float32_backprop)) for row in alive],
            color=_ORANGE,
            linewidth=5.0,
            label="log objective, float32 back-propagation" if first else None,
        )
        axes.plot(
            horizons,
            [math.log10(abs(row.log)) if row.log else math.nan for row in rows],
            color=_BLUE,
            linewidth=1.4,
            marker="o",
            markersize=4,
            label="log objective, exact" if first else None,
        )
        axes.plot(
            dead,
            [0.03] * len(dead),
            transform=axes.get_xaxis_transform(),
            color=_ORANGE,
            linestyle="none",
            marker="x",
            markersize=8,
            markeredgewidth=2.5,
            label="float32 back-propagation dead (0 or NaN)" if first and dead else None,
        )
    axes.set_xscale("log")
    axes.set_xlabel("inner steps t")
    axes.set_ylabel("log10 of the size of the meta-gradient")
    axes.set_title(f"Meta-gradient at step size {step_size:g}", fontsize="medium")
    axes.margins(y=0.12)
    return _save(figure, path)
