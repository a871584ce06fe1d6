"""Least-squares tasks: the closed form, the unroll and independent oracles agree, and nothing fails silently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_l2l.exact.meta_gradient import meta_gradient
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned.step_size import LearnedStepSize
from lightning_l2l.tasks.least_squares import LeastSquares

STEPS = 40


def _reference_task(dtype: torch.dtype, meta_data: str) -> tuple[LeastSquares, dict[str, Any]]:
    """The task of the reference fixture (d = 1000, n = 500, sigma = 1) and its numbers.

    Drawn again from numpy's legacy generator, whose stream is frozen: the stored targets prove that it is the same.
    """
    stored = np.load(Path(__file__).parent / "data" / "least_squares_task.npz")
    random = np.random.RandomState(123)
    solution, inputs, noise = (random.normal(size=size) for size in (1000, (500, 1000), 500))
    solution /= np.linalg.norm(solution)
    targets = (inputs @ solution + noise).astype(np.float32)
    assert np.abs(targets - stored["targets"]).max() < 1e-6
    rows = np.arange(500)
    if meta_data == "val":
        rows = np.concatenate([stored["training_rows"], stored["validation_rows"]]).astype(int)
    task = LeastSquares(
        *(torch.tensor(array.astype(np.float32), dtype=dtype)[None] for array in (inputs[rows], targets[rows])),
        torch.tensor(solution, dtype=dtype)[None],
        validation_samples=250 if meta_data == "val" else 0,
    )
    prefix = {"train": "train_", "val": "validation_"}[meta_data]
    numbers = {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}
    return task, {"step_sizes": torch.tensor(stored["step_sizes"]), **numbers}


# float64: rounding of 40 steps on the plateau, where the gradient is 1e6 times smaller than its parts.
# float32: the same amplification of 6e-8, hence the absolute tolerance of the gradient.
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-12), (torch.float32, 1e-5, 5e-5)])
@pytest.mark.parametrize("meta_data", ["train", "val"])
@pytest.mark.parametrize("method", ["closed_form", "unroll"])
def test_reference_losses_gradients_and_truncated_steps_item_13(
    method: Any, meta_data: Any, dtype: torch.dtype, rtol: float, atol: float
) -> None:
    task, expected = _reference_task(dtype, meta_data)
    found = task.meta_gradient(expected["step_sizes"], STEPS, "naive", meta_data=meta_data, method=method)
    assert found.truncated_step[0].tolist() == expected["truncated_step"].tolist()
    assert found.truncated_step[0, -2:].tolist() == ([8, 4] if meta_data == "train" else [5, 3])
    alive = ~found.truncated[0]
    for name in ("loss", "gradient", "population_error"):
        numbers = found.value if name == "loss" else getattr(found, name)
        truth = torch.tensor(expected[name])[alive]
        torch.testing.assert_close(numbers[0][alive], truth, rtol=rtol, atol=atol)
    # "truncated" is said, the gradient is not a number, the loss is that of a point at 40 sigma: (1600 + 2) / 2 = 801.
    assert found.gradient[0, ~alive].isnan().all()
    # One task: 250 or 500 terms of relative spread sqrt(2), so 3 standard deviations are 19 % at most.
    assert (found.value[0, ~alive] / 801 - 1).abs().max() < 3 * math.sqrt(2 / 250)


@pytest.mark.parametrize("start", [1e-6, 1e-3, 0.1, 0.178])
def test_search_finds_the_reference_optimum_across_the_plateau_item_14(start: float) -> None:
    task, expected = _reference_task(torch.float64, "val")
    # The plateau: below 1e-3 at 0.1, with a spurious sign change before 0.178, where the slope is negative again.
    slopes = dict(zip(expected["step_sizes"].tolist(), expected["gradient"].tolist(), strict=True))
    assert 0 < slopes[0.1] < 1e-3
    found = task.optimal_step_size(STEPS, start=start)
    assert found.converged
    assert len(found.history) <= 40
    # The reference's gradient is -2.3 at 0.0056 and 1.1 at 0.01.
    assert 0.005624 < found.step_size < 0.01
    at_optimum = task.meta_gradient(found.step_size * torch.tensor([1 - 1e-5, 1 + 1e-5]).double(), STEPS).gradient
    assert at_optimum[0, 0] < 0 < at_optimum[0, 1]


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("meta_data", ["train", "val"])
def test_truncated_loss_is_801_noise_squared_in_the_mean(noise: float, meta_data: Any) -> None:
    tasks = LeastSquares.sample(400, 40, 40, noise, validation_fraction=0.5)
    found = tasks.meta_gradient(2.0, STEPS, "naive", meta_data=meta_data)
    assert found.truncated.all()
    # (1600 sigma^2 + 1 + sigma^2) / 2; a mean of 8000 squared Gaussians: 1.6 % standard error.
    expected = (1600 * noise**2 + 1 + noise**2) / 2
    assert found.value.mean().item() == pytest.approx(expected, rel=0.05)
    log = tasks.meta_gradient(2.0, STEPS, "log", meta_data=meta_data)
    torch.testing.assert_close(log.value, found.value.log() / STEPS)
    assert log.gradient.isnan().all()


@pytest.mark.parametrize("objective", ["naive", "log"])
@pytest.mark.parametrize("meta_data", ["train", "val"])
@pytest.mark.parametrize(("samples", "dimension"), [(20, 30), (60, 15), (30, 15), (2, 1), (3, 50)])
def test_closed_form_equals_unroll(objective: Any, meta_data: Any, samples: int, dimension: int) -> None:
    # Training on half: (30, 15) is square, the hard case for an eigendecomposition of the smaller side.
    tasks = LeastSquares.sample(5, dimension, samples, validation_fraction=0.5, dtype=torch.float64)
    grid = torch.cat([torch.zeros(1), torch.logspace(-6, 0.7, 12)]).double()
    for steps in (1, 2, 7, 40):
        closed = tasks.meta_gradient(grid, steps, objective, meta_data=meta_data, method="closed_form")
        stepped = tasks.meta_gradient(grid, steps, objective, meta_data=meta_data, method="unroll")
        assert torch.equal(closed.truncated_step, stepped.truncated_step)
        # Step by step, residuals are known to 1e-16 of the labels; the comparison stops where they are 1e-6 of them.
        loss = tasks.meta_gradient(grid, steps, "naive", meta_data=meta_data).value
        known = ~stepped.truncated & (loss > 1e-12 * loss[:, :1])
        assert known.sum() > 30
        for name in ("value", "gradient", "population_error"):
            torch.testing.assert_close(
                getattr(closed, name)[known], getattr(stepped, name)[known], rtol=1e-8, atol=1e-10
            )


@pytest.mark.parametrize("objective", ["naive", "log"])
@pytest.mark.parametrize("meta_data", ["train", "val"])
@pytest.mark.parametrize("method", ["closed_form", "unroll", "sgd"])
def test_gradient_equals_central_differences(objective: Any, meta_data: Any, method: str) -> None:
    tasks = LeastSquares.sample(4, 12, 16, validation_samples=8, dtype=torch.float64)
    how: dict[str, Any] = {"method": method}
    if method == "sgd":
        how = {"order": tasks.random_order(9, 2)}
    for step_size in (1e-4, 0.03, 0.2):
        width = 1e-5 * step_size

        def value(eta: float) -> Tensor:
            return tasks.meta_gradient(eta, 9, objective, meta_data=meta_data, **how).value

        found = tasks.meta_gradient(step_size, 9, objective, meta_data=meta_data, **how)
        assert not found.truncated.any()
        slope = (value(step_size + width) - value(step_size - width)) / (2 * width)
        # Rounding of the value, 1e-16, over the width of 1e-9 at least.
        torch.testing.assert_close(found.gradient, slope, rtol=1e-6, atol=1e-6)


def _autograd_unroll(task: LeastSquares, step_size: float, batches: list[Any], objective: str, split: Any) -> Any:
    """An independent oracle: autograd through the task's own ``loss``."""
    eta = torch.tensor(step_size, dtype=torch.float64, requires_grad=True)
    weight = task.initial_parameters()["weight"].requires_grad_()
    for batch in batches:
        (gradient,) = torch.autograd.grad(task.loss({"weight": weight}, batch), weight, create_graph=True)
        weight = weight - eta * gradient
    value = task.loss({"weight": weight}, task.sample_batch(split))
    value = value.log() / len(batches) if objective == "log" else value
    return value, torch.autograd.grad(value, eta)[0]


