"""Learn the step size of gradient descent on a random quadratic: exactly, and with the callback in a Trainer.

Three answers to one question, next to the truth that a quadratic has in closed form: the step size by gradient descent
on the log meta-objective, once with the gradient in closed form and once by an exact unroll of all steps; and the
learning rate that LearnToLearn finds while a Trainer trains, by short unrolls.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_l2l
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.plotting import STYLES, new_figure, require_matplotlib
from lightning_l2l.tasks import Quadratic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--dim", type=int, default=20, help="dimension of the quadratic (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the quadratic (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="steps of gradient descent (%(default)s)")
    parser.add_argument("--unroll-steps", type=int, default=20, help="steps that the callback unrolls (%(default)s)")
    parser.add_argument("--updates", type=int, default=40, help="meta-updates of the exact answers (%(default)s)")
    parser.add_argument("--start", type=float, help="initial step size; a tenth of the stability limit by default")
    parser.add_argument("--figure", metavar="PATH", help="also draw what was found (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Learn, print the table, draw the figure.

    Raises:
        ValueError: A setting that makes no sense.
        ImportError: A figure without matplotlib.
    """
    if options.figure is not None:
        require_matplotlib()
    if options.updates < 1:
        raise ValueError(f"--updates {options.updates} must be at least 1.")
    task, steps = Quadratic.random(options.dim, seed=options.seed, kind="wide"), options.steps
    best, limit = float(task.optimal_step_size(steps)), float(task.stability_limit)
    start = limit / 10 if options.start is None else options.start
    if not (math.isfinite(start) and start > 0):
        raise ValueError(f"--start {start} must be positive and finite: its logarithm is learned.")
    exact, gradients = _descend(task, start, steps, options.updates, _closed_form)
    unrolled, others = _descend(task, start, steps, options.updates, _exact_unroll)
    trained, last_loss = _train(task, start, steps, options.unroll_steps)

    curvatures = f"{float(task.smallest_curvature):.3g} to {float(task.largest_curvature):.3g}"
    print(
        f"A quadratic in {options.dim} dimensions, curvatures {curvatures}; {steps} steps of gradient descent on it are"
    )
    print(f"stable below 2/L = {limit:.5g}. The first loss is {float(task.loss(task.initial_parameters())):.4g}.\n")
    print(f"{'step size':46}{'value':>12}{'over the best':>15}{'last loss':>12}")
    rows = [
        ("to start with", start, None),
        (f"learned, closed form, {options.updates} meta-gradients", exact[-1], None),
        (f"learned, exact unroll of {steps} steps, as many", unrolled[-1], None),
        ("the best constant one (known in closed form)", best, None),
        (f"LearnToLearn in a Trainer, unrolls of {options.unroll_steps}: last", trained[-1][1], last_loss),
    ]
    for name, step_size, loss in rows:
        found = float(task.meta_objective(step_size, steps, "naive")) if loss is None else loss
        print(f"{name:46}{step_size:12.6g}{step_size / best:15.6f}{found:12.4g}")
    apart = max(abs(one - other) for one, other in zip(gradients, others, strict=True)) / max(map(abs, gradients))
    print(f"\nThe meta-gradients of closed form and exact unroll differ by {apart:.1g} of the largest at most.")
    decades = float(task.signed_log_meta_gradient(10 * limit, steps, "naive").log_magnitude) / math.log(10)
    log = float(task.meta_gradient(10 * limit, steps))
    print(
        f"Why the logarithm: at ten times 2/L the naive meta-gradient is about 1e{decades:.0f}, the log one {log:.3g}."
    )
    if options.figure is not None:
        _draw(Path(options.figure), task, steps, exact, trained, options.unroll_steps)
        print(f"figure: {options.figure}")
    return 0


def _closed_form(task: Quadratic, step_size: float, steps: int) -> float:
    """The log meta-gradient with respect to the logarithm of the step size."""
    return float(task.meta_gradient(step_size, steps)) * step_size


