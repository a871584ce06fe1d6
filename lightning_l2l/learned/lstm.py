"""The first neural optimizer: a recurrent network that every coordinate runs for itself."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_l2l.learned.coordinatewise import (
    CoordinateNetwork,
    CoordinatewiseOptimizer,
    State,
    scaled_normal_,
)
from lightning_l2l.learned.layout import Layout

Preprocessing = Literal["log_and_sign", "raw"]
_LAYERS = 2


class LSTMOptimizer(CoordinatewiseOptimizer):
    r"""A two-layer LSTM of 20 units as the optimizer, shared by all coordinates; 5141 meta-parameters.

    Each coordinate has its own hidden state (80 numbers) and sees its own gradient ``g``, as

    ``max(log(|g| + eps) / k, -1)`` and ``clip(g exp(k), -1, 1)``   (``"log_and_sign"``, two inputs)

    or as it is (``"raw"``). A linear layer on top makes the step: ``p <- p - step_multiplier * output``. (The sign is
    that of the other optimizers here; the original adds the output.) The cells are ordinary LSTM cells with 1 added
    to the forget gate, starting at zero.

    When it helps: on families of small problems, as the quadratics of its paper (with ``"raw"``). It does not see the
    time, the parameter or other coordinates, and its memory makes it the most expensive one: about 5000
    multiplications per parameter and step.

    Args:
        hidden_size: Units in each of the two layers.
        preprocessing: What the network sees of the gradient.
        preprocessing_range: k: gradients below ``exp(-k)`` count as small. 5 in the published code, 10 in the paper.
        step_multiplier: Multiplies every step; 0.01 for networks in the published code, 1 for its quadratics.
        initial_output: ``"random"``: like the other layers. ``"zero"``: the optimizer does nothing at first, as for
            the quadratics in the published code.
        normalise_output: Every step has root mean square ``step_multiplier`` in each tensor (Celo2).

    Raises:
        ValueError: A size below 1, a multiplier or a range that is not positive, an unknown name.

    Source: Andrychowicz et al. 2016 (arXiv 1606.04474), appendix A; constants as in its published code,
    ``google-deepmind/learning-to-learn``.

    Example:
        >>> sum(parameter.numel() for parameter in LSTMOptimizer().parameters())
        5141
        >>> optimizer = LSTMOptimizer().transformation()
        >>> {key: tuple(value.shape) for key, value in optimizer.init({"w": torch.zeros(3)}).items()}
        {'step': (), 'hidden': (40, 3), 'cell': (40, 3)}
    """

    def __init__(
        self,
        hidden_size: int = 20,
        preprocessing: Preprocessing = "log_and_sign",
        preprocessing_range: float = 5.0,
        step_multiplier: float = 1e-2,
        initial_output: Literal["random", "zero"] = "random",
        normalise_output: bool = False,
    ) -> None:
        super().__init__(step_multiplier, normalise_output)
        if hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size} must be at least 1.")
        if preprocessing not in get_args(Preprocessing):
            raise ValueError(f"preprocessing={preprocessing!r} must be one of {list(get_args(Preprocessing))}.")
        if not (math.isfinite(preprocessing_range) and preprocessing_range > 0):
            raise ValueError(f"preprocessing_range={preprocessing_range} must be a positive number.")
        if initial_output not in ("random", "zero"):
            raise ValueError(f"initial_output={initial_output!r} must be 'random' or 'zero'.")
        self.hidden_size = hidden_size
        self.preprocessing: Preprocessing = preprocessing
        self.preprocessing_range = float(preprocessing_range)
        self.initial_output: Literal["random", "zero"] = initial_output
        inputs = [2 if preprocessing == "log_and_sign" else 1, hidden_size]
        self.gate_weights = nn.ParameterList([torch.empty(4 * hidden_size, n + hidden_size) for n in inputs])
        self.gate_biases = nn.ParameterList([torch.zeros(4 * hidden_size) for _ in inputs])
        for weight in self.gate_weights:
            scaled_normal_(weight)
        self.output = CoordinateNetwork((hidden_size, 1), "scaled" if initial_output == "random" else "zero_output")

    def configuration(self) -> dict[str, Any]:
        """The arguments that make such an optimizer."""
        return {
            "hidden_size": self.hidden_size,
            "preprocessing": self.preprocessing,
            "preprocessing_range": self.preprocessing_range,
            "step_multiplier": self.step_multiplier,
            "initial_output": self.initial_output,
            "normalise_output": self.normalise_output,
        }

    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """``"hidden"`` and ``"cell"``, shape ``(layers * hidden_size, N)`` each."""
        shape = (_LAYERS * self.hidden_size, layout.size)
        return {"hidden": like.new_zeros(shape), "cell": like.new_zeros(shape)}

    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """See :class:`CoordinatewiseOptimizer`."""
        values = self.inputs(gradient)
        hidden, cells = [], []
        before = zip(state["hidden"].chunk(_LAYERS), state["cell"].chunk(_LAYERS), strict=True)
        for weight, bias, (memory, cell) in zip(self.gate_weights, self.gate_biases, before, strict=True):
            weight, bias = weight.to(values.device, values.dtype), bias.to(values.device, values.dtype)
            gates = torch.addmm(bias[:, None], weight, torch.cat([values, memory]))
            enter, candidate, forget, leave = gates.chunk(4)
            cell = torch.sigmoid(forget + 1.0) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
            values = torch.sigmoid(leave) * torch.tanh(cell)
            hidden.append(values)
            cells.append(cell)
        return self.output(values)[0], {"hidden": torch.cat(hidden), "cell": torch.cat(cells)}

    def inputs(self, gradient: Tensor) -> Tensor:
        """What the network sees, shape ``(2, N)`` or ``(1, N)``."""
        if self.preprocessing == "raw":
            return gradient[None]
        epsilon = torch.finfo(gradient.dtype).eps
        logarithm = (torch.log(gradient.abs() + epsilon) / self.preprocessing_range).clamp(min=-1.0)
        sign = (gradient * math.exp(self.preprocessing_range)).clamp(-1.0, 1.0)
        return torch.stack([logarithm, sign])
