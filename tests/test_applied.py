"""The rate that is logged is the rate that was applied, under every schedule; and the schedule stays the user's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import MemoryLogger, Plain, Rich, TiedAndFrozen, Witness, difference, learner, loaders, observer, sgd
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler
from torchopt import sgd as torchopt_sgd

from lightning_l2l import LearnedHyperparameters, LearnedOptimizer, LearnedStepSize
from lightning_l2l.core.inner import mirror
from lightning_l2l.host.applied import AppliedValues

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
    "plateau": lambda o: {"scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=9.0), "monitor": "val_loss"},
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
        assert {round(a[0] / b[0] / factor, 9) for a, b in zip(witness.rates, alone.rates, strict=True)} <= {1.0, 0.1, 10.0}
        return
    expected = [factor * rate for rates in alone.rates for rate in rates]
    assert [rate for rates in witness.rates for rate in rates] == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize("schedule", ["none", "exponential"])
def test_learning_rate_monitor_shows_the_applied_rate(trainer: Any, first: bool, schedule: str) -> None:
    logger, callback = MemoryLogger(), learner(initial_search=True)
    monitor = LearningRateMonitor(logging_interval="step")
    callbacks = [monitor, callback] if first else [callback, monitor]
    module = Plain(sgd(0.1), SCHEDULES[schedule])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_l2l.host.look_ahead._SEARCH_STEPS", 2)
        trainer(*callbacks, logger=logger).fit(module, **loaders())
    monitored = [row["lr-SGD"] for row in logger.rows if "lr-SGD" in row]
    assert monitored == pytest.approx(logged(logger.rows, "l2l/learning_rate"), rel=1e-12) and len(monitored) == 12


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


def test_frozen_tied_and_foreign_parameters_are_left_to_the_run(trainer: Any) -> None:
    module = TiedAndFrozen()
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer(learner()).fit(module, **loaders())
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"net.0.weight", "net.0.bias", "net.2.bias", "net.5.weight", "net.5.bias"}
    assert module.net[0].weight is module.net[2].weight


# -- AppliedValues alone -------------------------------------------------------------------------------------------


def attached(optimizer: Any, module: Any, offset: float = 0.5, **options: Any) -> tuple[AppliedValues, LearnedStepSize]:
    learned = LearnedStepSize(**options)
    applied = AppliedValues(optimizer, module, learned)
    with torch.no_grad():
        learned.learning_rate.fill_(offset)
    applied.refresh(force=True)
    return applied, learned


def test_a_tensor_rate_is_not_compounded_by_its_own_rounding() -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1), foreach=False, capturable=False)
    rate = optimizer.param_groups[0]["lr"]
    applied, _ = attached(optimizer, module)
    for _ in range(50):
        applied.refresh()
        with applied.scheduled():
            assert rate.item() == torch.tensor(0.1).item()
    assert rate.item() == pytest.approx(0.1 * torch.tensor(0.5).exp().item(), rel=1e-6)
    assert optimizer.param_groups[0]["lr"] is rate


def test_split_groups_are_whole_again_whatever_happens() -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (whole,) = optimizer.param_groups
    applied, _ = attached(optimizer, module, per="tensor")
    applied.split()
    assert len(optimizer.param_groups) == 2
    applied.refresh()  # a GradScaler may skip the step, and with it the hook after it
    assert optimizer.param_groups == [whole] and optimizer.param_groups[0] is whole


def test_values_come_back_from_a_saved_state_and_a_foreign_rate_becomes_the_schedule() -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    applied, learned = attached(optimizer, module)
    saved = applied.state_dict()
    again = LearnedStepSize()
    again.load_state_dict(learned.state_dict())
    assert AppliedValues(optimizer, module, again, saved).scheduled_rates == [0.1]
    optimizer.param_groups[0]["lr"] = 0.7
    assert AppliedValues(optimizer, module, again, saved).scheduled_rates == [0.7]


def test_a_learned_optimizer_that_sets_nothing_is_refused() -> None:
    class Descent(LearnedOptimizer):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(0.1))

        def transformation(self) -> Any:
            return torchopt_sgd(0.1)

    module = torch.nn.Linear(2, 1)
    with pytest.raises(MisconfigurationException, match="never applied"):
        AppliedValues(torch.optim.SGD(module.parameters(), lr=0.1), module, Descent())


def test_the_module_can_be_copied_and_pickled_during_the_fit(trainer: Any) -> None:
    class Copies(Witness):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]

    copies, module = Copies(), Pickles(sgd_for_pickle)
    trainer(learner(), copies).fit(module, **loaders())
    for found in copies.copies:
        assert found.lr_scheduler_step.__func__ is type(module).lr_scheduler_step
        assert found.lr_scheduler_step.__self__ is found
        assert difference(mirror(module.configure_optimizers(), module.named_parameters()).groups[0].names,
                          mirror(found.configure_optimizers(), found.named_parameters()).groups[0].names) == ""


class Pickles(Plain):
    pass


def sgd_for_pickle(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
