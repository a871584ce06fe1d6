"""Fine-tuning: a pretrained body and a fresh head rarely want the same learning rate, so each group learns its own.

    python examples/per_group.py

A classifier is trained on the digits. Its head is then thrown away and the whole is fine-tuned on 150 of the images,
turned by a quarter, with another assignment of labels to digits. `LearnedStepSize(per="group")`, the default, learns
one rate for the body and one for the head; `per="optimizer"` learns one for both. Writes per_group.png.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

import lightning as L
import torch
from digits import HeldOutLoss
from digits_task import QUIET, Classifier, Digits, mlp, prepare
from torch import nn
from torch.utils.data import TensorDataset

from lightning_l2l import LearnedStepSize, LearnToLearn
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"name": "body", "params": self.network[:-1].parameters()},
            {"name": "head", "params": self.network[-1].parameters()},
        ]
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9)


def fine_tune(pretrained: nn.Module, per: Literal["optimizer", "group"] | None, epochs: int, axes: Any) -> list[float]:
    L.seed_everything(0, verbose=False)
    model, data, held_out = FineTuned(pretrained, learning_rate=1e-3), TurnedDigits(), HeldOutLoss()
    learner = LearnToLearn(LearnedStepSize(per=per), every_n_steps=10) if per else None
    trainer = L.Trainer(max_epochs=epochs, callbacks=[held_out, learner] if learner else [held_out], **QUIET)
    trainer.fit(model, data)
    tested = trainer.test(model, data, verbose=False)[0]
    constant = {"step": trainer.global_step, "learning_rates": [1e-3, 1e-3]}
    history = learner.history if learner else [{**constant, "step": 0}, constant]
    body, head = zip(*(record["learning_rates"] for record in history), strict=True)
    label = {None: "as it is", "optimizer": "one for both", "group": "one for each"}[per]
    print(f"{label:13} body {body[-1]:8.2g}   head {head[-1]:8.2g}   ", end="")
    print(f"test loss {tested['test_loss']:.3f}   accuracy {tested['test_accuracy']:.3f}")
    style = dict(zip((None, "optimizer", "group"), STYLES[2::-1], strict=True))[per]
    steps = [record["step"] for record in history]
    axes[0].plot(steps, body, label="the body's" if per == "group" else label, **style)
    if per == "group":
        axes[0].plot(steps, head, label="the head's", **STYLES[3])
    axes[1].plot(*zip(*held_out.curve, strict=True), label=label, **style)
    return [body[-1], head[-1]]


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
    for per in (None, "optimizer", "group"):
        rates = fine_tune(model.network, per, 4 if options.quick else 60, axes[0])
    for axis, name in zip(axes[0], ("learning rate", "held-out loss"), strict=True):
        axis.set(xlabel="training step", ylabel=name, yscale="log")
        axis.legend(frameon=False)
    figure.savefig(options.plot)
    return rates


if __name__ == "__main__":
    main()
