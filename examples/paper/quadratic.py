"""Experiment 1 of arXiv 2006.16495: learning the step size of gradient descent on a quadratic.

From the same start, the paper's schedule follows the exact meta-gradient and the one that plain float32
back-propagation returns (which dies, and the step size with it), and a bisection uses nothing but the exact sign.
Beside that: the optimal step size, and the size of each meta-gradient, against the number of steps. Writes
step_size, optimal_step_size and meta_gradient, each as a table and a figure; a few seconds for a seed.

    python examples/paper/quadratic.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path
from typing import Any

from search import Bisection, back_propagated, paper_schedule
from tables import column, write_csv
from tqdm import tqdm

from lightning_l2l.plotting import new_figure
from lightning_l2l.tasks import Quadratic

# Black, blue and orange of Okabe and Ito, which also differ in grey; thick pale lines first, so that a line on top of
# them stays visible.
BLACK, BLUE, ORANGE = "#000000", "#0072B2", "#E69F00"
METHODS: dict[str, dict[str, Any]] = {
    "float32 back-propagation, paper's schedule": {"color": ORANGE, "linewidth": 4.0},
    "exact meta-gradient, paper's schedule": {"color": BLUE, "linewidth": 1.2},
    "bisection on the sign": {"color": BLACK, "linewidth": 1.8, "linestyle": ":", "marker": "o", "markersize": 3},
}


def learn(task: Quadratic, steps: int, start: float, meta_steps: int) -> list[list[tuple[float, float]]]:
    """For each method the step sizes and meta-gradients that it went through."""
    bisection = Bisection(lambda eta: float(task.meta_gradient(eta, steps)))
    bisection.find(start)
    dying = cache(lambda eta: back_propagated(task, eta, steps))  # a frozen run asks for the same number again
    exact = paper_schedule(bisection.gradient, start, meta_steps)
    return [paper_schedule(dying, start, meta_steps), exact, list(bisection.seen.items())]


def sizes(task: Quadratic, steps: int, step_size: float) -> tuple[float, float, float]:
    """log10 of the naive meta-gradient, the log one, and what float32 back-propagation makes of that."""
    naive = float(task.signed_log_meta_gradient(step_size, steps, "naive").log_magnitude) / math.log(10)
    return naive, float(task.meta_gradient(step_size, steps)), back_propagated(task, step_size, steps)


def draw_step_sizes(path: Path, rows: list[tuple[Any, ...]], smallest: float, steps: int) -> None:
    figure, axes = new_figure(width=6.4, height=4.6)
    axis = axes[0, 0]
    for seed in dict.fromkeys(column(rows, 0)):
        for method, style in METHODS.items():
            path_of = [row for row in rows if row[:2] == (seed, method)]
            label = method if seed == rows[0][0] else None
            axis.plot([k + 1 for k in column(path_of, 2)], column(path_of, 3), label=label, **style)
    # The schedule visits zero, which a logarithmic axis cannot show: linear below a tenth of the smallest optimum.
    axis.set(xscale="log", xlabel="evaluations of the meta-gradient", ylabel="step size")
    axis.set_yscale("symlog", linthresh=smallest / 10)
    axis.set_ylim(0, 2 * max(column(rows, 3)))
    axis.set_title(f"Learning the step size of {steps} steps of gradient descent", fontsize="medium")
    save(figure, path)


def draw_optima(path: Path, rows: list[tuple[Any, ...]]) -> None:
    figure, axes = new_figure(width=6.4, height=4.6)
    axis = axes[0, 0]
    for seed in dict.fromkeys(column(rows, 0)):
        of_seed, first = [row for row in rows if row[0] == seed], seed == rows[0][0]
        limit, limiting = of_seed[0][3:]
        axis.axhline(limit, color=ORANGE, linewidth=4.0, label="stability limit 2 / L" if first else None)
        label = "2 / (L + smallest curvature)" if first else None
        axis.axhline(limiting, color=BLUE, linestyle="--", linewidth=1.4, label=label)
        label = "optimal step size" if first else None
        axis.plot(column(of_seed, 1), column(of_seed, 2), "o-", color=BLACK, markersize=4, linewidth=1.4, label=label)
    axis.set(xscale="log", xlabel="inner steps t", ylabel="step size")
    axis.set_title("The optimal step size depends on the horizon", fontsize="medium")
    save(figure, path)


def draw_sizes(path: Path, rows: list[tuple[Any, ...]], step_size: float) -> None:
    """log10 of the size of each gradient; a dead one becomes a cross at the foot of the picture."""
    figure, axes = new_figure(width=6.4, height=4.6)
    axis = axes[0, 0]
    for seed in dict.fromkeys(column(rows, 0)):
        of_seed = [row for row in rows if row[0] == seed]
        alive = [row for row in of_seed if math.isfinite(row[4]) and row[4] != 0]
        dead = [row[1] for row in of_seed if row not in alive]
        lines: list[tuple[str, list[int], list[float], dict[str, Any]]] = [
            ("naive objective, exact", column(of_seed, 1), column(of_seed, 2),
             {"color": BLACK, "linestyle": "--", "marker": "s", "markersize": 4}),
            ("log objective, float32 back-propagation", column(alive, 1), [math.log10(abs(row[4])) for row in alive],
             {"color": ORANGE, "linewidth": 5.0}),
            ("log objective, exact", column(of_seed, 1), [math.log10(abs(row[3])) for row in of_seed],
             {"color": BLUE, "linewidth": 1.4, "marker": "o", "markersize": 4}),
            ("float32 back-propagation dead (0 or NaN)", dead, [0.03] * len(dead),
             {"color": ORANGE, "linestyle": "none", "marker": "x", "markersize": 8, "markeredgewidth": 2.5,
              "transform": axis.get_xaxis_transform()}),
        ]  # fmt: skip
        for label, x, y, style in lines:
            axis.plot(x, y, label=label if seed == rows[0][0] and x else None, **style)
    axis.set(xscale="log", xlabel="inner steps t", ylabel="log10 of the size of the meta-gradient")
    axis.set_title(f"Meta-gradient at step size {step_size:g}", fontsize="medium")
    axis.margins(y=0.12)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")  # hides no curve
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--output", type=Path, default=Path("quadratic"), help="folder for the results (%(default)s)")
    option("--dim", type=int, default=20, help="dimension (%(default)s)")
    option("--kind", default="square", choices=["square", "wide", "condition"], help="family (%(default)s)")
    option("--condition-number", type=float, help="for --kind condition")
    option("--sphere", action="store_true", help="start on the unit sphere (the paper), not Gaussian (its code)")
    option("--seeds", type=int, nargs="+", default=[0], help="one quadratic each (0)")
    option("--steps", type=int, default=80, help="inner steps t (%(default)s)")
    option("--start", type=float, default=0.1, help="initial step size (%(default)s)")
    option("--meta-steps", type=int, default=300, help="updates of the schedule (%(default)s)")
    option("--horizons", type=int, nargs="+", default=[1, 2, 5, 10, 20, 40, 80, 200, 500, 1000], help="other t")
    options = parser.parse_args(arguments)

    paths: list[tuple[Any, ...]] = []
    optima: list[tuple[Any, ...]] = []
    gradients: list[tuple[Any, ...]] = []
    for seed in tqdm(options.seeds, desc="quadratics"):
        task = Quadratic.random(
            options.dim, seed=seed, kind=options.kind, condition_number=options.condition_number,
            start="sphere" if options.sphere else "gaussian",
        )  # fmt: skip
        for method, path in zip(METHODS, learn(task, options.steps, options.start, options.meta_steps), strict=True):
            paths += [(seed, method, k, *pair) for k, pair in enumerate(path)]
        limits = float(task.stability_limit), float(task.limiting_step_size)
        optima += [(seed, steps, float(task.optimal_step_size(steps)), *limits) for steps in options.horizons]
        gradients += [(seed, steps, *sizes(task, steps, options.start)) for steps in options.horizons]
    folder = options.output
    write_csv(folder / "step_size.csv", ("seed", "method", "meta_step", "step_size", "meta_gradient"), paths)
    header = ("seed", "steps", "optimal_step_size", "stability_limit", "limiting_step_size")
    write_csv(folder / "optimal_step_size.csv", header, optima)
    header = ("seed", "steps", "naive_log10", "log", "float32_back_propagation")
    write_csv(folder / "meta_gradient.csv", header, gradients)
    draw_step_sizes(folder / "step_size.png", paths, min(column(optima, 2)), options.steps)
    draw_optima(folder / "optimal_step_size.png", optima)
    draw_sizes(folder / "meta_gradient.png", gradients, options.start)
    for method in METHODS:
        last = [row for row in paths if row[:2] == (seed, method)][-1]
        print(f"{method:45} step size {last[3]:.6g} after {last[2] + 1} meta-gradients")
    print(f"{'optimal':45} step size {float(task.optimal_step_size(options.steps)):.6g}\nwritten to {folder}")


if __name__ == "__main__":
    main()
