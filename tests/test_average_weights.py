"""Returned weights: the averages are validated, saved and left in the module; the training knows nothing of it."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsdp_runs
import numpy as np
import pytest
import torch
from helpers import (
    Deterministic,
    MemoryLogger,
    Plain,
    Resumable,
    Rich,
    Saves,
    Witness,
    difference,
    learner,
    loader,
    loaders,
    outcome,
    sgd,
)
from launch import launch
from lightning.pytorch import callbacks, strategies
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live_memory import LiveMemory
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_l2l import LearnToLearn, Unroll
from lightning_l2l.displacement import RunningAverage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
]

MOMENTUM = sgd(0.1, momentum=0.9)
ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731


def returning(**options: Any) -> LearnToLearn:
    return learner(**{"average_weights": True, **options})


def resumable() -> dict[str, Any]:
    return {"train_dataloaders": Resumable(), "val_dataloaders": loaders()["val_dataloaders"]}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Follows(Callback):
    """The slow twin: after step t the average moves by 9 / (t + 9) of the way, in double precision."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.average: dict[str, Tensor] = {}
        self.validated: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        for name, parameter in pl_module.named_parameters():
            self.average[name] += 9 / (step + 9) * (parameter.detach().double() - self.average[name])
        self.trained.append(weights(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(weights(pl_module))
            self.averages.append(copy.deepcopy(self.average))


def assert_average(found: Any, average: dict[str, Tensor], absolute: float = 1e-6, relative: float = 0.0) -> None:
    for name, expected in average.items():
        assert torch.allclose(found[name].double(), expected, rtol=relative, atol=absolute), name


# -- the training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 2}, {"precision": "bf16-true"}, {"num_sanity_val_steps": 1}]
)
def test_the_training_is_bit_for_bit_that_without_the_option(trainer: Any, tmp_path: Path, options: Any) -> None:
    found = []
    for number, average in enumerate((False, True)):
        witness, follows, module = Witness(), Follows(), Rich(ADAM)
        callback = learner(average_weights=average)
        saves = [Saves(tmp_path / f"{number}-{step}.ckpt", step) for step in (3, 9)]
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        fitted = trainer(callback, witness, follows, *saves, max_epochs=3, logger=MemoryLogger(), **options)
        fitted.fit(module, **loaders())
        left = outcome(fitted, module)
        rows = [row for row in left["rows"] if "val_loss" not in row]
        seen = {"batches": witness.batches, "changes": witness.changes, "rates": witness.rates, "rows": rows}
        keys = ("attributes", "optimizer", "schedulers", "torch", "numpy", "python")
        found.append({**seen, **{key: left[key] for key in keys}})
        assert rows and left["rows"] != rows
        found[-1] |= {"trained": follows.trained, "progress": left["progress"], "history": callback.history}
    assert difference(*found) == "" and len(follows.trained) == 18
    assert difference(follows.trained[-1], weights(module)) != ""  # what is returned is something else


# -- what is validated -------------------------------------------------------------------------------------------------


def fit(trainer: Any, callback: Any, *others: Any, module: Any = None, data: Any = None, **options: Any) -> Any:
    module = module or Deterministic(MOMENTUM)
    resume = options.pop("resume", None)
    fitted = trainer(callback, *others, **{"max_epochs": 4, **options})
    fitted.fit(module, **(data or resumable)(), ckpt_path=resume, weights_only=None if resume is None else True)
    return fitted, module, callback


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"num_sanity_val_steps": 2}])
def test_validation_sees_the_averages_and_the_training_its_weights_again(trainer: Any, options: Any) -> None:
    class Looks(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.before = follows.trained[-1] if follows.trained else None

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.before is None or difference(self.before, weights(pl_module)) == ""

    follows = Follows()
    fit(trainer, returning(), Looks(), follows, **options)
    assert len(follows.validated) >= 4
    for found, average in zip(follows.validated, follows.averages, strict=True):
        assert_average(found, average)
    assert difference(follows.validated[-1], follows.trained[-1]) != ""


def test_hooks_of_the_module_around_a_validation_see_what_was_validated(trainer: Any) -> None:
    class Module(Deterministic):
        def on_validation_start(self) -> None:
            self.seen = [self.net[0].weight.clone()]

        def on_validation_epoch_end(self) -> None:
            self.seen.append(self.net[0].weight.clone())

    follows = Follows()
    _, module, _ = fit(trainer, returning(), follows, module=Module(MOMENTUM))
    assert all(torch.equal(seen, follows.validated[-1]["net.0.weight"]) for seen in module.seen)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_validation_that_raises(trainer: Any, tmp_path: Path, kind: Any) -> None:
    class Raises(Deterministic):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 12:
                raise kind

    follows = Follows()
    callback, module, saves = returning(), Raises(MOMENTUM), OnExceptionCheckpoint(tmp_path)
    with pytest.raises((RuntimeError, SystemExit)), pytest.warns(UserWarning):
        fit(trainer, callback, follows, saves, module=module, enable_checkpointing=True)
    if kind is RuntimeError:
        assert difference(follows.trained[-1], weights(module)) == ""
    else:  # the end that somebody has chosen
        assert_average(weights(module), follows.average)
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert_average(checkpoint["state_dict"], follows.average)
    assert difference(follows.trained[-1], dict(checkpoint["current_model_state"])) == ""


def test_the_end_of_the_fit_leaves_the_averages_and_no_training_weights(trainer: Any) -> None:
    follows = Follows()
    fitted, module, callback = fit(trainer, returning(), follows)
    assert_average(weights(module), follows.average)
    assert difference(follows.trained[-1], weights(module)) != ""
    held = [tensor for state in callback.state_dict()["tuners"] for tensor in state["average"]["average"]]
    assert held == []
    (found,) = fitted.validate(module, loader(24, seed=1), verbose=False)
    assert_average(weights(module), follows.average) and found["val_loss"] > 0


@pytest.mark.filterwarnings("ignore:LearnToLearn. after step")
def test_after_a_rollback_the_average_is_one_of_good_weights(trainer: Any) -> None:
    class Broken(Deterministic):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            broken = self.global_step == 6 and "log" not in vars(self)
            return super().training_step((batch[0] * (float("nan") if broken else 1), batch[1]), batch_idx)

    _, module, callback = fit(trainer, returning(), module=Broken(MOMENTUM))
    assert any(record["diagnostics"]["trouble"] == "rolled_back" for record in callback.history)
    assert all(torch.isfinite(value).all() for value in weights(module).values())


def test_a_rate_that_is_only_observed_returns_averages_too(trainer: Any) -> None:
    follows = Follows()
    _, module, callback = fit(trainer, returning(meta_learning_rate=0), follows)
    assert callback.learning_rates == [0.1]
    assert_average(weights(module), follows.average)


def test_exact_unrolls_return_averages_too(trainer: Any) -> None:
    class Smooth(Plain):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    trained = []
    for average in (False, True):
        follows = Follows()
        callback = learner(estimator=Unroll(steps=2), average_weights=average)
        _, module, _ = fit(trainer, callback, follows, module=Smooth(MOMENTUM))
        trained.append(follows.trained)
    assert difference(*trained) == "" and "meta_gradient" in callback.history[-1]
    assert_average(weights(module), follows.average)


# -- statistics of batch normalisation ---------------------------------------------------------------------------------


class Sees(Callback):
    """The batches of the training, and the statistics in each validation."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.validated: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.batches.append(batch)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append((len(self.batches), weights(pl_module)))


def test_statistics_of_batch_normalisation_are_those_of_the_averages_on_the_last_batches(trainer: Any) -> None:
    sees = Sees()
    _, module, _ = fit(trainer, returning(), sees)
    assert len({count for count, _ in sees.validated}) == 4
    for count, found in sees.validated:
        net = Deterministic().net
        net.load_state_dict({name.removeprefix("net."): value for name, value in found.items()})
        net[1].reset_running_stats()
        net[1].momentum = None
        for inputs, _ in sees.batches[:count][-8:]:
            net(inputs)
        for name in ("running_mean", "running_var"):
            assert torch.allclose(getattr(net[1], name), found[f"net.1.{name}"], rtol=1e-5, atol=1e-6)
    assert torch.equal(module.net[1].running_mean, sees.validated[-1][1]["net.1.running_mean"])


def test_layers_that_evaluate_in_the_training_keep_their_statistics_and_evaluate_for_those_of_others(
    trainer: Any,
) -> None:
    class Frozen(Deterministic):
        def make_net(self) -> nn.Module:
            return nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
            )

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[1].eval()

    sees = Sees()
    _, module, _ = fit(trainer, returning(), sees, module=Frozen(MOMENTUM))
    assert torch.equal(module.net[1].running_mean, torch.zeros(8)) and not module.net[1].training
    expected = copy.deepcopy(module.net)
    expected[3].reset_running_stats()
    expected[3].momentum = None
    for inputs, _ in sees.batches[-8:]:
        expected(inputs)
    assert torch.allclose(expected[3].running_mean, module.net[3].running_mean, rtol=1e-5, atol=1e-6)
    assert module.net[3].momentum == 0.1 and module.net[3].num_batches_tracked == 24


class Bag(dict):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__(inputs=inputs, targets=targets)


@dataclass(frozen=True)
class Frozen:
    inputs: Tensor
    targets: Tensor


@pytest.mark.filterwarnings("error:LearnToLearn")
@pytest.mark.parametrize("kind", [Bag, Frozen])
def test_batches_of_classes_that_cannot_be_made_again_of_their_items(trainer: Any, kind: Any) -> None:
    class Takes(Deterministic):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

        def loss(self, batch: Any) -> Tensor:
            values = batch if kind is Bag else vars(batch)
            return super().loss((values["inputs"], values["targets"]))

    def run(make: Any, module: Any) -> Any:
        data = [make(*batch) for batch in [*loader(), *loader(16, seed=1)]]
        train, held_out = (
            DataLoader(part, batch_size=None, collate_fn=lambda batch: batch) for part in (data[:6], data[6:])
        )
        callback = returning(meta_data="auto")
        fit(trainer, callback, module=module, data=lambda: {"train_dataloaders": train, "val_dataloaders": held_out})
        assert callback.history[-1]["held_out_cosine"]
        return weights(module), callback.history

    found = [run(kind, Takes(MOMENTUM)), run(lambda *tensors: list(tensors), Deterministic(MOMENTUM))]
    assert difference(*found) == ""


def test_a_step_that_cannot_be_taken_for_statistics_leaves_those_of_the_training(trainer: Any) -> None:
    class Needs(Deterministic):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not torch.is_grad_enabled():
                raise RuntimeError("a gradient penalty")
            return super().training_step(batch, batch_idx)

    follows = Follows()
    with pytest.warns(UserWarning, match=r"anew for the averaged weights, and that failed \(a gradient penalty\)"):
        _, module, _ = fit(trainer, returning(), follows, module=Needs(MOMENTUM))
    assert_average(weights(module), follows.average)
    assert torch.equal(module.net[1].running_mean, follows.trained[-1]["net.1.running_mean"])


# -- checkpoints -------------------------------------------------------------------------------------------------------


class InValidation(Callback):
    """A checkpoint while the averages are validated."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_checkpoints_have_the_averages_and_the_weights_of_the_training(trainer: Any, tmp_path: Path) -> None:
    follows = Follows()
    saving = ModelCheckpoint(tmp_path, filename="best", save_last=True)
    lean = ModelCheckpoint(tmp_path, filename="lean", save_weights_only=True, every_n_epochs=2)
    callbacks = [InValidation(tmp_path / "inside.ckpt"), saving, lean]
    _, module, _ = fit(trainer, returning(), follows, *callbacks, enable_checkpointing=True)
    for name in ("best", "last", "inside", "lean"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert_average(checkpoint["state_dict"], follows.average)
        assert difference(dict(checkpoint["state_dict"]), weights(module)) == ""
        if name != "lean":
            assert difference(follows.trained[-1], dict(checkpoint["current_model_state"])) == ""

    class Loaded(Deterministic):
        def __init__(self) -> None:
            super().__init__(MOMENTUM)

    deployed = Loaded.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert difference(weights(deployed), weights(module)) == ""


def assert_same(whole: Any, again: Any) -> None:
    (first, module, expected), (second, resumed, found) = whole, again
    for key in ("state", "optimizer", "schedulers", "progress", "metrics"):
        assert difference(outcome(first, module)[key], outcome(second, resumed)[key]) == "", key
    assert difference(expected.history, found.history) == "" and expected.history
    assert difference(expected.state_dict(), found.state_dict()) == ""


@pytest.mark.feature(
    "averaged weights returned (`average_weights=True`)", "works", "resumed bit for bit", topic="callback"
)
@pytest.mark.parametrize("largest", [2**26, 10])
def test_resumed_equals_uninterrupted(trainer: Any, tmp_path: Path, monkeypatch: Any, largest: int) -> None:
    monkeypatch.setattr("lightning_l2l.tuner.LARGEST_SAVED", largest)
    steps = (3, 7, 12)
    whole = fit(trainer, returning(), *[Saves(tmp_path / f"{step}.ckpt", step) for step in steps], Follows())
    for step in steps:
        follows = Follows()
        assert_same(whole, fit(trainer, returning(), follows, resume=tmp_path / f"{step}.ckpt"))
        trained = whole[0].callbacks[-1].trained[step:]
        assert difference(trained, follows.trained) == "" and len(trained) == 24 - step


def test_resumed_from_a_checkpoint_in_a_validation(trainer: Any, tmp_path: Path) -> None:
    follows, again = Follows(), Follows()
    fit(trainer, returning(), InValidation(tmp_path / "inside.ckpt"), follows, max_epochs=2)
    checkpoint = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"]["LearnToLearn"]["tuners"]
    names = [name for name, _ in Deterministic().named_parameters()]
    assert_average(dict(zip(names, state["average"]["average"], strict=True)), follows.average)
    fit(trainer, returning(), again, resume=tmp_path / "inside.ckpt", max_epochs=3)
    assert again.trained and difference(follows.trained[-1], again.trained[0]) != ""


@pytest.mark.parametrize("largest", [2**26, 10])
def test_resumed_without_the_option_goes_on_from_the_weights_of_the_training(
    trainer: Any, tmp_path: Path, monkeypatch: Any, largest: int
) -> None:
    monkeypatch.setattr("lightning_l2l.tuner.LARGEST_SAVED", largest)
    fit(trainer, returning(), Saves(tmp_path / "x.ckpt", 7))
    follows = Follows()
    _, expected, whole = fit(trainer, learner())
    _, module, callback = fit(trainer, learner(), follows, resume=tmp_path / "x.ckpt")
    assert difference(weights(expected), weights(module)) == "" and difference(whole.history, callback.history) == ""


def test_a_checkpoint_of_a_run_without_the_option_is_resumed_with_it(
    trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(trainer, learner(), Saves(tmp_path / "x.ckpt", 7))
    whole, again = Follows(), Follows()
    _, expected, _ = fit(trainer, returning(), whole)
    with caplog.at_level("INFO", "lightning.pytorch"):
        _, module, _ = fit(trainer, returning(), again, resume=tmp_path / "x.ckpt")
    assert difference(whole.trained[7:], again.trained) == "" and "saved without average_weights=True" in caplog.text
    assert difference(weights(expected), weights(module)) == ""  # the callback's state had it


def test_a_checkpoint_of_after_the_fit_is_resumed_from_the_averages_and_that_is_said(
    trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class First(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.weights = weights(pl_module)

    fitted, module, _ = fit(trainer, returning())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    first = First()
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(trainer, returning(), first, resume=tmp_path / "x.ckpt", max_epochs=5)
    assert "or after the fit. The training goes on from its state_dict" in caplog.text
    assert difference(weights(module), first.weights) == ""


def test_complex_weights_are_returned_and_resumed_as_averages(trainer: Any, tmp_path: Path) -> None:
    class Complex(Deterministic):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 8, dtype=torch.complex64), nn.Linear(8, 3, dtype=torch.complex64))

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0].to(torch.complex64)).abs(), batch[1])

    saves = Saves(tmp_path / "x.ckpt", 7)
    whole = fit(trainer, returning(), saves, module=Complex(MOMENTUM))
    again = fit(trainer, returning(), module=Complex(MOMENTUM), resume=tmp_path / "x.ckpt")
    assert_same(whole, again)
    assert difference(weights(whole[1]), dict(torch.load(tmp_path / "x.ckpt")["current_model_state"])) != ""


