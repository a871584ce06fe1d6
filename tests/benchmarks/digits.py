"""How good is ``LearnToLearn()`` with default settings? Digits, two networks, two optimizers, two starting rates each.

    python tests/benchmarks/digits.py [--seeds 5] [--quick] [--csv results.csv]

Opponents, from the same initial weights and with the same order of the batches, seed by seed: the best constant rate of
an 11-point half-decade grid (11 runs), and the best cosine schedule with its peak on the same grid (11 more). Both are
chosen by their mean *test* loss, which favours them: a user cannot do that. ``LearnToLearn`` sees the training and the
held-out images; the test images serve the report alone.

Printed: mean test loss over the seeds, ``ratio`` = that of LearnToLearn / that of the best constant rate (below 1, it
beats the grid), ``worst seed`` = the largest ratio of a seed's loss to the same seed's loss at the best constant rate
(seeds are noisy), ``cosine`` = that of LearnToLearn / that of the best cosine schedule, ``time`` = seconds of the fit /
seconds of a plain fit (both with the Trainer, one right after the other), ``search`` = steps of the initial search. To
reach: every ratio at most 1.1.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_l2l import LearnToLearn

sys.path.insert(0, str(Path(__file__).parent))
from digits_tasks import (
    BATCH_SIZE,
    EPOCHS,
    GRIDS,
    Classifier,
    Digits,
    digits,
    loaders,
    test_loss,
    training_order,
)
from plain_loop import QUIET, batches, train
from plain_loop import cosine as schedule

STARTS = {"sgd": (1e-3, 1e-1), "adam": (1e-4, 1e-2)}
MODELS = ("mlp", "convnet")
OPTIMIZERS = ("sgd", "adam")


def plain_loss(data: Digits, kind: str, optimizer: str, rate: float, seed: int, *, cosine: bool) -> float:
    """Test loss of plain training, without the Trainer: the same weights and batches, ten times faster."""
    torch.manual_seed(seed)
    module = Classifier(kind, optimizer, rate)
    given = batches(data.train, training_order(data, seed), BATCH_SIZE, EPOCHS)
    rates = schedule(rate, len(given)) if cosine else None
    if not train(module.loss, module.configure_optimizers(), given, rates):
        return math.inf
    return test_loss(module.net, data)


def grid_losses(
    data: Digits, kind: str, optimizer: str, grid: Sequence[float], seeds: int, *, cosine: bool
) -> tuple[float, list[float]]:
    """The rate of the grid with the least mean test loss, and its losses by seed."""
    found = {
        rate: [plain_loss(data, kind, optimizer, rate, seed, cosine=cosine) for seed in range(seeds)] for rate in grid
    }
    best = min(found, key=lambda rate: statistics.mean(found[rate]))
    return best, found[best]


def fit(
    data: Digits, kind: str, optimizer: str, rate: float, seed: int, *callbacks: pl.Callback
) -> tuple[float, float]:
    """Test loss and seconds of a fit with the Trainer."""
    torch.manual_seed(seed)
    module = Classifier(kind, optimizer, rate)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=list(callbacks), **QUIET)
    started = time.perf_counter()
    trainer.fit(module, *loaders(data, seed))
    return test_loss(module.net, data), time.perf_counter() - started


def check_that_opponents_are_the_same(data: Digits) -> None:
    """The plain loop is the Trainer's fit, to the last bit; otherwise the comparison is not seed by seed."""
    with_trainer, _ = fit(data, "mlp", "sgd", 0.1, 0)
    without = plain_loss(data, "mlp", "sgd", 0.1, 0, cosine=False)
    if not math.isclose(with_trainer, without, rel_tol=1e-6):
        raise AssertionError(f"plain loop {without}, Trainer {with_trainer}: the opponents train on other batches")


def rows_for(data: Digits, kind: str, optimizer: str, seeds: int, *, quick: bool) -> list[dict[str, float | str]]:
    """The rows of the table for one network and one optimizer."""
    grid = GRIDS[optimizer]
    grid = grid[4:9:2] if quick else grid
    constant_rate, constant = grid_losses(data, kind, optimizer, grid, seeds, cosine=False)
    cosine_rate, cosine = grid_losses(data, kind, optimizer, grid, seeds, cosine=True)
    if not quick and constant_rate in (grid[0], grid[-1]):
        print(f"note: the best constant rate of {kind}, {optimizer} is at the end of the grid")
    rows: list[dict[str, float | str]] = []
    for start in STARTS[optimizer]:
        losses, seconds, plain_seconds, steps = [], 0.0, 0.0, []
        for seed in range(seeds):
            plain_seconds += fit(data, kind, optimizer, start, seed)[1]
            callback = LearnToLearn()
            loss, taken = fit(data, kind, optimizer, start, seed, callback)
            losses.append(loss)
            seconds += taken
            steps.append(callback.search_result.steps if callback.search_result else 0)
        mean = statistics.mean(losses)
        rows.append(
            {
                "task": kind,
                "optimizer": optimizer,
                "start": start,
                "test loss": mean,
                "best constant": statistics.mean(constant),
                "its rate": constant_rate,
                "ratio": mean / statistics.mean(constant),
                "worst seed": max(ours / theirs for ours, theirs in zip(losses, constant, strict=True)),
                "best cosine": statistics.mean(cosine),
                "its peak": cosine_rate,
                "cosine": mean / statistics.mean(cosine),
                "time": seconds / plain_seconds,
                "search": statistics.mean(steps),
            }
        )
        print("  ".join(_cell(name, value) for name, value in rows[-1].items()), flush=True)
    return rows


def _cell(name: str, value: float | str) -> str:
    text = value if isinstance(value, str) else f"{value:.3g}"
    return text.rjust(max(len(name), 7))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--quick", action="store_true", help="two seeds and three grid points, to see that it works")
    parser.add_argument("--csv", type=Path, help="write the table there as well")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = digits()
    check_that_opponents_are_the_same(data)
    names = ["task", "optimizer", "start", "test loss", "best constant", "its rate", "ratio", "worst seed"]
    names += ["best cosine", "its peak", "cosine", "time", "search"]
    print("  ".join(name.rjust(max(len(name), 7)) for name in names))
    seeds = 2 if arguments.quick else arguments.seeds
    rows = [
        row
        for kind in arguments.models
        for optimizer in arguments.optimizers
        for row in rows_for(data, kind, optimizer, seeds, quick=arguments.quick)
    ]
    worst = max(float(row["ratio"]) for row in rows)
    print(
        f"worst ratio {worst:.3f} (to be at most 1.1), median {statistics.median(float(r['ratio']) for r in rows):.3f}"
    )
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
