"""Particles spread over the processes of a data-parallel training, each with batches of its own.

Every process trains its share of the particles, and each of these on *all* processes' batches: the batches are sent
around once per unroll, and the loss of a particle is the mean of its losses on them. So the estimate is that of a
single process with the same particles and all the batches, to rounding. Training a particle on one process's batches
alone would need nothing sent, but it is another training: with smaller batches and noisier gradients, other rates
are good for it.

Against computing every particle on every process, the processes meet once for each unroll instead of in every step
(where the gradients of all particles would have to be averaged), and a process holds the weights of its own particles
only. The number of losses that a process computes is the same.

Not every loss allows it. One that talks to the other processes (``all_gather``, SyncBatchNorm), or is another function
on each of them, means the batch of the process that it runs on. Such a loss is found out by a comparison, and then
every particle is computed on every process, each on its own batches.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.processes import Processes, together
from lightning_l2l.exact.random_state import RandomState

# The same computation on hardware of the same kind agrees far better. Statistics over all batches that differ so little
# from those of one would not matter; and what does not agree is computed the other way, as rightly.
_AGREEMENT = 1e-4


@dataclass(frozen=True)
class Spread:
    """What an estimator with particles unrolls on this process.

    Attributes:
        step: The training step; it meets no other process if the particles are spread.
        start: Where the unroll starts, as on the first process.
        batches: What the step takes: with particles spread, the batches of all processes.
        meta_batch: Likewise.
        particles: This process's share, with a seed.
        processes: Those to fail together with, since the unroll does not meet them; ``None`` if it does, or alone.
        obstacle: Why the particles are not spread, in a data-parallel training; else empty.
    """

    step: InnerStep
    start: Iterate
    batches: Sequence[Any]
    meta_batch: Any
    particles: Particles
    processes: Processes | None = None
    obstacle: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say about it in the diagnostics."""
        if self.processes is not None:
            return (f"{self.particles.count} particles over {self.processes.count} processes",)
        return (f"every particle on every process: {self.obstacle}",) if self.obstacle else ()


