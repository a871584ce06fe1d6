"""A training that is lost is taken back; one that is only loud is left alone, bit for bit."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import CLASSES, FEATURES, Plain, Rich, difference, learner, loader, outcome, sgd
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional

from lightning_l2l import Displacement, LearnToLearn
from lightning_l2l.guard import LossWatch, Snapshot, is_worse

ADAM = lambda rate: lambda parameters: torch.optim.Adam(parameters, lr=rate)  # noqa: E731
LOST = "ignore:LearnToLearn. after step"


class Network(Plain):
    def make_net(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)
        )


def fit(trainer: Any, module: Any, callback: LearnToLearn | None = None, *others: Any, **options: Any) -> LearnToLearn:
    callback = callback or LearnToLearn(initial_search=False)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    fitted = trainer(callback, *others, **{"max_epochs": 20, **options})
    fitted.fit(module, loader(96, batch_size=16, shuffle=True), loader(32, 1, batch_size=16))  # 6 steps in an epoch
    return callback


def rollbacks(callback: LearnToLearn) -> list[int]:
    return [record["step"] for record in callback.history if record["diagnostics"]["trouble"] == "rolled_back"]


@torch.no_grad()
def final_loss(module: Any) -> float:
    inputs, targets = loader(200, seed=7).dataset.tensors
    return functional.cross_entropy(module.net.eval()(inputs), targets).item()


class BrokenBatch(Network):
    """One batch that is not a number, in the step with this number, or in all later ones too."""

    def __init__(self, optimizer: Any = None, step: int = 27, always: bool = False) -> None:
        super().__init__(optimizer or sgd(0.1, momentum=0.9))
        self.step, self.always = step, always

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        now = self.global_step
        broken = "log" not in vars(self) and (now == self.step or self.always and now >= self.step)
        return super().training_step((batch[0] * (math.nan if broken else 1), batch[1]), batch_idx)


@pytest.mark.filterwarnings(LOST)
@pytest.mark.parametrize("case", ["sgd", "adam", "adam without batch norm", "accumulated", "clipped"])
def test_a_run_at_a_rate_of_ten_recovers(trainer: Any, case: str) -> None:
    class Deep(Network):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    class Clips(Deep):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 100.0)

    make = {"adam": Network, "clipped": Clips}.get(case, Deep)
    module = make(ADAM(10.0) if case.startswith("adam") else sgd(10.0, momentum=0.9))
    options = {"accumulate_grad_batches": 2, "max_epochs": 40} if case == "accumulated" else {"max_epochs": 30}
    callback = fit(trainer, module, **options)
    assert rollbacks(callback) and final_loss(module) < 1.25 * math.log(CLASSES)
    assert all(
        record["learning_rates"][0] < 10 for record in callback.history if record["step"] >= rollbacks(callback)[0]
    )


@pytest.mark.filterwarnings(LOST)
@pytest.mark.parametrize("make", [sgd(10.0, momentum=0.9), ADAM(10.0)], ids=["SGD", "Adam"])
def test_a_rate_that_diverges_at_once_is_searched_below(trainer: Any, make: Any) -> None:
    class Deep(Network):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    module = Deep(make)
    callback = fit(trainer, module, max_epochs=40)
    found = callback.search_result
    assert "diverged" in found.reason and found.learning_rate < 1
    tried = [r for r in callback.history if "a third of the present one" in r["diagnostics"]["note"]]
    assert tried and found.steps > tried[-1]["step"]
    rates = {record["step"]: record["learning_rates"][0] for record in callback.history}
    assert found.learning_rate == pytest.approx(3 * rates[tried[-1]["step"]])  # one more third did no better
    assert final_loss(module) < 0.5 * math.log(CLASSES)


@pytest.mark.parametrize("guard", [True, False])
def test_a_run_that_is_resumed_in_the_search_goes_on_with_the_best_rate_so_far(guard: bool) -> None:
    def run(optimizer: Any, weight: Tensor, tuner: Any, steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = 0.5 * weight.square().sum()
            loss.backward()
            optimizer.step()
            tuner.step(loss)
        return loss

    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=10.0)
    first = Displacement().attach(optimizer, planned_steps=500)
    while not first.rule.is_searching:
        run(optimizer, weight, first, 1)
    state = first.state_dict()
    first.close()
    second = Displacement().attach(optimizer, planned_steps=500, divergence_guard=guard)
    second.load_state_dict(state)
    assert not second.rule.is_searching and "diverged" in second.search_result.reason
    assert run(optimizer, weight, second, 100).item() < 1 or not guard


@pytest.mark.filterwarnings(LOST)
def test_the_rate_of_a_schedule_is_cut_by_a_factor(trainer: Any) -> None:
    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99)  # noqa: E731
    module = BrokenBatch()
    module.schedule = schedule
    callback = fit(trainer, module)
    (step,) = rollbacks(callback)
    (record,) = [record for record in callback.history if record["step"] == step]
    assert step == 28
    assert record["base_rates"] == pytest.approx([0.1 * 0.99 ** (27 // 6)], rel=1e-12)
    before = [r for r in callback.history if r["step"] < step][-1]
    factors = [r["learning_rates"][0] / r["base_rates"][0] for r in (before, record)]
    assert factors[1] == pytest.approx(factors[0] / 3, rel=1e-9)


def test_a_broken_batch_is_said_once_and_costs_a_few_steps(trainer: Any) -> None:
    module = BrokenBatch()
    with pytest.warns(UserWarning, match="after step 28: The training had diverged.*divided by 3") as warned:
        callback = fit(trainer, module)
    assert len([w for w in warned if "LearnToLearn" in str(w.message)]) == 1
    assert rollbacks(callback) == [28] and final_loss(module) < 0.8 * math.log(CLASSES)


@pytest.mark.filterwarnings(LOST)
def test_going_back_is_exact_and_the_optimizer_begins_anew(trainer: Any) -> None:
    class Copies(pl.Callback):
        """The weights and buffers whenever a snapshot may be taken: at the start and after updates."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def state(self, module: Any) -> Any:
            return {name: value.clone() for name, value in module.state_dict().items()}

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 28:
                self.after, self.optimizer = self.state(module), dict(trainer.optimizers[0].state)
            elif trainer.global_step < 28:
                self.seen.append(self.state(module))

    copies = Copies()
    callback = fit(trainer, BrokenBatch(), None, copies)
    assert rollbacks(callback) == [28] and copies.optimizer == {}
    assert [difference(seen, copies.after) for seen in copies.seen].count("") == 1
    assert difference(copies.seen[0], copies.after) != ""  # it had improved since


