"""Experiment 2 of arXiv 2006.16495: a step size tuned on training data against one tuned on held-out data.

For each setting the same tasks (noisy linear regression) serve both objectives: train-by-train takes the training loss
after t steps of gradient descent on all samples, train-by-validation trains on one half and takes the loss on the
other. The best step size of each on a logarithmic grid then trains new tasks on all samples, tested on as many fresh
ones. In closed form, in float32, all tasks and step sizes at once. Writes summary.csv, meta_objectives.csv,
trajectories.csv, and the figures meta_objectives.png, trajectories.png and, with a sweep, sweep.png.

    python examples/paper/least_squares.py --sweep samples

The defaults are the paper's setting, some minutes on one core; --dimension 200 --tasks 60 takes seconds.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tables import write_csv
from torch import Tensor
from tqdm import tqdm

from lightning_l2l.plotting import new_figure
from lightning_l2l.tasks import LeastSquares

SWEEPS: dict[str, tuple[float, ...]] = {
    "samples": (100, 250, 500, 750, 1000, 1500, 2000, 4000),
    "noise": (0.5, 1, 2, 3, 4, 5),
    "steps": (10, 20, 40, 80, 160, 320),
}
SPLITS = ("train", "validation")
STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": "#D55E00", "linestyle": "-", "marker": "o", "markersize": 3.5},
    "validation": {"color": "#0072B2", "linestyle": "--", "marker": "s", "markersize": 3.5},
    "zero": {"color": "0.35", "linestyle": ":", "linewidth": 1.2},
}
LABELS = {"samples": "samples n per task", "noise": "noise σ of the labels", "steps": "steps t"}
# Numbers in one portion of tasks, 64 MiB in float32: bounds the memory whatever the number of tasks.
PORTION = 2**24


@dataclass(frozen=True)
class Row:
    """A setting, both step sizes, and what training new tasks with them gives, in the mean.

    ``ratio`` is the RMSE on fresh samples of train-by-train over that of train-by-validation; the population error is
    ``|w_t - w*|^2``, where predicting zero has 1.
    """

    samples: int
    noise: float
    steps: int
    step_size_train: float
    step_size_validation: float
    train_rmse_train: float
    train_rmse_validation: float
    test_rmse_train: float
    test_rmse_validation: float
    test_rmse_zero: float
    ratio: float
    population_error_train: float
    population_error_validation: float


@dataclass(frozen=True)
class Outcome:
    row: Row
    objectives: Tensor  # means over the tasks, [2, grid]
    truncated: Tensor  # how many tasks were, [2, grid]
    rmse: Tensor  # [train or test samples, tests, 2, steps + 1]


def measure(samples: int, noise: float, steps: int, options: argparse.Namespace, grid: Tensor) -> Outcome:
    """Tune both step sizes, a portion of the tasks at a time, and try them on new tasks."""
    generator = torch.Generator().manual_seed(options.seed)
    size = max(1, PORTION // (samples * options.dimension))
    # The new tasks are drawn first: they do not depend on how many there are to tune on.
    new = LeastSquares.sample(
        options.tests, options.dimension, 2 * samples, noise, seed=generator, validation_fraction=0.5,
        truncation_radius=math.inf,
    )  # fmt: skip
    values, truncated = torch.zeros(2, len(grid), dtype=torch.float64), torch.zeros(2, len(grid), dtype=torch.int64)
    for begin in tqdm(range(0, options.tasks, size), desc=f"n = {samples}, σ = {noise:g}, t = {steps}", leave=False):
        count = min(size, options.tasks - begin)
        whole = LeastSquares.sample(count, options.dimension, samples, noise, seed=generator)
        halves = whole.split(validation_fraction=0.5)
        for which, found in enumerate(
            (
                whole.meta_gradient(grid, steps, "naive", meta_data="train"),
                halves.meta_gradient(grid, steps, "naive", meta_data="val"),
            )
        ):
            values[which] += found.value.sum(0) / options.tasks
            truncated[which] += found.truncated.sum(0)
    best = grid[values.argmin(1)]
    path = [[new.meta_gradient(best, k, "naive", meta_data=d) for k in range(1, steps + 1)] for d in ("train", "val")]
    start = [0.5 * part.square().mean(-1) for part in (new.targets[:, :samples], new.targets[:, samples:])]
    losses = [
        torch.stack([first[:, None].expand(-1, 2).double(), *(one.value for one in later)], -1)
        for first, later in zip(start, path, strict=True)
    ]
    rmse = (2 * torch.stack(losses)).sqrt()
    (fitted, tested), error = rmse[..., -1].mean(1).tolist(), path[0][-1].population_error.mean(0).tolist()
    zero = math.sqrt(1 + noise**2)
    row = Row(samples, noise, steps, *best.tolist(), *fitted, *tested, zero, tested[0] / tested[1], *error)
    return Outcome(row, values, truncated, rmse)


def settings(options: argparse.Namespace) -> list[tuple[int, float, int]]:
    if options.sweep is None:
        return [(options.samples, options.noise, options.steps)]
    one = {"samples": options.samples, "noise": options.noise, "steps": options.steps}
    chosen = [{**one, options.sweep: value} for value in options.sweep_values or SWEEPS[options.sweep]]
    return [(int(each["samples"]), float(each["noise"]), int(each["steps"])) for each in chosen]


def write(folder: Path, outcomes: list[Outcome], grid: Tensor) -> None:
    rows = [asdict(outcome.row).values() for outcome in outcomes]
    write_csv(folder / "summary.csv", [field.name for field in fields(Row)], [list(row) for row in rows])
    curves: list[list[Any]] = []
    paths: list[list[Any]] = []
    for outcome in outcomes:
        setting = [outcome.row.samples, outcome.row.noise, outcome.row.steps]
        columns = (grid, *outcome.objectives, *outcome.truncated)
        curves += [[*setting, *line] for line in zip(*(values.tolist() for values in columns), strict=True)]
        for quantity, errors in zip(("train", "test"), outcome.rmse, strict=True):
            for which, split in enumerate(SPLITS):
                summary = (errors[:, which].mean(0), errors[:, which].amin(0), errors[:, which].amax(0))
                lines = zip(*(values.tolist() for values in summary), strict=True)
                paths += [[*setting, split, quantity, step, *line] for step, line in enumerate(lines)]
    header = ["samples", "noise", "steps"]
    names = ["step_size", "train_by_train", "train_by_validation", "truncated_train", "truncated_validation"]
    write_csv(folder / "meta_objectives.csv", header + names, curves)
    names = ["tuned_on", "rmse_on", "step", "mean", "min", "max"]
    write_csv(folder / "trajectories.csv", header + names, paths)


def draw_trajectories(path: Path, outcomes: list[Outcome]) -> None:
    """A row for each setting: RMSE on the training samples and on fresh ones, mean and range over the tests."""
    figure, axes = new_figure(len(outcomes), 2, height=3.3)
    for (left, right), outcome in zip(axes, outcomes, strict=True):
        row = outcome.row
        for axis, name, errors in zip((left, right), ("training", "fresh"), outcome.rmse, strict=True):
            for which, split in enumerate(SPLITS):
                rmse, every = errors[:, which], max(1, row.steps // 10)
                axis.plot(rmse.mean(0), label=f"tuned on {split}", markevery=every, **STYLES[split])
                span = rmse.amin(0), rmse.amax(0)
                axis.fill_between(range(row.steps + 1), *span, color=STYLES[split]["color"], alpha=0.18, linewidth=0)
            axis.axhline(row.test_rmse_zero, label="predicting zero", **STYLES["zero"])
            title = f"{name} samples, n = {row.samples}, σ = {row.noise:g}, t = {row.steps}"
            axis.set(title=title, xlabel="step", ylabel="RMSE")
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def draw_objectives(path: Path, outcomes: list[Outcome], grid: Tensor) -> None:
    """A row for each setting: both meta-objectives, and the valley of train-by-validation enlarged."""
    figure, axes = new_figure(len(outcomes), 2, height=3.3)
    for (axis, valley), outcome in zip(axes, outcomes, strict=True):
        for split, curve in zip(SPLITS, outcome.objectives, strict=True):
            axis.loglog(grid, curve, label=f"train-by-{split}", **STYLES[split])
            star = {"marker": "*", "markersize": 13, "color": STYLES[split]["color"], "markeredgecolor": "k"}
            axis.plot(grid[curve.argmin()], curve.min(), **star)
        inside = outcome.truncated[1] == 0
        valley.semilogx(grid[inside], outcome.objectives[1][inside], **STYLES["validation"])
        valley.plot(grid[curve.argmin()], curve.min(), **star)
        title = f"n = {outcome.row.samples}, σ = {outcome.row.noise:g}"
        axis.set(title=title, xlabel="step size", ylabel=f"mean loss after {outcome.row.steps} steps")
        valley.set(title="train-by-validation, no run truncated", xlabel="step size")
    axes[0, 0].legend(frameon=False, fontsize="small", title="★ best on the grid", title_fontsize="small")
    figure.savefig(path)


def draw_sweep(path: Path, outcomes: list[Outcome], sweep: str) -> None:
    """Population error, test RMSE and the chosen step sizes against the setting that was varied."""
    figure, ((error, rmse, sizes),) = new_figure(1, 3, height=3.3)
    rows = [outcome.row for outcome in outcomes]
    values = [getattr(row, sweep) for row in rows]
    for which, split in enumerate(SPLITS):
        for axis, quantity in ((error, "population_error"), (rmse, "test_rmse"), (sizes, "step_size")):
            label = f"tuned on {split}"
            axis.plot(values, [getattr(row, f"{quantity}_{split}") for row in rows], label=label, **STYLES[split])
        last = [outcome.rmse[1, :, which, -1] for outcome in outcomes]
        span = [float(one.min()) for one in last], [float(one.max()) for one in last]
        rmse.fill_between(values, *span, color=STYLES[split]["color"], alpha=0.18, linewidth=0)
    error.axhline(1.0, label="predicting zero", **STYLES["zero"])
    rmse.plot(values, [row.test_rmse_zero for row in rows], **STYLES["zero"])
    error.set(ylabel="population error |w − w*|²", yscale="log" if sweep == "noise" else "linear")
    rmse.set(ylabel="RMSE on fresh samples")
    sizes.set(ylabel="best step size on the grid", yscale="log")
    for axis in (error, rmse, sizes):
        axis.set(xlabel=LABELS[sweep], xscale="linear" if sweep == "noise" else "log")
        axis.set_xticks(values[::2], [f"{value:g}" for value in values[::2]])  # matplotlib's own labels overlap
        axis.set_xticks([], minor=True)
    error.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--output", type=Path, default=Path("least_squares"), help="folder for the results (%(default)s)")
    option("--dimension", type=int, default=1000, help="d (%(default)s)")
    option("--samples", type=int, default=500, help="n (%(default)s)")
    option("--noise", type=float, default=1.0, help="standard deviation of the label noise, above 1/40 (%(default)s)")
    option("--steps", type=int, default=40, help="t (%(default)s)")
    option("--tasks", type=int, default=300, help="tasks that a step size is tuned on (%(default)s)")
    option("--tests", type=int, default=10, help="new tasks that it is tried on (%(default)s)")
    option("--grid-points", type=int, default=25, help="step sizes from 1e-6 to 1 (%(default)s)")
    option("--sweep", choices=list(SWEEPS), help="repeat for several values of one setting")
    option("--sweep-values", type=float, nargs="+", help="the values; those of the paper's figures by default")
    option("--seed", type=int, default=0, help="of the data (%(default)s)")
    options = parser.parse_args(arguments)

    grid = torch.logspace(-6, 0, options.grid_points, dtype=torch.float64)
    outcomes = [measure(*setting, options, grid) for setting in settings(options)]
    write(options.output, outcomes, grid)
    draw_trajectories(options.output / "trajectories.png", outcomes)
    draw_objectives(options.output / "meta_objectives.png", outcomes, grid)
    if options.sweep is not None:
        draw_sweep(options.output / "sweep.png", outcomes, options.sweep)
    shown = ("samples", "noise", "steps", "step_size_train", "step_size_validation", "ratio",
             "population_error_train", "population_error_validation")  # fmt: skip
    print("  ".join(shown))
    for outcome in outcomes:
        print("  ".join(f"{getattr(outcome.row, name):>{len(name)}.4g}" for name in shown))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
