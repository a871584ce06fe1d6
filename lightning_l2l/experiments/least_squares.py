"""The paper's experiment 2: a step size tuned on training data against one tuned on held-out data, least squares."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_l2l.experiments._least_squares_comparison import Comparison, Outcome, measure, portions
from lightning_l2l.experiments._least_squares_figures import draw, require_matplotlib

Sweep = Literal["none", "samples", "noise", "steps"]

_DEFAULT_SWEEPS: dict[str, tuple[float, ...]] = {
    "samples": (100, 250, 500, 750, 1000, 1500, 2000, 4000),
    "noise": (0.5, 1, 2, 3, 4, 5),
    "steps": (10, 20, 40, 80, 160, 320),
}


def run(
    output: Path | str = "least_squares",
    *,
    dimension: int = 1000,
    samples: int = 500,
    noise: float = 1.0,
    steps: int = 40,
    tasks: int = 300,
    tests: int = 10,
    validation_fraction: float = 0.5,
    smallest_step_size: float = 1e-6,
    largest_step_size: float = 1.0,
    grid_points: int = 25,
    sweep: Sweep = "none",
    sweep_values: Sequence[float] | None = None,
    seed: int = 0,
    plots: bool = True,
    progress: bool = True,
) -> list[Comparison]:
    """Compare a step size tuned on training data with one tuned on held-out data, on noisy linear regression.

    For each setting the same tasks serve both objectives: train-by-train takes the training loss after
    ``steps`` of gradient descent on all samples, train-by-validation trains on one part and takes the loss on
    the other. The best step size of each on a logarithmic grid then trains new tasks on all samples, judged
    on as many fresh ones. Computed in closed form in float32, all tasks and step sizes at once.

    Writes to ``output``: ``summary.csv`` (one row per setting, the fields of :class:`Comparison`),
    ``meta_objectives.csv`` (means over the tasks for each step size), ``trajectories.csv`` (RMSE along the
    runs), and the figures ``trajectories.png``, ``meta_objectives.png`` and, with a sweep, ``sweep.png``.

    Args:
        output: Folder for the results; made if it is not there.
        dimension: Dimension d of the inputs.
        samples: Samples n of each task.
        noise: Standard deviation sigma of the label noise, above 1/40 (runs are truncated at a norm of 40
            sigma).
        steps: Steps t of gradient descent.
        tasks: Tasks m that a step size is tuned on.
        tests: New tasks that it is tried on.
        validation_fraction: Share of the samples that train-by-validation holds out.
        smallest_step_size: First point of the grid.
        largest_step_size: Last point of the grid.
        grid_points: Number of points of the grid, equally spaced in the logarithm.
        sweep: Repeat for several values of one setting.
        sweep_values: The values; ``None`` for those of the paper's figures.
        seed: Seed of the data; the same seed gives the same files.
        plots: Draw the figures (needs matplotlib).
        progress: Show a progress bar.

    Returns:
        One :class:`Comparison` for each setting.

    Raises:
        ValueError: A setting that makes no sense, before anything is computed.
        ImportError: ``plots`` without matplotlib.

    Source: Wang, Yuan, Wu, Ge (ICML 2021), section 5, figures 3 and 4.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> rows = run(folder, dimension=40, samples=20, tasks=10, tests=2, plots=False, progress=False)
        >>> rows[0].step_size_train > rows[0].step_size_validation
        True
    """
    grid = _grid(smallest_step_size, largest_step_size, grid_points)
    settings = _settings(samples, noise, steps, sweep, sweep_values)
    if tests < 1 or tasks < 1:
        raise ValueError(f"tasks={tasks} and tests={tests}, but both must be at least 1.")
    if plots:
        require_matplotlib()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    total = sum(len(portions(tasks, n, dimension)) for n, _, _ in settings)
    with tqdm(total=total, disable=not progress, desc="tasks, in portions", unit="portion") as bar:
        for n, sigma, lengths in settings:
            outcomes += measure(n, sigma, lengths, dimension, tasks, tests, validation_fraction, grid, seed, bar.update)
    _write(folder, outcomes)
    if plots:
        draw(folder, outcomes, sweep)
    return [outcome.comparison for outcome in outcomes]


def _grid(smallest: float, largest: float, points: int) -> Tensor:
    if not 0 < smallest < largest < math.inf or points < 2:
        raise ValueError(
            f"A grid of {points} points from {smallest} to {largest} is empty: smallest_step_size must be "
            "positive and below largest_step_size, and grid_points at least 2."
        )
    return torch.logspace(math.log10(smallest), math.log10(largest), points, dtype=torch.float64)


def _settings(
    samples: int, noise: float, steps: int, sweep: Sweep, values: Sequence[float] | None
) -> list[tuple[int, float, list[int]]]:
    """Samples, noise, and the run lengths that share those tasks."""
    if sweep not in get_args(Sweep):
        raise ValueError(f"sweep={sweep!r} is not known; choose one of {list(get_args(Sweep))}.")
    if sweep == "none":
        if values is not None:
            raise ValueError("sweep_values are given, but sweep='none'; say what they are values of.")
        return [(samples, noise, [steps])]
    chosen = _DEFAULT_SWEEPS[sweep] if values is None else tuple(values)
    if not chosen or not all(value > 0 and (sweep == "noise" or value == int(value)) for value in chosen):
        raise ValueError(f"sweep_values={list(chosen)} must be positive{'' if sweep == 'noise' else ' integers'}.")
    if sweep == "samples":
        return [(int(value), noise, [steps]) for value in chosen]
    if sweep == "noise":
        return [(samples, float(value), [steps]) for value in chosen]
    return [(samples, noise, [int(value) for value in chosen])]


def _write(folder: Path, outcomes: list[Outcome]) -> None:
    _write_rows(
        folder / "summary.csv",
        [field.name for field in fields(Comparison)],
        [list(asdict(outcome.comparison).values()) for outcome in outcomes],
    )
    curves, paths = [], []
    for outcome in outcomes:
        setting = [outcome.comparison.samples, outcome.comparison.noise, outcome.comparison.steps]
        train, validation = outcome.by_train, outcome.by_validation
        columns = (
            train.step_sizes, train.value, validation.value, train.population_error,
            validation.population_error, train.truncated, validation.truncated,
        )  # fmt: skip
        curves += [[*setting, *values] for values in zip(*(column.tolist() for column in columns), strict=True)]
        path = outcome.trajectory
        for which, name in enumerate(("train", "validation")):
            for quantity, errors in (("train", path.train_rmse), ("test", path.validation_rmse)):
                rmse = errors[:, which]  # [tests, steps + 1]
                summary = (rmse.mean(0), rmse.amin(0), rmse.amax(0))
                paths += [
                    [*setting, name, quantity, step, *values]
                    for step, values in enumerate(zip(*(row.tolist() for row in summary), strict=True))
                ]
    _write_rows(
        folder / "meta_objectives.csv",
        ["samples", "noise", "steps", "step_size", "train_by_train", "train_by_validation",
        "population_error_train",
         "population_error_validation", "truncated_train", "truncated_validation"],
        curves,
    )  # fmt: skip
    _write_rows(
        folder / "trajectories.csv",
        ["samples", "noise", "steps", "tuned_on", "judged_on", "step", "rmse_mean", "rmse_min", "rmse_max"],
        paths,
    )


def _write_rows(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
