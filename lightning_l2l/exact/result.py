"""What a meta-gradient computation returns: the value, the gradients, and whether they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Diagnostics:
    """How the unroll went.

    Attributes:
        estimator: How the gradient was computed: ``"forward"``, ``"reverse"``, ``"segmented"``, ``"es"``, ``"pes"`` or
            ``"es_single"``.
        reason: Why it was computed that way.
        losses: Loss of each inner step on its own batch, before the step; shape ``[steps]``, float64, on the CPU.
        overflow: A loss, or the meta-gradient, left the number range upwards (or became NaN).
        underflow: The meta-loss is exactly zero, so its logarithm does not exist.
        truncated_step: The first step (from 1) whose loss was not finite, ``None`` if there was none. The unroll
            stopped there.
        growth_rate: Natural logarithm of the factor per step by which the derivative of the parameters with respect
            to the meta-parameters (forward) or the adjoint (reverse) grows: an estimate of the largest Lyapunov
            exponent. Above zero, the meta-gradient explodes with the number of steps. NaN for fewer than two steps,
            and for evolution strategies.
        standard_error: For evolution strategies: the standard error of each meta-gradient, by meta-parameter.
        notes: Further remarks, e.g. how the particles were computed.
    """

    estimator: str
    reason: str
    losses: Tensor
    overflow: bool = False
    underflow: bool = False
    truncated_step: int | None = None
    growth_rate: float = math.nan
    standard_error: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MetaGradient:
    """Value and gradient of a meta-objective.

    Attributes:
        value: The meta-objective. ``inf``, ``-inf`` or NaN where it has left the number range.
        gradients: Derivative for each meta-parameter, by name, in the meta-parameter's shape, dtype and device.
            NaN, never zero, wherever it could not be computed.
        diagnostics: How the unroll went.
    """

    value: float
    gradients: Mapping[str, Tensor]
    diagnostics: Diagnostics

    @property
    def usable(self) -> bool:
        """Whether the gradient may be applied, being finite, not truncated, neither over- nor underflown."""
        state = self.diagnostics
        return math.isfinite(self.value) and not (state.overflow or state.underflow or state.truncated_step is not None)

    def explain(self) -> str:
        """One sentence on why the gradient is, or is not, usable.

        Example:
            >>> import torch
            >>> MetaGradient(0.5, {}, Diagnostics("forward", "", torch.zeros(0))).explain()
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
