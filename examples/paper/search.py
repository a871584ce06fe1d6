"""Learning one step size from its meta-gradient: the paper's schedule, and a bisection that works from any start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lightning_l2l.tasks import Quadratic

LIMITS = (1e-12, 1e12)


def back_propagated(task: Quadratic, step_size: float, steps: int, dtype: torch.dtype = torch.float32) -> float:
    """The log meta-gradient by plain reverse-mode differentiation: right, or dead (zero or NaN)."""
    hessian, point = task.hessian.to(dtype), task.initial_point.to(dtype)
    eta = torch.tensor(step_size, dtype=dtype, requires_grad=True)
    for _ in range(steps):
        point = point - eta * (hessian @ point)
    return float(torch.autograd.grad((0.5 * (point @ (hessian @ point))).log() / steps, eta)[0])


def paper_schedule(gradient: Callable[[float], float], start: float, meta_steps: int) -> list[tuple[float, float]]:
    """Step sizes and meta-gradients of ``eta_k = max(0, eta_(k-1) - 0.01 / sqrt(k) F'(eta_(k-1)))``.

    Where the gradient is not finite the step size stays, as in the paper's TensorFlow code: for ever.
    """
    path = [(start, gradient(start))]
    for k in range(1, meta_steps + 1):
        step_size, slope = path[-1]
        following = max(0.0, step_size - 0.01 / math.sqrt(k) * slope) if math.isfinite(slope) else step_size
        path.append((following, slope if following == step_size else gradient(following)))
    return path


@dataclass
class Bisection:
    """Finds where a meta-gradient changes from negative to positive, by bisection of the step size's logarithm.

    Uses signs only, for the size of the gradient spans orders of magnitude. From the start it walks in factors 4, 16,
    256, ... until the sign changes. A gradient of zero or NaN is taken for a run that was lost: too large. On held-out
    data a plateau with a second, spurious stationary point lies between the optimum and divergence, so that before it
    bisects it looks at 1/4 and 1/16 of the lower end, and moves down if the objective already rises there.

    Attributes:
        gradient: From a step size to its meta-gradient.
        seen: Every evaluation, in order.
    """

    gradient: Callable[[float], float]
    seen: dict[float, float] = field(default_factory=dict)

    def too_large(self, step_size: float) -> bool:
        if not LIMITS[0] <= step_size <= LIMITS[1]:
            raise ValueError(f"The meta-gradient does not change its sign between {LIMITS[0]:g} and {LIMITS[1]:g}.")
        if step_size not in self.seen:
            self.seen[step_size] = self.gradient(step_size)
        return not self.seen[step_size] < 0

    def find(self, start: float, tolerance: float = 1e-6) -> float:
        """The optimal step size to a relative tolerance.

        Raises:
            ValueError: The sign does not change between 1e-12 and 1e12.
        """
        low, high = self._bracket(start)
        probe = low / 4
        while probe > max(low / 20, LIMITS[0]):
            if self.too_large(probe):
                low, high = self._bracket(probe)
                probe = low
            probe /= 4
        while math.sqrt(high / low) > 1 + tolerance:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.too_large(middle) else (middle, high)
        return math.sqrt(low * high)

    def _bracket(self, start: float) -> tuple[float, float]:
        here, factor, down = start, 4.0, self.too_large(start)
        while True:
            following = here / factor if down else here * factor
            if self.too_large(following) != down:
                return (following, here) if down else (here, following)
            here, factor = following, factor**2
