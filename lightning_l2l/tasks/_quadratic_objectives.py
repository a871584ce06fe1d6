"""Meta-objectives of a loss sequence that is known only by its logarithm.

Both evaluations of the quadratic (eigenvalues, recursion) deliver, for some iterates ``w_k``, the two numbers
``log f(w_k)`` and ``d log f(w_k) / d step_size``. Every meta-objective and its gradient follow from these
without the loss itself, which may be far outside the range of any floating-point type.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Objective = Literal["log", "naive", "naive_mean", "log_mean", "log_of_mean"]
Iterates = Literal["1..t", "0..t-1"]


class SignedLog(NamedTuple):
    """A number as its sign and the natural logarithm of its size; zero is ``(0, -inf)``."""

    sign: Tensor
    log_magnitude: Tensor

    def value(self) -> Tensor:
        """Return the number itself: infinite or zero where it does not fit the dtype."""
        return self.sign * self.log_magnitude.exp()


class StepValues(NamedTuple):
    """Losses along a run. All tensors are float64; ``K`` is the number of iterates.

    Attributes:
        steps: The iterate numbers ``k``, ``[K]``.
        log_loss: ``log f(w_k)``, ``[..., K]``; minus infinity only where ``w_k`` is exactly zero.
        log_derivative: ``d log f(w_k) / d step_size``, ``[..., K]``; zero by convention where ``w_k`` is
            exactly zero.
        signed: The same derivative as sign and logarithm, for where it does not fit float64 (first-order mode
            only).
    """

    steps: Tensor
    log_loss: Tensor
    log_derivative: Tensor
    signed: SignedLog


def to_signed_log(number: Tensor) -> SignedLog:
    """Split a tensor into sign and logarithm of the size."""
    return SignedLog(torch.sign(number), number.abs().log())


def signed_logsumexp(terms: SignedLog, dim: int = -1) -> SignedLog:
    """Sum numbers given as sign and logarithm, without leaving the number range."""
    peak = terms.log_magnitude.amax(dim, keepdim=True)
    peak = torch.where(torch.isfinite(peak), peak, torch.zeros_like(peak))
    total = (terms.sign * (terms.log_magnitude - peak).exp()).sum(dim)
    return SignedLog(torch.sign(total), peak.squeeze(dim) + total.abs().log())


def iterates_of(steps: int, objective: Objective, iterates: Iterates) -> tuple[int, int]:
    """Return the first and last iterate that an objective reads.

    Raises:
        ValueError: For an unknown objective or index range, or a range that the objective does not use.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"Unknown objective {objective!r}. Choose one of {', '.join(map(repr, get_args(Objective)))}.")
    if iterates not in get_args(Iterates):
        raise ValueError(f"Unknown iterates {iterates!r}. Choose '1..t' (the default) or '0..t-1'.")
    if objective in ("log", "naive"):
        if iterates != "1..t":
            raise ValueError(
                f"iterates={iterates!r} selects which losses are averaged, but objective={objective!r} reads "
                "only the last one, f(w_t). For the loss one step earlier, ask for steps - 1."
            )
        return steps, steps
    return (1, steps) if iterates == "1..t" else (0, steps - 1)


def objective_value(values: StepValues, steps: int, objective: Objective) -> Tensor:
    """Return the meta-objective in float64, shape ``[...]``."""
    if objective == "log":
        return values.log_loss[..., -1] / steps
    if objective == "naive":
        return values.log_loss[..., -1].exp()
    if objective == "log_mean":
        # The term k = 0 would be log f(w_0) / 0. It does not depend on the step size, so it counts as zero.
        terms = torch.where(values.steps > 0, values.log_loss / values.steps.clamp(min=1), 0.0)
        return terms.sum(-1) / steps
    log_of_mean = torch.logsumexp(values.log_loss, -1) - math.log(steps)
    return log_of_mean.exp() if objective == "naive_mean" else log_of_mean / steps


def objective_gradient(values: StepValues, steps: int, objective: Objective) -> SignedLog:
    """Return the derivative of the meta-objective with respect to the step size, shape ``[...]``."""
    sign, log_size = values.signed
    if objective == "log":
        return SignedLog(sign[..., -1], log_size[..., -1] - math.log(steps))
    if objective == "naive":
        return SignedLog(sign[..., -1], log_size[..., -1] + values.log_loss[..., -1])
    if objective == "log_mean":
        total = signed_logsumexp(SignedLog(sign, log_size - values.steps.clamp(min=1).log()))
        return SignedLog(total.sign, total.log_magnitude - math.log(steps))
    total = signed_logsumexp(SignedLog(sign, log_size + values.log_loss))
    if objective == "naive_mean":
        return SignedLog(total.sign, total.log_magnitude - math.log(steps))
    # Where every loss is exactly zero both sums are -inf; their difference must not become NaN.
    log_size = total.log_magnitude - torch.logsumexp(values.log_loss, -1) - math.log(steps)
    return SignedLog(total.sign, torch.where(total.sign == 0, -math.inf, log_size))
