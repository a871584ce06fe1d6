"""Experiment 3 of arXiv 2006.16495: a neural optimizer trained on training or on held-out loss, with noisy labels.

With n training examples per task: train-by-train on n, train-by-train on 2 n, train-by-validation on n + n, and SGD
with the step size tuned on the validation loss of n + n. Each is tested on new tasks with new starts. Writes
results.csv, curves.csv, test_accuracy.png and curves.png.

    python examples/paper/mlp_optimizer.py --samples 100 --updates 50 --label-noise 0.2

The defaults take minutes: second order, Adam, unrolls of 20 steps. --published has the optimizer, first order, RMSProp,
mean over w_0 ... w_(T-1) and random unroll lengths of the paper's code; give it --updates of the order of 10000.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tables import write_csv
from torch import nn
from tqdm import tqdm

from lightning_l2l import LearnedOptimizer, MetaTraining, MLPOptimizer, Unroll
from lightning_l2l.plotting import STYLES, new_figure
from lightning_l2l.tasks import ImageClassification
from lightning_l2l.tasks.length import Length


@dataclass(frozen=True)
class Result:
    """An optimizer of one meta-seed, averaged over its test runs; the test labels are clean."""

    label_noise: float
    method: str
    train_samples: int
    val_samples: int
    seed: int
    train_accuracy: float  # at the end, on the (noisy) training examples
    test_accuracy: float
    test_loss: float
    val_loss: float

    @property
    def label(self) -> str:
        return f"{self.method}\n{self.train_samples}" + (f" + {self.val_samples}" if self.val_samples else "")


# Step, loss on all training examples and accuracy on all test examples, means over the test runs.
Curve = list[tuple[int, float, float]]


def meta_train(options: argparse.Namespace, family: ImageClassification, meta_data: str, seed: int) -> LearnedOptimizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learned = MLPOptimizer() if options.published else MLPOptimizer(32, 0.01, initialisation="scaled")
    common: dict[str, Any] = {"meta_data": meta_data, "meta_batch": "full", "seed": seed}
    if options.published:
        # 10 + Exp(30) unrolls of 50 + Exp(100) steps each in a trajectory, as a number of steps.
        module = MetaTraining(
            learned, family, unroll_steps=Length(50, 100, "exponential"), tasks_at_once=1,
            estimator=Unroll(objective="naive_mean", mode="segmented", second_order=False),
            episode_steps=Length(1500, 4500, "exponential"), iterates="before",
            meta_optimizer="rmsprop_tf1", meta_learning_rate=0.01, **common,
        )  # fmt: skip
    else:
        module = MetaTraining(
            learned, family, unroll_steps=20, episode_steps=options.steps, tasks_at_once=4, populations=4,
            estimator=Unroll(objective="naive_mean"), meta_learning_rate=3e-3, warm_down=True, **common,
        )  # fmt: skip
    L.Trainer(
        max_steps=options.updates, max_epochs=-1, accelerator="cpu", devices=1, logger=False, gradient_clip_val=1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module)  # fmt: skip
    return learned


def test(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], family: ImageClassification, steps: int, seeds: range
) -> tuple[dict[str, float], Curve]:
    """Train new tasks from new starts; means at the end, and forty evaluations on the way."""
    curves, ends = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        task: Any = family.sample(generator)
        parameters = {name: nn.Parameter(value) for name, value in task.initial_parameters(generator).items()}
        optimizer, curve = make(list(parameters.values())), []
        for step in range(steps + 1):
            if step % max(1, steps // 40) == 0 or step == steps:
                train, (loss, accuracy) = evaluate(task, parameters, "train"), evaluate(task, parameters, "test")
                curve.append((step, train[0], accuracy))
            if step < steps:
                optimizer.zero_grad()
                task.loss(parameters, task.sample_batch("train", generator)).backward()
                optimizer.step()
        val = evaluate(task, parameters, "val")[0] if family.val_samples else float("nan")
        ends.append({"train_accuracy": train[1], "test_accuracy": accuracy, "test_loss": loss, "val_loss": val})
        curves.append(curve)
    means = torch.tensor(curves).mean(0).tolist()
    return mean_of(ends), [(int(step), loss, accuracy) for step, loss, accuracy in means]


@torch.no_grad()
def evaluate(task: Any, parameters: dict[str, nn.Parameter], split: str) -> tuple[float, float]:
    batch = task.full_batch(split)
    return task.loss(parameters, batch).item(), task.accuracy(parameters, batch).item()


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def tuned_sgd(family: ImageClassification, steps: int, tuning: range, seeds: range) -> tuple[dict[str, float], Curve]:
    """SGD at the step size with the least validation loss, of half-decades from 1e-3 to 3, on other tasks."""

    def sgd(rate: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.SGD(parameters, rate)

    grid = [10 ** (exponent / 2) for exponent in range(-6, 2)]
    losses = torch.tensor([test(sgd(rate), family, steps, tuning)[0]["val_loss"] for rate in grid])
    return test(sgd(grid[int(losses.nan_to_num(torch.inf).argmin())]), family, steps, seeds)


def draw_accuracies(path: Path, found: list[tuple[Result, Curve]]) -> None:
    """The test accuracy at the end: a dot for each meta-seed, a line for their mean."""
    noises, labels = (list(dict.fromkeys(getattr(row, name) for row, _ in found)) for name in ("label_noise", "label"))
    figure, axes = new_figure(1, len(noises))
    for axis, noise in zip(axes[0], noises, strict=True):
        for place, (label, style) in enumerate(zip(labels, STYLES, strict=False)):
            values = [row.test_accuracy for row, _ in found if (row.label, row.label_noise) == (label, noise)]
            axis.plot([place] * len(values), values, "o", color=style["color"], alpha=0.5)
            axis.plot([place], sum(values) / len(values), "_", color="black", markersize=18)
        axis.set_xticks(range(len(labels)), labels, fontsize="x-small")
        axis.set(ylabel="test accuracy", title=f"{noise:.0%} random labels")
    figure.savefig(path)


def draw_curves(path: Path, found: list[tuple[Result, Curve]]) -> None:
    """Lines are means over the meta-seeds, bands reach from the lowest to the highest."""
    noises, labels = (list(dict.fromkeys(getattr(row, name) for row, _ in found)) for name in ("label_noise", "label"))
    figure, axes = new_figure(len(noises), 2, width=4.6, height=3.4)
    for row_of_axes, noise in zip(axes, noises, strict=True):
        for label, style in zip(labels, STYLES, strict=False):
            curves = torch.tensor([c for row, c in found if (row.label, row.label_noise) == (label, noise)])
            for axis, which in zip(row_of_axes, (1, 2), strict=True):
                steps, values = curves[0, :, 0], curves[:, :, which]
                axis.plot(steps, values.mean(0), linewidth=1.3, label=label.replace("\n", ", "), **style)
                axis.fill_between(steps, values.amin(0), values.amax(0), alpha=0.2, color=style["color"], linewidth=0)
        row_of_axes[0].set(xlabel="training step", ylabel="loss on the training examples", yscale="log")
        row_of_axes[1].set(xlabel="training step", ylabel="test accuracy", title=f"{noise:.0%} random labels")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--output", type=Path, default=Path("mlp_optimizer"), help="folder for the results (%(default)s)")
    option("--mnist-folder", help="folder with MNIST's four IDX files; scikit-learn's digits if not given")
    option("--samples", type=int, help="n; 100 for digits and 1000 for MNIST by default")
    option("--label-noise", type=float, nargs="+", default=[0.0, 0.2], help="fractions of random labels (0 0.2)")
    option("--all-data", action="store_true", help="also with all training examples, five sixths + one sixth")
    option("--published", action="store_true", help="the settings of the paper's code")
    option("--updates", type=int, default=100, help="meta-updates (%(default)s)")
    option("--steps", type=int, default=200, help="training steps (%(default)s)")
    option("--seeds", type=int, default=5, help="meta-trainings of each kind (%(default)s)")
    option("--test-runs", type=int, default=5, help="new tasks that each is tested on (%(default)s)")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    digits = options.mnist_folder is None
    count, pool = options.samples or (100 if digits else 1000), 1497 if digits else 60_000
    sizes = [(count, 0), (2 * count, 0), (count, count)]
    if options.all_data:
        sizes += [(pool, 0), (pool - pool // 6, pool // 6)]
    found: list[tuple[Result, Curve]] = []
    kinds = [(noise, seed, *size) for noise in options.label_noise for seed in range(options.seeds) for size in sizes]
    for noise, seed, train, val in tqdm(kinds, desc="meta-trainings"):
        settings: dict[str, Any] = {
            "train_samples": train, "val_samples": val, "batch_size": 32, "label_noise": noise, "resample": True,
            "permute_labels": True, "seed": seed,
        }  # fmt: skip
        family = (
            ImageClassification.digits(**settings)
            if digits
            else ImageClassification.mnist(options.mnist_folder, **settings)
        )
        seeds = range(1000 * seed, 1000 * seed + options.test_runs)
        learned = meta_train(options, family, "val" if val else "train", seed)
        end, curve = test(learned.as_torch_optimizer, family, options.steps, seeds)
        method = "train-by-validation" if val else "train-by-train"
        found.append((Result(noise, method, train, val, seed, **end), curve))
        if (train, val) == (count, count):
            tuning = range(1000 * seed + 500, 1000 * seed + 500 + options.test_runs)
            end, curve = tuned_sgd(family, options.steps, tuning, seeds)
            found.append((replace(found[-1][0], method="sgd", **end), curve))
    write_csv(options.output / "results.csv", list(asdict(found[0][0])), [list(asdict(r).values()) for r, _ in found])
    header = ("label_noise", "method", "train_samples", "val_samples", "seed", "step", "train_loss", "test_accuracy")
    rows = [(*list(asdict(result).values())[:5], *point) for result, curve in found for point in curve]
    write_csv(options.output / "curves.csv", header, rows)
    draw_accuracies(options.output / "test_accuracy.png", found)
    draw_curves(options.output / "curves.png", found)
    for noise in options.label_noise:
        for label in dict.fromkeys(result.label for result, _ in found):
            same = [asdict(r) for r, _ in found if (r.label, r.label_noise) == (label, noise)]
            numbers = mean_of([{n: row[n] for n in ("train_accuracy", "test_accuracy", "test_loss")} for row in same])
            print(f"{noise:.0%} random labels, {label.replace(chr(10), ', '):40}", numbers)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