@pytest.mark.filterwarnings(LOST)
def test_what_is_lost_ten_times_is_given_up(trainer: Any) -> None:
    callback = fit(trainer, BrokenBatch(always=True), max_epochs=12)
    records = [record for record in callback.history if record["diagnostics"]["trouble"] == "rolled_back"]
    assert len(records) == 10 and "the last one" in records[-1]["diagnostics"]["note"]
    assert not any("the last one" in record["diagnostics"]["note"] for record in records[:-1])


@pytest.mark.filterwarnings(LOST)
@pytest.mark.parametrize("kind", [EMAWeightAveraging, StochasticWeightAveraging])
def test_an_average_of_the_weights_begins_anew_where_the_run_was_taken_back(trainer: Any, kind: Any) -> None:
    average = EMAWeightAveraging() if kind is EMAWeightAveraging else StochasticWeightAveraging(0.05, 1)
    module = BrokenBatch(step=61)
    torch.manual_seed(5)
    callback = LearnToLearn(initial_search=False)
    fitted = trainer(average, callback, max_epochs=20)
    fitted.fit(module, loader(96, batch_size=16, shuffle=True), loader(32, 1, batch_size=16))
    assert rollbacks(callback)
    assert all(torch.isfinite(p).all() for p in module.parameters())  # the average, by now
    assert final_loss(module) < 0.8 * math.log(CLASSES)
    count = average.n_averaged if kind is StochasticWeightAveraging else average._average_model.n_averaged
    assert 0 < int(count) <= (10 if kind is StochasticWeightAveraging else 120 - 61)


@pytest.mark.filterwarnings(LOST)
def test_a_teacher_that_the_module_moves_is_taken_back_too(trainer: Any) -> None:
    class Teacher(BrokenBatch):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(FEATURES, CLASSES).requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                mean = sum(p.mean() for p in self.net.parameters())
                self.teacher.weight.data.lerp_(mean.expand_as(self.teacher.weight), 0.1)

    module = Teacher()
    callback = fit(trainer, module)
    assert rollbacks(callback) and torch.isfinite(module.teacher.weight).all()


@pytest.mark.filterwarnings(LOST)
def test_early_stopping_does_not_see_what_was_taken_back(trainer: Any) -> None:
    stopping = EarlyStopping("val_loss", patience=100, check_finite=True)
    module = BrokenBatch()
    callback = fit(trainer, module, None, stopping)
    assert rollbacks(callback) == [28] and stopping.stopped_epoch == 0


# -- left alone -------------------------------------------------------------------------------------------------------


class PolicyGradient(Plain):
    """Losses around zero whose sign is a matter of luck, much larger than the first one now and then."""

    def loss(self, batch: Any) -> Tensor:
        logits = self.net(batch[0]).log_softmax(1)
        generator = torch.Generator().manual_seed(self.global_step)
        advantages = torch.randn(len(logits), generator=generator) * torch.randn((), generator=generator).exp()
        return -(logits[:, 0] * advantages).mean()


class HeavyTails(Plain):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + 100 * (self.global_step % 7 == 3))


class FadesIn(Plain):
    """A weight that grows a hundredfold: the loss rises by right."""

    def __init__(self, *_: Any) -> None:
        super().__init__(sgd(0.002))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + self.global_step)


class CrossesZero(Plain):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) - 0.9


