"""Experiment 1 of arXiv 2006.16495: learning the step size of gradient descent on a quadratic."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_l2l.exact.scalar_search import bisect_log_step_size, paper_schedule
from lightning_l2l.experiments._quadratic_figures import draw, require_matplotlib
from lightning_l2l.tasks import Quadratic

MethodName = Literal["exact", "float32_backprop", "bisection"]


@dataclass(frozen=True)
class MetaStep:
    """One row of ``step_size.csv``: a method's step size at a meta-step and its meta-gradient there.

    For ``"bisection"`` a meta-step is one evaluation, the step size the one looked at, and the meta-gradient
    its sign.
    """

    seed: int
    method: MethodName
    meta_step: int
    step_size: float
    meta_gradient: float


@dataclass(frozen=True)
class Optimum:
    """One row of ``optimal_step_size.csv``."""

    seed: int
    steps: int
    optimal_step_size: float
    limiting_step_size: float
    stability_limit: float


@dataclass(frozen=True)
class GradientSize:
    """One row of ``meta_gradient.csv``, at the initial step size.

    ``naive_sign * 10**naive_log10`` is the exact gradient of the naive objective, which may fit no float;
    ``log`` that of the log objective; ``float32_backprop`` what plain back-propagation of the log objective
    returns, with its status.
    """

    seed: int
    steps: int
    naive_sign: float
    naive_log10: float
    log: float
    float32_backprop: float
    float32_backprop_status: Literal["ok", "overflow", "underflow"]


@dataclass(frozen=True)
class QuadraticReport:
    """Everything that :func:`run` found, and where it was written."""

    meta_steps: list[MetaStep]
    optima: list[Optimum]
    gradients: list[GradientSize]
    files: list[Path]


def run(
    output: Path,
    *,
    dim: int = 20,
    steps: int = 80,
    initial_step_size: float = 0.1,
    objective: Literal["log", "naive", "naive_mean", "log_mean", "log_of_mean"] = "log",
    seeds: Sequence[int] = (0,),
    kind: Literal["square", "wide", "condition"] = "square",
    condition_number: float | None = None,
    start: Literal["gaussian", "sphere"] = "gaussian",
    meta_steps: int = 300,
    schedule_scale: float = 0.01,
    horizons: Sequence[int] = (1, 2, 5, 10, 20, 40, 80, 200, 500, 1000),
    plots: bool = True,
    progress: bool = True,
) -> QuadraticReport:
    """Learn the step size of a quadratic three ways; measure optimum and meta-gradient against the horizon.

    From the same start, the paper's schedule follows the exact meta-gradient and the one that plain float32
    back-propagation returns (which dies, and the step size with it), and a bisection uses nothing but the
    exact sign. Takes a few seconds per seed with the default settings.

    Args:
        output: Folder for ``step_size.csv``, ``optimal_step_size.csv``, ``meta_gradient.csv`` and the figures
            of the same names; created if missing, files in it are overwritten.
        dim: Dimension of the quadratic.
        steps: Number of inner steps ``t``.
        initial_step_size: Where every method starts, positive.
        objective: Meta-objective that the three methods minimise; :class:`lightning_l2l.tasks.Quadratic`
            lists them.
        seeds: One quadratic per seed; the figures draw all of them.
        kind: Family of random Hessians, see :meth:`lightning_l2l.tasks.Quadratic.random`.
        condition_number: For ``kind="condition"`` only.
        start: Gaussian starting point (the reference code) or one on the unit sphere (the paper).
        meta_steps: Updates of the paper's schedule.
        schedule_scale: Its constant: ``scale / sqrt(k)`` at update ``k``.
        horizons: Numbers of inner steps for the optimum and for the size of the meta-gradient.
        plots: Draw the figures; needs matplotlib.
        progress: Show a progress bar.

    Returns:
        The rows of the three tables and the files written.

    Raises:
        ValueError: If a setting is out of its range.
        ImportError: If figures are asked for and matplotlib is missing.
    """
    if not (math.isfinite(initial_step_size) and initial_step_size > 0):
        raise ValueError(f"initial_step_size must be positive and finite, got {initial_step_size!r}.")
    if plots:
        require_matplotlib()  # before the work, not after
    if not seeds or not horizons:
        raise ValueError("seeds and horizons must each name at least one number.")
    report = QuadraticReport([], [], [], [])
    with tqdm(total=len(seeds) * (3 + len(horizons)), disable=not progress, unit="run") as bar:
        for seed in seeds:
            task = Quadratic.random(dim, seed=seed, kind=kind, condition_number=condition_number, start=start)
            bar.set_description(f"seed {seed}")
            for method, trace in _learn(task, steps, initial_step_size, objective, meta_steps, schedule_scale):
                report.meta_steps.extend(MetaStep(seed, method, *row) for row in trace)
                bar.update()
            for horizon in sorted(horizons):
                report.optima.append(_optimum(task, seed, horizon))
                report.gradients.append(_gradient_size(task, seed, horizon, initial_step_size))
                bar.update()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    tables: list[tuple[str, Sequence[Any]]] = [
        ("step_size", report.meta_steps),
        ("optimal_step_size", report.optima),
        ("meta_gradient", report.gradients),
    ]
    for name, rows in tables:
        report.files.append(_write_csv(output / f"{name}.csv", rows))
    if plots:
        report.files.extend(draw(report, output, steps, initial_step_size))
    return report


def _learn(
    task: Quadratic, steps: int, initial: float, objective: Any, meta_steps: int, scale: float
) -> Iterable[tuple[MethodName, list[tuple[int, float, float]]]]:
    """Yield each method with its (meta-step, step size, meta-gradient) rows."""

    @cache  # a frozen run asks for the same step size at every meta-step
    def backpropagated(step_size: float) -> float:
        return task.backprop_meta_gradient(step_size, steps, torch.float32, objective).gradient

    def exact(step_size: float) -> float:
        return float(task.meta_gradient(step_size, steps, objective))

    def exact_sign(step_size: float) -> float:
        return float(task.signed_log_meta_gradient(step_size, steps, objective).sign)

    functions: list[tuple[MethodName, Callable[[float], float]]] = [
        ("exact", exact),
        ("float32_backprop", backpropagated),
    ]
    for method, function in functions:
        result = paper_schedule(function, initial, meta_steps, scale, non_finite="skip")
        gradients = [*result.meta_gradients, function(result.step_sizes[-1])]
        yield method, [(k, *pair) for k, pair in enumerate(zip(result.step_sizes, gradients, strict=True))]
    history = bisect_log_step_size(exact_sign, initial).history
    yield "bisection", [(k, seen.step_size, seen.signal.gradient) for k, seen in enumerate(history)]


def _optimum(task: Quadratic, seed: int, horizon: int) -> Optimum:
    return Optimum(
        seed,
        horizon,
        float(task.optimal_step_size(horizon)),
        float(task.limiting_step_size),
        float(task.stability_limit),
    )


def _gradient_size(task: Quadratic, seed: int, horizon: int, step_size: float) -> GradientSize:
    sign, log_magnitude = task.signed_log_meta_gradient(step_size, horizon, "naive")
    plain = task.backprop_meta_gradient(step_size, horizon, torch.float32)
    return GradientSize(
        seed,
        horizon,
        float(sign),
        float(log_magnitude) / math.log(10),
        float(task.meta_gradient(step_size, horizon)),
        plain.gradient,
        plain.status,
    )


def _write_csv(path: Path, rows: Sequence[Any]) -> Path:
    names = [column.name for column in fields(rows[0])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
    return path
