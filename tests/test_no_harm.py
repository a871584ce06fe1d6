"""Short trainings that people care about end no worse with the callback than without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnToLearn

TRAINED, SEEDS = 1000, (0, 1, 2)


def digits(shift: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 pixels, half of them to train on; with other names for the classes, if wanted."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    return images[order].unflatten(1, (1, 8, 8)), (labels[order] * 3 + shift) % 10


class Classifier(pl.LightningModule):
    """A network on digits."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any], schedule: Callable[..., Any] | None) -> None:
        super().__init__()
        self.net, self.make_optimizer, self.make_schedule = net, optimizer, schedule

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.net.parameters())
        if self.make_schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_schedule(optimizer), "interval": "step"}]


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def pretrained() -> nn.Module:
    """Knows the digits by other names."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    images, labels = digits(shift=5)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(net(images[:TRAINED]), labels[:TRAINED]).backward()
        optimizer.step()
    net[-1].reset_parameters()
    return net


def adamw(rate: float) -> Callable[..., Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


def warm_up(steps: int) -> Callable[..., Any]:
    rise = lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, steps // 5)  # noqa: E731
    fall = lambda o: lr_scheduler.CosineAnnealingLR(o, steps - steps // 5)  # noqa: E731
    return lambda o: lr_scheduler.SequentialLR(o, [rise(o), fall(o)], [steps // 5])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


JOBS = {
    "a fine-tuning of 200 steps": (pretrained, adamw(1e-4), None, 200),
    "a fine-tuning of 200 steps at a good rate": (pretrained, adamw(1e-3), None, 200),
    "a convnet of 150 steps": (convnet, adamw(3e-3), None, 150),
    "a convnet of 40 steps": (convnet, adamw(3e-3), None, 40),
    "momentum of 150 steps": (convnet, sgd, None, 150),
    "a warm-up and a cosine": (convnet, adamw(1e-2), warm_up(150), 150),
}


def fit(trainer: Any, job: str, seed: int, *callbacks: Any) -> tuple[float, float]:
    """Loss and accuracy on what was not trained on."""
    make, optimizer, schedule, steps = JOBS[job]
    pl.seed_everything(seed, verbose=False)
    module = Classifier(make(), optimizer, schedule)
    images, labels = digits()
    draws = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(images[:TRAINED], labels[:TRAINED]), 32, shuffle=True, generator=draws)
    held = DataLoader(TensorDataset(images[TRAINED:1300], labels[TRAINED:1300]), 100)
    trainer(*callbacks, max_epochs=-1, max_steps=steps).fit(module, train, held)
    with torch.no_grad():
        logits = module.eval().net(images[1300:])
    return (
        functional.cross_entropy(logits, labels[1300:]).item(),
        (logits.argmax(1) == labels[1300:]).float().mean().item(),
    )


@pytest.mark.parametrize("job", JOBS)
def test_a_short_training_ends_no_worse_with_the_callback(trainer: Any, job: str) -> None:
    pairs = [(fit(trainer, job, seed), fit(trainer, job, seed, LearnToLearn())) for seed in SEEDS]
    losses = [sum(pair[side][0] for pair in pairs) / len(pairs) for side in (0, 1)]
    accuracies = [sum(pair[side][1] for pair in pairs) / len(pairs) for side in (0, 1)]
    assert losses[1] <= 1.05 * losses[0]
    assert accuracies[1] >= accuracies[0] - 0.01
