"""The successor of the MLP optimizer: factored second moments, learned decays, a network of a few units."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_l2l.learned.coordinatewise import (
    FeatureOptimizer,
    Initialisation,
    LearnedDecays,
    State,
    moving_average,
    normalised,
    time_features,
)
from lightning_l2l.learned.layout import Layout, SameShape

_MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
_SECOND_MOMENT_DECAY = 0.999
_FACTORED_DECAYS = (0.9, 0.99, 0.999)
# learned_optimization's embedding of the step number.
_TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


class SmallFCOptimizer(FeatureOptimizer):
    r"""``small_fc_lopt``: 39 features, two small hidden layers, learned decays; 197 meta-parameters at width 4.

    For each number ``p`` with gradient ``g``: three momenta ``m`` (decays 0.9, 0.99, 0.999), a second moment ``v``
    (0.999) and three factored second moments (0.9, 0.99, 0.999; see :func:`factored_features`), all starting at zero,
    without bias correction, all decays learned. With ``R C`` the factored ``v**-1/2`` the features are, in order,

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
        initialisation: See :class:`~lightning_l2l.learned.coordinatewise.CoordinateNetwork`.
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
        super().__init__(
            28, _TIMESCALES, 2, hidden_size=hidden_size, step_multiplier=step_multiplier,
            exponent_multiplier=exponent_multiplier, initialisation=initialisation, normalise_output=normalise_output,
        )  # fmt: skip
        self.momentum_decays = LearnedDecays(_MOMENTUM_DECAYS)
        self.second_moment_decay = LearnedDecays([_SECOND_MOMENT_DECAY])
        self.factored_decays = LearnedDecays(_FACTORED_DECAYS)

    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """Averages: ``"momenta" (3, N)``, ``"second_moments" (1, N)``, ``"rows"`` and ``"columns"`` ``(3, ...)``."""
        sizes = self.extents(layout)
        return {
            "momenta": like.new_zeros(len(_MOMENTUM_DECAYS), layout.size),
            "second_moments": like.new_zeros(1, layout.size),
            "rows": like.new_zeros(len(_FACTORED_DECAYS), sum(sizes["rows"])),
            "columns": like.new_zeros(len(_FACTORED_DECAYS), sum(sizes["columns"])),
        }

    def extents(self, layout: Layout) -> Mapping[str, list[int]]:
        """Rows and columns are shorter than N."""
        sizes = [_factored_sizes(part) for part in layout.parts for _ in part.names]
        return {"rows": [rows for rows, _ in sizes], "columns": [columns for _, columns in sizes]}

    def features(
        self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout
    ) -> tuple[Tensor, Tensor, State]:
        """28 normalised features, eleven of the time, and the next averages."""
        momenta = moving_average(state["momenta"], gradient, self.momentum_decays.weights())
        # A decay below 0 would make a second moment negative.
        weight = self.second_moment_decay.weights(largest=1.0)
        second_moments = moving_average(state["second_moments"], gradient.square(), weight)
        root = torch.rsqrt(second_moments + 1e-6)
        factored, rows, columns = factored_features(
            gradient, momenta, state["rows"], state["columns"], self.factored_decays.weights(largest=1.0), layout
        )
        raw = torch.cat([gradient[None], parameter[None], momenta, second_moments, momenta * root, root, factored])
        time = time_features(state["step"], self.timescales, raw.dtype)
        averages = {"momenta": momenta, "second_moments": second_moments, "rows": rows, "columns": columns}
        return normalised(raw, layout), time, averages

    def project_(self) -> None:
        """Keeps the decays between 0 and 1."""
        for decays in (self.momentum_decays, self.second_moment_decay, self.factored_decays):
            decays.project_()


# learned_optimization's constants (common.py and adafac_mlp_lopt.py), so that its formulas are reproduced.
_SQUARE, _ROOT, _MEAN, _FEATURE, _UNFACTORED_MOMENTUM = 1e-30, 1e-9, 1e-9, 1e-8, 1e-6


