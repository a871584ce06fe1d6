"""Killed at any moment, without a chance to clean up, and resumed from the last checkpoint: as if nothing had been."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import QUIET
from helpers import Deterministic, Resumable, difference, learner, loader, loaders, sgd
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.optim import lr_scheduler

from lightning_l2l import LearnedStepSize, LearnToLearn

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here"),
    pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
]

HOOKS = [name for name in vars(pl.Callback) if name.startswith("on_") and "checkpoint" not in name]


class Events:
    """Counts what passes, and kills the process at the event with this number, or of this kind."""

    def __init__(self, number: int = -1, kind: str = "", step: int = 0) -> None:
        self.number, self.kind, self.step = number, kind, step
        self.steps: list[int] = []  # of each event that passed

    def pass_(self, kind: str, step: int = 0) -> None:
        if len(self.steps) == self.number or (kind == self.kind and step == self.step):
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps.append(step)


class Everywhere(pl.Callback):
    """Passes an event in every hook."""

    def __init__(self, events: Events) -> None:
        for hook in HOOKS:
            setattr(self, hook, self._passing(events, hook))

    @staticmethod
    def _passing(events: Events, hook: str) -> Callable[..., None]:
        return lambda trainer, *_arguments, **_options: events.pass_(hook, trainer.global_step)


class Module(Deterministic):
    """Passes an event in every step; apart those of the look-aheads, where logging is muted."""

    def __init__(self, events: Events) -> None:
        super().__init__(
            sgd(0.1, momentum=0.9),
            lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 40), "interval": "step"},
        )
        self.events = (events,)  # in a tuple: a look-ahead works on copies of lists

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        where = f"look-ahead in {self._current_fx_name}" if "log" in vars(self) else "training step"
        self.events[0].pass_(where, self.global_step)
        return loss


class Writes(TorchCheckpointIO):
    """Passes an event before and after a checkpoint is written."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.events.pass_("before a checkpoint is written", checkpoint["global_step"])
        super().save_checkpoint(checkpoint, path, storage_options)
        self.events.pass_("after a checkpoint is written", checkpoint["global_step"])


def train(folder: Path, events: Events, mode: str, *, resumed: bool = False) -> dict[str, Any]:
    """Three epochs of six steps, with a meta-update every three and a checkpoint every two steps.

    A loader that resumes in mid-epoch can only be iterated, so that there is no search; with the other one there is,
    and the run resumes at the start of an epoch.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    searches = mode == "search"
    ours: dict[str, Any] = {"estimator": "live"} if mode == "live" else {"learned": LearnedStepSize(per="tensor")}
    callback, module = learner(initial_search=True, **ours), Module(events)
    saves = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 3, "num_sanity_val_steps": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = pl.Trainer(
            **options,
            default_root_dir=folder,
            callbacks=[Everywhere(events), callback, Everywhere(events), saves],
            plugins=[Writes(events)],
        )
        # Without a checkpoint the run is begun anew.
        path = folder / "last.ckpt" if resumed and (folder / "last.ckpt").exists() else None
        data = {
            "train_dataloaders": loader() if searches else Resumable(),
            "val_dataloaders": loaders()["val_dataloaders"],
        }
        fitted.fit(module, **data, ckpt_path=path, weights_only=True)
    assert (callback.search_result is not None) is (searches and path is None)
    return result(callback, module)


def result(callback: LearnToLearn, module: Module) -> dict[str, Any]:
    return {
        "history": callback.history,
        "rates": callback.learning_rates,
        "state": callback.state_dict(),
        "weights": module.state_dict(),
        "steps": module.trainer.global_step,
    }


def killed(folder: Path, events: Events, mode: str) -> None:
    """Trains in a process of its own, which must end by the signal."""
    context = multiprocessing.get_context("forkserver")  # forks a process that has imported what takes long
    context.set_forkserver_preload(["lightning_l2l", "lightning.pytorch.callbacks", "torchmetrics.classification"])
    process = context.Process(target=train, args=(folder, events, mode))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode}"


@pytest.fixture(scope="module", params=["look-ahead", "live", "search"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], list[int]]:
    """The mode, what it gives if nothing happens, and the step of each event."""
    events = Events()
    found = train(tmp_path_factory.mktemp("uninterrupted"), events, request.param)
    assert [record["step"] for record in found["history"]] == [3, 6, 9, 12, 15, 18] and found["steps"] == 18
    return request.param, found, events.steps


def assert_resumes(folder: Path, events: Events, mode: str, expected: dict[str, Any]) -> None:
    killed(folder, events, mode)
    assert difference(expected, train(folder, Events(), mode, resumed=True)) == ""


# The hook, or other event, and the optimizer steps before it.
IN_MID_EPOCH = {
    "in the sanity check": ("on_validation_batch_start", 0),
    "in the rehearsal": ("look-ahead in on_train_batch_start", 0),
    "in the training step": ("training step", 7),
    "while there is a group for each tensor": ("on_before_optimizer_step", 7),
    "between the optimizer's step and our meta-update": ("on_train_batch_end", 9),
    "in a meta-update's look-ahead": ("look-ahead in on_train_batch_end", 9),
    "while a checkpoint is due": ("before a checkpoint is written", 8),
    "between a checkpoint and its copy": ("after a checkpoint is written", 8),
    "between two checkpoints": ("on_train_batch_start", 9),
    "in validation": ("on_validation_batch_end", 12),
    "after the last step": ("on_train_end", 18),
}
IN_A_LIVE_WINDOW = {
    "before a live window": ("training step", 6),
    "after the first step of a live window": ("training step", 8),
    "before a live window is judged": ("on_train_batch_end", 9),
}
AFTER_A_SEARCH = {
    "in the initial search": ("look-ahead in on_train_start", 0),
    "at the start of an epoch": ("on_train_epoch_start", 12),
    "in the first step of an epoch": ("training step", 6),
}


MOMENTS: dict[str, dict[str, tuple[str, int]]] = {
    "look-ahead": IN_MID_EPOCH,
    "live": IN_A_LIVE_WINDOW,
    "search": AFTER_A_SEARCH,
}
CASES = [(mode, moment) for mode, moments in MOMENTS.items() for moment in moments]


@pytest.mark.feature(
    "a run that is killed at any moment", "works", "resumed from its last checkpoint it is the uninterrupted one"
)
@pytest.mark.parametrize(("run", "moment"), CASES, indirect=["run"], ids=[moment for _, moment in CASES])
def test_killed_and_resumed_equals_uninterrupted(moment: str, tmp_path: Path, run: Any) -> None:
    mode, expected, _ = run
    kind, step = MOMENTS[mode][moment]
    assert_resumes(tmp_path, Events(kind=kind, step=step), mode, expected)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["look-ahead", "live"], indirect=True)
@pytest.mark.parametrize("step", [5, 6, 7, 8])
def test_killed_between_any_two_hooks_and_resumed_equals_uninterrupted(step: int, tmp_path: Path, run: Any) -> None:
    """A meta-update, a validation, the end of an epoch and two checkpoints are among them."""
    mode, expected, steps = run
    numbers = [number for number, of in enumerate(steps) if of == step]
    assert len(numbers) > 10
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_resumes(folder, Events(number), mode, expected)
