"""A run that is resumed is the uninterrupted run; what a checkpoint holds anybody can load."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import QUIET
from helpers import Deterministic, Resumable, Saves, difference, learner, loader, loaders, outcome, sgd
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler

from lightning_l2l import Displacement, LearnToLearn
from lightning_l2l.tuner import SearchResult

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:LearnToLearn. after step"),  # of a rollback
]

SMALL = sgd(1e-6)
ADAM = lambda parameters: torch.optim.Adam(parameters, lr=1e-5)  # noqa: E731
COSINE = lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 24), "interval": "step"}  # noqa: E731


def resumable() -> dict[str, Any]:
    return {"train_dataloaders": Resumable(), "val_dataloaders": loaders()["val_dataloaders"]}


class Broken(Deterministic):
    """One batch that is not a number."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        broken = self.global_step == 6 and "log" not in vars(self)
        return super().training_step((batch[0] * (float("nan") if broken else 1), batch[1]), batch_idx)


CASES: dict[str, Any] = {
    "defaults": {"ours": {"initial_search": True, "every_n_steps": None}},
    "training gradients": {"ours": {"meta_data": "train"}},
    "held-out gradients": {"ours": {"meta_data": "val"}},
    "in the search": {
        "make": lambda: Deterministic(SMALL),
        "ours": {"initial_search": True, "every_n_steps": None},
        "steps": (5,),
    },
    "a schedule": {"make": lambda: Deterministic(ADAM, COSINE), "ours": {"initial_search": True}},
    "after a rollback": {"make": lambda: Broken(sgd(0.1, momentum=0.9)), "steps": (7, 8, 13)},
    "noise at the end": {"make": lambda: Deterministic(sgd(3.0)), "steps": (19, 20, 22)},
}


def fit(trainer: Any, case: dict[str, Any], *others: Any, resume: Path | None = None, **options: Any) -> Any:
    module, callback = case.get("make", lambda: Deterministic(ADAM))(), learner(**case.get("ours", {}))
    fitted = trainer(callback, *others, **{"max_epochs": 4, **options})
    fitted.fit(module, **resumable(), ckpt_path=resume, weights_only=None if resume is None else True)
    return fitted, module, callback


def assert_same(whole: Any, again: Any) -> None:
    (first, module, expected), (second, resumed, found) = whole, again
    for key in ("state", "optimizer", "schedulers", "progress"):
        assert difference(outcome(first, module)[key], outcome(second, resumed)[key]) == "", key
    assert difference(expected.history, found.history) == "" and expected.history
    assert difference(expected.state_dict(), found.state_dict()) == ""
    assert expected.learning_rates == found.learning_rates
    assert expected.export_schedule() == found.export_schedule()
    assert expected.search_result == found.search_result


