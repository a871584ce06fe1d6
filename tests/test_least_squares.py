"""Least squares: closed form, SGD and independent oracles agree, nothing fails silently, the paper's claims hold.

The items are those of the acceptance list for experiment 2. Population errors are compared where the paper looks at
test errors: they carry no test noise, and the RMSE on fresh labels is ``sqrt(error + sigma^2)``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_l2l import LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import LeastSquares

STEPS = 40
# The paper's 25 points; a factor of 1.78 from one to the next.
GRID = torch.logspace(-6, 0, 25, dtype=torch.float64)


def whole_batches(tasks: LeastSquares, steps: int) -> Tensor:
    """All training samples at every step: SGD that is gradient descent."""
    count = tasks.training_samples
    return torch.arange(count).expand(len(tasks), steps, count)


def reference_task(dtype: torch.dtype, meta_data: str) -> tuple[LeastSquares, dict[str, Any]]:
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
@pytest.mark.parametrize("by_steps", [False, True])
def test_losses_gradients_and_truncated_steps_are_the_references_item_13(
    by_steps: bool, meta_data: Any, dtype: torch.dtype, rtol: float, atol: float
) -> None:
    task, expected = reference_task(dtype, meta_data)
    order = whole_batches(task, STEPS) if by_steps else None
    found = task.meta_gradient(expected["step_sizes"], STEPS, "naive", meta_data=meta_data, order=order)
    assert found.truncated_step[0].tolist() == expected["truncated_step"].tolist()
    assert found.truncated_step[0, -2:].tolist() == ([8, 4] if meta_data == "train" else [5, 3])
    alive = ~found.truncated[0]
    for name, numbers in (
        ("loss", found.value),
        ("gradient", found.gradient),
        ("population_error", found.population_error),
    ):
        torch.testing.assert_close(numbers[0][alive], torch.tensor(expected[name])[alive], rtol=rtol, atol=atol)
    # "truncated" is said, the gradient is not a number, the loss is that of a point at 40 sigma: (1600 + 2) / 2 = 801.
    assert found.gradient[0, ~alive].isnan().all()
    # One task: 250 or 500 terms of relative spread sqrt(2), so 3 standard deviations are 19 % at most.
    assert (found.value[0, ~alive] / 801 - 1).abs().max() < 3 * math.sqrt(2 / 250)


@pytest.mark.parametrize("noise", [0.5, 3.0])
@pytest.mark.parametrize("meta_data", ["train", "val"])
def test_the_truncated_loss_is_801_noise_squared_in_the_mean(noise: float, meta_data: Any) -> None:
    tasks = LeastSquares.sample(400, 40, 40, noise, validation_fraction=0.5)
    found = tasks.meta_gradient(2.0, STEPS, "naive", meta_data=meta_data)
    assert found.truncated.all()
    # (1600 sigma^2 + 1 + sigma^2) / 2; a mean of 8000 squared Gaussians: 1.6 % standard error.
    assert found.value.mean().item() == pytest.approx((1600 * noise**2 + 1 + noise**2) / 2, rel=0.05)
    log = tasks.meta_gradient(2.0, STEPS, "log", meta_data=meta_data)
    torch.testing.assert_close(log.value, found.value.log() / STEPS)
    assert log.gradient.isnan().all()


@pytest.mark.parametrize("objective", ["naive", "log"])
@pytest.mark.parametrize("meta_data", ["train", "val"])
@pytest.mark.parametrize(("samples", "dimension"), [(20, 30), (60, 15), (30, 15), (2, 1), (3, 50)])
def test_the_closed_form_equals_the_steps(objective: Any, meta_data: Any, samples: int, dimension: int) -> None:
    # Training on half: (30, 15) is square, the hard case for an eigendecomposition of the smaller side.
    tasks = LeastSquares.sample(5, dimension, samples, validation_fraction=0.5, dtype=torch.float64)
    grid = torch.cat([torch.zeros(1), torch.logspace(-6, 0.7, 12)]).double()
    for steps in (1, 2, 7, 40):
        closed = tasks.meta_gradient(grid, steps, objective, meta_data=meta_data)
        order = whole_batches(tasks, steps)
        stepped = tasks.meta_gradient(grid, steps, objective, meta_data=meta_data, order=order)
        assert torch.equal(closed.truncated_step, stepped.truncated_step)
        # Step by step, residuals are known to 1e-16 of the labels; the comparison stops where they are 1e-6 of them.
        loss = tasks.meta_gradient(grid, steps, "naive", meta_data=meta_data).value
        known = ~stepped.truncated & (loss > 1e-12 * loss[:, :1])
        assert known.sum() > 30
        for name in ("value", "gradient", "population_error"):
            one, other = getattr(closed, name), getattr(stepped, name)
            torch.testing.assert_close(one[known], other[known], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("objective", ["naive", "log"])
@pytest.mark.parametrize("meta_data", ["train", "val"])
@pytest.mark.parametrize("sgd", [False, True])
def test_the_gradient_equals_central_differences(objective: Any, meta_data: Any, sgd: bool) -> None:
    tasks = LeastSquares.sample(4, 12, 16, validation_fraction=0.5, dtype=torch.float64)
    order = tasks.random_order(9, 2) if sgd else None
    for step_size in (1e-4, 0.03, 0.2):
        width = 1e-5 * step_size
        around = torch.tensor([step_size - width, step_size, step_size + width], dtype=torch.float64)
        found = tasks.meta_gradient(around, 9, objective, meta_data=meta_data, order=order)
        assert not found.truncated.any()
        slope = (found.value[:, 2] - found.value[:, 0]) / (2 * width)
        # Rounding of the value, 1e-16, over the width of 1e-9 at least.
        torch.testing.assert_close(found.gradient[:, 1], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", ["naive", "log"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("sgd", [False, True])
def test_the_general_engine_on_one_task_as_an_ordinary_loss_agrees(objective: Any, split: Any, sgd: bool) -> None:
    tasks = LeastSquares.sample(3, 10, 12, validation_fraction=0.45, dtype=torch.float64)
    order = tasks.random_order(8, 2) if sgd else None
    expected = tasks.meta_gradient(0.07, 8, objective, meta_data=split, order=order)
    for index in range(3):
        task = tasks[index]
        inputs, targets = task.sample_batch("train")
        batches = [(inputs[rows], targets[rows]) for rows in order[index]] if sgd else [(inputs, targets)] * 8
        learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.07))
        estimator, held_out = Unroll(objective=objective), task.sample_batch(split)
        found = meta_gradient(task, task.initial_parameters(), learned, batches, held_out, estimator=estimator)
        assert found.value == pytest.approx(expected.value[index].item(), rel=1e-11, abs=1e-13)
        # The engine learns the logarithm of the step size.
        assert found.gradients["learning_rate"].item() / 0.07 == pytest.approx(
            expected.gradient[index].item(), rel=1e-10
        )


@pytest.mark.parametrize("sgd", [False, True])
def test_tasks_and_step_sizes_together_equal_one_at_a_time(sgd: bool) -> None:
    tasks = LeastSquares.sample(6, 20, 16, validation_fraction=0.5, dtype=torch.float64)
    grid = torch.logspace(-4, 0.5, 7, dtype=torch.float64)
    order = tasks.random_order(12, 3) if sgd else None
    together = tasks.meta_gradient(grid, 12, order=order)
    assert together.truncated.any() and not together.truncated.all()
    for index in range(len(tasks)):
        for column, step_size in enumerate(grid.tolist()):
            alone = tasks[index].meta_gradient(step_size, 12, order=order[index : index + 1] if sgd else None)
            for name in ("value", "gradient", "population_error", "truncated_step"):
                one, other = getattr(alone, name)[0], getattr(together, name)[index, column]
                torch.testing.assert_close(one, other, rtol=1e-11, atol=0, equal_nan=True)


def test_truncation_inside_the_run_is_seen_though_the_end_would_be_inside() -> None:
    # One dimension, one sample, x = 1, y = 1: w jumps to eta and comes back, 1 - (1 - eta)^t.
    ones = (torch.ones(shape, dtype=torch.float64) for shape in ((1, 1, 1), (1, 1), (1, 1)))
    task = LeastSquares(*ones, truncation_radius=1.5)
    for order in (None, whole_batches(task, 2)):
        found = task.meta_gradient(torch.tensor([1.4, 1.9]), 2, meta_data="train", order=order)
        assert found.truncated_step.tolist() == [[-1, 1]]


@pytest.mark.parametrize("sgd", [False, True])
def test_divergence_beyond_the_number_range_is_reported_without_a_radius(sgd: bool) -> None:
    tasks = LeastSquares.sample(3, 10, 8, validation_fraction=0.5, truncation_radius=math.inf)
    order = tasks.random_order(200) if sgd else None
    found = tasks.meta_gradient(torch.tensor([0.01, 50.0]), 200, order=order)
    assert (found.truncated_step[:, 0] == -1).all() and (found.truncated_step[:, 1] > 0).all()
    assert found.gradient[:, 1].isnan().all() and found.value.isfinite().all()


def test_the_log_gradient_survives_a_loss_that_underflows_and_rounding_is_reported() -> None:
    tasks = LeastSquares.sample(2, 60, 10)
    found = tasks.meta_gradient(0.1, 10_000, "log", meta_data="train")
    # Far below the smallest float64: log L = t * value.
    assert (found.value * 10_000 < -800).all()
    # Only the slowest direction is left: -2 s / (1 - eta s), s the smallest eigenvalue of XX'/n.
    x = tasks.inputs.double()
    s = torch.linalg.eigvalsh(x @ x.mT / 10)[:, 0]
    torch.testing.assert_close(found.gradient, -2 * s / (1 - 0.1 * s), rtol=1e-5, atol=0)
    stepped = tasks.meta_gradient(0.1, 1000, "log", meta_data="train", order=whole_batches(tasks, 1000))
    assert stepped.gradient.isnan().all() and not stepped.truncated.any()


def test_the_data_follow_the_model() -> None:
    tasks = LeastSquares.sample(50, 30, 200, noise=2.0, seed=3, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.vector_norm(tasks.solution, dim=-1), torch.ones(50).double())
    residual = tasks.targets - (tasks.inputs @ tasks.solution[..., None])[..., 0]
    assert residual.std().item() == pytest.approx(2.0, rel=0.03)  # 10 000 numbers: 0.7 % standard error
    assert tasks.inputs.var().item() == pytest.approx(1.0, rel=0.01)
    again, other = (LeastSquares.sample(50, 30, 200, noise=2.0, seed=seed, dtype=torch.float64) for seed in (3, 4))
    assert torch.equal(tasks.targets, again.targets) and not torch.equal(tasks.targets, other.targets)
    x, y = tasks[0].sample_batch("test", torch.Generator().manual_seed(0))
    assert x.shape == (200, 30)
    assert (y - x @ tasks[0].solution[0]).std().item() == pytest.approx(2.0, rel=0.2)


TASKS = LeastSquares.sample(2, 4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LeastSquares.sample(0, 4, 6), "tasks=0"),
        (lambda: LeastSquares.sample(2, 4, 6, -1.0), "noise=-1.0"),
        (lambda: LeastSquares.sample(2, 4, 6, 0.0), "truncation radius"),
        (lambda: LeastSquares.sample(2, 4, 6, truncation_radius=math.nan), "truncation radius"),
        (lambda: LeastSquares.sample(2, 4, 6, validation_fraction=0.1), "validation side empty"),
        (lambda: LeastSquares.sample(2, 4, 6, validation_fraction=1.0), "training side empty"),
        (lambda: TASKS.meta_gradient(0.1, 5), "No samples are held out"),
        (lambda: TASKS.meta_gradient(0.1, 0, meta_data="train"), "steps=0"),
        (lambda: TASKS.meta_gradient(-0.1, 5, meta_data="train"), "step_size=-0.1"),
        (lambda: TASKS.meta_gradient(math.nan, 5, meta_data="train"), "step_size=nan"),
        (lambda: TASKS.meta_gradient(torch.ones(2, 2), 5, meta_data="train"), "step_size"),
        (lambda: TASKS.meta_gradient(0.1, 5, "loud", meta_data="train"), "objective='loud'"),
        (lambda: TASKS.meta_gradient(0.1, 5, meta_data="test"), "not a split"),
        (lambda: TASKS.meta_gradient(0.1, 5, meta_data="train", order=torch.full((2, 5, 1), 6)), "0 to 5"),
        (lambda: TASKS.meta_gradient(0.1, 5, meta_data="train", order=torch.zeros(2, 4, 1).long()), "shape"),
        (lambda: TASKS.meta_gradient(0.1, 5, meta_data="train", order=torch.zeros(2, 5, 1)), "int64"),
        (lambda: TASKS.initial_parameters(), "holds 2 tasks"),
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


def tune_and_test(tasks: int, tests: int, dimension: int, samples: int, noise: float) -> dict[str, float]:
    """Both step sizes of the paper's grid, and what training new tasks with them gives."""
    generator = torch.Generator().manual_seed(0)
    whole = LeastSquares.sample(tasks, dimension, samples, noise, seed=generator)
    new = LeastSquares.sample(tests, dimension, samples, noise, seed=generator)
    by_train = whole.best_step_size(STEPS, grid=GRID, meta_data="train")
    by_validation = whole.split(validation_fraction=0.5).best_step_size(STEPS, grid=GRID)
    found = new.meta_gradient(torch.tensor([by_train, by_validation]), STEPS, meta_data="train")
    assert not found.truncated.any()
    error = found.population_error.mean(0).tolist()
    rmse = [math.sqrt(part + noise**2) for part in error]
    return {
        "eta_train": by_train, "eta_validation": by_validation, "error_train": error[0], "error_validation": error[1],
        "rmse_train": rmse[0], "rmse_validation": rmse[1], "ratio": rmse[0] / rmse[1],
    }  # fmt: skip


