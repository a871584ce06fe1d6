"""Estimators over windows on three problems: numbers, and the figures of ``docs/which-estimator.md``.

    python tests/benchmarks/anchors.py a1 a2 a7 --seeds 5 --figures docs/figures

Each run is one meta-training; the seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from anchor_problems import DigitsSchedule, InfluenceBalancing, MetaTrainingRun, ToyRegression, digits_batches

from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.estimators.particle_unroll import spread, unroll
from lightning_l2l.exact.inner_step import InnerStep


def influence_balancing(estimator: str, seed: int) -> tuple[list[tuple[int, float]], dict]:
    """A1: one step per window, the training never starts again, 3000 updates by SGD at 1e-4."""
    problem = InfluenceBalancing()
    curve: list[tuple[int, float]] = [(0, problem.final_loss())]
    run = MetaTrainingRun(estimator, Particles(1000, 0.1, seed), unroll_steps=1, windows=None, iterations=3000)

    def note(iteration: int) -> None:
        if (iteration + 1) % 50 == 0:
            curve.append((iteration + 1, problem.final_loss()))

    run.train(problem, torch.optim.SGD(problem.parameters(), lr=1e-4), "naive", each=note)
    return curve, {"theta": problem.theta.item(), "loss": problem.final_loss()}


def toy_regression(estimator: str, seed: int) -> tuple[list[tuple[int, float]], dict]:
    """A2: windows of 10 of 100 steps, 2000 updates by Adam at 2e-2."""
    problem = ToyRegression()
    # Chosen on other seeds than those of the table: smaller perturbations at the end are for the smaller noise.
    annealing = 0.1 if estimator == "es_single" else 1 / 3
    curve: list[tuple[int, float]] = [(0, problem.total_loss())]
    run = MetaTrainingRun(
        estimator,
        Particles(400, 0.3, seed),
        unroll_steps=10,
        windows=10,
        iterations=2000,
        factor=10.0,
        annealing=annealing,
    )

    def note(iteration: int) -> None:
        if (iteration + 1) % 20 == 0:
            curve.append((iteration + 1, problem.total_loss()))

    run.train(problem, torch.optim.Adam(problem.parameters(), lr=2e-2, betas=(0.99, 0.999)), "naive_mean", each=note)
    tail = statistics.mean(loss for _, loss in curve[-10:])
    # The loss wiggles by 10 with tiny changes of theta; the mean over the last 200 updates does not.
    return curve, {"theta": problem.theta.tolist(), "loss": tail, "final_loss": problem.total_loss()}


def digits(estimator: str, seed: int) -> tuple[list[tuple[int, float]], dict]:
    """A7: windows of 10 of 500 steps, 1500 updates by Adam at 3e-2; judged by :func:`judge_digits`."""
    problem = DigitsSchedule()
    curve: list[tuple[int, float]] = []
    cache: dict[int, list] = {}

    def batches(episode: int, window: int) -> list:
        if episode not in cache:
            cache.clear()
            cache[episode] = digits_batches(episode, 550)
        return [*cache[episode][10 * window : 10 * window + 10], cache[episode][500 + window]]

    def note(iteration: int) -> None:
        if (iteration + 1) % 250 == 0:
            # Only to be looked at: three trainings leave 4 to 5 % of noise.
            curve.append((iteration + 1, digits_losses(problem.theta.detach()[None], range(-3, 0)).mean().item()))

    run = MetaTrainingRun(
        estimator, Particles(50, 0.1, seed, loss_limit=20.0), unroll_steps=10, windows=50, iterations=1500,
        annealing=1 / 3,
    )  # fmt: skip
    run.train(problem, torch.optim.Adam(problem.parameters(), lr=3e-2), "naive_mean", batches, note)
    return curve, {"theta": problem.theta.tolist()}


def digits_losses(thetas: torch.Tensor, seeds: range) -> torch.Tensor:
    """Mean training loss over a whole training for several thetas at once; ``[trainings, thetas]``."""
    problem = DigitsSchedule()
    step = InnerStep(problem.loss, problem)
    losses = []
    for seed in seeds:
        given = digits_batches(seed + 2**40, problem.steps)
        start = spread(step.start(problem.start(seed + 2**40), None, {}), len(thetas))
        run = unroll(step, start, {"theta": thetas}, given, given[0], "naive", loss_limit=20.0)
        losses.append(torch.where(run.losses.isfinite(), run.losses, 20.0).clamp(max=20.0).mean(0))
    return torch.stack(losses)


def digits_grid() -> torch.Tensor:
    """147 points."""
    first, second = torch.meshgrid(torch.linspace(-7, 0, 21), torch.linspace(-2, 4, 7), indexing="ij")
    return torch.stack([first.flatten(), second.flatten()], 1).double()


def judge_digits(runs: list[dict]) -> None:
    """Put losses to the ends of the runs of A7, and add the best point of the grid.

    One training's loss scatters by 7 to 9 % near the optimum. So all points are judged on the same 40 trainings, which
    leaves about 1 %, and the point of the grid is chosen on 20 others: the best of 147 noisy numbers would flatter
    itself.
    """
    grid = digits_grid()
    best = grid[digits_losses(grid, range(-20, 0)).mean(0).argmin()].tolist()
    mine = [run for run in runs if run["problem"] == "a7" and run["estimator"] != "grid"]
    mine.append({"problem": "a7", "estimator": "grid", "seed": 0, "theta": best})
    losses = digits_losses(torch.tensor([run["theta"] for run in mine], dtype=torch.float64), range(-140, -100))
    means, errors = losses.mean(0), losses.std(0) / len(losses) ** 0.5
    for run, mean, error in zip(mine, means.tolist(), errors.tolist(), strict=True):
        run["loss"] = mean
        print(f"a7 {run['estimator']:10} seed {run['seed']}: {mean:.4f}, standard error {error:.4f}, at {run['theta']}")
    runs[:] = [run for run in runs if run["problem"] != "a7"] + mine


PROBLEMS = {
    "a1": (influence_balancing, ("truncated", "es", "pes", "es_single")),
    "a2": (toy_regression, ("truncated", "es", "pes", "es_single")),
    "a7": (digits, ("es", "pes", "es_single")),
}


def main() -> None:
    """Run what the command line asks for, print and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="+", choices=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--estimators", nargs="*")
    parser.add_argument("--results", type=Path, help="JSON file to add the runs to")
    parser.add_argument("--figures", type=Path, help="folder to write the figures of --results to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict] = []
    known = json.loads(arguments.results.read_text()) if arguments.results and arguments.results.exists() else []
    for name in arguments.problems:
        train, estimators = PROBLEMS[name]
        for estimator in arguments.estimators or estimators:
            # Exact ones give the same numbers for every seed.
            for seed in range(1 if estimator == "truncated" else arguments.seeds):
                began = time.process_time()
                curve, end = train(estimator, seed)
                seconds = time.process_time() - began
                runs.append({"problem": name, "estimator": estimator, "seed": seed, "curve": curve, **end})
                print(f"{name} {estimator:10} seed {seed}: {end}  {seconds:.1f} s", flush=True)
                if arguments.results:  # after each run, since they take minutes
                    arguments.results.write_text(json.dumps(known + runs))
    runs = known + runs
    if "a7" in arguments.problems:
        judge_digits(runs)
    if arguments.results:
        arguments.results.write_text(json.dumps(runs))
    if arguments.figures:
        from anchor_figures import draw

        draw(runs, arguments.figures)


if __name__ == "__main__":
    main()
