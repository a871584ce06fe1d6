"""Reverse mode: run forwards keeping each step's graph, then carry the adjoint back.

One pass gives the derivative for any number of meta-parameters, so this is the estimator for learned optimizers with many
weights. Memory grows linearly with the number of steps (the graph of every step is kept). Cost: about one and a half
gradients more per step than plain training.

The graphs of the steps are not connected: the adjoint is handed from one to the next as a vector with its own
exponent, which is what keeps it in the number range where plain back-propagation through the whole unroll gives NaN or a
silent zero (Corollary 1 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.core.inner_step import InnerStep, Iterate
from lightning_l2l.core.objectives import Objective
from lightning_l2l.core.result import MetaGradient
from lightning_l2l.core.scaled import ScaledVector, largest_exponent, log2_norm
from lightning_l2l.core.tally import Tally, rate_per_step


@dataclass
class _Record:
    """One step: the leaves it started from, the leaves it arrived at (before rescaling), and what was judged there."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    rescaling: Tensor
    injection: ScaledVector | None = None


def reverse(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
) -> tuple[MetaGradient, Iterate]:
    """Meta-gradient by reverse mode; exact to second order.

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
    meta = {name: tensor for name, tensor in step.learned.named_parameters() if tensor.requires_grad}
    tally = Tally(objective, len(batches), step.homogeneity)
    iterate = start.fresh()
    log_scale = torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)
    records: list[_Record] = []

    for taken, batch in enumerate(batches, start=1):
        loss = step.evaluate(iterate, batch)
        if tally.diverged(loss):
            break
        gradients = step.gradients(loss, iterate, create_graph=step.second_order)
        if not step.second_order:
            gradients = {name: None if g is None else g.detach() for name, g in gradients.items()}
        following = step.update(iterate, gradients)
        record = _Record(iterate.leaves(), following.leaves(), torch.zeros_like(log_scale))
        iterate = following.fresh()
        if step.homogeneity is not None:
            record.rescaling = largest_exponent(list(iterate.parameters.values())).to(log_scale.device)
            scaled = ScaledVector(iterate.leaves(), -record.rescaling)
            leaves = scaled.at_exponent(torch.zeros_like(record.rescaling))
            iterate = iterate.with_leaves([leaf.detach().requires_grad_() for leaf in leaves])
            log_scale = log_scale + record.rescaling * torch.log(log_scale.new_tensor(2.0))
        if taken in tally.weights:
            meta_loss, slopes = step.judge(iterate, meta_batch)
            record.injection = _injection(iterate, slopes, *tally.add(taken, meta_loss, log_scale))
        records.append(record)

    found, norms = _carry_back(records, list(meta.values()))
    return tally.result("reverse", reason, dict(zip(meta, found, strict=True)), rate_per_step(norms)), iterate


def _injection(iterate: Iterate, slopes: list[Tensor], slope: Tensor, exponent: Tensor) -> ScaledVector:
    """Derivative of the meta-objective with respect to the leaves through this step's meta-loss."""
    vectors = [*slopes, *(torch.zeros_like(leaf) for leaf in iterate.leaves()[len(slopes) :])]
    # The slope of a logarithm, weight / loss, may be as far out as the loss: it joins the exponent.
    power = slope.abs().log2().floor().nan_to_num(0.0, 0.0, 0.0)
    mantissa = slope * torch.exp2(-power)
    normalised = ScaledVector.of(vectors)
    scaled = [vector * mantissa.to(vector.dtype) for vector in normalised.tensors]
    return ScaledVector(scaled, normalised.exponent + exponent + power)


def _carry_back(records: list[_Record], meta: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The derivative for each meta-parameter, and the norms of the adjoint from the last step to the first."""
    totals = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in meta]
    norms: list[Tensor] = []
    adjoint: ScaledVector | None = None
    while records:
        record = records.pop()  # frees the step's graph as soon as it has been used
        if record.injection is not None:
            adjoint = record.injection if adjoint is None else adjoint.plus(record.injection)
        if adjoint is None:
            continue
        norms.append(log2_norm(adjoint))
        exponent = adjoint.exponent - record.rescaling
        pairs = [
            (out, vector) for out, vector in zip(record.outputs, adjoint.tensors, strict=True) if out.requires_grad
        ]
        pulled = torch.autograd.grad(
            [out for out, _ in pairs],
            [*record.inputs, *meta],
            [vector for _, vector in pairs],
            allow_unused=True,
        )
        count = len(record.inputs)
        for index, gradient in enumerate(pulled[count:]):
            if gradient is not None:
                totals[index] = totals[index] + gradient.double() * torch.exp2(exponent)
        vectors = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(record.inputs, pulled[:count], strict=True)
        ]
        adjoint = ScaledVector.of(vectors, exponent)
    found = [total.to(tensor.dtype) for total, tensor in zip(totals, meta, strict=True)]
    return found, norms
