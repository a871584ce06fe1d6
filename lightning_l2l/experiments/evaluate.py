"""Compare learned optimizers with tuned Adam and tuned SGD with momentum: several seeds, spread, time."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lightning_l2l.experiments._choices import TaskName, make_family
from lightning_l2l.experiments._runs import Runs, runs, speed_up, tuned
from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.plotting import STYLES, new_figure, require_matplotlib
from lightning_l2l.tasks.family import TaskFamily

# Half-decades, 1e-4 to 1 for Adam, 1e-3 to 10 for SGD.
_ADAM, _SGD = (-8, 0), (-6, 2)


@dataclass(frozen=True)
class Row:
    """One row of ``comparison.csv``: an optimizer.

    Attributes:
        optimizer: Its name.
        learning_rate: The best of the grid, for baselines.
        mean_train_loss: Mean over runs and steps.
        spread: Standard deviation of a run's mean over the runs.
        last_train_loss: Mean over the last tenth of the steps.
        test_loss: At the end.
        test_accuracy: At the end; NaN where that means nothing.
        speed_up: Steps that tuned Adam takes to its final loss, by the steps that this one takes to the same loss.
        speed_up_in_time: The same in processor time, tuning not counted.
        milliseconds: Processor time of one step of one run.
        diverged: Runs that diverged.
    """

    optimizer: str
    learning_rate: float | None
    mean_train_loss: float
    spread: float
    last_train_loss: float
    test_loss: float
    test_accuracy: float
    speed_up: float
    speed_up_in_time: float
    milliseconds: float
    diverged: int


def run(
    learned: list[str],
    output: str = "evaluate",
    task: TaskName = "digits",
    mnist_folder: str | None = None,
    train_samples: int | None = None,
    label_noise: float = 0.0,
    steps: int = 200,
    seeds: int = 8,
    plots: bool = True,
) -> list[Row]:
    """Compare saved learned optimizers with tuned Adam and tuned SGD with momentum.

    The baselines' step sizes are chosen from a half-decade grid by mean training loss, on other seeds than those that
    are
    reported; a learned optimizer was chosen by its meta-training. Every optimizer sees the same tasks, starts and
    batches.

    Args:
        learned: Files written by LearnedOptimizer.save, e.g. by the command meta-train.
        output: Folder for comparison.csv, curves.csv and comparison.png.
        task: What to train.
        mnist_folder: Where MNIST's four IDX files are.
        train_samples: Training examples of each task, drawn anew for each; all of them if not given.
        label_noise: Fraction of random training labels.
        steps: Training steps.
        seeds: Runs of each optimizer.
        plots: Whether to draw the figure.

    Returns:
        One row for each optimizer.

    Raises:
        ValueError: A file that is no learned optimizer, or settings that make no sense.
        ImportError: Figures without matplotlib, or digits without scikit-learn.
    """
    if plots:
        require_matplotlib()
    optimizers = {Path(path).stem: LearnedOptimizer.load(path) for path in learned}
    family = make_family(task, mnist_folder, train_samples, label_noise)
    found = compare(optimizers, family, steps, range(seeds))
    rows = write(found, Path(output))
    if plots:
        draw(found, Path(output) / "comparison.png", f"{task}, {steps} steps, {seeds} seeds")
    return rows


def compare(
    optimizers: dict[str, LearnedOptimizer], family: TaskFamily, steps: int, seeds: Sequence[int]
) -> list[Runs]:
    """Runs of all optimizers and of the two tuned baselines, the baselines first.

    Args:
        optimizers: By name.
        family: The tasks.
        steps: Training steps.
        seeds: One run for each.

    Raises:
        ValueError: No steps or no seeds.
    """
    if steps < 1 or len(seeds) < 1:
        raise ValueError(f"A comparison needs steps and seeds, got {steps} and {len(seeds)}.")
    tuning = [10_000 + seed for seed in seeds]
    found = [tuned("adam", family, steps, tuning, seeds, exponents=_ADAM)]
    found.append(tuned("sgd_momentum", family, steps, tuning, seeds, exponents=_SGD))
    return found + [runs(name, learned, family, steps, seeds) for name, learned in optimizers.items()]


def write(found: Sequence[Runs], output: Path) -> list[Row]:
    """``comparison.csv`` and ``curves.csv`` (mean and standard deviation over runs of the training loss)."""
    output.mkdir(parents=True, exist_ok=True)
    reference = found[0]
    rows = [_row(one, reference) for one in found]
    with (output / "comparison.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows([[getattr(row, field.name) for field in fields(Row)] for row in rows])
    with (output / "curves.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["optimizer", "step", "train_loss", "standard_deviation"])
        for one in found:
            means, spreads = one.train.mean(0).tolist(), one.train.std(0, correction=0).tolist()
            writer.writerows([[one.name, step, *pair] for step, pair in enumerate(zip(means, spreads, strict=True))])
    return rows


def draw(found: Sequence[Runs], path: Path, title: str) -> None:
    """Training loss over steps, the middle half of the runs shaded; and over processor time."""
    figure, axes = new_figure(1, 2)
    for one, style in zip(found, STYLES * (1 + len(found) // len(STYLES)), strict=False):
        quartiles = torch.quantile(one.train, torch.tensor([0.25, 0.5, 0.75]), dim=0)
        rate = "" if one.learning_rate is None else f", rate {one.learning_rate:.2g}"
        steps = torch.arange(one.train.shape[1])
        for axis, scale in ((axes[0, 0], 1.0), (axes[0, 1], one.seconds * 1e3)):
            axis.plot(steps * scale, quartiles[1], label=f"{one.name}{rate}", linewidth=1.3, **style)
            axis.fill_between(steps * scale, quartiles[0], quartiles[2], alpha=0.2, color=style["color"], linewidth=0)
            axis.set_yscale("log")
    axes[0, 0].set(xlabel="training step", ylabel="training loss (median, quartiles)", title=title)
    axes[0, 1].set(xlabel="processor time of one run [ms]")
    axes[0, 0].legend(frameon=False, fontsize="small")
    figure.savefig(path)


def _row(one: Runs, reference: Runs) -> Row:
    last = max(1, one.train.shape[1] // 10)
    faster = speed_up(one, reference)
    return Row(
        one.name, one.learning_rate, one.score, one.train.mean(1).std(correction=0).item(),
        one.train[:, -last:].mean().item(), one.test.mean().item(), one.test_accuracy.mean().item(),
        faster, faster * reference.seconds / one.seconds, one.seconds * 1e3, one.diverged,
    )  # fmt: skip
