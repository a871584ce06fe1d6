"""The derivative of an update rule: by dual numbers where the optimizer has them, else by two reverse passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.core.inner.dual import Dual
from lightning_l2l.core.inner_step import InnerStep, Iterate
from lightning_l2l.core.linearised_update import Jacobian, LinearisedUpdate

MaybeTensors = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Movement:
    """One direction: how everything that an update depends on moves.

    Attributes:
        leaves: The iterate's leaves; ``None`` for not at all.
        gradients: Each gradient; ``None`` for not at all.
        meta_parameter: Name and flat index of the one scalar that moves.
        by: How far that moves; 0-dim.
    """

    leaves: Sequence[Tensor] | None
    gradients: MaybeTensors
    meta_parameter: tuple[str, int]
    by: Tensor


def moved_along(
    step: InnerStep,
    iterate: Iterate,
    gradients: MaybeTensors,
    meta: Mapping[str, Tensor],
    movements: Sequence[Movement],
) -> tuple[Iterate, list[list[Tensor]]]:
    """One update and its derivative along each movement.

    Args:
        step: The inner training step.
        iterate: Where the update starts.
        gradients: The gradient for each parameter, ``None`` where there is none.
        meta: The meta-parameters by name, detached.
        movements: The directions.

    Returns:
        The next iterate, without history, and for each movement how its leaves move.
    """
    given: MaybeTensors = {name: None if g is None else g.detach() for name, g in gradients.items()}
    changes: Sequence[MaybeTensors] = [movement.gradients for movement in movements]
    if step.gradient_transformation is not None:
        given, changes = _transformed(step.gradient_transformation, iterate, given, changes)
        step = replace(step, gradient_transformation=None)
    found = _by_dual_numbers(step, iterate, given, changes, movements)
    if found is not None:
        return found
    update = LinearisedUpdate(step, iterate, given, meta)
    tangents = []
    for change, movement in zip(changes, movements, strict=True):
        name, place = movement.meta_parameter
        unit = torch.zeros_like(meta[name])
        unit.view(-1)[place] = movement.by
        tangents.append(update.along(movement.leaves, change, {name: unit}))
    return update.following, tangents


@torch.no_grad()
def _by_dual_numbers(
    step: InnerStep,
    iterate: Iterate,
    gradients: MaybeTensors,
    changes: Sequence[MaybeTensors],
    movements: Sequence[Movement],
) -> tuple[Iterate, list[list[Tensor]]] | None:
    leaves = [leaf.detach() for leaf in iterate.leaves()]
    nothing = [None] * len(leaves)
    columns = [nothing if movement.leaves is None else movement.leaves for movement in movements]
    start = iterate.with_leaves([Dual(leaf, t) for leaf, *t in zip(leaves, *columns, strict=True)])  # type: ignore
    given = {
        name: None if gradient is None else Dual(gradient, [change.get(name) for change in changes])
        for name, gradient in gradients.items()
    }
    directions = [(*movement.meta_parameter, movement.by) for movement in movements]
    found = step.learned.dual_step(start.parameters, given, start.state, directions)
    if found is None:
        return None
    parameters, state = found
    following = replace(iterate, parameters=parameters, state=state)
    duals = following.leaves()
    values = [_value(dual) for dual in duals]
    tangents = [[_tangent(dual, index) for dual in duals] for index in range(len(movements))]
    return following.with_leaves(values), tangents


def _value(leaf: Any) -> Tensor:
    value: Tensor = leaf.value if isinstance(leaf, Dual) else leaf
    return value


def _tangent(leaf: Any, index: int) -> Tensor:
    tangent = leaf.tangents[index] if isinstance(leaf, Dual) else None
    return torch.zeros_like(_value(leaf)) if tangent is None else tangent


def _transformed(
    transformation: GradientTransformation,
    iterate: Iterate,
    gradients: MaybeTensors,
    changes: Sequence[MaybeTensors],
) -> tuple[MaybeTensors, list[MaybeTensors]]:
    """The gradients after a stateless transformation of them all (a clipping), and how they change."""
    inputs = {name: gradient.detach().requires_grad_() for name, gradient in gradients.items() if gradient is not None}
    outputs, _ = transformation.update(
        {name: inputs.get(name) for name in gradients}, transformation.init(iterate.parameters), inplace=False
    )
    jacobian = Jacobian([outputs[name] for name in inputs], list(inputs.values()))
    moved: list[MaybeTensors] = []
    for change in changes:
        if any(change.get(name) is not None for name in inputs):
            moved.append(dict(zip(inputs, jacobian.along([change.get(name) for name in inputs]), strict=True)))
        else:
            moved.append(dict.fromkeys(gradients))
    values = {name: outputs[name].detach() if name in inputs else None for name in gradients}
    return values, moved