def _exact_unroll(task: Quadratic, step_size: float, steps: int) -> float:
    """The same from the losses alone."""
    learned = lightning_l2l.LearnedStepSize(minimum=1e-30, maximum=1e30)
    learned.attach(inner_optimizer(torch.optim.SGD, lr=step_size))
    found = lightning_l2l.meta_gradient(task, task.initial_parameters(), learned, [None] * steps, None)
    return found.gradients["learning_rate"].item()


def _descend(
    task: Quadratic, start: float, steps: int, updates: int, gradient: Callable[[Quadratic, float, int], float]
) -> tuple[list[float], list[float]]:
    """Step sizes and meta-gradients of a descent in the logarithm, by Rprop: sizes span decades, signs do not."""
    logarithm = torch.nn.Parameter(torch.tensor(math.log(start), dtype=torch.float64))
    optimizer = torch.optim.Rprop([logarithm], lr=0.5)
    step_sizes, gradients = [start], []
    for _ in range(updates):
        gradients.append(gradient(task, step_sizes[-1], steps))
        logarithm.grad = torch.tensor(gradients[-1], dtype=torch.float64)
        optimizer.step()
        step_sizes.append(logarithm.exp().item())
    return step_sizes, gradients


class _Rates(pl.Callback):
    """The rate that each step was made with, and the best one for the next steps from there."""

    def __init__(self, task: Quadratic, ahead: int) -> None:
        self.task, self.ahead = task, ahead
        self.rows: list[tuple[int, float, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        (point,) = (parameter.detach() for parameter in pl_module.parameters())
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        best = float(Quadratic(self.task.hessian, point).optimal_step_size(self.ahead))
        self.rows.append((trainer.global_step, rate, best))


def _train(
    task: Quadratic, start: float, steps: int, unroll_steps: int
) -> tuple[list[tuple[int, float, float]], float]:
    """A Trainer with LearnToLearn: step, rate and best rate for the next unroll; and the loss at the end."""
    callback = lightning_l2l.LearnToLearn(
        lightning_l2l.Unroll(steps=unroll_steps, objective="log"),
        every_n_steps=2,
        initial_search=False,
    )
    rates, module = _Rates(task, unroll_steps), lightning_l2l.TaskModule(task, learning_rate=start)
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on workers and loggers
            pl.Trainer(
                max_steps=steps, callbacks=[callback, rates], accelerator="cpu", devices=1, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            ).fit(module)  # fmt: skip
    finally:
        log.setLevel(level)
    return rates.rows, module.loss(None).item()


def _draw(
    path: Path, task: Quadratic, steps: int, exact: list[float], trained: list[tuple[int, float, float]], ahead: int
) -> None:
    figure, (axes,) = new_figure(1, 3, width=3.6)
    limit = float(task.stability_limit)
    grid = torch.logspace(math.log10(limit) - 3, math.log10(limit) + 1, 200, dtype=torch.float64)
    axes[0].plot(grid, task.meta_objective(grid, steps), **STYLES[0])
    axes[0].axvline(float(task.optimal_step_size(steps)), label="best", **STYLES[1])
    axes[0].set(xscale="log", xlabel="step size", ylabel="log objective")
    axes[1].plot(exact, label="learned exactly", **STYLES[0])
    axes[1].axhline(float(task.optimal_step_size(steps)), label="best", **STYLES[1])
    axes[1].set(xlabel="meta-update", ylabel="step size", yscale="log")
    numbers, rates, best = zip(*trained, strict=True)
    axes[2].plot(numbers, rates, label="LearnToLearn", **STYLES[0])
    axes[2].plot(numbers, best, label=f"best for the next {ahead} steps", **STYLES[1])
    axes[2].set(xlabel="training step", ylabel="learning rate", yscale="log")
    for axis in axes:
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path)
