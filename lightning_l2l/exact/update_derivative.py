"""The derivative of an update rule: by dual numbers where the optimizer has them, else by two reverse passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.linearised_update import Jacobian, LinearisedUpdate
from lightning_l2l.functional.dual import Dual
from lightning_l2l.learned.base import DualStep

MaybeTensors = Mapping[str, Tensor | None]
# (name of the meta-parameter, flat index of the scalar in it)
Direction = tuple[str, int]


class Movement(NamedTuple):
    """How everything that an update depends on moves along one direction.

    Attributes:
        leaves: The iterate's leaves; ``None`` for not at all.
        gradients: Each gradient; ``None`` for not at all.
        by: How far the direction's own meta-parameter moves; 0-dim.
    """

    leaves: Sequence[Tensor] | None
    gradients: MaybeTensors
    by: Tensor


class UpdateDerivative:
    """Updates and their derivatives, as long as the meta-parameters stay what they are.

    Args:
        step: The inner training step.
        directions: The scalars to differentiate by; every one of the meta-parameters, if not given.

    Attributes:
        step: The same.
        meta: The meta-parameters by name, detached.
        directions: The same.
    """

    def __init__(self, step: InnerStep, directions: Sequence[Direction] | None = None) -> None:
        self.step = step
        self.meta = {name: t.detach() for name, t in step.learned.named_parameters() if t.requires_grad}
        if directions is None:
            directions = [(name, index) for name, tensor in self.meta.items() for index in range(tensor.numel())]
        self.directions = directions
        self._dual_step = step.learned.dual_step(self.directions)

    def moved_along(
        self, iterate: Iterate, gradients: MaybeTensors, movements: Sequence[Movement]
    ) -> tuple[Iterate, list[list[Tensor]]]:
        """One update and its derivative along each direction.

        Args:
            iterate: Where the update starts.
            gradients: The gradient for each parameter, ``None`` where there is none.
            movements: One for each direction.

        Returns:
            The next iterate, leaves that require a gradient, and for each direction how its leaves move.
        """
        given: MaybeTensors = {name: None if g is None else g.detach() for name, g in gradients.items()}
        changes: Sequence[MaybeTensors] = [movement.gradients for movement in movements]
        step = self.step
        if step.gradient_transformation is not None:
            given, changes = _transformed(step.gradient_transformation, iterate, given, changes)
            step = replace(step, gradient_transformation=None)
        if self._dual_step is not None:
            return _by_dual_numbers(self._dual_step, iterate, given, changes, movements)
        update = LinearisedUpdate(step, iterate, given, self.meta)
        tangents = []
        for (name, place), change, movement in zip(self.directions, changes, movements, strict=True):
            unit = torch.zeros_like(self.meta[name])
            unit.view(-1)[place] = movement.by
            tangents.append(update.along(movement.leaves, change, {name: unit}))
        return update.following.fresh(), tangents


def _by_dual_numbers(
    dual_step: DualStep,
    iterate: Iterate,
    gradients: MaybeTensors,
    changes: Sequence[MaybeTensors],
    movements: Sequence[Movement],
) -> tuple[Iterate, list[list[Tensor]]]:
    leaves = [leaf.detach() for leaf in iterate.leaves()]
    nothing = [None] * len(leaves)
    columns = [nothing if movement.leaves is None else movement.leaves for movement in movements]
    start = iterate.with_leaves([Dual(leaf, t) for leaf, *t in zip(leaves, *columns, strict=True)])  # type: ignore
    given = {
        name: None if gradient is None else Dual(gradient, [change.get(name) for change in changes])
        for name, gradient in gradients.items()
    }
    with torch.no_grad():
        parameters, state = dual_step(start.parameters, given, start.state, [movement.by for movement in movements])
    following = Iterate(parameters, state, iterate.buffers, iterate.packing)
    duals = following.leaves()
    tangents = [[_tangent(dual, index) for dual in duals] for index in range(len(movements))]
    return following.fresh([_value(dual) for dual in duals]), tangents


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
