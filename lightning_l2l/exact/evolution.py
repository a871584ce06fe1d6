"""Evolution strategies: the meta-gradient from the meta-objectives of perturbed meta-parameters.

Particles come in antithetic pairs ``theta + delta`` and ``theta - delta``, with ``delta`` Gaussian of width sigma, and
the gradient is the mean over the pairs of

    (value of the first - value of the second) / (2 sigma**2) * direction

with the direction ``delta`` (``"es"``, ``"es_single"``), or for ``"pes"`` the sum of the particle's perturbations since
the episode began, because all of them had a part in the value. It estimates the gradient of the smoothed
meta-objective without bias.

Every particle's tensors are slices of tensors with one more dimension in front, and ``torch.func.vmap`` computes loss
and update of all particles in one call; a loss that it cannot batch (an LSTM, ``.item()``, a branch on a value) is
called for one particle after the other instead. Both give the same numbers: every particle sees the same batches and
the same random numbers (dropout), which also makes their differences less noisy. In a data-parallel training every
process computes all particles on batches of its own, and losses and gradients are means over the processes.

Sources: Salimans et al. 2017 (arXiv 1703.03864); persistent: Vicol, Metz, Sohl-Dickstein 2021 (arXiv 2112.13835,
algorithm 2); a single perturbation per episode: Vicol 2023 (arXiv 2304.11153), Li et al. 2023 (arXiv 2304.12180).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from lightning_l2l.exact.estimators import EvolutionStrategies
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Tensors
from lightning_l2l.exact.objectives import NegativeLossError, Objective, is_logarithmic, objective_weights
from lightning_l2l.exact.random_state import RandomState
from lightning_l2l.exact.result import Diagnostics, MetaGradient


def evolution_strategies(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    strategy: EvolutionStrategies,
    number: int = 0,
    reason: str = "asked for",
) -> tuple[MetaGradient, Iterate]:
    """An unroll on its own.

    Args:
        step: The inner training step.
        start: The iterate to start from, the same for all particles.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        strategy: How many particles, how far apart, how computed.
        number: Which perturbations of the seed: the number of the unroll in its episode.
        reason: Why evolution strategies, for the diagnostics.

    Returns:
        The estimate, with the value and the iterate of one more particle that is not perturbed.

    Raises:
        NegativeLossError: The objective takes the logarithm of a negative loss.
    """
    meta = step.meta_parameters()
    directions = perturbations(strategy, meta, number)
    moved = {name: torch.cat([tensor + directions[name], tensor.unsqueeze(0)]) for name, tensor in meta.items()}
    run = _unroll(step, spread(start, strategy.particles + 1), moved, batches, meta_batch, strategy)
    result = _result(run, strategy, directions, run.values[-1], run.losses[:, -1], run.values[:-1], reason)
    return result, _particle(run.iterate, strategy.particles)


def credited_unroll(
    step: InnerStep,
    particles: Iterate,
    credited: Tensors,
    directions: Tensors,
    batches: Sequence[Any],
    meta_batch: Any,
    strategy: EvolutionStrategies,
) -> tuple[MetaGradient, Iterate]:
    """One of several unrolls that particles go through.

    Args:
        step: The inner training step.
        particles: The particles' iterates, with the particle as the first dimension.
        credited: By meta-parameter, the directions that the values are credited to.
        directions: By meta-parameter, how the particles are perturbed.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        strategy: How the particles are computed.

    Returns:
        The estimate (its value and losses are means over the particles), and the particles after the unroll.

    Raises:
        NegativeLossError: The objective takes the logarithm of a negative loss.
    """
    moved = {name: tensor + directions[name] for name, tensor in step.meta_parameters().items()}
    run = _unroll(step, particles, moved, batches, meta_batch, strategy)
    value, losses = run.values.mean(), run.losses.mean(1)
    return _result(run, strategy, credited, value, losses, run.values, "asked for"), run.iterate


def perturbations(strategy: EvolutionStrategies, meta: Mapping[str, Tensor], number: int) -> Tensors:
    """The perturbations of all particles in one unroll of an episode, a pure function of seed and number.

    Returns:
        For each meta-parameter a tensor with the particle as its first dimension; the second half is the negative of
        the first.

    Example:
        >>> found = perturbations(EvolutionStrategies(particles=4), {"theta": torch.zeros(3)}, 0)["theta"]
        >>> found.shape, bool((found[:2] == -found[2:]).all())
        (torch.Size([4, 3]), True)
    """
    # Strings are hashed by Python's random, so neighbouring seeds and numbers have nothing in common.
    mixed = random.Random(f"{strategy.seed}/{number}").getrandbits(62)
    generator = torch.Generator().manual_seed(mixed)
    found = {}
    for name, tensor in meta.items():
        half = torch.randn((strategy.particles // 2, *tensor.shape), dtype=torch.float64, generator=generator)
        half = (half * strategy.standard_deviation).to(tensor.device, tensor.dtype)
        found[name] = torch.cat([half, -half])
    return found


def spread(iterate: Iterate, count: int) -> Iterate:
    """That many copies of an iterate, as one with a particle dimension in front."""
    return _mapped(iterate, lambda leaf: leaf.detach().expand(count, *leaf.shape).clone())


def _particle(iterate: Iterate, index: int) -> Iterate:
    """One particle of many, as an ordinary iterate."""
    return _mapped(iterate, lambda leaf: leaf[index].detach().clone())


def _mapped(iterate: Iterate, function: Callable[[Tensor], Tensor]) -> Iterate:
    trees: Any = (iterate.parameters, iterate.state, iterate.buffers)
    found: Any = optree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, trees)
    return Iterate(*found)


def _result(
    run: _Run,
    strategy: EvolutionStrategies,
    credited: Mapping[str, Tensor],
    value: Tensor,
    losses: Tensor,
    values: Tensor,
    reason: str,
) -> MetaGradient:
    """The estimate from the particles' ``values``, with the value and the losses to report."""
    pairs = len(values) // 2
    slopes = (values[:pairs] - values[pairs:]) / (2 * strategy.standard_deviation**2)
    gradients, errors = {}, {}
    for name, direction in credited.items():
        samples = slopes.reshape(-1, *[1] * (direction.dim() - 1)) * direction[:pairs].double()
        gradients[name] = samples.mean(0).to(direction.dtype)
        deviation = samples.std(0) if pairs > 1 else torch.full_like(samples[0], torch.nan)
        errors[name] = (deviation / pairs**0.5).to(direction.dtype)

    value, losses = value.detach().cpu(), losses.detach().cpu()
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    # A loss limit makes an estimate of losses that are not finite: then nothing was cut off.
    truncated = bad[0] + 1 if bad and not finite else None
    if truncated is None and bool(run.lowest < 0):
        raise NegativeLossError(run.lowest.item())
    # log(0), which only a logarithmic objective can have given.
    underflow = truncated is None and bool((run.values == -torch.inf).any())
    overflow = truncated is None and not underflow and not (finite and bool(value.isfinite()))
    if truncated is not None or underflow or overflow:
        gradients = {name: torch.full_like(gradient, torch.nan) for name, gradient in gradients.items()}
    diagnostics = Diagnostics(
        strategy.method, reason, losses, overflow, underflow, truncated, standard_error=errors, notes=(run.how,)
    )
    return MetaGradient(value.item(), gradients, diagnostics)


