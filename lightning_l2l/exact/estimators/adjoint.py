"""Steps that remember their graph, and the adjoint that is carried back through them.

Shared by ``reverse``, which keeps the graph of every step, and ``segmented``, which keeps those of one segment at a
time; so the two do the same arithmetic in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.scaled import ScaledVector, largest_exponent, log2_norm


@dataclass
class Record:
    """One step.

    Attributes:
        inputs: The leaves it started from.
        outputs: The leaves it arrived at, before the rescaling.
        rescaling: The power of two that a homogeneous problem's iterate was divided by afterwards; 0-dim float64.
        injection: Derivative of the meta-objective with respect to the leaves after the step, through the meta-loss
            there.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    rescaling: Tensor
    injection: ScaledVector | None = None


def recorded_step(step: InnerStep, iterate: Iterate, loss: Tensor, log_scale: Tensor) -> tuple[Record, Iterate, Tensor]:
    """One training step with its graph.

    Args:
        step: The inner training step.
        iterate: The present iterate, leaves that require a gradient.
        loss: The loss there.
        log_scale: Natural logarithm of the factor between the true iterate and this one.

    Returns:
        The record, the next iterate without history, and its ``log_scale``.
    """
    gradients = step.gradients(loss, iterate, create_graph=step.second_order)
    if not step.second_order:
        gradients = {name: None if g is None else g.detach() for name, g in gradients.items()}
    place, gradients = iterate.gathered(gradients)
    following = step.update(place, gradients)
    record = Record(iterate.leaves(), following.leaves(), torch.zeros_like(log_scale))
    iterate = following.fresh()
    if step.homogeneity is not None:
        iterate, record.rescaling, log_scale = rescaled(iterate, log_scale)
    return record, iterate, log_scale


def rescaled(iterate: Iterate, log_scale: Tensor) -> tuple[Iterate, Tensor, Tensor]:
    """A homogeneous problem's iterate divided by a power of two, that power, and the new logarithm of the scale."""
    exponent = largest_exponent(list(iterate.parameters.values())).to(log_scale.device)
    leaves = ScaledVector(iterate.leaves(), -exponent).at_exponent(torch.zeros_like(exponent))
    moved = iterate.with_leaves([leaf.detach().requires_grad_() for leaf in leaves])
    return moved, exponent, log_scale + exponent * math.log(2.0)


def injection(iterate: Iterate, slopes: Sequence[Tensor], slope: Tensor, exponent: Tensor) -> ScaledVector:
    """Derivative of the meta-objective with respect to the leaves through one meta-loss.

    Args:
        iterate: Where the meta-loss was evaluated.
        slopes: Its gradient for each parameter.
        slope: Derivative of the meta-objective with respect to the meta-loss: mantissa.
        exponent: The same: binary exponent.
    """
    vectors = [*slopes, *(torch.zeros_like(leaf) for leaf in iterate.leaves()[len(slopes) :])]
    # The slope of a logarithm, weight / loss, may be as far out as the loss: it joins the exponent.
    power = slope.abs().log2().floor().nan_to_num(0.0, 0.0, 0.0)
    mantissa = slope * torch.exp2(-power)
    normalised = ScaledVector.of(vectors)
    scaled = [vector * mantissa.to(vector.dtype) for vector in normalised.tensors]
    return ScaledVector(scaled, normalised.exponent + exponent + power)


class Adjoint:
    """The derivative of the meta-objective with respect to the iterate, on its way from the last step to the first.

    Args:
        step: The inner training step.
        meta: The meta-parameters.

    Attributes:
        last_norm: ``log2`` of its norm after the last step.
        first_norm: The same after the first step that it has reached so far.
    """

    def __init__(self, step: InnerStep, meta: Sequence[Tensor]) -> None:
        self._step = step
        self._meta = list(meta)
        self._totals = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in meta]
        self._vector: ScaledVector | None = None
        self.last_norm: Tensor | None = None
        self.first_norm: Tensor | None = None

    def carry_back(self, records: list[Record]) -> None:
        """Pull the adjoint through these steps, the last one first; the list is emptied on the way."""
        while records:
            record = records.pop()  # frees the step's graph as soon as it has been used
            if record.injection is not None:
                self._vector = record.injection if self._vector is None else self._vector.plus(record.injection)
            if self._vector is None:
                continue
            if self.last_norm is None or not records:
                self.first_norm = log2_norm(self._vector)
                self.last_norm = self.first_norm if self.last_norm is None else self.last_norm
            self._vector = self._pull(record, self._vector)

    def gradients(self) -> list[Tensor]:
        """The derivative for each meta-parameter, from the steps that were passed."""
        return [total.to(tensor.dtype) for total, tensor in zip(self._totals, self._meta, strict=True)]

    def _pull(self, record: Record, vector: ScaledVector) -> ScaledVector:
        exponent = vector.exponent - record.rescaling
        pairs = [(out, v) for out, v in zip(record.outputs, vector.tensors, strict=True) if out.requires_grad]
        inputs = [*record.inputs, *self._meta]
        pulled = self._step.average(
            lambda: torch.autograd.grad([out for out, _ in pairs], inputs, [v for _, v in pairs], allow_unused=True),
            inputs,
        )
        count = len(record.inputs)
        for index, gradient in enumerate(pulled[count:]):
            if gradient is not None:
                self._totals[index] = self._totals[index] + gradient.double() * torch.exp2(exponent)
        vectors = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(record.inputs, pulled[:count], strict=True)
        ]
        return ScaledVector.of(vectors, exponent)
