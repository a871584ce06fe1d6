"""Meta-train a small neural network as an optimizer, save it, load it, and use it in an ordinary fit.

`SmallFCOptimizer` is trained on the digits that the others use: how should a weight move, given the averages of its
gradients? Then it trains a classifier next to a tuned Adam. Writes meta_train_optimizer.png, both training losses:

    python examples/meta_train_optimizer.py
"""

from __future__ import annotations

import argparse
from functools import partial

import lightning as L
import torch
from digits_task import QUIET, Digits, prepare
from torch import Tensor, nn

from lightning_l2l import LearnedOptimizer, MetaTraining, SmallFCOptimizer, Unroll
from lightning_l2l.plotting import STYLES, new_figure
from lightning_l2l.tasks import ImageClassification


def meta_train(path: str, updates: int) -> None:
    """Train the optimizer over inner trainings of 200 steps, and write it to a file."""
    L.seed_everything(0, verbose=False)
    learned = SmallFCOptimizer(hidden_size=8, step_multiplier=0.03, initialisation="zero_output")
    # An inner training starts from new weights each time; its images are the ones that Digits trains on.
    images, labels = Digits().train.tensors
    tasks = ImageClassification(images, labels, hidden=(32,), batch_size=64)
    meta_training = MetaTraining(
        learned, tasks, unroll_steps=20, episode_steps=200, tasks_at_once=2, populations=5,
        estimator=Unroll(objective="naive_mean"), meta_data="train", meta_learning_rate=0.01, warm_down=True,
    )  # fmt: skip
    L.Trainer(max_steps=updates, max_epochs=-1, gradient_clip_val=1.0, **QUIET).fit(meta_training)
    learned.tasks = "digits, 64-32-10"
    learned.save(path)


class Classifier(L.LightningModule):
    """An ordinary module, whose optimizer is what it is given."""

    def __init__(self, optimizer: partial[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def train(optimizer: partial[torch.optim.Optimizer], steps: int) -> list[float]:
    """The training losses of a fit."""
    L.seed_everything(1, verbose=False)
    model = Classifier(optimizer)
    L.Trainer(max_steps=steps, max_epochs=-1, **QUIET).fit(model, Digits().train_dataloader())
    return model.losses


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four meta-updates only")
    parser.add_argument("--file", default="learned.safetensors", help="where to keep the optimizer (%(default)s)")
    parser.add_argument("--plot", default="meta_train_optimizer.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    prepare()
    torch.manual_seed(0)
    untrained = SmallFCOptimizer(hidden_size=8, step_multiplier=0.03, initialisation="zero_output")
    meta_train(options.file, 4 if options.quick else 80)
    optimizers = {
        "Adam, rate 0.032": partial(torch.optim.Adam, lr=0.032),  # the best of a grid, see docs/learned-optimizers.md
        "SmallFC, not trained": untrained.as_torch_optimizer,
        "SmallFC, meta-trained": LearnedOptimizer.load(options.file).as_torch_optimizer,
    }
    runs = {name: train(optimizer, 200) for name, optimizer in optimizers.items()}
    figure, axes = new_figure(width=6.5)
    for (name, losses), style in zip(runs.items(), STYLES, strict=False):
        smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1)
        axes[0, 0].plot(range(10, len(losses) + 1), smooth, label=name, **style)
        print(
            f"{name:22} mean training loss {sum(losses) / len(losses):.3f}, last 20 steps {sum(losses[-20:]) / 20:.3f}"
        )
    axes[0, 0].set(xlabel="training step", ylabel="training loss (mean of ten)", yscale="log")
    axes[0, 0].legend(frameon=False)
    figure.savefig(options.plot)
    return runs


if __name__ == "__main__":
    main()
