"""The small network that all coordinates share, and the step that its outputs make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_l2l.learned.features import normalised
from lightning_l2l.learned.layout import Layout

Initialisation = Literal["reference", "scaled", "zero_output"]


class CoordinateNetwork(nn.Module):
    """A multilayer perceptron applied to every coordinate: the same weights, ReLU between the layers.

    Feature-major: maps ``(features, N)`` to ``(outputs, N)`` by one matrix product for each layer. Inputs that are the
    same for all coordinates (the time) go into the bias of the first layer instead: no memory, and the same numbers.

    Args:
        sizes: Number of inputs, of units in each hidden layer, of outputs.
        initialisation: ``"reference"``: weights N(0, 1), biases 0.1, as in the paper's code; outputs are large at
            first, a random walk. ``"scaled"``: truncated normal weights of variance 1 / inputs, biases
            zero, as in ``learned_optimization``; outputs of order one. ``"zero_output"``: ``"scaled"`` with the
            last layer zero; the optimizer does nothing at first.
        sees_time: Inputs that are the same for all coordinates, the last ones of ``sizes[0]``.

    Example:
        >>> network = CoordinateNetwork((3, 8, 2), sees_time=1)
        >>> network(torch.zeros(2, 5), torch.zeros(1)).shape
        torch.Size([2, 5])
    """

    def __init__(self, sizes: Sequence[int], initialisation: Initialisation = "scaled", sees_time: int = 0) -> None:
        """See the class."""
        super().__init__()
        check_initialisation(initialisation)
        self._coordinate_inputs = sizes[0] - sees_time
        self.weights = nn.ParameterList([torch.empty(outputs, inputs) for inputs, outputs in pairwise(sizes)])
        self.biases = nn.ParameterList([torch.empty(outputs) for outputs in sizes[1:]])
        for weight in self.weights:
            initialise_(weight, initialisation)
        for bias in self.biases:
            nn.init.constant_(bias, 0.1 if initialisation == "reference" else 0.0)
        if initialisation == "zero_output":
            nn.init.zeros_(self.weights[-1])

    def layers(self, like: Tensor, time: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer in the dtype and on the device of ``like``, the time in the first bias."""
        found = []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            weight, bias = weight.to(like.device, like.dtype), bias.to(like.device, like.dtype)
            if index == 0 and time is not None:
                bias = bias + weight[:, self._coordinate_inputs :] @ time
                weight = weight[:, : self._coordinate_inputs]
            found.append((weight, bias))
        return found

    def forward(self, features: Tensor, time: Tensor | None = None) -> Tensor:
        """The outputs, shape ``(outputs, N)``, in the features' dtype and on their device."""
        values = features
        for index, (weight, bias) in enumerate(self.layers(features, time)):
            if index > 0:
                values = torch.relu(values)
            values = torch.addmm(bias[:, None], weight, values)
        return values


def initialise_(weight: Tensor, initialisation: Initialisation) -> None:
    """Draws a weight matrix of shape ``(outputs, inputs)`` in place."""
    if initialisation == "reference":
        nn.init.normal_(weight)
        return
    deviation = 1.0 / math.sqrt(weight.shape[1])
    nn.init.trunc_normal_(weight, 0.0, deviation, -2.0 * deviation, 2.0 * deviation)


def check_initialisation(initialisation: str) -> None:
    """Refuses an unknown name.

    Raises:
        ValueError: ``initialisation`` is none of the three.
    """
    if initialisation not in get_args(Initialisation):
        raise ValueError(
            f"initialisation={initialisation!r} is not known; choose one of {list(get_args(Initialisation))}."
        )


def combined_step(direction: Tensor, magnitude: Tensor, exponent_multiplier: float) -> Tensor:
    """``direction * exp(exponent_multiplier * magnitude)``; the magnitude is unused where the multiplier is 0."""
    if exponent_multiplier == 0:
        return direction
    return direction * torch.exp(exponent_multiplier * magnitude)


def unit_step(step: Tensor, layout: Layout) -> Tensor:
    """A step of root mean square one in each tensor (Celo2, arXiv 2602.19142)."""
    return normalised(step, layout, epsilon=1e-9)
