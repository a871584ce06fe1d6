"""Meta-optimisation of one step size: the paper's schedule, and a search that finds the optimum from
anywhere.

Both see the problem only through a function from a step size to its meta-gradient, so they serve closed
forms, the general engine and anything else alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

Reason = Literal["converged", "budget", "no_smaller_bound", "no_larger_bound"]


@dataclass(frozen=True)
class MetaSignal:
    """What one look at a step size tells.

    Attributes:
        gradient: Derivative of the meta-objective with respect to the step size.
        value: The meta-objective, if known. It lets the search tell a minimum from a flat spot beyond a hill.
        diverged: The run diverged or was truncated, so that ``gradient`` means nothing: the step size is too
            large.
    """

    gradient: float
    value: float | None = None
    diverged: bool = False


@dataclass(frozen=True)
class Evaluation:
    """One entry of a history: the step size looked at and what was seen there."""

    step_size: float
    signal: MetaSignal


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


@dataclass(frozen=True)
class SearchResult:
    """Outcome of :func:`bisect_log_step_size`.

    Attributes:
        step_size: The best estimate of the optimum.
        bracket: Largest step size known to be too small and smallest known to be too large; zero or infinity
            if none.
        converged: Whether the bracket is within the requested tolerance.
        reason: ``"converged"``; ``"budget"``: evaluations used up; ``"no_smaller_bound"`` or
            ``"no_larger_bound"``: the sign never changed down to the minimum or up to the maximum step size.
        history: Every evaluation, in order.
    """

    step_size: float
    bracket: tuple[float, float]
    converged: bool
    reason: Reason
    history: list[Evaluation] = field(repr=False)


MetaGradientFunction = Callable[[float], "float | tuple[float, float] | MetaSignal"]


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
    if meta_steps < 0:
        raise ValueError(f"meta_steps must not be negative, got {meta_steps!r}.")
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
    is never used. On the quadratic it is within 1 % after 13 to 17 evaluations and within 1e-6 after 27 to
    30, from any start.

    A step size counts as too large if its run diverged (``MetaSignal.diverged``, a gradient that is not
    finite, or a value that is NaN or plus infinity), or if its gradient is positive. Held-out objectives need
    more care: there a hill separates the optimum from a plateau with a second, spurious stationary point just
    below divergence. Before bisecting, the search therefore looks at 1/4 and 1/16 of the lower end of the
    bracket and moves down if the objective already rises there. If the function returns values, a point that
    is worse than an end of the bracket also moves the bracket towards that end, whatever its sign. Where a
    plateau is wider than the probes and no values are given, the spurious point can still win: return values.

    A gradient of exactly zero is accepted as the optimum only inside a bracket. Elsewhere it is taken for an
    overflow (back-propagation returns silent zeros for too large steps) and treated as too large.

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
        >>> task = Quadratic(torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)), torch.tensor([0.6, 0.8]))
        >>> result = bisect_log_step_size(lambda eta: float(task.meta_gradient(eta, steps=1000)), start=1e-6)
        >>> result.converged, abs(result.step_size / float(task.optimal_step_size(1000)) - 1) < 1e-6
        (True, True)
    """
    if not (math.isfinite(start) and 0 < minimum <= start <= maximum < math.inf):
        raise ValueError(f"start must lie between minimum {minimum:g} and maximum {maximum:g}, got {start!r}.")
    if not 0 < relative_tolerance < 1 or max_evaluations < 1 or first_factor <= 1 or guard_probes < 0:
        raise ValueError(
            "relative_tolerance must lie in (0, 1), max_evaluations be at least 1, first_factor exceed 1 and "
            f"guard_probes not be negative; got {relative_tolerance}, {max_evaluations}, {first_factor}, "
            f"{guard_probes}."
        )
    search = _Search(meta_gradient_fn, minimum, maximum, first_factor, max_evaluations)
    try:
        search.bracket(start)
        search.guard(guard_probes)
        search.bisect(relative_tolerance)
    except _Stopped as stopped:
        return search.result(stopped.reason)
    return search.result("converged")


