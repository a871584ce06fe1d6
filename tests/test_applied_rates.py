"""Base and applied rates: what is logged is what the optimizer steps with; everybody's schedule stays what it is."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import FEATURES, MemoryLogger, NotesRates, Plain, learner, sgd, steady_loaders
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, LearningRateMonitor
from torch import nn
from torch.optim import lr_scheduler

from lightning_l2l import LearnToLearn
from lightning_l2l.rates import AppliedRate, AppliedRates

START = 1e-5  # so small that it rises at once, from the fourth step on


def rising(**options: Any) -> LearnToLearn:
    return learner(**{"initial_search": True, "every_n_steps": 4, **options})


class Scheduled(Plain):
    """Two groups, and any schedule."""

    def __init__(self, schedule: Callable[[Any], Any] | None = None, rate: Any = START) -> None:
        super().__init__(lambda groups: NotesRates(groups, lr=rate), schedule)

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 3))

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}]
        optimizer = self.optimizer(groups)
        optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] * 0.3
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


class Last(pl.Callback):
    """Notes what the schedulers say, after each step."""

    def __init__(self) -> None:
        self.said: list[list[float]] = []
        self.shown: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.said += [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs[:1]]
        self.shown.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])


def fit(trainer: Any, module: Any, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    fitted = trainer(*callbacks, **{"max_epochs": 4, "logger": MemoryLogger(), **options})
    fitted.fit(module, **steady_loaders())
    return fitted


def by_step(make: Callable[[Any], Any], **options: Any) -> Callable[[Any], Any]:
    return lambda o: {"scheduler": make(o), "interval": "step", **options}


def noam(step: int) -> float:
    return min((step + 1) ** -0.5, (step + 1) * 6**-1.5)


class Multiplies(lr_scheduler.LRScheduler):
    """One of the user's own that computes a rate from the one that it finds in the group."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] * (0.95 if self.last_epoch else 1) for group in self.optimizer.param_groups]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": by_step(lambda o: lr_scheduler.CosineAnnealingLR(o, 24)),
    "cosine with restarts": by_step(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5)),
    "exponential by epoch": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "multi-step": by_step(lambda o: lr_scheduler.MultiStepLR(o, [4, 9, 13], 0.3)),
    "linear": by_step(lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 12)),
    "polynomial": by_step(lambda o: lr_scheduler.PolynomialLR(o, 30, 2.0)),
    "one cycle": by_step(lambda o: lr_scheduler.OneCycleLR(o, [5 * START, START], total_steps=24)),
    "cyclic": by_step(lambda o: lr_scheduler.CyclicLR(o, START, 5 * START, 4, cycle_momentum=False)),
    "Noam": by_step(lambda o: lr_scheduler.LambdaLR(o, noam)),
    "multiplicative": by_step(lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95)),
    "one after the other": by_step(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 20)], [5]
        )
    ),
    "chained": by_step(
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.5, 5), lr_scheduler.ExponentialLR(o, 0.9)]
        )
    ),
    "of one's own": by_step(Multiplies),
    "plateau": lambda o: {"scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5), "monitor": "steady"},
}


class Steady(Scheduled):
    """Logs something that never improves."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.log("steady", 1.0)


class BreaksOnce(Steady):
    """One batch that is not a number: the run is taken back, and its rate cut."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        broken = self.global_step == 4 and "log" not in vars(self)
        return super().training_step((batch[0] * (math.nan if broken else 1), batch[1]), batch_idx)


@pytest.mark.feature("every scheduler of torch, ReduceLROnPlateau, schedulers of one's own")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:LearnToLearn. after step")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_that_of_the_run_without_learning(trainer: Any, name: str) -> None:
    plain, learned, last, callback = Steady(SCHEDULES[name]), BreaksOnce(SCHEDULES[name]), Last(), learner()
    expected = fit(trainer, plain).optimizers[0].used
    used = fit(trainer, learned, callback, last).optimizers[0].used
    (cut,) = [r["step"] for r in callback.history if r["diagnostics"]["trouble"] == "rolled_back"]
    factors = [[a / b for a, b in zip(x, y, strict=True)] for x, y in zip(used, expected, strict=True)]
    for step, (first, second) in enumerate(factors):
        # One factor for both groups, changed by updates only: all else is the plain run's schedule.
        assert first == pytest.approx(second, rel=1e-12)
        if step and step not in [record["step"] for record in callback.history]:
            assert first == pytest.approx(factors[step - 1][0], rel=1e-12)
    assert factors[cut][0] == pytest.approx(factors[cut - 1][0] / 10, rel=1e-9)
    assert last.said == last.shown


