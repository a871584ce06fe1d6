"""A training that is lost is taken back, bit for bit; one that is only loud is left alone."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import CLASSES, FEATURES, Plain, Rich, difference, learner, loader, loaders, observer, outcome, sgd
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, LearnToLearn
from lightning_l2l.host.guard import DivergenceGuard
from lightning_l2l.host.snapshot import Snapshot

ADAM = lambda rate: lambda parameters: torch.optim.Adam(parameters, lr=rate)  # noqa: E731
LOST = "ignore:LearnToLearn, after step"


class Network(Plain):
    def make_net(self) -> nn.Module:
        hidden = 32
        return nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
        )


class Normalised(Network):
    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES))


def fit(trainer: Any, module: Any, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    fitted = trainer(*callbacks, **{"max_epochs": 12, **options})
    fitted.fit(module, **loaders())
    return fitted


def fit_long(trainer: Any, module: Any, callback: LearnToLearn, **options: Any) -> None:
    """Three hundred steps on data that has something to learn."""
    torch.manual_seed(5)
    train, held_out = loader(400, batch_size=40, shuffle=True), loader(160, seed=1, batch_size=40)
    trainer(callback, **{"max_epochs": 30, **options}).fit(module, train, held_out)


def guarded(**options: Any) -> LearnToLearn:
    return learner(**{"every_n_steps": 10, "unroll_steps": 3, **options})


def rollbacks(callback: LearnToLearn) -> list[int]:
    return [record["step"] for record in callback.history if record["diagnostics"]["trouble"] == "rolled_back"]


@torch.no_grad()
def final_loss(module: Any) -> float:
    inputs, targets = loader(200, seed=7).dataset.tensors
    return functional.cross_entropy(module.net.eval()(inputs), targets).item()


class Digits(Plain):
    """The network of the benchmarks."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def fit_digits(trainer: Any, optimizer: Any, **options: Any) -> tuple[float, LearnToLearn]:
    """240 steps with the defaults; the loss on images that neither the training nor the callback saw."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    train, held_out, test = (TensorDataset(images[part], labels[part]) for part in order.split([1000, 300, 497]))
    callback, module = LearnToLearn(initial_search=False, **options), Digits(optimizer)
    torch.manual_seed(5)
    trainer(callback, max_epochs=15).fit(module, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 64))
    with torch.no_grad():
        return functional.cross_entropy(module.net(test.tensors[0]), test.tensors[1]).item(), callback


class Ruins(pl.Callback):
    """Has the network begin again from chance level, which is where its first losses were."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 150:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.zero_()


@pytest.mark.filterwarnings(LOST)
def test_a_run_that_is_back_at_its_first_losses_is_taken_back(trainer: Any) -> None:
    callback, module = guarded(), Network(ADAM(0.01))
    fit_long(trainer, module, callback, callbacks=[callback, Ruins()])
    (step,) = rollbacks(callback)
    assert 150 < step <= 165  # ten losses say so, sooner or later by the noise of a few
    notes = [record["diagnostics"]["note"] for record in callback.history]
    assert sum("had lost half of what it had won" in note for note in notes) == 1
    assert final_loss(module) < 0.6


@pytest.mark.filterwarnings(LOST)
@pytest.mark.parametrize(
    ("make", "every_step", "ratio"),
    [
        (sgd(10.0, momentum=0.9), True, 2),
        (sgd(10.0, momentum=0.9), False, 2),
        (ADAM(10.0), True, 4),  # at the rate that it is cut to some units still die
    ],
    ids=["sgd", "sgd, as on an accelerator", "adam"],
)
def test_a_run_that_is_lost_recovers(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, make: Any, every_step: bool, ratio: int
) -> None:
    monkeypatch.setattr(DivergenceGuard, "_looks_at_every_step", every_step)
    sane, _ = fit_digits(trainer, sgd(0.1, momentum=0.9))
    alone, _ = fit_digits(trainer, make, divergence_guard=False)
    guarded, callback = fit_digits(trainer, make)
    assert not alone < 0.9 * math.log(10)  # at chance level, or no number
    assert guarded < ratio * sane and guarded < 0.2 * math.log(10)
    assert rollbacks(callback) and callback.learning_rates[0] < 0.2


