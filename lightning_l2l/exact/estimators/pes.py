"""Persistent evolution strategies: evolution strategies over windows, without the bias of truncation.

Every particle keeps its own iterate from window to window and draws a new perturbation for each; the value of a
window is credited to the *sum* of the particle's perturbations since the episode began, because all of them had
a part in it. So the effect of today's meta-parameters on losses many windows later is seen, at the price of a variance
that grows with the number of windows in an episode.

Source: Vicol, Metz, Sohl-Dickstein 2021 (arXiv 2112.13835), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_l2l.exact.estimators.es import meta_parameters, particle_result
from lightning_l2l.exact.estimators.over_processes import over_processes
from lightning_l2l.exact.estimators.particle_unroll import particle, unroll
from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Tensors
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.processes import together
from lightning_l2l.exact.result import MetaGradient


def pes(
    step: InnerStep,
    start: Iterate,
    credited: Tensors,
    directions: Tensors,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
    particles: Particles | None = None,
) -> tuple[MetaGradient, Iterate, Tensors]:
    """The contribution of one window to the meta-gradient.

    Args:
        step: The inner training step.
        start: The particles' iterates, with the particle as the first dimension.
        credited: By meta-parameter, the sum of the particles' perturbations in the windows before.
        directions: The perturbations in this window.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective of the window.
        reason: Why this estimator was chosen, for the diagnostics.
        particles: How the particles are computed.

    Returns:
        The estimate (its value is the mean over the particles), where the particles arrived, and the new sum.
    """
    total = {name: direction + credited[name] for name, direction in directions.items()}
    result, iterate = credited_window(
        "pes", step, start, total, directions, batches, meta_batch, objective, reason, particles or Particles()
    )
    return result, iterate, total


def credited_window(
    estimator: str,
    step: InnerStep,
    start: Iterate,
    credited: Tensors,
    directions: Tensors,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str,
    particles: Particles,
) -> tuple[MetaGradient, Iterate]:
    """Unroll particles with perturbed meta-parameters and credit the values to given directions.

    Args:
        estimator: The name of the estimator, for the diagnostics.
        step: The inner training step.
        start: The particles' iterates, with the particle as the first dimension.
        credited: By meta-parameter, what the values are credited to.
        directions: By meta-parameter, how the particles are perturbed.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective of the window.
        reason: Why this estimator was chosen, for the diagnostics.
        particles: How the particles are computed.

    Returns:
        The estimate, and where the particles arrived.

    Raises:
        ValueError: A data-parallel training whose loss does not allow to spread them.
        NegativeLossError: The objective takes the logarithm of a negative loss.
    """
    moved = {name: tensor + directions[name] for name, tensor in meta_parameters(step).items()}
    with over_processes(step, particle(start, 0), batches, meta_batch, particles, carried=True) as given:
        if given.obstacle:
            raise ValueError(
                f"estimator={estimator!r} carries particles from window to window, each process its own, and here they "
                f"cannot be spread over the processes: {given.obstacle}. Use 'truncated' or 'es'."
            )
        with together(given.processes):
            run = unroll(
                given.step, start, moved, given.batches, given.meta_batch, objective,
                batching=particles.batching, loss_limit=particles.loss_limit,
            )  # fmt: skip
    gradients, errors = particles.gradient(run.values, credited)
    value = particles.over_ranks(run.values.mean())
    losses = particles.over_ranks(run.losses.mean(1))
    result = particle_result(estimator, reason, run, particles, value, losses, gradients, errors, given.notes)
    return result, run.iterate
