"""Held-out batches: by number, without touching what the run reads from; the way out where a step cannot take them."""

from __future__ import annotations

import math
import random
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import FEATURES, Plain, Rich, difference, examples, learner, loader, loaders, sgd
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_l2l.host.held_out import Batches
from lightning_l2l.host.lightning_api import first_loader
from lightning_l2l.tuner import HeldOutError


class Numbers(Dataset):
    """Its examples are their own indices."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return torch.tensor(index)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a data set may be larger than the memory")


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(range(self.count))


def numbers(data: Any, count: int, start: int = 0, **options: Any) -> list[list[int]]:
    batches = Batches(data, **{"seed": 0, **options})
    return [batches[number].tolist() for number in range(start, start + count)]


# -- batches by number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_comes_once_in_a_pass_and_in_another_order_in_the_next(shuffle: bool) -> None:
    found = numbers(DataLoader(Numbers(12), 4, shuffle=shuffle), 6)
    first, second = (sum(part, []) for part in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second != list(range(12))


def test_batches_depend_on_the_seed_and_the_number_only() -> None:
    data = DataLoader(Numbers(12), 4)
    state = torch.get_rng_state()
    assert numbers(data, 9) == numbers(data, 9) and numbers(data, 2, start=7) == numbers(data, 9)[7:]
    assert numbers(data, 3) != numbers(data, 3, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_shorter_last_batch_is_left_out_but_not_the_only_one() -> None:
    assert {len(batch) for batch in numbers(DataLoader(Numbers(13), 4), 9)} == {4}
    assert sorted(numbers(DataLoader(Numbers(3), 4), 1, start=5)[0]) == [0, 1, 2]
    by_sampler = DataLoader(Numbers(9), batch_sampler=BatchSampler(range(9), 4, drop_last=False))
    assert {len(batch) for batch in numbers(by_sampler, 6)} == {4}
    assert numbers(DataLoader(Stream(7), 3), 4) == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert numbers(DataLoader(Stream(2), 3), 2) == [[0, 1], [0, 1]]


def test_a_sampler_s_split_is_respected_and_its_generator_not_moved() -> None:
    generator = torch.Generator().manual_seed(1)
    sampler, state = SubsetRandomSampler([1, 3, 5, 7], generator), generator.get_state()
    assert sorted(sum(numbers(DataLoader(Numbers(10), 2, sampler=sampler), 2), [])) == [1, 3, 5, 7]
    assert torch.equal(generator.get_state(), state)
    shards = [DistributedSampler(Numbers(8), 2, rank, shuffle=False) for rank in range(2)]
    seen = [sorted(sum(numbers(DataLoader(Numbers(8), 2, sampler=shard), 2), [])) for shard in shards]
    assert seen == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_collate_functions_batch_samplers_and_whole_batches_of_the_data_set() -> None:
    collated = Batches(DataLoader(Numbers(4), 2, collate_fn=lambda items: {"n": torch.stack(items) * 10}), seed=0)
    assert set(collated[0]["n"].tolist()) < {0, 10, 20, 30}
    assert sorted(numbers(DataLoader(Numbers(4), batch_sampler=[[0, 1], [2, 3]]), 2)) == [[0, 1], [2, 3]]
    whole = Batches(DataLoader(TensorDataset(torch.arange(6).view(3, 2)), batch_size=None), seed=0)
    assert sorted(whole[n][0].tolist() for n in range(3)) == [[0, 1], [2, 3], [4, 5]]


def test_examples_that_do_not_fit_together_come_as_the_loader_groups_them() -> None:
    class Lengths(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.zeros(1 + index // 4)  # the first four have one length, the others another

    found = Batches(DataLoader(Lengths(8), 4), seed=0)
    assert sorted(found[number].shape[1] for number in range(2)) == [1, 2]


def test_a_limit_uses_the_first_batches_only() -> None:
    assert sorted(sum(numbers(DataLoader(Numbers(40), 4), 4, limit=2), [])) == sorted([*range(8)] * 2)
    only = DataLoader(Numbers(4), batch_sampler=[[0], [1], [2]])
    assert numbers(only, 2, limit=1) == [[0], [0]]
    assert numbers(DataLoader(Stream(8), 2), 3, limit=1) == [[0, 1]] * 3


def test_augmentation_is_the_same_for_a_number_and_does_not_touch_the_run() -> None:
    class Noisy(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.rand(())

    batches, before = Batches(DataLoader(Noisy(8), 4), seed=0), torch.get_rng_state()
    assert torch.equal(batches[1], batches[1]) and not torch.equal(batches[0], batches[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_lists_endless_streams_and_batches_without_tensors_are_read() -> None:
    class Endless:
        def __iter__(self) -> Any:
            number = 0
            while True:
                yield {"text": "a" * number}
                number += 1

    batches = Batches(Endless(), seed=0)
    assert [batches[n]["text"] for n in range(3)] == ["", "a", "aa"]
    assert numbers([torch.tensor([1])], 3) == [[1]] * 3


def test_persistent_workers_of_the_run_are_not_ours() -> None:
    data = DataLoader(Stream(4), 2, num_workers=1, persistent_workers=True)
    early = Batches(data, seed=0)
    _ = early[0]
    assert data._iterator is None  # the run's first iterator draws its seed itself
    theirs = iter(data)
    next(theirs)
    late = Batches(data, seed=0)
    _ = early[1], late[0]
    assert next(theirs).tolist() == [2, 3]


def test_what_only_workers_can_read_is_iterated() -> None:
    class Opens(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(self.file[index])

    def open_it(_: int) -> None:
        torch.utils.data.get_worker_info().dataset.file = list(range(100))

    assert numbers(DataLoader(Opens(8), 4, num_workers=1, worker_init_fn=open_it), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_loaders_that_iterate_in_their_own_way_are_iterated() -> None:
    class Own(DataLoader):
        def __iter__(self) -> Any:
            return islice(super().__iter__(), 1)

    assert numbers(Own(Numbers(8), 4), 2) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("data", [[], DataLoader(Stream(0)), DataLoader(Numbers(3), batch_sampler=[])])
def test_empty_loaders_are_said_to_be_empty(data: Any) -> None:
    with pytest.raises(ValueError, match="has no batches"):
        Batches(data, seed=0)[0]


def test_an_iterator_would_be_used_up() -> None:
    with pytest.raises(ValueError, match="cannot be started again"):
        Batches(iter([torch.ones(1)]), seed=0)[0]


def test_the_first_loader_of_every_collection() -> None:
    one, two = loader(), loader()
    for loaders_ in ([one, two], {"a": one, "b": two}, {"a": [one]}, CombinedLoader([one, two])):
        assert first_loader(loaders_)[0] is one
    assert first_loader(one) == (one, 1) and first_loader([one, two])[1] == 2
    assert first_loader(None) == (None, 0) and first_loader([])[0] is None and first_loader({})[0] is None


# -- in a fit ---------------------------------------------------------------------------------------------------------


def held_out_losses(callback: Any) -> list[float]:
    return [record["held_out_loss"] for record in callback.history]


def test_auto_uses_held_out_data_from_the_second_pass_on_and_val_from_the_start(trainer: Any) -> None:
    found = {}
    for meta_data in ("auto", "val", "train"):
        callback = learner(meta_data=meta_data)
        trainer(callback).fit(Plain(), **loaders())
        found[meta_data] = [math.isfinite(loss) for loss in held_out_losses(callback)]
        cosines = [record["held_out_cosine"] for record in callback.history]
        assert [bool(cosine) for cosine in cosines] == found[meta_data]
    assert all(found["val"]) and not any(found["train"])
    assert found["auto"][:4] == [False, False, True, True] and len(found["val"]) >= 4


def test_the_loss_is_that_of_the_batch_in_training_mode_at_the_present_weights(trainer: Any) -> None:
    class Modes(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if "log" in vars(self):
                modes.append((self.training, torch.is_grad_enabled(), self.trainer.training, batch_idx))
                losses.append(self.loss(batch).item())
            return super().training_step(batch, batch_idx)

    modes: list[Any] = []
    losses: list[float] = []
    callback = learner(meta_data=[examples(16, 3).tensors])
    trainer(callback).fit(Modes(), **loaders())
    assert held_out_losses(callback) == pytest.approx(losses, rel=1e-6) and set(modes) == {(True, True, True, 0)}


def test_a_step_may_take_the_batch_alone(trainer: Any) -> None:
    class Alone(Plain):
        def training_step(self, batch: Any) -> Any:
            return self.loss(batch)

    callback = learner(meta_data="val")
    trainer(callback).fit(Alone(), **loaders())
    assert all(map(math.isfinite, held_out_losses(callback)))


def test_transfer_hooks_see_held_out_batches_as_validation(trainer: Any) -> None:
    class Moves(Plain):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if not self.trainer.training and not self.trainer.sanity_checking:
                seen.append(self.trainer.validating)
            return batch[0] * (1 if self.trainer.training else 2), batch[1]

    seen: list[bool] = []
    module, callback = Moves(), learner(meta_data="val", every_n_steps=6)
    trainer(callback, check_val_every_n_epoch=99).fit(module, **loaders())
    assert len(seen) >= 2 and all(seen) and module.trainer.validating is False


def test_several_validation_loaders_are_announced_once_and_the_first_is_used(
    trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = TensorDataset(torch.full((16, FEATURES), 1e3), torch.zeros(16, dtype=torch.long))
    data = {**loaders(), "val_dataloaders": [DataLoader(first, 8), loader(24, 1)]}
    callback = learner(meta_data="val")
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer(callback).fit(Plain(), **data)
    assert caplog.text.count("of 2 validation loaders the first is used") == 1
    assert max(held_out_losses(callback)) > 50


def test_overfitting_uses_the_batches_that_are_overfitted_only(trainer: Any) -> None:
    data = TensorDataset(torch.randn(40, FEATURES), torch.arange(40) % 3)

    class Sees(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if "log" in vars(self):
                seen.extend(batch[0][:, 0].tolist())
            return super().training_step(batch, batch_idx)

    seen: list[float] = []
    callback = learner(meta_data="val")
    trainer(callback, overfit_batches=2, max_epochs=9).fit(Sees(), DataLoader(data, 8), DataLoader(data, 8))
    assert seen and set(seen) <= set(data.tensors[0][:16, 0].tolist())


def test_reloaded_validation_data_are_what_is_used_next(trainer: Any) -> None:
    class Reloads(Plain):
        built = 0

        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            self.built += 1
            tensors = examples(16, 1).tensors
            return DataLoader(TensorDataset(tensors[0] * 100**self.built, tensors[1]), 8)

    largest = lambda module, batch: batch[0].abs().max() + 0.0 * module.net(batch[0] / 1e9).sum()  # noqa: E731
    callback = learner(held_out_loss=largest, every_n_steps=6)
    trainer(callback, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(Reloads())
    assert held_out_losses(callback)[-1] > 10 * held_out_losses(callback)[0]


class Views(Plain):
    """Trains on two views of each input; validates with labels: its validation batches are no training batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = batch["views"]
        return (self.net(first) - self.net(second + 0.1)).square().mean() + self.net(first).square().mean()


