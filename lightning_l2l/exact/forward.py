"""Forward mode: the derivative of the iterate travels along with the training steps.

For each scalar meta-parameter theta the tangent ``dz_k/dtheta`` of parameters and optimizer state obeys
``dz_{k+1} = (d step/dz) dz_k + d step/dtheta``; the gradient inside the step contributes one exact Hessian-vector
product. Memory does not grow with the number of steps, so this is for few meta-parameters and any number of steps.
Cost: one Hessian-vector product (about two gradients) per step and scalar meta-parameter.

Both derivatives are taken by reverse passes, not by forward-mode differentiation: every operation that has a second
derivative is supported, it works under autocast, and it is faster (torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Accumulator, Objective, rate_per_step
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.scaled import ScaledVector, inner_product, largest_exponent, log2_norm

Gradients = Mapping[str, Tensor | None]


def forward(
    step: InnerStep, start: Iterate, batches: Sequence[Any], meta_batch: Any, objective: Objective, reason: str = ""
) -> tuple[MetaGradient, Iterate]:
    """Meta-gradient by forward mode.

    Args:
        step: The inner training step.
        start: The iterate to start from.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        reason: Why this mode was chosen, for the diagnostics.

    Returns:
        The result, and the iterate that the unroll arrived at (for a homogeneous problem up to a factor).
    """
    meta = step.meta_parameters()
    directions = [(name, index) for name, tensor in meta.items() for index in range(tensor.numel())]
    accumulator = Accumulator(objective, len(batches), step.homogeneity)
    iterate = step.packed(start).fresh()
    log_scale = torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)
    tangents = [
        ScaledVector([torch.zeros_like(leaf) for leaf in iterate.leaves()], torch.zeros_like(log_scale))
        for _ in directions
    ]
    slopes = [torch.zeros_like(log_scale) for _ in directions]
    first_norm = last_norm = None

    for taken, batch in enumerate(batches, start=1):
        loss = step.evaluate(iterate, batch)
        if taken == 1:
            step.check_second_order(loss)
        if not accumulator.add_training_loss(loss):
            break
        moving = taken > 1  # before, all tangents are zero
        found = step.gradients(loss, iterate, create_graph=step.second_order and moving)
        gathered, gradients = iterate.gathered(found)
        if gathered is not iterate:
            tangents = [ScaledVector(iterate.with_leaves(t.tensors).unpacked().leaves(), t.exponent) for t in tangents]
        curvatures: list[Gradients] = [{} for _ in directions]
        if step.second_order and moving:
            last = len(directions) - 1
            curvatures = [
                _hessian_vector_product(step, gathered, gradients, tangent, keep_graph=index < last)
                for index, tangent in enumerate(tangents)
            ]
        update = _Update(step, gathered, gradients)
        iterate = update.following
        tangents = [
            update.along(tangent, curvature, direction)
            for tangent, curvature, direction in zip(tangents, curvatures, directions, strict=True)
        ]
        if step.homogeneity is not None:
            exponent = largest_exponent(list(iterate.parameters.values())).to(log_scale.device)
            iterate, log_scale = iterate.divided(exponent), log_scale + exponent * math.log(2.0)
            tangents = [ScaledVector(tangent.tensors, tangent.exponent - exponent) for tangent in tangents]
        if taken == 1 or taken == len(batches):
            last_norm = torch.stack([log2_norm(tangent) for tangent in tangents]).amax() + log_scale / math.log(2.0)
            first_norm = last_norm if first_norm is None else first_norm
        if taken in accumulator.weights:
            meta_loss, gradient = step.meta_loss(iterate, meta_batch)
            slope, power = accumulator.add_meta_loss(taken, meta_loss, log_scale)
            for index, tangent in enumerate(tangents):
                product = inner_product(gradient, tangent.tensors[: len(gradient)])
                slopes[index] = slopes[index] + slope * product * torch.exp2(tangent.exponent + power)

    gradients_found = {name: torch.zeros_like(tensor) for name, tensor in meta.items()}
    for (name, index), value in zip(directions, slopes, strict=True):
        gradients_found[name].view(-1)[index] = value.to(gradients_found[name].dtype)
    growth = rate_per_step(first_norm, last_norm, len(batches) - 1)
    return accumulator.result("forward", reason, gradients_found, growth), iterate.unpacked()


def _hessian_vector_product(
    step: InnerStep, iterate: Iterate, gradients: Gradients, tangent: ScaledVector, *, keep_graph: bool
) -> Gradients:
    """Derivative of the gradients along the tangent (of its mantissas), by a second reverse pass: H v = (v' H)'."""
    parameters = list(iterate.parameters.values())
    along = dict(zip(iterate.parameters, tangent.tensors, strict=False))

    def here() -> Sequence[Tensor | None]:
        pairs = [(g, along[name]) for name, g in gradients.items() if g is not None and g.requires_grad]
        if not pairs:  # a loss that is linear in the parameters
            return [None] * len(parameters)
        outputs, vectors = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, parameters, vectors, retain_graph=keep_graph, allow_unused=True)

    return dict(zip(iterate.parameters, step.average(here, parameters), strict=True))


class _Update:
    """One update and its derivative along given directions.

    The update maps (parameters, state, gradients, meta-parameters) to (parameters, state). Its Jacobian J times a
    vector is computed with two reverse passes: ``J' v`` is built once as a function of a dummy ``v``, in which it is
    linear, and the derivative of ``<J' v, t>`` with respect to ``v`` is ``J t``. All directions share that graph.

    Args:
        step: The inner training step.
        iterate: The iterate before the update.
        gradients: The gradient for each parameter, ``None`` where there is none.

    Attributes:
        following: The next iterate, leaves without history.
    """

    def __init__(self, step: InnerStep, iterate: Iterate, gradients: Gradients) -> None:
        self._leaves = [leaf.detach().requires_grad_() for leaf in iterate.leaves()]
        self._gradients = {n: g.detach().requires_grad_() for n, g in gradients.items() if g is not None}
        self._meta = {name: tensor for name, tensor in step.learned.named_parameters() if tensor.requires_grad}
        given = {name: self._gradients.get(name) for name in gradients}
        following = step.update(iterate.with_leaves(self._leaves), given)
        self._outputs = following.leaves()
        self.following = following.fresh()
        moving = [output for output in self._outputs if output.requires_grad]
        inputs = [*self._leaves, *self._gradients.values(), *self._meta.values()]
        self._dummies = [torch.zeros_like(output, requires_grad=True) for output in moving]
        self._pulled = torch.autograd.grad(moving, inputs, self._dummies, create_graph=True, allow_unused=True)

    def along(self, tangent: ScaledVector, curvature: Gradients, direction: tuple[str, int]) -> ScaledVector:
        """The tangent after the update.

        Args:
            tangent: How the iterate's leaves move.
            curvature: How the gradients move (mantissas, at the tangent's exponent); nothing for zero.
            direction: The scalar meta-parameter that moves by one.
        """
        name, index = direction
        unit = torch.zeros_like(self._meta[name])
        unit.view(-1)[index] = torch.exp2(-tangent.exponent).to(unit)
        moves = [
            *tangent.tensors,
            *(curvature.get(parameter) for parameter in self._gradients),
            *(unit if other == name else None for other in self._meta),
        ]
        pairs = [
            (pulled, move)
            for pulled, move in zip(self._pulled, moves, strict=True)
            if move is not None and pulled is not None and pulled.requires_grad
        ]
        outputs, vectors = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, self._dummies, vectors, retain_graph=True, allow_unused=True))
        moved = [next(found) if output.requires_grad else None for output in self._outputs]
        filled = [
            torch.zeros_like(output) if move is None else move
            for output, move in zip(self._outputs, moved, strict=True)
        ]
        return ScaledVector.of(filled, tangent.exponent)
