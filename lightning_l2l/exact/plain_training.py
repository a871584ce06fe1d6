"""A few ordinary training steps from a given state, without derivatives: what a candidate step size would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.inner_step import InnerStep, Iterate

# A run whose loss has risen by more than this many times its first loss is stopped: in 180 short runs (twelve pairs of
# task and optimizer, three lengths, five seeds) no candidate that turned out best had risen by its first loss once.
_HOPELESS = 2.0


def loss_after_training(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batches: Sequence[Any],
    meta_parameters: Mapping[str, Tensor] | None = None,
) -> tuple[float, int]:
    """The mean held-out loss after training on some batches; a run that diverges is stopped at once.

    Cost: one training step for each batch, one evaluation for each held-out batch. Memory: one more copy of the
    parameters, the optimizer state and the buffers.

    Args:
        step: The training step.
        start: Where to start; it is not changed.
        batches: One batch for each step; none for the held-out loss where the training starts.
        meta_batches: Held-out batches, at least one.
        meta_parameters: Used in place of the learned optimizer's own.

    Returns:
        The loss (``inf`` for a run that diverged) and the number of gradients that were taken.

    Raises:
        ValueError: ``meta_batches`` is empty.
    """
    if not meta_batches:
        raise ValueError("meta_batches is empty: a candidate is judged by its held-out loss, which needs a batch.")
    iterate = start.fresh()
    first: float | None = None
    for taken, batch in enumerate(batches):
        loss = step.evaluate(iterate, batch)
        value = loss.item()
        first = value if first is None else first
        if not math.isfinite(value) or (first != 0 and value > first + _HOPELESS * abs(first)):
            return math.inf, taken
        gradients = step.gradients(loss, iterate, create_graph=False)
        with torch.no_grad():
            iterate = step.update(iterate, gradients, meta_parameters).fresh()
    with torch.no_grad():
        # Each batch on a copy of the buffers: the loss may write them (BatchNorm in training mode).
        losses = [step.evaluate(iterate.fresh(), batch).item() for batch in meta_batches]
    mean = sum(losses) / len(losses)
    return (mean if math.isfinite(mean) else math.inf), len(batches)