@pytest.mark.parametrize("objective", ["naive", "log"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("sgd", [False, True])
def test_one_task_as_an_ordinary_loss_gives_the_same(objective: Any, split: Any, sgd: bool) -> None:
    tasks = LeastSquares.sample(3, 10, 12, validation_samples=5, dtype=torch.float64)
    order = tasks.random_order(8, 2) if sgd else None
    found = tasks.meta_gradient(0.07, 8, objective, meta_data=split, order=order)
    for index in range(3):
        inputs, targets = tasks[index].sample_batch("train")
        batches = [(inputs, targets)] * 8
        if order is not None:
            batches = [(inputs[rows], targets[rows]) for rows in order[index]]
        value, gradient = _autograd_unroll(tasks[index], 0.07, batches, objective, split)
        torch.testing.assert_close(found.value[index], value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gradient[index], gradient, rtol=1e-11, atol=0)


@pytest.mark.parametrize("objective", ["naive", "log"])
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_general_engine_runs_on_one_task_and_agrees(
    objective: Any, estimator: Any, dtype: torch.dtype, rtol: float
) -> None:
    tasks = LeastSquares.sample(2, 30, 20, validation_fraction=0.5, dtype=dtype)
    task = tasks[1]
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.05))
    found = meta_gradient(
        task,
        task.initial_parameters(),
        learned,
        [task.sample_batch("train")] * 15,
        task.sample_batch("val"),
        objective=objective,
        estimator=estimator,
    )
    exact = task.meta_gradient(0.05, 15, objective)
    assert found.value == pytest.approx(exact.value.item(), rel=rtol, abs=1e-7 if dtype == torch.float32 else 1e-13)
    # The engine learns the logarithm of the step size. Rounding: 15 steps, and 0.05 itself in float32.
    assert found.gradients["learning_rate"].item() == pytest.approx(0.05 * exact.gradient.item(), rel=10 * rtol)


