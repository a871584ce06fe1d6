"""What the tests of distributed runs run in each process. Everything here has to be found by name."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from conftest import QUIET
from helpers import Plain, Rich, examples, learner, loader, observer, outcome
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_l2l import LearnToLearn

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.003),
    "tiny": lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
    "far too large": lambda parameters: torch.optim.SGD(parameters, lr=300.0),
}


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def trainer_for(count: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults = {**QUIET, "devices": count, "strategy": "ddp" if count > 1 else "auto", "max_epochs": 4}
    return pl.Trainer(**{**defaults, "callbacks": list(callbacks), **options})


def parts(count: int, total: int = 96, size: int = 16) -> DataLoader:
    """Process by process the parts of the same batches: Lightning's own sampler shuffles training data."""
    own = size // count
    starts = range(rank() * own, total, size)
    return DataLoader(examples(total), batch_sampler=[list(range(start, start + own)) for start in starts])


class Deep(Plain):
    """Curvature everywhere, nothing random."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def result_of(callback: LearnToLearn, module: pl.LightningModule) -> dict[str, Any]:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return {"history": callback.history, "rates": callback.learning_rates, "state": state}


def fit(count: int, optimizer: str, options: Any, ours: Any) -> dict[str, Any]:
    """A run in double precision, so that what differs is not rounding."""
    callback, module = learner(**ours), Deep(OPTIMIZERS[optimizer])
    defaults = {"precision": "64-true", "use_distributed_sampler": False}
    trainer_for(count, callback, **{**defaults, **options}).fit(module, parts(count), loader(8, seed=1))
    return result_of(callback, module)


def unchanged(with_callback: bool, strategy: str) -> dict[str, Any]:
    """A run of everything that can be disturbed."""
    module = Rich(OPTIMIZERS["momentum"])
    torch.manual_seed(rank()), np.random.seed(rank()), random.seed(rank())  # other random numbers on each process
    callbacks = [observer(meta_data="val")] if with_callback else []
    trainer = trainer_for(2, *callbacks, strategy=strategy, max_epochs=2)
    trainer.fit(module, loader(96, shuffle=True), loader(32, seed=1))
    return {"outcome": outcome(trainer, module), "updates": len(callbacks[0].history) if callbacks else 0}


def fit_and_save(folder: Path, path: Path | None) -> dict[str, Any]:
    callback, module = learner(every_n_steps=4), Deep(OPTIMIZERS["adam"])
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    callbacks = [callback] if path else [callback, saving]
    options = {"enable_checkpointing": path is None, "max_epochs": 3, "use_distributed_sampler": False}
    trainer_for(2, *callbacks, **options).fit(module, parts(2), loader(8, seed=1), ckpt_path=path)
    return result_of(callback, module)


class Noted(torch.utils.data.Dataset):
    """Notes which examples are looked at."""

    def __init__(self) -> None:
        self.inner, self.seen = examples(32, seed=2), []

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.seen.append(index)
        return self.inner[index]


def looked_at() -> list[int]:
    data = Noted()
    callback = learner(meta_data=DataLoader(data, 4), every_n_steps=6)
    trainer_for(2, callback, max_epochs=2).fit(Deep(), loader(96), loader(8, seed=1))
    return data.seen


class Fails(Deep):
    """The step fails on the held-out batches, or the training batches, of one process."""

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.in_training = in_training

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if rank() == 1 and self.global_step == 6 and ("log" in vars(self)) != self.in_training:
            raise RuntimeError("on one process only")
        return super().training_step(batch, batch_idx)


def fit_that_fails(in_training: bool, meta_data: str) -> Any:
    callback = learner(meta_data=meta_data, every_n_steps=2)
    trainer_for(2, callback).fit(Fails(in_training), loader(96), loader(32, seed=1))
    return callback.history


class BrokenOnOne(Deep):
    """A batch that is not a number, on one process."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        broken = rank() == 1 and self.global_step == 13 and "log" not in vars(self)
        return super().training_step((batch[0] * (math.nan if broken else 1), batch[1]), batch_idx)


def fit_broken() -> dict[str, Any]:
    callback, module = learner(), BrokenOnOne(OPTIMIZERS["momentum"])
    trainer_for(2, callback).fit(module, loader(96), loader(32, seed=1))
    return result_of(callback, module)


def spawned(strategy: str) -> dict[str, Any]:
    """What is left in the process that called ``fit``, when the training ran in others."""
    callback, module = learner(initial_search=True), Deep(OPTIMIZERS["tiny"])
    trainer = trainer_for(2, callback, strategy=strategy)
    trainer.fit(module, loader(96), loader(32, seed=1))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {**result_of(callback, module), "metrics": metrics}
