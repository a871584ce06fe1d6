"""Fine-tuning: a pretrained body and a fresh head rarely want the same learning rate, so each group learns a factor.

    python examples/per_group.py

A classifier is trained on the digits. Its head is then replaced, and the whole is fine-tuned on 150 of the images,
turned by a quarter, with another assignment of labels to digits. `LearnToLearn()` learns one factor for both groups,
`Displacement(per="group")` one for each. Writes per_group.png.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from digits_task import QUIET, Classifier, Digits, mlp, prepare
from torch import nn
from torch.utils.data import TensorDataset

from lightning_l2l import Displacement, LearnToLearn
from lightning_l2l.plotting import STYLES, new_figure


class TurnedDigits(Digits):
    """The images turned by 90 degrees, labels shifted by three, and only 150 of them to train on."""

    def __init__(self) -> None:
        super().__init__(batch_size=50)
        self.train, self.held_out, self.test = (
            TensorDataset(
                data.tensors[0].view(-1, 8, 8).rot90(dims=(1, 2)).flatten(1)[:size], (data.tensors[1][:size] + 3) % 10
            )
            for data, size in ((self.train, 150), (self.held_out, 300), (self.test, None))
        )


class FineTuned(Classifier):
    """A pretrained network with a new last layer, and a parameter group for each part."""

    def __init__(self, pretrained: nn.Sequential, learning_rate: float) -> None:
        super().__init__(learning_rate=learning_rate)
        self.network = mlp()
        self.network.load_state_dict(pretrained.state_dict())
        self.network[-1].reset_parameters()
        self.seen: list[tuple[int, float]] = []

    def on_validation_epoch_end(self) -> None:
        self.seen.append((self.trainer.global_step, self.trainer.callback_metrics["val_loss"].item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"name": "body", "params": self.network[:-1].parameters()},
            {"name": "head", "params": self.network[-1].parameters()},
        ]
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9)


def fine_tune(name: str, pretrained: nn.Module, learner: LearnToLearn | None, epochs: int, axes: Any) -> list[float]:
    L.seed_everything(0, verbose=False)
    model, data = FineTuned(pretrained, learning_rate=1e-4), TurnedDigits()
    trainer = L.Trainer(max_epochs=epochs, callbacks=[learner] if learner else [], **QUIET)
    trainer.fit(model, data)
    steps, losses = zip(*model.seen, strict=True)
    tested = trainer.test(model, data, verbose=False)[0]
    rates = {name: [1e-4] * len(steps)}
    if learner is not None:
        schedule = learner.export_schedule()  # what was applied in each step
        groups = {group: [schedule.at(step - 1)[f"lr/{group}"] for step in steps] for group in ("body", "head")}
        rates = {f"{name}: {group}": values for group, values in groups.items()}
        if groups["body"] == groups["head"]:
            rates = {name: groups["body"]}
    largest = [max(values) for values in rates.values()]
    print(f"{name:13} largest rates {', '.join(f'{rate:.2g}' for rate in largest):16}", end="")
    print(f" test loss {tested['test_loss']:.3f}   accuracy {tested['test_accuracy']:.3f}")
    for label, values in rates.items():
        axes[0].plot(steps, values, label=label, **STYLES[len(axes[0].lines)])
    axes[1].plot(steps, losses, label=name, **STYLES[len(axes[1].lines)])
    return largest


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--plot", default="per_group.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    prepare()
    L.seed_everything(0, verbose=False)
    model = Classifier(learning_rate=0.1)
    L.Trainer(max_epochs=1 if options.quick else 15, **QUIET).fit(model, Digits())
    figure, axes = new_figure(1, 2)
    learners = {
        "as it is": None,
        "one for both": LearnToLearn(),
        "one for each": LearnToLearn(Displacement(per="group")),
    }
    for name, learner in learners.items():
        rates = fine_tune(name, model.network, learner, 10 if options.quick else 60, axes[0])
    for axis, label in zip(axes[0], ("learning rate", "held-out loss"), strict=True):
        axis.set(xlabel="training step", ylabel=label, yscale="log")
        axis.legend(frameon=False)
    figure.savefig(options.plot)
    return rates


if __name__ == "__main__":
    main()