@pytest.mark.parametrize("method", ["closed_form", "unroll"])
def test_batched_equals_looped(method: Any) -> None:
    tasks = LeastSquares.sample(6, 20, 16, validation_fraction=0.5, dtype=torch.float64)
    grid = torch.logspace(-4, 0.5, 7, dtype=torch.float64)
    together = tasks.meta_gradient(grid, 12, method=method)
    assert together.truncated.any()
    assert not together.truncated.all()
    for index, task in enumerate(tasks):
        for column, step_size in enumerate(grid.tolist()):
            alone = task.meta_gradient(step_size, 12, method=method)
            for name in ("value", "gradient", "population_error", "truncated_step"):
                torch.testing.assert_close(
                    getattr(alone, name)[0], getattr(together, name)[index, column], rtol=1e-11, atol=0, equal_nan=True
                )


def test_trajectory_ends_where_the_meta_objective_is_taken() -> None:
    tasks = LeastSquares.sample(3, 20, 16, validation_fraction=0.25, dtype=torch.float64)
    grid = torch.tensor([0.01, 0.1, 5.0], dtype=torch.float64)
    path = tasks.trajectory(grid, 10)
    assert path.train_rmse.shape == path.population_error.shape == (3, 3, 11)
    for meta_data, rmse in (("train", path.train_rmse), ("val", path.validation_rmse)):
        end = tasks.meta_gradient(grid, 10, "naive", meta_data=meta_data)  # type: ignore[arg-type]
        assert torch.equal(end.truncated_step, path.truncated_step)
        torch.testing.assert_close(rmse[:, :2, -1].square() / 2, end.value[:, :2])
        torch.testing.assert_close(path.population_error[:, :2, -1], end.population_error[:, :2])
    step = int(path.truncated_step[0, 2])
    assert step > 0
    assert path.train_rmse[0, 2, :step].isfinite().all()
    assert path.train_rmse[0, 2, step:].isnan().all()
    assert tasks.split().trajectory(0.1, 4).validation_rmse.isnan().all()


