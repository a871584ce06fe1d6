"""The figures of the least-squares experiment. Colours of Okabe and Ito, and a line style each for greyscale."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_l2l.experiments._least_squares_comparison import Outcome
from lightning_l2l.tasks._least_squares_results import StepSizeCurve

_TRAIN: dict[str, Any] = {"color": "#D55E00", "linestyle": "-", "marker": "o", "markersize": 3.5}
_VALIDATION: dict[str, Any] = {"color": "#0072B2", "linestyle": "--", "marker": "s", "markersize": 3.5}
_REFERENCE: dict[str, Any] = {"color": "0.35", "linestyle": ":", "linewidth": 1.2}
_LABELS = {"samples": "samples n per task", "noise": "noise σ of the labels", "steps": "steps t"}


def require_matplotlib() -> None:
    """Refuse early where the figures could not be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            "The figures need matplotlib: install lightning-l2l[plots], or leave them out with plots=False."
        )


def draw(folder: Path, outcomes: list[Outcome], sweep: str) -> list[Path]:
    """Draw every figure that the outcomes support.

    Args:
        folder: Where the files go.
        outcomes: One for each setting.
        sweep: Which setting was varied, or ``"none"``.

    Returns:
        The files.
    """
    paths = [_trajectories(folder, outcomes, sweep), _meta_objectives(folder, outcomes, sweep)]
    if sweep != "none":
        paths.append(_sweep(folder, outcomes, sweep))
    return paths


def _figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(4.3 * columns, 3.3 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path


def _title(outcome: Outcome, sweep: str) -> str:
    setting = outcome.comparison
    values = {"samples": f"n = {setting.samples}", "noise": f"σ = {setting.noise:g}", "steps": f"t = {setting.steps}"}
    return ", ".join(values.values()) if sweep == "none" else values[sweep]


def _trajectories(folder: Path, outcomes: list[Outcome], sweep: str) -> Path:
    """One row per setting: RMSE on the training samples and on fresh ones, mean and range over the tests."""
    figure, axes = _figure(2, len(outcomes))
    for row, outcome in zip(axes, outcomes, strict=True):
        path, setting = outcome.trajectory, outcome.comparison
        panels = (("training samples", path.train_rmse), ("fresh samples", path.validation_rmse))
        for axis, (name, errors) in zip(row, panels, strict=True):
            styles = (("tuned on train", _TRAIN), ("tuned on validation", _VALIDATION))
            for which, (label, style) in enumerate(styles):
                rmse = errors[:, which]
                steps = range(rmse.shape[-1])
                every = max(1, len(steps) // 10)
                axis.plot(steps, rmse.mean(0), label=label, markevery=every, **style)
                axis.fill_between(steps, rmse.amin(0), rmse.amax(0), color=style["color"], alpha=0.18, linewidth=0)
            axis.axhline(setting.test_rmse_zero, label="predicting zero", **_REFERENCE)
            axis.set(title=f"{name}, {_title(outcome, sweep)}", xlabel="step", ylabel="RMSE")
        row[0].set_ylim(bottom=0)
        row[0].legend(frameon=False, fontsize="small")
    return _save(figure, folder / "trajectories.png")


def _meta_objectives(folder: Path, outcomes: list[Outcome], sweep: str) -> Path:
    """One row per setting: both meta-objectives against the step size, and train-by-validation's valley enlarged."""
    figure, axes = _figure(2, len(outcomes))
    for (axis, valley), outcome in zip(axes, outcomes, strict=True):
        curves = (
            ("train-by-train", outcome.by_train, _TRAIN),
            ("train-by-validation", outcome.by_validation, _VALIDATION),
        )
        for label, curve, style in curves:
            axis.loglog(curve.step_sizes, curve.value, label=label, **style)
            _star(axis, curve, style)
        axis.set(title=_title(outcome, sweep), xlabel="step size η", ylabel="mean loss after t steps")
        curve = outcome.by_validation
        shown = curve.truncated == 0
        valley.semilogx(curve.step_sizes[shown], curve.value[shown], **_VALIDATION)
        _star(valley, curve, _VALIDATION)
        valley.set(title="train-by-validation, no run truncated", xlabel="step size η")
    axes[0, 0].legend(frameon=False, fontsize="small", title="★ best on the grid", title_fontsize="small")
    return _save(figure, folder / "meta_objectives.png")


def _star(axis: Any, curve: StepSizeCurve, style: dict[str, Any]) -> None:
    axis.plot(curve.best, curve.value.min(), marker="*", markersize=13, color=style["color"], markeredgecolor="k")


def _sweep(folder: Path, outcomes: list[Outcome], sweep: str) -> Path:
    """Population error, test RMSE and the chosen step sizes against the setting that was varied."""
    figure, axes = _figure(3)
    error, rmse, sizes = axes[0]
    rows = [outcome.comparison for outcome in outcomes]
    values = [getattr(row, sweep) for row in rows]
    for key, style, label in (("train", _TRAIN, "tuned on train"), ("validation", _VALIDATION, "tuned on validation")):
        error.plot(values, [getattr(row, f"population_error_{key}") for row in rows], label=label, **style)
        rmse.plot(values, [getattr(row, f"test_rmse_{key}") for row in rows], **style)
        low = [getattr(row, f"test_rmse_{key}_min") for row in rows]
        high = [getattr(row, f"test_rmse_{key}_max") for row in rows]
        rmse.fill_between(values, low, high, color=style["color"], alpha=0.18, linewidth=0)
        sizes.plot(values, [getattr(row, f"step_size_{key}") for row in rows], **style)
    error.axhline(1.0, label="predicting zero", **_REFERENCE)
    rmse.plot(values, [row.test_rmse_zero for row in rows], **_REFERENCE)
    error.set(ylabel="population error |w − w*|²", yscale="log" if sweep == "noise" else "linear")
    rmse.set(ylabel="RMSE on fresh samples")
    sizes.set(ylabel="best step size η on the grid", yscale="log")
    for axis in axes[0]:
        axis.set(xlabel=_LABELS[sweep])
        if sweep != "noise":
            _logarithmic(axis, values)
    error.legend(frameon=False, fontsize="small")
    return _save(figure, folder / "sweep.png")


def _logarithmic(axis: Any, values: list[float]) -> None:
    """A logarithmic x axis with labels at the values themselves, as many as there is room for."""
    # matplotlib's own labels (3 x 10^1, 4 x 10^1) overlap where the values span less than a decade.
    axis.set_xscale("log")
    ordered = sorted(values, reverse=True)
    apart = (ordered[0] / ordered[-1]) ** 0.14  # a label takes up to a seventh of the axis
    labelled: list[float] = []
    for value in ordered:
        if not labelled or labelled[-1] >= value * apart:
            labelled.append(value)
    axis.set_xticks(labelled, [f"{value:g}" for value in labelled])
    axis.set_xticks(values, minor=True, labels=[""] * len(values))
