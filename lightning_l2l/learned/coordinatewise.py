"""What the learned optimizers that treat every number alike have in common: from a dictionary to a vector and back."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.layout import Layout
from lightning_l2l.learned.network import unit_step

State = dict[str, Tensor]


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
        normalise_output: Whether a step is divided by its root mean square over its tensor first (Celo2): then
            ``step_multiplier`` is the root mean square of every step, and the network learns directions only.
    """

    def __init__(self, step_multiplier: float, normalise_output: bool) -> None:
        """See the class."""
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
            layout, dtype = Layout.of(params), _dtype_of(params)
            missing = [name for name in params if updates.get(name) is None]
            gradients = {name: _filled(name, updates.get(name), tensor) for name, tensor in params.items()}
            device = next(iter(params.values())).device.type
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    moved, following = self._moved(gradients, state, params, layout, dtype)
            else:
                moved, following = self._moved(gradients, state, params, layout, dtype)
            if missing:
                following = self._kept(state, following, layout, set(missing))
            return {**moved, **dict.fromkeys(missing)}, {**following, "step": state["step"] + 1}

        return GradientTransformation(init, update)

    def _moved(
        self, gradients: dict[str, Tensor], state: State, params: Any, layout: Layout, dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], State]:
        gradient, parameter = layout.flatten(gradients, dtype), layout.flatten(params, dtype)
        step, following = self.step(gradient, parameter, state, layout)
        if self.normalise_output:
            step = unit_step(step, layout)
        return layout.unflatten(step * -self.step_multiplier, params), following

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