def test_truncation_inside_the_run_is_seen_though_the_end_would_be_inside() -> None:
    # One dimension, one sample, x = 1, y = 1: w jumps to eta and comes back, 1 - (1 - eta)^t.
    task = LeastSquares(*(torch.ones(shape, dtype=torch.float64) for shape in ((1, 1, 1), (1, 1), (1, 1))),
                        truncation_radius=1.5)  # fmt: skip
    for method in ("closed_form", "unroll"):
        found = task.meta_gradient(torch.tensor([1.4, 1.9]), 2, meta_data="train", method=method)  # type: ignore[arg-type]
        assert found.truncated_step.tolist() == [[-1, 1]], method


@pytest.mark.parametrize("method", ["closed_form", "unroll"])
def test_divergence_beyond_the_number_range_is_reported_without_a_radius(method: Any) -> None:
    tasks = LeastSquares.sample(3, 10, 8, validation_fraction=0.5, truncation_radius=math.inf)
    found = tasks.meta_gradient(torch.tensor([0.01, 50.0]), 200, method=method)
    assert (found.truncated_step[:, 0] == -1).all()
    assert (found.truncated_step[:, 1] > 0).all()
    assert found.gradient[:, 1].isnan().all()
    assert found.value.isfinite().all()


def test_log_gradient_survives_a_loss_that_underflows() -> None:
    tasks = LeastSquares.sample(2, 60, 10)
    found = tasks.meta_gradient(0.1, 10_000, "log", meta_data="train")
    # Far below the smallest float64: log L = t * value.
    assert (found.value * 10_000 < -800).all()
    # Only the slowest direction is left: -2 s / (1 - eta s), s the smallest eigenvalue of XX'/n.
    x = tasks.inputs.double()
    s = torch.linalg.eigvalsh(x @ x.mT / 10)[:, 0]
    torch.testing.assert_close(found.gradient, -2 * s / (1 - 0.1 * s), rtol=1e-5, atol=0)
    stepped = tasks.meta_gradient(0.1, 1000, "log", meta_data="train", method="unroll")
    assert stepped.unresolved.all()
    assert stepped.gradient.isnan().all()


def test_data_follow_the_model() -> None:
    tasks = LeastSquares.sample(50, 30, 200, noise=2.0, seed=3, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.vector_norm(tasks.solution, dim=-1), torch.ones(50).double())
    residual = tasks.targets - (tasks.inputs @ tasks.solution[..., None])[..., 0]
    assert residual.std().item() == pytest.approx(2.0, rel=0.03)  # 10 000 numbers: 0.7 % standard error
    assert tasks.inputs.var().item() == pytest.approx(1.0, rel=0.01)
    again = LeastSquares.sample(50, 30, 200, noise=2.0, seed=3, dtype=torch.float64)
    assert torch.equal(tasks.targets, again.targets)
    assert not torch.equal(tasks.targets, LeastSquares.sample(50, 30, 200, 2.0, seed=4, dtype=torch.float64).targets)
    x, y = tasks[0].sample_batch("test", torch.Generator().manual_seed(0))
    assert x.shape == (200, 30)
    assert (y - x @ tasks[0].solution[0]).std().item() == pytest.approx(2.0, rel=0.2)


