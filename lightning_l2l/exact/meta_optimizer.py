"""What applies a meta-gradient of an unroll: momentum over RMS-normalised meta-gradients, cautious with increases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2l.learned.base import LearnedOptimizer

# Chosen on six pairs of task and optimizer, confirmed on six others (docs, "the meta-optimizer").
_MOMENTUM = 0.8
_SQUARE_MOMENTUM = 0.5
_CAUTION = 0.25


class MetaOptimizer(torch.optim.Optimizer):
    r"""Moves meta-parameters along normalised meta-gradients.

    For each scalar meta-parameter with meta-gradient ``g``, both averages exponential and corrected for their start,

    .. math:: s = \operatorname{average}_{0.5}(g^2), \quad m = \operatorname{average}_{0.8}(g / \sqrt s), \quad
              \theta \leftarrow \theta - \eta\, m

    and a step that would *raise* a learning rate is only a quarter as long: a rate that is too small loses time until
    the next update, one that is too large may lose the run. Adam averages first and normalises afterwards, so that a
    few large early meta-gradients outweigh dozens of later ones; here every meta-gradient has the same weight, and
    ``m`` is about signal over noise.

    A meta-parameter may grow between two updates (a parameter group was added); the new entries start without memory.
    The state is plain tensors in the meta-parameter's shape: ``average``, ``mean_square``, ``updates``.

    Args:
        parameters: The meta-parameters.
        learning_rate: The most that a meta-parameter falls in one update, roughly; for the logarithm of a step size,
            0.4 is a third down, or a tenth up.

    Example:
        >>> import torch
        >>> from lightning_l2l import LearnedStepSize
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> meta_optimizer = MetaOptimizer(learned.parameters(), learning_rate=0.4)
        >>> meta_optimizer.apply(learned, {"learning_rate": torch.tensor([1e-5], dtype=torch.float64)})
        >>> learned.learning_rate.tolist()
        [-0.4]
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        """See the class."""
        super().__init__(parameters, {"lr": learning_rate})

    @torch.no_grad()
    def apply(self, learned: LearnedOptimizer, gradients: Mapping[str, Tensor]) -> None:
        """One step along gradients that are given by name; meta-parameters without one stay.

        Raises:
            ValueError: A gradient is not finite. It would stay in the averages for good.
        """
        for name, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):
                raise ValueError(
                    f"The meta-gradient of {name!r} is not finite. It would spoil every later update: check "
                    "MetaGradient.usable before applying one."
                )
        before = {}
        for name, parameter in learned.named_parameters():
            before[name] = parameter.detach().clone()
            parameter.grad = gradients[name].detach().to(parameter).clone() if name in gradients else None
        # In which direction a meta-parameter raises a learning rate.
        raised = learned.scaled_rate(2.0) or {}
        upwards = {name: value.to(before[name]) - before[name] for name, value in raised.items()}
        self.step()
        self.zero_grad()
        for name, parameter in learned.named_parameters():
            if name in upwards:
                move = parameter - before[name]
                parameter.copy_(before[name] + torch.where(move * upwards[name] > 0, _CAUTION * move, move))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients that the meta-parameters hold, without the caution.

        Args:
            closure: Not used; there for the interface.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                gradient, updates = parameter.grad, state["updates"]
                updates += 1
                state["mean_square"].lerp_(gradient.square(), 1 - _SQUARE_MOMENTUM)
                scale = (state["mean_square"] / (1 - _SQUARE_MOMENTUM**updates)).sqrt()
                # A gradient that has been zero from the start on has no scale.
                normalised = torch.where(scale > 0, gradient / scale, torch.zeros_like(gradient))
                state["average"].lerp_(normalised, 1 - _MOMENTUM)
                parameter.sub_(group["lr"] * state["average"] / (1 - _MOMENTUM**updates))

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        for key in ("average", "mean_square", "updates"):
            held = state.get(key)
            if held is None or held.shape != parameter.shape:
                state[key] = torch.zeros_like(parameter)
                if held is not None:
                    state[key][: len(held)] = held
        return state
