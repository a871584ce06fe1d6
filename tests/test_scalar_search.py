"""The paper's schedule against the published runs, and the bracketing search against everything that can fool it."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_l2l.exact.scalar_search import MetaSignal, bisect_log_step_size, paper_schedule
from lightning_l2l.tasks import Quadratic

TRUTH = dict(np.load(Path(__file__).parent / "data" / "quadratic_truth.npz"))
NAMES = ["A_seed0", "A_seed1", "A_seed2", "B_d_by_2d_seed0", "C_kappa2"]


@cache
def instance(name: str) -> Quadratic:
    return Quadratic(*(torch.from_numpy(TRUTH[f"{name}.{part}"]) for part in ("hessian", "initial_point")))


def exact(task: Quadratic, steps: int):
    return lambda step_size: float(task.meta_gradient(step_size, steps))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_paper_schedule_follows_the_published_runs_for_fifty_meta_steps(seed):
    # Two float64 formulas for the same gradient differ by up to 4e-9 after 50 steps, because the run jumps over the
    # kink of the objective and each jump magnifies; hence 1e-8 and no more steps.
    compared = 0
    for key, values in zip(TRUTH["trajectory.key"], TRUTH["trajectory.values"], strict=True):
        if int(key[0]) != seed:
            continue
        result = paper_schedule(exact(instance(f"A_seed{seed}"), int(key[1])), float(key[2]), 50)
        np.testing.assert_allclose(result.step_sizes, values[:, 0], rtol=0, atol=1e-8)
        compared += 1
    assert compared == 15


def test_paper_schedule_converges_where_float32_backpropagation_stays_frozen():
    task, steps = instance("A_seed0"), 80
    frozen = paper_schedule(
        lambda eta: task.backprop_meta_gradient(eta, steps, torch.float32).gradient, 0.1, 20, non_finite="skip"
    )
    assert set(frozen.step_sizes) == {0.1}
    assert all(gradient == 0 or math.isnan(gradient) for gradient in frozen.meta_gradients)
    right = paper_schedule(exact(task, steps), 0.1, 1000)
    assert right.step_sizes[-1] == pytest.approx(0.02723, abs=1e-5)
    assert right.step_sizes[-1] == pytest.approx(float(task.optimal_step_size(steps)), rel=1e-3)


def test_paper_schedule_clamps_at_zero_and_records_every_gradient():
    result = paper_schedule(lambda eta: 1000.0 if eta > 0 else -1.0, 1.0, 3)
    assert result.step_sizes[1] == 0.0 and result.step_sizes[2] == pytest.approx(0.01 / math.sqrt(2))
    assert result.meta_gradients == [1000.0, -1.0, 1000.0]
    with pytest.raises(FloatingPointError, match="meta-step 1"):
        paper_schedule(lambda eta: math.nan, 1.0, 3)


STARTS = [10.0**exponent for exponent in (-6, -5, -4, -3, -2, -1, 0, 1, 2, 3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("steps", "with_values"), [(10, False), (80, False), (80, True), (1000, False), (10_000, False)]
)
def test_search_finds_the_optimum_from_every_start(name, steps, with_values):
    task = instance(name)
    rows = (TRUTH["optimum.instance"] == NAMES.index(name)) & (TRUTH["optimum.steps"] == steps)
    optimum = float(TRUTH["optimum.step_size"][rows][0])
    calls: list[float] = []

    def function(step_size):
        calls.append(step_size)
        gradient = float(task.meta_gradient(step_size, steps))
        return (float(task.meta_objective(step_size, steps)), gradient) if with_values else gradient

    for start in STARTS:
        calls.clear()
        early = bisect_log_step_size(function, start, max_evaluations=20)
        assert len(calls) <= 20 and abs(early.step_size / optimum - 1) < 0.01
        calls.clear()
        late = bisect_log_step_size(function, start)
        assert late.converged and len(calls) <= 40 and abs(late.step_size / optimum - 1) < 1e-6
        assert [evaluation.step_size for evaluation in late.history] == calls
        assert late.bracket[0] <= late.step_size <= late.bracket[1]


@cache
def held_out_problem():
    """Least squares trained on 60 samples, judged on 60 others: (function of the step size, optimum, divergence).

    The data model of section 4 of arXiv 2006.16495 at d = 240, sigma = 1, t = 40, runs truncated at norm 40.
    """
    generator = torch.Generator().manual_seed(0)
    dimension, samples, steps = 240, 60, 40
    truth = torch.randn(dimension, generator=generator, dtype=torch.float64)
    x = torch.randn(2 * samples, dimension, generator=generator, dtype=torch.float64)
    y = x @ (truth / truth.norm()) + torch.randn(2 * samples, generator=generator, dtype=torch.float64)
    eigenvalues, basis = torch.linalg.eigh(x[:samples] @ x[:samples].T / samples)
    target, reach = basis.T @ y[:samples], x[samples:] @ x[:samples].T / samples @ basis

    counter = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]

    def function(step_size):
        factors = (1 - (1 - step_size * eigenvalues) ** counter) / eigenvalues
        if ((eigenvalues * factors**2 * target**2).sum(-1) / samples).max().sqrt() >= 40:
            return MetaSignal(gradient=0.0, diverged=True)
        factor = factors[-1]
        residual = reach @ (factor * target) - y[samples:]
        tangent = reach @ (steps * (1 - step_size * eigenvalues) ** (steps - 1) * target)
        return MetaSignal(float((residual * tangent).mean()), float(residual.square().mean() / 2))

    grid = np.geomspace(1e-4, 10, 2000)
    seen = [function(float(step_size)) for step_size in grid]
    values = [signal.value if not signal.diverged else math.inf for signal in seen]
    return function, grid, seen, float(grid[int(np.argmin(values))])


@pytest.mark.parametrize("answer", ["sign", "value and gradient"])
def test_search_is_not_fooled_by_the_plateau_of_a_held_out_objective(answer):
    function, grid, seen, optimum = held_out_problem()
    # The trap is there: beyond the optimum a flat stretch where the objective falls again before divergence.
    falling_again = [
        eta for eta, signal in zip(grid, seen, strict=True)
        if eta > 3 * optimum and not signal.diverged and signal.gradient < 0
    ]  # fmt: skip
    assert falling_again and abs(function(falling_again[0]).gradient) < 1e-3 * abs(function(1e-6).gradient)

    def answered(step_size):
        signal = function(step_size)
        if signal.diverged:
            return signal
        return signal.gradient if answer == "sign" else (signal.value, signal.gradient)

    for start in [*STARTS, *falling_again[::5], optimum]:
        result = bisect_log_step_size(answered, float(start))
        assert result.converged, (start, result)
        assert abs(result.step_size / optimum - 1) < 0.01, (start, result)  # the grid is that fine
    # The same search without its guard does fall into the trap, so the guard is what this test is about.
    if answer == "sign":
        trapped = bisect_log_step_size(answered, float(falling_again[0]), guard_probes=0)
        assert trapped.step_size > 3 * optimum


def test_search_survives_the_silent_zeros_and_nans_of_backpropagation():
    task, steps = instance("A_seed0"), 80
    optimum = float(task.optimal_step_size(steps))

    def backpropagated(step_size):
        return task.backprop_meta_gradient(step_size, steps, torch.float32).gradient

    assert backpropagated(0.05) == 0.0 and math.isnan(backpropagated(1.0))
    for start in (1e-4, 0.05, 1.0, 100.0):  # alive, silent zero, NaN, NaN
        result = bisect_log_step_size(backpropagated, start, relative_tolerance=1e-4)
        assert abs(result.step_size / optimum - 1) < 1e-3


def test_search_accepts_an_exact_zero_inside_a_bracket_and_as_a_start():
    inside = bisect_log_step_size(lambda eta: math.log(eta), 0.25)  # 0.25, 1 (zero), then down from there
    assert inside.step_size == pytest.approx(1.0, rel=1e-6)
    middle = bisect_log_step_size(lambda eta: round(math.log2(eta), 9), 2.0)  # between 0.5 and 2 lies 1
    assert middle.step_size == pytest.approx(1.0, rel=1e-15) and middle.converged
    assert len(middle.history) < 8  # it did not go on halving
    at_start = bisect_log_step_size(lambda eta: math.log(eta), 1.0)
    assert at_start.step_size == pytest.approx(1.0, rel=1e-6)


def test_search_goes_far_in_few_steps_and_below_a_diverged_stretch():
    far = bisect_log_step_size(lambda eta: math.log(eta / 3.0), 1e-11, max_evaluations=20)
    assert abs(far.step_size / 3.0 - 1) < 0.01

    def stretch(eta):  # runs diverge between 3.9 and 6, and beyond that the objective merely rises
        return MetaSignal(0.0, diverged=True) if 3.9 < eta < 6 else MetaSignal(eta - 3.0)

    assert bisect_log_step_size(stretch, 0.5).step_size == pytest.approx(3.0, rel=2e-6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda eta: 1.0, "no_smaller_bound"),
        (lambda eta: -1.0, "no_larger_bound"),
        (lambda eta: math.nan, "no_smaller_bound"),
        (lambda eta: MetaSignal(0.0, diverged=True), "no_smaller_bound"),
    ],
)
def test_search_says_so_when_there_is_no_optimum(function, reason):
    result = bisect_log_step_size(function, 1.0)
    assert not result.converged and result.reason == reason


def test_search_stops_at_its_budget_and_says_so():
    result = bisect_log_step_size(lambda eta: math.log(eta / 3e-5), 1.0, max_evaluations=7)
    assert result.reason == "budget" and len(result.history) == 7 and not result.converged


def test_bad_arguments_are_refused_with_the_reason():
    for start in (0.0, -1.0, math.nan, math.inf, 1e20):
        with pytest.raises(ValueError, match="start"):
            bisect_log_step_size(lambda eta: eta, start)
    for option in ({"relative_tolerance": 0.0}, {"max_evaluations": 0}, {"first_factor": 1.0}, {"guard_probes": -1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            bisect_log_step_size(lambda eta: eta, 1.0, **option)
    for arguments, words in (((-1.0, 3), "start"), ((1.0, -3), "meta_steps"), ((1.0, 3, 0.0), "scale")):
        with pytest.raises(ValueError, match=words):
            paper_schedule(lambda eta: eta, *arguments)