class _Stopped(Exception):
    """Leaves the search from any depth; never leaves this module."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class _Search:
    """The bracket ``(low, high)`` and everything seen; values are infinite where diverged, NaN where not
    given.
    """

    def __init__(
        self, function: MetaGradientFunction, minimum: float, maximum: float, factor: float, budget: int
    ) -> None:
        self.function, self.minimum, self.maximum = function, minimum, maximum
        self.factor, self.budget = factor, budget
        self.low, self.high = 0.0, math.inf
        self.exact: float | None = None
        self.seen: dict[float, MetaSignal] = {}

    def look(self, step_size: float) -> MetaSignal:
        if step_size not in self.seen:
            if len(self.seen) >= self.budget:
                raise _Stopped("budget")
            self.seen[step_size] = _as_signal(self.function(step_size))
        return self.seen[step_size]

    def bracket(self, start: float) -> None:
        """Walk from ``start`` until the optimum lies between two neighbours."""
        if self.is_rising(start):
            self.high = start
            self.walk_down()
        else:
            self.low = start
            self.walk_up()

    def walk_down(self) -> None:
        factor = self.factor
        while self.high > self.minimum:
            step_size = max(self.high / factor, self.minimum)
            if not self.is_rising(step_size) or self.is_better(self.high, step_size):
                self.low = step_size
                return
            self.high, factor = step_size, factor**2
        raise _Stopped("no_smaller_bound")

    def walk_up(self) -> None:
        factor = self.factor
        while self.low < self.maximum:
            step_size = min(self.low * factor, self.maximum)
            if self.is_rising(step_size) or self.is_better(self.low, step_size):
                self.high = step_size
                return
            self.low, factor = step_size, factor**2
        raise _Stopped("no_larger_bound")

    def guard(self, probes: int) -> None:
        """Look below the bracket for a second one, and move there if it exists."""
        probe = 1
        while probe <= probes:
            step_size = self.low / self.factor**probe
            probe += 1
            if step_size < self.minimum:
                return
            if self.is_rising(step_size):
                self.high, self.low = step_size, 0.0
                self.walk_down()
                probe = 1
            elif self.is_better(step_size, self.low):
                self.high, self.low = self.low, step_size
                probe = 1

    def bisect(self, tolerance: float) -> None:
        """Halve the bracket in log space until its middle is within ``tolerance`` of both ends."""
        while self.exact is None and math.sqrt(self.high / self.low) > 1 + tolerance:
            middle = math.sqrt(self.low) * math.sqrt(self.high)
            signal = self.look(middle)
            best = self.low if self.is_better(self.low, self.high) else self.high
            if signal.gradient == 0 and not signal.diverged:
                self.exact = middle
            elif self.is_better(best, middle) or signal.diverged:
                # Worse than an end: the minimum that is worth having lies between that end and here.
                self.low, self.high = (self.low, middle) if best == self.low else (middle, self.high)
            elif signal.gradient > 0:
                self.high = middle
            else:
                self.low = middle

    def is_rising(self, step_size: float) -> bool:
        """Whether the objective rises here; a zero outside a bracket is taken for an overflow."""
        signal = self.look(step_size)
        return signal.diverged or signal.gradient >= 0

    def is_better(self, one: float, other: float) -> bool:
        """Whether ``one`` has the smaller value by more than rounding; false where values are unknown."""
        first, second = self.look(one), self.look(other)
        if second.diverged:
            return not first.diverged
        if first.diverged or first.value is None or second.value is None:
            return False
        return first.value < second.value - 1e-6 * max(1.0, abs(second.value))

    def result(self, reason: Reason) -> SearchResult:
        if self.exact is not None:
            estimate = self.exact
        elif self.low > 0 and self.high < math.inf:
            estimate = math.sqrt(self.low) * math.sqrt(self.high)
        else:
            estimate = self.low if self.low > 0 else self.high
        history = [Evaluation(step_size, signal) for step_size, signal in self.seen.items()]
        return SearchResult(estimate, (self.low, self.high), reason == "converged", reason, history)


def _as_signal(answer: float | tuple[float, float] | MetaSignal) -> MetaSignal:
    """Normalise what the user's function returned; a number that is not one means divergence."""
    if isinstance(answer, tuple):
        answer = MetaSignal(float(answer[1]), float(answer[0]))
    elif not isinstance(answer, MetaSignal):
        answer = MetaSignal(float(answer))
    lost = not math.isfinite(answer.gradient)
    if answer.value is not None:
        lost = lost or math.isnan(answer.value) or answer.value == math.inf
    return replace(answer, diverged=answer.diverged or lost)
