"""Derivatives of a training step next to central differences of it, with the same random numbers everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.estimators import forward, reverse
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Loss
from lightning_l2l.exact.plan import LARGEST_FORWARD, scalars
from lightning_l2l.exact.random_state import RandomState
from lightning_l2l.learned.base import LearnedOptimizer

_TINY = float(torch.finfo(torch.float64).tiny)


class Differences:
    """One training problem, and comparisons of its derivatives with central differences.

    Args:
        loss: ``loss(params, batch)``.
        params: What the inner optimizer moves.
        buffers: Other tensors that the loss reads.
        batches: One for each inner step.
        meta_batch: The batch of the meta-objective, which is the loss itself after the last step.
        learned: The learned optimizer.
        seed: Of the random numbers, the same in every evaluation.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batches: Sequence[Any],
        meta_batch: Any,
        learned: LearnedOptimizer,
        seed: int,
    ) -> None:
        self._step = InnerStep(loss, learned)
        self._start = self._step.start(params, None, buffers)
        self._batches, self._meta_batch = batches, meta_batch
        self._seed = seed
        epsilon = max(torch.finfo(tensor.dtype).eps for tensor in params.values())
        # The width at which rounding and the next term of the series of a central difference are about equal.
        self._width: float = epsilon ** (1 / 3)

    def loss_and_gradients(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The loss and its gradients with their graphs, at the start."""
        iterate = self._start.fresh()
        value = self._seeded(lambda: self._step.evaluate(iterate, self._batches[0]))
        return value, self._step.gradients(value, iterate, create_graph=True)

    def random_error(self) -> float:
        """How much the loss differs when it is computed twice from the same state."""
        first, second = (self.loss_and_gradients()[0].item() for _ in range(2))
        return abs(first - second) / max(abs(first), _TINY)

    def curvature_error(self) -> float:
        """Relative error of a Hessian-vector product in a random direction; NaN if it raises.

        The direction is a unit vector times the size of the parameters, so that every operation is moved as an
        optimizer would move it.
        """
        names = list(self._start.parameters)
        generator = torch.Generator().manual_seed(self._seed)
        direction = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            for name, tensor in self._start.parameters.items()
        }
        iterate = self._start.fresh()
        value = self._seeded(lambda: self._step.evaluate(iterate, self._batches[0]))
        gradients = self._step.gradients(value, iterate, create_graph=True)
        pairs = [(g, direction[name]) for name, g in gradients.items() if g is not None and g.requires_grad]
        exact = [torch.zeros_like(iterate.parameters[name]) for name in names]
        if pairs:
            try:
                found = torch.autograd.grad(
                    [g for g, _ in pairs], [iterate.parameters[n] for n in names], [v for _, v in pairs],
                    allow_unused=True,
                )  # fmt: skip
            except RuntimeError:  # named by not_twice_differentiable
                return math.nan
            exact = [zero if product is None else product for zero, product in zip(exact, found, strict=True)]
        up, down = (self._gradients_at(direction, sign * self._width) for sign in (1.0, -1.0))
        expected = [(one - other) / (2 * self._width) for one, other in zip(up, down, strict=True)]
        error = _norm([a - b for a, b in zip(exact, expected, strict=True)])
        # A curvature that is tiny next to the gradient drowns in the rounding of the differences, and does not matter.
        return error / max(_norm(expected), _norm(up) * self._width, _TINY)

    def _gradients_at(self, direction: Mapping[str, Tensor], distance: float) -> list[Tensor]:
        """The gradients of the loss at some distance from the start."""
        moved = {n: t.detach() + distance * direction[n] for n, t in self._start.parameters.items()}
        place = Iterate(moved, self._start.state, self._start.buffers).fresh()
        value = self._seeded(lambda: self._step.evaluate(place, self._batches[0]))
        found = self._step.gradients(value, place, create_graph=False).items()
        return [torch.zeros_like(moved[name]) if gradient is None else gradient for name, gradient in found]

    def meta_gradient_error(self) -> float:
        """Relative error of the meta-gradient, the largest over the meta-parameters' tensors.

        Differences are taken along each meta-parameter's own gradient, so that one pair of unrolls tests a tensor of
        any size; a component of the computed gradient that should not be there shows as well as one that is missing.
        """
        learned = self._step.learned
        estimate = forward if scalars(learned) <= LARGEST_FORWARD else reverse
        result, _ = self._seeded(lambda: estimate(self._step, self._start, self._batches, self._meta_batch, "naive"))
        worst = 0.0
        for name, gradient in result.gradients.items():
            size = gradient.double().norm().item()
            if not math.isfinite(size):
                return math.inf
            along = torch.ones_like(gradient) if size == 0 else gradient
            along = along / along.norm()
            ends = [self._meta_loss(name, sign * self._width * along) for sign in (1.0, -1.0)]
            expected = (ends[0] - ends[1]) / (2 * self._width)
            difference = abs(expected - (gradient * along).sum().item())
            # A gradient that is tiny next to the loss drowns in the rounding of the differences.
            floor = max(abs(ends[0]) * self._width, _TINY)
            worst = max(worst, difference / max(abs(expected), size, floor))
        return worst

    def _meta_loss(self, name: str, change: Tensor) -> float:
        meta = {key: tensor.detach() for key, tensor in self._step.learned.named_parameters()}
        meta[name] = meta[name] + change

        def train() -> float:
            iterate = self._start.fresh()
            for batch in self._batches:
                loss = self._step.evaluate(iterate, batch)
                gradients = self._step.gradients(loss, iterate, create_graph=False)
                with torch.no_grad():
                    iterate = self._step.update(iterate, gradients, meta)
                iterate = iterate.fresh()
            return self._step.evaluate(iterate.fresh(), self._meta_batch).item()

        loss: float = self._seeded(train)
        return loss

    def _seeded(self, function: Callable[[], Any]) -> Any:
        """Call a function with the same random numbers as always, and put the generators back."""
        before = RandomState.now({leaf.device for leaf in self._start.leaves()})
        torch.manual_seed(self._seed)
        try:
            return function()
        finally:
            before.restore()


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))
