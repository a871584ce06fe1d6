"""The quadratic against numbers with 50 digits, against back-propagation, and against itself."""

from __future__ import annotations

import csv
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_l2l.tasks import Quadratic, Task
from lightning_l2l.tasks._quadratic_objectives import Iterates, Objective

DATA = Path(__file__).parent / "data"
NAMES = ["A_seed0", "A_seed1", "A_seed2", "B_d_by_2d_seed0", "C_kappa2"]
OBJECTIVES = ["log", "naive", "naive_mean", "log_mean", "log_of_mean"]
TRUTH = dict(np.load(DATA / "quadratic_truth.npz"))


@cache
def instance(name: str, dtype: torch.dtype = torch.float64) -> Quadratic:
    hessian, point = (torch.from_numpy(TRUTH[f"{name}.{part}"]) for part in ("hessian", "initial_point"))
    return Quadratic(hessian.to(dtype), point.to(dtype))


def truth_cells(table: str):
    """Yield (instance name, steps, rows) so that all step sizes of a cell are evaluated in one call."""
    for index, name in enumerate(NAMES):
        for steps in np.unique(TRUTH[f"{table}.steps"]):
            rows = (TRUTH[f"{table}.instance"] == index) & (TRUTH[f"{table}.steps"] == steps)
            if rows.any():
                yield name, int(steps), rows


def relative_error(found: torch.Tensor, expected: np.ndarray) -> np.ndarray:
    return np.abs(found.double().numpy() - expected) / np.abs(expected)


@pytest.mark.parametrize(
    ("method", "longest"),
    [("spectral", 10_000), ("recursion", 200), pytest.param("recursion", 10_000, marks=pytest.mark.slow)],
)
def test_float64_gradient_is_exact_on_every_truth_row(method, longest):
    # 1e-10: one rounding of step_size * curvature, raised to a power of up to 2e4; measured 9e-13 and 4e-13.
    errors, objective_errors, rows_seen = [], [], 0
    for name, steps, rows in truth_cells("truth"):
        if steps > longest:
            continue
        step_size = torch.from_numpy(TRUTH["truth.step_size"][rows])
        gradient = instance(name).meta_gradient(step_size, steps, method=method)
        assert torch.isfinite(gradient).all()
        errors.append(relative_error(gradient, TRUTH["truth.log_gradient"][rows]))
        log_loss = instance(name).meta_objective(step_size, steps, method=method) * steps
        expected = TRUTH["truth.log_loss"][rows]
        objective_errors.append(np.abs(log_loss.numpy() - expected) / np.maximum(np.abs(expected), 1))
        rows_seen += len(step_size)
    assert rows_seen == (1200 if longest == 10_000 else 600)
    assert np.concatenate(errors).max() <= 1e-10
    assert np.concatenate(objective_errors).max() <= 1e-10


def test_naive_gradient_has_the_true_sign_and_size_where_no_float_can_hold_it():
    outside = 0
    for name, steps, rows in truth_cells("truth"):
        step_size = torch.from_numpy(TRUTH["truth.step_size"][rows])
        sign, log_magnitude = instance(name).signed_log_meta_gradient(step_size, steps, "naive")
        expected = TRUTH["truth.naive_log"][rows]
        assert (sign.numpy() == TRUTH["truth.naive_sign"][rows]).all()
        assert (np.abs(log_magnitude.numpy() - expected) <= 1e-10 * np.maximum(np.abs(expected), 1)).all()
        plain = instance(name).meta_gradient(step_size, steps, "naive").numpy()
        largest, smallest = math.log(np.finfo(float).max), math.log(5e-324)
        assert not np.isnan(plain).any()
        assert (np.isinf(plain) == (expected > largest)).all()
        assert ((plain == 0) == (expected < smallest)).all()
        assert (np.signbit(plain) == (sign.numpy() < 0)).all()  # also of infinities and of zeros
        outside += int(((expected > largest) | (expected < smallest)).sum())
    assert outside > 100  # the test is about these


