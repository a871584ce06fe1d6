"""What the examples share: scikit-learn's 8 x 8 digits, an ordinary LightningModule, an ordinary DataModule."""

from __future__ import annotations

import logging
import warnings
from typing import Any, Literal

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# What every example passes to its Trainer, so that it prints its own result and leaves no files behind.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def prepare() -> None:
    """Silence Lightning's advice, and one thread: in networks this small, several only wait for each other."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


class Digits(L.LightningDataModule):
    """1000 images to train on, 300 held out, 497 to test with; the test images are seen by nothing but the test."""

    def __init__(self, batch_size: int = 64, seed: int = 1) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        data = TensorDataset(torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order])
        self.train, self.held_out, self.test = (
            TensorDataset(*data[first:last]) for first, last in ((0, 1000), (1000, 1300), (1300, len(data)))
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, len(self.test))


class Classifier(L.LightningModule):
    """A small classifier; nothing in it knows that a learning rate might be learned."""

    def __init__(
        self,
        network: Literal["mlp", "convnet"] = "mlp",
        optimizer: Literal["sgd", "adam"] = "sgd",
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.network = mlp() if network == "mlp" else convnet()

    def step(self, batch: list[Tensor], stage: str) -> Tensor:
        images, labels = batch
        scores = self.network(images)
        loss = nn.functional.cross_entropy(scores, labels)
        self.log(f"{stage}_loss", loss)
        self.log(f"{stage}_accuracy", (scores.argmax(1) == labels).float().mean())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convnet() -> nn.Sequential:
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    image, vector = nn.Unflatten(1, (1, 8, 8)), nn.Flatten()
    return nn.Sequential(image, first, nn.ReLU(), second, nn.ReLU(), vector, nn.Linear(512, 10))
