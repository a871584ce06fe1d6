"""What the neural optimizers have in common: one small network for every number of every tensor.

Everything is laid out *feature-major*, shape ``(features, N)`` with N the elements of all tensors together: the
long axis is the contiguous one. All functions are out of place, differentiable twice and in forward mode, and free
of control flow that depends on data, so they can be batched over tasks with ``torch.func.vmap``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.layout import Layout

State = dict[str, Tensor]
Initialisation = Literal["reference", "scaled", "zero_output"]


class CoordinatewiseOptimizer(LearnedOptimizer):
    """A learned optimizer with one small network for all coordinates of all tensors.

    All parameters are concatenated to one vector of N elements, so one step is one call of the network, whatever the
    number of tensors. A subclass gives the state at the start and the step; all else is here.

    The state is a dictionary of tensors: ``"step"``, the number of steps taken (0-dim int64), and the subclass's
    averages, whose last axis is N (see :meth:`extents`). The arithmetic is in the parameters' dtype, at least
    float32. A parameter whose gradient is ``None`` is not moved and its averages are kept.

    Under ``torch.func.vmap`` gradients, state and parameters may have a leading task axis (and no gradient may be
    ``None``).

    Args:
        step_multiplier: What every step is multiplied by.
        normalise_output: Whether a step is divided by its root mean square over its tensor first (Celo2, arXiv
            2602.19142): then ``step_multiplier`` is the root mean square of every step, and the network learns
            directions only.
    """

    def __init__(self, step_multiplier: float, normalise_output: bool) -> None:
        super().__init__()
        if not (math.isfinite(step_multiplier) and step_multiplier > 0):
            raise ValueError(f"step_multiplier={step_multiplier} must be a positive number.")
        self.step_multiplier = float(step_multiplier)
        self.normalise_output = bool(normalise_output)

    @abc.abstractmethod
    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """The averages before the first step, in the dtype and on the device of ``like``."""

    @abc.abstractmethod
    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """What is subtracted from the parameters (up to the multiplier), and the next averages.

        Args:
            gradient: ``(N,)``.
            parameter: ``(N,)``.
            state: The averages, and ``"step"``, the number of steps taken before this one.
            layout: Where the tensors lie in the N elements.
        """

    def step_(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """The same where nothing will be differentiated; the averages may be changed in place."""
        return self.step(gradient, parameter, state, layout)

    def extents(self, layout: Layout) -> Mapping[str, list[int]]:
        """For each average whose last axis is not N: how much of that axis belongs to each tensor."""
        return {}

    @property
    def accepts_missing_gradients(self) -> bool:
        """Yes, such a parameter is not moved and its averages are kept. The step number goes on."""
        return True

    @property
    def independent_tensors(self) -> bool:
        """Yes, since a tensor's step depends on the other tensors in no way."""
        return True

    def transformation(self) -> GradientTransformation:
        """The optimizer, in torchopt's protocol; see :class:`LearnedOptimizer`."""

        def init(params: Mapping[str, Tensor]) -> State:
            layout, dtype = Layout.of(params), _dtype_of(params)
            first = next(iter(params.values()))
            like = torch.empty(0, dtype=dtype, device=first.device)
            step = torch.zeros((), dtype=torch.int64, device=first.device)
            return {"step": step, **self.initial_state(layout, like)}

        def update(
            updates: Mapping[str, Tensor | None], state: State, *, params: Any = None, inplace: bool = True
        ) -> tuple[dict[str, Tensor | None], State]:
            if params is None:
                raise ValueError("The update needs the parameters themselves: pass params=... to update().")
            return self._update(updates, state, params, in_place=False)

        return GradientTransformation(init, update)

    def update_(
        self, gradients: Mapping[str, Tensor | None], state: Any, parameters: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor | None], Any]:
        """See :class:`LearnedOptimizer`."""
        return self._update(gradients, state, parameters, in_place=True)

    def _update(
        self, updates: Mapping[str, Tensor | None], state: State, params: Mapping[str, Tensor], *, in_place: bool
    ) -> tuple[dict[str, Tensor | None], State]:
        layout, dtype = Layout.of(params), _dtype_of(params)
        missing = [name for name in params if updates.get(name) is None]
        gradients = {name: _filled(name, updates.get(name), tensor) for name, tensor in params.items()}
        before = {key: value.clone() for key, value in state.items()} if missing and in_place else state
        step = self.step_ if in_place else self.step
        device = next(iter(params.values())).device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            vector, following = step(layout.flatten(gradients, dtype), layout.flatten(params, dtype), state, layout)
            if self.normalise_output:
                vector = normalised(vector, layout, epsilon=1e-9)
            scaled = vector.mul_(-self.step_multiplier) if in_place else vector * -self.step_multiplier
            moved = layout.unflatten(scaled, params)
        if missing:
            following = self._kept(before, following, layout, set(missing))
        return {**moved, **dict.fromkeys(missing)}, {**following, "step": state["step"] + 1}

    def _kept(self, old: State, new: State, layout: Layout, missing: set[str]) -> State:
        """The new averages, the old ones for tensors without a gradient."""
        extents = self.extents(layout)
        kept: State = {}
        for key, value in new.items():
            present = torch.tensor([name not in missing for name in layout.names], device=value.device)
            kept[key] = torch.where(layout.spread(present, extents.get(key)), value, old[key])
        return kept


