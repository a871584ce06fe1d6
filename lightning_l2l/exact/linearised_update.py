"""The derivative of an update rule along given directions, whatever it is made of.

The rule maps (parameters, state, gradients, meta-parameters) to (parameters, state). Its Jacobian J times a vector is
computed with two reverse passes: ``J' v`` is built once as a function of a dummy ``v``, in which it is linear, and the
derivative of ``<J' v, t>`` with respect to ``v`` is ``J t``. So every operation that has a second derivative is
supported, several directions share one graph, and no forward-mode numbers are needed: torch 2.13 takes those through
Python wherever an operand has no tangent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_l2l.exact.inner_step import InnerStep, Iterate


class Jacobian:
    """The derivative of some tensors with respect to others, to be applied to directions.

    Args:
        outputs: Tensors with a graph; one that does not require a gradient is constant.
        inputs: The leaves that they were computed from.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        moving = [output for output in outputs if output.requires_grad]
        self._places = [place for place, output in enumerate(outputs) if output.requires_grad]
        self._dummies = [torch.zeros_like(output, requires_grad=True) for output in moving]
        self._pulled = torch.autograd.grad(moving, inputs, self._dummies, create_graph=True, allow_unused=True)
        self._like = [output.detach() for output in outputs]

    def along(self, directions: Sequence[Tensor | None]) -> list[Tensor]:
        """How the outputs move when each input moves along its direction; ``None`` for an input that stays."""
        pairs = [
            (pulled, direction)
            for pulled, direction in zip(self._pulled, directions, strict=True)
            if direction is not None and pulled is not None and pulled.requires_grad
        ]
        found = torch.autograd.grad(
            [pulled for pulled, _ in pairs],
            self._dummies,
            [direction for _, direction in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        moved = dict(zip(self._places, found, strict=True))
        tangents = []
        for place, like in enumerate(self._like):
            tangent = moved.get(place)
            tangents.append(torch.zeros_like(like) if tangent is None else tangent)
        return tangents


class LinearisedUpdate:
    """One update and its Jacobian.

    Args:
        step: The inner training step.
        iterate: Where the update starts.
        gradients: The gradient for each parameter, ``None`` where there is none.
        meta_parameters: The meta-parameters by name.

    Attributes:
        following: The next iterate, without history.
    """

    def __init__(
        self,
        step: InnerStep,
        iterate: Iterate,
        gradients: Mapping[str, Tensor | None],
        meta_parameters: Mapping[str, Tensor],
    ) -> None:
        self._leaves = [leaf.detach().requires_grad_() for leaf in iterate.leaves()]
        self._gradients = {
            name: gradient.detach().requires_grad_() for name, gradient in gradients.items() if gradient is not None
        }
        self._meta = {name: tensor.detach().requires_grad_() for name, tensor in meta_parameters.items()}
        following = step.update(
            iterate.with_leaves(self._leaves), {name: self._gradients.get(name) for name in gradients}, self._meta
        )
        outputs = following.leaves()
        self._jacobian = Jacobian(outputs, [*self._leaves, *self._gradients.values(), *self._meta.values()])
        self.following = following.with_leaves([output.detach() for output in outputs])

    def along(
        self,
        leaves: Sequence[Tensor] | None,
        gradients: Mapping[str, Tensor | None],
        meta_parameters: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """The derivative of the next iterate's leaves.

        Args:
            leaves: Derivative of the iterate's leaves; ``None`` for zero.
            gradients: Derivative of each gradient; ``None`` for zero.
            meta_parameters: Derivative of each meta-parameter.
        """
        directions: list[Tensor | None] = list(leaves) if leaves is not None else [None] * len(self._leaves)
        directions += [gradients.get(name) for name in self._gradients]
        directions += [meta_parameters.get(name) for name in self._meta]
        return self._jacobian.along(directions)
