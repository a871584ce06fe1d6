"""Any step and any data: whatever ``training_step`` touches is put back, and the run's batches are the run's."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from any_module import Regression, batches, examples, fit, highest, observer, same_state, unchanged
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler

from lightning_l2l import Displacement, LearnToLearn

# -- gradient checkpointing -------------------------------------------------------------------------------------------


class Blocks(Regression):
    reentrant: ClassVar[bool | None] = None

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16)), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        if self.reentrant is None:
            hidden = self.net[0](inputs)
        else:
            hidden = checkpoint(self.net[0], inputs.clone().requires_grad_(), use_reentrant=self.reentrant)
        return functional.mse_loss(self.net[2](torch.tanh(hidden)), targets)


@pytest.mark.feature("gradient checkpointing, reentrant or not", "works", topic="step")
@pytest.mark.parametrize("reentrant", [False, True])
def test_held_out_gradients_are_those_without_checkpointing(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    found = []
    for kind in (None, reentrant):
        monkeypatch.setattr(Blocks, "reentrant", kind)
        callback = observer()
        fit(Blocks, callback)
        found.append([(*r["held_out_cosine"], r["held_out_loss"]) for r in callback.history])
    assert found[0] == found[1] and all(math.isfinite(value) for row in found[0] for value in row)


# -- what a step may return -------------------------------------------------------------------------------------------


class Returns(Regression):
    """Sometimes something else than a loss, and now and then a batch that is broken."""

    what: ClassVar[Any] = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 3 == 1:
            return type(self).what(self, batch)
        return self.loss(batch)


RETURNED = {
    "None": lambda module, batch: None,
    "zero for NaN": lambda module, batch: 0.0 * module.loss(batch),
    "a dictionary": lambda module, batch: {"loss": module.loss(batch), "more": [1]},
    "a large constant": lambda module, batch: torch.full((), 50.0, requires_grad=True),
    "a negative loss": lambda module, batch: module.loss(batch) - 100,
}


@pytest.mark.feature("steps that return `None`, a constant, a dictionary, a negative loss", "works", topic="step")
@pytest.mark.filterwarnings("ignore:LearnToLearn")
@pytest.mark.parametrize("what", RETURNED)
def test_whatever_a_step_returns_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(Returns, "what", staticmethod(RETURNED[what]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `None`.*")
        assert unchanged(Returns, max_epochs=3)
        callback = LearnToLearn()
        trainer = fit(Returns, callback, max_epochs=10)
    assert trainer.callback_metrics["val_loss"] < 0.3
    assert not any(record["diagnostics"]["trouble"] for record in callback.history)


@pytest.mark.parametrize("shift", [-1.0, -1e4, 0.0])
def test_only_the_gradient_of_a_loss_counts(shift: float) -> None:
    class Shifted(Regression):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + shift

    shifted, plain = LearnToLearn(), LearnToLearn()
    fit(Shifted, shifted, max_epochs=8), fit(Regression, plain, max_epochs=8)
    assert shifted.learning_rates == plain.learning_rates


def test_a_likelihood_that_becomes_negative_is_learned_on() -> None:
    class Density(Regression):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))

        def loss(self, batch: Any) -> Tensor:
            mean, log_scale = self.net(batch[0]).unbind(1)
            return (log_scale + 0.5 * ((0.1 * batch[1][:, 0] - mean) / log_scale.exp()) ** 2).mean() + 0.9

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-4)

    callback = LearnToLearn()
    trainer = fit(Density, callback, max_epochs=25)
    assert trainer.callback_metrics["val_loss"] < 0
    below = [record for record in callback.history if record["training_loss"] < 0]
    assert below and len({record["learning_rates"][0] for record in below}) > 1
    assert not any(record["diagnostics"]["trouble"] for record in callback.history)


# -- what a step may touch --------------------------------------------------------------------------------------------


class Student(Regression):
    """A teacher that follows in place; a queue, a counter, a history and arrays in attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(64, 1))
        self.place = 0
        self.kept = {"losses": [], "last": deque(maxlen=3), "arrays": [np.zeros(3)], "tensors": {"sum": torch.zeros(1)}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            slow.data.mul_(0.99).add_(fast.data, alpha=0.01)
        self.net[0].weight.data.clamp_(-0.5, 0.5)  # the optimizer's own weights, in place
        targets = self.teacher(batch[0])
        self.queue[self.place : self.place + len(targets)] = targets
        self.place = (self.place + len(targets)) % 64
        loss = self.loss(batch) + 0.1 * (self.net(batch[0]) - self.queue.mean()).square().mean()
        self.kept["losses"].append(loss.item())
        self.kept["last"].append(loss.item())
        self.kept["arrays"][0] += 1
        self.kept["tensors"]["sum"] += loss.item()
        return loss + 0 * self.kept["arrays"][0][0] + 1e-3 * self.kept["tensors"]["sum"][0]


@pytest.mark.feature("teachers, queues and attributes that a step changes in place", "works", topic="step")
def test_whatever_a_step_changes_in_place_is_put_back() -> None:
    assert unchanged(Student)
    watched, plain = fit(Student, observer()), fit(Student)
    left, right = watched.lightning_module, plain.lightning_module
    assert left.place == right.place
    assert all(left.kept[name] == right.kept[name] for name in ("losses", "last"))
    assert np.array_equal(left.kept["arrays"][0], right.kept["arrays"][0])
    assert torch.equal(left.kept["tensors"]["sum"], right.kept["tensors"]["sum"])


def test_a_step_that_unfreezes_and_switches_modes_is_put_back() -> None:
    class Switches(Regression):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[0].weight.requires_grad_(not self.net[0].weight.requires_grad)
            self.net[1].train(batch_idx % 2 == 0)
            return self.loss(batch)

    assert unchanged(Switches)


class Neighbours(Regression):
    """A graph network, whose adjacency is a sparse buffer."""

    layout: ClassVar[Any] = torch.sparse_coo

    def __init__(self) -> None:
        super().__init__()
        near = torch.eye(8) + torch.eye(8).roll(1, 0)
        self.register_buffer("adjacency", near.to_sparse(layout=self.layout))

    def loss(self, batch: Any) -> Tensor:
        return functional.mse_loss(self.net(torch.sparse.mm(self.adjacency, batch[0].T).T), batch[1])


class Lost(Neighbours):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=10.0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:LearnToLearn. after step")
@pytest.mark.feature("sparse buffers, such as the adjacency of a graph", "works", topic="step")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_put_back_and_taken_back(monkeypatch: pytest.MonkeyPatch, layout: Any) -> None:
    monkeypatch.setattr(Neighbours, "layout", layout)
    callback = observer()
    module = fit(Neighbours, callback).lightning_module
    assert all(math.isfinite(record["held_out_loss"]) for record in callback.history)
    assert torch.equal(module.adjacency.to_dense(), Neighbours().adjacency.to_dense())
    diverges = LearnToLearn()
    module = fit(Lost, diverges, max_epochs=10).lightning_module
    assert any(record["diagnostics"]["trouble"] == "rolled_back" for record in diverges.history)
    assert torch.equal(module.adjacency.to_dense(), Neighbours().adjacency.to_dense())


@pytest.mark.feature("`trainer.should_stop` in a step", "works", topic="step")
def test_flags_of_the_trainer_that_a_held_out_call_sets_are_put_back() -> None:
    class Stops(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            if batch[0].mean() > 50:  # only the held-out batches
                self.trainer.should_stop = True
                self.trainer.limit_val_batches = 0
            return loss

    held_out = DataLoader(torch.utils.data.TensorDataset(torch.full((64, 8), 100.0), torch.zeros(64, 1)), 32)
    callback = observer(meta_data=held_out)
    trainer = fit(Stops, callback)
    assert trainer.global_step == 16 and not trainer.should_stop and trainer.limit_val_batches == 1.0
    assert all(math.isfinite(record["held_out_loss"]) for record in callback.history)


class Records(Logger):
    """A logger whose experiment counts what is written to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.written: list[Any] = []

    save_dir = property(lambda self: str(self.folder))
    name = property(lambda self: "records")
    version = property(lambda self: 7)
    experiment = property(lambda self: self)

    def add_scalar(self, *arguments: Any) -> None:
        self.written.append(arguments)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.written.append((metrics, step))


@pytest.mark.feature("a logger that a step uses", "works", "its attributes pass through", topic="step")
@pytest.mark.parametrize("kind", [Records, lambda folder: CSVLogger(folder)])
def test_a_logger_in_the_step_is_the_logger_but_for_writing(tmp_path: Path, kind: Any) -> None:
    class Writes(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert isinstance(self.logger, Logger) and self.logger.save_dir == str(tmp_path)
            assert int(self.logger.version) >= 0 and self.trainer.logger is self.logger is self.loggers[0]
            if hasattr(self.logger.experiment, "add_scalar"):
                self.logger.experiment.add_scalar("direct", 1.0, self.global_step)
            else:
                assert str(tmp_path) in str(self.logger.experiment.metrics_file_path)
            self.log("train_loss", 0.0)
            return self.loss(batch)

    logger = kind(tmp_path)
    callback = observer()
    fit(Writes, callback, logger=logger)
    assert callback.history
    if isinstance(logger, Records):
        assert sum(row[0] == "direct" for row in logger.written) == 16


@pytest.mark.feature("what other callbacks set up in their hooks", "works", topic="callback")
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_fit_start"])
@pytest.mark.parametrize("first", [True, False])
def test_what_another_callback_gives_the_module_is_there(hook: str, first: bool) -> None:
    class Weighted(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * self.weight

    class Gives(pl.Callback):
        pass

    setattr(Gives, hook, lambda self, trainer, module, *_: setattr(module, "weight", 1.0 + trainer.current_epoch))
    callback, other = observer(), Gives()
    fit(Weighted, *((other, callback) if first else (callback, other)))
    assert all(math.isfinite(record["held_out_loss"]) for record in callback.history)


# -- layers and clipping ----------------------------------------------------------------------------------------------


@pytest.mark.feature("`weight_norm`", "works", topic="step")
def test_weight_norm_is_learned_and_left_as_it_is() -> None:
    class Normed(Regression):
        def make_net(self) -> nn.Module:
            frozen = weight_norm(nn.Linear(8, 8)).requires_grad_(False)
            return nn.Sequential(frozen, weight_norm(nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)

    callback = LearnToLearn()
    fit(Normed, callback, max_epochs=6)
    assert highest(callback) > 2e-4
    assert unchanged(Normed)


class Clipped(Regression):
    """The gradients are a thousand times too large, and clipped to a hundredth."""

    def loss(self, batch: Any) -> Tensor:
        return 1e3 * super().loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def clip(module: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.01)


class InOnAfterBackward(Clipped):
    def on_after_backward(self) -> None:
        clip(self)


class BeforeTheStep(Clipped):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        clip(self)


class InConfigureGradientClipping(Clipped):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        clip(self)


class InTheStep(Clipped):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            clip(self)
            return loss

        optimizer.step(closure=closure)


@pytest.mark.feature("gradient clipping of your own, in any hook", "works", topic="step")
@pytest.mark.parametrize("kind", [InOnAfterBackward, BeforeTheStep, InConfigureGradientClipping, InTheStep])
def test_wherever_gradients_are_clipped_the_rates_are_those_of_the_trainers_clipping(kind: Any) -> None:
    own, trainers = LearnToLearn(), LearnToLearn()
    fit(kind, own, max_epochs=6), fit(Clipped, trainers, max_epochs=6, gradient_clip_val=0.01)
    assert own.learning_rates == pytest.approx(trainers.learning_rates, rel=1e-6)
    assert unchanged(kind)


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="came with Lightning 2.6")
@pytest.mark.filterwarnings("ignore:LearnToLearn")
@pytest.mark.feature(
    "`EMAWeightAveraging`, `WeightAveraging`", "works", "taken back with a run that was lost", topic="callback"
)
def test_a_run_that_is_taken_back_delivers_no_ruined_average() -> None:
    class Careless(Regression):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=3.0, momentum=0.9)

    callback = LearnToLearn()
    trainer = fit(Careless, callback, callbacks.EMAWeightAveraging(decay=0.99), max_epochs=25)
    assert any(record["diagnostics"]["trouble"] == "rolled_back" for record in callback.history)
    assert functional.mse_loss(trainer.lightning_module.net(examples(64, 5)[:][0]), examples(64, 5)[:][1]) < 1


# -- data -------------------------------------------------------------------------------------------------------------


class Sees(Regression):
    """Remembers every batch that the run itself trains or validates on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(batch[0].double().sum()))

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(float(batch[0].double().sum()))


class Holds(Sampler):
    """Cannot be copied: it holds a lock, as a data base or a file would be held."""

    def __init__(self, count: int) -> None:
        self.count, self.lock, self.generator = count, threading.Lock(), torch.Generator().manual_seed(4)

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.count, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.count


class Lazily(BatchSampler):
    """Yields generators instead of lists."""

    def __iter__(self) -> Any:
        return (iter(batch) for batch in super().__iter__())


class At(Dataset):
    """Examples by number; subclasses say how they are read."""

    def __init__(self, count: int = 96) -> None:
        self.inputs, self.targets = examples(count, seed=5)[:]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.targets[index]


class Several(At):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read by __getitems__ alone")

    def __getitems__(self, indices: list[int]) -> Any:
        return [(self.inputs[index], self.targets[index]) for index in indices]


class Augments(At):
    """Noise from a generator of its own, that of the loader's run: a read of ours must not advance it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.numpy, self.reads = torch.Generator().manual_seed(1), np.random.default_rng(2), 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        noise = torch.randn(8, generator=self.generator) + float(self.numpy.normal()) + 0.01 * self.reads
        return self.inputs[index] + 0.1 * noise, self.targets[index]


class OnlyWorkers(At):
    """Its file is opened by ``worker_init_fn``."""

    is_open = False

    def __getitem__(self, index: int) -> Any:
        assert self.is_open, "only a worker process can read this"
        return super().__getitem__(index)


def open_it(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.is_open = True


class Series(At):
    """Of different lengths, sorted: only neighbours fit into one batch."""

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index].expand(3 + index // 32, 8), self.targets[index]


class Stream(IterableDataset):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(8)

    def __iter__(self) -> Any:
        for inputs, targets in zip(*examples(96, seed=5)[:], strict=True):
            yield inputs + 0.1 * torch.randn(8, generator=self.generator), targets


class OfMean(Sees):
    def loss(self, batch: Any) -> Tensor:
        inputs = batch[0] if batch[0].dim() == 2 else batch[0].mean(1)
        return functional.mse_loss(self.net(inputs), batch[1])


class Batched:
    """No DataLoader at all."""

    def __iter__(self) -> Any:
        return iter(list(batches(96, seed=5)))


LOADERS: dict[str, Any] = {
    "a sampler that cannot be copied": lambda: DataLoader(At(), 32, sampler=Holds(96)),
    "batches that are generators": lambda: DataLoader(At(), batch_sampler=Lazily(SequentialSampler(At()), 32, False)),
    "__getitems__": lambda: DataLoader(Several(), 32),
    "a dataset with generators of its own": lambda: DataLoader(Augments(), 32, shuffle=True),
    "examples that fit to their neighbours only": lambda: DataLoader(Series(), 32),
    "an iterable dataset": lambda: DataLoader(Stream(), 32),
    "a loader's own generator": lambda: DataLoader(At(), 32, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "batch_size=None": lambda: DataLoader([tuple(batch) for batch in batches(96, seed=5)], batch_size=None),
    "an iterable of batches": Batched,
}


@pytest.mark.feature(
    "loaders of every kind: samplers, batch samplers, `__getitems__`, iterables, generators of their own",
    "works",
    topic="data",
)
@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*")
@pytest.mark.parametrize("kind", LOADERS)
def test_the_data_of_the_run_are_bit_for_bit_the_same(kind: str) -> None:
    callback = observer()
    watched = fit(OfMean, callback, val=LOADERS[kind](), train=DataLoader(Augments(), 32, shuffle=True))
    plain = fit(OfMean, val=LOADERS[kind](), train=DataLoader(Augments(), 32, shuffle=True))
    assert watched.lightning_module.seen == plain.lightning_module.seen and same_state(watched, plain)
    assert callback.history and all(math.isfinite(record["held_out_loss"]) for record in callback.history)


@pytest.mark.feature("data that only worker processes can read", "works", topic="data")
def test_data_that_only_workers_can_read_are_read_by_workers() -> None:
    def loader() -> DataLoader:
        return DataLoader(OnlyWorkers(), 32, num_workers=1, worker_init_fn=open_it, multiprocessing_context="fork")

    callback = observer()
    watched, plain = fit(Sees, callback, val=loader(), max_epochs=1), fit(Sees, val=loader(), max_epochs=1)
    assert watched.lightning_module.seen == plain.lightning_module.seen
    assert callback.history and all(math.isfinite(record["held_out_loss"]) for record in callback.history)


def test_an_iterator_that_cannot_be_started_again_is_not_read() -> None:
    iterator = iter(list(batches(96, seed=5)))
    callback = LearnToLearn(meta_data=iterator)
    with pytest.raises(RuntimeError, match="cannot be started again.*meta_data"):
        fit(Regression, callback)
    assert len(list(iterator)) == 3


# -- held-out batches that do not help --------------------------------------------------------------------------------


class Normed(Regression):
    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


class Keyed(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss((batch["inputs"], batch["targets"]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss((batch["inputs"], batch["labels"])))


def keyed(count: int, seed: int, target: str) -> DataLoader:
    return DataLoader([{"inputs": x, target: y} for x, y in examples(count, seed)], 32)


class NoGradient(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss.detach() if len(batch[0]) == 16 else loss


class Elsewhere(NoGradient):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.ones((), requires_grad=True) if len(batch[0]) == 16 else self.loss(batch)


UNHELPFUL: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one example and batch norm": (Normed, {"val": batches(40, 5, size=1)}, "more than 1 value per channel"),
    "other keys": (
        Keyed,
        {"train": keyed(256, 0, "targets"), "val": keyed(64, 5, "labels")},
        "KeyError: 'targets'",
    ),
    "a loss without a gradient": (NoGradient, {"val": batches(64, 5, size=16)}, "Tensor without a gradient"),
    "a loss of something else": (
        Elsewhere,
        {"val": batches(64, 5, size=16)},
        "does not depend on any trained parameter",
    ),
}


@pytest.mark.feature(
    "validation batches that are no training batches", "training gradients", "said once, with the reason", topic="data"
)
@pytest.mark.parametrize("kind", UNHELPFUL)
def test_held_out_batches_that_the_step_cannot_take_are_said_once_and_the_run_goes_on(kind: str) -> None:
    make, data, reason = UNHELPFUL[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(make, callback := LearnToLearn(), max_epochs=8, **data)
    said = [str(warning.message) for warning in caught if "to take a gradient" in str(warning.message)]
    assert len(said) == 1 and reason in said[0]
    for hint in ("LearnToLearn called", "a validation batch", "held_out_loss", "meta_data='train'"):
        assert hint in said[0]
    assert trainer.global_step == 64 and len(callback.history) > 2
    with pytest.raises(RuntimeError, match="LearnToLearn called"):
        fit(make, LearnToLearn(meta_data="val"), **data)


@pytest.mark.feature(
    "a held-out loss that means nothing",
    "works",
    "nothing rises any more, and nothing falls below the rate that was given",
    topic="data",
)
def test_a_held_out_loss_that_means_nothing_does_not_make_the_rate_collapse() -> None:
    class Meaningless(Regression):
        """On held-out batches the opposite of what is trained, as with anomalies or labelled images."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -self.loss(batch) if len(batch[0]) == 16 else self.loss(batch)

    callback = LearnToLearn(Displacement(final_decay=False))
    trainer = fit(Meaningless, callback, val=batches(64, 5, size=16), max_epochs=8)
    assert all(record["learning_rates"][0] >= 0.05 for record in callback.history)  # what was given
    with torch.no_grad():
        assert trainer.lightning_module.loss(examples(64, 5)[:]) < 0.3
    assert any(record["held_out_loss"] < 0 for record in callback.history)


@pytest.mark.feature("several validation loaders", "works", "the first one, and that is said", topic="data")
def test_of_several_loaders_the_first_is_taken() -> None:
    class Two(Regression):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch))

    found = []
    for first, second, kind in ((5, 6, list), (5, 7, list), (5, 6, dict), (6, 5, list)):
        val: Any = [batches(64, first), batches(64, second)]
        val = dict(zip("ab", val, strict=True)) if kind is dict else val
        callback = observer()
        fit(Two, callback, val=val)
        found.append([record["held_out_loss"] for record in callback.history])
    assert found[0] == found[1] == found[2] != found[3]