def factored_features(
    gradient: Tensor, momenta: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The six kinds of features from factored second moments, and the moments themselves one step on.

    Factored: the memory of a row and a column instead of a matrix (Adafactor, arXiv 1804.04235). For a tensor with two
    or more dimensions, ``row`` is the moving average of the mean of ``g**2`` over the largest dimension, ``column``
    over the second largest; ``R = (row / mean(row))**-1/2``, ``C = column**-1/2``. The features are ``g R C``,
    ``row``, ``column``, ``row**-1/2``, ``column**-1/2`` and ``m R C``. For vectors and scalars ``row`` and ``column``
    are both the moving average of ``g**2``, and ``R C`` its ``-1/2``-th power.

    Args:
        gradient: ``(N,)``.
        momenta: ``(K, N)``, already updated.
        rows: ``(K, ...)``; see :meth:`SmallFCOptimizer.extents`.
        columns: ``(K, ...)``.
        weights: ``(K,)``, one minus the decays.
        layout: Where the tensors lie.

    Returns:
        Features ``(6 K, N)``, rows, columns.
    """
    sizes = [[size * len(part.names) for size in _factored_sizes(part)] for part in layout.parts]
    given = zip(
        layout.parts,
        layout.split(gradient),
        layout.split(momenta),
        rows.split([size for size, _ in sizes], dim=-1),
        columns.split([size for _, size in sizes], dim=-1),
        strict=True,
    )
    found = [
        (_matrices if part.factored else _vectors)(part, own_gradient, own_momenta, row, column, weights)
        for part, own_gradient, own_momenta, row, column in given
    ]
    features, new_rows, new_columns = zip(*found, strict=True)
    return layout.join(features), torch.cat(new_rows, -1), torch.cat(new_columns, -1)


def _matrices(
    part: SameShape, gradient: Tensor, momenta: Tensor, rows: Tensor, columns: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    assert part.factored is not None
    second, largest = (position + 1 for position in part.factored)  # after the axis of the tensors
    shaped = gradient.unflatten(-1, part.shape)
    square = shaped.square() + _SQUARE
    over_largest, over_second = square.mean(largest, keepdim=True), square.mean(second, keepdim=True)
    row = moving_average(rows.reshape(-1, *over_largest.shape), over_largest, weights)
    column = moving_average(columns.reshape(-1, *over_second.shape), over_second, weights)
    row_factor = _safe_rsqrt(row / (row.mean(second + 1, keepdim=True) + _MEAN))
    factor = row_factor * _safe_rsqrt(column)
    features = [
        shaped * factor,
        row.expand(factor.shape),
        column.expand(factor.shape),
        torch.rsqrt(row + _FEATURE).expand(factor.shape),
        torch.rsqrt(column + _FEATURE).expand(factor.shape),
        momenta.unflatten(-1, part.shape) * factor,
    ]
    return torch.cat(features).flatten(2), row.flatten(1), column.flatten(1)


def _vectors(
    part: SameShape, gradient: Tensor, momenta: Tensor, rows: Tensor, columns: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    moment = moving_average(rows.reshape(-1, *gradient.shape), gradient.square() + _SQUARE, weights)
    root = torch.rsqrt(moment + _FEATURE)
    features = [
        gradient * _safe_rsqrt(moment + _ROOT),
        moment,
        moment,
        root,
        root,
        momenta * torch.rsqrt(moment + _UNFACTORED_MOMENTUM),
    ]
    return torch.cat(features), moment.flatten(1), columns


def _safe_rsqrt(tensor: Tensor) -> Tensor:
    return torch.rsqrt(tensor.clamp(min=_ROOT))


def _factored_sizes(part: SameShape) -> tuple[int, int]:
    """Numbers that row and column moments of one of the tensors take."""
    if part.factored is None:
        return part.size, 0
    second, largest = part.factored
    # Not size // shape[dimension]: a dimension may be zero.
    row, column = (math.prod(n for place, n in enumerate(part.shape) if place != gone) for gone in (largest, second))
    return row, column
