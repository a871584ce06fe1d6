"""The moving bracket of :func:`lightning_l2l.exact.scalar_search.bisect_log_step_size`."""

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


class Stopped(Exception):
    """Leaves the search from any depth; :func:`bisect_log_step_size` turns it into a result."""

    def __init__(self, reason: Reason) -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason: Reason = reason


class Bracket:
    """Two step sizes with the optimum between them, and everything that was seen on the way."""

    def __init__(
        self, function: MetaGradientFunction, minimum: float, maximum: float, factor: float, budget: int
    ) -> None:
        """Start with nothing known."""
        self.function, self.minimum, self.maximum = function, minimum, maximum
        self.factor, self.budget = factor, budget
        self.low, self.high = 0.0, math.inf
        self.exact: float | None = None
        self.seen: dict[float, MetaSignal] = {}

    def look(self, step_size: float) -> MetaSignal:
        """Evaluate a step size, once."""
        if step_size not in self.seen:
            if len(self.seen) >= self.budget:
                raise Stopped("budget")
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
        """Lower the upper end in growing factors until the objective falls, or has become worse."""
        factor = self.factor
        while self.high > self.minimum:
            step_size = max(self.high / factor, self.minimum)
            if not self.is_rising(step_size) or self.is_better(self.high, step_size):
                self.low = step_size
                return
            self.high, factor = step_size, factor**2
        raise Stopped("no_smaller_bound")

    def walk_up(self) -> None:
        """Raise the lower end in growing factors until the objective rises, or has become worse."""
        factor = self.factor
        while self.low < self.maximum:
            step_size = min(self.low * factor, self.maximum)
            if self.is_rising(step_size) or self.is_better(self.low, step_size):
                self.high = step_size
                return
            self.low, factor = step_size, factor**2
        raise Stopped("no_larger_bound")

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
            if signal.diverged:
                self.high = middle
            elif self.is_better(best, middle):
                # Worse than an end: the minimum that is worth having lies between that end and here.
                self.low, self.high = (self.low, middle) if best == self.low else (middle, self.high)
            elif signal.gradient == 0 and self._truly_rises(self.high):
                self.exact = middle
            elif signal.gradient >= 0:
                self.high = middle
            else:
                self.low = middle

    def is_rising(self, step_size: float) -> bool:
        """Whether the objective rises here; a zero outside a bracket is taken for an overflow."""
        signal = self.look(step_size)
        return signal.diverged or signal.gradient >= 0

    def _truly_rises(self, step_size: float) -> bool:
        signal = self.look(step_size)
        return signal.gradient > 0 and not signal.diverged

    def is_better(self, one: float, other: float) -> bool:
        """Whether ``one`` has the smaller value by more than rounding; false where values are unknown."""
        first, second = self.look(one), self.look(other)
        if second.diverged:
            return not first.diverged
        if first.diverged or first.value is None or second.value is None:
            return False
        return first.value < second.value - 1e-6 * max(1.0, abs(second.value))

    def result(self, reason: Reason) -> SearchResult:
        """Return the estimate with its bracket and history."""
        if self.exact is not None:
            estimate = self.exact
        elif self.low > 0 and self.high < math.inf:
            estimate = math.sqrt(self.low) * math.sqrt(self.high)
        else:
            estimate = self.low if self.low > 0 else self.high
        history = [Evaluation(step_size, signal) for step_size, signal in self.seen.items()]
        return SearchResult(estimate, (self.low, self.high), reason == "converged", reason, history)


def _as_signal(answer: float | tuple[float, float] | MetaSignal) -> MetaSignal:
    """Normalise what the function returned; a number that is not finite means divergence."""
    if isinstance(answer, tuple):
        answer = MetaSignal(float(answer[1]), float(answer[0]))
    elif not isinstance(answer, MetaSignal):
        answer = MetaSignal(float(answer))
    lost = not math.isfinite(answer.gradient)
    if answer.value is not None:
        lost = lost or math.isnan(answer.value) or answer.value == math.inf
    return replace(answer, diverged=answer.diverged or lost)
