"""Not only the rate: momentum and weight decay are learned too, each in a form that keeps it legal.

    python examples/momentum_and_decay.py

A fifth of the training labels is wrong, so that there is something for a weight decay to do. Momentum moves as
1 - (1 - momentum) * exp(d) and stays below 1; weight decay as a positive factor, so it must not start at 0. At each
update the last twenty training steps are taken once more from the present weights, and the held-out loss after them is
differentiated. Writes momentum_and_decay.png, the three numbers over the training.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from digits_task import QUIET, Classifier, Digits, prepare
from torch.utils.data import TensorDataset

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, LearnToLearn, Unroll
from lightning_l2l.plotting import STYLES, new_figure

NAMES = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}


class NoisyDigits(Digits):
    """A fifth of the training labels is drawn at random; held-out and test labels are right."""

    def __init__(self) -> None:
        super().__init__()
        images, labels = self.train.tensors
        generator = torch.Generator().manual_seed(2)
        wrong = torch.rand(len(labels), generator=generator) < 0.2
        random_labels = torch.randint(10, labels.shape, generator=generator)
        self.train = TensorDataset(images, torch.where(wrong, random_labels, labels))


class Decayed(Classifier):
    """The classifier with a weight decay in its optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=1e-3)


class Values(L.Callback):
    """What the optimizer's group holds after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append({key: group[key] for key in NAMES})


def train(name: str, learned: LearnedHyperparameters | None, epochs: int) -> list[dict[str, float]]:
    L.seed_everything(0, verbose=False)
    model, data, values = Decayed(learning_rate=0.03), NoisyDigits(), Values()
    callbacks: list[L.Callback] = [values]
    if learned is not None:
        callbacks.insert(0, LearnToLearn(Unroll(steps=20), learned=learned, every_n_steps=10, initial_search=False))
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(model, data)
    tested, last = trainer.test(model, data, verbose=False)[0], values.seen[-1]
    print(f"{name:28} rate {last['lr']:8.2g}   momentum {last['momentum']:6.3f}   ", end="")
    print(f"decay {last['weight_decay']:8.2g}   test loss {tested['test_loss']:.3f}")
    return values.seen


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three epochs only")
    parser.add_argument("--plot", default="momentum_and_decay.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    prepare()
    runs = {
        "as they are": None,
        "rate learned": LearnedStepSize(),
        "rate, momentum and decay": LearnedHyperparameters(learn=("learning_rate", "momentum", "weight_decay")),
    }
    figure, axes = new_figure(1, 3, width=3.4)
    for (name, learned), style in zip(runs.items(), STYLES[2::-1], strict=True):
        seen = train(name, learned, 3 if options.quick else 40)
        for axis, key in zip(axes[0], NAMES, strict=True):
            axis.plot([values[key] for values in seen], label=name, **style)
            axis.set(xlabel="training step", title=NAMES[key], yscale="linear" if key == "momentum" else "log")
        last = seen[-1]
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(options.plot)
    return last


if __name__ == "__main__":
    main()
