"""Held-out gradients: batches that the run does not miss, taken by the user's own step, in place, and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate
from torch.utils.data.distributed import DistributedSampler

from lightning_l2l.host import lightning_api
from lightning_l2l.host.isolation import unnoticed
from lightning_l2l.preserve import PreservedTensors, local, preserved_generators, preserved_random_state
from lightning_l2l.tuner import HeldOutError, mean_over_processes

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Between the seeds of two processes, so that their dropout masks differ; a prime, larger than most runs are long.
SEED_STRIDE = 15_485_863


class HeldOut:
    """Takes held-out gradients in a Lightning run.

    Args:
        trainer: The Trainer, once there are optimizers.
        module: The user's module.
        batches: Gives the batch with a number, as the step takes it.
        source: What these batches are, in words.
        loss: ``loss(module, batch)`` in place of ``training_step``.
        seed: Of what the step draws.

    Attributes:
        batches: As given.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batches: Callable[[int], Any],
        *,
        source: str,
        loss: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self.batches = batches
        self._source = source
        self._loss = loss
        self._seed = seed
        self._tensors = PreservedTensors([module], *lightning_api.real_optimizers(trainer))
        self._trained = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]

    @contextmanager
    def gradient(self, number: int, before: Callable[[], None] | None = None) -> Iterator[Tensor]:
        """Inside, the trained parameters hold the held-out gradient in ``.grad``; all is put back afterwards.

        On several processes it is the mean over their batches.

        Args:
            number: The number of the batch.
            before: Called first, with everything saved; it may move the parameters.

        Yields:
            The loss, detached.

        Raises:
            HeldOutError: There was no batch, the step raised, returned nothing, or a loss without a gradient; on every
                process if on one.
        """
        trainer, module = self._trainer, self._module
        seed = self._seed + number + trainer.global_rank * SEED_STRIDE
        with self._tensors(), unnoticed(trainer, module, seed):
            error: Exception | None = None
            loss = torch.zeros((), device=module.device)
            try:
                batch = self.batches(number)
                if before is not None:
                    before()
                loss = self._evaluate(batch)
                (loss * lightning_api.loss_scale(trainer)).backward()
                if all(parameter.grad is None for parameter in self._trained):
                    raise ValueError("the loss does not depend on any trained parameter")
            except Exception as caught:  # whatever the user's step raises; raised again below, with the way out
                error = caught
            failed = error is not None
            if trainer.world_size > 1:
                failed = bool(
                    trainer.strategy.reduce(torch.tensor(float(failed), device=module.device), reduce_op="max")
                )
            if failed:
                raise HeldOutError(self._explain(error)) from error
            yield mean_over_processes(loss.detach(), self._trained)

    def _evaluate(self, batch: Any) -> Tensor:
        if self._loss is not None:
            loss: Any = self._loss(self._module, batch)
        else:
            loss = lightning_api.run_training_step(self._trainer, self._module, batch)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            what = "None" if loss is None else f"a {type(loss).__name__} without a gradient"
            raise ValueError(f"it returned {what}")
        return loss

    def _explain(self, error: Exception | None) -> str:
        called = "held_out_loss" if self._loss is not None else f"{type(self._module).__name__}.training_step"
        what = "on another process" if error is None else f"{type(error).__name__}: {error}"
        return (
            f"LearnToLearn called {called} on {self._source} to take a gradient, and that failed ({what}). If such "
            "batches are no training batches, pass LearnToLearn(held_out_loss=fn), where fn(module, batch) returns the "
            "loss that counts; or meta_data=loader with batches that training_step takes; or meta_data='train', which "
            "learns from the training gradients alone."
        )


