"""Whole Lightning fits for the cost benchmark: an MLP, a convnet, a transformer, and a model of 500 small tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 1000


class Characters(nn.Module):
    """A transformer over 32 characters out of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits from the mean over the positions."""
        return self.head(self.encoder(self.embedding(characters)).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10),
    )  # fmt: skip


def _many() -> nn.Module:
    # 250 layers of two tensors each.
    return nn.Sequential(nn.Linear(256, 32), *(Residual() for _ in range(248)), nn.Linear(32, 10))


class Residual(nn.Module):
    """A small layer with a path around it, so that 248 of them can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs and a tenth of the layer."""
        return inputs + 0.1 * torch.tanh(self.layer(inputs))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": _mlp,
    "convnet": _convnet,
    "transformer": Characters,
    "500 small tensors": _many,
}


class Classifier(pl.LightningModule):
    """Cross entropy, AdamW."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One group."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def examples(model: str, seed: int) -> DataLoader:
    """Batches of what nobody can learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (1024,), generator=generator)
    if model == "transformer":
        return DataLoader(TensorDataset(torch.randint(64, (1024, 32), generator=generator), labels), 64, shuffle=True)
    return DataLoader(TensorDataset(torch.randn(1024, 256, generator=generator), labels), 64, shuffle=True)


def seconds(model: str, *callbacks: pl.Callback) -> float:
    """Processor time of a fit of ``STEPS`` steps."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Classifier(MODELS[model]())
    begun = time.process_time()
    trainer.fit(module, examples(model, seed=0))
    return time.process_time() - begun
