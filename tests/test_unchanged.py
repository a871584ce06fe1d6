"""Watching changes nothing: a run with the callback is, bit for bit, the run without it."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Attention,
    MemoryLogger,
    Plain,
    Recurrent,
    Rich,
    TiedAndFrozen,
    Twice,
    Witness,
    difference,
    loader,
    loaders,
    observer,
    outcome,
    sgd,
)
from lightning.pytorch.callbacks import LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_l2l import LearnToLearn

ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
MOMENTUM = sgd(0.1, momentum=0.9)


def run(trainer: Any, module: Any, *callbacks: Any, data: Any = None, **options: Any) -> dict[str, Any]:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    witness = Witness()
    fitted = trainer(witness, *callbacks, **{"logger": MemoryLogger(), **options})
    fitted.fit(module, **(loaders() if data is None else data()))
    flags = {k: v for k, v in vars(fitted).items() if isinstance(v, (bool, int, float, str)) and k[0] != "_"}
    seen = {"batches": witness.batches, "changes": witness.changes, "gradients": witness.gradients}
    return {**outcome(fitted, module), **seen, "rates": witness.rates, "flags": flags}


def assert_unchanged(trainer: Any, make: Any, watching: dict[str, Any] | None = None, **options: Any) -> LearnToLearn:
    """Returns the watcher."""
    expected = run(trainer, make(), **options)
    assert expected["rows"] and expected["metrics"] and expected["batches"]
    callback = observer(**(watching or {}))
    assert difference(expected, run(trainer, make(), callback, **options)) == ""
    assert callback.history  # it did look
    return callback


@pytest.mark.feature("batch norm, dropout, attention, recurrent layers, tied layers, torchmetrics")
@pytest.mark.parametrize("make", [Rich, Attention, Recurrent, TiedAndFrozen, Twice])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
def test_every_kind_of_module(trainer: Any, make: Any, optimizer: Any) -> None:
    callback = assert_unchanged(trainer, lambda: make(optimizer), {"meta_data": "val"})
    assert all(np.isfinite(record["held_out_loss"]) for record in callback.history)


def test_the_promise_of_the_documentation_with_nothing_else_set(trainer: Any) -> None:
    found = []
    for callbacks in ([], [LearnToLearn(meta_learning_rate=0, initial_search=False)]):
        found.append(run(trainer, Rich(ADAM), *callbacks, max_epochs=4))
    assert difference(*found) == "" and callbacks[0].history


class OneEpochAtATime(Rich):
    """A rate by epoch, one that follows a metric, and the warm-up of one's own."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.global_step < 5:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (self.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


COSINE = lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 20), "interval": "step"}  # noqa: E731
PLATEAU = lambda o: {"scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0), "monitor": "train_loss"}  # noqa: E731
ONE_CYCLE = lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=12), "interval": "step"}  # noqa: E731

CASES: dict[str, Any] = {
    "training gradients": {"watching": {"meta_data": "train"}},
    "a loader of one's own": {"watching": {"meta_data": loader(16, 7)}},
    "a held-out loss of one's own": {"watching": {"held_out_loss": lambda module, batch: module.loss(batch)}},
    "an update after every step": {"watching": {"every_n_steps": 1}},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "float16 with a scaler": {
        "plugins": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    },
    "cosine": {"make": lambda: Rich(MOMENTUM, COSINE)},
    "plateau": {"make": lambda: Rich(ADAM, PLATEAU), "max_epochs": 4},
    "one cycle of rate and momentum": {"make": lambda: Rich(MOMENTUM, ONE_CYCLE)},
    "a warm-up by hand": {"make": lambda: OneEpochAtATime(MOMENTUM, lambda o: lr_scheduler.ExponentialLR(o, 0.5))},
    "an average of the weights": {"others": lambda: [StochasticWeightAveraging(0.01, 1)], "max_epochs": 3},
    "a monitor": {"others": lambda: [LearningRateMonitor()]},
    "several validation loaders": {
        "data": lambda: {**loaders(), "val_dataloaders": [loader(24, 1), loader(16, 2)]},
    },
    "workers": {"data": lambda: loaders(num_workers=1)},
    "persistent workers": {"data": lambda: loaders(num_workers=1, persistent_workers=True)},
    "overfitted batches": {"overfit_batches": 2, "max_epochs": 4},
    "validation every few batches": {"val_check_interval": 2},
    "validation before the first step": {"num_sanity_val_steps": 2},
}


