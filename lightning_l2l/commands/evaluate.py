"""Compare saved learned optimizers with tuned Adam and tuned SGD with momentum.

Every optimizer trains the same tasks from the same starts on the same batches. The baselines' step sizes are chosen
from a half-decade grid by mean training loss, on other seeds than those that are reported.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_l2l import LearnedOptimizer
from lightning_l2l.plotting import STYLES, new_figure, require_matplotlib
from lightning_l2l.tasks import ImageClassification, RandomQuadratics, TaskFamily

# Makes an optimizer for a list of parameters.
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
# A run has diverged once its loss is above its first by this many times the first; it then keeps that loss.
_DIVERGENCE = 10.0
# Half-decades: 1e-4 to 1 for Adam, 1e-3 to 10 for SGD.
_BASELINES: dict[str, tuple[Callable[[float], Make], range]] = {
    "adam": (lambda rate: lambda parameters: torch.optim.Adam(parameters, rate), range(-8, 1)),
    "sgd_momentum": (lambda rate: lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9), range(-6, 3)),
}


@dataclass(frozen=True)
class Runs:
    """Trainings with one optimizer.

    Attributes:
        optimizer: Its name.
        train: Loss on the batch of each step, before the step; ``[runs, steps]``.
        test: Loss on test data at the end, ``[runs]``.
        test_accuracy: Fraction classified correctly, ``[runs]``; NaN where that means nothing.
        diverged: How many runs diverged.
        seconds: Processor time of one step.
        learning_rate: The best of the grid, for baselines.
    """

    optimizer: str
    train: Tensor
    test: Tensor
    test_accuracy: Tensor
    diverged: int
    seconds: float
    learning_rate: float | None = None

    def row(self, reference: Runs) -> dict[str, Any]:
        """A row of the table: means over runs, and speed against the reference, tuned Adam.

        ``speed_up`` is the number of steps that the reference takes to its final loss, by the number that this
        optimizer takes to the same loss (0: never), with losses averaged over 5 % of the steps; ``speed_up_in_time``
        the same in processor time, tuning not counted.
        """
        steps = self.train.shape[1]
        width, last = max(1, steps // 20), max(1, steps // 10)
        own, other = (one.train.mean(0).unfold(0, width, 1).mean(1) for one in (self, reference))
        needed, usual = ((curve <= other[-1]).nonzero() for curve in (own, other))
        faster = (int(usual[0]) + width) / (int(needed[0]) + width) if len(needed) else 0.0
        return {
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "mean_train_loss": self.train.mean().item(),
            "spread": self.train.mean(1).std(correction=0).item(),
            "last_train_loss": self.train[:, -last:].mean().item(),
            "test_loss": self.test.mean().item(),
            "test_accuracy": self.test_accuracy.mean().item(),
            "speed_up": faster,
            "speed_up_in_time": faster * reference.seconds / self.seconds,
            "milliseconds": self.seconds * 1e3,
            "diverged": self.diverged,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--learned", nargs="+", required=True, metavar="FILE", help="written by LearnedOptimizer.save")
    parser.add_argument("--output", default="evaluate", help="folder for comparison.csv and comparison.png")
    parser.add_argument("--steps", type=int, default=200, help="training steps (%(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each optimizer (%(default)s)")
    add_task_arguments(parser)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose the tasks, and whether to draw."""
    parser.add_argument("--task", default="digits", choices=["digits", "mnist", "quadratics"], help="(%(default)s)")
    parser.add_argument("--mnist-folder", help="where MNIST's four IDX files are")
    parser.add_argument("--train-samples", type=int, help="training examples of each task, drawn anew; default: all")
    parser.add_argument("--label-noise", type=float, default=0.0, help="fraction of random training labels")
    parser.add_argument("--no-figure", dest="figure", action="store_false", help="draw nothing")


def run(options: argparse.Namespace) -> int:
    """Train with all optimizers, print and write the table, draw the curves.

    Raises:
        ValueError: A file that is no learned optimizer, or settings that make no sense.
        ImportError: Figures without matplotlib, or digits without scikit-learn.
    """
    if options.figure:
        require_matplotlib()
    optimizers = {Path(path).stem: LearnedOptimizer.load(path) for path in options.learned}
    compare(optimizers, make_family(options), options.steps, options.seeds, Path(options.output), figure=options.figure)
    return 0


def make_family(options: argparse.Namespace) -> TaskFamily:
    """The tasks that the options ask for.

    Raises:
        ValueError: MNIST without a folder.
    """
    if options.task == "quadratics":
        return RandomQuadratics()
    digits = options.task == "digits"
    samples = options.train_samples or (1200 if digits else 50_000)
    settings: dict[str, Any] = {
        "train_samples": samples,
        "val_samples": min(samples, 297 if digits else 10_000),
        "label_noise": options.label_noise,
        "resample": options.train_samples is not None,
    }
    if digits:
        return ImageClassification.digits(**settings)
    if options.mnist_folder is None:
        raise ValueError("--task mnist needs --mnist-folder, the folder with MNIST's four IDX files.")
    return ImageClassification.mnist(options.mnist_folder, **settings)