class Reward(Plain):
    """What reinforcement learning calls a loss: it rises while the policy gets better."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.2 * self.global_step


@pytest.mark.parametrize("make", [PolicyGradient, HeavyTails, FadesIn, CrossesZero, Reward, Rich])
def test_a_healthy_run_is_never_taken_back(trainer: Any, make: Any) -> None:
    found = []
    for guard in (True, False):
        module = make(sgd(0.05))
        callback = fit(trainer, module, LearnToLearn(initial_search=False, divergence_guard=guard))
        found.append(module.state_dict())
        assert rollbacks(callback) == [] and callback.history
    assert difference(*found) == ""


@pytest.mark.filterwarnings(LOST)
def test_a_step_that_the_loss_scaler_leaves_out_is_no_reason(trainer: Any) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    callback = fit(trainer, Network(sgd(0.1)), plugins=plugin)
    assert rollbacks(callback) == [] and callback.history


@pytest.mark.filterwarnings(LOST)
def test_resumed_equals_uninterrupted_after_a_rollback(trainer: Any, tmp_path: Path) -> None:
    class SavesEpochs(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 6:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    found = []
    for path in (None, tmp_path / "x.ckpt"):
        module, callback = BrokenBatch(), learner(every_n_steps=6)
        fitted = trainer(callback, *([SavesEpochs()] if path is None else []), max_epochs=12)
        fitted.fit(module, loader(), loader(24, 1), ckpt_path=path)  # 6 batches in their order
        found.append({**outcome(fitted, module), "history": callback.history, "ours": callback.state_dict()})
        assert rollbacks(callback) == [28]
    for key in ("state", "optimizer", "history", "ours"):
        assert difference(found[0][key], found[1][key]) == "", key


# -- its parts --------------------------------------------------------------------------------------------------------


def watched(*losses: float, planned: float = 1000) -> LossWatch:
    watch = LossWatch(planned)
    for loss in losses:
        watch.see(loss)
    return watch


def test_what_raises_a_suspicion_at_any_scale_and_sign() -> None:
    for scale, shift in ((1.0, 0.0), (1e-6, 0.0), (1e6, 0.0)):
        calm = watched(*[scale * (2 - 0.01 * t) + shift for t in range(100)])
        assert not calm.is_suspicious
        assert watched(2 * scale, math.nan).is_suspicious and watched(2 * scale, math.inf).is_suspicious
        assert watched(2 * scale, 1000 * scale).is_suspicious  # far above
        assert not watched(2 * scale, *[5 * scale] * 40).is_suspicious
        assert watched(2 * scale, *[5 * scale] * 80).is_suspicious  # high for more than a twentieth of the training
        assert not watched(-2 * scale, *[-1 * scale] * 300).is_suspicious
        assert watched(-2 * scale, *[500 * scale] * 3).is_suspicious


def test_unfounded_suspicions_become_rare_and_what_is_taken_back_is_forgotten() -> None:
    watch = watched(1.0, 200.0)
    assert watch.is_suspicious
    watch.unfounded()
    watch.see(50.0)
    assert not watch.is_suspicious  # four times as far by now
    watch.see(5000.0)
    assert watch.is_suspicious
    watch.forget()
    watch.see(0.9)
    assert not watch.is_suspicious and watch.mean == 0.9


def test_the_verdict_needs_the_same_batch_twice() -> None:
    assert is_worse([1.0, 1.0], [1.0, 1.5]) and is_worse([1.0], [math.nan]) and is_worse([-2.0], [-1.0])
    assert not is_worse([1.0], [0.5]) and not is_worse([math.nan], [math.nan]) and not is_worse([1.0], [1.0])


def test_a_snapshot_is_taken_again_in_the_same_memory_and_is_the_state_bit_for_bit() -> None:
    module = Network(sgd(0.1)).net
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    snapshot = Snapshot([module, frozen], optimizer)
    before = {name: value.clone() for name, value in nn.ModuleList([module, frozen]).state_dict().items()}
    with torch.no_grad():
        for tensor in nn.ModuleList([module, frozen]).state_dict().values():
            tensor.fill_(7)
    optimizer.state[next(module.parameters())] = {"step": 1}
    snapshot.restore()
    assert difference(before, nn.ModuleList([module, frozen]).state_dict()) == "" and not optimizer.state
    with torch.no_grad():
        next(module.parameters()).fill_(3)
    snapshot.take()
    with torch.no_grad():
        next(module.parameters()).fill_(4)
    snapshot.restore()
    assert (next(module.parameters()) == 3).all()


@pytest.mark.parametrize("maximize", [False, True])
def test_plain_loops_are_taken_back_too(maximize: bool) -> None:
    weight = nn.Parameter(torch.ones(2))
    sign = -1.0 if maximize else 1.0
    optimizer = torch.optim.SGD([weight], lr=30.0, maximize=maximize)
    tuner = Displacement().attach(optimizer, planned_steps=100)
    held_out = tuner.held_out_gradient(lambda: sign * 0.5 * weight.square().sum())
    for _ in range(100):
        optimizer.zero_grad()
        loss = sign * 0.5 * weight.square().sum()
        loss.backward()
        optimizer.step()
        tuner.step(loss, held_out=held_out)
    assert tuner.rollbacks and weight.abs().max() < 0.1
