"""What makes meta-training on digits reliable: the recipe of ``meta-train`` with one thing changed at a time.

    python tests/benchmarks/learned_digits.py [--variants NAMES] [--seeds 3] [--results learned_digits.csv]

A 64-32-10 network on scikit-learn's digits, batches of 64, 200 steps, as ``python -m lightning_l2l meta-train`` has it.
Each variant is meta-trained from meta-seeds 0, 1, ...; every result trains the same eight tasks. Finished runs are rows
of the results and are not run again. The last lines are a table: mean over the meta-seeds, and their spread.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_l2l import EvolutionStrategies, MetaTraining, SmallFCOptimizer, Unroll
from lightning_l2l.commands.evaluate import train
from lightning_l2l.commands.meta_train import make_optimizer
from lightning_l2l.tasks import ImageClassification
from lightning_l2l.tasks.length import Length

STEPS, TESTS = 200, range(8)
COLUMNS = ("variant", "seed", "mean_loss", "last_tenth", "test_loss", "test_accuracy", "diverged", "seconds")


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe.

    Attributes:
        optimizer: The learned optimizer, and options of :func:`make_optimizer`.
        settings: Of ``MetaTraining``.
        clip: The largest norm of a meta-gradient; 0: any.
        start: Of SmallFC's last layer.
    """

    optimizer: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    clip: float = 1.0
    start: str | None = None


def strategies(method: Any) -> dict[str, Any]:
    return {"estimator": EvolutionStrategies(method=method, objective="naive_mean", standard_deviation=0.01)}


VARIANTS = {
    "the recipe": Variant(),
    "without second derivatives": Variant(
        settings={"estimator": Unroll(objective="naive_mean", second_order=False)}
    ),
    "a smaller meta-rate, 0.003": Variant(settings={"meta_learning_rate": 0.003}),
    "PES, 8 particles": Variant(settings=strategies("pes")),
    "ES-Single, 8 particles": Variant(settings=strategies("es_single")),
    "no clipping": Variant(clip=0.0),
    "clipped to 0.1": Variant(clip=0.1),
    "unrolls of random length, 10 to 40": Variant(settings={"unroll_steps": Length(10, 40, "uniform")}),
    "trainings of random length, 50 to 400": Variant(settings={"episode_steps": Length(50, 400, "log_uniform")}),
    "all tasks at one age": Variant(settings={"populations": 1}),
    "steps of one size, random at first": Variant({"normalise_output": True, "multiplier": 0.01}),
    "steps of any size, random at first": Variant(start="scaled"),
    "MLP with the same settings": Variant({"name": "mlp"}),
}  # fmt: skip


def run(variant: Variant, seed: int) -> dict[str, float]:
    """Meta-train and test."""
    torch.manual_seed(seed)
    learned = make_optimizer(**({"name": "small_fc"} | variant.optimizer), seed=seed)
    if variant.start:
        learned = SmallFCOptimizer(8, step_multiplier=0.03, initialisation=variant.start)  # type: ignore[arg-type]
    family = ImageClassification.digits(train_samples=1200, val_samples=297, resample=False)
    recipe: dict[str, Any] = {
        "unroll_steps": 20, "episode_steps": STEPS, "tasks_at_once": 4, "populations": 5, "meta_data": "train",
        "estimator": Unroll(objective="naive_mean"), "meta_learning_rate": 0.01,
    }  # fmt: skip
    meta_training = MetaTraining(
        learned, family, **(recipe | variant.settings), warm_down=True, seed=seed, updates_per_epoch=100
    )
    begun = time.process_time()
    pl.Trainer(
        max_steps=100, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=variant.clip or None,
    ).fit(meta_training)  # fmt: skip
    seconds = time.process_time() - begun
    found = train("learned", learned.as_torch_optimizer, family, STEPS, TESTS)
    row = found.row(found)
    return {
        "mean_loss": row["mean_train_loss"], "last_tenth": row["last_train_loss"], "test_loss": row["test_loss"],
        "test_accuracy": row["test_accuracy"], "diverged": found.diverged, "seconds": seconds,
    }  # fmt: skip


def report(rows: list[dict[str, str]], variants: list[str]) -> None:
    """The table for the docs."""
    print("| what | meta-seeds | mean training loss | last tenth | test loss |\n| --- | ---: | ---: | ---: | ---: |")
    for name in variants:
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            columns = [torch.tensor([float(row[column]) for row in mine]) for column in COLUMNS[2:5]]
            low, high = columns[0].min(), columns[0].max()
            means = [f"{column.mean():.3f}" for column in columns]
            print(f"| {name} | {len(mine)} | {means[0]} ({low:.3f} to {high:.3f}) | {means[1]} | {means[2]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("learned_digits.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: list[dict[str, str]] = []
    if options.results.exists():
        with options.results.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    done = {(row["variant"], int(row["seed"])) for row in rows}
    for seed in range(options.seeds):
        for name in options.variants:
            if (name, seed) in done:
                continue
            found = {key: f"{value:.5g}" for key, value in run(VARIANTS[name], seed).items()}
            rows.append({"variant": name, "seed": str(seed)} | found)
            with options.results.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, COLUMNS)
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(rows[-1])
            print(f"{name}, {seed}: {found['mean_loss']} in {float(found['seconds']):.0f} s", flush=True)
    report(rows, options.variants)


if __name__ == "__main__":
    main()
