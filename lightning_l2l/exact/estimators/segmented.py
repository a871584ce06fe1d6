"""Reverse mode in segments: iterates are stored every sqrt(K) steps, the graphs in between are made again.

The same numbers as :func:`~lightning_l2l.exact.estimators.reverse.reverse`, with the graphs of about ``sqrt(K)`` steps
and as many stored iterates in memory instead of the graphs of all K. Cost: one more plain training step per step. For
learned optimizers with many meta-parameters over long unrolls, where reverse does not fit.

A step that is taken again must be the same step: it starts from the stored parameters, optimizer state and
buffers (BatchNorm's averages) with the random numbers of the first time (dropout). ``torch.utils.checkpoint`` cannot do
this job: the gradient inside each step triggers its recomputation at once, and memory grows (measured at K = 160:
1.8 GB, against 0.3 GB for plain reverse and 0.08 GB for this).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.estimators.adjoint import Adjoint, Record, injection, recorded_step, rescaled
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.random_state import RandomState
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.tally import Tally, rate_per_step

# Replayed losses agree to rounding; reduced-precision kernels of an accelerator may differ by a few per mille.
_REPLAY_TOLERANCE = 1e-2


@dataclass(frozen=True)
class _Checkpoint:
    """Everything that a segment needs to be run again. ``taken`` steps lie before it."""

    taken: int
    iterate: Iterate
    random_state: RandomState
    log_scale: Tensor


def segment_length(steps: int) -> int:
    """Steps per segment: the square root of the number of steps, rounded up."""
    return math.isqrt(steps - 1) + 1


def segmented(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
) -> tuple[MetaGradient, Iterate]:
    """Meta-gradient by reverse mode with recomputation; exact to second order, memory about ``sqrt(K)``.

    Args:
        step: The inner training step.
        start: The iterate to start from.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        reason: Why this estimator was chosen, for the diagnostics.

    Returns:
        The result, and the iterate that the unroll arrived at (for a homogeneous problem up to a factor).

    Raises:
        RuntimeError: The loss gave another value when a step was taken again, so it depends on something that
            was not put back.
    """
    meta = {name: tensor for name, tensor in step.learned.named_parameters() if tensor.requires_grad}
    tally = Tally(objective, len(batches), step.homogeneity)
    length = segment_length(len(batches))
    iterate = step.packed(start).fresh()
    devices = {leaf.device for leaf in iterate.leaves()}
    log_scale = torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)
    checkpoints: list[_Checkpoint] = []
    slopes: dict[int, tuple[Tensor, Tensor]] = {}

    complete = True
    for taken, batch in enumerate(batches, start=1):
        if (taken - 1) % length == 0:
            checkpoints.append(_Checkpoint(taken - 1, iterate.fresh(), RandomState.now(devices), log_scale))
        loss = step.evaluate(iterate, batch)
        if tally.diverged(loss):
            complete = False
            break
        iterate, gradients = iterate.gathered(step.gradients(loss, iterate, create_graph=False))
        with torch.no_grad():
            iterate = step.update(iterate, gradients)
        iterate = iterate.fresh()
        if step.homogeneity is not None:
            iterate, _, log_scale = rescaled(iterate, log_scale)
        if taken in tally.weights:
            # With gradients on, since some kernels draw other random numbers without.
            slopes[taken] = tally.add(taken, step.evaluate(iterate.fresh(), meta_batch), log_scale)
    del loss

    adjoint = Adjoint(step, list(meta.values()))
    arrived = RandomState.now(devices)
    replayed: list[Tensor] = []
    while complete and checkpoints:
        checkpoint = checkpoints.pop()
        segment = batches[checkpoint.taken : checkpoint.taken + length]
        records, losses = _replay(step, checkpoint, segment, meta_batch, slopes)
        replayed = losses + replayed
        adjoint.carry_back(records)
    arrived.restore()
    if complete:
        _refuse_other_losses(list(tally.inner_losses.unbind()), replayed)
    growth = rate_per_step(adjoint.last_norm, adjoint.first_norm, len(batches) - 1)
    found = dict(zip(meta, adjoint.gradients(), strict=True))
    return tally.result("segmented", reason, found, growth), iterate.unpacked()


def _replay(
    step: InnerStep,
    checkpoint: _Checkpoint,
    batches: Sequence[Any],
    meta_batch: Any,
    slopes: dict[int, tuple[Tensor, Tensor]],
) -> tuple[list[Record], list[Tensor]]:
    """One segment again, this time with graphs: the records and the losses of its steps."""
    checkpoint.random_state.restore()
    iterate, log_scale = checkpoint.iterate, checkpoint.log_scale
    records, losses = [], []
    for taken, batch in enumerate(batches, start=checkpoint.taken + 1):
        loss = step.evaluate(iterate, batch)
        losses.append(loss.detach().double())
        record, iterate, log_scale = recorded_step(step, iterate, loss, log_scale)
        if taken in slopes:
            _, vectors = step.judge(iterate, meta_batch)
            record.injection = injection(iterate, vectors, *slopes[taken])
        records.append(record)
    return records, losses


def _refuse_other_losses(first: list[Tensor], second: list[Tensor]) -> None:
    expected, found = torch.stack(first), torch.stack(second)
    differs = (found - expected).abs() > _REPLAY_TOLERANCE * expected.abs()
    if bool(differs.any()):
        place = int(differs.nonzero()[0])
        raise RuntimeError(
            f"estimator='segmented' takes each step twice, and step {place + 1} had the loss {first[place].item():.6g} "
            f"at first and {second[place].item():.6g} the second time. So the loss depends on something that cannot be "
            "put back: a generator of its own, a counter, or tensors that are not in `params` and `buffers`. Draw "
            "from the global generators and pass what the loss writes as buffers, or use estimator='reverse'."
        )
