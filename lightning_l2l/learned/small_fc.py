"""The successor of the MLP optimizer: factored second moments, learned decays, a network of a few units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.learned.coordinatewise import CoordinatewiseOptimizer, State
from lightning_l2l.learned.factored import column_sizes, factored_features, row_sizes
from lightning_l2l.learned.features import (
    TIMESCALES,
    LearnedDecays,
    constant,
    moving_average,
    normalised,
    time_features,
)
from lightning_l2l.learned.layout import Layout
from lightning_l2l.learned.network import CoordinateNetwork, Initialisation, combined_step

_MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
_SECOND_MOMENT_DECAY = 0.999
_FACTORED_DECAYS = (0.9, 0.99, 0.999)
_FEATURES = 28


class SmallFCOptimizer(CoordinatewiseOptimizer):
    r"""``small_fc_lopt``: 39 features, two small hidden layers, learned decays; 197 meta-parameters at width 4.

    For each number ``p`` with gradient ``g``: three momenta ``m`` (decays 0.9, 0.99, 0.999), a second moment ``v``
    (0.999) and three factored second moments (0.9, 0.99, 0.999; see
    :func:`~lightning_l2l.learned.factored.factored_features`), all starting at zero, without bias correction, all
    decays learned. With ``R C`` the factored ``v**-1/2`` the features are, in order,

    ``g, p, m (3), v, m (v + 1e-6)**-1/2 (3), (v + 1e-6)**-1/2, g R C (3), row (3), column (3), row**-1/2 (3),
    column**-1/2 (3), m R C (3)``   (28, each normalised over its tensor),

    and with the step number ``t = 0, 1, ...`` eleven ``tanh(t / tau - 1)``. Two outputs d and a, and
    ``p <- p - step_multiplier * d * exp(exponent_multiplier * a)``.

    When it helps: the general-purpose choice of the literature. Wider networks (PyLO and muLO use 32) learn more and
    take longer to train. State: four numbers per parameter, plus rows and columns.

    Args:
        hidden_size: Units in each of the two hidden layers.
        step_multiplier: Multiplies every step. 1e-3 in ``learned_optimization``, 1e-2 in PyLO and muLO.
        exponent_multiplier: Multiplies the output that scales the step; 0 switches it off.
        initialisation: See :class:`~lightning_l2l.learned.network.CoordinateNetwork`.
        normalise_output: Every step has root mean square ``step_multiplier`` in each tensor (Celo2).

    Raises:
        ValueError: A size below 1, a multiplier that is not positive, an unknown initialisation.

    Source: Metz, Freeman, Harrison, Maheswaranathan, Sohl-Dickstein 2022 (arXiv 2203.11860); constants and order of
    the features as in ``learned_optimization/learned_optimizers/adafac_mlp_lopt.py``.

    Example:
        >>> sum(parameter.numel() for parameter in SmallFCOptimizer().parameters())
        197
        >>> learned = SmallFCOptimizer(hidden_size=8, normalise_output=True)
        >>> parameters = {"w": torch.randn(3, 2), "b": torch.randn(3)}
        >>> optimizer = learned.transformation()
        >>> updates, _ = optimizer.update(parameters, optimizer.init(parameters), params=parameters)
        >>> round(updates["w"].square().mean().sqrt().item(), 6)
        0.001
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
        self._timescales = constant(TIMESCALES)
        self.momentum_decays = LearnedDecays(_MOMENTUM_DECAYS)
        self.second_moment_decay = LearnedDecays([_SECOND_MOMENT_DECAY])
        self.factored_decays = LearnedDecays(_FACTORED_DECAYS)
        self.network = CoordinateNetwork(
            (_FEATURES + len(TIMESCALES), hidden_size, hidden_size, 2), initialisation, sees_time=len(TIMESCALES)
        )

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
        """Averages: ``"momenta" (3, N)``, ``"second_moments" (1, N)``, ``"rows"`` and ``"columns"`` ``(3, ...)``."""
        count = len(_FACTORED_DECAYS)
        return {
            "momenta": like.new_zeros(len(_MOMENTUM_DECAYS), layout.size),
            "second_moments": like.new_zeros(1, layout.size),
            "rows": like.new_zeros(count, sum(row_sizes(layout))),
            "columns": like.new_zeros(count, sum(column_sizes(layout))),
        }

    def extents(self, layout: Layout) -> Mapping[str, list[int]]:
        """Rows and columns are shorter than N."""
        return {"rows": row_sizes(layout), "columns": column_sizes(layout)}

    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """See :class:`CoordinatewiseOptimizer`."""
        features, time, averages = self.features(gradient, parameter, state, layout)
        direction, magnitude = self.network(features, time).unbind(0)
        return combined_step(direction, magnitude, self.exponent_multiplier), averages

    def features(
        self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout
    ) -> tuple[Tensor, Tensor, State]:
        """The 28 normalised features ``(28, N)``, the eleven of the time ``(11,)``, and the next averages."""
        momenta = moving_average(state["momenta"], gradient, self.momentum_decays.weights())
        # A decay below 0 would make a second moment negative.
        weight = self.second_moment_decay.weights(largest=1.0)
        second_moments = moving_average(state["second_moments"], gradient.square(), weight)
        root = torch.rsqrt(second_moments + 1e-6)
        factored, rows, columns = factored_features(
            gradient, momenta, state["rows"], state["columns"], self.factored_decays.weights(largest=1.0), layout
        )
        raw = torch.cat([gradient[None], parameter[None], momenta, second_moments, momenta * root, root, factored])
        time = time_features(state["step"], self._timescales, raw.dtype)
        averages = {"momenta": momenta, "second_moments": second_moments, "rows": rows, "columns": columns}
        return normalised(raw, layout), time, averages

    def project_(self) -> None:
        """Keeps the decays between 0 and 1."""
        for decays in (self.momentum_decays, self.second_moment_decay, self.factored_decays):
            decays.project_()
