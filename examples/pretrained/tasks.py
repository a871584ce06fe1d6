"""The tasks that the rule is meta-trained on: small networks of several kinds, each drawn anew for every training.

Classifiers and autoencoders of scikit-learn's 8 x 8 digits, also enlarged to 12 x 12 for a convolutional network,
next-character models of Python's own documentation, and regression on random teachers; narrow networks, and some of a
few hundred units. Each task has its own examples and initial weights. With ``--scales`` each has also its own
parametrisation: the network computes with ``c`` times its parameters, which start at ``1 / c`` of the usual ones.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from lightning_l2l.tasks.family import Mixture, StackableTask, TaskFamily

Data = tuple[Tensor, Tensor]


class NetworkTask(StackableTask):
    """A network on data: ``loss(network(inputs), targets)`` on random batches of the training examples."""

    def __init__(
        self, name: str, make: Callable[[], nn.Module], loss: Callable[..., Tensor], train: Data, val: Data, batch: int
    ) -> None:
        self.name, self.make, self.criterion, self.data, self.size = (
            name,
            make,
            loss,
            {"train": train, "val": val},
            batch,
        )
        self.network, self.scale = make(), torch.ones(())

    def loss_signature(self) -> Any:
        return self.name, self.size

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {name: p.detach() / self.scale for name, p in self.make().named_parameters()}

    def loss(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        inputs, targets, scale = batch
        outputs = functional_call(self.network, {name: scale * p for name, p in parameters.items()}, (inputs,))
        return self.criterion(outputs, targets)

    def sample_batch(self, split: Any, generator: torch.Generator | None = None) -> Any:
        inputs, targets = self.data[split]
        chosen = torch.randint(len(inputs), (self.size,), generator=generator)
        return inputs[chosen], targets[chosen], self.scale

    def full_batch(self, split: Any) -> Any:
        return (*self.data[split], self.scale)


class NetworkFamily(TaskFamily):
    """Tasks of one network: ``draw(generator)`` gives the training and the validation examples of each."""

    def __init__(
        self,
        name: str,
        make: Callable[[], nn.Module],
        loss: Callable[..., Tensor],
        draw: Callable[[torch.Generator], tuple[Data, Data]],
        batch: int,
    ) -> None:
        self.name, self.make, self.loss, self.draw, self.batch = name, make, loss, draw, batch
        self.scales = 1.0

    def sample(self, generator: torch.Generator) -> NetworkTask:
        train, val = self.draw(generator)
        task = NetworkTask(self.name, self.make, self.loss, train, val, self.batch)
        task.scale = torch.exp(math.log(self.scales) * (2 * torch.rand((), generator=generator) - 1))
        return task


@cache
def digits() -> Data:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[:1257]  # the rest: for tests
    return torch.tensor(found.images, dtype=torch.float32)[order].flatten(1) / 16, torch.tensor(found.target)[order]


@cache
def whole_text() -> tuple[Tensor, int]:
    """The documentation as numbers, and how many characters there are (the rare ones are one)."""
    whole = "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    common = [character for character, _ in Counter(whole).most_common(48)]
    numbers = {character: index + 1 for index, character in enumerate(sorted(common))}
    return torch.tensor([numbers.get(character, 0) for character in whole]), len(common) + 1


def divided(inputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator) -> tuple[Data, Data]:
    order = torch.randperm(len(inputs), generator=generator)
    train, val = order[:samples], order[samples : samples + 256]
    return (inputs[train], targets[train]), (inputs[val], targets[val])


def images(generator: torch.Generator, samples: int = 800, noise: float = 0.0) -> tuple[Data, Data]:
    inputs, labels = digits()
    wrong = torch.rand(len(labels), generator=generator) < noise
    labels = torch.where(wrong, torch.randint(10, labels.shape, generator=generator), labels)
    return divided(inputs, labels, samples, generator)


def large_images(generator: torch.Generator) -> tuple[Data, Data]:
    (inputs, labels), held_out = images(generator)
    enlarged = [nn.functional.interpolate(x.view(-1, 1, 8, 8), 12, mode="bilinear") for x in (inputs, held_out[0])]
    return (enlarged[0], labels), (enlarged[1], held_out[1])


def pictures(generator: torch.Generator) -> tuple[Data, Data]:
    inputs, _ = digits()
    return divided(inputs, inputs, 900, generator)


def characters(generator: torch.Generator, context: int = 5) -> tuple[Data, Data]:
    whole, _ = whole_text()
    numbers = whole[: len(whole) * 4 // 5]  # the rest: for tests
    starts = torch.randint(len(numbers) - context, (8192 + 256,), generator=generator)
    found = numbers[starts[:, None] + torch.arange(context + 1)]
    return divided(found[:, :context], found[:, context], 8192, generator)


def teacher(generator: torch.Generator, samples: int = 800, noise: float = 0.1) -> tuple[Data, Data]:
    inputs = torch.randn(samples + 256, 12, generator=generator)
    first, last = torch.randn(12, 8, generator=generator) / 12**0.5, torch.randn(8, 1, generator=generator) / 3
    targets = torch.sin(2 * inputs @ first) @ last
    return divided(inputs, targets + noise * torch.randn(targets.shape, generator=generator), samples, generator)


def perceptron(*sizes: int, unit: type[nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), unit()]
        return nn.Sequential(*layers[:-1])

    return make


class Characters(nn.Module):
    def __init__(self, context: int = 5, width: int = 8, hidden: int = 32) -> None:
        super().__init__()
        count = whole_text()[1]
        self.embedding = nn.Parameter(0.1 * torch.randn(count, width))
        self.hidden, self.output = nn.Linear(context * width, hidden), nn.Linear(hidden, count)

    def forward(self, numbers: Tensor) -> Tensor:
        one_hot = (numbers[..., None] == torch.arange(len(self.embedding))).to(self.embedding.dtype)
        return self.output(torch.tanh(self.hidden((one_hot @ self.embedding).flatten(1))))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


def mixture(scales: float = 1.0) -> Mixture:
    """All of them, with parametrisations from ``1 / scales`` to ``scales``."""
    ce, mse = nn.functional.cross_entropy, nn.functional.mse_loss
    wide_characters = lambda: Characters(hidden=256)  # noqa: E731
    families = [
        NetworkFamily("digits", perceptron(64, 32, 10), ce, images, 32),
        NetworkFamily("deep", perceptron(64, 24, 24, 10, unit=nn.Tanh), ce, images, 32),
        NetworkFamily("noisy", perceptron(64, 32, 10), ce, lambda g: images(g, 600, 0.2), 32),
        NetworkFamily("few", perceptron(64, 24, 10), ce, lambda g: images(g, 100), 16),
        NetworkFamily("autoencoder", perceptron(64, 24, 8, 24, 64), mse, pictures, 32),
        NetworkFamily("characters", Characters, ce, characters, 32),
        NetworkFamily("teacher", perceptron(12, 32, 1), mse, teacher, 32),
        NetworkFamily("small teacher", perceptron(12, 24, 24, 1, unit=nn.SiLU), mse, lambda g: teacher(g, 150), 16),
        NetworkFamily("noisy teacher", perceptron(12, 32, 1), mse, lambda g: teacher(g, 200, 0.7), 16),
        NetworkFamily("convolutions", convolutions, ce, large_images, 32),
        NetworkFamily("wide", perceptron(64, 512, 10), ce, images, 32),
        NetworkFamily("wide and deep", perceptron(64, 256, 256, 10, unit=nn.GELU), ce, images, 32),
        NetworkFamily("wide autoencoder", perceptron(64, 256, 16, 256, 64), mse, pictures, 32),
        NetworkFamily("wide, characters", wide_characters, ce, characters, 32),
    ]
    for family in families:
        family.scales = scales
    return Mixture(families)
