"""Evolution strategies with a single perturbation per episode, over windows, without the bias of truncation.

Like persistent evolution strategies, but a particle keeps its perturbation from the first window of the episode to the
last, so what a window's value is credited to is that one perturbation. The variance does not grow with the number of
windows, which makes it the better choice unless the meta-objective needs independent perturbations in each window.

Sources: Vicol 2023 (arXiv 2304.11153); the same idea as noise-reuse evolution strategies, Li et al. 2023 (arXiv
2304.12180).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.estimators.pes import credited_window
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Tensors
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.result import MetaGradient


def es_single(
    step: InnerStep,
    start: Iterate,
    directions: Tensors,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
    particles: Particles | None = None,
) -> tuple[MetaGradient, Iterate]:
    """The contribution of one window to the meta-gradient.

    Args:
        step: The inner training step.
        start: The particles' iterates, with the particle as the first dimension.
        directions: By meta-parameter, the particles' perturbations, the same in every window of an episode.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective of the window.
        reason: Why this estimator was chosen, for the diagnostics.
        particles: How the particles are computed.

    Returns:
        The estimate (its value is the mean over the particles), and where the particles arrived.
    """
    return credited_window(
        "es_single", step, start, directions, directions, batches, meta_batch, objective, reason,
        particles or Particles(),
    )  # fmt: skip
