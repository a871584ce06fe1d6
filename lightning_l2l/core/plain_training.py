"""A few ordinary training steps from a given state, without derivatives: what a candidate step size would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.core.inner_step import InnerStep, Iterate

# A run whose loss is this many times its first loss is not coming back within a short test.
_HOPELESS = 10.0


def loss_after_training(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batches: Sequence[Any],
    meta_parameters: Mapping[str, Tensor] | None = None,
) -> tuple[float, int]:
    """The mean held-out loss after training on some batches; a run that diverges is stopped at once.

    Args:
        step: The training step.
        start: Where to start; it is not changed.
        batches: One batch for each step.
        meta_batches: Held-out batches.
        meta_parameters: Used in place of the learned optimizer's own.

    Returns:
        The loss (``inf`` for a run that diverged) and the number of steps that were taken.
    """
    iterate = start.fresh()
    first: float | None = None
    for taken, batch in enumerate(batches):
        loss = step.evaluate(iterate, batch)
        value = loss.item()
        first = value if first is None else first
        if not math.isfinite(value) or value > first + _HOPELESS * abs(first):
            return math.inf, taken
        gradients = step.gradients(loss, iterate, create_graph=False)
        with torch.no_grad():
            iterate = step.update(iterate, gradients, meta_parameters).fresh()
    with torch.no_grad():
        losses = [step.evaluate(iterate.fresh(), batch).item() for batch in meta_batches]
    mean = sum(losses) / len(losses)
    return (mean if math.isfinite(mean) else math.inf), len(batches)