def shares(particles: Particles, processes: Processes | None) -> Particles:
    """The particles with a seed, and in a data-parallel training this process's share of them.

    Their number is rounded up to a multiple of two for each process.

    Raises:
        ValueError: They were divided already, by hand.
    """
    if processes is None:
        return particles.seeded()
    if particles.ranks > 1:
        raise ValueError(
            f"These particles are divided among ranks={particles.ranks} already, and `processes` divides them again. "
            "Leave rank, ranks and mean_over_ranks of Particles out."
        )
    seed = processes.gather(particles.seeded().seed)[0]
    pairs = 2 * processes.count
    count = -(-particles.count // pairs) * pairs

    def mean(tensor: Tensor) -> Tensor:
        return processes.total(tensor.clone()) / processes.count

    return replace(
        particles, count=count, seed=seed, rank=processes.rank, ranks=processes.count, mean_over_ranks=mean
    )  # fmt: skip


@contextmanager
def over_processes(
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    particles: Particles,
    *,
    carried: bool = False,
) -> Iterator[Spread]:
    """Spread the particles of one unroll, if there are processes and the loss allows it.

    Inside, the random numbers of the processes are the same; each has its own back afterwards.

    Args:
        step: The training step.
        start: Where the unroll starts, and where to see whether the loss allows it.
        batches: This process's batches.
        meta_batch: This process's meta-batch.
        particles: All of them.
        carried: ``particles`` is this process's share already.
    """
    processes = step.processes
    if processes is None:
        yield Spread(step, start, batches, meta_batch, particles.seeded())
        return
    start = start.fresh()
    processes.copy_first_([*start.leaves(), *(start.buffers.values() if processes.buffers_of_first else ())])
    all_batches, obstacle = _gathered([*batches, meta_batch], processes)
    devices = {leaf.device for leaf in start.leaves()}
    with _same_random_numbers(processes, devices):
        if not obstacle and start.buffers and not processes.buffers_of_first:
            obstacle = "each process has buffers of its own"
        if not obstacle and not _is_the_same_everywhere(step, start, batches[0], all_batches[0]):
            obstacle = "its loss is not the same function of a batch on each of them, or talks to the others"
        if not obstacle:
            spread = replace(step, loss=_Joined(step, start.buffers), processes=None)
            own = particles if carried else shares(particles, processes)
            yield Spread(spread, start, all_batches[:-1], all_batches[-1], own, processes)
            return
    seed = processes.gather(particles.seeded().seed)[0]
    yield Spread(step, start, batches, meta_batch, replace(particles, seed=seed), None, obstacle)


class _Joined:
    """The mean of a loss over the batches of all processes."""

    def __init__(self, step: InnerStep, buffers: Mapping[str, Tensor]) -> None:
        self._step = replace(step, processes=None)
        self._buffers = tuple(buffers)

    def __call__(self, tensors: Mapping[str, Tensor], batches: Sequence[Any]) -> Tensor:
        # Each process's forward starts from the buffers of the first, and those that the first writes go on.
        before = {name: tensors[name].detach().clone() for name in self._buffers}
        device = next(iter(tensors.values())).device
        total: Tensor | None = None
        for number, batch in enumerate(batches):
            own = {} if number == 0 else {name: tensor.clone() for name, tensor in before.items()}
            value = self._step.evaluate_here(Iterate({**tensors, **own}, None, {}), _arrived(batch, device))
            total = value if total is None else total + value
        assert total is not None
        return total / len(batches)


def _is_the_same_everywhere(step: InnerStep, start: Iterate, own: Any, batches: Sequence[Any]) -> bool:
    """Whether each process finds the loss of every batch that the batch's own process finds, all at the same time."""
    processes = step.processes
    assert processes is not None
    place = start.fresh()
    devices = {leaf.device for leaf in place.leaves()}
    device = next(iter(place.parameters.values())).device
    before = RandomState.now(devices)

    def evaluate(batch: Any) -> float:
        before.restore()  # the same masks for each batch, so that the order plays no part
        buffers = {name: buffer.clone() for name, buffer in place.buffers.items()}
        return step.evaluate_here(replace(place, buffers=buffers), batch).item()

    with together(processes):
        expected = evaluate(own)
        found = [evaluate(_arrived(batch, device)) for batch in batches]
    before.restore()
    pairs = zip(found, processes.gather(expected), strict=True)
    return not processes.any(any(not _agree(mine, its) for mine, its in pairs))


def _agree(first: float, second: float) -> bool:
    if not (math.isfinite(first) and math.isfinite(second)):
        return str(first) == str(second)
    return abs(first - second) <= _AGREEMENT * max(abs(first), abs(second))


@contextmanager
def _same_random_numbers(processes: Processes, devices: set[torch.device]) -> Iterator[None]:
    # Drawn, so that this process's numbers go on: the next unroll has others.
    seed: int = processes.gather(int(torch.randint(2**62, ()).item()))[0]
    before = RandomState.now(devices)
    try:
        RandomState.seed(seed, devices)
        yield
    finally:
        before.restore()


def _gathered(batches: Sequence[Any], processes: Processes) -> tuple[list[list[Any]], str]:
    """Every batch of each process, by batch and process; and why there are none, in that case."""
    sent, obstacle = [], ""
    try:
        sent = [_sent(batch) for batch in batches]
    except TypeError as error:
        obstacle = str(error)
    obstacles = [found for found in processes.gather(obstacle) if found]
    if obstacles:
        return [], obstacles[0]
    # One at a time: with NCCL the bytes pass through the device's memory. They stay on the CPU until they are used.
    return [processes.gather(batch) for batch in sent], ""


@dataclass(frozen=True)
class _FromDevice:
    """Something that lay on an accelerator."""

    value: Any


def _sent(batch: Any) -> Any:
    """A batch as it can be sent: on the CPU, and without the rest of the storage that its tensors may be views of."""

    def send(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            copied = leaf.detach().cpu().clone()
            return copied if leaf.device.type == "cpu" else _FromDevice(copied)
        if callable(getattr(leaf, "to", None)):  # batches of PyTorch Geometric, of transformers
            return _FromDevice(leaf.to("cpu"))
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            return _with_fields(leaf, _sent)
        # By name: numpy need not be there.
        if leaf is None or isinstance(leaf, (str, bytes, numbers.Number)) or type(leaf).__module__ == "numpy":
            return leaf
        raise TypeError(f"a batch contains a {type(leaf).__name__}, which may not be fit to be sent to other processes")

    return optree.tree_map(send, batch)


def _arrived(batch: Any, device: torch.device) -> Any:
    def arrive(leaf: Any) -> Any:
        if isinstance(leaf, _FromDevice):
            return leaf.value.to(device)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            return _with_fields(leaf, lambda field: _arrived(field, device))
        return leaf

    return optree.tree_map(arrive, batch)


def _with_fields(instance: Any, change: Any) -> Any:
    changed = copy.copy(instance)
    for field in dataclasses.fields(instance):
        object.__setattr__(changed, field.name, change(getattr(instance, field.name)))
    return changed
