"""A training whose truth is known: what the callback finds, next to closed forms at every meta-update.

The task is a random quadratic of 20 dimensions. At any moment, the best step size for the next K steps has a closed
form, and it moves as the steep directions are used up; the callback only sees losses and gradients:

    python examples/quadratic.py
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning as L

from lightning_l2l import LearnToLearn, TaskModule
from lightning_l2l.tasks import Quadratic

UNROLL_STEPS = 10


class Truth(L.Callback):
    """After each meta-update: the same meta-gradient, and the best step size, in closed form from the same weights."""

    def __init__(self, task: Quadratic, learner: LearnToLearn) -> None:
        self.task, self.learner = task, learner
        self.rows: list[tuple[int, float, float, float, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]  # in force when the callback looks ahead

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if len(self.learner.history) > len(self.rows):
            (point,) = (parameter.detach() for parameter in pl_module.parameters())
            here = Quadratic(self.task.hessian, point)
            record = self.learner.history[-1]
            (found,), steps = record["meta_gradient"]["learning_rate"], len(record["diagnostics"]["losses"])
            exact = float(here.meta_gradient(self.rate, steps)) * self.rate  # in the logarithm of the rate
            self.rows.append((trainer.global_step, self.rate, float(here.optimal_step_size(steps)), found, exact))


def main(arguments: list[str] | None = None) -> list[tuple[int, float, float, float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps only")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="where to start (%(default)s)")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    task = Quadratic.random(20, seed=0, kind="wide")
    # By looking ahead: the live estimator looks back over the steps just taken, from other weights than the truth's.
    learner = LearnToLearn(unroll_steps=UNROLL_STEPS, every_n_steps=5, meta_learning_rate=1.0, estimator="forward")
    truth = Truth(task, learner)
    trainer = L.Trainer(
        max_steps=40 if options.quick else 200,
        callbacks=[learner, truth],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TaskModule(task, learning_rate=options.learning_rate))
    print(f"{'step':>5}{'rate':>10}{'best rate':>11}{'meta-gradient':>17}{'in closed form':>17}")
    for step, rate, best, found, exact in truth.rows:
        print(f"{step:5d}{rate:10.5f}{best:11.5f}{found:17.12f}{exact:17.12f}")
    return truth.rows


if __name__ == "__main__":
    main()
