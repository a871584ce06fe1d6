"""Tiny modules and data, and a way to say everything that a fit leaves behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_l2l import LearnToLearn

FEATURES, CLASSES, EXAMPLES, BATCH = 6, 3, 48, 8


def examples(count: int = EXAMPLES, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))


def loader(count: int = EXAMPLES, seed: int = 0, **options: Any) -> DataLoader:
    return DataLoader(examples(count, seed), **{"batch_size": BATCH, "shuffle": False, **options})


def loaders(**options: Any) -> dict[str, Any]:
    """Shuffled training data and validation data, as arguments of ``fit``."""
    return {
        "train_dataloaders": loader(shuffle=True, **options),
        "val_dataloaders": loader(24, seed=1, **options),
    }


def steady_loaders() -> dict[str, Any]:
    """Six times the same batch in an epoch: at a small rate every gradient says that the rate may rise."""
    inputs, targets = examples(BATCH).tensors
    train = TensorDataset(inputs.repeat(6, 1), targets.repeat(6))
    return {"train_dataloaders": DataLoader(train, BATCH), "val_dataloaders": loader(24, seed=1)}


Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def sgd(rate: float = 0.1, **options: Any) -> Optimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, **options)


class Plain(pl.LightningModule):
    """A linear classifier; the base of the others."""

    def __init__(self, optimizer: Optimizer | None = None, schedule: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = self.make_net()
        self.optimizer, self.schedule = optimizer or sgd(), schedule

    def make_net(self) -> nn.Module:
        return nn.Linear(FEATURES, CLASSES)

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), batch_size=BATCH)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


class Rich(Plain):
    """Everything that a call of the step can disturb: batch norm, dropout, metrics, logging, attributes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.metrics = MetricCollection(
            {"recall": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES)}, compute_groups=True
        )
        self.outputs: list[float] = []
        self.calls = 0
        self.running = torch.zeros(())

    def make_net(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        logits = self.net(inputs + 0.01 * float(np.random.rand()) + 0.01 * random.random())
        loss = functional.cross_entropy(logits, targets)
        self.accuracy(logits, targets)
        self.metrics(logits, targets)
        self.outputs.append(loss.item())
        self.calls += 1
        self.running += loss.detach()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict(self.metrics, on_step=False, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        return {"loss": loss, "logits": logits.detach()}


class Attention(Plain):
    def make_net(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        return nn.Sequential(
            nn.Linear(FEATURES, 12), nn.Unflatten(1, (3, 4)), layer, nn.Flatten(), nn.Linear(12, CLASSES)
        )


class Recurrent(Plain):
    def make_net(self) -> nn.Module:
        return nn.ModuleDict({"gru": nn.GRU(2, 4, batch_first=True), "head": nn.Linear(4, CLASSES)})

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        states, _ = self.net["gru"](inputs.view(-1, 3, 2))
        return functional.cross_entropy(self.net["head"](states[:, -1]), targets)


class TiedAndFrozen(Plain):
    """Two layers that share a weight, a frozen layer, and a layer that the optimizer does not own."""

    def make_net(self) -> nn.Module:
        first, second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        second.weight = first.weight
        frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        return nn.Sequential(first, nn.Tanh(), second, frozen, nn.LayerNorm(FEATURES), nn.Linear(FEATURES, CLASSES))

    def configure_optimizers(self) -> Any:
        foreign = {id(parameter) for parameter in self.net[4].parameters()}
        return self.optimizer([p for p in self.parameters() if id(p) not in foreign])


class Twice(Plain):
    """A layer, and a normalisation, that are each in two places."""

    def make_net(self) -> nn.Module:
        layer, norm = nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES)
        return nn.Sequential(layer, norm, nn.Tanh(), layer, norm, nn.Linear(FEATURES, CLASSES))


class Resumable:
    """A loader that resumes in the middle of an epoch; Lightning saves and restores it."""

    def __init__(self, batches: int = 6) -> None:
        self.batches, self.position, self.epoch = batches, 0, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Any:
        start, self.position = self.position, 0
        for number in range(start, self.batches):
            generator = torch.Generator().manual_seed(100 * self.epoch + number)
            inputs = torch.randn(8, 6, generator=generator)
            self.position = number + 1
            if self.position == self.batches:
                self.position, self.epoch = 0, self.epoch + 1
            yield inputs, inputs[:, :3].argmax(1)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.epoch = state["position"], state["epoch"]


class Deterministic(Plain):
    """Without dropout: Lightning does not restore random numbers."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class MemoryLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, *_arguments: Any, **_options: Any) -> None:
        pass


class Witness(pl.Callback):
    """Notes what the run did: the batches, the rates in force, the parameters before and after each step."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.rates: list[list[float]] = []
        self.changes: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self._gradients: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        tensors = torch.utils._pytree.tree_leaves(batch)
        self.batches.append(sum(float(t.double().sum()) for t in tensors if isinstance(t, Tensor)))
        self._before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.rates.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])
        self.changes.append({n: p.detach() - self._before[n] for n, p in pl_module.named_parameters()})
        self.gradients.append(self._gradients)


