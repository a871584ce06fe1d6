"""Experiment 3 of arXiv 2006.16495: a neural optimizer trained on training or on held-out loss, with noisy labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning_l2l.experiments._choices import OptimizerName, make_optimizer
from lightning_l2l.experiments._mlp_optimizer_figures import Result, draw_accuracies, draw_curves, write
from lightning_l2l.experiments._runs import Runs, runs, tuned
from lightning_l2l.experiments.meta_train import fit
from lightning_l2l.learned import MLPOptimizer
from lightning_l2l.meta_training import MetaTraining
from lightning_l2l.plotting import require_matplotlib
from lightning_l2l.tasks import ImageClassification
from lightning_l2l.tasks.length import Length

Settings = Literal["quick", "published"]


def run(
    output: str = "mlp_optimizer",
    mnist_folder: str | None = None,
    samples: int | None = None,
    label_noise: list[float] | None = None,
    all_data: bool = False,
    settings: Settings = "quick",
    optimizer: OptimizerName = "mlp",
    normalise_output: bool = False,
    updates: int = 100,
    steps: int = 200,
    seeds: int = 5,
    test_runs: int = 5,
    plots: bool = True,
) -> list[Result]:
    """Meta-train a neural optimizer by training loss and by validation loss, and see which of them overfits.

    With n training examples per task: train-by-train on n, train-by-train on 2 n, train-by-validation on n + n, and SGD
    with the step size tuned on the validation loss of n + n. Each is tested on new tasks with new starts.

    Args:
        output: Folder for results.csv, curves.csv, test_accuracy.png and curves.png.
        mnist_folder: Folder with MNIST's four IDX files; scikit-learn's digits if not given.
        samples: n; 100 for digits and 1000 for MNIST if not given.
        label_noise: Fractions of random labels; 0 and 0.2 if not given.
        all_data: Also with all training examples, five sixths and one sixth for train-by-validation.
        settings: "quick": second order, Adam, sampled windows of 20 steps, minutes. "published": the optimizer, first
            order, RMSProp, mean over w_0 ... w_(T-1) and random unroll lengths of the paper's code (give it updates of
            the order of 10000).
        optimizer: The network, for quick settings.
        normalise_output: Whether its steps have a constant root mean square.
        updates: Meta-updates.
        steps: Training steps in meta-training and in the test.
        seeds: Meta-trainings of each kind.
        test_runs: New tasks that each of them is tested on.
        plots: Whether to draw the figures.

    Returns:
        One result for each method, noise and seed.

    Raises:
        ValueError: Settings that make no sense.
        ImportError: Figures without matplotlib, or digits without scikit-learn.
    """
    if plots:
        require_matplotlib()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    count = samples or (100 if mnist_folder is None else 1000)
    pool = 1497 if mnist_folder is None else 60000
    sizes = [("train-by-train", count, 0), ("train-by-train", 2 * count, 0), ("train-by-validation", count, count)]
    if all_data:
        sizes += [("train-by-train", pool, 0), ("train-by-validation", pool - pool // 6, pool // 6)]
    # Forty evaluations resolve the start, where the methods differ most.
    every = max(1, steps // 40)
    found: list[Result] = []
    for noise in [0.0, 0.2] if label_noise is None else label_noise:
        for seed in range(seeds):
            test_seeds = range(1000 * seed, 1000 * seed + test_runs)
            for method, train, val in sizes:
                family = _family(mnist_folder, train, val, noise, seed)
                learned = (
                    MLPOptimizer()
                    if settings == "published"
                    else make_optimizer(optimizer, normalise_output, None, seed)
                )
                data: Literal["train", "val"] = "val" if val else "train"
                fit(_meta_training(settings, learned, family, data, steps, seed), updates, 1.0, folder)
                tested = runs(method, learned, family, steps, test_seeds, every=every)
                found.append(_result(noise, train, val, seed, tested))
            family = _family(mnist_folder, count, count, noise, seed)
            tuning = range(1000 * seed + 500, 1000 * seed + 500 + test_runs)
            sgd = _tuned_by_validation(family, steps, tuning, test_seeds, every)
            found.append(_result(noise, count, count, seed, sgd))
            write(found, folder)
    if plots:
        draw_accuracies(found, folder / "test_accuracy.png")
        draw_curves(found, folder / "curves.png")
    return found


def _family(folder: str | None, train: int, val: int, noise: float, seed: int) -> ImageClassification:
    options: dict[str, Any] = {
        "train_samples": train, "val_samples": val, "batch_size": 32, "label_noise": noise, "resample": True,
        "permute_labels": True, "seed": seed,
    }  # fmt: skip
    return ImageClassification.digits(**options) if folder is None else ImageClassification.mnist(folder, **options)


def _meta_training(
    settings: Settings, learned: Any, family: ImageClassification, data: Literal["train", "val"], steps: int, seed: int
) -> MetaTraining:
    if settings == "quick":
        return MetaTraining(
            learned, family, unroll_steps=20, episode_steps=steps, tasks_at_once=4, populations=4,
            objective="naive_mean",
            meta_data=data, meta_batch="full", estimator="truncated", meta_learning_rate=3e-3, warm_down=True,
            seed=seed,
        )  # fmt: skip
    # The published number of unrolls per trajectory, 10 + Exp(30) of 50 + Exp(100) steps each, as a number of steps.
    return MetaTraining(
        learned, family, unroll_steps=Length(50, 100, "exponential"), episode_steps=Length(1500, 4500, "exponential"),
        tasks_at_once=1, objective="naive_mean", meta_data=data, meta_batch="full", estimator="segmented",
        second_order=False, iterates="before", meta_optimizer="rmsprop_tf1", meta_learning_rate=0.01, seed=seed,
    )  # fmt: skip


def _tuned_by_validation(family: ImageClassification, steps: int, tuning: range, seeds: range, every: int) -> Runs:
    return tuned(
        "sgd", family, steps, tuning, seeds, lambda found: found.val.mean().item(), exponents=(-6, 1), every=every
    )


def _result(noise: float, train: int, val: int, seed: int, found: Runs) -> Result:
    trained, tested, loss = (value.mean().item() for value in (found.train_accuracy, found.test_accuracy, found.test))
    return Result(noise, found.name, train, val, seed, trained, tested, loss, found.diverged, found.curve)