@pytest.mark.feature("clipping, accumulation, precision plugins, schedulers, workers, several validation loaders")
@pytest.mark.filterwarnings("ignore:.*overfit.*", "ignore:Swapping scheduler", "ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run(trainer: Any, case: str) -> None:
    options = dict(CASES[case])
    make, watching = options.pop("make", lambda: Rich(MOMENTUM)), options.pop("watching", {})
    others = options.pop("others", list)
    found = []
    for ours in ([], [observer(**watching)]):
        given = {key: value() if key == "plugins" else value for key, value in options.items()}
        found.append(run(trainer, make(), *ours, *others(), **given))
    assert difference(*found) == "" and ours[0].history


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        for _ in range(24):
            inputs = torch.randn(6)
            yield inputs, inputs[:3].argmax()


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_that_draw_from_the_global_random_numbers(trainer: Any, workers: int) -> None:
    def data() -> Any:
        options = {"num_workers": workers, "persistent_workers": workers > 0, "batch_size": 8}
        return {f"{kind}_dataloaders": DataLoader(Stream(), **options) for kind in ("train", "val")}

    assert_unchanged(trainer, Plain, {"every_n_steps": 1}, data=data)


def test_a_validation_loader_that_is_built_early(trainer: Any) -> None:
    class DrawsForValidation(Rich):
        def val_dataloader(self) -> Any:
            torch.randn(3)  # takes numbers from the run's stream
            return loaders()["val_dataloaders"]

    def data() -> Any:
        return {"train_dataloaders": loaders()["train_dataloaders"]}

    assert_unchanged(trainer, DrawsForValidation, data=data, check_val_every_n_epoch=5, max_epochs=6)


def test_a_step_that_fails_on_held_out_batches(trainer: Any) -> None:
    class OnlyTrains(Rich):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found = super().training_step(batch, batch_idx)
            self.calls += 1
            if len(batch[0]) != 8:
                self.trainer.should_stop = True
                raise RuntimeError("no training batch")
            return found

    def data() -> Any:
        return {**loaders(), "val_dataloaders": loader(24, 1, batch_size=6)}

    with pytest.warns(UserWarning, match="goes on with the training gradients"):
        assert_unchanged(trainer, OnlyTrains, data=data)


def test_lost_runs_are_not_taken_back_by_who_only_watches(trainer: Any) -> None:
    callback = assert_unchanged(trainer, lambda: Rich(sgd(1e4, momentum=0.9)), max_epochs=4)
    assert not any(record["diagnostics"]["trouble"] for record in callback.history)


@pytest.mark.parametrize("stops", ["ends", "raises", "interrupted"])
def test_nothing_is_left_in_module_trainer_optimizer_and_modules_of_python(trainer: Any, stops: str) -> None:
    class Stops(Rich):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 5 and stops != "ends":
                raise RuntimeError("stopped") if stops == "raises" else KeyboardInterrupt

    def left(*callbacks: Any) -> list[Any]:
        module, fitted = Stops(MOMENTUM, COSINE), trainer(*callbacks)
        with pytest.raises((RuntimeError, SystemExit)) if stops != "ends" else torch.enable_grad():
            fitted.fit(module, **loaders())
        (optimizer,) = fitted.optimizers
        hooks = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
        kinds = [type(group["lr"]) for group in optimizer.param_groups]
        return [set(vars(module)), set(vars(fitted)), set(vars(optimizer)), hooks, kinds, set(vars(Stops))]

    assert left(learner_that_learns := observer(meta_learning_rate=1)) == left()
    assert learner_that_learns.history and learner_that_learns.learning_rates


def test_memory_is_freed_after_the_fit(trainer: Any) -> None:
    callback, module = observer(), Rich(ADAM)
    trainer(callback).fit(module, **loaders())
    found = weakref.ref(module)
    del callback.log, callback.log_dict  # Lightning's, in every callback
    del module
    gc.collect()
    assert found() is None and callback.history
