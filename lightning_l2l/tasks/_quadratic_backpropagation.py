"""Plain back-propagation through the quadratic, and where it dies.

The log meta-objective is bounded and has a bounded gradient, yet the textbook way of computing it fails: the
loss itself overflows (its reciprocal, and with it the gradient, becomes exactly zero and *looks* like a
stationary point) or underflows (the reciprocal is infinite, the gradient NaN). This is Corollary 1 of arXiv
2006.16495 in numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_l2l.tasks._quadratic_objectives import Objective
from lightning_l2l.tasks._quadratic_spectral import Spectrum, directions

_CHUNK = 512


@dataclass(frozen=True)
class BackpropagationFailure:
    """First number of steps at which plain back-propagation fails, in each way; ``None`` if it does not.

    Attributes:
        zero_gradient: The loss is infinite, every point finite: the gradient is exactly zero, silently.
        overflow_nan: A point, its gradient or a product in the loss has overflowed with both signs: the
            gradient is NaN.
        underflow_nan: The loss is so small that ``1 / (t f)``, the derivative of the log objective with
            respect to it, is infinite: the gradient is NaN (or infinite).
        zero_loss: The loss has underflowed to exactly zero, some steps after ``underflow_nan``.
    """

    zero_gradient: int | None
    overflow_nan: int | None
    underflow_nan: int | None
    zero_loss: int | None

    @property
    def first(self) -> int | None:
        """The first step at which the gradient is not to be trusted."""
        found = [step for step in (self.zero_gradient, self.overflow_nan, self.underflow_nan) if step]
        return min(found) if found else None


@dataclass(frozen=True)
class BackpropagationResult:
    """What plain back-propagation returned, and whether it may be used.

    Attributes:
        gradient: The number itself, be it zero or NaN.
        loss: ``f(w_t)`` as computed.
        status: ``"ok"``; ``"overflow"`` when the loss or a point left the number range upwards;
            ``"underflow"`` when the reciprocal of the loss did so. Only an ``"ok"`` gradient may be applied.
    """

    gradient: float
    loss: float
    status: Literal["ok", "overflow", "underflow"]


def backpropagate(
    hessian: Tensor,
    initial_point: Tensor,
    step_size: float,
    steps: int,
    objective: Objective,
    dtype: torch.dtype,
) -> BackpropagationResult:
    """Differentiate through ``steps`` ordinary steps in ``dtype``, and say whether the result is alive.

    The means run over ``w_1 .. w_t``.
    """
    matrix, point = hessian.to(dtype), initial_point.to(dtype)
    eta = torch.tensor(step_size, dtype=dtype, device=matrix.device, requires_grad=True)
    losses = []
    with torch.enable_grad():
        for step in range(1, steps + 1):
            point = point - eta * (matrix @ point)
            if objective not in ("log", "naive") or step == steps:
                losses.append(0.5 * (point @ (matrix @ point)))
        value, divided_by = _plain_objective(torch.stack(losses), objective)
        (gradient,) = torch.autograd.grad(value / steps if objective != "naive" else value, eta)
    status: Literal["ok", "overflow", "underflow"] = "ok"
    if not (torch.isfinite(torch.stack(losses)).all() and torch.isfinite(point).all()):
        status = "overflow"
    elif divided_by is not None and not torch.isfinite(torch.full_like(divided_by, 1 / steps) / divided_by).all():
        status = "underflow"
    elif not torch.isfinite(gradient):
        # The naive gradient exceeds the loss by a factor of order steps / step_size and may overflow first.
        status = "overflow"
    return BackpropagationResult(float(gradient), losses[-1].item(), status)


def _plain_objective(losses: Tensor, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Return ``t`` times the objective (``f(w_t)`` for "naive") and what its derivative divides by."""
    if objective == "naive":
        return losses[-1], None
    if objective == "naive_mean":
        return losses.sum(), None
    if objective == "log":
        return losses[-1].log(), losses[-1]
    if objective == "log_mean":
        steps = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
        return (losses.log() / steps).sum(), losses.detach()
    return losses.mean().log(), losses.mean().detach()


def predict_failure(
    hessian: Tensor, spectrum: Spectrum, step_size: Tensor, dtype: torch.dtype, max_steps: int
) -> BackpropagationFailure:
    """Predict from the exact trajectory when ``dtype`` arithmetic fails within ``max_steps``."""
    information = torch.finfo(dtype)
    largest = math.log(information.max)
    smallest = information.smallest_normal * information.eps  # the smallest subnormal number
    found: dict[str, int | None] = {
        "zero_gradient": None, "overflow_nan": None, "underflow_nan": None, "zero_loss": None
    }  # fmt: skip
    last_push_log = -math.inf
    for begin in range(1, max_steps + 1, _CHUNK):
        numbers = torch.arange(begin, min(begin + _CHUNK, max_steps + 1), dtype=torch.float64)
        unit, log_norm = directions(spectrum, step_size, numbers.to(hessian.device))
        push = unit @ hessian
        products = unit * push  # summands of w'Hw at |w| = 1, [K, d]
        log_form = products.sum(-1).log() + 2 * log_norm
        # w_t, the product Hw_t in the loss, and step_size * Hw_{t-1} on the way to w_t, which may be larger
        point_log = unit.abs().amax(-1).log() + log_norm
        push_log = push.abs().amax(-1).log() + log_norm
        update_log = torch.cat([push_log.new_full((1,), last_push_log), push_log[:-1]]) + step_size.log()
        extreme = torch.stack([point_log, push_log, update_log]).amax(0)
        last_push_log = float(push_log[-1])
        negative = (-products).clamp(min=0.0).amax(-1).log() + 2 * log_norm
        # d (1/t) log f / df = 1 / (t f) overflows; f = 0 when its summands, each rounded to the subnormal
        # grid, vanish.
        log_reciprocal = math.log(2) - log_form - numbers.to(log_form.device).log()
        on_grid = (products * (2 * log_norm - math.log(smallest)).clamp(max=50.0).exp().unsqueeze(-1)).round()
        events = {
            "zero_gradient": log_form > largest,
            "overflow_nan": (extreme > largest) | (negative > largest),
            "underflow_nan": log_reciprocal > largest,
            "zero_loss": (on_grid.sum(-1) / 2).round() == 0,
        }
        for name, happens in events.items():
            if found[name] is None and bool(happens.any()):
                found[name] = int(numbers[int(happens.int().argmax())])
        overflowed = found["overflow_nan"] is not None
        if overflowed or found["zero_loss"] is not None:
            break
    if found["zero_gradient"] is not None and found["overflow_nan"] == found["zero_gradient"]:
        found["zero_gradient"] = None
    return BackpropagationFailure(**found)
