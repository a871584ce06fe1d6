"""The tasks of the digits benchmark: scikit-learn's 8 x 8 images, two small networks, two optimizers.

Self-contained. 1000 images to train on, 300 held out (for ``LearnToLearn``'s meta-objective), 497 to report on.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

BATCH_SIZE = 64
EPOCHS = 25
# Half-decades; the best constant rate lies inside for every task of the benchmark (which checks it).
GRIDS = {
    "sgd": [10.0 ** (-4 + place / 2) for place in range(11)],
    "adam": [10.0 ** (-5 + place / 2) for place in range(11)],
}


@dataclass(frozen=True)
class Digits:
    """The three parts of the data, the same for every seed."""

    train: TensorDataset
    held_out: TensorDataset
    test: TensorDataset


def digits() -> Digits:
    """Pixels in [0, 1], shuffled once."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    parts = [TensorDataset(images[part], labels[part]) for part in order.split([1000, 300, 497])]
    return Digits(*parts)


def network(kind: str) -> nn.Sequential:
    """``"mlp"`` (64-64-64-10) or ``"convnet"`` (two convolutions and a linear layer), freshly drawn."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def optimizer_of(kind: str, module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """``"sgd"`` with momentum 0.9, ``"adam"`` or ``"adamw"``."""
    if kind == "sgd":
        return torch.optim.SGD(module.parameters(), lr=learning_rate, momentum=0.9)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](module.parameters(), lr=learning_rate)


class Classifier(pl.LightningModule):
    """Any user's module: nothing in it knows of LearnToLearn."""

    def __init__(self, kind: str, optimizer: str, learning_rate: float) -> None:
        super().__init__()
        self.net = network(kind)
        self.optimizer = optimizer
        self.learning_rate = learning_rate

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.optimizer, self.net, self.learning_rate)


def training_order(data: Digits, seed: int) -> RandomSampler:
    """Gives the order of the training images, a new one in every epoch; it depends on the seed alone."""
    return RandomSampler(data.train, generator=torch.Generator().manual_seed(seed))


def loaders(data: Digits, seed: int) -> tuple[DataLoader, DataLoader]:
    """Training and held-out batches."""
    return (
        DataLoader(data.train, BATCH_SIZE, sampler=training_order(data, seed)),
        DataLoader(data.held_out, BATCH_SIZE),
    )


@torch.no_grad()
def test_loss(net: nn.Module, data: Digits) -> float:
    """Mean cross-entropy on all test images; what a diverged network has is not finite."""
    images, labels = data.test.tensors
    return nn.functional.cross_entropy(net.eval()(images), labels).item()