@pytest.mark.parametrize("make", [Rich, Normalised])
@pytest.mark.parametrize("taken", [0, 4], ids=["before the first step", "in mid-run"])
@pytest.mark.parametrize(
    "optimizer",
    [sgd(0.1), sgd(0.1, momentum=0.9), ADAM(0.01), lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True)],
    ids=["sgd", "momentum", "adam", "amsgrad"],
)
def test_going_back_is_exact(trainer: Any, make: Any, optimizer: Any, taken: int) -> None:
    class TakesAndGoesBack(pl.Callback):
        before: Any = None

        def state(self, trainer: Any, module: Any) -> Any:
            state = [module.state_dict(), trainer.optimizers[0].state_dict()["state"]]
            return torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, state)

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            optimizer = trainer.optimizers[0]
            if trainer.global_step == taken:
                self.before, self.snapshot = self.state(trainer, module), Snapshot(module, optimizer)
            if trainer.global_step == taken + 4:
                held = [id(p) for p in module.parameters()]
                assert difference(self.before, self.state(trainer, module)) != ""
                for _ in range(2):  # it can be gone back to more than once
                    self.snapshot.restore(module, optimizer)
                    assert difference(self.before, self.state(trainer, module)) == ""
                    with torch.no_grad():
                        for parameter in module.parameters():
                            parameter.fill_(math.nan)
                self.snapshot.restore(module, optimizer)
                assert held == [id(p) for p in module.parameters()]
                self.done = True

    witness = TakesAndGoesBack()
    fit(trainer, make(optimizer), witness, max_epochs=2)
    assert witness.done


class PolicyGradient(Plain):
    """Losses around zero whose sign is a matter of luck, much larger than the first one now and then."""

    def loss(self, batch: Any) -> Tensor:
        logits = self.net(batch[0]).log_softmax(1)
        advantages = torch.randn(len(logits)) * torch.randn(()).exp()
        return -(logits[:, 0] * advantages).mean()


class HeavyTails(Plain):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + 10 * (torch.rand(()) < 0.2))


class FadesIn(Plain):
    """A weight that grows a hundredfold: the loss rises by right. (At a rate that bears that.)"""

    def __init__(self, *_: Any) -> None:
        super().__init__(sgd(0.002))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + self.global_step)


class Negative(Plain):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) - 3