def _dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    if not tensors:
        raise ValueError("There are no parameters to optimize.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(
                f"Parameter {name!r} is {tensor.dtype}; learned optimizers move real floating-point parameters only "
                "(hold a complex one as its real and imaginary part, torch.view_as_real)."
            )
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()}, torch.float32)


def _filled(name: str, gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.layout != torch.strided:
        raise TypeError(
            f"The gradient of {name!r} is sparse, which learned optimizers do not support: the network would have to "
            "see the zeros. Build the embedding with sparse=False."
        )
    return gradient


class CoordinateNetwork(nn.Module):
    """A multilayer perceptron applied to every coordinate: the same weights, ReLU between the layers.

    Maps ``(features, N)`` to ``(outputs, N)`` by one matrix product for each layer. Inputs that are the same for all
    coordinates (the time) go into the bias of the first layer instead: no memory, and the same numbers.

    Args:
        sizes: Number of inputs, of units in each hidden layer, of outputs.
        initialisation: ``"reference"``: weights N(0, 1), biases 0.1, as in the paper's code; outputs are large at
            first, a random walk. ``"scaled"``: truncated normal weights of variance 1 / inputs, biases
            zero, as in ``learned_optimization``; outputs of order one. ``"zero_output"``: ``"scaled"`` with the
            last layer zero; the optimizer does nothing at first.
        sees_time: Inputs that are the same for all coordinates, the last ones of ``sizes[0]``.

    Raises:
        ValueError: No unit in a layer, or an unknown initialisation.

    Example:
        >>> network = CoordinateNetwork((3, 8, 2), sees_time=1)
        >>> network(torch.zeros(2, 5), torch.zeros(1)).shape
        torch.Size([2, 5])
    """

    def __init__(self, sizes: Sequence[int], initialisation: Initialisation = "scaled", sees_time: int = 0) -> None:
        super().__init__()
        if min(sizes) < 1:
            raise ValueError(f"hidden_size={min(sizes)} must be at least 1.")
        if initialisation not in get_args(Initialisation):
            raise ValueError(
                f"initialisation={initialisation!r} is not known; choose one of {list(get_args(Initialisation))}."
            )
        self._coordinate_inputs = sizes[0] - sees_time
        self.weights = nn.ParameterList([torch.empty(outputs, inputs) for inputs, outputs in pairwise(sizes)])
        self.biases = nn.ParameterList([torch.empty(outputs) for outputs in sizes[1:]])
        for weight in self.weights:
            nn.init.normal_(weight) if initialisation == "reference" else scaled_normal_(weight)
        for bias in self.biases:
            nn.init.constant_(bias, 0.1 if initialisation == "reference" else 0.0)
        if initialisation == "zero_output":
            nn.init.zeros_(self.weights[-1])

    def forward(self, features: Tensor, time: Tensor | None = None) -> Tensor:
        """The outputs, shape ``(outputs, N)``, in the features' dtype and on their device."""
        values = features
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            weight, bias = weight.to(values.device, values.dtype), bias.to(values.device, values.dtype)
            if index == 0 and time is not None:
                bias = bias + weight[:, self._coordinate_inputs :] @ time
                weight = weight[:, : self._coordinate_inputs]
            # bmm, since vmap folds the tasks of mm into one of its axes, by a copy of everything.
            values = torch.bmm(weight.unsqueeze(0), values.unsqueeze(0)).squeeze(0) + bias[:, None]
            if index < len(self.weights) - 1:
                values = torch.relu(values)
        return values


def scaled_normal_(weight: Tensor) -> None:
    """Draws a weight matrix ``(outputs, inputs)`` from the normal distribution of variance 1 / inputs, cut at two."""
    deviation = 1.0 / math.sqrt(weight.shape[1])
    nn.init.trunc_normal_(weight, 0.0, deviation, -2.0 * deviation, 2.0 * deviation)


class FeatureOptimizer(CoordinatewiseOptimizer):
    """A multilayer perceptron on features of each coordinate and of the time, with two outputs d and a.

    ``p <- p - step_multiplier * d * exp(exponent_multiplier * a)``. A subclass says what the features are.

    Args:
        features: Features of a coordinate.
        timescales: Of the features ``tanh(t / tau - 1)`` of the step number t.
        layers: Hidden layers.
        hidden_size: Units in each of them.
        step_multiplier: Multiplies every step.
        exponent_multiplier: Multiplies the output that scales the step; 0 switches it off.
        initialisation: See :class:`CoordinateNetwork`.
        normalise_output: Every step has root mean square ``step_multiplier`` in each tensor.
    """

    def __init__(
        self,
        features: int,
        timescales: Sequence[float],
        layers: int,
        *,
        hidden_size: int,
        step_multiplier: float,
        exponent_multiplier: float,
        initialisation: Initialisation,
        normalise_output: bool,
    ) -> None:
        super().__init__(step_multiplier, normalise_output)
        self.hidden_size, self.initialisation = hidden_size, initialisation
        self.exponent_multiplier = float(exponent_multiplier)
        self.timescales = constant(timescales)
        sizes = (features + len(timescales), *[hidden_size] * layers, 2)
        self.network = CoordinateNetwork(sizes, initialisation, sees_time=len(timescales))

    def configuration(self) -> dict[str, Any]:
        """The arguments that make such an optimizer."""
        return {
            "hidden_size": self.hidden_size,
            "step_multiplier": self.step_multiplier,
            "exponent_multiplier": self.exponent_multiplier,
            "initialisation": self.initialisation,
            "normalise_output": self.normalise_output,
        }

    @abc.abstractmethod
    def features(
        self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout
    ) -> tuple[Tensor, Tensor, State]:
        """Normalised features ``(features, N)``, those of the time ``(T,)``, and the next averages.

        Args:
            gradient: ``(N,)``.
            parameter: ``(N,)``.
            state: As for :meth:`step`.
            layout: Where the tensors lie in the N elements.
        """

    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """See :class:`CoordinatewiseOptimizer`."""
        features, time, averages = self.features(gradient, parameter, state, layout)
        direction, magnitude = self.network(features, time).unbind(0)
        if self.exponent_multiplier != 0:
            direction = direction * torch.exp(self.exponent_multiplier * magnitude)
        return direction, averages


def constant(values: Sequence[float]) -> Tensor:
    """Numbers as a float64 tensor, to be cast where they are used.

    Not a module's buffer: ``module.half()`` would turn a decay of 0.9999 into 1, and casting 0.9999 to float32
    before subtracting it from 1 is already wrong in the fourth digit.
    """
    return torch.tensor(values, dtype=torch.float64)


def moving_average(average: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """Exponential moving averages with several decays, updated by one value; no bias correction.

    ``a_k <- (1 - w_k) a_k + w_k x``.

    Args:
        average: ``(K, ...)``.
        value: ``(...)``, the same for all K.
        weight: ``(K,)``, one minus the decay.
    """
    shaped = weight.to(average.device, average.dtype).reshape(-1, *[1] * value.dim())
    return torch.lerp(average, value.expand_as(average), shaped)


def time_features(step: Tensor, timescales: Tensor, dtype: torch.dtype) -> Tensor:
    """``tanh(step / tau - 1)`` for each time scale, shape ``(T,)``: how far the training is, at several scales.

    Args:
        step: The step number, 0-dim integer.
        timescales: ``(T,)``.
        dtype: Of the result.
    """
    return torch.tanh(step.to(dtype) / timescales.to(step.device, dtype) - 1.0)


def normalised(features: Tensor, layout: Layout, epsilon: float = 1e-5) -> Tensor:
    """Each feature divided by its root mean square over its tensor.

    ``x / sqrt(epsilon + mean(x**2))``, the mean over the elements of one tensor: what the network sees does not
    depend on the scale of the loss. (Metz et al. 2019, arXiv 1810.10180, appendix; the same in all its successors.)

    Args:
        features: ``(..., N)``.
        layout: Where the tensors lie.
        epsilon: Added to the mean square.

    Example:
        >>> layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(1)})
        >>> normalised(torch.tensor([[3.0, 4.0, -2.0]]), layout, epsilon=0.0)
        tensor([[ 0.8485,  1.1314, -1.0000]])
    """
    return layout.join(
        [part * torch.rsqrt(epsilon + part.square().mean(-1, keepdim=True)) for part in layout.split(features)]
    )


class LearnedDecays(nn.Module):
    """Decays of moving averages as meta-parameters.

    An offset ``d`` for each decay, zero at first: ``decay = 1 - (1 - initial) * exp(10 d)``. The factor 10 makes a
    meta-step of 0.01 a change of 10 % in the time scale. (``learned_optimization``, ``adafac_mlp_lopt.py``.)

    Args:
        initial: The decays to start from, in [0, 1).

    Example:
        >>> decays = LearnedDecays([0.9, 0.999])
        >>> 1 - decays.weights()
        tensor([0.9000, 0.9990], dtype=torch.float64, grad_fn=<RsubBackward1>)
    """

    _RATE = 10.0

    def __init__(self, initial: Sequence[float]) -> None:
        super().__init__()
        self._weights = constant([1.0 - decay for decay in initial])
        self.offset = nn.Parameter(torch.zeros(len(self._weights)))

    def weights(self, largest: float = float("inf")) -> Tensor:
        """One minus the decays, shape ``(K,)``, float64; at most ``largest``."""
        weights = self._weights.to(self.offset.device) * torch.exp(self._RATE * self.offset.double())
        return weights.clamp(max=largest)

    @torch.no_grad()
    def project_(self) -> None:
        """Keeps the decays in [0, 1 - 1e-7], in place: beyond, an average would explode or never move again."""
        low, high = (torch.log(bound / self._weights) / self._RATE for bound in (1e-7, 1.0))
        self.offset.copy_(self.offset.clamp(low.to(self.offset), high.to(self.offset)))
