"""What one inner step keeps in memory, measured on one step; from it the need of every estimator before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from lightning_l2l.exact.estimators.segmented import segment_length
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.random_state import RandomState
from lightning_l2l.exact.second_order import lacks_second_derivative

# What RandomState holds of torch's, numpy's and Python's generators on a CPU.
_RANDOM_STATE = 33_000


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one inner step.

    Attributes:
        iterate: Parameters and optimizer state after the step.
        buffers: The buffers.
        graph: What a differentiable step keeps for its backward pass, beside the iterate and the batch.
        plain: What the backward pass of plain training keeps.
        missing: The operation that cannot be differentiated twice, ``None`` if there is none.
    """

    iterate: int
    buffers: int
    graph: int
    plain: int
    missing: str | None = None

    def need(self, estimator: str, steps: int, meta_parameters: int, particles: int = 0) -> int:
        """Bytes that an estimator needs at its peak, beside what it is given; good to a factor of about two.

        Args:
            estimator: Its name.
            steps: K.
            meta_parameters: Number of scalars.
            particles: For those that have some.

        Example:
            >>> memory = StepMemory(iterate=10, buffers=0, graph=100, plain=50)
            >>> memory.need("reverse", steps=100, meta_parameters=1) // memory.need("reverse", 10, 1)
            8
        """
        step = self.graph + self.iterate + self.buffers
        moving = 6 * self.iterate + self.graph
        if estimator in ("reverse", "truncated"):
            return steps * step + moving
        if estimator == "segmented":
            length = segment_length(steps)
            stored = math.ceil(steps / length) * (self.iterate + self.buffers + _RANDOM_STATE)
            return length * step + stored + moving
        if estimator == "forward":
            return 2 * meta_parameters * self.iterate + step + moving
        if estimator == "mixed":
            return (particles + 1) * (steps * step + moving)
        if estimator in ("es", "pes", "es_single"):
            return (particles + 1) * (self.plain + 5 * self.iterate + 2 * self.buffers)
        raise ValueError(f"There is no estimator {estimator!r}.")


def measure_step(step: InnerStep, start: Iterate, batch: Any) -> StepMemory | None:
    """Run one differentiable step and count; random numbers and the iterate are as before.

    Args:
        step: The inner training step.
        start: Where to start.
        batch: The batch of the step.

    Returns:
        The bytes, or ``None`` if they cannot be counted, since the loss uses ``torch.func`` inside.
    """
    before = RandomState.now({leaf.device for leaf in start.leaves()})
    try:
        plain, _, _ = _count(step, start, batch, second_order=False)
        before.restore()
        graph, following, missing = _count(step, start, batch, second_order=step.second_order)
    except RuntimeError as error:
        # torch 2.13: "torch.func transforms don't yet support saved tensor hooks".
        if "saved tensor hooks" not in str(error):
            raise
        return None
    finally:
        before.restore()
    iterate = sum(leaf.numel() * leaf.element_size() for leaf in following.leaves())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in start.buffers.values())
    return StepMemory(iterate, buffers, graph, plain, missing)


def _count(step: InnerStep, start: Iterate, batch: Any, *, second_order: bool) -> tuple[int, Iterate, str | None]:
    """Bytes that the graph of a step keeps, where it ends, and the operation without a second derivative."""
    iterate = start.fresh()
    given = [*iterate.leaves(), *iterate.buffers.values(), *(x for x in optree.tree_leaves(batch) if _is_tensor(x))]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        if storage not in known:
            kept[storage] = tensor  # held, so that its address is not given to another one
        return tensor

    missing = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.evaluate(iterate, batch)
        gradients = step.gradients(loss, iterate, create_graph=second_order)
        following = step.update(iterate, gradients) if second_order else iterate
        if second_order:
            missing = _missing(list(gradients.values()), list(iterate.parameters.values()))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), following, missing


def _missing(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> str | None:
    """The first operation that cannot be differentiated twice."""
    curved = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
    if not curved:
        return None
    try:
        torch.autograd.grad(
            curved, parameters, [torch.ones_like(g) for g in curved], retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        name = lacks_second_derivative(error)
        if name is None:
            raise
        return name
    return None


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, ``None`` where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        # What Linux could give without swapping; sysconf's free pages leave out the file cache.
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        return None
    return None
