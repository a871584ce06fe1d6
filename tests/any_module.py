"""A small regression for the tests of "any optimizer, loop, step, project": module, data, and a fit that compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from conftest import QUIET
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnToLearn


def examples(count: int = 256, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    weight = torch.randn(8, 1, generator=torch.Generator().manual_seed(99))
    return TensorDataset(inputs, torch.tanh(inputs @ weight) + 0.1 * torch.randn(count, 1, generator=generator))


def batches(count: int = 256, seed: int = 0, size: int = 32, **options: Any) -> DataLoader:
    return DataLoader(examples(count, seed), size, **options)


class Regression(pl.LightningModule):
    """Two layers; ``make`` makes the optimizer of its parameters."""

    def __init__(self, make: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.make = make or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
        self.net = self.make_net()

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, batch: Any) -> Tensor:
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def fit(make: Callable[[], Any] | pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> Any:
    """The Trainer after a fit that always draws the same numbers; ``train=`` and ``val=`` are loaders."""
    train, val = options.pop("train", batches(shuffle=True)), options.pop("val", batches(64, seed=5))
    torch.manual_seed(0)
    module = make if isinstance(make, pl.LightningModule) else make()
    torch.manual_seed(1)
    trainer = pl.Trainer(**{**QUIET, "callbacks": list(callbacks), **options})
    trainer.fit(module, train, val if val is None or is_overridden("validation_step", module) else None)
    return trainer


def observer(**options: Any) -> LearnToLearn:
    """A callback that computes everything and applies nothing."""
    defaults = {"meta_learning_rate": 0, "initial_search": False, "every_n_steps": 3, "meta_data": "val"}
    return LearnToLearn(**{**defaults, **options})


def highest(callback: LearnToLearn, group: int = -1) -> float:
    """The highest rate that was learned for a group (at the end of a training without a schedule it may fall to 0)."""
    return max(record["learning_rates"][group] for record in callback.history)


def same_state(left: Any, right: Any) -> bool:
    """Whether the modules of two fits hold the same parameters and buffers, bit for bit."""
    ours, theirs = (trainer.lightning_module.state_dict() for trainer in (left, right))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def unchanged(make: Callable[[], pl.LightningModule], **options: Any) -> bool:
    """Whether a callback that only watches, with held-out gradients, leaves a fit bit for bit as it is."""
    callback = observer(meta_data="auto")
    watched, plain = fit(make, callback, **options), fit(make, **options)
    assert callback.history
    return same_state(watched, plain)
