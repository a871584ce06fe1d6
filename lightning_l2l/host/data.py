"""Batches for the unroll, without touching the iterators that the run itself reads from.

Training batches are remembered as they pass. Held-out batches, and the training batches of the initial search, are
drawn through a loader's dataset, sampler and ``collate_fn`` in an order of our own: the loader itself is never iterated,
because an iterator draws from the global random numbers and, with persistent workers, is shared with the run.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_l2l.host.isolation import isolated_random_state
from lightning_l2l.host.training_step import Window, copied_batch

# Enough to choose batches from; a larger dataset's sampler is not listed to its end.
_MOST_INDICES = 100_000
# Remembered batches up to this many bytes go into checkpoints, so that a run resumes exactly.
_LARGEST_SAVED = 64 * 2**20


class RememberedWindows:
    """The last few optimizer steps' batches.

    Args:
        length: How many optimizer steps to remember.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._windows: deque[Window] = deque(maxlen=length)
        self._open: list[tuple[Any, int]] = []

    def see(self, batch: Any, batch_index: int) -> None:
        """A micro-batch passes; it is copied, since the user's step may change it."""
        self._open.append((copied_batch(batch), batch_index))

    def close(self, divisor: int) -> None:
        """The optimizer has stepped on the micro-batches seen since the last time."""
        if self._open:
            self._windows.append(Window(tuple(self._open), divisor))
        self._open = []

    def forget(self) -> None:
        """Drop everything, an unfinished window too."""
        self._windows.clear()
        self._open = []

    def unfinished(self) -> Window:
        """The micro-batches seen since the optimizer last stepped; at least one."""
        return Window(tuple(self._open), len(self._open))

    def __len__(self) -> int:
        return len(self._windows)

    def last(self) -> list[Window]:
        """The windows, oldest first."""
        return list(self._windows)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly, or nothing if a batch is no plain container or is too large to save."""
        windows = [{"batches": list(window.batches), "divisor": window.divisor} for window in self._windows]
        state = {"windows": windows, "open": list(self._open)}
        size = _plain_size(state)
        return state if size is not None and size <= _LARGEST_SAVED else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; from nothing, start to remember anew."""
        self.forget()
        for window in state.get("windows", []):
            self._windows.append(Window(tuple(tuple(item) for item in window["batches"]), window["divisor"]))
        self._open = [tuple(item) for item in state.get("open", [])]


def _plain_size(value: Any) -> int | None:
    """Bytes of the tensors in plain containers; ``None`` if something else is in there that a checkpoint cannot hold."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if value is None or type(value) in (int, float, bool, str):
        return 0
    if type(value) is dict:
        value = [*value.keys(), *value.values()]
    if type(value) not in (list, tuple):
        return None
    sizes = [_plain_size(item) for item in value]
    return None if any(size is None for size in sizes) else sum(size for size in sizes if size is not None)


def first_loader(loaders: Any) -> Any:
    """The first loader of a loader, list, dictionary or ``CombinedLoader``; ``None`` for none."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.flattened
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return first_loader(loaders[0]) if loaders else None
    return loaders


def is_indexable(loader: Any) -> bool:
    """Whether batches can be drawn through the loader's dataset, without iterating the loader."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


class IndexedBatches:
    """Batches of a loader by number, drawn through its dataset: shuffled anew in every pass, the same for a seed.

    Args:
        loader: A loader for which :func:`is_indexable` holds; its sampler, batch size and ``collate_fn`` are respected.
        seed: The seed of the order.
        rank: Which batch of every ``world_size`` to take.
        world_size: The number of processes.

    Raises:
        ValueError: The loader has no batches.
    """

    def __init__(self, loader: DataLoader, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._loader = loader
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        with isolated_random_state(seed):
            # Copies, since listing a sampler may move its generator; it may also hold the split of the data.
            self._indices: list[Any] | None = None
            self._batches: list[Any] | None = None
            if loader.batch_size is not None and loader.sampler is not None:
                self._indices = list(islice(iter(copy.deepcopy(loader.sampler)), _MOST_INDICES))
                self._per_pass = math.ceil(len(self._indices) / loader.batch_size)
            else:
                source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
                self._batches = list(islice(iter(copy.deepcopy(source)), _MOST_INDICES))
                self._per_pass = len(self._batches)
        if self._per_pass == 0:
            raise ValueError("The held-out loader has no batches: there is nothing to judge the learning rate by.")

    def batch(self, number: int) -> Any:
        """The raw batch with this number, from 0 upwards without end."""
        number = number * self._world_size + self._rank
        the_pass, place = divmod(number, self._per_pass)
        generator = torch.Generator().manual_seed(self._seed + the_pass)
        dataset, collate = self._loader.dataset, self._loader.collate_fn
        if self._batches is not None:
            chosen = self._batches[int(torch.randperm(self._per_pass, generator=generator)[place])]
        else:
            assert self._indices is not None and self._loader.batch_size is not None
            size = self._loader.batch_size
            order = torch.randperm(len(self._indices), generator=generator)
            chosen = [self._indices[index] for index in order[place * size : (place + 1) * size].tolist()]
        with isolated_random_state(self._seed + number):
            if self._loader.batch_size is None and self._loader.batch_sampler is None:
                return collate(dataset[chosen])  # the dataset makes its own batches
            return collate([dataset[index] for index in chosen])


class StreamedBatches:
    """Batches of a loader that can only be iterated, in its own order, over and over.

    Args:
        loader: Any iterable of batches.
        seed: The seed of what the loader draws.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._next = 0
        self._iterator: Iterator[Any] | None = None

    def batch(self, number: int) -> Any:
        """The raw batch with this number; numbers must not decrease.

        Raises:
            ValueError: The loader has no batches.
        """
        batch: Any = None
        while self._next <= number:
            with isolated_random_state(self._seed + self._next):
                batch = self._advance()
            self._next += 1
        return batch

    def _advance(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self._loader)
            batch = next(self._iterator, _END)
            if batch is not _END:
                return batch
            self._iterator = None
        raise ValueError("The held-out loader has no batches: there is nothing to judge the learning rate by.")


_END = object()
