"""Adds up the meta-objective and its derivative over the steps that count, and judges the result."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_l2l.exact.objectives import Objective, is_logarithmic, objective_weights
from lightning_l2l.exact.result import Diagnostics, MetaGradient

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


class Tally:
    """Collects losses during one unroll.

    The true iterate is ``scale * iterate`` with ``log(scale)`` a float64 number (always 0 unless the problem is
    homogeneous), so the true loss is ``scale**p * loss``: logarithms are exact wherever the true loss lies.

    Args:
        objective: The meta-objective.
        steps: The number of inner steps K.
        homogeneity: The degree p, or ``None``.
    """

    def __init__(self, objective: Objective, steps: int, homogeneity: float | None) -> None:
        self.weights = objective_weights(objective, steps)
        self.logarithmic = is_logarithmic(objective)
        self.homogeneity = homogeneity or 0.0
        self._blocks: list[Tensor] = []
        self._inner_losses: list[Tensor] = []
        self.meta_losses: list[Tensor] = []
        self.value: Tensor | float = 0.0

    def diverged(self, loss: Tensor) -> bool:
        """Record the loss of an inner step; whether to stop here. On an accelerator that waits until the end."""
        self._inner_losses.append(loss.detach().double())
        if len(self._inner_losses) == _BLOCK:
            self._blocks, self._inner_losses = [*self._blocks, torch.stack(self._inner_losses)], []
        return loss.device.type == "cpu" and not math.isfinite(loss.item())

    @property
    def inner_losses(self) -> Tensor:
        """The losses recorded so far; 1-d float64."""
        rest = [torch.stack(self._inner_losses)] if self._inner_losses else []
        if not (self._blocks or rest):
            return torch.zeros(0, dtype=torch.float64, device=self.meta_losses[0].device if self.meta_losses else None)
        return torch.cat([*self._blocks, *rest])

    def restore(self, inner_losses: Tensor, meta_losses: list[Tensor], value: Tensor) -> None:
        """Go on from what another tally had collected."""
        self._blocks, self._inner_losses = [inner_losses] if len(inner_losses) else [], []
        self.meta_losses, self.value = meta_losses, value

    def add(self, step: int, loss: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
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
        self.meta_losses.append(loss)
        growth = self.homogeneity * log_scale
        if self.logarithmic:
            self.value = self.value + weight * (loss.log() + growth)
            return weight / loss, torch.zeros_like(loss)
        self.value = self.value + weight * loss * growth.exp()
        return torch.full_like(loss, weight), growth / math.log(2.0)

    def result(
        self, estimator: str, reason: str, gradients: dict[str, Tensor], growth_rate: Tensor | float
    ) -> MetaGradient:
        """The finished result, with one transfer from the device.

        Raises:
            NegativeLossError: The objective takes the logarithm of a negative loss.
        """
        # Each kind of number travels in one tensor: one host synchronisation, whatever the number of steps.
        losses = self.inner_losses
        parts = [torch.as_tensor(self.value, dtype=torch.float64).reshape(1).to(losses.device)]
        parts.append(torch.as_tensor(growth_rate, dtype=torch.float64).reshape(1).to(parts[0].device))
        finite = [gradient.isfinite().all() for gradient in gradients.values()]
        parts.append(torch.stack(finite).all().double().reshape(1).to(parts[0].device) if finite else parts[0] * 0 + 1)
        parts.append(losses)
        if self.meta_losses:
            parts.append(torch.stack(self.meta_losses))
        numbers = torch.cat(parts).cpu()
        value, growth, gradient_finite = numbers[0].item(), numbers[1].item(), bool(numbers[2])
        inner, meta = numbers[3 : 3 + len(losses)], numbers[3 + len(losses) :]

        bad = (~inner.isfinite()).nonzero().flatten().tolist()
        truncated = bad[0] + 1 if bad else None
        if self.logarithmic and truncated is None and bool((meta < 0).any()):
            raise NegativeLossError(meta[meta < 0][0].item())
        underflow = self.logarithmic and truncated is None and bool((meta == 0).any())
        overflow = truncated is None and not underflow and not (gradient_finite and math.isfinite(value))
        if truncated is not None or underflow or overflow:
            if truncated is not None:
                value = math.nan
            gradients = {name: torch.full_like(gradient, math.nan) for name, gradient in gradients.items()}
        return MetaGradient(
            value,
            gradients,
            Diagnostics(estimator, reason, inner, overflow, underflow, truncated, growth),
        )


def rate_per_step(before: Tensor | None, after: Tensor | None, steps: int) -> Tensor | float:
    """Mean growth per step, natural logarithm, between two ``log2`` norms; NaN where one is missing."""
    if before is None or after is None or steps < 1:
        return math.nan
    return (after - before) * (math.log(2.0) / steps)
