"""What a meta-gradient computation returns: the value, the gradients, and whether they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Diagnostics:
    """How the unroll went.

    Attributes:
        estimator: The estimator that was used, e.g. ``"forward"``.
        reason: Why it was chosen.
        losses: Loss of each inner step on its own batch, before the step; shape ``[steps]``, float64, on the CPU. Empty
            for ``"displacement"``, which looks at no single step.
        overflow: A loss, or the meta-gradient, left the number range upwards (or became NaN).
        underflow: The meta-loss is exactly zero, so its logarithm does not exist.
        truncated_step: The first step (from 1) whose loss was not finite, ``None`` if there was none. The
            unroll stopped there.
        growth_rate: Natural logarithm of the factor per step by which the derivative of the parameters with
            respect to the meta-parameters (forward) or the adjoint (reverse) grows: an estimate of the largest
            Lyapunov exponent. Above zero, the meta-gradient explodes with the number of steps. NaN for fewer than
            two steps, and for ``"displacement"``, which leaves curvature out.
        standard_error: For estimators that sample: the standard error of each meta-gradient, by meta-parameter.
            Empty for exact ones.
        notes: Further remarks, e.g. how particles were computed.
        training_gradients: What the last training batch says where the meta-batch says :attr:`MetaGradient.gradients`:
            the derivative of its loss, before its step, with respect to each meta-parameter. It comes for free where a
            tangent is carried (``"displacement"``; ``"forward"`` and ``"live"``, at least two steps); empty elsewhere.
            For comparing directions: it is the loss's derivative, not the meta-objective's.
    """

    estimator: str
    reason: str
    losses: Tensor
    overflow: bool
    underflow: bool
    truncated_step: int | None
    growth_rate: float
    standard_error: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    training_gradients: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MetaGradient:
    """Value and gradient of a meta-objective.

    Attributes:
        value: The meta-objective. ``inf``, ``-inf`` or NaN where it has left the number range.
        gradients: Derivative for each meta-parameter, by name, in the meta-parameter's shape, dtype and device.
            NaN, never zero, wherever it could not be computed.
        diagnostics: How the unroll went.
        bounds: For each meta-parameter what the absolute value of its gradient could be at most, given how long the two
            vectors are that it is the inner product of; only of the estimator ``"displacement"``.
    """

    value: float
    gradients: Mapping[str, Tensor]
    diagnostics: Diagnostics
    bounds: Mapping[str, Tensor] = field(default_factory=dict)

    def relative(self) -> dict[str, Tensor]:
        """The gradients, divided by their bounds where these are known: cosines then, which no large loss outweighs."""
        return {
            name: gradient / torch.where(self.bounds[name] > 0, self.bounds[name], 1.0)
            if name in self.bounds
            else gradient
            for name, gradient in self.gradients.items()
        }

    @property
    def usable(self) -> bool:
        """Whether the gradient may be applied, being finite, not truncated, neither over- nor underflown."""
        state = self.diagnostics
        return math.isfinite(self.value) and not (state.overflow or state.underflow or state.truncated_step is not None)

    def explain(self) -> str:
        """One plain sentence on why the gradient is, or is not, usable.

        Example:
            >>> import torch
            >>> diagnostics = Diagnostics("forward", "", torch.zeros(0), False, False, None, 0.0)
            >>> MetaGradient(0.5, {}, diagnostics).explain()
            'The meta-gradient is finite and complete.'
        """
        state = self.diagnostics
        if state.truncated_step is not None:
            return (
                f"The unrolled training diverged: the loss of step {state.truncated_step} is not finite. "
                "The step size is too large."
            )
        if state.underflow:
            return "The meta-loss is exactly zero, so its logarithm and its meta-gradient do not exist."
        if state.overflow or not math.isfinite(self.value):
            return (
                "The meta-objective or its gradient left the number range. "
                "The step size is too large, or the unroll too long for it."
            )
        return "The meta-gradient is finite and complete."
