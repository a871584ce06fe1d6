"""Where batches come from: remembered training batches, and held-out batches by number."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
from helpers import difference, examples, loader
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_l2l.host.data import EmptyLoaderError, IndexedBatches, StreamedBatches, first_loader, is_indexable
from lightning_l2l.host.windows import RememberedWindows

CPU = torch.device("cpu")


class Numbers(Dataset):
    """Its examples are their own indices."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a data set may be larger than the memory")


def numbers(source: Any, count: int, start: int = 0) -> list[list[int]]:
    return [source.batch(number).tolist() for number in range(start, start + count)]


# -- by index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_comes_once_in_a_pass_and_in_another_order_in_the_next(shuffle: bool) -> None:
    found = numbers(IndexedBatches(DataLoader(Numbers(12), 4, shuffle=shuffle), 0), 6)
    first, second = (sum(part, []) for part in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_batches_depend_on_the_seed_and_the_number_only() -> None:
    data = DataLoader(Numbers(12), 4)
    assert numbers(IndexedBatches(data, 0), 9) == numbers(IndexedBatches(data, 0), 9)
    assert numbers(IndexedBatches(data, 0), 2, start=7) == numbers(IndexedBatches(data, 0), 9)[7:]
    assert numbers(IndexedBatches(data, 0), 3) != numbers(IndexedBatches(data, 1), 3)


def test_a_shorter_last_batch_is_left_out_but_not_the_only_one() -> None:
    assert {len(batch) for batch in numbers(IndexedBatches(DataLoader(Numbers(13), 4), 0), 9)} == {4}
    assert sorted(IndexedBatches(DataLoader(Numbers(3), 4), 0).batch(5).tolist()) == [0, 1, 2]
    by_sampler = DataLoader(Numbers(9), batch_sampler=BatchSampler(range(9), 4, drop_last=False))
    assert {len(batch) for batch in numbers(IndexedBatches(by_sampler, 0), 6)} == {4}


def test_a_sampler_s_split_is_respected_and_its_generator_not_moved() -> None:
    generator = torch.Generator().manual_seed(1)
    sampler = SubsetRandomSampler([1, 3, 5, 7], generator)
    state = generator.get_state()
    source = IndexedBatches(DataLoader(Numbers(10), 2, sampler=sampler), 0)
    assert sorted(sum(numbers(source, 2), [])) == [1, 3, 5, 7]
    assert torch.equal(generator.get_state(), state)
    assert sum(([i] for i in sampler), []) == sum(
        ([i] for i in SubsetRandomSampler([1, 3, 5, 7], torch.Generator().manual_seed(1))), []
    )


def test_collate_function_batch_sampler_and_whole_batches_of_the_data_set_are_respected() -> None:
    collated = DataLoader(Numbers(4), 2, collate_fn=lambda items: {"n": torch.stack(items) * 10})
    assert set(IndexedBatches(collated, 0).batch(0)["n"].tolist()) < {0, 10, 20, 30}
    batched = DataLoader(Numbers(4), batch_sampler=[[0, 1], [2, 3]])
    assert sorted(numbers(IndexedBatches(batched, 0), 2)) == [[0, 1], [2, 3]]
    whole = DataLoader(TensorDataset(torch.arange(6).view(3, 2)), batch_size=None)
    assert sorted(IndexedBatches(whole, 0).batch(n)[0].tolist() for n in range(3)) == [[0, 1], [2, 3], [4, 5]]


def test_a_limit_uses_the_first_batches_only() -> None:
    first = IndexedBatches(DataLoader(Numbers(40), 4), 0, limit=2)
    assert sorted(sum(numbers(first, 4), [])) == sorted([*range(8)] * 2)
    only = IndexedBatches(DataLoader(Numbers(4), batch_sampler=[[0], [1], [2]]), 0, limit=1)
    assert numbers(only, 2) == [[0], [0]]


def test_augmentation_is_the_same_for_a_number_and_does_not_touch_the_run() -> None:
    class Noisy(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.rand(())

    source, before = IndexedBatches(DataLoader(Noisy(8), 4), 0), torch.get_rng_state()
    assert torch.equal(source.batch(1), source.batch(1)) and not torch.equal(source.batch(0), source.batch(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_empty_loaders_are_said_to_be_empty() -> None:
    for data in (DataLoader(Numbers(0), 4), DataLoader(Numbers(3), batch_sampler=[])):
        with pytest.raises(EmptyLoaderError, match="no batch"):
            IndexedBatches(data, 0)
    with pytest.raises(EmptyLoaderError, match="no batch"):
        StreamedBatches([], 0).batch(0)


# -- by iterating ---------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(range(self.count))


def test_streams_start_again_and_leave_out_a_shorter_last_batch() -> None:
    source = StreamedBatches(DataLoader(Stream(7), 3), 0)
    assert numbers(source, 4) == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert numbers(StreamedBatches(DataLoader(Stream(2), 3), 0), 2) == [[0, 1], [0, 1]]
    assert numbers(StreamedBatches([torch.tensor([1])], 0), 3) == [[1]] * 3


def test_a_number_may_be_asked_for_twice_and_later_numbers_directly() -> None:
    source = StreamedBatches(DataLoader(Stream(8), 2), 0)
    assert [source.batch(n).tolist() for n in (0, 0, 2, 2)] == [[0, 1], [0, 1], [4, 5], [4, 5]]


def test_endless_streams_and_batches_without_tensors_are_read() -> None:
    class Endless:
        def __iter__(self) -> Any:
            number = 0
            while True:
                yield {"text": "a" * number}
                number += 1

    source = StreamedBatches(Endless(), 0)
    assert [source.batch(n)["text"] for n in range(3)] == ["", "a", "aa"]


def test_persistent_workers_of_the_run_are_not_ours() -> None:
    data = DataLoader(Stream(4), 2, num_workers=1, persistent_workers=True)
    early = StreamedBatches(data, 0)
    early.batch(0)
    assert data._iterator is None  # the run's first iterator draws its seed itself
    theirs = iter(data)
    next(theirs)
    late = StreamedBatches(data, 0)
    early.batch(3), late.batch(3)
    assert next(theirs).tolist() == [2, 3]


# -- which loader ---------------------------------------------------------------------------------------------------


def test_first_loader_looks_into_every_collection() -> None:
    one, two = loader(), loader()
    for collection in (one, [one, two], {"a": one, "b": two}, {"a": [one]}, CombinedLoader([one, two])):
        assert first_loader(collection) is one
    assert first_loader(None) is None and first_loader([]) is None and first_loader({}) is None


def test_loaders_that_iterate_in_their_own_way_are_not_indexed() -> None:
    class Own(DataLoader):
        def __iter__(self) -> Any:
            return islice(super().__iter__(), 1)

    assert is_indexable(loader()) and not is_indexable(Own(examples(), 8))
    assert not is_indexable(DataLoader(Stream(3))) and not is_indexable([1])


# -- remembered -----------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    inputs: torch.Tensor
    label: str


class Named(NamedTuple):
    inputs: torch.Tensor


class Graph:
    """A batch object of another library, which can clone itself."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def clone(self) -> Graph:
        return Graph(self.x.clone())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2),
        lambda: {"x": torch.ones(2), "name": "a"},
        lambda: [torch.ones(2)],
        lambda: (torch.ones(2), 1),
        lambda: Pair(torch.ones(2), "a"),
        lambda: Named(torch.ones(2)),
        lambda: Graph(torch.ones(2)),
    ],
    ids=["tensor", "dict", "list", "tuple", "dataclass", "named tuple", "object"],
)
def test_what_the_step_does_to_its_batch_does_not_reach_the_memory(make: Any) -> None:
    windows, batch = RememberedWindows(1), make()
    windows.see(batch, 0, first=True)
    windows.close(1)
    tensor = batch if isinstance(batch, torch.Tensor) else getattr(batch, "inputs", getattr(batch, "x", None))
    if tensor is None:
        tensor = batch["x"] if isinstance(batch, dict) else batch[0]
    tensor.zero_()
    if isinstance(batch, (dict, list)):
        batch.clear()
    ((kept, index),) = windows.last()[0].batches
    inner = next(
        v
        for v in (
            vars(kept).values()
            if hasattr(kept, "__dict__") and not isinstance(kept, torch.Tensor)
            else kept.values()
            if isinstance(kept, dict)
            else [kept]
            if isinstance(kept, torch.Tensor)
            else kept
        )
        if isinstance(v, torch.Tensor)
    )
    assert type(kept) is type(batch) and torch.equal(inner, torch.ones(2)) and index == 0


def remembered(*numbers: int, length: int = 2, accumulate: int = 2) -> RememberedWindows:
    windows = RememberedWindows(length)
    for number in numbers:
        windows.see(torch.tensor([float(number)]), number, first=number % accumulate == 0)
        if number % accumulate == accumulate - 1:
            windows.close(accumulate)
    return windows


def contents(windows: RememberedWindows) -> list[list[float]]:
    return [[batch.item() for batch, _ in window.batches] for window in windows.last()]


def test_windows_hold_the_micro_batches_of_the_last_steps() -> None:
    windows = remembered(0, 1, 2, 3, 4, 5, 6)
    assert contents(windows) == [[2, 3], [4, 5]] and [w.divisor for w in windows.last()] == [2, 2]
    assert [batch.item() for batch, _ in windows.unfinished().batches] == [6]
    windows.close(2)  # the short window at the end of an epoch is divided by the full number, as Lightning does
    assert contents(windows) == [[4, 5], [6]] and windows.last()[1].divisor == 2


def test_batches_that_were_not_trained_on_are_not_remembered() -> None:
    windows = remembered(0, 1, 2)
    windows.skip()
    windows.close(2)
    assert contents(windows) == [[0, 1]]
    windows = remembered(0, 1, 2, 4, 5)  # the epoch was left after batch 2
    assert contents(windows) == [[0, 1], [4, 5]]


def test_memory_travels_through_a_safe_checkpoint() -> None:
    windows = remembered(0, 1, 2, 3, 4)
    file = io.BytesIO()
    torch.save(windows.state_dict(), file)
    file.seek(0)
    again = RememberedWindows(2)
    again.load_state_dict(torch.load(file, weights_only=True), CPU)
    assert contents(again) == contents(windows)
    assert difference(again.unfinished().batches, windows.unfinished().batches) == ""
    again.load_state_dict({}, CPU)
    assert len(again) == 0


def test_tensors_go_back_to_the_device_where_they_were_and_the_others_stay() -> None:
    windows = RememberedWindows(1)
    windows.see({"x": torch.ones(1), "lengths": torch.ones(1)}, 0, first=True)
    state = windows.state_dict()
    assert state["on_device"] == [False, False]
    windows.load_state_dict({**state, "on_device": [True, False]}, torch.device("meta"))
    ((batch, _),) = windows.unfinished().batches
    assert batch["x"].device.type == "meta" and batch["lengths"].device.type == "cpu"


@pytest.mark.parametrize("batch", [Pair(torch.ones(1), "a"), Graph(torch.ones(1)), torch.ones(1).expand(2**23 * 3)])
def test_what_a_safe_checkpoint_cannot_hold_is_left_out(batch: Any) -> None:
    windows = RememberedWindows(1)
    windows.see(batch, 0, first=True)
    assert windows.state_dict() == {}
