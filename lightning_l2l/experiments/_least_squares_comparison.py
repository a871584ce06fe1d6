"""One setting of the least-squares experiment: tune both step sizes, try them on new tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_l2l.tasks._least_squares_results import (
    LeastSquaresMetaGradient,
    LeastSquaresTrajectory,
    StepSizeCurve,
)
from lightning_l2l.tasks.least_squares import LeastSquares

# Numbers in one portion of tasks, 64 MiB in float32: bounds the memory whatever the number of tasks.
_PORTION = 2**24


@dataclass(frozen=True)
class Comparison:
    """One setting: both step sizes and what training new tasks with them gives.

    RMSE are means over the test tasks, with the smallest and largest; labels have noise, so no predictor is
    below ``noise`` in the mean.

    Attributes:
        samples: n, all of which train-by-train uses; train-by-validation splits them.
        noise: sigma.
        steps: t.
        step_size_train: Best step size on the grid, train-by-train.
        step_size_validation: Best step size on the grid, train-by-validation.
        step_size_oracle: Best for the population error of the train-by-train runs; not known in practice.
        train_rmse_train: Final RMSE on the training samples of the test tasks, step size from train-by-train.
        train_rmse_validation: The same, step size from train-by-validation.
        test_rmse_train: Final RMSE on fresh samples, step size from train-by-train.
        test_rmse_train_min: Its least value over the test tasks.
        test_rmse_train_max: Its largest.
        test_rmse_validation: Final RMSE on fresh samples, step size from train-by-validation.
        test_rmse_validation_min: Its least value over the test tasks.
        test_rmse_validation_max: Its largest.
        test_rmse_zero: ``sqrt(1 + noise^2)``, the RMSE of always predicting zero.
        ratio: ``test_rmse_train / test_rmse_validation``.
        population_error_train: ``|w_t - w*|^2`` with the step size from train-by-train, mean over the test
            tasks.
        population_error_validation: The same, step size from train-by-validation; 1 is as bad as predicting
            zero.
    """

    samples: int
    noise: float
    steps: int
    step_size_train: float
    step_size_validation: float
    step_size_oracle: float
    train_rmse_train: float
    train_rmse_validation: float
    test_rmse_train: float
    test_rmse_train_min: float
    test_rmse_train_max: float
    test_rmse_validation: float
    test_rmse_validation_min: float
    test_rmse_validation_max: float
    test_rmse_zero: float
    ratio: float
    population_error_train: float
    population_error_validation: float


@dataclass(frozen=True)
class Outcome:
    """Everything about one setting; ``trajectory`` is ``[tests, 2, steps + 1]``, train-by-train first."""

    comparison: Comparison
    by_train: StepSizeCurve
    by_validation: StepSizeCurve
    trajectory: LeastSquaresTrajectory


def portions(tasks: int, samples: int, dimension: int) -> list[int]:
    """How many tasks are drawn at a time."""
    size = max(1, _PORTION // (samples * dimension))
    return [min(size, tasks - start) for start in range(0, tasks, size)]


def measure(
    samples: int,
    noise: float,
    lengths: list[int],
    dimension: int,
    tasks: int,
    tests: int,
    validation_fraction: float,
    grid: Tensor,
    seed: int,
    advance: Callable[[], object],
) -> list[Outcome]:
    """All run lengths on the same tasks, a portion of the tasks at a time.

    Args:
        samples: n.
        noise: sigma.
        lengths: The run lengths t.
        dimension: d.
        tasks: Tasks to tune on.
        tests: New tasks to try the step sizes on.
        validation_fraction: Share held out by train-by-validation.
        grid: Step sizes, ``[g]``.
        seed: Seed of the data.
        advance: Called after each portion.

    Returns:
        One outcome for each length.
    """
    generator = torch.Generator().manual_seed(seed)
    trials = LeastSquares.sample(
        tests, dimension, 2 * samples, noise, seed=generator, validation_samples=samples, truncation_radius=math.inf
    )
    by_train: dict[int, list[LeastSquaresMetaGradient]] = {steps: [] for steps in lengths}
    by_validation: dict[int, list[LeastSquaresMetaGradient]] = {steps: [] for steps in lengths}
    for portion in portions(tasks, samples, dimension):
        whole = LeastSquares.sample(portion, dimension, samples, noise, seed=generator)
        halves = whole.split(validation_fraction=validation_fraction)
        for steps in lengths:
            by_train[steps].append(whole.meta_gradient(grid, steps, "naive", meta_data="train"))
            by_validation[steps].append(halves.meta_gradient(grid, steps, "naive", meta_data="val"))
        advance()
    outcomes = []
    for steps in lengths:
        train = StepSizeCurve.from_results(grid, by_train[steps])
        validation = StepSizeCurve.from_results(grid, by_validation[steps])
        trajectory = trials.trajectory(torch.tensor([train.best, validation.best]), steps)
        comparison = _compare(samples, noise, steps, train, validation, trajectory)
        outcomes.append(Outcome(comparison, train, validation, trajectory))
    return outcomes


def _compare(
    samples: int,
    noise: float,
    steps: int,
    train: StepSizeCurve,
    validation: StepSizeCurve,
    trajectory: LeastSquaresTrajectory,
) -> Comparison:
    fitted, test = trajectory.train_rmse[..., -1], trajectory.validation_rmse[..., -1]  # [tests, 2]
    error = trajectory.population_error[..., -1].mean(0)
    mean = test.mean(0)
    return Comparison(
        samples=samples,
        noise=noise,
        steps=steps,
        step_size_train=train.best,
        step_size_validation=validation.best,
        step_size_oracle=float(train.step_sizes[train.population_error.argmin()]),
        train_rmse_train=float(fitted[:, 0].mean()),
        train_rmse_validation=float(fitted[:, 1].mean()),
        test_rmse_train=float(mean[0]),
        test_rmse_train_min=float(test[:, 0].min()),
        test_rmse_train_max=float(test[:, 0].max()),
        test_rmse_validation=float(mean[1]),
        test_rmse_validation_min=float(test[:, 1].min()),
        test_rmse_validation_max=float(test[:, 1].max()),
        test_rmse_zero=math.sqrt(1 + noise**2),
        ratio=float(mean[0] / mean[1]),
        population_error_train=float(error[0]),
        population_error_validation=float(error[1]),
    )