def test_train_by_train_overfits_in_the_papers_setting_and_validation_does_not_item_9() -> None:
    found = tune_and_test(tasks=20, tests=20, dimension=1000, samples=500, noise=1.0)
    assert found["eta_train"] == pytest.approx(0.3162, rel=1e-3)
    # Two neighbours on the grid with meta-objectives within 1 %; which of them wins depends on the tasks drawn.
    assert any(found["eta_validation"] == pytest.approx(eta, rel=1e-3) for eta in (0.003162, 0.005623))
    assert abs(found["rmse_train"] - 1.58) < 0.05
    assert abs(found["rmse_validation"] - 1.36) < 0.06
    assert 1.10 < found["ratio"] < 1.22
    # Reference 1.44 to 1.48 and 0.81 to 0.85, each widened by two standard errors of 20 tasks (0.09, 0.015 per task).
    assert 1.40 < found["error_train"] < 1.52
    # 0.84 at the lower of the two step sizes, 0.80 at the higher.
    assert 0.79 < found["error_validation"] < 0.86


def test_the_validation_step_size_is_one_over_t_and_the_train_step_size_constant_item_10_theorem_5() -> None:
    halves = LeastSquares.sample(12, 1000, 500, validation_fraction=0.5)
    whole = halves.split(validation_fraction=0)
    fine = torch.logspace(-4, 0, 81, dtype=torch.float64)
    one_point = 10 ** (1 / 20) * 1.0001
    products, by_train, errors = [], [], []
    for steps in (10, 20, 40, 80, 160, 320):
        by_train.append(whole.best_step_size(steps, grid=fine, meta_data="train"))
        by_validation = halves.best_step_size(steps, grid=fine)
        products.append(by_validation * steps)
        errors.append(whole.meta_gradient(by_validation, steps, meta_data="train").population_error.mean().item())
    assert by_train == pytest.approx([0.3162] * 6, rel=1e-3)
    assert max(products) / min(products) < one_point
    # 0.178 for the reference's 40 tasks: within two points of the grid with 12 tasks.
    assert all(1 / one_point**2 < product / 0.178 < one_point**2 for product in products)
    assert max(errors) - min(errors) < 0.002 and 0.78 < errors[0] < 0.83


