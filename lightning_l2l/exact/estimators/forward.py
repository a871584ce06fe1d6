"""Forward mode: the derivative of the iterate travels along with the training steps.

For each scalar meta-parameter theta the tangent ``dz_k/dtheta`` of parameters and optimizer state obeys
``dz_{k+1} = (d step/dz) dz_k + d step/dtheta``; the gradient inside the step contributes one exact Hessian-vector
product. Memory does not grow with the number of steps, so this is the estimator for a few meta-parameters and any
horizon. Cost: one Hessian-vector product (about two gradients) per step and scalar meta-parameter.

The Hessian-vector product is a second reverse pass, not forward-mode differentiation of the loss: it supports every
operation that has a second derivative, works under autocast, and costs less. So is the derivative of the update rule
(:mod:`lightning_l2l.exact.update_derivative`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.scaled import ScaledVector, inner_product, largest_exponent, log2_norm
from lightning_l2l.exact.tally import Tally, rate_per_step
from lightning_l2l.exact.update_derivative import Movement, UpdateDerivative


def forward(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
) -> tuple[MetaGradient, Iterate]:
    """Meta-gradient by forward mode; exact to second order.

    Args:
        step: The inner training step.
        start: The iterate to start from.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        reason: Why this estimator was chosen, for the diagnostics.

    Returns:
        The result, and the iterate that the unroll arrived at (for a homogeneous problem up to a factor).
    """
    update = UpdateDerivative(step)
    tally = Tally(objective, len(batches), step.homogeneity)
    iterate = step.packed(start).fresh()
    tangents: Sequence[ScaledVector | None] = [None] * len(update.directions)
    log_scale = _zero(iterate)
    slopes = [torch.zeros_like(log_scale) for _ in update.directions]
    first_norm = last_norm = None
    training: list[Tensor] = []

    for taken, batch in enumerate(batches, start=1):
        loss = step.evaluate(iterate, batch)
        if tally.diverged(loss):
            break
        iterate, gradients, tangents = differentiated(step, iterate, loss, tangents)
        if taken == len(batches):
            training = training_slopes(gradients, tangents)
        curvatures = curvatures_along(step, iterate, gradients, tangents)
        iterate, tangents = pushed(update, iterate, gradients, tangents, curvatures)
        if step.homogeneity is not None:
            iterate, tangents, log_scale = rescale(iterate, tangents, log_scale)
        if taken == 1 or taken == len(batches):
            last_norm = largest_norm(tangents) + log_scale / math.log(2.0)
            first_norm = last_norm if first_norm is None else first_norm
        if taken in tally.weights:
            meta_loss, of_meta_loss = step.judge(iterate, meta_batch)
            slope, exponent = tally.add(taken, meta_loss, log_scale)
            parts = slopes_along(of_meta_loss, tangents, slope, exponent)
            slopes = [total + part for total, part in zip(slopes, parts, strict=True)]

    found = by_name(update, slopes)
    result = tally.result("forward", reason, found, rate_per_step(first_norm, last_norm, len(batches) - 1))
    return beside(result, by_name(update, training)), iterate.unpacked()


def differentiated(
    step: InnerStep, iterate: Iterate, loss: Tensor, tangents: Sequence[ScaledVector | None]
) -> tuple[Iterate, dict[str, Tensor | None], Sequence[ScaledVector | None]]:
    """The gradient of the loss at an iterate; iterate and tangents as they fit to it, unpacked if need be.

    Args:
        step: The inner training step.
        iterate: The present iterate, leaves that require a gradient.
        loss: The loss there.
        tangents: One for each direction; ``None`` stands for zero (the first step).
    """
    moving = any(tangent is not None for tangent in tangents)
    found = step.gradients(loss, iterate, create_graph=step.second_order and moving)
    place, gradients = iterate.gathered(found)
    if place is not iterate:
        tangents = [
            None if t is None else ScaledVector(iterate.with_leaves(t.tensors).unpacked().leaves(), t.exponent)
            for t in tangents
        ]
    return place, gradients, tangents


def curvatures_along(
    step: InnerStep,
    iterate: Iterate,
    gradients: Mapping[str, Tensor | None],
    tangents: Sequence[ScaledVector | None],
) -> list[Mapping[str, Tensor | None]]:
    """For each tangent the derivative of the gradients along it (of its mantissas).

    Args:
        step: The inner training step.
        iterate: The present iterate.
        gradients: With their graph, which is used up.
        tangents: One for each direction; ``None`` stands for zero.
    """
    curvatures: list[Mapping[str, Tensor | None]] = []
    for index, tangent in enumerate(tangents):
        if not step.second_order or tangent is None:
            curvatures.append(dict.fromkeys(gradients))
            continue
        keep_graph = index < len(tangents) - 1
        product = partial(hessian_vector_product, gradients, iterate.parameters, tangent, keep_graph=keep_graph)
        curvatures.append(averaged(step, product, iterate))
    return curvatures


def pushed(
    update: UpdateDerivative,
    iterate: Iterate,
    gradients: Mapping[str, Tensor | None],
    tangents: Sequence[ScaledVector | None],
    curvatures: Sequence[Mapping[str, Tensor | None]],
) -> tuple[Iterate, list[ScaledVector | None]]:
    """The next iterate and its tangents, from gradients and their derivatives.

    Args:
        update: The update rule.
        iterate: The present iterate.
        gradients: One for each parameter.
        tangents: One for each direction; ``None`` stands for zero.
        curvatures: For each direction the derivative of the gradients along the tangent (of its mantissas).
    """
    exponents = [_zero(iterate) if tangent is None else tangent.exponent for tangent in tangents]
    movements = [
        # The tangents are mantissas; the unit step of the meta-parameter is brought to the same exponent.
        Movement(None if tangent is None else tangent.tensors, curvature, torch.exp2(-exponent))
        for tangent, exponent, curvature in zip(tangents, exponents, curvatures, strict=True)
    ]
    following, moved = update.moved_along(iterate, gradients, movements)
    return following, [ScaledVector.of(m, exponent) for m, exponent in zip(moved, exponents, strict=True)]


def _zero(iterate: Iterate) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)


def slopes_along(
    gradients: Sequence[Tensor], tangents: Sequence[ScaledVector | None], slope: Tensor, exponent: Tensor
) -> list[Tensor]:
    """The meta-objective's derivative for each direction, through one meta-loss.

    Args:
        gradients: The meta-loss's, for each parameter.
        tangents: One for each direction.
        slope: The meta-objective's derivative by the meta-loss: mantissa.
        exponent: The same: binary exponent.
    """
    found = []
    for tangent in tangents:
        assert tangent is not None
        product = inner_product(gradients, tangent.tensors[: len(gradients)])
        found.append(slope * product * torch.exp2(tangent.exponent + exponent))
    return found


def training_slopes(gradients: Mapping[str, Tensor | None], tangents: Sequence[ScaledVector | None]) -> list[Tensor]:
    """The derivative of a training loss for each direction, from its gradient and the tangents there.

    Args:
        gradients: The training loss's, for each parameter.
        tangents: One for each direction, before the step.

    Returns:
        0-dim float64 tensors; none if the tangents are still zero.
    """
    if not tangents or any(tangent is None for tangent in tangents):
        return []
    first = tangents[0]
    assert first is not None
    pairs = zip(gradients.values(), first.tensors, strict=False)
    filled = [torch.zeros_like(like) if gradient is None else gradient.detach() for gradient, like in pairs]
    one = torch.ones_like(first.exponent)
    return slopes_along(filled, tangents, one, torch.zeros_like(one))


def beside(result: MetaGradient, training: Mapping[str, Tensor]) -> MetaGradient:
    """The result with what the last training batch says."""
    return replace(result, diagnostics=replace(result.diagnostics, training_gradients=training))


def by_name(update: UpdateDerivative, slopes: Sequence[Tensor]) -> dict[str, Tensor]:
    """The derivatives by the scalars, in the meta-parameters' shapes and dtypes; nothing of nothing."""
    if not slopes:
        return {}
    found = {name: torch.zeros_like(tensor) for name, tensor in update.meta.items()}
    for (name, place), value in zip(update.directions, slopes, strict=True):
        found[name].view(-1)[place] = value.to(found[name].dtype)
    return found


