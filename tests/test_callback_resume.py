"""Interrupted and resumed equals uninterrupted; checkpoints of other runs, and states that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    ALONG,
    Deterministic,
    Plain,
    Resumable,
    Rich,
    difference,
    learner,
    loaders,
    observer,
    outcome,
    sgd,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler

from lightning_l2l import LearnedHyperparameters, LearnedStepSize
from lightning_l2l.host.windows import RememberedWindows

pytestmark = pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*")


COSINE = lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 40), "interval": "step"}  # noqa: E731
CASES: dict[str, Any] = {
    "plain": ({}, {}, None),
    "long memory": ({"unroll_steps": 100}, {}, None),  # which is looked at only in every fifth step
    "ahead": ({"estimator": "forward"}, {}, None),
    "live": ({"estimator": "live"}, {}, COSINE),
    "carried": ({"carry": 0.5, "estimator": "live"}, {}, None),
    "search": ({"initial_search": True}, {}, None),
    "accumulate": ({"every_n_steps": 2}, {"accumulate_grad_batches": 2}, None),
    "accumulate live": ({"every_n_steps": 2, "estimator": "live"}, {"accumulate_grad_batches": 2}, None),
    "schedule": ({}, {}, COSINE),
    "train": ({"meta_data": "train"}, {}, None),
    "train live": ({"meta_data": "train", "estimator": "live"}, {}, None),
    "train ahead": ({"meta_data": "train", "estimator": "forward"}, {}, None),
    "means": ({"objective": "log_mean"}, {"gradient_clip_val": 0.1}, None),
    "tensor": ({"learned": LearnedStepSize(per="tensor")}, {}, COSINE),
    "momentum": ({"learned": LearnedHyperparameters()}, {}, None),
}


class Saves(pl.Callback):
    """Saves after steps, at the end of ``on_train_batch_end`` as ModelCheckpoint does."""

    def __init__(self, folder: Path, *steps: int) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step in self.steps and not path.exists():
            trainer.save_checkpoint(path)


def data() -> dict[str, Any]:
    return {"train_dataloaders": Resumable(), "val_dataloaders": loaders()["val_dataloaders"]}


def module(schedule: Any) -> Plain:
    return Deterministic(sgd(0.1, momentum=0.9), schedule)


@pytest.mark.feature(
    "checkpoints and resuming, in mid-epoch too, also under `weights_only`",
    "works",
    "equals the uninterrupted run, if the loader resumes there",
)
@pytest.mark.usefixtures("short_search")
@pytest.mark.filterwarnings("ignore:LearnToLearn. no initial search")
@pytest.mark.parametrize(("case", "weights_only"), [*((case, True) for case in CASES), ("plain", False)])
def test_resume_equals_uninterrupted_at_any_step(trainer: Any, tmp_path: Path, case: str, weights_only: bool) -> None:
    own, options, schedule = CASES[case]
    whole, uninterrupted = learner(**own), module(schedule)
    steps = (3, 4, 6)  # in the middle, right after a meta-update, and at the end of an epoch
    first = trainer(whole, Saves(tmp_path, *steps), max_epochs=4, **options)
    first.fit(uninterrupted, **data())
    expected = outcome(first, uninterrupted)
    for step in steps:
        again, resumed = learner(**own), module(schedule)
        second = trainer(again, max_epochs=4, **options)
        second.fit(resumed, **data(), ckpt_path=tmp_path / f"{step}.ckpt", weights_only=weights_only)
        found = outcome(second, resumed)
        for key in ("state", "optimizer", "schedulers", "progress"):
            assert difference(expected[key], found[key]) == "", f"{key} after {step} steps"
        assert difference(whole.history, again.history) == ""
        assert whole.learning_rates == again.learning_rates
        assert difference(whole.state_dict(), again.state_dict()) == ""
    assert len(whole.history) >= 3


@pytest.mark.parametrize(
    ("estimator", "meta_data"), [("displacement", "val"), ("displacement", "train"), ("live", "val")]
)
def test_a_meta_update_that_was_due_when_the_run_was_killed_is_made_on_resume(
    trainer: Any, tmp_path: Path, estimator: Any, meta_data: Any
) -> None:
    whole, uninterrupted = learner(estimator=estimator, meta_data=meta_data), module(None)
    # Listed before us: the optimizer has stepped, and our on_train_batch_end has not run yet.
    trainer(Saves(tmp_path, 6), whole, max_epochs=3).fit(uninterrupted, **data())
    again, resumed = learner(estimator=estimator, meta_data=meta_data), module(None)
    trainer(again, max_epochs=3).fit(resumed, **data(), ckpt_path=tmp_path / "6.ckpt")
    assert difference(whole.history, again.history) == ""
    assert difference(uninterrupted.state_dict(), resumed.state_dict()) == ""


def test_resume_without_saved_batches_remembers_anew(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RememberedWindows, "state_dict", lambda self: {})
    trainer(learner(estimator="forward"), Saves(tmp_path, 8), max_epochs=4).fit(module(None), **data())
    again = learner(estimator="forward")
    trainer(again, max_epochs=4).fit(module(None), **data(), ckpt_path=tmp_path / "8.ckpt")
    assert [record["step"] for record in again.history] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [len(record["diagnostics"]["losses"]) for record in again.history[1:4]] == [2, 1, 2]


def saved(trainer: Any, path: Path, *callbacks: Any, **options: Any) -> Path:
    fitted = trainer(*callbacks, max_epochs=1, **options)
    fitted.fit(module(None), **data())
    fitted.save_checkpoint(path)
    return path


def test_a_checkpoint_after_the_fit_has_what_was_learned(trainer: Any, tmp_path: Path) -> None:
    callback = learner()
    path = saved(trainer, tmp_path / "x.ckpt", callback)
    again = learner()
    trainer(again, max_epochs=2).fit(module(None), **data(), ckpt_path=path)
    assert difference(callback.history, again.history[: len(callback.history)]) == ""
    assert len(again.history) == 2 * len(callback.history) == 4


@pytest.mark.feature("a checkpoint of a run without the callback", "works", "learned on from its rate")
def test_a_checkpoint_of_a_run_without_the_callback_is_resumed_from_its_rate(trainer: Any, tmp_path: Path) -> None:
    path = saved(trainer, tmp_path / "x.ckpt")
    callback = learner(initial_search=True)
    trainer(callback, max_epochs=2).fit(module(None), **data(), ckpt_path=path)
    assert callback.search_result is None and [record["step"] for record in callback.history] == [9, 12]


@pytest.mark.feature("a checkpoint of ours, loaded without the callback", "works", "keeps the rate")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_a_checkpoint_is_loaded_without_the_callback_and_keeps_the_rate(trainer: Any, tmp_path: Path) -> None:
    callback = learner()
    path = saved(trainer, tmp_path / "x.ckpt", callback)
    fitted = trainer(max_epochs=2)
    fitted.fit(module(None), **data(), ckpt_path=path)
    assert fitted.optimizers[0].param_groups[0]["lr"] == callback.learning_rates[0] != 0.1


def edited(path: Path, edit: Any) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint["callbacks"]["LearnToLearn"])
    torch.save(checkpoint, path)
    return path


EDITS: dict[str, Any] = {
    "future": (lambda state: state.update(version=99), "version 99"),
    "no version": (lambda state: state.pop("version"), "damaged"),
    "nothing there": (lambda state: state.pop("applied"), "damaged: applied"),
    "wrong type": (lambda state: state.update(history="x"), "damaged: history"),
}


@pytest.mark.feature("a damaged state, or one of a future version", "refused", "the message has the way out")
@pytest.mark.parametrize("edit", EDITS)
def test_a_state_that_cannot_be_resumed_from_says_so_and_what_to_do(trainer: Any, tmp_path: Path, edit: str) -> None:
    change, message = EDITS[edit]
    path = edited(saved(trainer, tmp_path / "x.ckpt", learner()), change)
    with pytest.raises(ValueError, match=message) as caught:
        trainer(learner(), max_epochs=2).fit(module(None), **data(), ckpt_path=path)
    assert "remove 'LearnToLearn'" in str(caught.value)
    trainer(learner()).validate(module(None), loaders()["val_dataloaders"], ckpt_path=path, verbose=False)


def test_a_state_of_another_learned_optimizer_is_refused(trainer: Any, tmp_path: Path) -> None:
    path = saved(trainer, tmp_path / "x.ckpt", learner())
    other = learner(learned=LearnedStepSize(per="tensor"))
    with pytest.raises(MisconfigurationException, match="another `learned`"):
        trainer(other, max_epochs=2).fit(module(None), **data(), ckpt_path=path)


def test_validate_from_a_checkpoint_and_then_fit_starts_anew(trainer: Any, tmp_path: Path) -> None:
    path = saved(trainer, tmp_path / "x.ckpt", learner())
    callback, fresh = learner(), learner()
    fitted = trainer(callback)
    fitted.validate(module(None), loaders()["val_dataloaders"], ckpt_path=path, verbose=False)
    fitted.fit(module(None), **data())
    trainer(fresh).fit(module(None), **data())
    assert difference(fresh.history, callback.history) == "" and callback.history


@pytest.mark.feature("the same callback object in two fits")
def test_one_callback_in_two_fits_learns_twice_from_the_start(trainer: Any) -> None:
    callback, histories = learner(), []
    for _ in range(2):
        trainer(callback).fit(module(None), **data())
        histories.append(callback.history)
    assert difference(*histories) == "" and histories[0] is not histories[1] and histories[0]


@pytest.mark.feature("a second `fit` of the same Trainer", "works", "goes on with what was learned")
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("estimator", ALONG)
def test_a_second_fit_of_the_same_trainer_goes_on_with_what_was_learned(
    trainer: Any, interrupted: bool, estimator: Any
) -> None:
    class Stops(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if interrupted and trainer.global_step == 8:
                raise RuntimeError("stop")

    callback, kept = learner(estimator=estimator), module(None)
    fitted = trainer(callback, Stops(), max_epochs=1 if not interrupted else 2)
    if interrupted:
        with pytest.raises(RuntimeError, match="stop"):
            fitted.fit(kept, **data())
        fitted.callbacks = [c for c in fitted.callbacks if not isinstance(c, Stops)]
    else:
        fitted.fit(kept, **data())
    before, factor = list(callback.history), callback.learning_rates[0] / 0.1
    fitted.fit_loop.max_epochs = 3
    fitted.fit(kept, **data())
    assert before and difference(before, callback.history[: len(before)]) == ""
    assert len(callback.history) > len(before) and factor != 1
    assert callback.search_result is None


@pytest.mark.parametrize(
    "options", [{}, {"estimator": "live", "carry": 0.5}, {"learned": LearnedHyperparameters()}, {"meta_data": "train"}]
)
def test_the_state_is_plain(trainer: Any, options: dict[str, Any]) -> None:
    callback = learner(**options)
    trainer(callback).fit(Rich(sgd(0.1, momentum=0.9)), **loaders())

    def check(value: Any) -> None:
        assert type(value) in (dict, list, tuple, int, float, bool, str, torch.Tensor, type(None)), type(value)
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        for item in value if isinstance(value, (list, tuple)) else ():
            check(item)

    check(callback.state_dict())
    assert observer().state_dict() == {}