def test_the_gap_grows_with_the_noise_item_11() -> None:
    dimension, samples, ratios = 1000, 500, []
    for noise, expected in zip((0.5, 1, 2, 3, 4, 5), (1.02, 1.15, 1.29, 1.34, 1.36, 1.37), strict=True):
        found = tune_and_test(10, 10, dimension, samples, noise)
        interpolator = (1 - samples / dimension) + noise**2 * samples / (dimension - samples - 1)
        assert found["error_train"] == pytest.approx(interpolator, rel=0.05)
        assert found["error_validation"] < 1
        # The reference's test noise is 0.05 in RMSE for each of ten tests, 0.02 in the ratio.
        assert found["ratio"] == pytest.approx(expected, abs=0.04)
        ratios.append(found["ratio"])
    assert ratios == sorted(ratios)


def test_the_gap_peaks_near_n_equal_d_and_closes_only_beyond_item_12() -> None:
    """The paper's claim that the gap shrinks with more data holds for n >= d only. (d = 100 in place of 1000.)"""
    dimension, samples = 100, (10, 25, 50, 75, 100, 150, 200, 400)
    found = [tune_and_test(60, 100, dimension, n, 1.0) for n in samples]
    ratios = [row["ratio"] for row in found]
    # Test noise of the reference, as in item 11, and d = 100 instead of 1000.
    assert ratios == pytest.approx((1.007, 1.055, 1.162, 1.313, 1.347, 1.279, 1.158, 1.025), abs=0.05)
    peak = ratios.index(max(ratios))
    assert samples[peak] in (75, 100)
    assert ratios[:peak] == sorted(ratios[:peak]) and ratios[peak:] == sorted(ratios[peak:], reverse=True)
    # n = 4d: ordinary least squares, d / (n - d - 1) = 0.334; 14 % spread per task.
    assert found[-1]["error_train"] == pytest.approx(dimension / (400 - dimension - 1), rel=0.05)
    assert found[-1]["error_validation"] < found[-1]["error_train"]


