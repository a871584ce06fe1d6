"""Meta-train a learned optimizer over tasks, save it, and compare it with tuned Adam and tuned SGD.

Writes learned.safetensors (for the command evaluate, and for LearnedOptimizer.load), meta_loss.png, what evaluate
writes, and every fifty updates meta_training.ckpt: --resume goes on from there as if nothing had happened.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_l2l import (
    EvolutionStrategies,
    LearnedHyperparameters,
    LearnedOptimizer,
    LSTMOptimizer,
    MetaTraining,
    MLPOptimizer,
    SmallFCOptimizer,
    Unroll,
)
from lightning_l2l.commands.evaluate import add_task_arguments, compare, make_family
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned.coordinatewise import Initialisation
from lightning_l2l.plotting import STYLES, new_figure, require_matplotlib

_CHECKPOINT = "meta_training"


class MetaLosses(pl.Callback):
    """The meta-losses of all updates so far, those before an interruption too."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """One more."""
        self.values.append(outputs["loss"].item())
        module.log("meta_loss", self.values[-1], prog_bar=True, logger=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.values = list(state_dict["values"])

    def draw(self, path: Path) -> None:
        """All of them over the updates, and their running median."""
        figure, axes = new_figure(width=5.5)
        width = max(1, min(51, len(self.values) // 4))
        medians = torch.tensor(self.values).unfold(0, width, 1).median(-1).values
        axes[0, 0].plot(range(1, len(self.values) + 1), self.values, ".", color="0.7", markersize=3)
        axes[0, 0].plot([width // 2 + 1 + i for i in range(len(medians))], medians, **STYLES[0])
        axes[0, 0].set(xlabel="meta-update", ylabel=f"meta-loss, median of {width}")
        figure.savefig(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    option = parser.add_argument
    option("--output", default="meta_train", help="folder for the results (%(default)s)")
    option(
        "--optimizer", default="small_fc", choices=["small_fc", "mlp", "lstm", "adam", "sgd"],
        help="a network, or the hyperparameters of adam or sgd from a rate that is far too small (%(default)s)",
    )  # fmt: skip
    option("--updates", type=int, default=100, help="meta-updates (%(default)s)")
    option("--unroll-steps", type=int, default=20, help="training steps that a meta-gradient covers (%(default)s)")
    option("--episode-steps", type=int, default=200, help="steps of a whole training; 0: one unroll (%(default)s)")
    option("--tasks-at-once", type=int, default=4, help="tasks side by side (%(default)s)")
    option("--populations", type=int, default=5, help="groups of tasks at different steps (%(default)s)")
    option(
        "--objective", default="naive_mean", choices=["log", "naive", "log_mean", "naive_mean"], help="(%(default)s)"
    )
    option("--meta-data", default="train", choices=["train", "val"], help="what the meta-objective is evaluated on")
    option(
        "--estimator", default="unroll", choices=["unroll", "pes", "es_single"],
        help="exact, truncated at the end of an unroll; or by evolution strategies (%(default)s)",
    )  # fmt: skip
    option("--first-order", action="store_true", help="leave out the derivative of the inner gradients")
    option("--meta-learning-rate", type=float, default=0.01, help="of the meta-optimizer, Adam (%(default)s)")
    option("--clip", type=float, default=1.0, help="largest norm of a meta-gradient (%(default)s)")
    option(
        "--normalise-output", action="store_true",
        help="networks: steps of one size, at random at first; without it they are zero at first, of any size later",
    )  # fmt: skip
    option("--step-multiplier", type=float, default=0.03, help="networks: multiplies the steps (%(default)s)")
    option("--resume", action="store_true", help="go on from the checkpoint in the folder, with the same options")
    option("--seed", type=int, default=0, help="of initial weights, tasks and batches (%(default)s)")
    option("--compare-steps", type=int, help="steps of the comparison; default: as many as it was trained on")
    option("--compare-seeds", type=int, default=8, help="runs of each optimizer; 0: no comparison (%(default)s)")
    add_task_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Meta-train, save, compare.

    Raises:
        ValueError: Settings that make no sense, or nothing to resume.
        ImportError: Figures without matplotlib, or digits without scikit-learn.
    """
    if options.figure:
        require_matplotlib()
    folder = Path(options.output)
    checkpoint = folder / f"{_CHECKPOINT}.ckpt"
    if options.resume and not checkpoint.exists():
        raise ValueError(f"There is no {checkpoint} to resume from; leave --resume out to begin.")
    learned = make_optimizer(
        options.optimizer, options.seed, normalise_output=options.normalise_output, multiplier=options.step_multiplier
    )
    family, episode = make_family(options), options.episode_steps or None
    estimator: Unroll | EvolutionStrategies = Unroll(objective=options.objective, second_order=not options.first_order)
    if options.estimator != "unroll":
        estimator = EvolutionStrategies(method=options.estimator, objective=options.objective)
    meta_training = MetaTraining(
        learned, family, unroll_steps=options.unroll_steps, episode_steps=episode,
        tasks_at_once=options.tasks_at_once, populations=options.populations if episode else 1,
        estimator=estimator, meta_data=options.meta_data, meta_learning_rate=options.meta_learning_rate,
        warm_down=True, seed=options.seed, updates_per_epoch=options.updates,
    )  # fmt: skip
    losses = MetaLosses()
    saving = ModelCheckpoint(folder, _CHECKPOINT, every_n_train_steps=50, enable_version_counter=False)
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    began = time.process_time()
    with warnings.catch_warnings():
        for message in ("does not have many workers", "exists and is not empty", "ended before the epoch ended"):
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        pl.Trainer(
            max_steps=options.updates, max_epochs=-1, accelerator="cpu", devices=1, logger=False,
            callbacks=[losses, saving], enable_progress_bar=sys.stdout.isatty(), enable_model_summary=False,
            gradient_clip_val=options.clip, default_root_dir=folder,
        ).fit(meta_training, ckpt_path=checkpoint if options.resume else None)  # fmt: skip
    print(
        f"meta-trained in {time.process_time() - began:.0f} s of processor time, "
        f"{meta_training.diverged} inner run(s) diverged"
    )
    learned.tasks = options.task
    learned.save(folder / "learned.safetensors")
    if options.figure:
        losses.draw(folder / "meta_loss.png")
    if options.compare_seeds:
        steps = options.compare_steps or episode or options.unroll_steps
        compare({"learned": learned}, family, steps, options.compare_seeds, folder, figure=options.figure)
    return 0