class ValidationBatches:
    """Held-out batches by number, as the user's step takes them: of the Trainer's first validation loader, or another.

    Args:
        trainer: The Trainer.
        module: The user's module.
        loader: The loader.
        is_own: Whether it is the Trainer's, which may be replaced while the run goes on.
        seed: Of the order of the batches.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any, *, is_own: bool, seed: int
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._is_own = is_own
        self._seed = seed
        self._use(loader)

    def _use(self, loader: Any) -> None:
        self._loader = loader
        limit = lightning_api.overfitted_batches(self._trainer) if self._is_own else None
        self._batches = Batches(loader, seed=self._seed, limit=limit)

    def __call__(self, number: int) -> Any:
        """The batch with this number; another one on each process, unless the loader gives each its own."""
        if self._is_own:
            present, _ = lightning_api.first_loader(self._trainer.val_dataloaders)
            if present is not None and present is not self._loader:  # reload_dataloaders_every_n_epochs
                self._use(present)
        if not isinstance(getattr(self._loader, "sampler", None), DistributedSampler):
            number = number * self._trainer.world_size + self._trainer.global_rank
        return lightning_api.moved_batch(self._trainer, self._module, self._batches[number])


class Batches:
    """Batches of a loader by number, from 0 upwards, without touching the iterators and generators of the run.

    Where the loader shuffles, or lists its examples in order, examples are drawn at random through its dataset:
    validation data are often sorted by class. Where a sampler of the user's own decides what belongs together, or the
    examples do not fit together, whole batches are drawn in a random order. A loader that can only be iterated, or
    whose data only its worker processes can read, is iterated by an iterator of our own, over and over.

    Args:
        loader: Any iterable of batches.
        seed: The seed of the order.
        limit: Use only the first so many batches.
    """

    def __init__(self, loader: Any, *, seed: int, limit: int | None = None) -> None:
        self._loader = loader
        self._seed = seed
        self._limit = limit
        self._iterator: Iterator[Any] | None = None
        # Functions, not bound methods: a cycle would leave worker processes to the garbage collector.
        self._kinds = [Batches._streamed]
        if _is_indexable(loader):
            self._kinds = [Batches._grouped, Batches._streamed]
            if type(loader.sampler) in (RandomSampler, SequentialSampler) and loader.batch_size is not None:
                self._kinds = [Batches._drawn, Batches._grouped, Batches._streamed]

    def __getitem__(self, number: int) -> Any:
        """The raw batch with this number; numbers should increase.

        Raises:
            ValueError: The loader has no batches, or is an iterator that cannot be started again.
        """
        with preserved_random_state(self._seed + number):
            while True:
                try:
                    return self._kinds[0](self, number)
                except Exception:
                    if len(self._kinds) == 1:
                        raise
                    del self._kinds[0]  # this loader cannot be read that way; the next one asks less of it

    def _drawn(self, number: int) -> Any:
        size = self._loader.batch_size
        examples = len(self._loader.dataset)
        if self._limit is not None:
            examples = min(examples, self._limit * size)
        per_pass = max(1, examples // size)
        order = torch.randperm(examples, generator=self._generator(number // per_pass))
        place = number % per_pass
        return self._fetched(order[place * size : (place + 1) * size].tolist())

    def _grouped(self, number: int) -> Any:
        with preserved_generators(self._loader.batch_sampler), preserved_generators(self._loader.sampler):
            groups = [list(group) for group in islice(iter(self._loader.batch_sampler), self._limit)]
        if len(groups) > 1 and len(groups[-1]) < len(groups[0]):
            del groups[-1]  # a step on a few examples may fail (batch normalisation)
        order = torch.randperm(len(groups), generator=self._generator(number // len(groups)))
        return self._fetched(groups[order[number % len(groups)]])

    def _generator(self, the_pass: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed + the_pass)

    def _fetched(self, indices: list[Any]) -> Any:
        dataset, collate = self._loader.dataset, self._loader.collate_fn or default_collate
        with preserved_generators(dataset):
            several = getattr(dataset, "__getitems__", None)
            return collate(several(indices) if several else [dataset[index] for index in indices])

    def _streamed(self, number: int) -> Any:
        if self._iterator is None:
            loader = self._loader
            if iter(loader) is loader if not isinstance(loader, DataLoader) else False:
                raise ValueError(
                    "the loader is an iterator that cannot be started again, so reading it would use it up"
                )
            if isinstance(loader, DataLoader):
                own = copy.copy(loader)  # its persistent workers are the run's
                own._iterator = None
                loader = own
            self._iterator = _endless(loader, self._limit)
        with preserved_generators(self._loader):  # and those of its data set and sampler
            return next(self._iterator)


def _endless(loader: Any, limit: int | None) -> Iterator[Any]:
    size: int | None = None
    while True:
        count = 0
        for batch in islice(iter(loader), limit):
            count += 1
            own = _examples(batch)
            # A last batch that is shorter than the others is left out.
            if size is None or own is None or own >= size:
                size = own
                yield batch
        if not count:
            raise ValueError("the loader has no batches: is its dataset empty?")


def _is_indexable(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        and loader.worker_init_fn is None  # it may set up what the dataset reads from
    )


def _examples(batch: Any) -> int | None:
    """The number of examples: the length of the first tensor; ``None`` if there is none, or nobody can tell."""
    found: list[int] = []
    with suppress(TypeError, ValueError):  # of a class that cannot be made again of its items: not asked here
        apply_to_collection(batch, Tensor, lambda tensor: found.append(len(local(tensor)) if tensor.dim() else 0))
    return found[0] if found else None
