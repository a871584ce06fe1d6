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

**Where it is judged.** The noise of the last steps raises the loss where the training is now, but a smaller rate later
on takes that away again, and the way that was won stays. So early in a training of few passes over its data, whose end
is known, the gradient is taken a part of the way back towards the average (:meth:`Displacement.towards_average`,
:func:`part_back`), where there is less of that noise. From half-way on that part falls to zero, and the noise counts.
With many passes it is zero from the start: there a smaller rate also keeps the network from learning noise by heart.

Exact if the gradients (and decays) do not depend on the parameters: for a change of the rate in all steps as long as
the average is still the start, later for one that fades into the past. In a direction of curvature ``h`` the true
tangent forgets by itself, at ``alpha * h`` per step; what is left out matters where that is faster than ``1 / K``, and
there both have the sign of the noise's cost. What it is worth is measured: docs, "opponents".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.objectives import Objective, objective_weights
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.tally import Tally

# So often within its memory the average looks at the parameters; oftener costs more than it shows.
_LOOKS = 20
# Measured (docs, "opponents"): nearer to the average, rates rise until trainings are lost; nearer to the present, noise
# makes them too small for a language model; with many passes over few data, they become too large.
_PART_BACK = 0.4
_MANY_PASSES = 20


class Displacement:
    """How far the parameters are from the average of where they have been.

    **Cost** beside the training: reading the parameters once in ``memory / 20`` steps. Memory: one copy of them (in
    float32 at least), however long it is.

    Args:
        parameters: What the optimizer moves, by name, where the training starts.
        memory: The number of steps K after which a step's part has fallen to ``1 / e``; until then the average is the
            plain mean of all places, the start included. At least 2: with 1 the average is where they are.

    Example:
        >>> import torch
        >>> place = torch.zeros(1)
        >>> way = Displacement({"w": place}, memory=100)
        >>> for _ in range(10):
        ...     _ = place.add_(1.0)
        ...     if way.step():
        ...         way.look({"w": place})
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

    def step(self) -> bool:
        """The optimizer has stepped; whether it is time to :meth:`look`."""
        self._steps += 1
        return self._steps % self._stride == 0

    @torch.no_grad()
    def look(self, parameters: Mapping[str, Tensor]) -> None:
        """Let the average know of the present parameters.

        Args:
            parameters: Those of the start, as they are now.
        """
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
    def towards_average(self, parameters: Mapping[str, Tensor], part: float) -> dict[str, Tensor]:
        """The parameters as they would be some of the way back; new tensors, in their dtypes.

        Args:
            parameters: Those of the start, as they are now.
            part: From 0, the present parameters, to 1, the average.
        """
        averages = list(self._average.values())
        present = [parameters[name].detach().to(average.dtype) for name, average in self._average.items()]
        moved = torch._foreach_lerp(present, averages, part)
        return {name: place.to(parameters[name].dtype) for name, place in zip(self._average, moved, strict=True)}

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


def part_back(step: int, planned: float, passes: float) -> float:
    """How much of the way back towards the average to judge a training by.

    Args:
        step: Steps that have been made.
        planned: Steps of the whole training; ``inf`` where nobody knows, and then there is no later phase to count on.
        passes: How often the whole training will see each example; 0 for a stream.

    Example:
        >>> part_back(100, 1000, 0), part_back(750, 1000, 0), part_back(1000, 1000, 0), part_back(100, math.inf, 0)
        (0.4, 0.2, 0.0, 0.0)
        >>> part_back(100, 1000, passes=10), part_back(100, 1000, passes=30)
        (0.2, 0.0)
    """
    left = 1 - step / planned if 0 < planned < math.inf else 0.0
    return _PART_BACK * min(1.0, max(0.0, 2 * left)) * max(0.0, 1 - passes / _MANY_PASSES)


@dataclass(frozen=True)
class Slope:
    """How steeply a loss rises along the displacement; where the parameters are, so that nothing has to wait for it.

    Attributes:
        loss: The loss; 0-dim float64.
        along: Its derivative along the displacement, for each offset; 1-d float64.
        steepest: What the absolute value of that could be at most, given the lengths of gradient and displacement.
    """

    loss: Tensor
    along: Tensor
    steepest: Tensor


def slope(
    loss: Tensor,
    gradients: Mapping[str, Tensor | None],
    displaced: Mapping[str, Tensor],
    places: Mapping[str, int],
    like: Tensor,
) -> Slope:
    """The slope of a loss along a displacement.

    Args:
        loss: The loss where the training is now; 0-dim.
        gradients: Its gradient for each parameter; ``None`` for one that it does not depend on.
        displaced: :meth:`Displacement.of`.
        places: For each parameter the index of the offset that its rate belongs to
            (:meth:`~lightning_l2l.LearnedOptimizer.rate_places`).
        like: The offsets; 1-d.

    Example:
        >>> import torch
        >>> way, uphill = {"w": torch.tensor([0.3, 0.4])}, {"w": torch.tensor([3.0, 4.0])}
        >>> found = slope(torch.tensor(1.0), uphill, way, {"w": 0}, torch.zeros(1))
        >>> round(found.along.item(), 6), round(found.steepest.item(), 6)
        (2.5, 2.5)
    """
    names = [name for name, gradient in gradients.items() if gradient is not None]
    loss = loss.detach().double()
    zero = torch.zeros(len(like), dtype=torch.float64, device=loss.device)
    if not names:
        return Slope(loss, zero, zero)
    ways = [displaced[name] for name in names]
    found = [_given(gradients[name]).to(way) for name, way in zip(names, ways, strict=True)]
    index = torch.tensor([places[name] for name in names], device=loss.device)

    def by_place(values: Sequence[Tensor]) -> Tensor:
        return zero.index_add(0, index, torch.stack([value.double() for value in values]))

    along = by_place([product.sum(dtype=torch.float64) for product in torch._foreach_mul(found, ways)])
    squares = [by_place([norm.double().square() for norm in torch._foreach_norm(part)]) for part in (found, ways)]
    return Slope(loss, along, (squares[0] * squares[1]).sqrt())


def _together(slopes: Sequence[Slope], device: torch.device) -> list[Slope]:
    """The same on another device, with a single transfer."""
    numbers = torch.stack([torch.cat([one.loss.reshape(1), one.along, one.steepest]) for one in slopes]).to(device)
    count = len(slopes[0].along)
    return [Slope(row[0], row[1 : 1 + count], row[1 + count :]) for row in numbers]


def displacement(
    found: Slope, like: Tensor, objective: Objective, steps: int, reason: str = "", training: Slope | None = None
) -> MetaGradient:
    """The meta-gradient with respect to logarithms of learning rates, from the slope of the meta-loss.

    Args:
        found: The slope of the meta-loss.
        like: The offsets; 1-d.
        objective: ``"log"`` or ``"naive"``: only the present loss is known.
        steps: The memory K; the logarithm is divided by it.
        reason: Why this estimator was chosen, for the diagnostics.
        training: The slope of the last training batch's loss, before its step.

    Returns:
        The result, with :attr:`~lightning_l2l.MetaGradient.bounds`.

    Raises:
        ValueError: An objective that counts other losses than the last one.
        NegativeLossError: The objective takes the logarithm of a negative loss.
    """
    if not only_last(objective):
        raise ValueError(f"objective={objective!r} counts losses on the way, and a displacement knows only the last.")
    found, *said = _together([found] if training is None else [found, training], like.device)
    tally = Tally(objective, steps, None)
    for other in said:
        tally.diverged(other.loss)
    factor, _ = tally.add(steps, found.loss, torch.zeros_like(found.loss))
    result = tally.result("displacement", reason, {"learning_rate": (found.along * factor).to(like)}, math.nan)
    bounds = {"learning_rate": (found.steepest * factor.abs()).to(like)}
    result = replace(result, bounds=bounds)
    if not said:
        return result
    training_gradients = {"learning_rate": said[0].along.to(like)}
    return replace(result, diagnostics=replace(result.diagnostics, training_gradients=training_gradients))


def only_last(objective: Objective) -> bool:
    """Whether the meta-objective counts the loss after the last step alone."""
    return set(objective_weights(objective, 2)) == {2}


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _copied(parameter: Tensor) -> Tensor:
    # In half precision an average could not move by less than its last digit.
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
