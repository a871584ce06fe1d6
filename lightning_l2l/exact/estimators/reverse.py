"""Reverse mode: run forwards keeping each step's graph, then carry the adjoint back.

One pass gives the derivative for any number of meta-parameters, so this is the estimator for learned optimizers with
many weights. Memory grows linearly with the number of steps (the graph of every step is kept). Cost: about one and a
half gradients more per step than plain training.

The graphs of the steps are not connected: the adjoint is handed from one to the next as a vector with its own
exponent, which is what keeps it in the number range where plain back-propagation through the whole unroll gives NaN or
a silent zero (Corollary 1 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_l2l.exact.estimators.adjoint import Adjoint, Record, injection, recorded_step
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.tally import Tally, rate_per_step


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
    iterate = step.packed(start).fresh()
    log_scale = torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)
    records: list[Record] = []

    for taken, batch in enumerate(batches, start=1):
        loss = step.evaluate(iterate, batch)
        if tally.diverged(loss):
            break
        record, iterate, log_scale = recorded_step(step, iterate, loss, log_scale)
        if taken in tally.weights:
            meta_loss, slopes = step.judge(iterate, meta_batch)
            record.injection = injection(iterate, slopes, *tally.add(taken, meta_loss, log_scale))
        records.append(record)

    adjoint = Adjoint(step, list(meta.values()))
    adjoint.carry_back(records)
    growth = rate_per_step(adjoint.last_norm, adjoint.first_norm, len(batches) - 1)
    found = dict(zip(meta, adjoint.gradients(), strict=True))
    return tally.result("reverse", reason, found, growth), iterate.unpacked()