def views() -> dict[str, Any]:
    data = [{"views": (x, x + 0.1)} for x in examples().tensors[0]]
    return {"train_dataloaders": DataLoader(data, 8), "val_dataloaders": loader(24, 1)}


@pytest.mark.feature(
    "modules whose validation batches are no training batches", "works", "held_out_loss=, or on training gradients"
)
def test_auto_falls_back_with_one_message_and_val_says_the_way_out(trainer: Any) -> None:
    callback = learner()
    with pytest.warns(UserWarning, match="goes on with the training gradients") as caught:
        trainer(callback, max_epochs=4).fit(Views(), **views())
    assert len([w for w in caught if "LearnToLearn" in str(w.message)]) == 1
    assert all(map(math.isnan, held_out_losses(callback))) and len(callback.history) == 8
    with pytest.raises(HeldOutError, match=r"Views.training_step on a validation batch.*held_out_loss=fn.*meta_data="):
        trainer(learner(meta_data="val")).fit(Views(), **views())


def test_a_held_out_loss_of_one_s_own(trainer: Any) -> None:
    callback = learner(held_out_loss=lambda module, batch: module.loss(batch))
    trainer(callback).fit(Views(), **views())
    assert all(map(math.isfinite, held_out_losses(callback)))
    twin = learner(held_out_loss=lambda module, batch: module.training_step(batch, 0)["loss"])
    ours = learner(meta_data="val")
    for each in (twin, ours):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        trainer(each).fit(Rich(), **loaders())
    assert held_out_losses(twin) == pytest.approx(held_out_losses(ours), rel=1e-4)  # dropout and noise are the same
    with pytest.raises(HeldOutError, match="held_out_loss on a validation batch.*a float without a gradient"):
        trainer(learner(held_out_loss=lambda module, batch: 1.0)).fit(Plain(), **loaders())
    with pytest.raises(HeldOutError, match="does not depend on any trained parameter"):
        lost = lambda module, batch: torch.ones((), requires_grad=True) * 2  # noqa: E731
        trainer(learner(held_out_loss=lost)).fit(Plain(), **loaders())


