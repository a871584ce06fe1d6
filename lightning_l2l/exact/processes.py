"""Several processes that train the same parameters, each on batches of its own, as data-parallel training does.

What they train together is the mean of their losses, so everything that one of them computes from its own batches is
replaced by its mean over all: losses, gradients, and whatever is pulled back through gradients. Every decision that
follows (stop, skip, halve) is then taken from the same numbers on each of them. What fails on one of them is raised on
all, since the others would wait for it forever.

Every method has to be called on all processes at the same point of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class StepSkippedError(TypeError):
    """The loss has nothing to say about a batch; raised by the loss, and then on every process."""


class ElsewhereError(RuntimeError):
    """Another process failed, so this one cannot go on either; the message says where and how."""


class _MeanInPlaceOfOwn(torch.autograd.Function):
    """The mean over the processes as a value, with the derivative of this process's own value.

    So the derivative that is pulled back through it is this process's share; the mean of the shares is the whole.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, mean: Tensor) -> Tensor:
        return mean.to(own).view_as(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class Processes:
    """How this process speaks with the others.

    Attributes:
        rank: Its number.
        count: How many there are.
        total: Adds a tensor up over the processes (an all-reduce); it may work in place.
        gather: The value of every process, any picklable object, in the order of the ranks; asked for rarely.
        device: Where ``total`` wants tensors that only carry a decision.
        buffers_of_first: Whether a training step starts from the buffers of process 0, as in
            ``DistributedDataParallel(broadcast_buffers=True)``, instead of each from its own.

    Example:
        >>> alone = Processes(0, 1, total=lambda tensor: tensor, gather=lambda value: [value])
        >>> alone.mean(lambda: [torch.ones(2), None], like=[torch.zeros(2), torch.zeros(1)])
        [tensor([1., 1.]), None]
    """

    rank: int
    count: int
    total: Callable[[Tensor], Tensor]
    gather: Callable[[Any], list[Any]]
    device: torch.device = torch.device("cpu")
    buffers_of_first: bool = True

    def mean(self, compute: Callable[[], Sequence[Tensor | None]], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The mean of what each process computes; without history.

        Args:
            compute: Called once. ``None`` in its result counts as zeros; if all processes have ``None`` there, the
                mean is ``None`` as well, as the gradient is that ``DistributedDataParallel`` leaves behind.
            like: Tensors of the shapes and dtypes of the means, the same on each process; at least one.

        Raises:
            Exception: What ``compute`` raised on this process.
            ElsewhereError: It raised on another process.
            StepSkippedError: It raised this on some process, and nothing else on any.
        """
        found: Sequence[Tensor | None] = [None] * len(like)
        failure: Exception | None = None
        try:
            found = compute()
        except Exception as error:  # raised below, on all processes
            failure = error
        present = [float(tensor is not None) for tensor in found]
        flags = torch.tensor([*present, float(failure is not None)], dtype=torch.float64)
        means: list[Tensor | None] = [None] * len(like)
        counts: Tensor | None = None
        # One message for each dtype; the first one carries the flags: small whole numbers, exact in any dtype.
        for dtype in dict.fromkeys(tensor.dtype for tensor in like):
            chosen = [index for index, tensor in enumerate(like) if tensor.dtype == dtype]
            parts = [_flat(found[index], like[index]) / self.count for index in chosen]
            if counts is None:
                parts.append(flags.to(parts[0]))
            summed = self.total(torch.cat(parts))
            split = summed.split([part.numel() for part in parts])
            if counts is None:
                counts = split[-1]
            for index, part in zip(chosen, split, strict=False):
                means[index] = part.view(like[index].shape)
        assert counts is not None
        if bool(counts[-1] > 0):
            self._fail(failure)
        # What is there on this process is there: only what is missing makes it look at the others' flags.
        missing = [index for index, tensor in enumerate(found) if tensor is None]
        for index in missing:
            if not bool(counts[index] > 0):
                means[index] = None
        return means

    def shared(self, compute: Callable[[], Sequence[Tensor | None]], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The same means, with the derivative of this process's own tensors: its share, to be averaged by the caller.

        Args:
            compute: As for :meth:`mean`.
            like: As for :meth:`mean`.
        """
        own: list[Tensor | None] = []

        def kept() -> Sequence[Tensor | None]:
            own.extend(compute())
            return [None if tensor is None else tensor.detach() for tensor in own]

        means = self.mean(kept, like)
        return [
            mean if mine is None or mean is None else _MeanInPlaceOfOwn.apply(mine, mean)
            for mine, mean in zip(own, means, strict=True)
        ]

    def any(self, decision: bool) -> bool:
        """Whether any process says yes."""
        return bool(self.total(torch.tensor([float(decision)], device=self.device)) > 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside on one process is raised on all; see :meth:`mean` for which exceptions."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised below, on all processes
            failure = error
        if self.any(failure is not None):
            self._fail(failure)

    @torch.no_grad()
    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors equal to those of process 0, in place and to the last bit."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            parts = [tensor.detach().reshape(-1) for tensor in chosen]
            # A sum with zeros is a copy; booleans have no sum.
            flat = torch.cat(parts).to(torch.uint8 if dtype == torch.bool else dtype)
            summed = self.total(flat if self.rank == 0 else torch.zeros_like(flat))
            for tensor, part in zip(chosen, summed.split([part.numel() for part in parts]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _fail(self, failure: Exception | None) -> None:
        """Raise on every process, the same kind on each."""
        skipped = isinstance(failure, StepSkippedError)
        own = None if failure is None else (skipped, f"{type(failure).__name__}: {failure}")
        reports = [(rank, *report) for rank, report in enumerate(self.gather(own)) if report is not None]
        serious = [(rank, message) for rank, is_skip, message in reports if not is_skip]
        if failure is not None and (not skipped or not serious):
            raise failure
        if serious:
            rank, message = serious[0]
            raise ElsewhereError(f"Process {rank} failed, so process {self.rank} cannot go on. {message}") from failure
        rank, _, message = reports[0]
        raise StepSkippedError(f"On process {rank}: {message}")


def _flat(tensor: Tensor | None, like: Tensor) -> Tensor:
    filled = torch.zeros_like(like) if tensor is None else tensor.detach()
    return filled.reshape(-1).to(like)


@contextmanager
def together(processes: Processes | None) -> Iterator[None]:
    """:meth:`Processes.together`; with a single process, nothing."""
    if processes is None:
        yield
    else:
        with processes.together():
            yield
