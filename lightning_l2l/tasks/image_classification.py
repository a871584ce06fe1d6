"""Image classifiers on data that is at hand: scikit-learn's digits, MNIST's files, or any arrays."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lightning_l2l.tasks._idx_files import read_mnist
from lightning_l2l.tasks.family import StackableTask, TaskFamily

Split = Literal["train", "val", "test"]
Network = Literal["mlp", "convnet"]
Initialisation = Literal["kaiming", "reference"]


@dataclass(frozen=True)
class _Data:
    """What all tasks of a family share: a pool to draw training and validation data from, and the test data."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class ImageClassification(StackableTask, TaskFamily):
    """Classify images with a small network: cross-entropy on batches of a fixed number of examples.

    It is a task, and the family of the tasks that :meth:`sample` draws: with ``resample`` each has training and
    validation examples of its own, with ``permute_labels`` its own meaning of the labels. Batches are drawn with
    replacement; ``(images, labels)``, float32 ``[batch, height * width]`` or ``[batch, 1, height, width]`` and int64.

    Args:
        images: The pool, ``[examples, height, width]`` or ``[examples, features]`` (MLP only), any numbers.
        labels: Integers, ``[examples]``.
        test_images: As ``images``; ``None`` for no test split.
        test_labels: As ``labels``.
        train_samples: Number of training examples, the first of the pool unless ``resample``; ``None``: all that
            remain.
        val_samples: Number of validation examples, drawn beside the training examples.
        network: ``"mlp"``: fully connected with ReLU between layers. ``"convnet"``: one 3 x 3 convolution with stride 2
            for each entry of ``hidden``, ReLU, and a linear layer.
        hidden: Units (or channels) of the hidden layers.
        batch_size: Examples in a batch.
        label_noise: Fraction of the pool whose labels are replaced by uniform ones (perhaps the true ones), once,
            before anything is drawn. The test labels stay clean unless ``noisy_test``.
        noisy_test: Also disturb the test labels, as the published code of the paper does.
        resample: :meth:`sample` draws new training and validation examples.
        permute_labels: :meth:`sample` draws a permutation of the classes.
        initialisation: ``"kaiming"``: weights N(0, 2 / inputs), biases zero. ``"reference"``: everything, biases too,
            N(0, 1.2**2 / rows), as in the paper's code.
        seed: For the label noise.

    Raises:
        ValueError: Shapes that do not fit, more samples than there are, or a setting out of its range.

    Source: The tasks of Wang, Yuan, Wu, Ge (ICML 2021), section 5.3.

    Example:
        >>> images, labels = torch.rand(40, 4, 4), torch.arange(40) % 3
        >>> task = ImageClassification(images, labels, hidden=(5,), val_samples=10, batch_size=8)
        >>> parameters = task.initial_parameters(torch.Generator().manual_seed(0))
        >>> {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        {'weight0': (16, 5), 'bias0': (5,), 'weight1': (5, 3), 'bias1': (3,)}
        >>> task.loss(parameters, task.sample_batch("val")).dim()
        0
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        test_images: Tensor | None = None,
        test_labels: Tensor | None = None,
        *,
        train_samples: int | None = None,
        val_samples: int = 0,
        network: Network = "mlp",
        hidden: Sequence[int] = (32,),
        batch_size: int = 64,
        label_noise: float = 0.0,
        noisy_test: bool = False,
        resample: bool = False,
        permute_labels: bool = False,
        initialisation: Initialisation = "kaiming",
        seed: int = 0,
    ) -> None:
        if network not in get_args(Network) or initialisation not in get_args(Initialisation):
            raise ValueError(
                f"network={network!r} must be one of {list(get_args(Network))}, "
                f"initialisation={initialisation!r} one of {list(get_args(Initialisation))}."
            )
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise={label_noise} must be a fraction between 0 and 1.")
        if batch_size < 1 or any(units < 1 for units in hidden):
            raise ValueError(f"batch_size={batch_size} and hidden={tuple(hidden)} must be at least 1.")
        if test_images is None or test_labels is None:
            test_images, test_labels = images[:0], labels[:0]
        for found, given in ((images, labels), (test_images, test_labels)):
            if len(found) != len(given) or found.shape[1:] != images.shape[1:]:
                raise ValueError(
                    f"Images of shape {tuple(found.shape)} do not fit labels of shape {tuple(given.shape)}."
                )
        if network == "convnet" and images.dim() != 3:
            raise ValueError(f"A convnet needs images [examples, height, width], got shape {tuple(images.shape)}.")
        self.network, self.hidden, self.batch_size = network, tuple(hidden), batch_size
        self.initialisation, self.resample, self.permute_labels = initialisation, resample, permute_labels
        self.classes = int(torch.cat([labels, test_labels]).max()) + 1
        self.image_shape = tuple(images.shape[1:])
        # Not Generator(seed): the disturbed examples would be the first of the permutation that the task of the same
        # seed draws, and all labels of that task random.
        generator = torch.Generator().manual_seed(random.Random(f"label noise/{seed}").getrandbits(62))
        noisy = _with_noise(labels, label_noise, self.classes, generator)
        noisy_labels = _with_noise(test_labels, label_noise, self.classes, generator) if noisy_test else test_labels
        shape = (-1, 1, *self.image_shape) if network == "convnet" else (-1, math.prod(self.image_shape))
        self._data = _Data(
            images.float().reshape(shape), noisy.long(), test_images.float().reshape(shape), noisy_labels.long()
        )
        train = len(images) - val_samples if train_samples is None else train_samples
        if train < 1 or val_samples < 0 or train + val_samples > len(images):
            raise ValueError(
                f"{train} training and {val_samples} validation examples were asked for, but the pool has "
                f"{len(images)}."
            )
        self.train_samples, self.val_samples = train, val_samples
        self._indices = torch.arange(train + val_samples)
        self._meaning = torch.arange(self.classes)

    @classmethod
    def digits(
        cls,
        *,
        train_samples: int | None = 1200,
        val_samples: int = 297,
        test_samples: int = 300,
        network: Network = "mlp",
        hidden: Sequence[int] = (32,),
        batch_size: int = 64,
        label_noise: float = 0.0,
        noisy_test: bool = False,
        resample: bool = False,
        permute_labels: bool = False,
        initialisation: Initialisation = "kaiming",
        seed: int = 0,
    ) -> ImageClassification:
        """Scikit-learn's 1797 digits, 8 x 8 pixels in [0, 1], shuffled by ``seed``; ``test_samples`` are for tests.

        Raises:
            ImportError: scikit-learn is not installed.
            ValueError: More samples than there are.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("The digits come with scikit-learn: pip install scikit-learn.") from error
        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
        images, labels = torch.tensor(found.images, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]
        return cls(
            images[test_samples:], labels[test_samples:], images[:test_samples], labels[:test_samples],
            train_samples=train_samples, val_samples=val_samples, network=network, hidden=hidden, batch_size=batch_size,
            label_noise=label_noise, noisy_test=noisy_test, resample=resample, permute_labels=permute_labels,
            initialisation=initialisation, seed=seed,
        )  # fmt: skip

    @classmethod
    def mnist(
        cls,
        folder: str | Path,
        *,
        train_samples: int | None = 50000,
        val_samples: int = 10000,
        network: Network = "mlp",
        hidden: Sequence[int] = (100, 20),
        batch_size: int = 32,
        label_noise: float = 0.0,
        noisy_test: bool = False,
        resample: bool = False,
        permute_labels: bool = False,
        initialisation: Initialisation = "reference",
        seed: int = 0,
    ) -> ImageClassification:
        """MNIST from its four standard IDX files in a folder; pixels in [0, 1]. Nothing is downloaded.

        ``folder`` has ``train-images-idx3-ubyte`` and the three others, perhaps with ``.gz``. Fashion-MNIST, KMNIST and
        others have the same format. The defaults are the paper's network and batches.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is no IDX file, or incomplete.
        """
        images, labels, test_images, test_labels = read_mnist(Path(folder))
        return cls(
            images.float() / 255, labels, test_images.float() / 255, test_labels,
            train_samples=train_samples, val_samples=val_samples, network=network, hidden=hidden, batch_size=batch_size,
            label_noise=label_noise, noisy_test=noisy_test, resample=resample, permute_labels=permute_labels,
            initialisation=initialisation, seed=seed,
        )  # fmt: skip

    def loss_signature(self) -> Any:
        """Network, image shape, batch size and classes."""
        return self.network, self.hidden, self.image_shape, self.batch_size, self.classes

    def sample(self, generator: torch.Generator) -> ImageClassification:
        """Another task of the family: itself, unless examples or labels are drawn anew."""
        task = self
        if self.resample:
            order = torch.randperm(len(self._data.images), generator=generator)
            task = task._with(_indices=order[: self.train_samples + self.val_samples])
        if self.permute_labels:
            task = task._with(_meaning=torch.randperm(self.classes, generator=generator))
        return task

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``weight0, bias0, ...``; linear weights are ``[in, out]``, convolutions ``[out, in, 3, 3]``."""
        shapes: list[tuple[int, ...]] = []
        if self.network == "convnet":
            channels, (height, width) = 1, self.image_shape
            for units in self.hidden:
                shapes.append((units, channels, 3, 3))
                channels, height, width = units, (height + 1) // 2, (width + 1) // 2
            shapes.append((channels * height * width, self.classes))
        else:
            sizes = [math.prod(self.image_shape), *self.hidden, self.classes]
            shapes = list(zip(sizes, sizes[1:], strict=False))
        found = {}
        for index, shape in enumerate(shapes):
            outputs = shape[0] if len(shape) == 4 else shape[1]
            inputs = math.prod(shape[1:]) if len(shape) == 4 else shape[0]
            weight, bias = torch.randn(shape, generator=generator), torch.randn(outputs, generator=generator)
            if self.initialisation == "kaiming":
                weight, bias = weight * math.sqrt(2 / inputs), bias * 0
            else:
                weight, bias = weight * 1.2 / math.sqrt(shape[0]), bias * 1.2 / math.sqrt(outputs)
            found[f"weight{index}"], found[f"bias{index}"] = weight, bias
        return found

    def logits(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Scores of the classes, ``[batch, classes]``."""
        values, last = images, len(self.hidden)
        for index in range(last + 1):
            weight, bias = parameters[f"weight{index}"], parameters[f"bias{index}"]
            if self.network == "convnet" and index < last:
                values = functional.conv2d(values, weight, bias, stride=2, padding=1)
            else:
                values = values.flatten(1) @ weight + bias
            values = torch.relu(values) if index < last else values
        return values

    def loss(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Mean cross-entropy of a batch."""
        images, labels = batch
        return functional.cross_entropy(self.logits(parameters, images), labels)

    def accuracy(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Fraction of a batch that is classified correctly."""
        images, labels = batch
        correct: Tensor = (self.logits(parameters, images).argmax(-1) == labels).float()
        return correct.mean()

    def sample_batch(self, split: Split, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return ``batch_size`` examples of a split, drawn with replacement."""
        return self._examples(split, torch.randint(self._count(split), (self.batch_size,), generator=generator))

    def full_batch(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return all examples of a split."""
        return self._examples(split, torch.arange(self._count(split)))

    def _examples(self, split: Split, chosen: Tensor) -> tuple[Tensor, Tensor]:
        if split == "test":
            return self._data.test_images[chosen], self._meaning[self._data.test_labels[chosen]]
        indices = self._indices[chosen + (self.train_samples if split == "val" else 0)]
        return self._data.images[indices], self._meaning[self._data.labels[indices]]

    def _count(self, split: Split) -> int:
        count = {"train": self.train_samples, "val": self.val_samples, "test": len(self._data.test_images)}[split]
        if count == 0:
            raise ValueError(f"This task has no {split!r} split: give {split}_samples (or test images) when making it.")
        return count

    def _with(self, **changes: Tensor) -> ImageClassification:
        other = object.__new__(type(self))
        other.__dict__.update({**self.__dict__, **changes})
        return other


def _with_noise(labels: Tensor, fraction: float, classes: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randperm(len(labels), generator=generator)[: int(len(labels) * fraction)]
    disturbed = labels.clone()
    disturbed[chosen] = torch.randint(classes, (len(chosen),), generator=generator).to(labels.dtype)
    return disturbed
