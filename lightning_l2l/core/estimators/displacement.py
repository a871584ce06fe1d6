r"""Displacement: a horizon of a hundred steps for the price of one gradient.

Forward mode along the training itself needs a Hessian-vector product for each step, so its windows are short. Within a
few steps all that a larger learning rate shows is its noise; what it gains shows later. So short windows ask for
smaller rates than are good for the training ("short-horizon bias", Wu, Ren, Liao, Grosse, ICLR 2018).

Here the horizon is long and the curvature is left out. All the optimizers that we mirror move the parameters by the
learning rate times something else, so what a step adds to ``d theta / d log alpha`` is the step itself. Leave out how
that changes the later gradients, forget at a rate of ``1 / K`` per step, and the tangent is

.. math:: \tau = \theta - \bar\theta, \qquad
          \frac{\partial F}{\partial \log\alpha} \approx \left\langle \nabla F(\theta),\, \tau \right\rangle

with :math:`\bar\theta` the average of the past parameters with a memory of ``K`` steps: is the way that the training
came uphill on held-out data? Where it is, a step from here back towards the average would be better than the next one
ahead, as in iterate averaging, and the rate is too large. (Without curvature the tangent is the trace of Hessian-free
step-size adaptation: IDBD, Sutton, AAAI 1992; MetaOptimize, Sharifnassab, Salehkaleybar, Sutton, ICML 2025. These take
training gradients.)

Exact if the gradients do not depend on the parameters. In a direction of curvature ``h`` the true tangent forgets by
itself, at ``alpha * h`` per step; what is left out matters where that is faster than ``1 / K``, and there both have the
sign of the noise's cost. What it is worth is measured: docs, "benchmarks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.core.objectives import Objective, objective_weights
from lightning_l2l.core.result import MetaGradient
from lightning_l2l.core.tally import Tally

# So often within its memory the average looks at the parameters; oftener costs more than it shows.
_LOOKS = 20


class Displacement:
    """How far the parameters are from the average of where they have been.

    **Cost** beside the training: reading the parameters once in ``memory / 20`` steps. Memory: one copy of them (in
    float32 at least), however long it is.

    Args:
        parameters: What the optimizer moves, by name, where the training starts.
        memory: The number of steps K after which a step's part has fallen to ``1 / e``; until then all count alike.

    Example:
        >>> import torch
        >>> place = torch.zeros(1)
        >>> way = Displacement({"w": place}, memory=100)
        >>> for _ in range(10):
        ...     _ = place.add_(1.0)
        ...     way.see({"w": place})
        >>> way.of({"w": place})["w"].item()  # from 5, the average of 0, 5 and 10
        5.0
    """

    def __init__(self, parameters: Mapping[str, Tensor], memory: int) -> None:
        self._memory = memory
        self._stride = max(1, memory // _LOOKS)
        self._average = {name: _copied(parameter) for name, parameter in parameters.items()}
        self._steps = 0

    @property
    def names(self) -> list[str]:
        """Whose parameters it follows."""
        return list(self._average)

    @torch.no_grad()
    def see(self, parameters: Mapping[str, Tensor]) -> None:
        """The optimizer has stepped.

        Args:
            parameters: Those of the start, as they are now.
        """
        self._steps += 1
        if self._steps % self._stride:
            return
        looks = self._steps // self._stride + 1
        weight = max(1 / looks, 1 - (1 - 1 / self._memory) ** self._stride)
        averages = list(self._average.values())
        present = [parameters[name].detach().to(average.dtype) for name, average in self._average.items()]
        torch._foreach_lerp_(averages, present, weight)

    @torch.no_grad()
    def of(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement, by name.

        Args:
            parameters: Those of the start, as they are now.
        """
        averages = list(self._average.values())
        present = [parameters[name].detach().to(average.dtype) for name, average in self._average.items()]
        return dict(zip(self._average, torch._foreach_sub(present, averages), strict=True))

    @torch.no_grad()
    def rescale(self, parameters: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
        """The learning rates have changed: make the way so far what it would have been with the present ones.

        Steps are then weighed by their direction and not by how large the rate was. Otherwise a rate that falls faster
        than the memory forgets would be judged by its first, largest steps over and over, and fall for ever.

        Args:
            parameters: Those of the start, as they are now.
            factors: What the rate of each was multiplied by.
        """
        for name, average in self._average.items():
            if factors[name] != 1:
                average.lerp_(parameters[name].detach().to(average.dtype), 1 - factors[name])

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {"average": dict(self._average), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, of the same parameters."""
        for name, average in self._average.items():
            average.copy_(state["average"][name])
        self._steps = state["steps"]


def displacement(
    loss: Tensor,
    gradients: Mapping[str, Tensor | None],
    displaced: Mapping[str, Tensor],
    places: Mapping[str, int],
    like: Tensor,
    objective: Objective,
    steps: int,
    reason: str = "",
    training: tuple[Tensor, Tensor] | None = None,
) -> MetaGradient:
    """The meta-gradient with respect to logarithms of learning rates, from one gradient and a displacement.

    Args:
        loss: The meta-loss where the training is now; 0-dim.
        gradients: Its gradient for each parameter.
        displaced: :meth:`Displacement.of`.
        places: For each parameter the index of the offset that its rate belongs to
            (:meth:`~lightning_l2l.LearnedOptimizer.rate_places`).
        like: The offsets; 1-d.
        objective: ``"log"`` or ``"naive"``: only the present loss is known.
        steps: The memory K; the logarithm is divided by it.
        reason: Why this estimator was chosen, for the diagnostics.
        training: The loss and the :func:`slopes` of the last training batch, before its step.

    Returns:
        The result, with :attr:`~lightning_l2l.MetaGradient.bounds`.

    Raises:
        ValueError: An objective that counts other losses than the last one.
        NegativeLossError: The objective takes the logarithm of a negative loss.

    Example:
        >>> import torch
        >>> way, uphill = {"w": torch.tensor([0.3, 0.4])}, {"w": torch.tensor([3.0, 4.0])}
        >>> result = displacement(torch.tensor(1.0), uphill, way, {"w": 0}, torch.zeros(1), "naive", steps=100)
        >>> round(result.gradients["learning_rate"].item(), 6), round(result.relative()["learning_rate"].item(), 6)
        (2.5, 1.0)
    """
    if not only_last(objective):
        raise ValueError(f"objective={objective!r} counts losses on the way, and a displacement knows only the last.")
    tally = Tally(objective, steps, None)
    if training is not None:
        tally.diverged(training[0])
    factor, _ = tally.add(steps, loss, torch.zeros((), dtype=torch.float64, device=loss.device))
    found = slopes(gradients, displaced, places, like)
    result = tally.result("displacement", reason, {"learning_rate": (found * factor).to(like)}, math.nan)
    lengths = [_squares(tensors, places, like).sqrt() for tensors in (gradients, displaced)]
    bounds = {"learning_rate": (lengths[0] * lengths[1] * factor.abs()).to(like)}
    said = {} if training is None else {"learning_rate": training[1].to(like)}
    return replace(result, bounds=bounds, diagnostics=replace(result.diagnostics, training_gradients=said))


def only_last(objective: Objective) -> bool:
    """Whether the meta-objective counts the loss after the last step alone."""
    return set(objective_weights(objective, 2)) == {2}


def slopes(
    gradients: Mapping[str, Tensor | None], displaced: Mapping[str, Tensor], places: Mapping[str, int], like: Tensor
) -> Tensor:
    """Inner products of gradients and displacement, one for each offset; float64, in the shape of ``like``."""
    names = [name for name, gradient in gradients.items() if gradient is not None and name in displaced]
    ways = [displaced[name] for name in names]
    products = torch._foreach_mul(
        [_given(gradients[name]).to(way) for name, way in zip(names, ways, strict=True)], ways
    )
    return _at_places({name: p.sum(dtype=torch.float64) for name, p in zip(names, products, strict=True)}, places, like)


def _squares(tensors: Mapping[str, Tensor | None], places: Mapping[str, int], like: Tensor) -> Tensor:
    names = [name for name, tensor in tensors.items() if tensor is not None]
    norms = torch._foreach_norm([_given(tensors[name]) for name in names])
    return _at_places({name: norm.double().square() for name, norm in zip(names, norms, strict=True)}, places, like)


def _at_places(values: Mapping[str, Tensor], places: Mapping[str, int], like: Tensor) -> Tensor:
    """Sums of the numbers that belong to the same offset."""
    total = torch.zeros_like(like, dtype=torch.float64)
    if not values:
        return total
    index = torch.tensor([places[name] for name in values], device=like.device)
    return total.index_add_(0, index, torch.stack(list(values.values())).to(like.device))


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _copied(parameter: Tensor) -> Tensor:
    # In half precision an average could not move by less than its last digit.
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