@dataclass(frozen=True)
class _Run:
    """What an unroll of many particles gave.

    Attributes:
        values: The meta-objective of each particle; ``[particles]``, float64.
        lowest: The smallest meta-loss that a logarithm was taken of; 0-dim float64, infinite if of none.
        iterate: The particles after it, with the particle as the first dimension of every tensor.
        losses: The inner loss of each step and particle; ``[steps, particles]``, float64.
        how: How the particles were computed.
    """

    values: Tensor
    lowest: Tensor
    iterate: Iterate
    losses: Tensor
    how: str


def _unroll(
    step: InnerStep,
    start: Iterate,
    meta: Mapping[str, Tensor],
    batches: Sequence[Any],
    meta_batch: Any,
    strategy: EvolutionStrategies,
) -> _Run:
    """Train every particle with its own meta-parameters and evaluate the meta-objective of each."""
    arguments = (start, meta, batches, meta_batch, strategy.objective, strategy.loss_limit)
    one_by_one = "one particle after the other"
    with warnings.catch_warnings():
        # Operations that vmap takes one particle after the other, inside: slow, but right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        if strategy.batching == "loop":
            return _unrolled(_ParticleStep(step, batched=False), *arguments, one_by_one)
        before = RandomState.now({leaf.device for leaf in start.leaves()})
        try:
            return _unrolled(_ParticleStep(step, batched=True), *arguments, "all particles at once")
        except Exception as error:  # if it is not vmap's, the loop raises it again
            if strategy.batching == "vmap":
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        before.restore()
        how = f"{one_by_one}, since torch.func.vmap cannot batch the training step ({reason})"
        return _unrolled(_ParticleStep(step, batched=False), *arguments, how)