class Embeds(Plain):
    """Most gradients are zero by right."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(1000, 4), nn.Flatten(), nn.Linear(4 * FEATURES, CLASSES))

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net((batch[0] > 0).long()), batch[1])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", [PolicyGradient, HeavyTails, FadesIn, Negative, Embeds, Rich])
def test_a_healthy_run_is_never_taken_back(trainer: Any, make: Any, seed: int) -> None:
    class Seeded(make):  # type: ignore[misc]
        def on_train_start(self) -> None:
            torch.manual_seed(seed)

    found = []
    for guard in (True, False):
        callback, module = guarded(objective="naive", divergence_guard=guard), Seeded(sgd(0.05))
        fitted = fit(trainer, module, callback)
        found.append(outcome(fitted, module)["state"])
        assert rollbacks(callback) == [] and len(callback.history) == 7
    assert difference(*found) == ""


@pytest.mark.filterwarnings(LOST)
def test_observing_a_lost_run_changes_nothing(trainer: Any) -> None:
    plain, observed = Network(sgd(10.0, momentum=0.9)), Network(sgd(10.0, momentum=0.9))
    expected = outcome(fit(trainer, plain), plain)
    callback = observer()
    found = outcome(fit(trainer, observed, callback), observed)
    assert difference(expected, found) == "" and rollbacks(callback) == []


class BrokenBatch(Network):
    """One batch that is not a number, in the fifth epoch (or in each)."""

    always = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        broken = batch_idx == 2 and (self.always or self.current_epoch == 4) and "log" not in vars(self)
        return super().training_step((batch[0] * (math.nan if broken else 1), batch[1]), batch_idx)


def test_a_broken_batch_costs_a_few_steps(trainer: Any) -> None:
    callback, module = guarded(), BrokenBatch(sgd(0.1, momentum=0.9))
    with pytest.warns(UserWarning, match="after step 27: The training had diverged.*multiplied by 0.3") as warned:
        fit(trainer, module, callback)
    assert len([w for w in warned if "LearnToLearn" in str(w.message)]) == 1
    assert rollbacks(callback) == [27] and final_loss(module) < 0.8 * math.log(CLASSES)
    (record,) = [record for record in callback.history if record["step"] == 27]
    assert math.isnan(record["meta_objective"]) and record["meta_gradient"] == {}


@pytest.mark.filterwarnings(LOST)
def test_a_run_that_is_lost_again_and_again_is_given_up(trainer: Any) -> None:
    class Always(BrokenBatch):
        always = True

    callback = guarded()
    fit(trainer, Always(sgd(0.1)), callback, max_epochs=15)
    records = [record for record in callback.history if record["diagnostics"]["trouble"] == "rolled_back"]
    assert len(records) == 10 and "the last one" in records[-1]["diagnostics"]["note"]
    assert not any("the last one" in record["diagnostics"]["note"] for record in records[:-1])


@pytest.mark.filterwarnings(LOST)  # about a look-ahead
def test_a_step_that_the_loss_scaler_skips_is_no_reason(trainer: Any) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**30))
    callback = guarded()
    fit(trainer, BrokenBatch(sgd(0.1)), callback, plugins=plugin)
    assert rollbacks(callback) == [] and len(callback.history) == 7


class Stream:
    def __iter__(self) -> Any:
        return iter(loader(400, batch_size=40))


@pytest.mark.filterwarnings(LOST, "ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("case", ["accumulate", "train", "tensor", "schedule", "stream"])
def test_it_works_with_every_way_of_training(trainer: Any, case: str) -> None:
    own: dict[str, Any] = {"train": {"meta_data": "train"}, "stream": {"meta_data": "train"}}.get(case, {})
    if case == "tensor":
        own = {"learned": LearnedStepSize(per="tensor")}
    schedule = (lambda o: lr_scheduler.ExponentialLR(o, 0.99)) if case == "schedule" else None
    callback, module = guarded(**own), Network(sgd(10.0, momentum=0.9), schedule)
    options = {"accumulate_grad_batches": 2} if case == "accumulate" else {}
    if case == "stream":
        torch.manual_seed(5)
        trainer(callback, max_epochs=30, limit_val_batches=0).fit(module, Stream())
    else:
        fit_long(trainer, module, callback, max_epochs=60 if options else 30, **options)
    assert rollbacks(callback) and final_loss(module) < 0.9 * math.log(CLASSES)
    rates = {record["step"]: record["learning_rates"][0] for record in callback.history}
    first = rollbacks(callback)[0]
    assert rates[first] == pytest.approx(1.0 if case != "schedule" else 0.99 ** (first // 10), rel=1e-6)


@pytest.mark.filterwarnings(LOST)
def test_no_rate_to_cut_is_no_guard(trainer: Any) -> None:
    callback = guarded(learned=LearnedHyperparameters(["momentum"]), estimator="forward")
    fit(trainer, BrokenBatch(sgd(0.1, momentum=0.9)), callback, max_epochs=6)
    assert rollbacks(callback) == []


@pytest.mark.filterwarnings(LOST)
def test_early_stopping_does_not_see_what_was_taken_back(trainer: Any) -> None:
    stopping = EarlyStopping("val_loss", patience=100, check_finite=True)
    callback = guarded()
    fitted = fit(trainer, BrokenBatch(sgd(0.1)), callback, stopping)
    assert rollbacks(callback) == [27] and fitted.current_epoch == 12 and not fitted.should_stop


@pytest.mark.filterwarnings(LOST, "ignore:.*that ended before the epoch ended.*")
def test_resume_equals_uninterrupted_across_a_rollback(trainer: Any, tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch in (4, 5):
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, module = guarded(every_n_steps=6), Network(sgd(5.0, momentum=0.9))
    data = {"train_dataloaders": loader(), "val_dataloaders": loader(24, seed=1)}
    first = trainer(whole, Saves(), max_epochs=9)
    first.fit(module, **data)
    expected = outcome(first, module)
    assert rollbacks(whole) and max(rollbacks(whole)) < 24 and len(whole.history) > 8
    for epoch in (4, 5):  # 30 and 36 steps, after the rollback
        again, resumed = guarded(every_n_steps=6), Network(sgd(5.0, momentum=0.9))
        second = trainer(again, max_epochs=9)
        second.fit(resumed, **data, ckpt_path=tmp_path / f"{epoch}.ckpt", weights_only=True)
        for key in ("state", "optimizer"):
            assert difference(expected[key], outcome(second, resumed)[key]) == "", key
        assert difference(whole.history, again.history) == ""
        assert difference(whole.state_dict(), again.state_dict()) == ""


def test_the_snapshot_is_of_a_calm_state(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One taken in the middle of an explosion would be gone back to in vain."""
    taken: list[int] = []
    original = Snapshot.take

    def spy(self: Any, module: Any, optimizer: Any) -> None:
        taken.append(module.global_step)
        original(self, module, optimizer)

    monkeypatch.setattr(Snapshot, "take", spy)
    fit(trainer, Network(sgd(0.1)), guarded(), max_epochs=5)
    assert taken == [0, 10, 20, 30]
    taken.clear()

    class Rises(Network):
        def loss(self, batch: Any) -> Tensor:
            loud = self.global_step == 9 and "log" not in vars(self)
            return super().loss(batch) * (9 if loud else 1)

    fit(trainer, Rises(sgd(0.1)), guarded(), max_epochs=5)
    assert taken == [0]


def test_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="divergence_guard"):
        LearnToLearn(divergence_guard=1)  # type: ignore[arg-type]
