"""Meta-train a learned optimizer and compare it with tuned baselines."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl

from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.windows import Name
from lightning_l2l.experiments._choices import OptimizerName, TaskName, make_family, make_optimizer
from lightning_l2l.experiments.evaluate import Row, compare, draw, write
from lightning_l2l.meta_training import MetaTraining
from lightning_l2l.plotting import require_matplotlib


def run(
    output: str = "meta_train",
    optimizer: OptimizerName = "small_fc",
    task: TaskName = "digits",
    mnist_folder: str | None = None,
    train_samples: int | None = None,
    label_noise: float = 0.0,
    updates: int = 300,
    unroll_steps: int = 20,
    episode_steps: int | None = 200,
    tasks_at_once: int = 4,
    populations: int = 5,
    objective: Objective = "naive_mean",
    meta_data: Literal["train", "val"] = "train",
    estimator: Name = "auto",
    second_order: bool = True,
    meta_learning_rate: float = 3e-3,
    clip: float = 1.0,
    normalise_output: bool = True,
    step_multiplier: float | None = None,
    seed: int = 0,
    compare_steps: int | None = None,
    compare_seeds: int = 8,
    plots: bool = True,
) -> list[Row]:
    """Meta-train a learned optimizer over tasks, save it, and compare it with tuned Adam and tuned SGD.

    Writes learned.safetensors (for the command evaluate, and for LearnedOptimizer.load), and what evaluate writes.

    Args:
        output: Folder for the results.
        optimizer: What to train: a network, or the hyperparameters of adam or sgd from a rate that is far too small.
        task: What it is trained on.
        mnist_folder: Where MNIST's four IDX files are.
        train_samples: Training examples of each task, drawn anew for each; all of them if not given.
        label_noise: Fraction of random training labels.
        updates: Meta-updates.
        unroll_steps: Training steps that a meta-gradient looks at.
        episode_steps: Training steps of a whole training, cut into unrolls; not given: unroll_steps.
        tasks_at_once: Tasks side by side.
        populations: Groups of tasks at different stages of their training.
        objective: The meta-objective.
        meta_data: Training data (train-by-train) or held-out data (train-by-validation).
        estimator: How the meta-gradient is computed.
        second_order: Whether the derivative of the inner gradients is included.
        meta_learning_rate: Of the meta-optimizer, Adam.
        clip: Largest norm of a meta-gradient.
        normalise_output: Networks make steps of constant root mean square (trains in minutes).
        step_multiplier: Multiplies the network's steps; 0.01 if not given.
        seed: Of initial weights, tasks and batches.
        compare_steps: Training steps of the comparison; as many as it was trained on, if not given.
        compare_seeds: Runs of each optimizer in the comparison; 0 for no comparison.
        plots: Whether to draw the figure.

    Returns:
        One row for each optimizer of the comparison.

    Raises:
        ValueError: Settings that make no sense.
        ImportError: Figures without matplotlib, or digits without scikit-learn.
    """
    if plots and compare_seeds:
        require_matplotlib()
    learned = make_optimizer(optimizer, normalise_output, step_multiplier, seed)
    family = make_family(task, mnist_folder, train_samples, label_noise)
    meta_training = MetaTraining(
        learned, family, unroll_steps=unroll_steps, episode_steps=episode_steps, tasks_at_once=tasks_at_once,
        populations=populations if episode_steps else 1, objective=objective, meta_data=meta_data, estimator=estimator,
        second_order=second_order, meta_learning_rate=meta_learning_rate, warm_down=True, seed=seed,
    )  # fmt: skip
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    spent = fit(meta_training, updates, clip, folder)
    learned.tasks = task
    learned.save(folder / "learned.safetensors")
    print(f"meta-trained in {spent:.0f} s of processor time, {meta_training.diverged} inner run(s) diverged")
    if not compare_seeds:
        return []
    steps = compare_steps or episode_steps or unroll_steps
    found = compare({"learned": learned}, family, steps, range(compare_seeds))
    rows = write(found, folder)
    if plots:
        draw(found, folder / "comparison.png", f"{optimizer} on {task}")
    return rows


def fit(meta_training: MetaTraining, updates: int, clip: float, folder: Path) -> float:
    """Run the Trainer quietly; processor time in seconds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        pl.Trainer(
            max_steps=updates, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=clip, default_root_dir=folder,
        ).fit(meta_training)  # fmt: skip
    return time.process_time() - begun
