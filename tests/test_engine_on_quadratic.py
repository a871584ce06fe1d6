"""The general engine, given the quadratic as an ordinary loss, against 50-digit numbers.

Also where plain back-propagation is dead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_l2l import LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import Quadratic

TRUTH = dict(np.load(Path(__file__).parent / "data" / "quadratic_truth.npz"))
NAMES = ["A_seed0", "A_seed1", "A_seed2", "B_d_by_2d_seed0", "C_kappa2"]
MODES = ("forward", "reverse")

# Rounding of float64 over 200 steps, amplified next to the zero of the gradient (cf. the closed form: 5.6e-12).
TOLERANCE_64 = 1e-10
# What float32 arithmetic can give at all (a plain normalised recursion: median 9e-7, maximum 6e-4).
TOLERANCE_32 = 1e-3


def quadratic(name, dtype):
    hessian, point = (torch.from_numpy(TRUTH[f"{name}.{part}"]) for part in ("hessian", "initial_point"))
    return Quadratic(hessian.to(dtype), point.to(dtype))


def engine(task, step_size, steps, mode, objective="log", momentum=0.0):
    learned = LearnedStepSize(minimum=1e-12, maximum=1e8)
    learned.attach(inner_optimizer(torch.optim.SGD, lr=step_size, momentum=momentum))
    return meta_gradient(
        task,
        task.initial_parameters(),
        learned,
        [None] * steps,
        None,
        estimator=Unroll(objective=objective, mode=mode),
    )


def cells(table, steps, every):
    chosen = TRUTH[f"{table}.steps"] == steps
    if table == "truth32":  # the others are for the Hessian of a rounded factor
        chosen &= ~TRUTH["truth32.from_factor"]
    rows = np.flatnonzero(chosen)[::every]
    return [(NAMES[TRUTH[f"{table}.instance"][row]], row) for row in rows]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "every"), [(10, 4), (80, 15)])
def test_float64_engine_agrees_with_50_digits(mode, steps, every):
    for name, row in cells("truth", steps, every):
        step_size = float(TRUTH["truth.step_size"][row])
        result = engine(quadratic(name, torch.float64), step_size, steps, mode)
        assert result.usable
        expected = float(TRUTH["truth.log_gradient"][row])
        # the meta-parameter is log(step size)
        assert result.gradients["learning_rate"].item() / step_size == pytest.approx(expected, rel=TOLERANCE_64)
        assert result.value * steps == pytest.approx(float(TRUTH["truth.log_loss"][row]), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_float32_engine_agrees_with_50_digits(mode):
    for name, row in cells("truth32", 80, 12):
        step_size = float(TRUTH["truth32.step_size"][row])
        result = engine(quadratic(name, torch.float32), step_size, 80, mode)
        assert result.usable
        expected = float(TRUTH["truth32.log_gradient"][row])
        assert result.gradients["learning_rate"].item() / step_size == pytest.approx(expected, rel=TOLERANCE_32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "step_size", "steps"),
    [
        ("A_seed0", 0.1, 80),  # the loss overflows from step 24 on
        ("A_seed0", 10.0, 60),  # from step 7 on, and the point itself from step 9 on
        ("C_kappa2", None, 300),  # at the best step size the loss underflows from step 46 on
    ],
)
def test_float32_engine_is_right_where_plain_back_propagation_is_dead(mode, name, step_size, steps):
    task = quadratic(name, torch.float32)
    if step_size is None:
        step_size = 0.9 * float(task.optimal_step_size(steps))
    (point,) = task.initial_parameters().values()
    rate = torch.tensor(step_size, requires_grad=True)
    hessian = quadratic(name, torch.float32).hessian
    for _ in range(steps):
        point = point - rate * (hessian @ point)
    loss = (0.5 * point @ hessian @ point).log() / steps
    (dead,) = torch.autograd.grad(loss, rate)
    assert not (dead.isfinite() and dead != 0)
    result = engine(task, step_size, steps, mode)
    exact = quadratic(name, torch.float64)
    expected = exact.meta_gradient(step_size, steps)
    assert result.usable
    assert result.gradients["learning_rate"].item() / step_size == pytest.approx(float(expected), rel=TOLERANCE_32)
    assert result.value == pytest.approx(float(exact.meta_objective(step_size, steps)), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_steps_agree_with_50_digits(mode):
    for name, row in cells("truth", 1000, 40):
        step_size = float(TRUTH["truth.step_size"][row])
        result = engine(quadratic(name, torch.float64), step_size, 1000, mode)
        expected = float(TRUTH["truth.log_gradient"][row])
        assert result.gradients["learning_rate"].item() / step_size == pytest.approx(expected, rel=TOLERANCE_64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", ["log", "naive", "log_mean", "naive_mean"])
def test_every_objective_agrees_with_the_closed_form(mode, objective):
    task = Quadratic.random(6, seed=3)
    for step_size in (0.3 * float(task.stability_limit), 1.2 * float(task.stability_limit)):
        result = engine(task, step_size, 12, mode, objective)
        expected = float(task.meta_gradient(step_size, 12, objective))
        assert result.gradients["learning_rate"].item() / step_size == pytest.approx(expected, rel=1e-11)
        assert result.value == pytest.approx(float(task.meta_objective(step_size, 12, objective)), rel=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_a_naive_gradient_outside_float64_is_reported_as_overflow(mode):
    task = quadratic("A_seed0", torch.float64)
    result = engine(task, 10.0, 400, mode, "naive")
    assert result.diagnostics.overflow
    assert not result.usable
    assert bool(result.gradients["learning_rate"].isnan())


@pytest.mark.parametrize("mode", MODES)
def test_momentum_is_rescaled_with_the_point(mode):
    # Heavy ball on a quadratic is linear in (point, momentum); 300 steps past the stability limit overflow float32.
    task32, task64 = (Quadratic.random(5, seed=1, dtype=dtype) for dtype in (torch.float32, torch.float64))
    step_size = 4.0 * float(task64.stability_limit)
    found = engine(task32, step_size, 300, mode, momentum=0.5)
    expected = engine(task64, step_size, 300, "forward", momentum=0.5)
    assert found.usable
    torch.testing.assert_close(
        found.gradients["learning_rate"], expected.gradients["learning_rate"], rtol=TOLERANCE_32, atol=0
    )


def test_an_optimizer_that_is_not_linear_is_not_rescaled():
    task = quadratic("A_seed0", torch.float32)
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.Adam, lr=0.1))
    assert not learned.scale_equivariant
    result = meta_gradient(task, task.initial_parameters(), learned, [None] * 20, None)
    reference = meta_gradient(
        lambda tensors, batch: task(tensors, batch), task.initial_parameters(), learned, [None] * 20, None
    )
    assert result.value == reference.value


@pytest.mark.parametrize("mode", MODES)
def test_first_order_gradient_is_that_of_the_published_code(mode):
    # Inner gradients held constant. The published code stops at w_{t-1}, hence one step less, and has no factor 1/t.
    for name, row in cells("truth", 10, 8):
        step_size = float(TRUTH["truth.step_size"][row])
        learned = LearnedStepSize(minimum=1e-12, maximum=1e8).attach(inner_optimizer(torch.optim.SGD, lr=step_size))
        task = quadratic(name, torch.float64)
        result = meta_gradient(
            task, task.initial_parameters(), learned, [None] * 9, None, estimator=Unroll(mode=mode, second_order=False)
        )
        expected = float(TRUTH["truth.first_order_sign"][row]) * np.exp(float(TRUTH["truth.first_order_log"][row]))
        found = result.gradients["learning_rate"].item() / step_size * 9
        assert found == pytest.approx(expected, rel=1e-9)
