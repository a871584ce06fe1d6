"""Meta-optimisation of one step size: the paper's schedule, and a search that works from any start.

Both see the problem only through a function from a step size to its meta-gradient, so they serve closed
forms, the general engine and anything else alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_l2l.exact._scalar_bracket import (
    Bracket,
    Evaluation,
    MetaGradientFunction,
    MetaSignal,
    SearchResult,
    Stopped,
)

__all__ = [
    "Evaluation",
    "MetaGradientFunction",
    "MetaSignal",
    "ScheduleResult",
    "SearchResult",
    "bisect_log_step_size",
    "paper_schedule",
]


@dataclass(frozen=True)
class ScheduleResult:
    """Run of :func:`paper_schedule`.

    Attributes:
        step_sizes: ``eta_0 .. eta_K``.
        meta_gradients: The meta-gradient at each of ``eta_0 .. eta_{K-1}``; NaN or infinite where it was
            skipped.
    """

    step_sizes: list[float]
    meta_gradients: list[float]


def paper_schedule(
    meta_gradient_fn: Callable[[float], float],
    start: float,
    meta_steps: int,
    scale: float = 0.01,
    *,
    non_finite: Literal["raise", "skip"] = "raise",
) -> ScheduleResult:
    """Run gradient descent on the step size as in arXiv 2006.16495, section 5.1.

    ``eta_k = max(0, eta_{k-1} - scale / sqrt(k) * F'(eta_{k-1}))`` for ``k = 1 .. meta_steps``. It needs
    about ``(eta_0^2 / (8 scale))^2`` steps from a large start, and on an ill-conditioned quadratic it may
    cycle through zero instead of converging; use :func:`bisect_log_step_size` to find the optimum, and this
    to reproduce the paper.

    Args:
        meta_gradient_fn: Step size to meta-gradient.
        start: ``eta_0``, not negative.
        meta_steps: Number of updates ``K``, one evaluation each.
        scale: The constant in front of ``1 / sqrt(k)``.
        non_finite: ``"raise"``, or ``"skip"`` to leave the step size where it is, as the reference's
            TensorFlow code does; it then stays there for ever.

    Raises:
        ValueError: For a bad ``start``, ``scale`` or ``meta_steps``.
        FloatingPointError: If the meta-gradient is NaN or infinite and ``non_finite`` is ``"raise"``.

    Example:
        >>> result = paper_schedule(lambda eta: 2 * (eta - 0.5), start=1.0, meta_steps=100, scale=0.5)
        >>> round(result.step_sizes[-1], 3)
        0.5
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be finite and not negative, got {start!r}.")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale!r}.")
    if isinstance(meta_steps, bool) or not isinstance(meta_steps, int) or meta_steps < 0:
        raise ValueError(f"meta_steps must be an int and not negative, got {meta_steps!r}.")
    step_sizes, meta_gradients = [float(start)], []
    for step in range(1, meta_steps + 1):
        step_size = step_sizes[-1]
        gradient = float(meta_gradient_fn(step_size))
        meta_gradients.append(gradient)
        if not math.isfinite(gradient):
            if non_finite == "raise":
                raise FloatingPointError(
                    f"The meta-gradient at step size {step_size:.6g} (meta-step {step}) is {gradient}. Plain "
                    "back-propagation overflows or underflows in long unrolls; use an exact meta-gradient, or "
                    "non_finite='skip' to watch it stand still."
                )
            gradient = 0.0
        step_sizes.append(max(0.0, step_size - scale / math.sqrt(step) * gradient))
    return ScheduleResult(step_sizes, meta_gradients)


def bisect_log_step_size(
    meta_gradient_fn: MetaGradientFunction,
    start: float,
    *,
    relative_tolerance: float = 1e-6,
    max_evaluations: int = 40,
    minimum: float = 1e-12,
    maximum: float = 1e12,
    first_factor: float = 4.0,
    guard_probes: int = 2,
) -> SearchResult:
    """Find the optimal step size by bracketing and bisection of its logarithm, using only signs.

    From the start it walks down or up in factors ``4, 16, 256, ...`` until the sign of the meta-gradient
    changes, then halves the bracket in log space. The size of the gradient, which spans orders of magnitude,
    is never used. On the quadratic
    it is within 1 % after 14 evaluations (at most 17) and within 1e-6 after 27 (at most 30), from any start
    between 1e-6 and 1000.

    A step size counts as too large if its run diverged (``MetaSignal.diverged``, a gradient that is not
    finite, or a value that is NaN or plus infinity), or if its gradient is positive. Held-out objectives need
    more care: there a hill separates the optimum from a plateau with a second, spurious stationary point just
    below divergence. Before bisecting, the search therefore looks at 1/4 and 1/16 of the lower end of the
    bracket and moves down if the objective already rises there. If the function returns values, a point that
    is worse than an end of the bracket also moves the bracket towards that end, whatever its sign. Where a
    plateau is wider than the probes and no values are given, the spurious point can still win: return values.

    A gradient of exactly zero is accepted as the optimum only below a step size with a positive gradient.
    Elsewhere it is taken for an overflow (back-propagation returns silent zeros for too large steps) and
    treated as too large.

    Args:
        meta_gradient_fn: Step size to meta-gradient, to ``(value, gradient)``, or to a :class:`MetaSignal`.
        start: Where to begin, positive.
        relative_tolerance: Stop when the estimate is within this fraction of the sign change.
        max_evaluations: Stop after this many calls.
        minimum: Smallest step size looked at.
        maximum: Largest step size looked at.
        first_factor: First factor of the bracketing walk; squared at every further step.
        guard_probes: Number of step sizes below the bracket to look at before trusting it.

    Raises:
        ValueError: For a bad start, tolerance, budget or range.

    Example:
        >>> import torch
        >>> from lightning_l2l.tasks import Quadratic
        >>> task = Quadratic(torch.diag(torch.tensor([1.0, 0.5]).double()), torch.tensor([0.6, 0.8]))
        >>> result = bisect_log_step_size(lambda eta: float(task.meta_gradient(eta, steps=99)), start=1e-6)
        >>> result.converged, abs(result.step_size / float(task.optimal_step_size(99)) - 1) < 1e-6
        (True, True)
    """
    if not (math.isfinite(start) and 0 < minimum <= start <= maximum < math.inf):
        raise ValueError(f"start must lie between {minimum:g} and {maximum:g}, got {start!r}.")
    if not 0 < relative_tolerance < 1 or max_evaluations < 1 or first_factor <= 1 or guard_probes < 0:
        raise ValueError(
            "relative_tolerance must lie in (0, 1), max_evaluations be at least 1, first_factor exceed 1 and "
            f"guard_probes not be negative; got {relative_tolerance}, {max_evaluations}, {first_factor}, "
            f"{guard_probes}."
        )
    search = Bracket(meta_gradient_fn, minimum, maximum, first_factor, max_evaluations)
    try:
        search.bracket(start)
        search.guard(guard_probes)
        search.bisect(relative_tolerance)
    except Stopped as stopped:
        return search.result(stopped.reason)
    return search.result("converged")
