"""Meta-train the rule that comes with the package, or one of your own.

Whole trainings of random length, whose learning rate falls to zero, by evolution strategies: the meta-objective is the
logarithm of the validation loss at the end. An interrupted run goes on with --resume FOLDER/last.ckpt as if it had not
been interrupted.

    python examples/pretrained/train.py --output tensorwise.safetensors
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tasks import mixture

from lightning_l2l import EvolutionStrategies, MetaTraining, TensorwiseOptimizer
from lightning_l2l.tasks.length import Length


class Progress(pl.Callback):
    """A line every ten updates: the mean of the meta-losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item() if isinstance(outputs, dict) else float(outputs))
        if len(self.values) == 10:
            print(
                f"update {trainer.global_step}: {sum(self.values) / 10:.4f}, "
                f"{module.diverged} diverged, {module.unusable} unusable",
                flush=True,
            )
            self.values = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tensorwise.safetensors"))
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--steps", type=int, nargs=2, default=(100, 1000), help="of inner trainings, at least, at most")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--scales", type=float, default=1.0, help="of random parametrisations (%(default)s: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a checkpoint of an interrupted run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    learned = TensorwiseOptimizer()
    meta_training = MetaTraining(
        learned, mixture(options.scales), unroll_steps=Length(*options.steps, "log_uniform"),
        tasks_at_once=options.tasks, meta_batch="full", schedule="linear", meta_learning_rate=options.rate,
        estimator=EvolutionStrategies(objective="log", particles=8, standard_deviation=0.15, seed=options.seed),
        warm_down=True, seed=options.seed,
    )  # fmt: skip
    warnings.filterwarnings("ignore")
    folder = options.output.parent / (options.output.stem + "_checkpoints")
    pl.Trainer(
        max_steps=options.updates, max_epochs=-1, accelerator="cpu", devices=1, logger=False, gradient_clip_val=3e-3,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Progress(), ModelCheckpoint(folder, every_n_train_steps=10, save_last=True)],
    ).fit(meta_training, ckpt_path=options.resume)  # fmt: skip
    learned.horizon = None  # the user's schedule ends a training, not a number of steps
    learned.tasks = "small networks on 8 x 8 digits, text and random teachers"
    learned.save(options.output)


if __name__ == "__main__":
    main()
