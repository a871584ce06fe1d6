"""What experiment 3 writes and draws."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lightning_l2l.experiments._runs import Curve
from lightning_l2l.plotting import STYLES, new_figure


@dataclass(frozen=True)
class Result:
    """One row of ``results.csv``: an optimizer of one meta-seed, averaged over its test runs.

    Attributes:
        label_noise: Fraction of random labels in training and validation data; the test labels are clean.
        method: ``"train-by-train"``, ``"train-by-validation"`` or ``"sgd"``.
        train_samples: Training examples of each task.
        val_samples: Held-out examples of each task that the meta-objective, or the tuning, saw.
        seed: Of the meta-training and its test runs.
        train_accuracy: At the end, on the (noisy) training examples.
        test_accuracy: At the end.
        test_loss: At the end.
        diverged: Test runs that diverged.
        curve: How the test runs went; in ``curves.csv``.
    """

    label_noise: float
    method: str
    train_samples: int
    val_samples: int
    seed: int
    train_accuracy: float
    test_accuracy: float
    test_loss: float
    diverged: int
    curve: Curve | None = None

    @property
    def kind(self) -> tuple[str, int, int]:
        """Method, training and held-out examples."""
        return self.method, self.train_samples, self.val_samples

    @property
    def label(self) -> str:
        """The same for people."""
        return f"{self.method}\n{self.train_samples}" + (f" + {self.val_samples}" if self.val_samples else "")


def write(found: Sequence[Result], folder: Path) -> None:
    """``results.csv``, and ``curves.csv`` with means over the test runs."""
    names = [field.name for field in fields(Result) if field.name != "curve"]
    with (folder / "results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        writer.writerows([[getattr(row, name) for name in names] for row in found])
    with (folder / "curves.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*names[:5], "step", "train_loss", "test_accuracy"])
        for row in found:
            if row.curve is not None:
                means = [values.mean(0).tolist() for values in (row.curve.train, row.curve.test_accuracy)]
                of_row = [getattr(row, name) for name in names[:5]]
                writer.writerows([[*of_row, *values] for values in zip(row.curve.steps, *means, strict=True)])


def draw_accuracies(found: Sequence[Result], path: Path) -> None:
    """The test accuracy at the end: a dot for each meta-seed, a line for their mean."""
    noises = sorted({row.label_noise for row in found})
    figure, axes = new_figure(1, len(noises))
    kinds = list(dict.fromkeys(row.kind for row in found))
    for axis, noise in zip(axes[0], noises, strict=True):
        for place, (kind, style) in enumerate(zip(kinds, _styles(len(kinds)), strict=False)):
            values = torch.tensor([r.test_accuracy for r in found if r.kind == kind and r.label_noise == noise])
            axis.plot([place] * len(values), values, "o", color=style["color"], alpha=0.5)
            axis.plot([place], values.mean(), "_", color="black", markersize=18)
        axis.set_xticks(range(len(kinds)), dict.fromkeys(row.label for row in found), fontsize="x-small")
        axis.set(ylabel="test accuracy", title=f"{noise:.0%} random labels")
    figure.savefig(path)


def draw_curves(found: Sequence[Result], path: Path) -> None:
    """Training loss and test accuracy over the steps.

    Lines are means over test runs and meta-seeds, bands reach from the lowest meta-seed to the highest.
    """
    noises = sorted({row.label_noise for row in found})
    figure, axes = new_figure(len(noises), 2, width=4.6, height=3.4)
    kinds = list(dict.fromkeys(row.kind for row in found))
    for (left, right), noise in zip(axes, noises, strict=True):
        for kind, style in zip(kinds, _styles(len(kinds)), strict=False):
            rows = [row for row in found if row.kind == kind and row.label_noise == noise]
            curves = [row.curve for row in rows if row.curve is not None]
            for axis, name in ((left, "train"), (right, "test_accuracy")):
                values = torch.stack([getattr(curve, name).mean(0) for curve in curves])
                axis.plot(
                    curves[0].steps, values.mean(0), linewidth=1.3, label=rows[0].label.replace("\n", ", "), **style
                )
                axis.fill_between(
                    curves[0].steps, values.amin(0), values.amax(0), alpha=0.2, color=style["color"], linewidth=0
                )
        left.set(xlabel="training step", ylabel="loss on the training examples", yscale="log")
        right.set(xlabel="training step", ylabel="test accuracy")
        left.set_title(f"{noise:.0%} random labels", loc="left", fontsize="medium")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    figure.savefig(path)


def _styles(count: int) -> list[dict[str, Any]]:
    return list(STYLES * (1 + count // len(STYLES)))