_TASKS = LeastSquares.sample(2, 4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LeastSquares.sample(0, 4, 6), "tasks=0"),
        (lambda: LeastSquares.sample(2, 0, 6), "dimension=0"),
        (lambda: LeastSquares.sample(2, 4, 0), "samples=0"),
        (lambda: LeastSquares.sample(2, 4, 6, -1.0), "noise=-1.0"),
        (lambda: LeastSquares.sample(2, 4, 6, math.nan), "noise=nan"),
        (lambda: LeastSquares.sample(2, 4, 6, 0.0), "truncation radius"),
        (lambda: LeastSquares.sample(2, 4, 6, truncation_radius=math.nan), "truncation radius"),
        (lambda: LeastSquares.sample(2, 4, 6, validation_fraction=0.1), "validation side empty"),
        (lambda: LeastSquares.sample(2, 4, 6, validation_fraction=1.0), "training side empty"),
        (lambda: LeastSquares.sample(2, 4, 6, validation_samples=6), "training side empty"),
        (lambda: _TASKS.split(validation_fraction=0.5, validation_samples=3), "not both"),
        (lambda: _TASKS.meta_gradient(0.1, 5), "No samples are held out"),
        (lambda: _TASKS.meta_gradient(0.1, 0, meta_data="train"), "steps=0"),
        (lambda: _TASKS.meta_gradient(-0.1, 5, meta_data="train"), "negative or not finite"),
        (lambda: _TASKS.meta_gradient(math.nan, 5, meta_data="train"), "negative or not finite"),
        (lambda: _TASKS.meta_gradient(math.inf, 5, meta_data="train"), "negative or not finite"),
        (lambda: _TASKS.meta_gradient(torch.ones(2, 2), 5, meta_data="train"), "shape"),
        (lambda: _TASKS.meta_gradient(0.1, 5, "loud", meta_data="train"), "objective='loud'"),
        (lambda: _TASKS.meta_gradient(0.1, 5, meta_data="test"), "not a split"),
        (lambda: _TASKS.meta_gradient(0.1, 5, meta_data="train", method="magic"), "method='magic'"),
        (lambda: _TASKS.meta_gradient(0.1, 5, meta_data="train", order=torch.full((5, 1), 6)), "names samples 6"),
        (lambda: _TASKS.meta_gradient(0.1, 5, meta_data="train", order=torch.zeros(4, 1).long()), "has shape"),
        (lambda: _TASKS.meta_gradient(0.1, 5, meta_data="train", order=torch.zeros(5, 1)), "int64"),
        (
            lambda: _TASKS.meta_gradient(0.1, 5, meta_data="train", method="closed_form", order=_TASKS.random_order(5)),
            "SGD has no closed form",
        ),
        (lambda: _TASKS.best_step_size(5, grid=torch.tensor(0.1), meta_data="train"), "must be a vector"),
        (lambda: _TASKS.initial_parameters(), "holds 2 tasks"),
        (lambda: LeastSquares(torch.ones(2, 3, 4), torch.ones(2, 4), torch.ones(2, 4)), "do not fit"),
        (lambda: LeastSquares(torch.full((1, 3, 4), math.nan), torch.ones(1, 3), torch.ones(1, 4)), "NaN"),
        (
            lambda: LeastSquares(torch.ones(1, 3, 4), torch.ones(1, 3), torch.ones(1, 4), validation_samples=3),
            "nothing to train on",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.float16"):
        LeastSquares(torch.ones(1, 3, 4).half(), torch.ones(1, 3).half(), torch.ones(1, 4).half())


def test_search_refuses_a_sign_that_rounding_has_eaten() -> None:
    tasks = LeastSquares.sample(2, 60, 10)
    order = tasks.random_order(1500)
    with pytest.raises(FloatingPointError, match="nothing but rounding"):
        tasks.optimal_step_size(1500, start=0.01, meta_data="train", order=order)