def rescale(
    iterate: Iterate, tangents: Sequence[ScaledVector | None], log_scale: Tensor
) -> tuple[Iterate, list[ScaledVector | None], Tensor]:
    """Divide a homogeneous problem's iterate and tangents by one power of two; the logarithm is kept."""
    exponent = largest_exponent(list(iterate.parameters.values())).to(log_scale.device)
    scaled = ScaledVector(iterate.leaves(), -exponent).at_exponent(torch.zeros_like(exponent))
    following = iterate.with_leaves([leaf.detach().requires_grad_() for leaf in scaled])
    moved = [None if t is None else ScaledVector(t.tensors, t.exponent - exponent) for t in tangents]
    return following, moved, log_scale + exponent * math.log(2.0)


def averaged(
    step: InnerStep, compute: Callable[[], Mapping[str, Tensor | None]], iterate: Iterate
) -> dict[str, Tensor | None]:
    """What every process computes for each parameter, as a mean over them."""
    names = list(iterate.parameters)

    def here() -> list[Tensor | None]:
        found = compute()
        return [found.get(name) for name in names]

    return dict(zip(names, step.average(here, list(iterate.parameters.values())), strict=True))


def hessian_vector_product(
    gradients: Mapping[str, Tensor | None],
    parameters: Mapping[str, Tensor],
    tangent: ScaledVector,
    *,
    keep_graph: bool,
) -> dict[str, Tensor | None]:
    """Derivative of the gradients along the tangent (mantissas), by a second reverse pass: H v = (v' H)'.

    Args:
        gradients: With their graph.
        parameters: What they were taken by.
        tangent: Its first tensors are the parameters'.
        keep_graph: Whether the graph, the loss's included, is needed again.
    """
    along = dict(zip(parameters, tangent.tensors, strict=False))
    pairs = [(g, along[name]) for name, g in gradients.items() if g is not None and g.requires_grad]
    if not pairs:  # a loss that is linear in the parameters
        return dict.fromkeys(gradients)
    products = torch.autograd.grad(
        [gradient for gradient, _ in pairs],
        list(parameters.values()),
        [vector for _, vector in pairs],
        retain_graph=keep_graph,
        allow_unused=True,
    )
    return dict(zip(parameters, products, strict=True))


def largest_norm(tangents: Sequence[ScaledVector | None]) -> Tensor:
    """``log2`` of the largest tangent's Euclidean norm."""
    return torch.stack([log2_norm(tangent) for tangent in tangents if tangent is not None]).amax()
