"""Not only the rate: momentum and weight decay are learned too, each in a form that keeps it legal.

    python examples/momentum_and_decay.py

A fifth of the training labels is wrong, so that there is something for a weight decay to do. Momentum moves as
1 - (1 - momentum) * exp(d) and stays below 1; weight decay as a positive factor, so it must not start at 0.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from digits_task import QUIET, Classifier, Digits, prepare
from torch.utils.data import TensorDataset

from lightning_l2l import LearnedHyperparameters, LearnedOptimizer, LearnedStepSize, LearnToLearn


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


def train(name: str, learned: LearnedOptimizer | None, epochs: int) -> dict[str, float]:
    L.seed_everything(0, verbose=False)
    model, data = Decayed(learning_rate=0.03), NoisyDigits()
    learner = [LearnToLearn(learned, initial_search=False)] if learned is not None else []
    seen: dict[str, float] = {}

    class LastValues(L.Callback):
        """What the optimizer's group holds in the last step: the callback takes its values back when the fit ends."""

        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            seen.update({key: trainer.optimizers[0].param_groups[0][key] for key in ("lr", "momentum", "weight_decay")})

    trainer = L.Trainer(max_epochs=epochs, callbacks=[*learner, LastValues()], **QUIET)
    trainer.fit(model, data)
    tested = trainer.test(model, data, verbose=False)[0]
    print(f"{name:28} rate {seen['lr']:8.2g}   momentum {seen['momentum']:6.3f}   ", end="")
    print(f"decay {seen['weight_decay']:8.2g}   test loss {tested['test_loss']:.3f}")
    return seen


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three epochs only")
    epochs = 3 if parser.parse_args(arguments).quick else 40
    prepare()
    train("as they are", None, epochs)
    train("rate learned", LearnedStepSize(), epochs)
    names = ("learning_rate", "momentum", "weight_decay")
    return train("rate, momentum and decay", LearnedHyperparameters(learn=names), epochs)


if __name__ == "__main__":
    main()