def outcome(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Everything that a fit leaves behind, except what is ours."""
    plain = {
        name: value
        for child_name, child in module.named_modules()
        for name, value in ((f"{child_name}.{key}", value) for key, value in vars(child).items())
        if isinstance(value, (int, float, list, Tensor)) and not name.endswith("_flat_weight_refs")
    }
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "attributes": plain,
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": {name: v for name, v in trainer.callback_metrics.items() if not name.startswith("l2l/")},
        "rows": [
            kept
            for logger in trainer.loggers
            for row in getattr(logger, "rows", [])
            if set(kept := {k: v for k, v in row.items() if not k.startswith("l2l/")}) - {"step", "epoch"}
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "progress": (trainer.global_step, trainer.current_epoch),
    }


def difference(left: Any, right: Any, place: str = "") -> str:
    """The first place where two nested structures are not bit for bit the same; empty if they are."""
    if isinstance(left, np.ndarray):
        left, right = torch.as_tensor(left.astype(np.int64)), torch.as_tensor(right.astype(np.int64))
    if isinstance(left, Tensor):
        alike = isinstance(right, Tensor) and left.shape == right.shape and left.dtype == right.dtype
        same = alike and torch.allclose(left.detach(), right.detach(), rtol=0, atol=0, equal_nan=True)
        return "" if same else f"{place}: {left} != {right}"
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return f"{place}: keys {set(left) ^ set(right)}"
        return next((found for k in left if (found := difference(left[k], right[k], f"{place}/{k}"))), "")
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return f"{place}: lengths {len(left)} != {len(right)}"
        pairs = enumerate(zip(left, right, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{place}/{i}"))), "")
    return "" if left == right or left != left and right != right else f"{place}: {left!r} != {right!r}"


def learner(**options: Any) -> LearnToLearn:
    """A callback that updates often, and does not look for another rate to start from."""
    return LearnToLearn(**{"initial_search": False, "every_n_steps": 3, **options})


def observer(**options: Any) -> LearnToLearn:
    """A callback that computes everything and applies nothing."""
    return learner(**{"meta_learning_rate": 0, **options})


class Saves(pl.Callback):
    """A checkpoint after the given step, in a run that goes on; or after the given batch of the first epoch."""

    def __init__(self, path: Path, step: int | None = None, batch: int | None = None) -> None:
        self.path, self.step, self.batch = path, step, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step or (trainer.current_epoch == 0 and batch_idx == self.batch):
            trainer.save_checkpoint(self.path)


class NotesRates(torch.optim.SGD):
    """An optimizer that notes the rates that its steps are made with."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.used: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.used.append([float(group["lr"]) for group in self.param_groups])
        super().step()
        return loss
