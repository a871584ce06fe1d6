"""The rate that is logged is the rate that was applied, under every schedule; and the schedule stays the user's."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import MemoryLogger, Plain, Rich, TiedAndFrozen, Witness, learner, loaders, observer, sgd
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from torch.optim import lr_scheduler

from lightning_l2l import LearnedHyperparameters, LearnedStepSize

STEP = {"interval": "step"}
SCHEDULES: dict[str, Any] = {
    "none": None,
    "lambda": lambda o: {"scheduler": lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), **STEP},
    "warm-up": lambda o: {"scheduler": lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 4)), **STEP},
    "exponential": lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.9), **STEP},
    "exponential by epoch": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "cosine": lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 20), **STEP},
    "one cycle": lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.2, total_steps=20, cycle_momentum=False), **STEP},
    "cyclic": lambda o: {"scheduler": lr_scheduler.CyclicLR(o, 0.05, 0.2, 3, cycle_momentum=False), **STEP},
    "plateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=9.0), "monitor": "val_loss"
    },
    "plateau by step": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=9.0), "monitor": "train_loss", **STEP
    },
    "sequential": lambda o: {
        "scheduler": lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
        **STEP,
    },
}  # fmt: skip


def applied_rates(witness: Witness, name: str) -> list[float]:
    """By plain SGD: minus the change of a parameter over its gradient, where that is largest."""
    rates = []
    for change, gradient in zip(witness.changes, witness.gradients, strict=True):
        place = gradient[name].abs().argmax()
        rates.append(-(change[name].flatten()[place] / gradient[name].flatten()[place]).item())
    return rates


def logged(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row and "train_loss_step" in row]


@pytest.mark.feature(
    "learning rate schedulers, by epoch or by step, recursive or in closed form, `ReduceLROnPlateau`",
    "works",
    "the learned factor is on top of the schedule",
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logged_rate_is_the_applied_rate(trainer: Any, schedule: str) -> None:
    logger, witness = MemoryLogger(), Witness()
    callback = learner(meta_learning_rate=0.2)
    torch.manual_seed(0)
    fitted = trainer(witness, callback, logger=logger, max_epochs=3, precision="64-true")
    fitted.fit(Plain(sgd(0.1), SCHEDULES[schedule]), **loaders())
    rates = logged(logger.rows, "l2l/learning_rate")
    assert len(rates) == fitted.global_step == 18
    # float64 and a change of about 1e-2 of parameters of about 1: 1e-13 relative at the largest gradient.
    assert applied_rates(witness, "net.weight") == pytest.approx(rates, rel=1e-10)
    assert len(callback.history) == 6 and len({record["learning_rates"][0] for record in callback.history}) == 6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scheduled_values_are_those_of_a_run_without_us(trainer: Any, schedule: str) -> None:
    """Under a learned factor that is not 1, the applied rate is the factor times what the schedule says on its own."""
    factor = 0.75
    learned = LearnedStepSize()
    learned.load_state_dict({"learning_rate": torch.tensor([factor], dtype=torch.float64).log()})
    witness, alone = Witness(), Witness()
    module = Plain(sgd(0.1), SCHEDULES[schedule])
    torch.manual_seed(0)
    trainer(alone, max_epochs=3).fit(Plain(sgd(0.1), SCHEDULES[schedule]), **loaders())
    torch.manual_seed(0)
    trainer(witness, observer(learned=learned), max_epochs=3).fit(module, **loaders())
    if schedule.startswith("plateau"):  # decides by losses, which differ; they fall or stay in both runs
        pairs = zip(witness.rates, alone.rates, strict=True)
        assert {round(a[0] / b[0] / factor, 9) for a, b in pairs} <= {1.0, 0.1, 10.0}
        return
    expected = [factor * rate for rates in alone.rates for rate in rates]
    assert [rate for rates in witness.rates for rate in rates] == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.feature("`LearningRateMonitor`, before or after us", "works", "it shows the applied rate")
@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize("schedule", ["none", "exponential"])
def test_learning_rate_monitor_shows_the_applied_rate(trainer: Any, first: bool, schedule: str) -> None:
    logger, callback = MemoryLogger(), learner(initial_search=True)
    monitor = LearningRateMonitor(logging_interval="step")
    callbacks = [monitor, callback] if first else [callback, monitor]
    module = Plain(sgd(0.1), SCHEDULES[schedule])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_l2l.host.look_ahead.search_steps", lambda budget: 3)
        trainer(*callbacks, logger=logger).fit(module, **loaders())
    monitored = [row["lr-SGD"] for row in logger.rows if "lr-SGD" in row]
    assert monitored == pytest.approx(logged(logger.rows, "l2l/learning_rate"), rel=1e-12) and len(monitored) == 12


@pytest.mark.feature("rates written in `optimizer_step`", "works", "they are the schedule")
def test_a_warm_up_in_optimizer_step_is_the_schedule(trainer: Any) -> None:
    class WarmsUp(Plain):
        def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, closure: Any) -> None:
            optimizer.step(closure=closure)
            for group in optimizer.param_groups:  # as in Lightning's documentation
                group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)

    logger, witness, callback = MemoryLogger(), Witness(), learner()
    trainer(witness, callback, logger=logger, precision="64-true").fit(WarmsUp(sgd(0.02)), **loaders())
    rates = logged(logger.rows, "l2l/learning_rate")
    assert applied_rates(witness, "net.weight") == pytest.approx(rates, rel=1e-10)
    factors = [rate / (0.1 * min(1.0, max(step, 1) / 5)) for step, rate in enumerate(rates)]
    expected = [1.0] * 3  # until the first meta-update; then the factor is constant, whatever the warm-up does
    for record in callback.history[:-1]:
        expected += [record["learning_rates"][0] / (0.1 * min(1.0, record["step"] / 5))] * 3
    assert factors[1:] == pytest.approx(expected[1:], rel=1e-12) and len(set(expected)) == 4


PEAKS = {"warm-up": 0.1, "one cycle": 0.2, "cyclic": 0.2, "exponential": 0.1, "sequential": 0.1}


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("schedule", PEAKS)
def test_a_search_is_about_the_peak_of_the_schedule(trainer: Any, schedule: str) -> None:
    """A warm-up from zero is not what is searched, and a cyclic schedule does not go above what was found."""
    alone, plain, witness, callback = Witness(), observer(initial_search=True), Witness(), observer(initial_search=True)
    trainer(plain).fit(Plain(sgd(0.03)), **loaders())
    trainer(alone).fit(Plain(sgd(0.1), SCHEDULES[schedule]), **loaders())
    trainer(witness, callback).fit(Plain(sgd(0.1), SCHEDULES[schedule]), **loaders())
    assert plain.search_result is not None and callback.search_result is not None
    # Candidates are the same rates; the losses differ by the rounding of candidate / rate * rate in float32 steps.
    assert list(callback.search_result.losses.values()) == pytest.approx(list(plain.search_result.losses.values()))
    factor = callback.search_result.learning_rate / PEAKS[schedule]
    expected = [factor * rates[0] for rates in alone.rates]
    assert [rates[0] for rates in witness.rates] == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_the_history_has_the_rate_that_is_applied_next(trainer: Any) -> None:
    witness, callback = Witness(), learner()
    trainer(witness, callback, precision="64-true").fit(Plain(), **loaders())
    rates = applied_rates(witness, "net.weight")
    for record in callback.history[:-1]:
        assert rates[record["step"]] == pytest.approx(record["learning_rates"][0], rel=1e-10)


class TwoGroups(Rich):
    def make_net(self) -> Any:
        return Plain.make_net(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Plain.training_step(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.03, "name": "bias"}]
        return self.optimizer(groups)


@pytest.mark.feature("several parameter groups", "works", "one learned rate for each, or as `per` says")
@pytest.mark.parametrize("per", ["optimizer", "group", "tensor"])
def test_every_granularity_applies_what_it_says(trainer: Any, per: Any) -> None:
    logger, witness = MemoryLogger(), Witness()
    callback = learner(learned=LearnedStepSize(per=per))
    fitted = trainer(witness, callback, logger=logger, precision="64-true")
    fitted.fit(TwoGroups(), **loaders())
    weight, bias = (applied_rates(witness, f"net.{name}") for name in ("weight", "bias"))
    assert weight == pytest.approx(logged(logger.rows, "l2l/learning_rate/0"), rel=1e-10)
    assert bias == pytest.approx(logged(logger.rows, "l2l/learning_rate/bias"), rel=1e-10)
    ratios = {round(b / w, 9) for w, b in zip(weight, bias, strict=True)}
    assert (ratios == {0.3}) is (per == "optimizer")


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.1}])
def test_tensors_of_one_group_move_at_their_own_rates(trainer: Any, clip: Any) -> None:
    logger, witness = MemoryLogger(), Witness()
    callback = learner(learned=LearnedStepSize(per="tensor"))
    fitted = trainer(witness, callback, logger=logger, precision="64-true", **clip)
    fitted.fit(Plain(), **loaders())
    assert len(fitted.optimizers[0].param_groups) == 1 and len(fitted.optimizers[0].param_groups[0]["params"]) == 2
    if clip:  # the witness sees gradients before the clipping
        assert len(callback.history) == 4
        return
    weight, bias = (applied_rates(witness, f"net.{name}") for name in ("weight", "bias"))
    for record in callback.history[:-1]:
        own = record["hyperparameters"][0]["lr"]
        assert (weight[record["step"]], bias[record["step"]]) == pytest.approx(
            (own["net.weight"], own["net.bias"]), rel=1e-10
        )
        shown = record["learning_rates"][0]
        assert shown == pytest.approx((own["net.weight"] * own["net.bias"]) ** 0.5, rel=1e-12)
    # Not in the first record: Adam's first step has the same size everywhere.
    assert own["net.weight"] != own["net.bias"]


def test_momentum_and_betas_are_applied_as_recorded(trainer: Any) -> None:
    shown: list[Any] = []

    class Shows(Witness):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            shown.append(optimizer.param_groups[0]["betas"])

    learned = LearnedHyperparameters(("learning_rate", "betas"))
    callback = learner(learned=learned)
    module = Plain(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    trainer(callback, Shows()).fit(module, **loaders())
    for record in callback.history[:-1]:
        assert shown[record["step"]] == record["hyperparameters"][0]["betas"] != (0.9, 0.999)


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.02)


@pytest.mark.feature("`BaseFinetuning`, parameter groups that are added later", "works", "learned from then on")
@pytest.mark.parametrize("per", ["optimizer", "group", "tensor"])
def test_groups_that_are_added_later_are_learned_from_then_on(trainer: Any, per: Any) -> None:
    class Net(Rich):
        def configure_optimizers(self) -> Any:
            return self.optimizer([p for p in self.parameters() if p.requires_grad])

    callback = learner(learned=LearnedStepSize(per=per))
    fitted = trainer(Thaws(), callback, max_epochs=3)
    fitted.fit(Net(sgd(0.1, momentum=0.9)), **loaders())
    lengths = [len(record["learning_rates"]) for record in callback.history]
    assert lengths == [1, 1, 2, 2, 2, 2]
    shown = [group["lr"] for group in fitted.optimizers[0].param_groups]
    assert shown == pytest.approx(callback.learning_rates) and shown[1] != 0.02


@pytest.mark.feature(
    "frozen and tied parameters, parameters outside the optimizer", "works", "each as in the live optimizer"
)
def test_frozen_tied_and_foreign_parameters_are_left_to_the_run(trainer: Any) -> None:
    module = TiedAndFrozen()
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer(learner()).fit(module, **loaders())
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"net.0.weight", "net.0.bias", "net.2.bias", "net.5.weight", "net.5.bias"}
    assert module.net[0].weight is module.net[2].weight


def test_what_is_logged_is_what_the_module_would_log(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shown(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(self, fitted: Any, module: Any, *_: Any) -> None:
            module.log("neighbour", float(fitted.global_step), on_step=True, on_epoch=True)
            self.seen.append({**fitted.callback_metrics, **fitted.progress_bar_metrics})

        def on_train_epoch_end(self, fitted: Any, module: Any) -> None:
            self.seen.append(dict(fitted.callback_metrics))

    def fit() -> list[Any]:
        logger, shown = MemoryLogger(), Shown()
        torch.manual_seed(0)
        callbacks = (learner(meta_learning_rate=0.2), shown)
        trainer(*callbacks, logger=logger, max_epochs=3, log_every_n_steps=2).fit(Plain(sgd(0.1)), **loaders())
        assert any("l2l/meta_objective" in row for row in logger.rows)
        return [{key: float(value) for key, value in row.items()} for row in [*logger.rows, *shown.seen]]

    direct = fit()
    monkeypatch.setattr(
        "lightning_l2l.host.report.log_on_step",
        lambda _, module, name, value, prog_bar: module.log(name, value, prog_bar=prog_bar, on_step=True),
    )
    assert str(direct) == str(fit())  # as text, since a number may be NaN
