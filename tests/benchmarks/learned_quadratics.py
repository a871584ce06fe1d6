"""Learned optimizers on random quadratics (10 dimensions, 100 steps) against tuned momentum and tuned Adam.

    python tests/benchmarks/learned_quadratics.py --optimizer lstm --updates 300 --seeds 0 1 2 3 4

Prints, for each meta-seed, log10 of the mean error after 100 steps over 128 problems, of the median error, and the
processor time of the meta-training. ``--optimizer sgd`` learns a rate and a momentum, from 0.03 and 0.9. The baselines'
rates are tuned on a half-decade grid, on other problems (``--baselines``). ``--curriculum``: every unroll is a training
from its start, of ``--unroll-steps`` steps at first and of 100 after 60 % of the meta-training. With
``--perturbation 1`` (or 2, ...) every initial meta-parameter is multiplied by 1 + 1e-7 or 1 - 1e-7, about the rounding
of float32: whether a result is more than luck.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable

import lightning as L
import torch

from lightning_l2l import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LSTMOptimizer,
    MetaTraining,
    MLPOptimizer,
    SmallFCOptimizer,
    Unroll,
)
from lightning_l2l.commands.evaluate import Make, Runs, train
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import RandomQuadratics
from lightning_l2l.tasks.length import Length

# A run records the loss before each step, so the last of 101 is the one after 100 steps.
RECORDED = 101
PROBLEMS, TUNING = range(50_000, 50_128), range(60_000, 60_128)
RATES = [10 ** (exponent / 2) for exponent in range(-6, 2)]
BASELINES: dict[str, Callable[[float], Make]] = {
    "adam": lambda rate: lambda parameters: torch.optim.Adam(parameters, rate),
    "sgd_momentum": lambda rate: lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9),
}


def make(options: argparse.Namespace, seed: int) -> LearnedOptimizer:
    torch.manual_seed(seed)
    multiplier, exponent = options.step_multiplier, options.exponent_multiplier
    if options.optimizer == "sgd":
        learned = LearnedHyperparameters(learn=("learning_rate", "momentum"))
        return learned.attach(inner_optimizer(torch.optim.SGD, lr=0.03, momentum=0.9))
    if options.optimizer == "lstm":
        return LSTMOptimizer(
            preprocessing=options.preprocessing, step_multiplier=multiplier, initial_output="zero",
            normalise_output=options.normalise_output,
        )  # fmt: skip
    if options.optimizer == "mlp":
        return MLPOptimizer(32, multiplier, exponent, "scaled", options.normalise_output)
    return SmallFCOptimizer(8, multiplier, exponent, normalise_output=options.normalise_output)


@torch.no_grad()
def perturb(learned: LearnedOptimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in learned.parameters():
        parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator).sign())


def meta_train(learned: LearnedOptimizer, options: argparse.Namespace, seed: int) -> float:
    """Seconds of processor time."""
    whole = options.curriculum or options.unroll_steps >= 100
    length: int | Length = options.unroll_steps
    if options.curriculum:
        length = Length(options.unroll_steps, 100, "curriculum", updates=max(1, options.updates * 6 // 10))
    meta_training = MetaTraining(
        learned, RandomQuadratics(), unroll_steps=length, episode_steps=None if whole else 100,
        tasks_at_once=options.tasks_at_once, populations=1 if whole else 5,
        estimator=Unroll(objective=options.objective), meta_data="train",
        meta_learning_rate=options.meta_learning_rate, warm_down=True, divergence=options.divergence, seed=seed,
    )  # fmt: skip
    begun = time.process_time()
    L.Trainer(
        max_steps=options.updates, max_epochs=-1, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    ).fit(meta_training)  # fmt: skip
    return time.process_time() - begun


def show(name: str, found: Runs, more: str = "") -> None:
    last = found.train[:, -1]
    print(f"{name:14} mean {last.mean().log10():.2f}, median {last.median().log10():.2f}{more}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="lstm", choices=["mlp", "small_fc", "lstm", "sgd"])
    parser.add_argument("--step-multiplier", type=float, default=0.1)
    parser.add_argument("--exponent-multiplier", type=float, default=1e-3)
    parser.add_argument("--preprocessing", default="raw", choices=["log_and_sign", "raw"])
    parser.add_argument("--normalise-output", action="store_true")
    parser.add_argument("--objective", default="naive_mean", choices=["naive", "log", "naive_mean", "log_mean"])
    parser.add_argument("--unroll-steps", type=int, default=20, help="100: the whole training (%(default)s)")
    parser.add_argument("--curriculum", action="store_true", help="whole trainings that grow from --unroll-steps")
    parser.add_argument("--tasks-at-once", type=int, default=64)
    parser.add_argument("--divergence", type=float, default=10.0, help="as of MetaTraining (%(default)s)")
    parser.add_argument("--meta-learning-rate", type=float, default=0.01)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--perturbation", type=int, help="seed of the signs; without it, none")
    parser.add_argument("--baselines", action="store_true", help="the tuned baselines only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    family = RandomQuadratics()
    if options.baselines:
        for kind, baseline in BASELINES.items():
            ends = [train(kind, baseline(rate), family, RECORDED, TUNING).train[:, -1].mean().item() for rate in RATES]
            best = RATES[ends.index(min(ends))]
            show(kind, train(kind, baseline(best), family, RECORDED, PROBLEMS), f", rate {best:.3f}")
        return
    for seed in options.seeds:
        learned = make(options, seed)
        if options.perturbation is not None:
            perturb(learned, options.perturbation)
        spent = meta_train(learned, options, seed)
        found = train(options.optimizer, learned.as_torch_optimizer, family, RECORDED, PROBLEMS)
        show(f"{options.optimizer}, {seed}", found, f", {spent:.0f} s of meta-training, {found.diverged} diverged")


if __name__ == "__main__":
    main()
