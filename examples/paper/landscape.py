"""The meta-objective over the step size: why the naive one cannot be descended, and the log one can.

Everything is exact, in closed form. The descent learns the logarithm of the step size of the longest horizon, by Rprop
on the log meta-gradient. Writes landscape.csv, trajectory.csv and landscape.png.

    python examples/paper/landscape.py
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tables import column, write_csv

from lightning_l2l.plotting import STYLES, new_figure
from lightning_l2l.tasks import Quadratic

Rows = list[tuple[float, ...]]


def curve(task: Quadratic, grid: torch.Tensor, steps: int) -> Rows:
    columns = (
        grid,
        task.meta_objective(grid, steps, "naive"),
        task.meta_objective(grid, steps, "log"),
        task.signed_log_meta_gradient(grid, steps, "naive").log_magnitude / math.log(10),
        task.meta_gradient(grid, steps, "log"),
    )
    return [(float(steps), *values) for values in zip(*(values.tolist() for values in columns), strict=True)]


def descend(task: Quadratic, start: float, steps: int, meta_steps: int) -> Rows:
    logarithm = torch.nn.Parameter(torch.tensor(math.log(start), dtype=torch.float64))
    optimizer = torch.optim.Rprop([logarithm], lr=0.2)
    path: Rows = []
    for meta_step in range(meta_steps + 1):
        step_size = logarithm.exp().item()
        path.append((float(meta_step), step_size, float(task.meta_objective(step_size, steps))))
        logarithm.grad = (task.meta_gradient(step_size, steps) * step_size).reshape(())
        optimizer.step()
    return path


def draw(path: Path, task: Quadratic, rows: Rows, descent: Rows, horizons: list[int]) -> None:
    figure, ((naive, log, learning),) = new_figure(1, 3, width=3.2, height=3.3)
    longest = max(horizons)
    first = math.log(float(task(task.initial_parameters(), None)))  # all curves start at "no progress"
    for style, steps in zip(STYLES * len(horizons), horizons, strict=False):
        of_horizon = [row for row in rows if row[0] == steps]
        step_sizes, logs = column(of_horizon, 1), [row[3] - first / steps for row in of_horizon]
        # From the logarithm: the naive objective itself leaves the number range in long unrolls.
        naive.plot(step_sizes, [steps * value / math.log(10) for value in logs], label=f"K = {steps}", **style)
        log.plot(step_sizes, logs, **style)
        best = task.optimal_step_size(steps)
        lowest = float(task.meta_objective(best, steps)) - first / steps
        log.plot(float(best), lowest, marker="*", markersize=11, color=style["color"], markeredgecolor="k", zorder=4)
    dots = {"color": "black", "marker": "o", "markersize": 3, "linewidth": 0.8}
    log.plot(column(descent, 1), [row[2] - first / longest for row in descent], linestyle="none", **dots)
    learning.plot(column(descent, 0), column(descent, 1), label=f"learning, K = {longest}", **dots)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("landscape"), help="folder for the results (%(default)s)")
    parser.add_argument("--dim", type=int, default=20, help="dimension (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the quadratic (%(default)s)")
    parser.add_argument("--kind", default="wide", choices=["square", "wide"], help="family (%(default)s)")
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 5, 20, 80], help="numbers of steps K")
    parser.add_argument("--start", type=float, default=1e-4, help="where the descent starts (%(default)s)")
    parser.add_argument("--meta-steps", type=int, default=60, help="of the descent (%(default)s)")
    parser.add_argument("--points", type=int, default=241, help="step sizes of a curve (%(default)s)")
    options = parser.parse_args(arguments)

    task, horizons = Quadratic.random(options.dim, seed=options.seed, kind=options.kind), sorted(options.horizons)
    limit = math.log10(float(task.stability_limit))
    grid = torch.logspace(limit - 3, limit + 1, options.points, dtype=torch.float64)
    rows = [row for steps in horizons for row in curve(task, grid, steps)]
    descent = descend(task, options.start, horizons[-1], options.meta_steps)
    header = ("steps", "step_size", "naive", "log", "naive_log10_gradient", "log_gradient")
    write_csv(options.output / "landscape.csv", header, rows)
    write_csv(options.output / "trajectory.csv", ("meta_step", "step_size", "log"), descent)
    draw(options.output / "landscape.png", task, rows, descent, horizons)
    best = float(task.optimal_step_size(horizons[-1]))
    print(f"K = {horizons[-1]}: learned {descent[-1][1]:.6g}, optimal {best:.6g}\nwritten to {options.output}")


if __name__ == "__main__":
    main()
