"""Truncated back-propagation: reverse mode inside a window, the iterate carried to the next one without its gradient.

The cheapest estimator over windows, and a biased one: the effect of a meta-parameter beyond the end of the window is
left out, so step sizes and schedules come out too greedy (on the problems of docs, "which estimator", it goes from loss
8 to 211 where the optimum has 0, and stays at 2423 where it has 556).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_l2l.exact.estimators.reverse import reverse
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.result import MetaGradient


def truncated(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
) -> tuple[MetaGradient, Iterate]:
    """The meta-gradient of one window by reverse mode, as if its start did not depend on the meta-parameters.

    Args:
        step: The inner training step.
        start: Where the window before has ended.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective of the window.
        reason: Why this estimator was chosen, for the diagnostics.

    Returns:
        The result, and the iterate for the next window to start from.
    """
    result, iterate = reverse(step, start, batches, meta_batch, objective, reason)
    return replace(result, diagnostics=replace(result.diagnostics, estimator="truncated")), iterate
