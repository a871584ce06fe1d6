"""Watching changes nothing: a run with the callback is, bit for bit, the run without it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ALONG,
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
from torch.utils.data import DataLoader, IterableDataset

from lightning_l2l import LearnedStepSize, LearnToLearn
from lightning_l2l.host.session import Session


def run(trainer: Any, module: Any, *callbacks: Any, data: Any = None, **options: Any) -> dict[str, Any]:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    witness = Witness()
    fitted = trainer(witness, *callbacks, **{"logger": MemoryLogger(), **options})
    fitted.fit(module, **(loaders() if data is None else data()))
    seen = {"batches": witness.batches, "changes": witness.changes, "gradients": witness.gradients}
    return {**outcome(fitted, module), **seen}


def assert_unchanged(trainer: Any, make: Any, observing: dict[str, Any] | None = None, **options: Any) -> LearnToLearn:
    """Watched by every estimator that follows the run, unless one is named; returns the last watcher."""
    expected = run(trainer, make(), **options)
    assert expected["rows"] and expected["metrics"] and expected["batches"]
    chosen = dict(observing or {})
    for estimator in [chosen.pop("estimator")] if "estimator" in chosen else ALONG:
        callback = observer(estimator=estimator, **chosen)
        found = run(trainer, make(), callback, **options)
        assert difference(expected, found) == "", estimator
        assert {record["diagnostics"]["estimator"] for record in callback.history} == {estimator}  # it did look
    return callback


ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731


@pytest.mark.feature(
    "batch norm, dropout, attention, recurrent layers, tied layers, torchmetrics",
    "works",
    "the run is the same bit for bit while only watching",
)
@pytest.mark.parametrize("make", [Rich, Attention, Recurrent, TiedAndFrozen, Twice])
@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), ADAM], ids=["momentum", "adam"])
def test_run_is_bitwise_unchanged_without_meta_updates(trainer: Any, make: Any, optimizer: Any) -> None:
    assert_unchanged(trainer, lambda: make(optimizer))


@pytest.mark.parametrize("meta_data", ["val", "train"])
@pytest.mark.parametrize("estimator", ["forward", "reverse", *ALONG])
def test_no_estimator_and_no_meta_data_is_noticed(trainer: Any, meta_data: Any, estimator: Any) -> None:
    assert_unchanged(trainer, Rich, {"meta_data": meta_data, "estimator": estimator})


def test_accumulation_and_clipping_are_unchanged(trainer: Any) -> None:
    assert_unchanged(trainer, Rich, accumulate_grad_batches=2, gradient_clip_val=0.1)


def test_schedules_are_unchanged(trainer: Any) -> None:
    def make() -> Rich:
        schedule = lambda o: {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), "interval": "step"}  # noqa: E731
        return Rich(sgd(0.1, momentum=0.9), schedule)

    assert_unchanged(trainer, make)


@pytest.mark.parametrize("persistent", [False, True])
def test_order_of_the_data_is_unchanged_with_workers(trainer: Any, persistent: bool) -> None:
    assert_unchanged(trainer, Plain, data=lambda: loaders(num_workers=2, persistent_workers=persistent))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        for _ in range(24):
            inputs = torch.randn(6)
            yield inputs, inputs[:3].argmax()


@pytest.mark.feature("persistent workers", "works", "the run's workers are not ours")
@pytest.mark.parametrize("workers", [0, 1])
def test_streams_with_persistent_workers_are_unchanged(trainer: Any, workers: int) -> None:
    def data() -> Any:
        options = {"num_workers": workers, "persistent_workers": workers > 0, "batch_size": 8}
        return {f"{kind}_dataloaders": DataLoader(Stream(), **options) for kind in ("train", "val")}

    assert_unchanged(trainer, Plain, {"every_n_steps": 1}, data=data)


@pytest.mark.usefixtures("short_search")
def test_hooks_of_the_module_have_run_before_its_step_is_called(trainer: Any) -> None:
    class WithHooks(Rich):
        def on_train_start(self) -> None:
            self.at_start = []

        def on_train_epoch_start(self) -> None:
            self.at_epoch = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.at_batch = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for noted in (self.at_start, self.at_epoch, self.at_batch):
                noted.append(batch_idx)
            return super().training_step(batch, batch_idx)

    assert_unchanged(trainer, WithHooks)
    learner = LearnToLearn(every_n_steps=3)
    run(trainer, WithHooks(), learner)
    assert learner.search_result is not None and learner.history


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("make", [Rich, Attention])
def test_the_initial_search_changes_nothing_but_the_rate(
    trainer: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "start_from", lambda *_: None)
    learner = assert_unchanged(trainer, make, {"initial_search": True})
    assert learner.search_result is not None and len(learner.search_result.losses) > 3


@pytest.mark.usefixtures("short_search")
def test_a_run_after_a_search_is_the_run_that_starts_with_its_rate(trainer: Any) -> None:
    learner = observer(initial_search=True)
    found = run(trainer, Rich(sgd(1e-6, momentum=0.9)), learner)
    assert learner.search_result is not None and learner.search_result.learning_rate is not None
    applied = learner.learning_rates[0]
    assert applied == pytest.approx(learner.search_result.learning_rate, rel=1e-14)
    assert difference(run(trainer, Rich(sgd(applied, momentum=0.9))), found) == ""


@pytest.mark.parametrize("per", ["optimizer", "group", "tensor"])
def test_offsets_of_zero_apply_the_scheduled_rate_to_the_last_bit(trainer: Any, per: Any) -> None:
    assert_unchanged(trainer, lambda: Rich(sgd(0.1 / 3, momentum=0.9)), {"learned": LearnedStepSize(per=per)})


def test_validation_every_fifth_epoch_is_unchanged_though_its_loader_is_built_early(trainer: Any) -> None:
    class DrawsForValidation(Rich):
        def val_dataloader(self) -> Any:
            torch.randn(3)  # takes numbers from the run's stream
            return loaders()["val_dataloaders"]

    def data() -> Any:
        return {"train_dataloaders": loaders()["train_dataloaders"]}

    assert_unchanged(trainer, DrawsForValidation, data=data, check_val_every_n_epoch=5, max_epochs=6)


@pytest.mark.parametrize("estimator", [*ALONG, "forward"])
def test_global_random_numbers_are_unchanged_when_the_step_fails_in_a_call_of_ours(
    trainer: Any, estimator: Any
) -> None:
    class Fails(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if "log" in vars(self):  # muted: we are in an unroll
                raise RuntimeError("in the unroll")
            return super().training_step(batch, batch_idx)

    class Stops(Witness):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("in the run")

    before = np.random.get_state(), random.getstate()
    with pytest.raises(RuntimeError, match="in the unroll"):
        trainer(observer(estimator=estimator)).fit(Fails(), loader(), loader(24, seed=1))
    # Of torch's numbers the module and the loaders draw in any case: the same without us, up to the first step.
    assert difference(before, (np.random.get_state(), random.getstate())) == ""
    after = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the run"):
        trainer(Stops()).fit(Plain(), loader(), loader(24, seed=1))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("estimator", [*ALONG, "forward"])
def test_no_attribute_is_left_in_module_trainer_or_optimizer(trainer: Any, estimator: Any) -> None:
    def names(*callbacks: Any) -> list[set[str]]:
        module, fitted = Rich(), trainer(*callbacks)
        fitted.fit(module, **loaders())
        optimizer = fitted.optimizers[0]
        hooks = {f"hook {key}" for key in optimizer._optimizer_step_post_hooks}
        return [set(vars(module)), set(vars(fitted)), set(vars(optimizer)) | hooks, set(vars(type(module)))]

    assert names(observer(estimator=estimator)) == names()
