"""The same training steps for many particles at once, each with meta-parameters of its own.

A particle's tensors are slices of tensors with one more dimension in front. ``torch.func.vmap`` computes loss and
update of all particles in one go; a loss that it cannot batch (an LSTM, a ``.item()``, a branch on a value) is called
for one particle after the other instead. Both give the same numbers: every particle sees the same batches and the same
random numbers (dropout), which also makes their differences less noisy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from lightning_l2l.exact.estimators.particles import Batching
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Tensors
from lightning_l2l.exact.objectives import Objective, is_logarithmic, objective_weights
from lightning_l2l.exact.random_state import RandomState

_BATCHED = "all particles at once"


@dataclass(frozen=True)
class ParticleRun:
    """What an unroll of many particles gave.

    Attributes:
        values: The meta-objective of each particle; ``[particles]``, float64. NaN where the objective takes the
            logarithm of a negative loss.
        lowest: The smallest meta-loss that a logarithm was taken of; 0-dim float64, infinite if of none.
        iterate: Where the particles arrived, with the particle as the first dimension of every tensor.
        losses: The inner loss of each step and particle; ``[steps, particles]``, float64.
        how: How the particles were computed.
    """

    values: Tensor
    lowest: Tensor
    iterate: Iterate
    losses: Tensor
    how: str


def spread(iterate: Iterate, count: int) -> Iterate:
    """That many copies of an iterate, as one with a particle dimension in front."""

    def copies(leaf: Any) -> Any:
        return leaf.detach().expand(count, *leaf.shape).clone() if isinstance(leaf, Tensor) else leaf

    return Iterate(
        {name: copies(tensor) for name, tensor in iterate.parameters.items()},
        optree.tree_map(copies, iterate.state),
        {name: copies(tensor) for name, tensor in iterate.buffers.items()},
    )


def particle(iterate: Iterate, index: int) -> Iterate:
    """One particle of many, as an ordinary iterate."""

    def pick(leaf: Any) -> Any:
        return leaf[index].detach().clone() if isinstance(leaf, Tensor) else leaf

    return Iterate(
        {name: pick(tensor) for name, tensor in iterate.parameters.items()},
        optree.tree_map(pick, iterate.state),
        {name: pick(tensor) for name, tensor in iterate.buffers.items()},
    )


def unroll(
    step: InnerStep,
    start: Iterate,
    meta: Mapping[str, Tensor],
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    *,
    batching: Batching = "auto",
    loss_limit: float | None = None,
    differentiable: bool = False,
) -> ParticleRun:
    """Train every particle with its own meta-parameters and evaluate the meta-objective of each.

    Args:
        step: The inner training step.
        start: The particles' iterates, with the particle as the first dimension.
        meta: The particles' meta-parameters, likewise.
        batches: One batch per inner step, the same for all particles.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        batching: How to compute the particles, see :class:`~lightning_l2l.exact.estimators.particles.Particles`.
        loss_limit: Meta-losses count as at most this.
        differentiable: Whether ``values`` keeps its graph, back to ``meta``.
    """
    with warnings.catch_warnings():
        # Operations that vmap takes one particle after the other, inside: slow, but right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        arguments = (start, meta, batches, meta_batch, objective, loss_limit, differentiable)
        if batching == "loop":
            return _unroll(_Mapped(step, False), *arguments, "one particle after the other")
        if batching == "vmap":
            return _unroll(_Mapped(step, True), *arguments, _BATCHED)
        before = RandomState.now({leaf.device for leaf in start.leaves()})
        try:
            return _unroll(_Mapped(step, True), *arguments, _BATCHED)
        except Exception as error:  # if it is not vmap's, the loop raises it again
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        before.restore()
        how = f"one particle after the other, since torch.func.vmap cannot batch the training step ({reason})"
        return _unroll(_Mapped(step, False), *arguments, how)


def _unroll(
    mapped: _Mapped,
    iterate: Iterate,
    meta: Mapping[str, Tensor],
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    loss_limit: float | None,
    differentiable: bool,
    how: str,
) -> ParticleRun:
    weights = objective_weights(objective, len(batches))
    logarithmic = is_logarithmic(objective)
    values: Tensor | None = None
    lowest = iterate.leaves()[0].new_full((), torch.inf, dtype=torch.float64)
    losses = []
    for taken in range(len(batches) + 1):
        if not differentiable or taken == 0:
            iterate = iterate.with_leaves([leaf.detach().requires_grad_() for leaf in iterate.leaves()])
        batch = batches[taken : taken + 1]
        judge = [meta_batch] if taken in weights else []
        judged, found, buffers = mapped.evaluate(iterate, judge, batch, differentiable)
        for value in judged:
            limited = _limited(value.double(), loss_limit)
            if logarithmic:
                # Whether that is an error is seen at the end: one transfer from the device, not one for each step.
                lowest = torch.minimum(lowest, limited.detach().nan_to_num(torch.inf, torch.inf, -torch.inf).min())
                limited = limited.log()
            values = weights[taken] * limited + (0 if values is None else values)
        for loss in found:
            losses.append(loss.detach().double())
            create_graph = differentiable and mapped.step.second_order
            gradients = mapped.step.gradients(loss.sum(), iterate, create_graph=create_graph)
            with nullcontext() if differentiable else torch.no_grad():
                iterate = replace(mapped.update(iterate, gradients, meta), buffers=buffers)
    assert values is not None
    arrived = iterate.with_leaves([leaf.detach() for leaf in iterate.leaves()])
    return ParticleRun(values, lowest, arrived, torch.stack(losses), how)


def _limited(losses: Tensor, limit: float | None) -> Tensor:
    return losses if limit is None else torch.where(losses.isfinite(), losses, limit).clamp(max=limit)


class _Mapped:
    """An inner step whose tensors have a particle dimension in front."""

    def __init__(self, step: InnerStep, batched: bool) -> None:
        self.step = step
        self._batched = batched

    def evaluate(
        self, iterate: Iterate, meta_batches: Sequence[Any], batches: Sequence[Any], differentiable: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensors]:
        """Losses of each particle on meta-batches and on training batches, and the buffers after the latter.

        One call for both, since calling vmap is what takes the time with small problems.
        """

        def one(parameters: Tensors, buffers: Tensors) -> tuple[list[Tensor], list[Tensor], Tensors]:
            # With gradients on: a loss may differentiate something itself.
            place = [Iterate(parameters, None, _copies(buffers)) for _ in meta_batches]
            judged = [self.step.evaluate_here(at, batch) for at, batch in zip(place, meta_batches, strict=True)]
            judged = judged if differentiable else [value.detach() for value in judged]
            own = _copies(buffers)
            losses = [self.step.evaluate_here(Iterate(parameters, None, own), batch) for batch in batches]
            return judged, losses, own

        # The processes meet outside of vmap, once for all particles.
        self.step.share_buffers(iterate)
        arrived: list[Tensors] = []

        def here() -> list[Tensor]:
            judged, losses, buffers = self._over_particles(one, iterate.parameters, iterate.buffers)
            arrived[:] = [buffers]
            return [*judged, *losses]

        if self.step.processes is None:
            found: Sequence[Any] = here()
        else:
            like = iterate.leaves()[0].new_zeros(len(iterate.leaves()[0]), dtype=torch.float64)
            found = self.step.processes.shared(here, [like] * (len(meta_batches) + len(batches)))
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
            moved = self.step.update(own, {name: gradients.get(name) for name in parameters}, meta)
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
        leaves: list[Any]
        leaves, structure = optree.tree_flatten(trees)  # type: ignore[arg-type]
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
