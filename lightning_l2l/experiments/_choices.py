"""What the command line calls optimizers and tasks."""

from __future__ import annotations

from typing import Literal

import torch

from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LSTMOptimizer,
    MLPOptimizer,
    SmallFCOptimizer,
    TinyOptimizer,
)
from lightning_l2l.tasks import ImageClassification, RandomQuadratics, TaskFamily

OptimizerName = Literal["adam", "sgd", "mlp", "small_fc", "tiny", "lstm"]
TaskName = Literal["digits", "mnist", "quadratics"]


def make_optimizer(
    name: OptimizerName, normalise_output: bool, step_multiplier: float | None, seed: int
) -> LearnedOptimizer:
    """A learned optimizer that has learned nothing yet.

    Args:
        name: ``"adam"`` and ``"sgd"`` learn hyperparameters, starting from a rate that is far too small.
        normalise_output: For the networks: every step has the same root mean square.
        step_multiplier: For the networks; ``None`` for 0.01.
        seed: For the initial weights.
    """
    multiplier = 0.01 if step_multiplier is None else step_multiplier
    if name == "adam":
        learned = LearnedHyperparameters(("learning_rate", "betas"))
        return learned.attach(inner_optimizer(torch.optim.Adam, lr=1e-4))
    if name == "sgd":
        learned = LearnedHyperparameters(("learning_rate", "momentum"))
        return learned.attach(inner_optimizer(torch.optim.SGD, lr=1e-3, momentum=0.5))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == "mlp":
            return MLPOptimizer(32, multiplier, initialisation="scaled", normalise_output=normalise_output)
        if name == "small_fc":
            return SmallFCOptimizer(8, multiplier, normalise_output=normalise_output)
        if name == "tiny":
            return TinyOptimizer(step_multiplier=multiplier, normalise_output=normalise_output)
        return LSTMOptimizer(step_multiplier=multiplier, normalise_output=normalise_output)


def make_family(name: TaskName, mnist_folder: str | None, train_samples: int | None, label_noise: float) -> TaskFamily:
    """The tasks to train on.

    Args:
        name: Which.
        mnist_folder: Where MNIST's files are.
        train_samples: Training examples of each task, drawn anew; ``None``: all.
        label_noise: Fraction of random labels.

    Raises:
        ValueError: MNIST without a folder.
    """
    if name == "quadratics":
        return RandomQuadratics()
    resample = train_samples is not None
    if name == "digits":
        samples = train_samples or 1200
        return ImageClassification.digits(
            train_samples=samples, val_samples=min(samples, 297), label_noise=label_noise, resample=resample
        )
    if mnist_folder is None:
        raise ValueError("task='mnist' needs mnist_folder, the folder with MNIST's four IDX files.")
    samples = train_samples or 50000
    return ImageClassification.mnist(
        mnist_folder, train_samples=samples, val_samples=min(samples, 10000), label_noise=label_noise, resample=resample
    )
