"""A rule to take as it is: a small network that corrects Adam's direction, with steps of a known size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_l2l.learned.coordinatewise import (
    CoordinateNetwork,
    CoordinatewiseOptimizer,
    State,
    constant,
    moving_average,
)
from lightning_l2l.learned.layout import Layout, SameShape

_MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
_SECOND_MOMENT_DECAYS = (0.95, 0.999)
_COORDINATE_FEATURES, _TENSOR_FEATURES = 13, 8


class UnitStepOptimizer(CoordinatewiseOptimizer):
    r"""Adam's direction, corrected by two layers of eight units, in steps whose size per tensor is normalised.

    For each number ``p`` with gradient ``g``: momenta ``m`` (decays 0.9, 0.99, 0.999) and second moments ``v`` (0.95,
    0.999), all with bias correction, and ``f``, the factored form of ``v`` (from its means over rows and columns). Of a
    coordinate the network sees

    ``m (3), g, p, m / sqrt(v_0.999) (3), g / sqrt(v_0.999), m_0.9 / sqrt(v_0.95), g / sqrt(f), m_0.9 / sqrt(f),
    sqrt(v_0.999)``   (13, each divided by its root mean square over the tensor),

    of its tensor the root mean squares of ``m / sqrt(v_0.999)`` (3: how much of the gradient is signal), the cosines of
    ``g`` with the momenta before it (2) and of the momenta among each other (1), whether it is a matrix, and the
    logarithm of the root mean square of ``p``. With the outputs d and a

    ``p <- p - step_multiplier * exp(mean(a)) * u / rms(u)``,   ``u = m_0.9 / sqrt(v_0.999) / rms(...) + d``,

    the means over the tensor. With the last layer at zero, as it is drawn, that is Adam with steps of unit size.

    When it helps: where no rate has been tuned. ``LearnedOptimizer.pretrained("unit_step")`` was meta-trained with a
    linear schedule on trainings of 60 to 400 steps of small networks (8 x 8 digits, text, random teachers) by
    ``python examples/pretrained/train.py``, seed 0 (six minutes of one core; done twice, with the same weights to the
    last bit). At ``lr=1`` and with that schedule, on ten networks and data sets that it had not seen together, 300 and
    1000 steps (``python examples/pretrained/compare.py --seeds 2``), its test loss was 1.05 times (median) that of
    AdamW at the best of eleven rates *for each task*, from 0.51 (convnet with BatchNorm) to 2.3 (matrix factorisation),
    and below that of AdamW at 1e-3 on 15 of 20. So it is **not better than a tuned AdamW**. It overfits small tables:
    1.2 and 1.6 on 265 rows (diabetes), and on 106 rows that AdamW separates (wine) the test loss was 0.22 and 0.16
    instead of 0.0001 and 0.02. Longer trainings and larger networks were not tried.

    Cost: 21 features and two small layers for each number: 82 ms for a million parameters on one core, where AdamW
    (foreach) takes 1.7. State: five numbers per parameter.

    Args:
        hidden_size: Units in each of the two hidden layers.
        step_multiplier: Root mean square of a step at ``lr=1``, where a is 0.

    Raises:
        ValueError: A size below 1, or a multiplier that is not positive.

    Source: normalised steps and the size of the network as in Celo2 (arXiv 2602.19142); that the network corrects
    Adam's direction, and the features of a tensor, are ours.

    Example:
        >>> learned = UnitStepOptimizer()
        >>> sum(parameter.numel() for parameter in learned.parameters())
        266
        >>> parameters = {"w": torch.randn(3, 2), "b": torch.randn(3)}
        >>> optimizer = learned.transformation()
        >>> updates, _ = optimizer.update(parameters, optimizer.init(parameters), params=parameters)
        >>> round(updates["w"].square().mean().sqrt().item(), 4)
        0.006
    """

    def __init__(self, hidden_size: int = 8, step_multiplier: float = 6e-3) -> None:
        super().__init__(step_multiplier, normalise_output=False)
        self.hidden_size = hidden_size
        sizes = (_COORDINATE_FEATURES + _TENSOR_FEATURES, hidden_size, hidden_size, 2)
        self.network = CoordinateNetwork(sizes, "zero_output")
        self._momentum_weights = constant([1.0 - decay for decay in _MOMENTUM_DECAYS])
        self._second_moment_weights = constant([1.0 - decay for decay in _SECOND_MOMENT_DECAYS])

    def configuration(self) -> dict[str, Any]:
        """The arguments that make such an optimizer."""
        return {"hidden_size": self.hidden_size, "step_multiplier": self.step_multiplier}

    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """``"momenta"``, shape ``(3, N)``, and ``"second_moments"``, ``(2, N)``."""
        return {"momenta": like.new_zeros(3, layout.size), "second_moments": like.new_zeros(2, layout.size)}

    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """See :class:`CoordinatewiseOptimizer`."""
        momenta = moving_average(state["momenta"], gradient, self._momentum_weights)
        second_moments = moving_average(state["second_moments"], gradient.square(), self._second_moment_weights)
        count = state["step"] + 1
        unbiased = [
            _unbiased(m, w, count)
            for m, w in ((momenta, self._momentum_weights), (second_moments, self._second_moment_weights))
        ]
        given = (layout.split(rows) for rows in (gradient[None], parameter[None], state["momenta"], *unbiased))
        found = [_features(part, *tensors) for part, *tensors in zip(layout.parts, *given, strict=True)]
        direction, magnitude = self.network(layout.join([features for features, _ in found])).unbind(0)
        steps = []
        for d, a, (_, adam) in zip(layout.split(direction), layout.split(magnitude), found, strict=True):
            moved = adam + d
            size = torch.exp(a.mean(-1, keepdim=True).clamp(-3.0, 3.0))
            steps.append(moved * size * _inverse_rms(moved))
        return layout.join(steps), {"momenta": momenta, "second_moments": second_moments}


def _unbiased(average: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    # 1 - decay**count, from the logarithm of the decay: exact for decays near 1.
    share = -torch.expm1(torch.log1p(-weights.to(count.device)) * count)
    return average / share.to(average.dtype)[:, None]


def _inverse_rms(values: Tensor) -> Tensor:
    return torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-12)


def _features(
    part: SameShape, gradient: Tensor, parameter: Tensor, before: Tensor, momenta: Tensor, second_moments: Tensor
) -> tuple[Tensor, Tensor]:
    """What the network sees of tensors of one shape, ``(features, tensors, size)``, and Adam's direction."""
    # Relative to the tensor's own second moment, so that nothing depends on the scale of the loss.
    scale = torch.rsqrt(second_moments[1:].mean(-1, keepdim=True) + 1e-24)
    root = torch.rsqrt(second_moments + 1e-6 * second_moments[1:].mean(-1, keepdim=True) + 1e-24)
    adam = momenta * root[1:]
    factored = _factored_root(part, second_moments[1:])
    raw = torch.cat(
        [
            momenta * scale,
            gradient * scale,
            parameter,
            adam,
            gradient * root[1:],
            momenta[:1] * root[:1],
            gradient * factored,
            momenta[:1] * factored,
            second_moments[1:] * root[1:] * scale,
        ]
    )
    # Biases start at zero: divided by their size alone, they would be infinitely steep there.
    floor = torch.full_like(raw[:, 0, 0], 1e-12)
    floor[4] = 1e-3
    inverse = torch.rsqrt(raw.square().mean(-1, keepdim=True) + floor[:, None, None])
    unit, past = raw * inverse, before * _inverse_rms(before * scale) * scale
    cosines = [(unit[3:4] * past[:2]).mean(-1, keepdim=True), (unit[:1] * unit[2:3]).mean(-1, keepdim=True)]
    matrix = torch.full_like(cosines[1], float(len(part.shape) > 1))
    of_tensor = torch.cat([1.0 / inverse[5:8], *cosines, matrix, -0.3 * torch.log(inverse[4:5])])
    return torch.cat([unit, of_tensor.expand(-1, -1, raw.shape[-1])]), unit[5]


def _factored_root(part: SameShape, second_moment: Tensor) -> Tensor:
    """Like ``v**-1/2``, of the product of the means of v over rows and columns (Adafactor, arXiv 1804.04235)."""
    mean = second_moment.mean(-1, keepdim=True) + 1e-24
    if part.factored is None:
        return torch.rsqrt(second_moment + 1e-6 * mean)
    second, largest = (position + 2 for position in part.factored)  # after the axes of the feature and of the tensors
    shaped = second_moment.unflatten(-1, part.shape)
    product = shaped.mean(largest, keepdim=True) * shaped.mean(second, keepdim=True)
    whole = mean.reshape(*mean.shape[:2], *[1] * len(part.shape))
    return torch.rsqrt(product / whole + 1e-6 * whole).flatten(2)