def compare(
    optimizers: dict[str, LearnedOptimizer], family: TaskFamily, steps: int, seeds: int, output: Path, *, figure: bool
) -> None:
    """Train with the tuned baselines and the learned optimizers; print and write a row for each, the baselines first.

    Args:
        optimizers: By name.
        family: The tasks.
        steps: Training steps.
        seeds: Runs of each.
        output: Folder for ``comparison.csv`` and ``comparison.png``; made if missing.
        figure: Whether to draw.

    Raises:
        ValueError: No steps or no seeds.
    """
    if steps < 1 or seeds < 1:
        raise ValueError(f"A comparison needs steps and seeds, got {steps} and {seeds}.")
    found = [tuned(name, family, steps, range(10_000, 10_000 + seeds), range(seeds)) for name in _BASELINES]
    found += [train(name, one.as_torch_optimizer, family, steps, range(seeds)) for name, one in optimizers.items()]
    rows = [one.row(found[0]) for one in found]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "comparison.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if figure:
        _draw(found, output / "comparison.png")
    print(f"written to {output}")


def train(name: str, make: Make, family: TaskFamily, steps: int, seeds: Sequence[int]) -> Runs:
    """Train one task for each seed, which gives the task, the start and the batches.

    Args:
        name: For the report.
        make: Makes the optimizer for a run's parameters.
        family: Where the tasks come from.
        steps: Training steps.
        seeds: One run for each.
    """
    curves, ends, diverged, spent, done = [], [], 0, 0.0, 0
    for seed in tqdm(seeds, desc=name, leave=False, disable=None):  # no bar where there is no terminal
        generator = torch.Generator().manual_seed(seed)
        task = family.sample(generator)
        parameters = {key: nn.Parameter(start) for key, start in task.initial_parameters(generator).items()}
        optimizer, losses, highest = make(list(parameters.values())), [], float("inf")
        for step in range(steps):
            batch, began = task.sample_batch("train", generator), time.process_time()
            loss = task.loss(parameters, batch)
            losses.append(loss.item())
            if step == 0:
                highest = losses[0] + _DIVERGENCE * abs(losses[0])
            if not losses[-1] < highest:  # NaN neither
                losses, diverged = losses[:-1] + [highest] * (steps - step), diverged + 1
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            spent, done = spent + time.process_time() - began, done + 1
        curves.append(losses)
        ends.append(_on_test_data(task, parameters, generator))
    test, accuracy = torch.tensor(ends).unbind(1)
    return Runs(name, torch.tensor(curves), test, accuracy, diverged, spent / max(1, done))


def tuned(name: str, family: TaskFamily, steps: int, tuning: Sequence[int], seeds: Sequence[int]) -> Runs:
    """A baseline, ``"adam"`` or ``"sgd_momentum"``, at the step size with the least mean training loss on other seeds.

    Args:
        name: Which.
        family: Where the tasks come from.
        steps: Training steps.
        tuning: The seeds that the step size is chosen on.
        seeds: Those that are reported.
    """
    make, exponents = _BASELINES[name]
    grid = [10 ** (exponent / 2) for exponent in exponents]
    best = min(grid, key=lambda rate: train(name, make(rate), family, steps, tuning).train.mean().item())
    return replace(train(name, make(best), family, steps, seeds), learning_rate=best)


@torch.no_grad()
def _on_test_data(task: Any, parameters: dict[str, nn.Parameter], generator: torch.Generator) -> tuple[float, float]:
    """Loss and accuracy on all test data, or on a batch where a task cannot give all; accuracy NaN if it has none."""
    whole = hasattr(task, "full_batch")
    batch = task.full_batch("test") if whole else task.sample_batch("test", generator)
    accuracy = task.accuracy(parameters, batch).item() if hasattr(task, "accuracy") else float("nan")
    return task.loss(parameters, batch).item(), accuracy


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(found: Sequence[Runs], path: Path) -> None:
    """Training loss over steps and over processor time, the middle half of the runs shaded."""
    figure, (axes,) = new_figure(1, 2)
    for one, style in zip(found, STYLES * (1 + len(found) // len(STYLES)), strict=False):
        low, middle, high = torch.quantile(one.train, torch.tensor([0.25, 0.5, 0.75]), dim=0)
        rate = "" if one.learning_rate is None else f", rate {one.learning_rate:.2g}"
        for axis, scale in zip(axes, (1.0, one.seconds * 1e3), strict=True):
            steps = torch.arange(one.train.shape[1]) * scale
            axis.plot(steps, middle, label=f"{one.optimizer}{rate}", linewidth=1.3, **style)
            axis.fill_between(steps, low, high, alpha=0.2, color=style["color"], linewidth=0)
            axis.set_yscale("log")
    axes[0].set(xlabel="training step", ylabel="training loss (median, quartiles)")
    axes[1].set(xlabel="processor time of one run [ms]")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path)
