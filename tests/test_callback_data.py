"""Batches and loaders of every kind are learned on, and only those that the user gave."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    FEATURES,
    Plain,
    examples,
    learner,
    loader,
    loaders,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

from lightning_l2l import LearnToLearn
from lightning_l2l.host.look_ahead import LookAhead


def learned_rates(callback: LearnToLearn) -> list[float]:
    rates = [record["learning_rates"][0] for record in callback.history]
    assert rates and all(rate > 0 for rate in rates) and len(set(rates)) == len(rates)
    return rates


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor


class AnyBatch(Plain):
    def loss(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            inputs, targets = batch.pop("inputs"), batch.pop("targets")  # the user's step may empty its batch
        elif isinstance(batch, Batch):
            inputs, targets = batch.inputs, batch.targets
        else:
            inputs, targets = batch
        return super().loss((inputs, targets))


def collated(kind: str) -> Any:
    def collate(items: list[Any]) -> Any:
        inputs, targets = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
        return {
            "dict": {"inputs": inputs, "targets": targets, "name": "batch"},
            "dataclass": Batch(inputs, targets),
            "tuple": (inputs, targets),
            "list": [inputs, targets],
        }[kind]

    return collate


@pytest.mark.feature("batches that are dictionaries, dataclasses, tuples, lists")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("kind", ["dict", "dataclass", "tuple", "list"])
def test_every_kind_of_batch_gives_the_same_rates(trainer: Any, kind: str) -> None:
    found = {}
    for name in (kind, "tuple"):
        torch.manual_seed(0)
        callback = learner()
        trainer(callback).fit(AnyBatch(), **loaders(collate_fn=collated(name)))
        found[name] = learned_rates(callback)
    assert found[kind] == found["tuple"]


@pytest.mark.feature("a `training_step` that returns `None` for some batches", "works", "they are not looked at")
@pytest.mark.filterwarnings("ignore:.*yielded None.*")
def test_a_step_may_take_the_batch_alone_and_may_skip_some(trainer: Any) -> None:
    class Skips(Plain):
        def training_step(self, batch: Any) -> Any:
            return None if self.global_step == 4 else self.loss(batch)

    callback = learner(estimator="forward")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns about the None
        trainer(callback).fit(Skips(), **loaders())
    assert [record["step"] for record in callback.history] == [3, 6, 9, 12]
    assert [len(record["diagnostics"]["losses"]) for record in callback.history] == [2, 2, 2, 2]


def test_a_step_that_skips_in_the_unroll_keeps_the_rate_and_says_so_once(trainer: Any) -> None:
    class SkipsLater(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.global_step >= 5 and "log" in vars(self) else self.loss(batch)

    callback = learner()
    with pytest.warns(UserWarning, match="returned None") as caught:
        trainer(callback).fit(SkipsLater(), **loaders())
    assert len([w for w in caught if "LearnToLearn" in str(w.message)]) == 1
    rates = [record["learning_rates"][0] for record in callback.history]
    assert rates[0] == rates[1] == rates[3] and len(rates) == 4 and "kept" in callback.history[3]["diagnostics"]["note"]


# -- loaders ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(examples(24))


@pytest.mark.feature("iterable data sets", "works", "no initial search: reading ahead would change the run's data")
def test_a_stream_is_learned_on_and_not_searched(trainer: Any) -> None:
    callback = learner(initial_search=True)
    with pytest.warns(UserWarning, match="no initial search, since the training loader can only be iterated"):
        trainer(callback).fit(Plain(), DataLoader(Stream(), 8), DataLoader(Stream(), 8))
    assert len(learned_rates(callback)) == 2 and callback.search_result is None


def test_a_stream_that_ends_before_the_first_meta_update_is_said_to_be_short(trainer: Any) -> None:
    callback = learner(every_n_steps=20)
    with pytest.warns(UserWarning, match="made no meta-update: training ended after 6 steps"):
        trainer(callback).fit(Plain(), DataLoader(Stream(), 8), DataLoader(Stream(), 8))


@pytest.mark.feature("several validation loaders", "works", "judged by the first")
def test_several_validation_loaders_are_judged_by_the_first(trainer: Any) -> None:
    found = []
    for validation in ([loader(24, seed=1), loader(24, seed=2)], loader(24, seed=1), {"a": loader(24, seed=1)}):
        torch.manual_seed(0)
        callback = learner()
        trainer(callback).fit(Plain(), loader(), validation)  # not shuffled: more loaders draw more numbers
        found.append(learned_rates(callback))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("meta_data", [loader(24, seed=1), [tuple(b) for b in loader(24, seed=1)], "train"])
def test_meta_data_of_one_s_own_needs_no_validation(trainer: Any, meta_data: Any) -> None:
    class NoValidation(Plain):
        validation_step = pl.LightningModule.validation_step

    callback = learner(meta_data=meta_data)
    trainer(callback).fit(NoValidation(), loader(shuffle=True))
    assert len(learned_rates(callback)) == 4


@pytest.mark.feature(
    "several training loaders", "works", "no initial search: a batch of one of them is no training batch"
)
def test_several_training_loaders_are_one_batch(trainer: Any) -> None:
    class TakesTwo(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if isinstance(batch, dict):
                return self.loss(batch["a"]) + self.loss(batch["b"])
            return self.loss(batch)

    callback = learner()
    trainer(callback).fit(TakesTwo(), {"a": loader(), "b": loader(seed=3)}, loader(24, seed=1))
    assert learned_rates(callback)


class Moves(pl.LightningDataModule):
    """Transfer hooks that ask what stage it is, as augmentations do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(24, seed=1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.stages.append("train" if self.trainer.training else "val")
        return batch[0] + (1.0 if self.trainer.training else 5.0), batch[1]


@pytest.mark.feature("`LightningDataModule` with transfer hooks", "works", "held-out batches pass them as validation")
def test_transfer_hooks_of_a_datamodule_see_held_out_batches_as_validation(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, original = [], LookAhead.meta_gradient

    def noting(self: LookAhead, windows: Any, judge: Any) -> Any:
        ((batch, _),) = judge.batches
        judged.append(batch[0])
        return original(self, windows, judge)

    monkeypatch.setattr(LookAhead, "meta_gradient", noting)
    data, callback = Moves(), learner(estimator="forward")
    trainer(callback).fit(Plain(), data)
    raw = examples(24, seed=1).tensors[0]
    assert len(judged) == 5
    for inputs in judged:
        rows = (inputs - 5) / 2
        assert rows.shape == (8, FEATURES)
        assert all((raw - row).abs().amax(1).min() < 1e-6 for row in rows)


@pytest.mark.feature("`overfit_batches`")
def test_overfitting_uses_the_batches_that_are_overfitted_only(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[int] = set()

    class Notes(Dataset):
        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> Any:
            drawn.add(index)
            return examples()[index]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = trainer(learner(initial_search=True), overfit_batches=2)
        fitted.fit(Plain(), DataLoader(Notes(), 8), loader(24, seed=1))
    assert drawn == set(range(16))


def test_a_split_by_sampler_is_never_looked_across(trainer: Any) -> None:
    drawn: dict[str, set[int]] = {"fit": set()}

    class Notes(Dataset):
        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> Any:
            drawn["fit"].add(index)
            return examples()[index]

    halves = [SubsetRandomSampler(list(range(24))), SubsetRandomSampler(list(range(24, 40)))]
    train, validation = (DataLoader(Notes(), 8, sampler=half) for half in halves)
    callback = learner(initial_search=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_l2l.host.look_ahead.search_steps", lambda budget: 3)
        trainer(callback).fit(Plain(), train, validation)
    assert drawn["fit"] == set(range(40)) and learned_rates(callback)


@pytest.mark.feature("`reload_dataloaders_every_n_epochs`")
def test_reloaded_validation_data_is_what_is_judged_by(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reloads(Plain):
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            epoch = self.trainer.current_epoch
            return DataLoader([(torch.full((FEATURES,), float(epoch)), torch.tensor(0))] * 8, 8)

    judged, original = [], LookAhead.meta_gradient

    def noting(self: LookAhead, windows: Any, judge: Any) -> Any:
        judged.append(judge.batches[0][0][0][0, 0].item())
        return original(self, windows, judge)

    monkeypatch.setattr(LookAhead, "meta_gradient", noting)
    trainer(learner(every_n_steps=6, estimator="forward"), reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(
        Reloads()
    )
    assert judged == [0, 0, 0, 1]  # the rehearsal; after epochs 0, 1, 2, before their validation reloads