def make_optimizer(
    name: str, seed: int, *, normalise_output: bool = False, multiplier: float = 0.03
) -> LearnedOptimizer:
    """A learned optimizer that has learned nothing yet; the global random numbers stay as they are.

    Args:
        name: ``"small_fc"``, ``"mlp"``, ``"lstm"``, or ``"adam"`` and ``"sgd"``, which learn hyperparameters, starting
            from a rate that is far too small.
        seed: For the initial weights.
        normalise_output: For the networks: every step has the same root mean square, also the first ones, which are
            random. Without it a network's steps are zero until it has learned some.
        multiplier: For the networks: multiplies the steps.
    """
    if name == "adam":
        return LearnedHyperparameters(("learning_rate", "betas")).attach(inner_optimizer(torch.optim.Adam, lr=1e-4))
    if name == "sgd":
        sgd = inner_optimizer(torch.optim.SGD, lr=1e-3, momentum=0.5)
        return LearnedHyperparameters(("learning_rate", "momentum")).attach(sgd)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        common: dict[str, Any] = {"step_multiplier": multiplier, "normalise_output": normalise_output}
        if name == "lstm":
            return LSTMOptimizer(**common, initial_output="random" if normalise_output else "zero")
        start: Initialisation = "scaled" if normalise_output else "zero_output"
        if name == "mlp":
            return MLPOptimizer(32, **common, initialisation=start)
        return SmallFCOptimizer(8, **common, initialisation=start)
