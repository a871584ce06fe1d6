"""The quadratic against numbers with 50 digits, against back-propagation, and against its own definition."""

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

from lightning_l2l import LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import Quadratic, Task

DATA = Path(__file__).parent / "data"
NAMES = ["A_seed0", "A_seed1", "A_seed2", "B_d_by_2d_seed0", "C_kappa2"]
OBJECTIVES = ["log", "naive", "log_mean", "naive_mean"]
TRUTH = dict(np.load(DATA / "quadratic_truth.npz"))


@cache
def instance(name: str, dtype: torch.dtype = torch.float64) -> Quadratic:
    hessian, point = (torch.from_numpy(TRUTH[f"{name}.{part}"]) for part in ("hessian", "initial_point"))
    return Quadratic(hessian.to(dtype), point.to(dtype))


def rows_of(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def truth_cells(table: str):
    """Yield (instance name, steps, rows) so that all step sizes of a cell are evaluated in one call."""
    for index, name in enumerate(NAMES):
        for steps in np.unique(TRUTH[f"{table}.steps"]):
            rows = (TRUTH[f"{table}.instance"] == index) & (TRUTH[f"{table}.steps"] == steps)
            if rows.any():
                yield name, int(steps), rows


def spectrum(task: Quadratic) -> tuple[torch.Tensor, torch.Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(task.hessian)
    return eigenvalues, vectors.T @ task.initial_point


def test_the_float64_gradient_is_exact_on_every_truth_row():
    # 1e-10: one rounding of step_size * curvature, raised to a power of up to 2e4.
    seen = 0
    for name, steps, rows in truth_cells("truth"):
        step_size = torch.from_numpy(TRUTH["truth.step_size"][rows])
        gradient = instance(name).meta_gradient(step_size, steps).numpy()
        np.testing.assert_allclose(gradient, TRUTH["truth.log_gradient"][rows], rtol=1e-10)
        log_loss = (instance(name).meta_objective(step_size, steps) * steps).numpy()
        np.testing.assert_allclose(log_loss, TRUTH["truth.log_loss"][rows], rtol=1e-10, atol=1e-10)
        seen += len(step_size)
    assert seen == 1200


def test_the_naive_gradient_has_the_true_sign_and_size_where_no_float_can_hold_it():
    outside = 0
    for name, steps, rows in truth_cells("truth"):
        step_size = torch.from_numpy(TRUTH["truth.step_size"][rows])
        sign, log_magnitude = instance(name).signed_log_meta_gradient(step_size, steps, "naive")
        expected = TRUTH["truth.naive_log"][rows]
        assert (sign.numpy() == TRUTH["truth.naive_sign"][rows]).all()
        np.testing.assert_allclose(log_magnitude.numpy(), expected, rtol=1e-10, atol=1e-10)
        plain = instance(name).meta_gradient(step_size, steps, "naive").numpy()
        largest, smallest = math.log(np.finfo(float).max), math.log(5e-324)
        assert not np.isnan(plain).any()
        assert (np.isinf(plain) == (expected > largest)).all()
        assert ((plain == 0) == (expected < smallest)).all()
        assert (np.signbit(plain) == (sign.numpy() < 0)).all()  # also of infinities and of zeros
        outside += int(((expected > largest) | (expected < smallest)).sum())
    assert outside > 100  # the test is about these


def test_the_float32_gradient_has_no_error_but_its_last_rounding():
    for name, steps, rows in truth_cells("truth32"):
        rows = rows & ~TRUTH["truth32.from_factor"]  # the others are for the Hessian of a rounded factor
        step_size = torch.from_numpy(TRUTH["truth32.step_size"][rows]).float()
        gradient = instance(name, torch.float32).meta_gradient(step_size, steps)
        assert gradient.dtype == torch.float32
        np.testing.assert_allclose(gradient.double(), TRUTH["truth32.log_gradient"][rows], rtol=6e-8)  # half of 2^-23


def backpropagated(task: Quadratic, step_size: float, steps: int, objective: str, dtype: torch.dtype) -> float:
    """Plain reverse-mode differentiation through the steps."""
    hessian, point = task.hessian.to(dtype), task.initial_point.to(dtype)
    eta, losses = torch.tensor(step_size, dtype=dtype, requires_grad=True), []
    for _ in range(steps):
        point = point - eta * (hessian @ point)
        losses.append(0.5 * (point @ (hessian @ point)))
    counted = torch.arange(1, steps + 1)
    value = {
        "log": lambda: losses[-1].log() / steps,
        "naive": lambda: losses[-1],
        "log_mean": lambda: (torch.stack(losses).log() / counted).mean(),
        "naive_mean": lambda: torch.stack(losses).mean(),
    }[objective]()
    return float(torch.autograd.grad(value, eta)[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_backpropagation_agrees_while_it_lives(objective):
    for name in ("A_seed0", "C_kappa2"):
        task = instance(name)
        for multiple in (0.3, 0.9, 1.2):
            eta = multiple * float(task.stability_limit)
            expected = backpropagated(task, eta, 20, objective, torch.float64)
            assert float(task.meta_gradient(eta, 20, objective)) == pytest.approx(expected, rel=1e-9)


def test_the_closed_form_lives_where_plain_backpropagation_was_seen_to_die():
    compared = 0
    for row in rows_of("backprop_thresholds.csv"):
        task, step_size, dtype = instance(row["instance"]), float(row["step_size"]), getattr(torch, row["dtype"])
        for kind, dead in (("zero_gradient", 0.0), ("overflow_nan", math.nan), ("zero_loss", math.nan)):
            if row[kind] and (steps := int(row[kind])) <= 1000:
                found = backpropagated(task, step_size, steps, "log", dtype)
                assert found == dead or (math.isnan(dead) and not math.isfinite(found)), (row, kind)
                exact = float(task.meta_gradient(step_size, steps))
                assert math.isfinite(exact) and exact != 0
                compared += 1
    assert compared > 60


def test_the_log_objective_says_when_the_loss_overflows():
    """The sanity check's prediction of where back-propagation of the log objective becomes a silent zero."""
    compared = 0
    for row in rows_of("backprop_thresholds.csv"):
        if row["zero_gradient"]:
            task, largest = instance(row["instance"]), math.log(torch.finfo(getattr(torch, row["dtype"])).max)
            for steps, outside in ((int(row["zero_gradient"]) - 3, False), (int(row["zero_gradient"]) + 2, True)):
                # twice the loss, w'Hw, is what leaves the range first
                log_form = steps * float(task.meta_objective(float(row["step_size"]), steps)) + math.log(2)
                assert (log_form > largest) == outside, (row, steps)
                compared += 1
    assert compared > 80


def test_the_published_first_order_code_is_reproduced_by_the_engine():
    """Its "last" loss is that of ``w_{t-1}``, its "average" runs over ``w_0 .. w_{t-1}``, its log has no ``1/t``."""
    task, compared = instance("A_seed0"), 0
    start = float(task.loss(task.initial_parameters()))
    for row in rows_of("first_order_meta_gradients.csv"):
        expected, value = float(row["meta_gradient"]), float(row["meta_objective"])
        if not (math.isfinite(value) and math.isfinite(expected)):
            continue  # the reference itself overflowed
        steps, average, eta = int(row["t"]), row["average"] == "True", float(row["step_size"])
        learned = LearnedStepSize(minimum=1e-12, maximum=1e8).attach(inner_optimizer(torch.optim.SGD, lr=eta))
        engine = meta_gradient(
            task, task.initial_parameters(), learned, [None] * (steps - 1), None,
            estimator=Unroll(
                objective="naive_mean" if average else "naive", second_order=row["second_order"] == "True"
            ),
        )  # fmt: skip
        share = (steps - 1) / steps if average else 1.0
        found_value = share * engine.value + (1 - share) * start
        found = share * engine.gradients["learning_rate"].item() / eta
        if row["log"] == "True":
            found, found_value = found / found_value, math.log(found_value)
        assert found == pytest.approx(expected, rel=2e-4)  # the reference is float32 over up to 80 steps
        assert found_value == pytest.approx(value, rel=2e-5)
        compared += 1
    assert compared == 32


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_equal_their_definition_and_gradients_their_differences(objective):
    task, steps, h = instance("C_kappa2"), 7, 1e-6
    for eta in (2 * h, 0.4, 1.4, 2.7):
        point, losses = task.initial_point.clone(), []
        for _ in range(steps):
            point = point - eta * (task.hessian @ point)
            losses.append(float(task.loss({"point": point})))
        expected = {
            "log": math.log(losses[-1]) / steps,
            "naive": losses[-1],
            "log_mean": sum(math.log(loss) / k for k, loss in enumerate(losses, 1)) / steps,
            "naive_mean": sum(losses) / steps,
        }[objective]
        assert float(task.meta_objective(eta, steps, objective)) == pytest.approx(expected, rel=1e-12)
        # central differences: truncation h^2 and rounding eps / h are both near 1e-10
        both = task.meta_objective(torch.tensor([eta - h, eta + h], dtype=torch.float64), steps, objective)
        difference = float(both[1] - both[0]) / (2 * h)
        assert float(task.meta_gradient(eta, steps, objective)) == pytest.approx(difference, rel=1e-6, abs=1e-9)


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
    assert not gradient.isnan() and not value.isnan()
    assert sign != 0 and log_magnitude.isfinite()
    assert gradient.signbit() == (sign < 0)
    if objective.startswith("log"):
        assert gradient.isfinite() and gradient != 0 and value.isfinite()
    information = torch.finfo(dtype)
    if gradient == 0:
        assert log_magnitude < math.log(information.smallest_normal * information.eps)
    if gradient.isinf():
        assert log_magnitude > math.log(information.max) - 1e-6


def test_both_bounds_of_theorem_3_hold_for_the_naive_gradient():
    for name in NAMES:
        task = instance(name)
        (lam, c), largest = spectrum(task), float(task.largest_curvature)
        for steps in (2, 10, 40):
            eta = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * 2 / largest
            bound = steps * (c**2 * lam**2 * (1 - eta[:, None] * lam).abs() ** (2 * steps - 1)).sum(-1)
            assert (task.meta_gradient(eta, steps, "naive").abs() <= bound * (1 + 1e-9)).all()
            eta = torch.tensor([1.05, 1.5, 3.0, 10.0], dtype=torch.float64) * 2 / largest
            # the theorem has |w_0| = 1
            bound = steps * largest**2 * (c[-1] ** 2 * (eta * largest - 1) ** (2 * steps - 1) - c.square().sum())
            assert (task.meta_gradient(eta, steps, "naive") >= bound).all()


def test_the_log_gradient_is_bounded_by_the_curvatures_and_changes_sign_once():
    for name in NAMES:
        task = instance(name)
        largest, smallest = float(task.largest_curvature), float(task.smallest_curvature)
        bound = 2 * largest * (largest + smallest) / (largest - smallest)
        around = torch.linspace(0.8, 1.2, 4001, dtype=torch.float64)
        grid = torch.cat([torch.logspace(-6, 3, 4001, dtype=torch.float64), around]).sort()[0] * task.stability_limit
        for steps in (10, 80, 1000, 10_000):
            gradient = task.meta_gradient(grid, steps)
            assert (gradient.sign().diff() != 0).sum() == 1
            assert gradient.abs().max() <= 1.05 * bound


def test_the_optimal_step_size_matches_sixty_digits_and_the_first_order_theory():
    columns = ("instance", "steps", "step_size", "first_order_error")
    for index, steps, expected, error in zip(*(TRUTH[f"optimum.{name}"] for name in columns), strict=True):
        task = instance(NAMES[index])
        found = float(task.optimal_step_size(int(steps)))
        assert abs(found / expected - 1) <= 1e-12
        # 2/(L+a) + (r/(L+a)) * 2 ln(|c_d| a / (|c_1| L)) / (2t-1), r = (L-a)/(L+a)
        lam, c = spectrum(task)
        total = lam[-1] + lam[0]
        slope = 2 * torch.log(c[0].abs() * lam[0] / (c[-1].abs() * lam[-1])) / (2 * int(steps) - 1)
        formula = 2 / total + (lam[-1] - lam[0]) / total**2 * slope
        assert float(formula) / found - 1 == pytest.approx(error, rel=1e-5, abs=1e-14)
    for name in ("A_seed0", "B_d_by_2d_seed0"):
        for steps, tolerance in {80: 0.034, 200: 0.016, 1000: 0.0035, 10_000: 0.00035}.items():
            ratio = float(instance(name).optimal_step_size(steps) / instance(name).limiting_step_size)
            assert 1 - tolerance <= ratio < 1


def test_a_vanishing_factor_is_no_obstacle():
    # step size 0.5 makes 1 - step_size * 2 exactly zero: that direction is gone after one step
    task = Quadratic(torch.diag(torch.tensor([2.0, 1.0]).double()), torch.ones(2).double())
    for steps in (1, 2, 1000):
        assert float(task.meta_gradient(0.5, steps)) == pytest.approx(-4.0, rel=1e-12)
        expected = (math.log(0.5) + 2 * steps * math.log(0.5)) / steps
        assert float(task.meta_objective(0.5, steps)) == pytest.approx(expected, rel=1e-12)
    assert float(task.meta_gradient(0.5, 3, "naive_mean")) == pytest.approx(
        backpropagated(task, 0.5, 3, "naive_mean", torch.float64)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_step_size_gives_minus_infinity_and_gradient_zero_but_never_nan(objective):
    task = Quadratic(4 * torch.eye(3), torch.tensor([1.0, 2.0, 3.0]))
    assert task.meta_gradient(0.25, 3, objective) == 0
    assert task.meta_objective(0.25, 3, objective) == (-math.inf if objective.startswith("log") else 0.0)
    assert float(task.optimal_step_size(3)) == pytest.approx(0.25)


def test_a_step_size_of_zero_is_allowed():
    w, hessian = instance("A_seed0").initial_point, instance("A_seed0").hessian
    expected = float(-2 * (w @ hessian @ hessian @ w) / (w @ hessian @ w))
    assert float(instance("A_seed0").meta_gradient(0.0, 80)) == pytest.approx(expected, rel=1e-12)


def test_results_have_the_dtype_and_shape_promised():
    task = instance("C_kappa2", torch.float32)
    for step_size, shape in (
        (0.5, ()),
        (torch.rand(3, 4), (3, 4)),
        (torch.tensor([1, 2]), (2,)),
        (torch.ones(0), (0,)),
    ):
        for objective in OBJECTIVES:
            for result in (task.meta_gradient(step_size, 5, objective), task.meta_objective(step_size, 5, objective)):
                assert result.dtype == torch.float32 and result.shape == shape and not result.requires_grad
    half = Quadratic(task.hessian.bfloat16(), task.initial_point.bfloat16())
    assert half.meta_gradient(0.5, 5).dtype == torch.bfloat16


def test_memory_is_bounded_when_many_step_sizes_meet_many_steps():
    task, grid = instance("C_kappa2"), torch.linspace(0.1, 2, 300, dtype=torch.float64)
    together = task.meta_gradient(grid, 4000, "naive_mean")  # 24 million numbers, in three portions
    torch.testing.assert_close(together[::100], task.meta_gradient(grid[::100], 4000, "naive_mean"), rtol=1e-12, atol=0)


def test_the_quadratic_is_a_task_with_the_loss_it_says():
    task = instance("C_kappa2")
    parameters = task.initial_parameters()
    assert isinstance(task, Task) and task.homogeneity == 2.0
    parameters["point"].mul_(-3.0)  # ours to change
    start = float(task(task.initial_parameters(), task.sample_batch("train")))
    assert float(task(parameters, None)) == pytest.approx(9 * start)
    assert start == pytest.approx(float(0.5 * task.initial_point @ task.hessian @ task.initial_point))


@pytest.mark.parametrize("kind", ["square", "wide", "condition"])
def test_random_families_are_what_they_say(kind):
    condition = 50.0 if kind == "condition" else None
    task, again = (Quadratic.random(8, seed=5, kind=kind, condition_number=condition, start="sphere") for _ in range(2))
    assert task.hessian.shape == (8, 8) and task.dtype == torch.float64
    assert torch.allclose(task.initial_point.norm(), torch.ones(()).double())
    assert torch.equal(task.hessian, again.hessian) and torch.equal(task.initial_point, again.initial_point)
    if kind == "condition":
        assert float(task.largest_curvature / task.smallest_curvature) == pytest.approx(50.0)


EYE, ONES = torch.eye(3), torch.ones(3)


@pytest.mark.parametrize(
    ("hessian", "point", "error", "words"),
    [
        (torch.ones(2, 3), ONES, ValueError, "square"),
        (EYE + torch.triu(torch.ones(3, 3), 1), ONES, ValueError, "symmetric"),
        (-EYE, ONES, ValueError, "positive definite"),
        (torch.ones(3, 3), ONES, ValueError, "positive definite"),
        (EYE * math.nan, ONES, ValueError, "NaN"),
        (EYE.long(), ONES, TypeError, "floating-point"),
        ([[1.0]], ONES, TypeError, "torch.Tensor"),
        (EYE, torch.zeros(3), ValueError, "zero"),
        (EYE, torch.ones(2), ValueError, "d = 3"),
        (EYE, ONES * math.inf, ValueError, "infinity"),
    ],
)
def test_bad_tasks_are_refused_with_the_reason(hessian, point, error, words):
    with pytest.raises(error, match=words):
        Quadratic(hessian, point)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-0.1, 5), ValueError, "negative"),
        ((math.nan, 5), ValueError, "NaN"),
        ((math.inf, 5), ValueError, "infinite"),
        (("0.1", 5), TypeError, "step_size"),
        ((torch.tensor(0.1j), 5), TypeError, "real"),
        ((0.1, 0), ValueError, "at least 1"),
        ((0.1, 2.0), TypeError, "int"),
        ((0.1, 5, "mean"), ValueError, "objective='mean'"),
    ],
)
def test_bad_questions_are_refused_with_the_reason(arguments, error, words):
    for ask in (Quadratic.meta_gradient, Quadratic.meta_objective):
        with pytest.raises(error, match=words):
            ask(instance("C_kappa2"), *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"dim": 0}, "dim"), ({"kind": "round"}, "kind"), ({"start": "x"}, "start"), ({"kind": "condition"}, "both"),
     ({"condition_number": 2.0}, "both"), ({"kind": "condition", "condition_number": 0.5}, "at least 1")],
)  # fmt: skip
def test_impossible_families_are_refused_with_the_reason(arguments, words):
    with pytest.raises(ValueError, match=words):
        Quadratic.random(**{"dim": 3, "seed": 0, **arguments})
