"""Nine small tasks for the comparison with opponents, each in three parts: training, held-out and test data.

Self-contained. Held-out data serve the meta-objective and nothing else, test data the report and nothing else. Data are
the same for every seed, a seed draws weights and order. About 1000 steps each. No dropout, so that a plain loop can
repeat the Trainer's fit to the last bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import numpy
import torch
from digits_tasks import digits, network, optimizer_of
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

# Fixed before any result was seen, but for "same text": defaults may be chosen by the former, and only confirmed on the
# latter. "same text" was added to choose by once the transformer had been seen, whose held-out text is not of the kind
# that it is trained on; transformer and few samples were in view then, and are no clean confirmation since.
CHOSEN_ON = ("digits MLP", "label noise", "GRU", "tabular regression", "same text")
CONFIRMED_ON = ("least squares", "convnet", "few samples", "transformer")
# Text that is on every machine with Python; its versions differ a little.
TEXT = {"train": ("argparse", "inspect", "tarfile"), "held_out": ("zipfile",), "test": ("typing", "optparse")}
SYMBOLS, CONTEXT = 96, 32

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained, on what, for how long."""

    train: TensorDataset
    held_out: TensorDataset
    test: TensorDataset
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int
    epochs: int

    @property
    def steps(self) -> int:
        """Of a whole fit."""
        return self.epochs * -(-len(self.train) // self.batch_size)

    @property
    def chance(self) -> float:
        """Test loss of the best constant prediction on the training data: mean or frequencies."""
        targets, tests = self.train.tensors[1], self.test.tensors[1]
        if targets.is_floating_point():
            return (tests - targets.mean(0)).square().mean().item()
        frequencies = targets.flatten().bincount(minlength=SYMBOLS).float() + 1e-3
        return -(frequencies / frequencies.sum()).log()[tests.flatten()].mean().item()


class Learner(pl.LightningModule):
    """Any user's module: nothing in it knows of LearnToLearn."""

    def __init__(self, task: Task, optimizer: str, learning_rate: float) -> None:
        super().__init__()
        self.net = task.network()
        self.criterion = task.loss
        self.optimizer = optimizer
        self.learning_rate = learning_rate

    def loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return self.criterion(self.net(inputs), targets)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.optimizer, self.net, self.learning_rate)


class Rows(nn.Module):
    """A GRU that reads an 8 x 8 image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits from the last state."""
        return self.head(self.recurrent(images.unflatten(1, (8, 8)))[0][:, -1])


class Characters(nn.Module):
    """A causal transformer of one layer that says the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits for each position."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        return self.head(self.block(self.embedding(characters) + self.position, src_mask=mask, is_causal=True))


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def _regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


def _digits(
    make: Callable[[], nn.Module], images: int = 1000, noise: float = 0.0, batch_size: int = 32, epochs: int = 32
) -> Task:
    data, generator = digits(), torch.Generator().manual_seed(2)
    inputs, labels = data.train.tensors[0][:images], data.train.tensors[1][:images].clone()
    noisy = torch.rand(images, generator=generator) < noise
    labels[noisy] = torch.randint(10, (int(noisy.sum()),), generator=generator)
    cross_entropy = nn.functional.cross_entropy
    return Task(TensorDataset(inputs, labels), data.held_out, data.test, make, cross_entropy, batch_size, epochs)


def _least_squares() -> Task:
    """Features whose scales fall like 1 / sqrt(index), 200 samples for 100 weights, noise."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(1400, 100, generator=generator) / torch.arange(1.0, 101.0).sqrt()
    truth = torch.randn(100, 1, generator=generator)
    targets = inputs @ truth + 0.5 * torch.randn(1400, 1, generator=generator)
    parts = [TensorDataset(*pair) for pair in zip(*(x.split([200, 200, 1000]) for x in (inputs, targets)), strict=True)]
    return Task(*parts, lambda: nn.Linear(100, 1), nn.functional.mse_loss, 20, 100)


def _tabular() -> Task:
    """scikit-learn's diabetes, inputs and target standardised by the training part."""
    data = load_diabetes()
    order = torch.randperm(442, generator=torch.Generator().manual_seed(4))
    inputs = torch.tensor(data.data, dtype=torch.float32)[order]
    targets = torch.tensor(data.target, dtype=torch.float32)[order, None]
    scaled = [(x - x[:222].mean(0)) / x[:222].std(0) for x in (inputs, targets)]
    parts = [TensorDataset(*pair) for pair in zip(*(x.split([222, 100, 120]) for x in scaled), strict=True)]
    return Task(*parts, _regressor, nn.functional.mse_loss, 32, 143)


def _characters(names: tuple[str, ...], windows: int) -> TensorDataset:
    text = "".join(Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8") for name in names)
    codes = torch.tensor([min(max(ord(letter) - 31, 0), SYMBOLS - 1) for letter in text[: windows * CONTEXT + 1]])
    return TensorDataset(codes[:-1].view(windows, CONTEXT), codes[1:].view(windows, CONTEXT))


def _transformer() -> Task:
    parts = [_characters(TEXT[part], windows) for part, windows in (("train", 4000), ("held_out", 800), ("test", 1500))]
    return Task(*parts, Characters, _sequence_loss, 8, 2)


def _same_text() -> Task:
    """The transformer, with the windows of all three texts shuffled before they are divided; none of them twice."""
    apart = _transformer()
    inputs, targets = (
        torch.cat([part.tensors[i] for part in (apart.train, apart.held_out, apart.test)]) for i in (0, 1)
    )
    first = torch.from_numpy(numpy.unique(inputs.numpy(), axis=0, return_index=True)[1])
    order = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(5))]
    sizes = [len(apart.train), len(first) - len(apart.train) - len(apart.test), len(apart.test)]
    parts = [TensorDataset(inputs[rows], targets[rows]) for rows in order.split(sizes)]
    return replace(apart, train=parts[0], held_out=parts[1], test=parts[2])


def _sequence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


_TASKS: dict[str, Callable[[], Task]] = {
    "digits MLP": lambda: _digits(lambda: network("mlp")),
    "label noise": lambda: _digits(lambda: network("mlp"), noise=0.2),
    "GRU": lambda: _digits(Rows),
    "tabular regression": _tabular,
    "least squares": _least_squares,
    "convnet": lambda: _digits(_convnet),
    "few samples": lambda: _digits(lambda: network("mlp"), images=150, batch_size=15, epochs=100),
    "transformer": _transformer,
    "same text": _same_text,
}
assert set(_TASKS) == {*CHOSEN_ON, *CONFIRMED_ON}


@cache
def task(name: str) -> Task:
    """The task of this name."""
    return _TASKS[name]()


def training_order(of: Task, seed: int) -> RandomSampler:
    """Gives the order of the training data, a new one in every epoch; it depends on the seed alone."""
    return RandomSampler(of.train, generator=torch.Generator().manual_seed(seed))


def loaders(of: Task, seed: int) -> tuple[DataLoader, DataLoader]:
    """Training and held-out batches."""
    return (
        DataLoader(of.train, of.batch_size, sampler=training_order(of, seed)),
        DataLoader(of.held_out, 100),
    )


@torch.no_grad()
def test_loss(module: Learner, of: Task) -> float:
    """Mean loss on all test data; what a diverged network has is not finite."""
    return module.eval().loss(of.test.tensors).item()
