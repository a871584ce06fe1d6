"""Fine-tuning: a pretrained body and a fresh head rarely want the same learning rate, so each group learns its own.

    python examples/per_group.py

A classifier is trained on the digits. Its head is then thrown away and the whole is fine-tuned on 150 of the images,
turned by a quarter, with another assignment of labels to digits. `LearnedStepSize(per="group")`, the default, learns
one rate for the body and one for the head; `per="optimizer"` learns one for both.
"""

from __future__ import annotations

import argparse
from typing import Literal

import lightning as L
import torch
from digits_task import QUIET, Classifier, Digits, mlp, prepare
from torch import nn
from torch.utils.data import TensorDataset

from lightning_l2l import LearnedStepSize, LearnToLearn


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


def fine_tune(pretrained: nn.Sequential, per: Literal["optimizer", "group"] | None, epochs: int) -> list[float]:
    L.seed_everything(0, verbose=False)
    model, data = FineTuned(pretrained, learning_rate=1e-3), TurnedDigits()
    learner = LearnToLearn(LearnedStepSize(per=per), every_n_steps=10) if per else None
    trainer = L.Trainer(max_epochs=epochs, callbacks=[learner] if learner else [], **QUIET)
    trainer.fit(model, data)
    tested = trainer.test(model, data, verbose=False)[0]
    rates = learner.learning_rates if learner else [group["lr"] for group in trainer.optimizers[0].param_groups]
    label = {None: "rate as it is", "optimizer": "one learned rate", "group": "one for each group"}[per]
    print(f"{label:20} body {rates[0]:8.2g}   head {rates[1]:8.2g}   ", end="")
    print(f"test loss {tested['test_loss']:.3f}   accuracy {tested['test_accuracy']:.3f}")
    return rates


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    quick = parser.parse_args(arguments).quick
    prepare()
    L.seed_everything(0, verbose=False)
    model = Classifier(learning_rate=0.1)
    L.Trainer(max_epochs=1 if quick else 15, **QUIET).fit(model, Digits())
    fine_tune(model.network, None, 4 if quick else 60)
    fine_tune(model.network, "optimizer", 4 if quick else 60)
    return fine_tune(model.network, "group", 4 if quick else 60)


if __name__ == "__main__":
    main()