@pytest.mark.parametrize(
    ("method", "longest"),
    [("spectral", 10_000), ("recursion", 80), pytest.param("recursion", 10_000, marks=pytest.mark.slow)],
)
def test_float32_gradient_is_as_exact_as_float32_allows(method, longest):
    errors = []
    for name, steps, rows in truth_cells("truth32"):
        if steps > longest:
            continue
        rows = rows & ~TRUTH["truth32.from_factor"]
        step_size = torch.from_numpy(TRUTH["truth32.step_size"][rows]).float()
        gradient = instance(name, torch.float32).meta_gradient(step_size, steps, method=method)
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()
        errors.append(relative_error(gradient, TRUTH["truth32.log_gradient"][rows]))
    errors = np.concatenate(errors)
    assert np.median(errors) <= 1e-7 and np.quantile(errors, 0.9) <= 1e-5 and errors.max() <= 1e-3
    if method == "spectral":  # float64 inside: nothing but the final rounding, half of 2^-23
        assert errors.max() <= 6e-8


def threshold_rows():
    with open(DATA / "backprop_thresholds.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_backprop_failures_are_predicted_within_two_steps():
    compared = 0
    for row in threshold_rows():
        failure = instance(row["instance"]).backprop_failure(
            float(row["step_size"]), getattr(torch, row["dtype"]), max_steps=20_000
        )
        for kind in ("zero_gradient", "overflow_nan", "zero_loss"):
            found = getattr(failure, kind)
            if row[kind]:
                assert found is not None and abs(found - int(row[kind])) <= 2, (row, kind, failure)
                compared += 1
            else:  # not seen within the steps that were measured
                measured = 5_000 if row["dtype"] == "float32" else 20_000
                assert found is None or found >= measured, (row, kind, failure)
    assert compared == 113


@pytest.mark.parametrize(
    ("name", "step_size", "dtype", "zero", "nan"),
    [("A_seed0", 0.1, torch.float32, 24, None), ("A_seed0", 0.1, torch.float64, 196, None),
     ("C_kappa2", 4 / 3, torch.float32, None, 41), ("C_kappa2", 4 / 3, torch.float64, None, 325)],
)  # fmt: skip
def test_backprop_failure_is_detected_when_it_happens_and_not_before(name, step_size, dtype, zero, nan):
    # C at its optimum: the loss is zero from 46 (float32) and 338 (float64) steps on, but the gradient is NaN
    # earlier, as soon as 1 / (t * loss) is infinite.
    task = instance(name)
    failure = task.backprop_failure(step_size, dtype)
    assert (failure.zero_gradient, failure.underflow_nan) == (zero, nan)
    first = failure.first
    before = task.backprop_meta_gradient(step_size, first - 1, dtype)
    at = task.backprop_meta_gradient(step_size, first, dtype)
    assert before.status == "ok"
    assert before.gradient == pytest.approx(float(task.meta_gradient(step_size, first - 1)), rel=1e-3)
    if zero:
        assert at.gradient == 0.0 and at.loss == math.inf and at.status == "overflow"
    else:
        assert not math.isfinite(at.gradient) and at.status == "underflow"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_backprop_agrees_with_the_closed_form_while_it_lives(objective):
    for name in ("A_seed0", "C_kappa2"):
        task = instance(name)
        for multiple in (0.3, 0.9, 1.2):
            eta = multiple * float(task.stability_limit)
            found = task.backprop_meta_gradient(eta, 20, torch.float64, objective)
            assert found.status == "ok"
            assert found.gradient == pytest.approx(float(task.meta_gradient(eta, 20, objective)), rel=1e-9)
    assert instance("A_seed0").backprop_meta_gradient(1.0, 20, torch.float32, objective).status == "overflow"


def test_naive_gradient_obeys_both_bounds_of_theorem_3():
    for name in NAMES:
        task = instance(name)
        largest, lam = float(task.largest_curvature), task._spectrum.eigenvalues
        c2 = task._spectrum.coefficients.square()
        for steps in (2, 10, 40):
            for fraction in torch.linspace(0.02, 0.98, 25).tolist():
                eta = fraction * 2 / largest
                bound = steps * (c2 * lam**2 * (1 - eta * lam).abs() ** (2 * steps - 1)).sum()
                assert abs(task.meta_gradient(eta, steps, "naive")) <= bound * (1 + 1e-12)
            for multiple in (1.05, 1.5, 3.0, 10.0):
                eta = multiple * 2 / largest
                norm2 = float(c2.sum())  # the theorem has |w_0| = 1
                bound = steps * largest**2 * (float(c2[-1]) * (eta * largest - 1) ** (2 * steps - 1) - norm2)
                assert float(task.meta_gradient(eta, steps, "naive")) >= bound


def test_log_gradient_is_bounded_by_curvatures_for_every_step_size():
    for name in NAMES:
        task = instance(name)
        largest, smallest = float(task.largest_curvature), float(task.smallest_curvature)
        bound = 2 * largest * (largest + smallest) / (largest - smallest)
        limit = 2 / largest
        grid = torch.cat(
            [torch.logspace(-6, 3, 2001).double() * limit, torch.linspace(0.8, 1.2, 4001).double() * limit]
        )
        for steps in (10, 80, 1000):
            assert task.meta_gradient(grid, steps).abs().max() <= 1.05 * bound
        assert (task.meta_gradient(grid, 80).sign().diff() != 0).sum() >= 1


def test_log_gradient_changes_sign_exactly_once():
    for name in NAMES:
        task = instance(name)
        grid = torch.logspace(-6, 2, 4001, dtype=torch.float64) * task.stability_limit
        for steps in (10, 80, 1000, 10_000):
            assert (task.meta_gradient(grid, steps).sign().diff() != 0).sum() == 1


def test_optimal_step_size_matches_sixty_digits():
    for index, steps, expected in zip(
        TRUTH["optimum.instance"], TRUTH["optimum.steps"], TRUTH["optimum.step_size"], strict=True
    ):
        found = float(instance(NAMES[index]).optimal_step_size(int(steps)))
        assert abs(found / expected - 1) <= 1e-12  # required 1e-6; bisection to the last bits gives 1e-15


def test_optimal_step_size_approaches_its_limit_as_the_theory_says():
    accepted = {80: 0.034, 200: 0.016, 1000: 0.0035, 10_000: 0.00035}
    for name in ("A_seed0", "B_d_by_2d_seed0"):
        task = instance(name)
        for steps, tolerance in accepted.items():
            ratio = float(task.optimal_step_size(steps) / task.limiting_step_size)
            assert 1 - tolerance <= ratio < 1
    # first-order formula: 2/(L+a) + (r/(L+a)) * 2 ln(|c_d| a / (|c_1| L)) / (2t-1), r = (L-a)/(L+a)
    for index, steps, expected in zip(
        TRUTH["optimum.instance"], TRUTH["optimum.steps"], TRUTH["optimum.first_order_error"], strict=True
    ):
        task = instance(NAMES[index])
        lam, c = task._spectrum.eigenvalues, task._spectrum.coefficients
        total = lam[-1] + lam[0]
        slope = 2 * torch.log(c[0].abs() * lam[0] / (c[-1].abs() * lam[-1])) / (2 * int(steps) - 1)
        formula = 2 / total + (lam[-1] - lam[0]) / total**2 * slope
        error = float(formula / task.optimal_step_size(int(steps)) - 1)
        assert error == pytest.approx(expected, rel=1e-5, abs=1e-14)


def test_first_order_gradient_is_that_of_the_reference_and_explodes():
    exploded = 0
    for name, steps, rows in truth_cells("truth"):
        step_size = torch.from_numpy(TRUTH["truth.step_size"][rows])
        sign, log_magnitude = instance(name).signed_log_meta_gradient(step_size, steps - 1, first_order=True)
        log_magnitude = log_magnitude + math.log(steps - 1)  # the reference does not divide by the steps
        expected = TRUTH["truth.first_order_log"][rows]
        assert (sign.numpy() == TRUTH["truth.first_order_sign"][rows]).all()
        # near the zero of the gradient the terms cancel; measured 7e-10
        assert (np.abs(log_magnitude.numpy() - expected) <= 1e-8 * np.maximum(np.abs(expected), 1)).all()
        exploded += int((expected > 100).sum())
    assert exploded > 10


def test_every_option_of_the_reference_code_is_reproduced():
    task, compared = instance("A_seed0"), 0
    with open(DATA / "first_order_meta_gradients.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        expected, value = float(row["meta_gradient"]), float(row["meta_objective"])
        if not (math.isfinite(value) and math.isfinite(expected)):
            continue  # the reference itself overflowed
        steps, log = int(row["t"]), row["log"] == "True"
        if row["average"] == "True":
            objective, iterates, scale = ("log_of_mean" if log else "naive_mean"), "0..t-1", steps if log else 1
        else:
            steps -= 1  # "last" is the loss before the last step
            objective, iterates, scale = ("log" if log else "naive"), "1..t", steps if log else 1
        first_order = row["second_order"] == "False"
        eta = float(row["step_size"])
        found = task.meta_gradient(eta, steps, objective, iterates=iterates, first_order=first_order) * scale
        objective_found = task.meta_objective(eta, steps, objective, iterates=iterates) * scale
        assert float(found) == pytest.approx(expected, rel=2e-4)  # the reference is float32 over up to 80 steps
        assert float(objective_found) == pytest.approx(value, rel=2e-5)
        compared += 1
    assert compared == 32


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("iterates", ["1..t", "0..t-1"])
def test_objectives_equal_their_definition_and_gradients_their_differences(objective, iterates):
    if objective in ("log", "naive") and iterates != "1..t":
        return
    task, steps, h = instance("C_kappa2"), 7, 1e-6
    for eta in (0.0 + 2 * h, 0.4, 1.4, 2.7):
        point, losses = task.initial_point.clone(), []
        for _ in range(steps + 1):
            losses.append(float(task.loss({"point": point})))
            point = point - eta * (task.hessian @ point)
        chosen = range(1, steps + 1) if iterates == "1..t" else range(steps)
        mean = sum(losses[k] for k in chosen) / steps
        expected = {
            "log": math.log(losses[steps]) / steps,
            "naive": losses[steps],
            "naive_mean": mean,
            "log_mean": sum(math.log(losses[k]) / k for k in chosen if k) / steps,
            "log_of_mean": math.log(mean) / steps,
        }[objective]
        for method in ("spectral", "recursion"):
            options = {"iterates": iterates, "method": method}
            value = task.meta_objective(eta, steps, objective, **options)
            assert float(value) == pytest.approx(expected, rel=1e-12)
            # central differences: truncation h^2 and rounding eps / h are both near 1e-10
            both = task.meta_objective(
                torch.tensor([eta - h, eta + h], dtype=torch.float64), steps, objective, **options
            )
            difference = float(both[1] - both[0]) / (2 * h)
            assert float(task.meta_gradient(eta, steps, objective, **options)) == pytest.approx(
                difference, rel=1e-6, abs=1e-9
            )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_methods_agree_for_every_objective_and_a_batch_of_tasks(objective):
    tasks = Quadratic.random(12, seed=3, kind="wide", start="sphere", tasks=4)
    step_size = torch.tensor([1e-6, 0.5, 0.9, 1.5, 10.0]).double()[:, None] * tasks.stability_limit
    for steps in (1, 2, 50, 300):
        one = tasks.signed_log_meta_gradient(step_size, steps, objective)
        other = tasks.signed_log_meta_gradient(step_size, steps, objective, method="recursion")
        assert one.sign.shape == (5, 4)
        assert torch.equal(one.sign, other.sign)
        torch.testing.assert_close(one.log_magnitude, other.log_magnitude, rtol=1e-10, atol=1e-10)
        values = [tasks.meta_objective(step_size, steps, objective, method=m) for m in ("spectral", "recursion")]
        torch.testing.assert_close(*values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["spectral", "recursion"])
def test_batching_over_tasks_and_step_sizes_equals_looping(method):
    tasks = Quadratic.random(6, seed=1, kind="condition", condition_number=30.0, tasks=3)
    step_size = torch.tensor([0.0, 0.7, 1.9, 5.0]).double()
    together = tasks.meta_gradient(step_size[:, None], 25, "log_of_mean", method=method)
    objective = tasks.meta_objective(step_size[:, None], 25, method=method)
    optimum, path = tasks.optimal_step_size(25), tasks.trajectory(step_size[:, None], 5)
    assert path.directions.shape == (4, 3, 6, 6)
    for j in range(3):
        single = Quadratic(tasks.hessian[j], tasks.initial_point[j])
        torch.testing.assert_close(optimum[j], single.optimal_step_size(25), rtol=1e-12, atol=0.0)
        for i, eta in enumerate(step_size.tolist()):
            close = {"rtol": 1e-11, "atol": 1e-12}
            expected = single.meta_gradient(eta, 25, "log_of_mean", method=method)
            torch.testing.assert_close(together[i, j], expected, **close)
            torch.testing.assert_close(objective[i, j], single.meta_objective(eta, 25, method=method), **close)
            torch.testing.assert_close(path.log_losses[i, j], single.trajectory(eta, 5).log_losses, **close)


def test_one_hessian_serves_many_starting_points():
    points = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = Quadratic(torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()), points)
    assert shared.batch_shape == (4,) and shared.optimal_step_size(9).shape == (4,)
    assert shared.meta_gradient(0.3, 9).shape == (4,)
    for method in ("spectral", "recursion"):
        single = Quadratic(shared.hessian, points[2]).meta_gradient(0.3, 9, method=method)
        torch.testing.assert_close(shared.meta_gradient(0.3, 9, method=method)[2], single)


def test_trajectory_is_gradient_descent_in_logarithms():
    task = instance("A_seed2")
    path = task.trajectory(0.05, 30)
    point = task.initial_point.clone()
    for step in range(31):
        rebuilt = path.log_norms[step].exp() * path.directions[step]
        torch.testing.assert_close(rebuilt, point, rtol=1e-9, atol=1e-9 * float(point.norm()))
        assert float(path.log_losses[step]) == pytest.approx(math.log(task.loss({"point": point})), rel=1e-12)
        point = point - 0.05 * (task.hessian @ point)
    assert torch.isfinite(task.trajectory(10.0, 2000).log_losses).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["square", "wide", "condition"]),
    dim=st.integers(2, 12),
    steps=st.integers(1, 10_000),
    exponent=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    objective=st.sampled_from(OBJECTIVES),
)
def test_no_nan_and_no_silent_zero_anywhere(seed, kind, dim, steps, exponent, dtype, objective):
    condition = 1e3 if kind == "condition" else None
    drawn = Quadratic.random(dim, seed=seed, kind=kind, condition_number=condition)
    try:
        task = Quadratic(drawn.hessian.to(dtype), drawn.initial_point.to(dtype))
    except ValueError:
        assert dtype == torch.float32 and kind == "square"  # rounding can cost definiteness, which is said
        return
    low, high = math.log(1e-6), math.log(10 * float(task.stability_limit))
    eta = math.exp(low + exponent * (high - low))
    gradient, value = task.meta_gradient(eta, steps, objective), task.meta_objective(eta, steps, objective)
    sign, log_magnitude = task.signed_log_meta_gradient(eta, steps, objective)
    assert not torch.isnan(gradient) and not torch.isnan(value)
    assert sign != 0 and torch.isfinite(log_magnitude)
    if objective.startswith("log"):
        assert torch.isfinite(gradient) and gradient != 0 and torch.isfinite(value)
    information = torch.finfo(dtype)
    if gradient == 0:
        assert log_magnitude < math.log(information.smallest_normal * information.eps)
    if torch.isinf(gradient):
        assert log_magnitude > math.log(information.max) - 1e-6
    assert torch.signbit(gradient) == (sign < 0)


