"""The processes of a distributed run, as the core sees them, and values that differ between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed

from lightning_l2l.exact.processes import Processes

if TYPE_CHECKING:
    import lightning.pytorch as pl


def processes_of(trainer: pl.Trainer) -> Processes | None:
    """How the run's processes reach each other; ``None`` for a single one."""
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return None
    return Processes(
        trainer.global_rank,
        trainer.world_size,
        total=lambda tensor: strategy.reduce(tensor, reduce_op="sum"),
        gather=from_all_ranks,
        device=strategy.root_device,
        # Of DistributedDataParallel, whose default is to copy them.
        buffers_of_first=bool(getattr(strategy.model, "broadcast_buffers", True)),
    )


def from_all_ranks(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks; with a single process a list of one.

    Every process has to call this at the same point.

    Example:
        >>> from_all_ranks({"steps": 3})
        [{'steps': 3}]
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