def _unrolled(
    step: _ParticleStep,
    iterate: Iterate,
    meta: Mapping[str, Tensor],
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    loss_limit: float | None,
    how: str,
) -> _Run:
    weights = objective_weights(objective, len(batches))
    logarithmic = is_logarithmic(objective)
    values: Tensor | float = 0.0
    lowest = iterate.leaves()[0].new_full((), torch.inf, dtype=torch.float64)
    losses = []
    for taken in range(len(batches) + 1):
        iterate = iterate.with_leaves([leaf.detach().requires_grad_() for leaf in iterate.leaves()])
        meta_batches = [meta_batch] if taken in weights else []
        meta_losses, found, buffers = step.evaluate(iterate, meta_batches, batches[taken : taken + 1])
        for meta_loss in meta_losses:
            meta_loss = meta_loss.double()
            if loss_limit is not None:
                meta_loss = torch.where(meta_loss.isfinite(), meta_loss, loss_limit).clamp(max=loss_limit)
            if logarithmic:
                # Whether that is an error is seen at the end: one transfer from the device, not one for each step.
                lowest = torch.minimum(lowest, meta_loss.nan_to_num(torch.inf, torch.inf, -torch.inf).min())
                meta_loss = meta_loss.log()
            values = values + weights[taken] * meta_loss
        for loss in found:
            losses.append(loss.detach().double())
            gradients = step.inner.gradients(loss.sum(), iterate, create_graph=False)
            with torch.no_grad():
                iterate = replace(step.update(iterate, gradients, meta), buffers=buffers)
    assert isinstance(values, Tensor)
    arrived = iterate.with_leaves([leaf.detach() for leaf in iterate.leaves()])
    return _Run(values, lowest, arrived, torch.stack(losses), how)


class _ParticleStep:
    """An inner step whose tensors have a particle dimension in front."""

    def __init__(self, inner: InnerStep, *, batched: bool) -> None:
        self.inner = inner
        self._batched = batched

    def evaluate(
        self, iterate: Iterate, meta_batches: Sequence[Any], batches: Sequence[Any]
    ) -> tuple[list[Tensor], list[Tensor], Tensors]:
        """Losses of each particle on meta-batches and on training batches, and the buffers after the latter.

        One call for both, since calling vmap is what takes the time with small problems.
        """

        def one(parameters: Tensors, buffers: Tensors) -> tuple[list[Tensor], list[Tensor], Tensors]:
            # With gradients on: a loss may differentiate something itself.
            meta_losses = [
                self.inner.evaluate_here(Iterate(parameters, None, _copies(buffers)), batch).detach()
                for batch in meta_batches
            ]
            own = _copies(buffers)
            return meta_losses, [self.inner.evaluate_here(Iterate(parameters, None, own), b) for b in batches], own

        # The processes meet outside of vmap, once for all particles.
        self.inner.share_buffers(iterate)
        arrived: list[Tensors] = []

        def here() -> list[Tensor]:
            meta_losses, losses, buffers = self._over_particles(one, iterate.parameters, iterate.buffers)
            arrived[:] = [buffers]
            return [*meta_losses, *losses]

        processes, first = self.inner.processes, iterate.leaves()[0]
        like = [first.new_zeros(len(first), dtype=torch.float64)] * (len(meta_batches) + len(batches))
        found: Sequence[Any] = here() if processes is None else processes.shared(here, like)
        return list(found[: len(meta_batches)]), list(found[len(meta_batches) :]), _copies(arrived[0])

    def update(self, iterate: Iterate, gradients: Mapping[str, Tensor | None], meta: Mapping[str, Tensor]) -> Iterate:
        """The next iterate of each particle; the buffers stay."""
        flat, structure = optree.tree_flatten(iterate.state)
        present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        # Numbers in the state (a step count) are the same for all particles and go past vmap.
        following: list[Any] = []

        def one(parameters: Tensors, tensors: list[Tensor], gradients: Tensors, meta: Tensors) -> Any:
            given = iter(tensors)
            state = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            own = Iterate(parameters, optree.tree_unflatten(structure, state), {})
            moved = self.inner.update(own, {name: gradients.get(name) for name in parameters}, meta)
            leaves, following[:] = optree.tree_flatten(moved.state)[0], [moved.state]
            return moved.parameters, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        parameters, moved = self._over_particles(one, iterate.parameters, tensors, present, dict(meta))
        leaves, structure = optree.tree_flatten(following[0])
        rest = iter(moved)
        state = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return replace(iterate, parameters=parameters, state=optree.tree_unflatten(structure, state))

    def _over_particles(self, function: Callable[..., Any], *trees: Any) -> Any:
        """``function`` for each particle: its arguments are slices, its results are stacked."""
        arguments: Any = trees
        leaves, structure = optree.tree_flatten(arguments)
        shapes: list[Any] = []

        # vmap walks through trees in Python; flat lists of tensors spare it half of its time.
        def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
            found, shape = optree.tree_flatten(function(*optree.tree_unflatten(structure, leaves)))
            shapes[:] = [shape]
            return tuple(found)

        if self._batched:
            stacked = torch.func.vmap(flat, randomness="same")(*leaves)
            return optree.tree_unflatten(shapes[0], stacked)
        before = RandomState.now({leaf.device for leaf in leaves})
        found = []
        for index in range(len(leaves[0])):
            before.restore()
            found.append(flat(*[leaf[index] for leaf in leaves]))
        return optree.tree_unflatten(shapes[0], [torch.stack(parts) for parts in zip(*found, strict=True)])


def _copies(buffers: Tensors) -> Tensors:
    return {name: buffer.detach().clone() for name, buffer in buffers.items()}
