"""Evolution strategies: the meta-gradient from the meta-objectives of perturbed meta-parameters.

Needs no derivative through the unroll, so neither chaos nor operations without a second derivative disturb it; its
noise grows with the number of meta-parameters instead. Cost: one plain training step per step and particle, batched;
memory does not grow with the number of steps.

It estimates the gradient of the meta-objective smoothed by a Gaussian (see
:mod:`~lightning_l2l.exact.estimators.particles`). Source: Salimans et al. 2017 (arXiv 1703.03864), with antithetic
pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.estimators.over_processes import over_processes
from lightning_l2l.exact.estimators.particle_unroll import ParticleRun, particle, spread, unroll
from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.processes import together
from lightning_l2l.exact.result import Diagnostics, MetaGradient
from lightning_l2l.exact.tally import NegativeLossError


def es(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str = "",
    particles: Particles | None = None,
) -> tuple[MetaGradient, Iterate]:
    """Meta-gradient by antithetic evolution strategies.

    Args:
        step: The inner training step.
        start: The iterate to start from, the same for all particles.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        reason: Why this estimator was chosen, for the diagnostics.
        particles: How many, how far apart, how computed.

    Returns:
        The estimate, with the value and the iterate of one more particle that is not perturbed.

    Raises:
        NegativeLossError: The objective takes the logarithm of a negative loss.
    """
    with over_processes(step, start, batches, meta_batch, particles or Particles()) as given:
        particles = given.particles
        assert particles.seed is not None
        meta = meta_parameters(step)
        directions = particles.directions(meta, particles.seed, window=0)
        moved = {name: torch.cat([tensor + directions[name], tensor.unsqueeze(0)]) for name, tensor in meta.items()}
        count = len(next(iter(moved.values())))
        with together(given.processes):
            run = unroll(
                given.step, spread(given.start, count), moved, given.batches, given.meta_batch, objective,
                batching=particles.batching, loss_limit=particles.loss_limit,
            )  # fmt: skip
    gradients, errors = particles.gradient(run.values[:-1], directions)
    value, losses = particles.over_ranks(run.values[-1]), particles.over_ranks(run.losses[:, -1])
    result = particle_result("es", reason, run, particles, value, losses, gradients, errors, given.notes)
    return result, particle(run.iterate, count - 1)


def meta_parameters(step: InnerStep) -> dict[str, Tensor]:
    """The learned optimizer's meta-parameters by name, detached."""
    return {name: tensor.detach() for name, tensor in step.learned.named_parameters() if tensor.requires_grad}


def particle_result(
    estimator: str,
    reason: str,
    run: ParticleRun,
    particles: Particles,
    value: Tensor,
    losses: Tensor,
    gradients: Mapping[str, Tensor],
    errors: Mapping[str, Tensor],
    notes: Sequence[str] = (),
) -> MetaGradient:
    """The result of an estimator with particles, judged.

    Args:
        estimator: Its name.
        reason: Why it was chosen.
        run: The unroll of the particles.
        particles: They.
        value: The meta-objective to report; 0-dim.
        losses: The inner losses to report; ``[steps]``.
        gradients: The estimate by meta-parameter.
        errors: Its standard error.
        notes: Remarks, beside how the particles were computed.

    Raises:
        NegativeLossError: The objective takes the logarithm of a negative loss.
    """
    value, losses = value.detach().cpu(), losses.detach().cpu()
    # Of all processes, so that each comes to the same end: is any loss negative, and how much so, any value log(0)?
    signs = torch.stack([run.lowest < 0, run.lowest.clamp(max=0), (run.values == -torch.inf).any()]).double()
    negative, lowest, zero = particles.over_ranks(signs).tolist()
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    # A loss limit makes an estimate of losses that are not finite: then nothing was cut off.
    truncated = bad[0] + 1 if bad and not finite else None
    if negative and truncated is None:
        raise NegativeLossError(lowest / negative)
    # log(0), which only a logarithmic objective can have given.
    underflow = truncated is None and zero > 0
    overflow = truncated is None and not underflow and not (finite and bool(value.isfinite()))
    if truncated is not None or underflow or overflow:
        gradients = {name: torch.full_like(gradient, torch.nan) for name, gradient in gradients.items()}
    diagnostics = Diagnostics(
        estimator, reason, losses, overflow, underflow, truncated, torch.nan,
        standard_error=dict(errors), notes=(run.how, *notes),
    )  # fmt: skip
    return MetaGradient(value.item(), dict(gradients), diagnostics)