def test_without_the_callback_a_checkpoint_is_one_of_the_averages(trainer: Any, tmp_path: Path) -> None:
    class Tested(Deterministic):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

    class First(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.weights = weights(pl_module)

    follows, first, callback = Follows(), First(), returning()
    fit(trainer, callback, Saves(tmp_path / "x.ckpt", 24), follows)
    fit(trainer, first, resume=tmp_path / "x.ckpt", max_epochs=5)
    assert_average(first.weights, follows.average)
    for present in ([], [callback], [returning()], [learner()]):
        module = Tested(MOMENTUM)
        trainer(*present).test(module, loader(24, 1), ckpt_path=tmp_path / "x.ckpt", verbose=False)
        assert_average(weights(module), follows.average)


def test_more_epochs_in_the_same_trainer_go_on_from_what_the_module_holds(trainer: Any) -> None:
    follows = Follows()
    fitted, module, callback = fit(trainer, returning(), follows, max_epochs=2)
    averages, history = weights(module), list(callback.history)

    class Starts(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 12:
                assert difference(averages, weights(pl_module)) == ""
                self.seen = True

    starts = Starts()
    fitted.callbacks.insert(0, starts)
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, **resumable())
    assert starts.seen and callback.history[: len(history)] == history and len(callback.history) > len(history)
    assert max(record["learning_rates"][0] for record in callback.history[len(history) :]) < 1  # no rise out of nothing


def test_a_checkpoint_after_the_fit_has_nothing_but_the_averages_and_is_resumed_from_them(
    trainer: Any, tmp_path: Path
) -> None:
    class First(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.weights = weights(pl_module)

    fitted, module, _ = fit(trainer, returning(), max_epochs=2)
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    assert "current_model_state" not in torch.load(tmp_path / "x.ckpt", weights_only=True)
    first, follows = First(), Follows()
    _, resumed, callback = fit(trainer, returning(), first, follows, resume=tmp_path / "x.ckpt", max_epochs=3)
    assert difference(first.weights, weights(module)) == "" and callback.history[-1]["step"] == 18
    assert difference(weights(resumed), follows.trained[-1]) != ""


# -- parameters of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_every_precision(trainer: Any, tmp_path: Path, precision: str) -> None:
    follows, again, whole = Follows(), Follows(), None
    whole = fit(trainer, returning(), Saves(tmp_path / "x.ckpt", 7), follows, precision=precision)
    for found, average in zip(follows.validated, follows.averages, strict=True):
        assert_average(found, average, *([0, 2**-8] if precision == "bf16-true" else []))
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in whole[1].parameters()} == {dtype}
    if precision != "64-true":  # which Lightning loads in single precision first
        assert_same(whole, fit(trainer, returning(), again, resume=tmp_path / "x.ckpt", precision=precision))


def test_frozen_lazy_late_and_sparse_parameters(trainer: Any, tmp_path: Path) -> None:
    class Every(Plain):
        def make_net(self) -> nn.Module:
            net = nn.ModuleDict(
                {
                    "lazy": nn.LazyLinear(8),
                    "frozen": nn.Linear(8, 8),
                    "late": nn.Linear(8, 3),
                    "table": nn.Embedding(4, 3, sparse=True),
                }
            )
            net["frozen"].requires_grad_(False)
            return net

        def loss(self, batch: Any) -> Tensor:
            hidden = self.net["frozen"](self.net["lazy"](batch[0]).tanh())
            rows = self.net["table"](batch[1] % 4)
            return nn.functional.cross_entropy(self.net["late"](hidden) + rows, batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.net["lazy"].parameters(), *self.net["table"].parameters()], lr=0.1)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            (optimizer,) = self.trainer.optimizers
            if self.global_step == 6 and len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": list(self.net["late"].parameters()), "lr": 0.1})

    trained, module = [], None
    for average in (False, True):
        follows = Follows()
        module = Every()
        module.net["lazy"](torch.zeros(2, 6))  # a dry run: Lightning's optimizers want shapes
        fit(trainer, learner(average_weights=average), follows, module=module)
        trained.append(follows.trained)
    assert difference(*trained) == ""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    for name, value in weights(module).items():
        same = torch.equal(value, follows.trained[-1][name])
        assert same is (name in frozen), name
    late = {name: value for name, value in follows.average.items() if "late" not in name}
    assert_average(weights(module), late)


