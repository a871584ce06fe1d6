r"""Meta-objectives: the number that an unrolled training is measured by.

With ``L_k`` the loss on the meta-batch after ``k`` inner steps and ``K`` the number of steps,

================  ==========================================  ======================================
name              value                                       the paper's name
================  ==========================================  ======================================
``naive``         ``L_K``                                     F(theta), the naive objective
``log``           ``(1/K) log L_K``                           (1/t) log F(theta)
``naive_mean``    ``(1/K) sum_{k=1..K} L_k``                  mean over the steps of ``naive``
``log_mean``      ``(1/K) sum_{k=1..K} (1/k) log L_k``        mean over the steps of ``log``
================  ==========================================  ======================================

Every one of them is a weighted sum of ``phi(L_k)`` with ``phi`` the identity or the logarithm, and that is all an
estimator needs to know: :func:`objective_weights` gives the weights, :func:`is_logarithmic` the ``phi``.

Source: Wang, Yuan, Wu, Ge (ICML 2021), sections 3 and 4.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_l2l.exact.result import Diagnostics, MetaGradient

Objective = Literal["log", "naive", "log_mean", "naive_mean"]
# Losses are put together in blocks: thousands of single numbers would take more memory than a small network.
_BLOCK = 64


class NegativeLossError(ValueError):
    """The objective takes the logarithm of a negative loss.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: float) -> None:
        super().__init__(
            f"The meta-loss is negative ({loss:.4g}), so its logarithm does not exist. Use objective='naive' (or "
            "'naive_mean'), or make the loss positive."
        )


def check_objective(objective: str) -> None:
    """Refuse an unknown objective.

    Raises:
        ValueError: ``objective`` is not one of the four names.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} is not known; choose one of {list(get_args(Objective))}.")


def is_logarithmic(objective: Objective) -> bool:
    """Whether the losses enter through their logarithm (they must be positive then)."""
    return objective in ("log", "log_mean")


def objective_weights(objective: Objective, steps: int) -> dict[int, float]:
    """The weight of each step that counts, by the number of inner steps taken (``1 ... steps``).

    Args:
        objective: The name of the meta-objective.
        steps: The number of inner steps K.

    Example:
        >>> objective_weights("log", 4)
        {4: 0.25}
        >>> objective_weights("log_mean", 2)
        {1: 0.5, 2: 0.25}
    """
    if objective == "naive":
        return {steps: 1.0}
    if objective == "log":
        return {steps: 1.0 / steps}
    if objective == "naive_mean":
        return {step: 1.0 / steps for step in range(1, steps + 1)}
    return {step: 1.0 / (steps * step) for step in range(1, steps + 1)}


class Accumulator:
    """Collects the losses of one exact unroll, and makes the result of them.

    The true iterate is ``scale * iterate`` with ``log(scale)`` a float64 number (always 0 unless the problem is
    homogeneous), so the true loss is ``scale**p * loss``: logarithms are exact wherever the true loss lies.

    Args:
        objective: The meta-objective.
        steps: The number of inner steps K.
        homogeneity: The degree p, or ``None``.

    Attributes:
        weights: :func:`objective_weights`.
    """

    def __init__(self, objective: Objective, steps: int, homogeneity: float | None) -> None:
        self.weights = objective_weights(objective, steps)
        self._logarithmic = is_logarithmic(objective)
        self._homogeneity = homogeneity or 0.0
        self._blocks: list[Tensor] = []
        self._recent: list[Tensor] = []
        self._meta_losses: list[Tensor] = []
        self._value: Tensor | float = 0.0

    def add_training_loss(self, loss: Tensor) -> bool:
        """Record the loss of an inner step; whether it is known to be finite, so that the unroll may go on.

        On an accelerator that is found out at the end: looking at each number would wait for the device.
        """
        self._recent.append(loss.detach().double())
        if len(self._recent) == _BLOCK:
            self._blocks, self._recent = [*self._blocks, torch.stack(self._recent)], []
        return loss.device.type != "cpu" or math.isfinite(loss.item())

    def training_losses(self) -> Tensor:
        """The losses recorded so far; 1-d float64."""
        return torch.cat([*self._blocks, *([torch.stack(self._recent)] if self._recent else [])])

    def add_meta_loss(self, step: int, loss: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Add the meta-loss after ``step`` steps to the value.

        Args:
            step: The number of inner steps taken.
            loss: The meta-loss at the scaled iterate; 0-dim.
            log_scale: Natural logarithm of the scale; 0-dim float64.

        Returns:
            The derivative of the meta-objective with respect to ``loss`` as mantissa and binary exponent, both 0-dim
            float64.
        """
        weight = self.weights[step]
        loss = loss.detach().double()
        self._meta_losses.append(loss)
        growth = self._homogeneity * log_scale
        if self._logarithmic:
            self._value = self._value + weight * (loss.log() + growth)
            return weight / loss, torch.zeros_like(loss)
        self._value = self._value + weight * loss * growth.exp()
        return torch.full_like(loss, weight), growth / math.log(2.0)

    def result(
        self, estimator: str, reason: str, gradients: dict[str, Tensor], growth_rate: Tensor | float
    ) -> MetaGradient:
        """The finished result, with one transfer from the device.

        Raises:
            NegativeLossError: The objective takes the logarithm of a negative loss.
        """
        # Each kind of number travels in one tensor: one host synchronisation, whatever the number of steps.
        losses = self.training_losses()
        finite = [gradient.isfinite().all().to(losses.device) for gradient in gradients.values()]
        parts = [
            torch.as_tensor(self._value, dtype=torch.float64).reshape(1).to(losses.device),
            torch.as_tensor(growth_rate, dtype=torch.float64).reshape(1).to(losses.device),
            torch.stack(finite).all().double().reshape(1),
            losses,
            *([torch.stack(self._meta_losses)] if self._meta_losses else []),
        ]
        numbers = torch.cat(parts).cpu()
        value, growth, gradient_finite = numbers[0].item(), numbers[1].item(), bool(numbers[2])
        training, meta = numbers[3 : 3 + len(losses)], numbers[3 + len(losses) :]

        bad = (~training.isfinite()).nonzero().flatten().tolist()
        truncated = bad[0] + 1 if bad else None
        if self._logarithmic and truncated is None and bool((meta < 0).any()):
            raise NegativeLossError(meta[meta < 0][0].item())
        underflow = self._logarithmic and truncated is None and bool((meta == 0).any())
        overflow = truncated is None and not underflow and not (gradient_finite and math.isfinite(value))
        if truncated is not None or underflow or overflow:
            value = math.nan if truncated is not None else value
            gradients = {name: torch.full_like(gradient, math.nan) for name, gradient in gradients.items()}
        diagnostics = Diagnostics(estimator, reason, training, overflow, underflow, truncated, growth)
        return MetaGradient(value, gradients, diagnostics)


def rate_per_step(before: Tensor | None, after: Tensor | None, steps: int) -> Tensor | float:
    """Mean growth per step, natural logarithm, between two ``log2`` norms; NaN where one is missing."""
    if before is None or after is None or steps < 1:
        return math.nan
    return (after - before) * (math.log(2.0) / steps)
