"""The neural optimizer that fits on a page: 24 meta-parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_l2l.learned.coordinatewise import CoordinatewiseOptimizer, State
from lightning_l2l.learned.features import LearnedDecays, moving_average, normalised
from lightning_l2l.learned.layout import Layout
from lightning_l2l.learned.network import CoordinateNetwork, Initialisation, combined_step


class TinyOptimizer(CoordinatewiseOptimizer):
    r"""Two features, four hidden units, two learned decays.

    For each number with gradient ``g``: a momentum ``m`` (decay 0.9) and a second moment ``v`` (0.999), from zero and
    without bias correction. Features ``m`` and ``m (v + 1e-6)**-1/2``, normalised over their tensor: the directions of
    momentum descent and of Adam. One hidden layer of ReLU units, two outputs d and a, and
    ``p <- p - step_multiplier * d * exp(exponent_multiplier * a)``. It does not see the time.

    When it helps: for demonstrations and as a first try; it trains in minutes and can be plotted whole.

    Args:
        hidden_size: Units in the hidden layer.
        step_multiplier: Multiplies every step.
        exponent_multiplier: Multiplies the output that scales the step; 0 switches it off.
        initialisation: See :class:`~lightning_l2l.learned.network.CoordinateNetwork`.
        normalise_output: Every step has root mean square ``step_multiplier`` in each tensor (Celo2).

    Source: ``ExtraSmallLOpt`` of ``learned_optimization/research/hysteresis/extra_small_lopt.py``.

    Example:
        >>> sum(parameter.numel() for parameter in TinyOptimizer().parameters())
        24
    """

    def __init__(
        self,
        hidden_size: int = 4,
        step_multiplier: float = 1e-3,
        exponent_multiplier: float = 1e-3,
        initialisation: Initialisation = "scaled",
        normalise_output: bool = False,
    ) -> None:
        """See the class."""
        super().__init__(step_multiplier, normalise_output)
        if hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size} must be at least 1.")
        self.hidden_size = hidden_size
        self.exponent_multiplier = float(exponent_multiplier)
        self.initialisation: Initialisation = initialisation
        self.momentum_decay = LearnedDecays([0.9])
        self.second_moment_decay = LearnedDecays([0.999])
        self.network = CoordinateNetwork((2, hidden_size, 2), initialisation)

    def configuration(self) -> dict[str, Any]:
        """The arguments that make such an optimizer."""
        return {
            "hidden_size": self.hidden_size,
            "step_multiplier": self.step_multiplier,
            "exponent_multiplier": self.exponent_multiplier,
            "initialisation": self.initialisation,
            "normalise_output": self.normalise_output,
        }

    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """``"momenta"`` and ``"second_moments"``, shape ``(1, N)`` each."""
        return {"momenta": like.new_zeros(1, layout.size), "second_moments": like.new_zeros(1, layout.size)}

    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """See :class:`CoordinatewiseOptimizer`."""
        momenta = moving_average(state["momenta"], gradient, self.momentum_decay.weights())
        # A decay below 0 would make the second moment negative.
        weight = self.second_moment_decay.weights(largest=1.0)
        second_moments = moving_average(state["second_moments"], gradient.square(), weight)
        features = torch.cat([momenta, momenta * torch.rsqrt(second_moments + 1e-6)])
        direction, magnitude = self.network(normalised(features, layout)).unbind(0)
        step = combined_step(direction, magnitude, self.exponent_multiplier)
        return step, {"momenta": momenta, "second_moments": second_moments}

    def project_(self) -> None:
        """Keeps the decays between 0 and 1."""
        self.momentum_decay.project_()
        self.second_moment_decay.project_()
