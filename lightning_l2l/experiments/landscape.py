"""The meta-objective as a landscape over the step size: why the naive one cannot be walked on, and the log one can."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from lightning_l2l.exact.meta_optimizer import MetaOptimizer
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned import LearnedStepSize
from lightning_l2l.plotting import STYLES, new_figure, require_matplotlib
from lightning_l2l.tasks import Quadratic

_META_LEARNING_RATE = 0.4
_COLUMNS = ("steps", "step_size", "naive", "log", "naive_log10_gradient", "log_gradient")


def run(
    output: Path | str = "landscape",
    *,
    dim: int = 20,
    seed: int = 0,
    kind: Literal["square", "wide"] = "wide",
    horizons: Sequence[int] = (1, 5, 20, 80),
    initial_step_size: float = 1e-4,
    meta_steps: int = 120,
    points: int = 241,
    plots: bool = True,
) -> list[Path]:
    """Evaluate both meta-objectives of a random quadratic over the step size, and walk down the log one.

    Everything is exact (closed form, float64). The walk is the callback's own: its meta-optimizer on the logarithm of
    the step size, with the meta-gradient of the log objective for the longest horizon.

    Args:
        output: Folder for ``landscape.csv``, ``trajectory.csv`` and ``landscape.png``; made if missing.
        dim: Dimension of the quadratic.
        seed: Seed of the quadratic.
        kind: Family of the Hessian, see :meth:`lightning_l2l.tasks.Quadratic.random`.
        horizons: Numbers of inner steps K, one curve each.
        initial_step_size: Where the walk starts.
        meta_steps: Meta-updates of the walk.
        points: Step sizes of each curve, from 1e-3 to 10 times the stability limit.
        plots: Draw the figure (needs matplotlib).

    Returns:
        The files written.

    Raises:
        ValueError: A setting out of its range.
        ImportError: ``plots`` without matplotlib.

    Example:
        >>> import tempfile
        >>> files = run(tempfile.mkdtemp(), points=11, meta_steps=2, plots=False)
        >>> [path.name for path in files]
        ['landscape.csv', 'trajectory.csv']
    """
    if not horizons or min(horizons) < 1:
        raise ValueError(f"horizons={list(horizons)} must name at least one number of steps, each at least 1.")
    if points < 2 or meta_steps < 1:
        raise ValueError(f"points={points} must be at least 2 and meta_steps={meta_steps} at least 1.")
    if not (math.isfinite(initial_step_size) and initial_step_size > 0):
        raise ValueError(f"initial_step_size={initial_step_size} must be positive and finite.")
    if plots:
        require_matplotlib()
    task = Quadratic.random(dim, seed=seed, kind=kind)
    limit = float(task.stability_limit)
    grid = torch.logspace(math.log10(limit) - 3, math.log10(limit) + 1, points, dtype=torch.float64)
    rows = [row for steps in sorted(horizons) for row in _curve(task, grid, steps)]
    walk = _walk(task, initial_step_size, max(horizons), meta_steps)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        _write(folder / "landscape.csv", _COLUMNS, rows),
        _write(folder / "trajectory.csv", ("meta_step", "step_size", "log"), walk),
    ]
    if plots:
        files.append(_draw(folder / "landscape.png", task, rows, walk, sorted(horizons)))
    return files


def _curve(task: Quadratic, grid: torch.Tensor, steps: int) -> list[tuple[float, ...]]:
    naive_size = task.signed_log_meta_gradient(grid, steps, "naive").log_magnitude / math.log(10)
    columns = (
        grid,
        task.meta_objective(grid, steps, "naive"),
        task.meta_objective(grid, steps, "log"),
        naive_size,
        task.meta_gradient(grid, steps, "log"),
    )
    return [(float(steps), *values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _walk(task: Quadratic, start: float, steps: int, meta_steps: int) -> list[tuple[float, ...]]:
    learned = LearnedStepSize(maximum=1e12).attach(inner_optimizer(torch.optim.SGD, lr=start))
    meta_optimizer = MetaOptimizer(learned.parameters(), learning_rate=_META_LEARNING_RATE)
    walk: list[tuple[float, ...]] = []
    for meta_step in range(meta_steps + 1):
        step_size = learned.values()[0]["lr"]
        walk.append((float(meta_step), step_size, float(task.meta_objective(step_size, steps, "log"))))
        gradient = task.meta_gradient(step_size, steps, "log") * step_size  # with respect to the logarithm
        meta_optimizer.apply(learned, {"learning_rate": gradient.reshape(1)})
    return walk


def _write(path: Path, header: Sequence[str], rows: list[tuple[float, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _draw(
    path: Path, task: Quadratic, rows: list[tuple[float, ...]], walk: list[tuple[float, ...]], horizons: list[int]
) -> Path:
    figure, axes = new_figure(1, 3, width=3.2, height=3.3)
    naive, log, learning = axes[0]
    longest = max(horizons)
    first = math.log(float(task(task.initial_parameters(), None)))  # log f(w_0): all curves start at "no progress"
    for which, steps in enumerate(horizons):
        style = STYLES[which % len(STYLES)]
        curve = [row for row in rows if row[0] == steps]
        step_sizes = [row[1] for row in curve]
        logs = [row[3] - first / steps for row in curve]
        # From the logarithm: the naive objective itself leaves the number range in long unrolls.
        naive.plot(step_sizes, [steps * value / math.log(10) for value in logs], label=f"K = {steps}", **style)
        log.plot(step_sizes, logs, **style)
        best = task.optimal_step_size(steps)
        lowest = float(task.meta_objective(best, steps, "log")) - first / steps
        log.plot(float(best), lowest, marker="*", markersize=11, color=style["color"], markeredgecolor="k", zorder=4)
    dots = {"color": "black", "marker": "o", "markersize": 3, "linewidth": 0.8}
    log.plot([row[1] for row in walk], [row[2] - first / longest for row in walk], linestyle="none", **dots)
    learning.plot([row[0] for row in walk], [row[1] for row in walk], label=f"learning, K = {longest}", **dots)
    learning.axhline(float(task.optimal_step_size(longest)), color="0.4", linestyle="--", label="its optimum (star)")
    for axis in (naive, log):
        axis.set(xscale="log", xlabel="step size")
        axis.axvline(float(task.stability_limit), color="0.4", linewidth=0.8, linestyle=":")
    naive.plot([], [], color="0.4", linewidth=0.8, linestyle=":", label="stability limit 2/L")
    # The naive objective spans hundreds of decades: that is the point, and the axis must not hide it.
    naive.set(title="naive objective", ylabel="decades above the first loss")
    log.set(title="log objective", ylabel="change of log loss per step")
    learning.set(title="learning on the log objective", xlabel="meta-step", ylabel="step size", yscale="log")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path)
    return path
