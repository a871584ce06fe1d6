"""How the comparison trains: constants, cosines, rules without a rate, online rules, and fits with the Trainer."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from digits_tasks import GRIDS
from lightning.pytorch.callbacks import LearningRateFinder
from online_rates import Hypergradient, MetaOptimize
from opponents_tasks import Learner, Task, loaders, task, test_loss, training_order
from plain_loop import QUIET, batches, cosine, train

from lightning_l2l import LearnToLearn

STARTS = (1e-6, 1e-3, 1e-1, 10.0)
OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Run:
    """One training; ``start`` is its rate, or the peak of its cosine, or 0 for methods that have none."""

    method: str
    task: str
    optimizer: str
    start: float
    seed: int
    epochs: int
    options: str = ""


@dataclass(frozen=True)
class Outcome:
    """Cost in training steps, everything included, and in seconds of processor time; the last rate."""

    test_loss: float
    steps: float
    seconds: float
    last_rate: float


def learning_task(run: Run) -> Task:
    """The task, as long as the run says."""
    return replace(task(run.task), epochs=run.epochs)


def plain(run: Run, make: Callable[[Learner], Any] = Learner.configure_optimizers, *, falling: bool = False) -> Outcome:
    """Training in a plain loop, with the optimizer that ``make`` gives."""
    of = learning_task(run)
    torch.manual_seed(run.seed)
    module = Learner(of, run.optimizer, run.start)
    given = batches(of.train, training_order(of, run.seed), of.batch_size, of.epochs)
    begun = time.process_time()
    optimizer = make(module)
    if hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free: where gradients are taken is not what is reported
    ended_well = train(module.loss, optimizer, given, cosine(run.start, len(given)) if falling else None)
    seconds = time.process_time() - begun
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # the averaged weights
        with torch.no_grad():
            for batch in given[-50:]:  # ... and statistics of BatchNorm are taken anew, as its README asks for
                module.loss(batch)
    last = getattr(optimizer, "optimizer", optimizer).param_groups[0]
    return Outcome(
        test_loss(module, of) if ended_well else math.inf, of.steps, seconds, last["lr"] * last.get("d", 1.0)
    )


def fit(run: Run, *callbacks: pl.Callback) -> Outcome:
    """Training with the Trainer; steps are those of the fit alone."""
    of = learning_task(run)
    torch.manual_seed(run.seed)
    module = Learner(of, run.optimizer, run.start)
    given = loaders(of, run.seed)
    with tempfile.TemporaryDirectory() as folder:  # for the checkpoint of the LearningRateFinder
        # The same few validations for each task: with short epochs they would be most of the time.
        often = max(1, of.epochs // 10)
        trainer = pl.Trainer(
            max_epochs=of.epochs,
            callbacks=list(callbacks),
            check_val_every_n_epoch=often,
            default_root_dir=folder,
            **QUIET,
        )
        begun = time.process_time()
        trainer.fit(module, *given)
        seconds = time.process_time() - begun
    return Outcome(test_loss(module, of), of.steps, seconds, trainer.optimizers[0].param_groups[0]["lr"])


def learn_to_learn(run: Run, arguments: dict[str, Any]) -> Outcome:
    """Steps: the fit's, the search's, and of every meta-update one, and two or three for each unrolled one."""
    callback = LearnToLearn(**arguments)
    outcome = fit(run, callback)
    steps = outcome.steps + (callback.search_result.steps if callback.search_result else 0)
    for record in callback.history:
        estimator = record["diagnostics"].get("estimator", "displacement")
        steps += {"displacement": 0, "live": 2}.get(estimator, 3) * callback.settings.unrolled + 1
    return replace(outcome, steps=steps)


def rate_finder(run: Run) -> Outcome:
    """Lightning's range test, then a constant rate."""
    callback = LearningRateFinder()
    outcome = fit(run, callback)
    assert callback.optimal_lr is not None
    return replace(outcome, steps=outcome.steps + len(callback.optimal_lr.results["loss"]))


def _from_package(module: str, name: str, **arguments: Any) -> Callable[[Run], Outcome]:
    def run_it(run: Run) -> Outcome:
        kind = getattr(import_module(module), name)
        decay = {"weight_decay": 0.01} if run.optimizer == "adamw" else {}
        return plain(run, lambda learner: kind(learner.net.parameters(), **arguments, **decay))

    return run_it


@dataclass(frozen=True)
class Method:
    """What is run, from which starts, and by which package; ``trainer``: with the Trainer, and timed against it."""

    run: Callable[..., Outcome]
    starts: Callable[[str], Sequence[float]] = lambda optimizer: STARTS
    optimizers: Sequence[str] = OPTIMIZERS
    package: str = "torch"
    trainer: bool = False


def _none(optimizer: str) -> Sequence[float]:
    return (0.0,)


def _grid(optimizer: str) -> Sequence[float]:
    return GRIDS["sgd" if optimizer == "sgd" else "adam"]


def _d_adaptation(run: Run) -> Outcome:
    if run.optimizer == "sgd":
        return _from_package("dadaptation", "DAdaptSGD", momentum=0.9)(run)
    return _from_package("dadaptation", "DAdaptAdam", decouple=run.optimizer == "adamw")(run)


METHODS = {
    "constant": Method(plain, _grid),
    "cosine": Method(lambda run: plain(run, falling=True), _grid),
    "Trainer": Method(fit, lambda optimizer: (1e-3,), trainer=True),
    "LearningRateFinder": Method(rate_finder, trainer=True),
    "Prodigy": Method(_from_package("prodigyopt", "Prodigy"), _none, ("adam", "adamw"), "prodigyopt"),
    "D-Adaptation": Method(_d_adaptation, _none, package="dadaptation"),
    "schedule-free": Method(
        _from_package("schedulefree", "AdamWScheduleFree"), _none, ("adamw",), package="schedulefree"
    ),
    "hypergradient": Method(lambda run: plain(run, lambda learner: Hypergradient(learner.configure_optimizers()))),
    "MetaOptimize": Method(lambda run: plain(run, lambda learner: MetaOptimize(learner.configure_optimizers()))),
    "LearnToLearn": Method(learn_to_learn, trainer=True),
}


def installed(method: str) -> bool:
    """Whether the package of the method is there."""
    return find_spec(METHODS[method].package) is not None