class Players(Plain):
    """Two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in self.net]


def test_two_optimizers_by_hand(trainer: Any, tmp_path: Path) -> None:
    trained, modules = [], []
    for average in (False, True):
        follows, saves = Follows(), Saves(tmp_path / "x.ckpt", 14)
        follows.on_train_batch_end = _every_second(follows)  # type: ignore[method-assign]
        _, module, whole = fit(trainer, learner(average_weights=average), saves, follows, module=Players())
        trained.append(follows.trained), modules.append(module)
    assert difference(*trained) == "" and len(trained[0]) == 24
    assert_average(weights(modules[1]), follows.average)
    _, module, again = fit(trainer, returning(), module=Players(), resume=tmp_path / "x.ckpt")
    assert difference(weights(modules[1]), weights(module)) == "" and difference(whole.history, again.history) == ""


def _every_second(follows: Follows) -> Any:
    """The Trainer counts the steps of both."""

    def note(trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step // 2
        for name, parameter in pl_module.named_parameters():
            follows.average[name] += 9 / (step + 9) * (parameter.detach().double() - follows.average[name])
        follows.trained.append(weights(pl_module))

    return note


def test_parameters_that_two_optimizers_share_come_back(trainer: Any) -> None:
    class Shared(Players):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.parameters(), lr=rate) for rate in (0.1, 0.05)]

    trained = []
    for average in (False, True):
        follows = Follows()
        fit(trainer, learner(average_weights=average), follows, module=Shared())
        trained.append(follows.trained)
    assert difference(*trained) == ""


def test_tied_weights_are_saved_once(trainer: Any, tmp_path: Path) -> None:
    class Tied(Plain):
        def make_net(self) -> nn.Module:
            first, second = nn.Linear(6, 6), nn.Linear(6, 6)
            second.weight = first.weight
            return nn.Sequential(first, nn.Tanh(), second, nn.Linear(6, 3))

    follows = Follows()
    fit(trainer, returning(), Saves(tmp_path / "x.ckpt", 24), follows, module=Tied(MOMENTUM))
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert_average(state, follows.average)
    assert state["net.0.weight"].data_ptr() == state["net.2.weight"].data_ptr()


def test_no_second_copy_is_made(trainer: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(1000)) for _ in range(50)], lr=0.1)
    average = RunningAverage(optimizer)
    with LiveMemory() as memory:
        average.exchange()
        average.exchange()
    there = 2 * 50 * 4000  # it counts what it sees for the first time
    assert there <= memory.peak <= there + 2 * 4000


# -- several processes -------------------------------------------------------------------------------------------------

KINDS = ["ddp", "sharded", "sharded, saved whole"]


@pytest.mark.skipif(not hasattr(strategies, "ModelParallelStrategy"), reason="came with Lightning 2.4")
@pytest.mark.skipif(os.name == "nt", reason="no process can be forked from a server")
@pytest.mark.parametrize("kind", KINDS)
def test_every_process_has_the_same_average_and_resumes_from_the_weights_of_the_training(
    tmp_path: Path, kind: str
) -> None:
    first, second = launch(tmp_path, fsdp_runs.averages, kind, tmp_path / "x.ckpt")
    assert not isinstance(first, str) and not isinstance(second, str), (first, second)
    without, whole, again = zip(first, second, strict=True)
    for results in (without, whole, again):
        for key in ("trained", "validated", "end", "history"):
            assert difference(results[0][key], results[1][key]) == "", key
    plain, found, resumed = without[0], whole[0], again[0]
    assert difference(plain["trained"], found["trained"]) == "" and len(found["trained"]) == 16
    assert len(found["validated"]) == 4
    for weights_seen, expected in [*found["validated"], (found["end"], found["average"])]:
        for ours, theirs in zip(weights_seen, expected, strict=True):
            assert torch.allclose(ours.double(), theirs, rtol=0, atol=1e-6)
    assert difference(found["end"], found["trained"][-1]) != ""
    assert difference(found["trained"][8:], resumed["trained"]) == ""
    for key in ("end", "history"):
        assert difference(found[key], resumed[key]) == "", key
    for results in (whole, again):  # the training's own statistics would be those of each process
        assert difference(results[0]["statistics"], results[1]["statistics"]) == ""


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"])
def test_another_average_in_the_same_trainer_is_refused(trainer: Any, kind: str) -> None:
    if not hasattr(callbacks, kind):
        pytest.skip("came with a later Lightning")
    other = getattr(callbacks, kind)
    options = {"swa_lrs": 0.01} if kind == "StochasticWeightAveraging" else {}
    with pytest.raises(MisconfigurationException, match=r"average_weights=True\) and .*WeightAveraging are in one Tr"):
        trainer(returning(), other(**options)).fit(Plain(), **loaders())
    trainer(learner(), other(**options)).fit(Plain(), **loaders())  # without the option nothing contradicts


def test_flattened_parameters_are_refused(trainer: Any) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class FSDPStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(MisconfigurationException, match="Use FSDP2 by ModelParallelStrategy"):
        trainer(returning(), strategy=FSDPStrategy("cpu")).fit(Plain(), **loaders())
