"""Batches by number, without touching the iterators that the run itself reads from.

Held-out batches, and the training batches of the initial search, are drawn through a loader's dataset, sampler and
``collate_fn`` in an order of our own: the loader itself is never iterated, because an iterator draws from the global
random numbers and, with persistent workers, is shared with the run. A loader that can only be iterated is read through
a copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_l2l.host.isolation import isolated_random_state

# Enough to choose batches from; a larger dataset's sampler is not listed to its end.
_MOST_INDICES = 100_000


def first_loader(loaders: Any) -> Any:
    """The first loader of a loader, list, dictionary or ``CombinedLoader``; ``None`` for none."""
    # By attribute, since `pytorch_lightning` has a CombinedLoader of its own.
    if type(loaders).__name__ == "CombinedLoader":
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


def is_sharded(loader: Any) -> bool:
    """Whether each process gets other examples from the loader than the others."""
    return isinstance(getattr(loader, "sampler", None), DistributedSampler)


class EmptyLoaderError(ValueError):
    """A loader without batches."""

    def __init__(self) -> None:
        super().__init__(
            "LearnToLearn found no batch in the loader that it judges or searches the learning rate by. Is its "
            "dataset empty, or drop_last=True with a batch_size above the size of the dataset?"
        )


class IndexedBatches:
    """Batches of a loader by number, drawn through its dataset: shuffled anew in every pass, the same for a seed.

    A last batch that is shorter than the others is left out: a training step on one example may fail (batch
    normalisation), and would be judged by it.

    Args:
        loader: A loader for which :func:`is_indexable` holds; its sampler, batch size and ``collate_fn`` are respected.
        seed: The seed of the order.
        limit: Use only the first so many batches.

    Raises:
        EmptyLoaderError: The loader has no batches.
    """

    def __init__(self, loader: DataLoader, seed: int, limit: int | None = None) -> None:
        self._loader = loader
        self._seed = seed
        self._batches: list[Any] | None = None
        self._indices: Sequence[Any] = []
        with isolated_random_state(seed):
            # Copies, since listing a sampler may move its generator; it may also hold the split of the data.
            if loader.batch_size is not None and loader.sampler is not None:
                most = _MOST_INDICES if limit is None else limit * loader.batch_size
                self._indices = list(islice(iter(_without_data(loader.sampler, loader)), most))
                whole = len(self._indices) // loader.batch_size
                self._per_pass = whole if loader.drop_last else max(whole, min(1, len(self._indices)))
            else:
                source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
                most = _MOST_INDICES if limit is None else limit
                batches = list(islice(iter(_without_data(source, loader)), most))
                if loader.batch_sampler is not None and len(batches) > 1 and len(batches[-1]) < len(batches[-2]):
                    del batches[-1]
                self._batches, self._per_pass = batches, len(batches)
        if self._per_pass == 0:
            raise EmptyLoaderError

    def batch(self, number: int) -> Any:
        """The raw batch with this number, from 0 upwards without end."""
        the_pass, place = divmod(number, self._per_pass)
        generator = torch.Generator().manual_seed(self._seed + the_pass)
        dataset, collate = self._loader.dataset, self._loader.collate_fn
        if self._batches is not None:
            chosen = self._batches[int(torch.randperm(self._per_pass, generator=generator)[place])]
        else:
            size = self._loader.batch_size
            assert size is not None
            order = torch.randperm(len(self._indices), generator=generator)
            chosen = [self._indices[index] for index in order[place * size : (place + 1) * size].tolist()]
        with isolated_random_state(self._seed + number):
            if self._loader.batch_size is None and self._loader.batch_sampler is None:
                return collate(dataset[chosen])  # the dataset makes its own batches
            return collate([dataset[index] for index in chosen])


def _without_data(sampler: Any, loader: DataLoader) -> Any:
    """A copy of a sampler with generators of its own, but with the same dataset: that may be large."""
    return copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})


class StreamedBatches:
    """Batches of a loader that can only be iterated, in its own order, over and over.

    A last batch that is shorter than the one before is left out, as in :class:`IndexedBatches`. With worker processes
    the dataset is read in processes of our own. Without, the run and this class share the dataset object, as two
    loaders over it would.

    Args:
        loader: Any iterable of batches.
        seed: The seed of what the loader draws.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = _unshared(loader)
        self._seed = seed
        self._number = -1
        self._batch: Any = None
        self._batches = self._endless()

    def batch(self, number: int) -> Any:
        """The raw batch with this number; numbers must not decrease.

        Raises:
            EmptyLoaderError: The loader has no batches.
        """
        while self._number < number:
            with isolated_random_state(self._seed + self._number + 1):
                self._batch = next(self._batches)
            self._number += 1
        return self._batch

    def _endless(self) -> Iterator[Any]:
        while True:
            iterator = iter(self._loader)
            batch = next(iterator, _END)
            if batch is _END:
                raise EmptyLoaderError
            size = None
            while batch is not _END:
                following = next(iterator, _END)
                own = _examples(batch)
                if following is not _END or size is None or own is None or own >= size:
                    yield batch
                size, batch = own, following


_END = object()


def _unshared(loader: Any) -> Any:
    """The loader itself, or one like it whose persistent workers are not the run's."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader
    own = copy.copy(loader)
    own._iterator = None
    if own.generator is not None:
        own.generator = copy.deepcopy(own.generator)
    return own


def _examples(batch: Any) -> int | None:
    """The number of examples: the length of the first tensor; ``None`` if there is none."""
    found: list[int] = []
    apply_to_collection(batch, torch.Tensor, lambda tensor: found.append(len(tensor) if tensor.dim() else 0))
    return found[0] if found else None