@pytest.mark.filterwarnings("ignore:LearnToLearn. after step")
def test_what_is_logged_shown_recorded_and_monitored_is_what_is_stepped_with(trainer: Any) -> None:
    callback, last, monitor = rising(), Last(), LearningRateMonitor("step")
    fitted = fit(trainer, BreaksOnce(SCHEDULES["cosine with restarts"]), callback, last, monitor)
    used = fitted.optimizers[0].used
    assert last.shown[:-1] == used[1:]  # after a step, the rates of the next one
    logged = {row["step"]: row for row in fitted.logger.rows if "l2l/learning_rate/0" in row}
    for step in range(len(used) - 1):
        row = logged.get(step)
        assert row is not None and [row["l2l/learning_rate/0"], row["l2l/learning_rate/1"]] == used[step + 1]
    assert callback.learning_rates == last.shown[-1]
    assert callback.history[-1]["learning_rates"][0] < 0.5 * callback.history[-1]["base_rates"][0]
    monitored = [row["lr-NotesRates/pg1"] for row in fitted.logger.rows if "lr-NotesRates/pg1" in row]
    assert monitored == [rates[0] for rates in used]
    assert callback.export_schedule().values == tuple(tuple(rates) for rates in used)


def test_rates_that_hooks_write_are_the_new_base(trainer: Any) -> None:
    class Writes(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            first, second = trainer.optimizers[0].param_groups
            if trainer.global_step == 10:
                first["lr"] *= 0.7  # relative: the learned factor stays
            if trainer.global_step == 14:
                first["lr"] = 0.02 * START  # absolute: the base rate, and the factor stays, too
                second["lr"] = second["lr"] / 2 + 0.001 * START

    callback, module = rising(), Scheduled(rate=0.01 * START)
    used = fit(trainer, module, callback, Writes()).optimizers[0].used
    records = {record["step"]: record for record in callback.history}
    expected = {8: [1, 0.3], 12: [0.7, 0.3], 16: [2, 0.25]}
    for step, rates in expected.items():
        assert records[step]["base_rates"] == pytest.approx([0.01 * START * rate for rate in rates], rel=1e-14)
    for record in records.values():
        ratios = [a / b for a, b in zip(record["learning_rates"], record["base_rates"], strict=True)]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-12)
    assert any(used[10][0] / used[9][0] == pytest.approx(0.7 * learned) for learned in (1, 2))
    assert records[8]["learning_rates"][0] > records[8]["base_rates"][0]


def test_a_warm_up_in_optimizer_step_is_the_base_rate(trainer: Any) -> None:
    class WarmUp(Scheduled):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = START * min(1.0, (self.global_step + 1) / 10)
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    callback = rising()
    used = fit(trainer, WarmUp(), callback).optimizers[0].used
    base = [START * min(1.0, (step + 1) / 10) for step in range(len(used))]
    assert [rates[0] for rates in used[:8]] == base[:8]  # it is a plan, so nothing rises at once
    factors = {record["step"]: record["learning_rates"][0] / START for record in callback.history}
    assert len(set(factors.values())) > 1
    assert used[12][0] == pytest.approx(factors[12] * base[12], rel=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_rates_that_are_tensors_are_written_in_place_and_compound_no_rounding(trainer: Any, shared: bool) -> None:
    class TensorRates(Scheduled):
        def configure_optimizers(self) -> Any:
            rate = torch.tensor(START)
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}]
            for group in groups:
                group["lr"] = rate if shared else rate.clone()
            self.tensors = [group["lr"] for group in groups]
            return NotesRates(groups, lr=rate)

    callback, module = rising(every_n_steps=1), TensorRates()
    used = fit(trainer, module, callback, max_epochs=12).optimizers[0].used
    for record in callback.history:
        assert record["base_rates"] == [float(torch.tensor(START))] * 2  # not a bit of drift
        if record["step"] < len(used):
            assert used[record["step"]] == pytest.approx(record["learning_rates"], rel=1e-6)  # float32
    assert len({rates[0] for rates in used}) > 3
    assert all(isinstance(group["lr"], torch.Tensor) for group in module.trainer.optimizers[0].param_groups)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] is module.tensors[0]


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.2 * START)


class Frozen(Scheduled):
    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def test_groups_that_are_added_are_learned_from_then_on(trainer: Any) -> None:
    callback, module = rising(), Frozen()
    used = fit(trainer, module, callback, Thaws()).optimizers[0].used
    assert [len(rates) for rates in used] == [1] * 12 + [2] * 12
    assert [len(record["base_rates"]) for record in callback.history] == [1] * 3 + [2] * 4
    assert callback.history[-1]["base_rates"] == pytest.approx([START, 0.2 * START], rel=1e-14)
    ratio = callback.learning_rates[1] / callback.learning_rates[0]
    assert ratio == pytest.approx(0.2, rel=1e-12) and callback.learning_rates[0] > START


