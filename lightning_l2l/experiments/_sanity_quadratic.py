"""Claims on the quadratic: section 3 of arXiv 2006.16495, in its own closed form and in exact rational arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import torch

from lightning_l2l.exact.scalar_search import bisect_log_step_size, paper_schedule
from lightning_l2l.experiments._claim import Claim
from lightning_l2l.tasks import Quadratic

# Eigenvalues and start of a task whose meta-gradient Python's fractions give without any rounding.
_EIGENVALUES = (Fraction(1), Fraction(1, 2), Fraction(1, 16))
_START = (Fraction(1, 2), Fraction(-1, 4), Fraction(3, 4))


def claims() -> Iterator[Claim]:
    """All claims of this file."""
    yield from _exact()
    task = Quadratic.random(20, seed=0, kind="wide")
    yield from _naive_and_log(task)
    yield from _back_propagation(task)
    yield from _optimum(task)


def _exact() -> Iterator[Claim]:
    diagonal = torch.diag(torch.tensor([float(value) for value in _EIGENVALUES], dtype=torch.float64))
    task = Quadratic(diagonal, torch.tensor([float(value) for value in _START], dtype=torch.float64))
    worst = 0.0
    for steps in (1, 10, 200):
        for step_size in (Fraction(1, 2**20), Fraction(3, 4), Fraction(15, 8), Fraction(33, 16), Fraction(20)):
            truth = _rational_gradient(step_size, steps)
            found = task.meta_gradient(float(step_size), steps)
            worst = max(worst, abs(float(found) / truth - 1))
    yield Claim("log meta-gradient against exact fractions, 15 cells: relative error", worst, 0.0, 1e-12)


def _rational_gradient(step_size: Fraction, steps: int) -> float:
    """``-2 sum c^2 lambda^2 b^(2t-1) / sum c^2 lambda b^(2t)``, without rounding."""
    pairs = [(c * c * lam, lam, 1 - step_size * lam) for lam, c in zip(_EIGENVALUES, _START, strict=True)]
    numerator = sum((weight * lam * b ** (2 * steps - 1) for weight, lam, b in pairs), Fraction(0))
    denominator = sum((weight * b ** (2 * steps) for weight, lam, b in pairs), Fraction(0))
    return float(-2 * numerator / denominator)


def _naive_and_log(task: Quadratic) -> Iterator[Claim]:
    limit, largest = float(task.stability_limit), float(task.largest_curvature)
    smallest = float(task.smallest_curvature)
    sizes = torch.logspace(-6, math.log10(10 * limit), 2001, dtype=torch.float64)
    bound = 2 * largest * (largest + smallest) / (largest - smallest)
    steepest = float(task.meta_gradient(sizes, 1000).abs().max())
    yield Claim(
        "log meta-gradient, steepest of 2001 step sizes, over its limit 2L(L+a)/(L-a)",
        steepest / bound,
        0.0,
        up_to=1.05,
    )
    changes = int((task.meta_gradient(sizes, 1000).sign().diff() != 0).sum())
    yield Claim("log objective: sign changes of the gradient (one minimum)", changes, 1)
    exploded = task.signed_log_meta_gradient(2 * limit, 1000, "naive").log_magnitude / math.log(10)
    yield Claim(
        "naive meta-gradient at twice the stability limit, 1000 steps: decades", float(exploded), 900, up_to=1000
    )
    condition = Quadratic.random(20, seed=0, kind="condition", condition_number=2.0)
    vanished = condition.signed_log_meta_gradient(1.0, 1000, "naive").log_magnitude / math.log(10)
    yield Claim(
        "naive meta-gradient at a good step size, condition number 2: decades", float(vanished), -620, up_to=-580
    )


def _back_propagation(task: Quadratic) -> Iterator[Claim]:
    step_size = 2 * float(task.stability_limit)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        predicted = task.backprop_failure(step_size, dtype).first or 0
        dead = next(
            steps
            for steps in range(max(1, predicted - 5), predicted + 6)
            if task.backprop_meta_gradient(step_size, steps, dtype).status != "ok"
        )
        text = f"plain back-propagation in {name} dies at twice the stability limit: step"
        yield Claim(text, dead, predicted, 2)
        silent = task.backprop_meta_gradient(step_size, dead, dtype)
        yield Claim(f"what it returns there, reported as {silent.status!r}", silent.gradient, 0.0)
    good = Quadratic.random(20, seed=0, kind="condition", condition_number=2.0)
    best = float(good.optimal_step_size(60))
    predicted = good.backprop_failure(best, torch.float32).first or 0
    dead = next(s for s in range(1, 400) if good.backprop_meta_gradient(best, s, torch.float32).status != "ok")
    yield Claim("and at the optimum, condition number 2, by underflow: step", dead, predicted, 2)


def _optimum(task: Quadratic) -> Iterator[Claim]:
    limiting = float(task.limiting_step_size)
    yield Claim(
        "optimal step size for 1000 steps over 2/(L+a)", float(task.optimal_step_size(1000)) / limiting, 1.0, 0.0035
    )
    steps, best = 80, float(task.optimal_step_size(80))
    yield Claim(
        "meta-gradient there, over L", float(task.meta_gradient(best, 80)) / float(task.largest_curvature), 0.0, 1e-6
    )
    for tolerance, budget in ((1e-2, 20), (1e-6, 40)):
        most = 0
        for start in (1e-6, 1e-3, 0.1, 10.0, 1000.0):
            found = bisect_log_step_size(
                lambda eta: float(task.meta_gradient(eta, steps)),
                start,
                relative_tolerance=tolerance,
                max_evaluations=200,
            )
            wrong = abs(found.step_size / best - 1) > tolerance
            most = max(most, 1000 if wrong else len(found.history))
        yield Claim(
            f"meta-gradients to {tolerance:g} of the optimum, worst of starts 1e-6 to 1e3", most, 1, up_to=budget
        )
    frozen = paper_schedule(
        lambda eta: task.backprop_meta_gradient(eta, steps, torch.float32).gradient, 0.1, 20, non_finite="skip"
    )
    yield Claim(
        "paper's schedule on float32 back-propagation from 0.1, after 20 meta-steps", frozen.step_sizes[-1], 0.1
    )
    yield Claim(
        "the same on the exact gradient, random quadratics that arrive within 10 %, of 4", _arrivals(4), 3, up_to=4
    )


def _log_gradient(task: Quadratic, step_size: float) -> float:
    return float(task.meta_gradient(step_size, 80))


def _arrivals(tasks: int) -> int:
    """How often the paper's schedule ends (mean of its last 100 steps) near the optimum: typical, not universal."""
    arrived = 0
    for seed in range(tasks):
        task = Quadratic.random(20, seed=seed, kind="square")
        path = paper_schedule(partial(_log_gradient, task), 0.1, 400).step_sizes
        arrived += abs(sum(path[-100:]) / 100 / float(task.optimal_step_size(80)) - 1) < 0.1
    return arrived
