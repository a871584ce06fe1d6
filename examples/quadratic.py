"""A training whose truth is known: what an exact estimator finds, next to closed forms at every update.

The task is a random quadratic of 20 dimensions. At any moment, the best step size for the next K steps has a closed
form, and it moves as steep and flat directions are used up in turn; the callback only sees losses and gradients.
Prints one line for each update, and writes quadratic.png:

    python examples/quadratic.py
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning as L

from lightning_l2l import LearnToLearn, TaskModule, Unroll
from lightning_l2l.plotting import STYLES, new_figure
from lightning_l2l.tasks import Quadratic

UNROLL_STEPS = 10


class Truth(L.Callback):
    """After each update: the same meta-gradient, and the best step size, in closed form from the same weights."""

    def __init__(self, task: Quadratic, learner: LearnToLearn) -> None:
        self.task, self.learner = task, learner
        self.rows: list[tuple[int, float, float, float, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]  # which the callback unrolls with

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        record = self.learner.history[-1] if self.learner.history else {}
        if record.get("step") == trainer.global_step and record.get("meta_gradient"):  # the guard's have none
            (point,) = (parameter.detach() for parameter in pl_module.parameters())
            here = Quadratic(self.task.hessian, point)
            (found,), steps = record["meta_gradient"]["learning_rate"], len(record["diagnostics"]["losses"])
            exact = float(here.meta_gradient(self.rate, steps)) * self.rate  # in the logarithm of the rate
            self.rows.append((trainer.global_step, self.rate, float(here.optimal_step_size(steps)), found, exact))


def draw(rows: list[tuple[int, float, float, float, float]], path: str) -> None:
    steps, rates, best, found, exact = zip(*rows, strict=True)
    figure, axes = new_figure(1, 2)
    axes[0, 0].plot(steps, rates, label="learned", **STYLES[0])
    axes[0, 0].plot(steps, best, label=f"best for the next {UNROLL_STEPS} steps", **STYLES[1])
    axes[0, 1].plot(steps, found, label="found by the callback", marker=".", **{**STYLES[0], "linestyle": "none"})
    axes[0, 1].plot(steps, exact, label="in closed form", linewidth=1, **STYLES[1])
    axes[0, 0].set(xlabel="training step", ylabel="learning rate", yscale="log")
    axes[0, 1].set(xlabel="training step", ylabel="meta-gradient")
    for axis in axes.flat:
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> list[tuple[int, float, float, float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps only")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="where to start (%(default)s)")
    parser.add_argument("--plot", default="quadratic.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    task = Quadratic.random(20, seed=0, kind="wide")
    learner = LearnToLearn(Unroll(steps=UNROLL_STEPS), every_n_steps=2, initial_search=False)
    truth = Truth(task, learner)
    trainer = L.Trainer(
        max_steps=40 if options.quick else 300,
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
    draw(truth.rows, options.plot)
    return truth.rows


if __name__ == "__main__":
    main()
