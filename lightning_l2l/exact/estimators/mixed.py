"""Back-propagation and evolution strategies of the same particles, weighted by their inverse variances.

Where the meta-objective is smooth, back-propagation through every perturbed unroll has by far the smaller variance;
where the unroll is chaotic it explodes, and evolution strategies take over. The weights are found anew for each
meta-parameter from the scatter over the particles, so nobody has to know in advance. Both parts estimate the gradient
of the same smoothed meta-objective. (The weights depend on the samples that they weight, which biases a mix of few
particles slightly towards those that happened to agree.)

Cost and memory are those of plain back-propagation through K steps of every particle: for short unrolls.
Source: Metz et al. 2019 (arXiv 1810.10180), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.estimators.es import meta_parameters, particle_result
from lightning_l2l.exact.estimators.over_processes import over_processes
from lightning_l2l.exact.estimators.particle_unroll import particle, spread, unroll
from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.processes import together
from lightning_l2l.exact.result import MetaGradient


def mixed(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
    particles: Particles | None = None,
) -> tuple[MetaGradient, Iterate]:
    """Meta-gradient by the inverse-variance mix of evolution strategies and back-propagation.

    Args:
        step: The inner training step.
        start: The iterate to start from, the same for all particles.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        reason: Why this estimator was chosen, for the diagnostics.
        particles: How many, how far apart, how computed; at least two pairs.

    Returns:
        The estimate, with the value and the iterate of one more particle that is not perturbed.

    Raises:
        ValueError: A single pair of particles, whose scatter is not known; or a data-parallel training whose loss
            does not allow to spread them.
        NegativeLossError: The objective takes the logarithm of a negative loss.
    """
    particles = particles or Particles()
    if particles.count < 4:
        raise ValueError(
            f"estimator='mixed' weighs by the scatter over the pairs of particles, so it needs two pairs at least, "
            f"Particles(count=4); got count={particles.count}."
        )
    with over_processes(step, start, batches, meta_batch, particles) as given:
        if given.obstacle:
            raise ValueError(
                "estimator='mixed' back-propagates through whole trainings of its particles, each process through its "
                f"own, and here they cannot be spread over the processes: {given.obstacle}. Use 'reverse' or 'es'."
            )
        particles = given.particles
        assert particles.seed is not None
        meta = meta_parameters(step)
        directions = particles.directions(meta, particles.seed, window=0)
        moved = {
            name: torch.cat([tensor + directions[name], tensor.unsqueeze(0)]).requires_grad_()
            for name, tensor in meta.items()
        }
        count = len(next(iter(moved.values())))
        with together(given.processes):
            run = unroll(
                given.step, spread(given.start, count), moved, given.batches, given.meta_batch, objective,
                batching=particles.batching, loss_limit=particles.loss_limit, differentiable=True,
            )  # fmt: skip
            slopes = torch.autograd.grad(run.values[:-1].sum(), list(moved.values()), allow_unused=True)
    values = run.values.detach()

    found, errors = particles.gradient(values[:-1], directions)
    gradients, mixed_errors = {}, {}
    shares = []
    for (name, tensor), slope in zip(meta.items(), slopes, strict=True):
        slope = torch.zeros_like(moved[name]) if slope is None else slope
        mean, error = particles.mean_and_error(_pair_means(slope[:-1].double()))
        gradients[name], mixed_errors[name], share = _mix(mean, error, found[name].double(), errors[name].double())
        gradients[name], mixed_errors[name] = gradients[name].to(tensor.dtype), mixed_errors[name].to(tensor.dtype)
        shares.append(share.flatten())
    note = f"mean weight of back-propagation {torch.cat(shares).mean().item():.3f}"
    value, losses = particles.over_ranks(values[-1]), particles.over_ranks(run.losses[:, -1])
    notes = [note, *given.notes]
    result = particle_result("mixed", reason, run, particles, value, losses, gradients, mixed_errors, notes)
    return result, particle(run.iterate, count - 1)


def _pair_means(samples: Tensor) -> Tensor:
    """The two of a pair are not independent: their mean is one sample."""
    pairs = len(samples) // 2
    return (samples[:pairs] + samples[pairs:]) / 2


def _mix(back: Tensor, back_error: Tensor, strategy: Tensor, strategy_error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mix of two estimates, its standard error, and the weight of the first."""
    # A gradient that is not finite has exploded; its variance is as good as infinite.
    exploded = ~(back.isfinite() & back_error.isfinite())
    back_variance, variance = back_error.square(), strategy_error.square()
    total = back_variance + variance
    # Both zero: the objective is flat or linear there, and back-propagation is exact.
    weight = torch.where(total > 0, variance / total, torch.ones_like(total))
    weight = torch.where(exploded, 0.0, weight)
    mean = torch.where(exploded, strategy, weight * back + (1 - weight) * strategy)
    error = torch.where(exploded, strategy_error, (back_variance * variance / total).nan_to_num(0.0).sqrt())
    return mean, error, weight
