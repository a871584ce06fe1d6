"""Any task as a LightningModule with its own loaders, so that a Trainer and LearnToLearn run on it unchanged."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_l2l.tasks import Task


class TaskModule(pl.LightningModule):
    """Trains a task's parameters with a ``torch.optim`` optimizer.

    Args:
        task: The task.
        optimizer: The optimizer's class.
        learning_rate: Its learning rate.
        momentum: Its momentum, for classes that have one; 0 leaves the class's default.
        steps_per_epoch: Batches in an epoch.
        seed: Seed of the initial parameters and of the batches.

    Raises:
        ValueError: ``steps_per_epoch`` is not positive.

    Example:
        >>> from lightning_l2l.tasks import Quadratic
        >>> module = TaskModule(Quadratic.random(3, seed=0), learning_rate=0.01)
        >>> [name for name, _ in module.named_parameters()], len(module.train_dataloader())
        (['values.point'], 100)
    """

    def __init__(
        self,
        task: Task,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if steps_per_epoch < 1:
            raise ValueError(f"TaskModule(steps_per_epoch={steps_per_epoch}) must be at least 1.")
        self.task = task
        self._optimizer = optimizer
        self._options: dict[str, Any] = {"lr": learning_rate, **({"momentum": momentum} if momentum else {})}
        self._steps_per_epoch = steps_per_epoch
        self._seed = seed
        start = task.initial_parameters(torch.Generator().manual_seed(seed))
        # A parameter's name must not contain a dot.
        self._names = {name: name.replace(".", "/") for name in start}
        self.values = nn.ParameterDict({self._names[name]: nn.Parameter(value) for name, value in start.items()})

    def loss(self, batch: Any) -> Tensor:
        """The task's loss on a batch."""
        parameters = {name: self.values[own] for name, own in self._names.items()}
        return self.task.loss(parameters, None if _is_nothing(batch) else batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs and returns the loss."""
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the held-out loss."""
        self.log("val_loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was asked for."""
        return self._optimizer(self.parameters(), **self._options)

    def train_dataloader(self) -> DataLoader:
        """Training batches, the same for a seed."""
        return DataLoader(_Batches(self.task, "train", self._steps_per_epoch, self._seed), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Held-out batches; for a task without batches, the task itself."""
        return DataLoader(_Batches(self.task, "val", 8, self._seed), batch_size=None)


class _Batches(Dataset):
    def __init__(self, task: Task, split: Literal["train", "val"], length: int, seed: int) -> None:
        self._task = task
        self._split = split
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        offset = 0 if self._split == "train" else 2**31
        generator = torch.Generator().manual_seed(offset + self._seed * 1_000_003 + index)
        batch = self._task.sample_batch(self._split, generator)
        # Lightning skips a batch that is None.
        return torch.empty(0) if batch is None else batch


def _is_nothing(batch: Any) -> bool:
    return isinstance(batch, Tensor) and batch.numel() == 0