class ByHand(Plain):
    def __init__(self) -> None:
        super().__init__(sgd(0.05))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.feature("manual optimization", "works", "learns from the training gradients, or from held_out_loss=")
def test_a_step_that_steps_by_hand_is_never_called_by_us(trainer: Any) -> None:
    found = []
    for callbacks in ([], [learner(meta_learning_rate=0)]):
        torch.manual_seed(0)
        module = ByHand()
        trainer(*callbacks).fit(module, **loaders())
        found.append(module.state_dict())
    assert difference(*found) == "" and callbacks[0].history
    with pytest.raises(MisconfigurationException, match="steps its optimizers by hand.*held_out_loss=fn"):
        trainer(learner(meta_data="val")).fit(ByHand(), **loaders())
    callback = learner(held_out_loss=lambda module, batch: module.loss(batch))
    trainer(callback).fit(ByHand(), **loaders())
    assert all(map(math.isfinite, held_out_losses(callback)))


def test_no_validation_data(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    class NoValidation(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(FEATURES, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = learner()
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer(callback).fit(NoValidation(), loader())
    assert callback.history and caplog.text.count("there is no validation data") == 1
    for options in ({"meta_data": "val"}, {"held_out_loss": lambda module, batch: module.loss(batch)}):
        with pytest.raises(MisconfigurationException, match="no validation data.*meta_data=loader"):
            trainer(learner(**options)).fit(NoValidation(), loader())
    with pytest.raises(MisconfigurationException, match="no validation data"):
        trainer(learner(meta_data="val"), limit_val_batches=0).fit(Plain(), **loaders())


@pytest.mark.parametrize("meta_data", [[], DataLoader(Stream(0))])
def test_meta_data_without_batches_say_so(trainer: Any, meta_data: Any) -> None:
    with pytest.raises(HeldOutError, match="has no batches"):
        trainer(learner(meta_data=meta_data)).fit(Plain(), **loaders())


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")  # Lightning says it once in a process
def test_batches_that_the_step_skips(trainer: Any) -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    callback = learner(meta_data="val")
    trainer(callback).fit(Skips(), **loaders())
    assert callback.history


def test_a_step_that_takes_the_iterator(trainer: Any) -> None:
    class Iterates(Plain):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    callback = learner()
    with pytest.warns(UserWarning, match="dataloader_iter|goes on with the training gradients"):
        trainer(callback, max_epochs=3).fit(Iterates(), **loaders())
    assert callback.history