@pytest.mark.feature("resuming from a checkpoint, in mid-epoch, too", "works", "bit for bit the uninterrupted run")
@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(trainer: Any, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    steps = case.get("steps", (3, 7, 12))  # after an update, between two, at the end of an epoch
    saves = [Saves(tmp_path / f"{step}.ckpt", step) for step in steps]
    whole = fit(trainer, case, *saves)
    for step in steps:
        assert_same(whole, fit(trainer, case, resume=tmp_path / f"{step}.ckpt"))
    troubles = [record["diagnostics"]["trouble"] for record in whole[2].history]
    assert ("rolled_back" in troubles) is (name == "after a rollback")


@pytest.mark.parametrize("batch", [2, 4])
def test_resumed_in_the_middle_of_an_accumulation(trainer: Any, tmp_path: Path, batch: int) -> None:
    # Lightning begins an accumulation anew, whose gradients are in no checkpoint: without learning, too. Ours are the
    # same rates for the same steps.
    options = {"accumulate_grad_batches": 2, "max_epochs": 6}
    case: dict[str, Any] = {"make": lambda: Deterministic(sgd(0.1)), "ours": {"every_n_steps": 2}}
    _, _, callback = fit(trainer, case, Saves(tmp_path / "x.ckpt", batch=batch), **options)
    _, module, found = fit(trainer, case, resume=tmp_path / "x.ckpt", **options)
    assert [r["step"] for r in found.history] == [r["step"] for r in callback.history]
    before = [record for record in callback.history if record["step"] <= (batch + 1) // 2]
    assert difference(before, found.history[: len(before)]) == ""
    assert all(torch.isfinite(p).all() for p in module.parameters())


def plain_only(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain_only(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(plain_only(item) for item in value)
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@pytest.mark.feature("checkpoints without this package", "works", "plain tensors, numbers and strings")
def test_a_checkpoint_is_plain_and_resumes_without_the_callback_at_the_learned_rate(
    trainer: Any, tmp_path: Path
) -> None:
    fitted, _, callback = fit(trainer, {"make": lambda: Deterministic(ADAM, COSINE), "ours": {"initial_search": True}})
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert plain_only(checkpoint["callbacks"]["LearnToLearn"]) and plain_only(checkpoint["lr_schedulers"])
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert type(group["lr"]) is float and group["lr"] == callback.learning_rates[0]
    assert plain_only(callback.history)

    script = (
        "import sys, torch\n"
        "sys.modules['lightning_l2l'] = None\n"
        f"print(torch.load({str(tmp_path / 'x.ckpt')!r}, weights_only=True)['global_step'])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "24\n"

    class Looks(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    looks = Looks()
    trainer(looks, max_epochs=5).fit(Deterministic(ADAM, COSINE), **resumable(), ckpt_path=tmp_path / "x.ckpt")
    assert looks.rate == callback.learning_rates[0]


def test_a_checkpoint_of_a_run_without_the_callback_is_resumed_from_its_rate(trainer: Any, tmp_path: Path) -> None:
    plain = trainer(max_epochs=1)
    plain.fit(Deterministic(sgd(0.07)), **resumable())
    plain.save_checkpoint(tmp_path / "x.ckpt")
    _, _, callback = fit(trainer, {"make": lambda: Deterministic(sgd(0.2))}, resume=tmp_path / "x.ckpt")
    assert callback.history[0]["base_rates"] == [0.07]
    # Its steps are those since then.
    assert [record["step"] for record in callback.history][:2] == [3, 6]


def test_a_state_of_another_number_of_groups_is_an_error(trainer: Any) -> None:
    class Two(Deterministic):
        def configure_optimizers(self) -> Any:
            return self.optimizer([{"params": [p]} for p in self.parameters()])

    callback = learner()
    trainer(callback).fit(Two(), **resumable())
    again = learner()
    again.load_state_dict(callback.state_dict())
    with pytest.raises(ValueError, match="6 parameter groups; this one has 1"):
        trainer(again).fit(Deterministic(), **resumable())


def test_a_longer_fit_of_the_same_trainer_goes_on_with_what_was_learned(trainer: Any) -> None:
    case: dict[str, Any] = {"ours": {"initial_search": True}}
    fitted, module, callback = fit(trainer, case, max_epochs=2)
    first, steps = list(callback.history), [record["step"] for record in callback.history]
    rate = callback.learning_rates[0]
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, **resumable())
    assert callback.history[: len(first)] == first
    assert [record["step"] for record in callback.history][len(first) :][0] > steps[-1]
    assert callback.history[len(first)]["learning_rates"][0] >= rate > 1e-5
    assert callback.history[len(first)]["base_rates"] == [1e-5]


def test_another_model_and_another_trainer_begin_anew(trainer: Any) -> None:
    def history(callback: LearnToLearn, fitted: Any, module: Any = None) -> Any:
        torch.manual_seed(0)
        fitted.fit(module or Deterministic(ADAM), **resumable())
        gc.collect()  # a model that is gone is no reason to go on, either
        return [(record["step"], record["learning_rates"]) for record in callback.history]

    callback = learner(initial_search=True)
    first = history(callback, trainer(callback))
    assert history(callback, trainer(callback)) == first  # another Trainer
    module = Deterministic(ADAM)
    for _ in range(2):  # the same model in another Trainer
        module.load_state_dict(Deterministic(ADAM).state_dict())
        same = trainer(callback)
        assert history(callback, same, module) == first
    same.fit_loop.max_epochs = 6
    same.fit(Deterministic(ADAM), **resumable())  # the same Trainer, another model: its steps are counted on
    assert callback.history[0]["base_rates"] == [1e-5] and callback.history[0]["step"] == 3


def test_validating_testing_and_predicting_leave_what_was_learned(trainer: Any, tmp_path: Path) -> None:
    class Tested(Deterministic):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    case = {"make": lambda: Tested(ADAM)}
    fitted, module, callback = fit(trainer, case)
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    state, history = callback.state_dict(), list(callback.history)
    data = loader(24, 1)
    fitted.validate(module, data), fitted.test(module, data), fitted.predict(module, data)
    (
        fitted.validate(module, data, ckpt_path=tmp_path / "x.ckpt"),
        fitted.test(module, data, ckpt_path=tmp_path / "x.ckpt"),
    )
    assert difference(state, callback.state_dict()) == "" and callback.history == history
    assert callback.export_schedule().values and callback.learning_rates
    # A fresh callback that validates a checkpoint does not go on from there in a later fit of another run.
    fresh = learner()
    second = trainer(fresh)
    second.validate(Tested(ADAM), data, ckpt_path=tmp_path / "x.ckpt")
    second.fit(Tested(ADAM), **resumable())
    assert [record["step"] for record in fresh.history][:3] == [3, 6, 9]


def test_ctrl_c_and_going_on(trainer: Any, tmp_path: Path) -> None:
    class Interrupts(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                raise KeyboardInterrupt

    case: dict[str, Any] = {"ours": {"initial_search": True}}
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(trainer, case, Interrupts())
    assert_same(fit(trainer, case), fit(trainer, case, resume=tmp_path / "x.ckpt"))


def test_a_large_average_is_left_out_of_checkpoints(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_l2l.tuner.LARGEST_SAVED", 10)
    fitted, _, callback = fit(trainer, {})
    (state,) = callback.state_dict()["tuners"]
    assert state["average"]["average"] == []
    again = learner()
    again.load_state_dict(callback.state_dict())
    trainer(again).fit(Deterministic(ADAM), **resumable())
    assert len(again.history) > len(callback.history)


def test_the_search_says_what_it_found(trainer: Any) -> None:
    case: dict[str, Any] = {"make": lambda: Deterministic(SMALL), "ours": {"initial_search": True}}
    _, _, callback = fit(trainer, case, max_epochs=12)
    assert isinstance(callback.search_result, SearchResult) and callback.search_result.learning_rate > 2e-6
    assert "hardly moved" in callback.search_result.reason


# -- killed -----------------------------------------------------------------------------------------------------------


class Kills(pl.Callback):
    """Ends the process, without a chance to clean up."""

    def __init__(self, hook: str, step: int) -> None:
        setattr(self, hook, lambda trainer, *_: self._at(trainer, step))

    def _at(self, trainer: Any, step: int) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)


class Held(Deterministic):
    """Ends the process in the third held-out gradient, where everything is a working copy."""

    def __init__(self, kills: bool) -> None:
        super().__init__(ADAM, COSINE)
        self.kills = kills

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.kills and self.global_step == 9 and "log" in vars(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


MOMENTS = {
    "before a step": ("on_train_batch_start", 7),
    "between the optimizer's step and our update": ("on_train_batch_end", 9),
    "before the optimizer steps": ("on_before_optimizer_step", 7),
    "in validation": ("on_validation_batch_end", 12),
    "after the last step": ("on_train_end", 18),
    "in a held-out gradient": ("", 0),
}


def train(folder: Path, moment: str = "") -> dict[str, Any]:
    """Three epochs of six steps, with a checkpoint every two."""
    torch.set_num_threads(1)
    hook, step = MOMENTS.get(moment, ("", 0))
    callback, module = learner(meta_data="val"), Held(moment == "in a held-out gradient")
    saves = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    path = folder / "last.ckpt" if (folder / "last.ckpt").exists() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {**QUIET, "enable_checkpointing": True, "max_epochs": 3, "default_root_dir": folder}
        others = [Kills(hook, step)] if hook else []
        fitted = pl.Trainer(**options, callbacks=[*others, callback, saves])
        fitted.fit(module, **resumable(), ckpt_path=path, weights_only=None if path is None else True)
    return {"history": callback.history, "state": callback.state_dict(), "weights": module.state_dict()}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.feature("a run that is killed at any moment", "works", "resumed from its last checkpoint")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, moment: str) -> None:
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    expected = train(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")  # forks a process that has imported what takes long
    context.set_forkserver_preload(["lightning_l2l", "lightning.pytorch.callbacks", "torchmetrics.classification"])
    process = context.Process(target=train, args=(tmp_path / "killed", moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert difference(expected, train(tmp_path / "killed")) == ""


def test_an_optimizer_of_plain_pytorch_goes_on_from_a_saved_tuner() -> None:
    def steps(weight: Any, optimizer: Any, tuner: Any, count: int) -> list[Any]:
        for _ in range(count):
            optimizer.zero_grad()
            loss = 0.5 * (weight - 1).square().sum()
            loss.backward()
            optimizer.step()
            tuner.step(loss)
        return tuner.history

    def make() -> Any:
        weight = nn.Parameter(torch.full((2,), 5.0))
        optimizer = torch.optim.Adam([weight], lr=1e-4)
        return weight, optimizer, Displacement().attach(optimizer, planned_steps=60)

    whole = make()
    expected = steps(*whole, 60)
    half = make()
    steps(*half, 25)
    saved = half[0].detach().clone(), half[1].state_dict(), half[2].state_dict()
    weight, optimizer, tuner = make()
    with torch.no_grad():
        weight.copy_(saved[0])
    optimizer.load_state_dict(saved[1]), tuner.load_state_dict(saved[2])
    assert difference(expected, steps(weight, optimizer, tuner, 35)) == ""
    assert torch.equal(weight, whole[0])
