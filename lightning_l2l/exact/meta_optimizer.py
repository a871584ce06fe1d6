"""What applies a meta-gradient: an average of its recent signs, so to speak, with caution where a mistake is fatal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2l.learned.base import LearnedOptimizer

# Chosen on six pairs of task and optimizer, confirmed on six others (docs, "the meta-optimizer").
_MEMORY = 0.8
_SCALE_MEMORY = 0.5
_CAUTION = 0.25


class MetaOptimizer(torch.optim.Optimizer):
    r"""Moves meta-parameters along normalised meta-gradients.

    For each scalar meta-parameter with meta-gradient ``g``, both averages forgetting and corrected for their start,

    .. math:: s = \operatorname{average}_{0.5}(g^2), \quad m = \operatorname{average}_{0.8}(g / \sqrt s), \quad
              \theta \leftarrow \theta - \eta\, m

    and a step that would *raise* a learning rate is only a quarter as long.

    **Why not Adam.** The scale of meta-gradients falls by orders of magnitude within a training. Adam averages first
    and normalises afterwards, so a few large early meta-gradients outweigh dozens of later ones, and the rate goes on
    rising long after they have turned. Here every meta-gradient has one vote. Where their sign is a matter of luck the
    votes cancel: ``m`` is about signal over noise.

    **Why the caution.** A rate that is too small loses time until the next update; one that is too large may lose the
    run. Its price: where there is no signal at all, the rate falls slowly.

    Where the largest possible size of a meta-gradient is known, ``LearnToLearn`` gives its quotient by that
    (:meth:`~lightning_l2l.MetaGradient.relative`): a cosine, so that within the recent scale, too, no single batch with
    a large loss outweighs its neighbours.

    A meta-parameter may grow between two updates (a parameter group was added); the new entries start without
    memory. The state is plain tensors in the meta-parameter's shape: ``average``, ``mean_square``, ``updates``.

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
            ValueError: A gradient is not finite. It would stay in the memory for good.
        """
        for name, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):
                raise ValueError(
                    f"The meta-gradient of {name!r} is not finite. It would spoil every later update: check "
                    "MetaGradient.usable before applying one."
                )
        faster = learned.scaled_rate(2.0) or {}
        for name, parameter in learned.named_parameters():
            parameter.grad = None
            if name in gradients:
                parameter.grad = gradients[name].detach().to(parameter).clone()
        before = {name: parameter.detach().clone() for name, parameter in learned.named_parameters()}
        self.step()
        self.zero_grad()
        for name, parameter in learned.named_parameters():
            if name in faster:
                raises = (parameter - before[name]) * (faster[name].to(parameter) - before[name]) > 0
                parameter.copy_(torch.where(raises, before[name] + _CAUTION * (parameter - before[name]), parameter))

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
                memory = self._memory_of(parameter)
                gradient, updates = parameter.grad, memory["updates"]
                updates += 1
                memory["mean_square"].lerp_(gradient.square(), 1 - _SCALE_MEMORY)
                scale = (memory["mean_square"] / (1 - _SCALE_MEMORY**updates)).sqrt()
                # A gradient of zero, from the start on, has no scale and no vote.
                vote = torch.where(scale > 0, gradient / scale, torch.zeros_like(gradient))
                memory["average"].lerp_(vote, 1 - _MEMORY)
                parameter.sub_(group["lr"] * memory["average"] / (1 - _MEMORY**updates))

    def _memory_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        memory: dict[str, Any] = self.state[parameter]
        for key in ("average", "mean_square", "updates"):
            held = memory.get(key)
            if held is None or held.shape != parameter.shape:
                grown = torch.zeros_like(parameter)
                if held is not None:
                    grown[: len(held)] = held
                memory[key] = grown
        return memory