@pytest.mark.slow
def test_many_samples_give_ordinary_least_squares_item_12_theorem_6() -> None:
    found = tune_and_test(6, 8, 1000, 4000, 1.0)
    assert found["eta_train"] == pytest.approx(0.5623, rel=1e-3)
    # d sigma^2 / (n - d - 1), 1.33 times Theorem 6's d sigma^2 / n; 8 tasks with a spread of 5 % each.
    assert found["error_train"] == pytest.approx(1000 / 2999, rel=0.05)


def tune_sgd(dimension: int, meta_data: Any, steps: int, grid: Tensor) -> tuple[float, float, float]:
    """Best step size, mean population error of new tasks and its standard error."""
    tasks = LeastSquares.sample(30, dimension, dimension // 2, 2.0, dtype=torch.float64)
    new = LeastSquares.sample(60, dimension, dimension // 2, 2.0, seed=1, dtype=torch.float64)
    tuned = tasks if meta_data == "train" else tasks.split(validation_fraction=0.5)
    best = tuned.best_step_size(steps, grid=grid, meta_data=meta_data, order=tuned.random_order(steps))
    tested = new.meta_gradient(best, steps, "naive", meta_data="train", order=new.random_order(steps))
    error = tested.population_error
    return best, error.mean().item(), error.std().item() / math.sqrt(len(error))


def test_the_train_step_size_of_sgd_is_one_over_d_item_15() -> None:
    for dimension, steps in ((50, 500), (100, 1000)):
        grid = torch.logspace(-0.25, 0.5, 10, dtype=torch.float64) / dimension
        best, error, standard_error = tune_sgd(dimension, "train", steps, grid)
        # Reference 1.36 to 1.65 on a grid with a factor of 1.21, widened by one point on either side.
        assert 1.36 / 1.22 < best * dimension < 1.65 * 1.22
        # Reference 4.41 to 4.63 at sigma^2 = 4.
        assert 4.41 - 2 * standard_error < error < 4.63 + 2 * standard_error
        assert standard_error < 0.3


def test_the_validation_step_size_of_sgd_is_one_over_t_item_15() -> None:
    products = []
    for steps in (500, 1000):
        grid = torch.logspace(-2.25, -0.25, 25, dtype=torch.float64) / steps
        best, error, standard_error = tune_sgd(100, "val", steps, grid)
        products.append(best * steps)
        # Reference .056 to .086 at sigma = 2, 12 points per decade, one point on either side; .91 to .93.
        assert 0.056 / 1.22 < best * steps < 0.086 * 1.22
        assert 0.91 - 2 * standard_error < error < 0.93 + 2 * standard_error
        assert standard_error < 0.02
    assert max(products) / min(products) < 1.22
