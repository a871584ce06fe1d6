"""One training step of the run as the exact estimators take it: loss, clipping, processes, without side effects."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from lightning_l2l.exact.clip import clip_gradient_norm, clip_gradient_value
from lightning_l2l.exact.processes import Processes, StepSkippedError
from lightning_l2l.exact.substitution import call_with
from lightning_l2l.host import lightning_api

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass
class StepBatches:
    """The accumulated batches of one optimizer step.

    Attributes:
        begun_at: Optimizer steps before it.
        batches: Each with its index in the epoch.
        divisor: What Lightning divides the loss of each by.
        held_out: Whether it is a held-out batch.
    """

    begun_at: int
    batches: list[tuple[Any, int]] = field(default_factory=list)
    divisor: int = 1
    held_out: bool = False


class _Cloneable(ABC):  # noqa: B024  (it only recognises)
    """Tensors, and batch objects that know how to copy themselves (PyTorch Geometric's, say)."""

    @classmethod
    def __subclasshook__(cls, subclass: type) -> Any:
        return callable(getattr(subclass, "clone", None)) or NotImplemented


def copied_batch(batch: Any) -> Any:
    """A copy that later in-place changes of the batch, its containers or its tensors, do not reach."""
    try:
        return apply_to_collection(
            batch, _Cloneable, lambda x: x.detach().clone() if isinstance(x, Tensor) else x.clone()
        )
    except (TypeError, ValueError):  # of a class that cannot be made again of its items, such as a frozen dataclass
        return copy.deepcopy(batch)


class _Call(nn.Module):
    """``functional_call`` reaches what ``forward`` calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class TrainingLoss:
    """The user's step as a pure function ``loss(tensors, batches)`` of parameters and buffers by name.

    Args:
        trainer: The Trainer, whose precision it is computed in.
        module: The user's module.
        held_out_loss: ``loss(module, batch)`` of held-out batches in place of ``training_step``.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        held_out_loss: Callable[[pl.LightningModule, Any], Tensor] | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._call = _Call(module)
        self._held_out_loss = held_out_loss

    def __call__(self, tensors: Mapping[str, Tensor], given: StepBatches) -> Tensor:
        """The loss; buffers that the step writes are written in ``tensors``.

        Raises:
            StepSkippedError: ``training_step`` returned ``None``.
        """
        substitutes = {f"module.{name}": tensor for name, tensor in tensors.items()}
        losses = []
        for batch, index in given.batches:
            batch = copied_batch(batch)  # the user's step may pop from a dictionary, or scale a tensor in place
            if given.held_out and self._held_out_loss is not None:
                loss = call_with(self._call, substitutes, self._held_out_loss, self._module, batch)
            else:
                step = lightning_api.run_training_step
                loss = call_with(self._call, substitutes, step, self._trainer, self._module, batch, index)
            if loss is None:
                raise StepSkippedError("training_step returned None, so there is nothing to differentiate.")
            losses.append(loss / given.divisor)
        return torch.stack([loss.reshape(()) for loss in losses]).sum() if len(losses) > 1 else losses[0]


def clipping(trainer: pl.Trainer) -> GradientTransformation | None:
    """The Trainer's gradient clipping, differentiable; ``None`` without."""
    value = trainer.gradient_clip_val
    if value is None or value <= 0:
        return None
    by_value = trainer.gradient_clip_algorithm == "value"
    return clip_gradient_value(float(value)) if by_value else clip_gradient_norm(float(value))


def processes_of(trainer: pl.Trainer) -> Processes | None:
    """How the run's processes reach each other; ``None`` for a single one."""
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return None
    return Processes(
        trainer.global_rank,
        trainer.world_size,
        total=lambda tensor: strategy.reduce(tensor, reduce_op="sum"),
        gather=_gathered,
        device=strategy.root_device,
        # Of DistributedDataParallel, whose default is to copy them.
        buffers_of_first=bool(getattr(strategy.model, "broadcast_buffers", True)),
    )


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