def test_an_optimizer_that_is_made_anew_during_the_fit_keeps_what_was_learned(trainer: Any) -> None:
    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                self.before = trainer.optimizers[0]
                trainer.strategy.setup_optimizers(trainer)

    anew, callback, module = Anew(), rising(), Scheduled()
    fitted = fit(trainer, module, callback, anew)
    (optimizer,) = fitted.optimizers
    assert optimizer is not anew.before and len(optimizer.used) == len(anew.before.used) == 12
    assert optimizer.used[0] == callback.history[2]["learning_rates"] and optimizer.used[0][0] > 2 * START
    assert [record["step"] for record in callback.history] == [4, 8, 12, 16, 20, 21, 24]
    assert type(anew.before.param_groups[0]["lr"]) is float


def test_the_module_can_be_copied_and_pickled_and_the_optimizer_saved_during_the_fit(trainer: Any) -> None:
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 10:
                optimizer, fitted, module.trainer = trainer.optimizers[0], module.trainer, None
                module.optimizer = None
                self.found = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
                module.trainer = fitted
                self.state, buffer = optimizer.state_dict(), io.BytesIO()
                torch.save(self.state, buffer)
                buffer.seek(0)
                self.loaded = torch.load(buffer, weights_only=True)

    copies, callback = Copies(), rising()
    fit(trainer, Scheduled(), callback, copies)
    assert all(type(group["lr"]) is float for group in copies.state["param_groups"])
    assert copies.loaded["param_groups"] == copies.state["param_groups"]
    for found in copies.found:
        assert found.lr_scheduler_step.__func__ is pl.LightningModule.lr_scheduler_step


def test_names_of_what_is_logged(trainer: Any) -> None:
    class Named(Scheduled):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters(), "name": "body"}, {"params": self.net[2].parameters()}]
            groups[1]["name"] = "head"
            return self.optimizer(groups)

    class ByHand(Scheduled):
        """Two optimizers."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            first.zero_grad(), second.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step(), second.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)]

    def names(module: Any) -> set[str]:
        fitted = fit(trainer, module, learner(meta_data="train"))
        return {name for row in fitted.logger.rows for name in row if name.startswith("l2l/")}

    rates = "l2l/learning_rate"
    assert {rates, "l2l/cosine", "l2l/training_loss"} <= names(Plain())
    found = names(Named())
    assert {f"{rates}/body", f"{rates}/head", "l2l/training_loss"} <= found and rates not in found
    found = names(ByHand())
    assert {f"{rates}/optimizer_0", f"{rates}/optimizer_1"} <= found


def test_the_rate_is_in_the_progress_bar_and_in_callback_metrics(trainer: Any) -> None:
    fitted = fit(trainer, Plain(sgd(START)), callback := rising())
    assert fitted.progress_bar_metrics["l2l/learning_rate"] == pytest.approx(callback.learning_rates[0])
    assert float(fitted.callback_metrics["l2l/learning_rate"]) == callback.learning_rates[0]


def test_layers_that_a_finetuning_callback_of_lightning_thaws(trainer: Any) -> None:
    class WithBackbone(Plain):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.05))

        def make_net(self) -> nn.Module:
            self.backbone = nn.Linear(FEATURES, 5)
            return nn.Sequential(self.backbone, nn.Tanh(), nn.Linear(5, 3))

    callback = rising(meta_data="train")  # whose rate has not come back when the layers are thawed
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    fit(trainer, WithBackbone(), callback, finetuning)
    # Lightning's callback reads the head's rate as a number when it adds the group, with what was learned until then
    # in it; in later epochs it doubles what it finds in the group: its base rate.
    assert [record["base_rates"][1] for record in callback.history if record["step"] > 12][:4] == pytest.approx(
        [0.01, 0.02, 0.02, 0.02], rel=1e-12
    )


# -- the numbers themselves -------------------------------------------------------------------------------------------


def test_arithmetic_acts_on_base_and_applied_rate() -> None:
    rate = AppliedRate(0.2, base=0.1)
    for found, expected in (
        (rate * 0.5, (0.1, 0.05)),
        (2 * rate, (0.4, 0.2)),
        (rate / 4, (0.05, 0.025)),
        (rate + 0.1, (0.3, 0.2)),
        (0.3 - rate, (0.1, 0.2)),
        (rate - 0.05, (0.15, 0.05)),
    ):
        assert isinstance(found, AppliedRate) and (float(found), found.base) == pytest.approx(expected)
    assert type(pickle.loads(pickle.dumps(rate))) is float and copy.deepcopy(rate).base == 0.1
    assert rate == 0.2 and f"{rate:.2f}" == "0.20" and rate.__mul__("x") is NotImplemented


def test_closing_leaves_plain_numbers() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    rates = AppliedRates(optimizer)
    rates.apply([2.0])
    with rates.hidden():
        assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.2
    rates.close()
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 0.2


def test_a_group_without_a_rate_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="has no learning rate 'lr'"):
        AppliedRates(optimizer)