def test_a_vanishing_factor_is_no_obstacle():
    # step size 0.5 makes 1 - step_size * 2 exactly zero: that direction is gone after one step
    task = Quadratic(torch.diag(torch.tensor([2.0, 1.0]).double()), torch.ones(2).double())
    for method in ("spectral", "recursion"):
        for steps in (1, 2, 1000):
            assert float(task.meta_gradient(0.5, steps, method=method)) == pytest.approx(-4.0, rel=1e-12)
            expected = (math.log(0.5) + 2 * steps * math.log(0.5)) / steps
            assert float(task.meta_objective(0.5, steps, method=method)) == pytest.approx(expected, rel=1e-12)
        average = task.meta_objective(0.5, 3, "naive_mean", iterates="0..t-1", method=method)
        assert float(average) == pytest.approx((1.5 + 0.5 / 4 + 0.5 / 16) / 3, rel=1e-12)
        assert not task.meta_gradient(0.5, 3, "naive_mean", iterates="0..t-1", method=method).isnan()
    assert float(task.meta_gradient(0.5, 1, first_order=True)) == pytest.approx(-4.0)
    path = task.trajectory(0.5, 2)
    torch.testing.assert_close(path.log_norms.exp() ** 2, torch.tensor([2.0, 0.25, 0.0625]).double())
    torch.testing.assert_close(path.directions[1], torch.tensor([0.0, 1.0]).double())


