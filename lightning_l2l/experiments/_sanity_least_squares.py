"""Claims on least squares, section 4 of arXiv 2006.16495: when a step size needs held-out data.

The paper's setting has dimension 1000; here it is 200 with the same ratios of samples to dimension, on which the
numbers depend. Expected ranges are those that the full setting gave, in this package and in the paper's own code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_l2l.experiments._claim import Claim
from lightning_l2l.tasks import LeastSquares

_DIMENSION, _TASKS, _TESTS = 200, 60, 60


def claims() -> Iterator[Claim]:
    """All claims of this file."""
    grid = torch.logspace(-4, 0, 33, dtype=torch.float64)
    half = LeastSquares.sample(_TASKS, _DIMENSION, _DIMENSION // 2, 1.0, seed=0)
    split = half.split(validation_fraction=0.5)
    by_train = half.best_step_size(40, grid=grid, meta_data="train").best
    by_validation = split.best_step_size(40, grid=grid, meta_data="val").best
    yield Claim("train-by-train step size, n = d/2, 40 steps", by_train, 0.2, up_to=0.45)
    yield Claim("train-by-validation step size there", by_validation, 0.002, up_to=0.008)
    horizons = (10, 20, 40, 80, 160)
    products = [steps * split.best_step_size(steps, grid=grid, meta_data="val").best for steps in horizons]
    yield Claim(
        "train-by-validation step size times steps, 10 to 160 steps: largest over smallest",
        max(products) / min(products),
        1.0,
        up_to=1.4,
    )
    ratio, errors = _compare(_DIMENSION // 2, by_train, by_validation)
    yield Claim("test RMSE, tuned on training over tuned on held-out data, n = d/2", ratio, 1.10, up_to=1.22)
    yield Claim("population error of train-by-train, n = d/2", errors[0], 1.35, up_to=1.6)
    yield Claim("population error of train-by-validation, n = d/2", errors[1], 0.75, up_to=0.92)
    few, as_many, many = (_ratio(samples) for samples in (_DIMENSION // 10, _DIMENSION, 4 * _DIMENSION))
    yield Claim(
        "the same ratio at n = d: the gap is widest there, not at the fewest samples", as_many, 1.25, up_to=1.45
    )
    yield Claim("the same ratio at n = d/10", few, 0.98, up_to=1.05)
    yield Claim("the same ratio at n = 4d", many, 1.0, up_to=1.06)
    diverged = half.meta_gradient(1.0, 40, "naive", meta_data="train")
    yield Claim("step size 1: tasks that are reported as truncated, of 60", int(diverged.truncated.sum()), _TASKS)
    yield Claim("and whose gradient is NaN, not a silent zero", int(diverged.gradient.isnan().sum()), _TASKS)
    yield Claim("their loss, (40^2 + 1 + 1)/2 in the mean", float(diverged.value.mean()), 700, up_to=900)


def _compare(samples: int, by_train: float, by_validation: float) -> tuple[float, list[float]]:
    """New tasks, all samples to train on, as many fresh ones to judge: ratio of RMSE, and population errors."""
    trials = LeastSquares.sample(_TESTS, _DIMENSION, 2 * samples, 1.0, seed=1, validation_samples=samples)
    path = trials.trajectory(torch.tensor([by_train, by_validation], dtype=torch.float64), 40)
    rmse = path.validation_rmse[..., -1].mean(0)
    return float(rmse[0] / rmse[1]), path.population_error[..., -1].mean(0).tolist()


def _ratio(samples: int) -> float:
    grid = torch.logspace(-4, 0, 33, dtype=torch.float64)
    tasks = LeastSquares.sample(_TASKS, _DIMENSION, samples, 1.0, seed=2)
    by_train = tasks.best_step_size(40, grid=grid, meta_data="train").best
    by_validation = tasks.split(validation_fraction=0.5).best_step_size(40, grid=grid, meta_data="val").best
    return _compare(samples, by_train, by_validation)[0]