@pytest.mark.parametrize("method", ["spectral", "recursion"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_step_size_gives_minus_infinity_and_gradient_zero_but_never_nan(method, objective):
    task = Quadratic(4 * torch.eye(3), torch.tensor([1.0, 2.0, 3.0]))
    value = task.meta_objective(0.25, 3, objective, method=method)
    gradient = task.meta_gradient(0.25, 3, objective, method=method)
    assert gradient == 0
    assert value == (-math.inf if objective.startswith("log") else 0.0)
    assert float(task.optimal_step_size(3)) == pytest.approx(0.25)


def test_a_step_size_of_zero_is_allowed():
    task = instance("A_seed0")
    w, hessian = task.initial_point, task.hessian
    expected = float(-2 * (w @ hessian @ hessian @ w) / (w @ hessian @ w))
    for options in ({}, {"method": "recursion"}, {"first_order": True}):
        assert float(task.meta_gradient(0.0, 80, **options)) == pytest.approx(expected, rel=1e-12)


def test_quadratic_is_a_task_with_the_loss_it_says():
    task = instance("C_kappa2")
    parameters = task.initial_parameters()
    assert isinstance(task, Task) and task.homogeneity == 2.0
    parameters["point"].mul_(-3.0)  # ours to change
    assert float(task(parameters, task.sample_batch("train"))) == pytest.approx(
        9 * float(task(task.initial_parameters(), None))
    )
    with pytest.raises(ValueError, match="batch of"):
        Quadratic.random(3, seed=0, tasks=2).loss({"point": torch.zeros(3)})


@pytest.mark.parametrize("method", ["spectral", "recursion"])
def test_results_have_the_dtype_and_shape_promised(method):
    task = instance("C_kappa2", torch.float32)
    for step_size, shape in ((0.5, ()), (torch.rand(3, 4), (3, 4)), (torch.tensor([1, 2]), (2,)), (1, ())):
        for result in (
            task.meta_gradient(step_size, 5, method=method),
            task.meta_objective(step_size, 5, method=method),
        ):
            assert result.dtype == torch.float32 and result.shape == shape and not result.requires_grad
    assert task.meta_gradient(torch.empty(0), 5, "log_mean", method=method).shape == (0,)
    half = Quadratic(task.hessian.bfloat16(), task.initial_point.bfloat16())
    assert half.meta_gradient(0.5, 5, method=method).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["square", "wide", "condition"])
def test_random_families_are_what_they_say(kind):
    condition = 50.0 if kind == "condition" else None
    task = Quadratic.random(8, seed=5, kind=kind, condition_number=condition, start="sphere", tasks=3)
    assert task.hessian.shape == (3, 8, 8) and task.dtype == torch.float64
    assert torch.allclose(task.initial_point.norm(dim=-1), torch.ones(3).double())
    again = Quadratic.random(8, seed=5, kind=kind, condition_number=condition, start="sphere", tasks=3)
    assert torch.equal(task.hessian, again.hessian) and torch.equal(task.initial_point, again.initial_point)
    if kind == "condition":
        ratio = task.largest_curvature / task.smallest_curvature
        torch.testing.assert_close(ratio, torch.full((3,), 50.0).double())
    assert Quadratic.random(8, seed=5, dtype=torch.float32, kind="wide").dtype == torch.float32


EYE, ONES = torch.eye(3), torch.ones(3)


@pytest.mark.parametrize(
    ("hessian", "point", "error", "words"),
    [
        (torch.ones(2, 3), ONES, ValueError, "square"),
        (torch.ones(3), ONES, ValueError, "square"),
        (EYE + torch.triu(torch.ones(3, 3), 1), ONES, ValueError, "symmetric"),
        (-EYE, ONES, ValueError, "positive definite"),
        (torch.ones(3, 3), ONES, ValueError, "positive definite"),
        (torch.diag(torch.tensor([1.0, 0.0, 1.0])), ONES, ValueError, "positive definite"),
        (EYE * math.nan, ONES, ValueError, "NaN"),
        (EYE.long(), ONES, TypeError, "floating-point"),
        ([[1.0]], ONES, TypeError, "torch.Tensor"),
        (EYE, [1.0, 1.0, 1.0], TypeError, "torch.Tensor"),
        (EYE, torch.zeros(3), ValueError, "zero"),
        (EYE, torch.stack([ONES, 0 * ONES]), ValueError, "zero"),
        (EYE, torch.ones(2), ValueError, "d = 3"),
        (EYE, ONES * math.inf, ValueError, "infinity"),
        (EYE.expand(2, 3, 3), ONES.expand(5, 3), ValueError, "broadcast"),
    ],
)
def test_bad_tasks_are_refused_with_the_reason(hessian, point, error, words):
    with pytest.raises(error, match=words):
        Quadratic(hessian, point)


@pytest.mark.parametrize("method", ["meta_gradient", "meta_objective", "signed_log_meta_gradient", "trajectory"])
@pytest.mark.parametrize(
    ("step_size", "steps", "error", "words"),
    [
        (-0.1, 5, ValueError, "negative"),
        (torch.tensor([0.1, -0.1]), 5, ValueError, "negative"),
        (math.nan, 5, ValueError, "NaN"),
        (math.inf, 5, ValueError, "infinity"),
        (1e40, 5, ValueError, "number range"),
        ("0.1", 5, TypeError, "step_size"),
        (torch.tensor(0.1j), 5, TypeError, "real"),
        (0.1, 0, ValueError, "at least 1"),
        (0.1, -3, ValueError, "at least 1"),
        (0.1, 2.0, TypeError, "int"),
        (0.1, True, TypeError, "int"),
    ],
)
def test_bad_step_sizes_and_steps_are_refused_with_the_reason(method, step_size, steps, error, words):
    with pytest.raises(error, match=words):
        getattr(instance("C_kappa2"), method)(step_size, steps)


def test_bad_options_are_refused_with_the_reason():
    task = instance("C_kappa2")
    with pytest.raises(ValueError, match="Unknown objective"):
        task.meta_gradient(0.1, 5, "mean")
    with pytest.raises(ValueError, match="Unknown iterates"):
        task.meta_gradient(0.1, 5, "log_mean", iterates="all")
    with pytest.raises(ValueError, match="steps - 1"):
        task.meta_gradient(0.1, 5, "log", iterates="0..t-1")
    with pytest.raises(ValueError, match="Unknown method"):
        task.meta_gradient(0.1, 5, method="magic")
    with pytest.raises(ValueError, match="first_order"):
        task.meta_gradient(0.1, 5, method="recursion", first_order=True)
    with pytest.raises(ValueError, match="at least 1"):
        task.optimal_step_size(0)
    with pytest.raises(ValueError, match="broadcast"):
        Quadratic.random(3, seed=0, tasks=2).meta_gradient(torch.ones(3), 5)
    with pytest.raises(ValueError, match="one task"):
        Quadratic.random(3, seed=0, tasks=2).backprop_failure(0.1)
    for arguments, words in (
        ({"dim": 0}, "dim"), ({"dim": 3, "kind": "round"}, "kind"), ({"dim": 3, "tasks": 0}, "tasks"),
        ({"dim": 3, "kind": "condition"}, "condition_number"), ({"dim": 3, "condition_number": 2.0}, "condition"),
        ({"dim": 3, "kind": "condition", "condition_number": 0.5}, "at least 1"), ({"dim": 3, "start": "x"}, "start"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Quadratic.random(seed=0, **arguments)


def test_option_names_are_the_documented_ones():
    assert set(Objective.__args__) == set(OBJECTIVES) and set(Iterates.__args__) == {"1..t", "0..t-1"}
