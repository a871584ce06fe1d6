"""Any loop: manual optimization, plain PyTorch, Fabric, a Trainer that is used again."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from any_module import Regression, batches, examples, fit, highest, same_state, unchanged
from conftest import QUIET
from lightning.fabric import Fabric
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_l2l import Displacement, LearnToLearn


class Gan(pl.LightningModule):
    """By hand, as most are: a discriminator's step, then a generator's."""

    def __init__(self, rates: tuple[float, float] = (1e-3, 1e-3)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rates = rates
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        real = batch[0] * 0.3 + 1
        fake = self.generator(torch.randn(len(real), 4))
        self.toggle_optimizer(of_critic)
        loss = functional.softplus(-self.critic(real)).mean() + functional.softplus(self.critic(fake.detach())).mean()
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        self.untoggle_optimizer(of_critic)
        self.toggle_optimizer(of_generator)
        loss = functional.softplus(-self.critic(fake)).mean()
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(module.parameters(), lr=rate, betas=(0.5, 0.9))
            for module, rate in zip((self.generator, self.critic), self.rates, strict=True)
        ]


class Rows(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))


@pytest.mark.feature("manual optimization: GANs, reinforcement learning", "training gradients", topic="loop")
@pytest.mark.feature(
    "several optimizers",
    "training gradients",
    "a rate for each; raised only where it is far too small, since they may be players",
    topic="optimizer",
)
def test_players_of_a_gan_each_have_rates_a_history_and_names_of_their_own() -> None:
    callback, rows = LearnToLearn(), Rows()
    fit(lambda: Gan((1e-6, 1e-3)), callback, max_epochs=20, logger=rows)
    assert len(callback.learning_rates) == 2
    assert {record["optimizer"] for record in callback.history} == {0, 1}
    generator = [record for record in callback.history if record["optimizer"] == 0]
    assert generator[-1]["learning_rates"][0] > 2e-6  # far too small at first
    assert [record["step"] for record in generator] == sorted({record["step"] for record in generator})
    names = {name for row in rows.rows for name in row}
    assert {"l2l/learning_rate/optimizer_0", "l2l/learning_rate/optimizer_1"} <= names
    assert {"l2l/cosine/optimizer_0", "l2l/cosine/optimizer_1"} <= names
    assert callback.export_schedule(optimizer=1).columns == ("lr",)


def test_progress_against_another_player_does_not_raise_a_rate_that_moves_the_weights() -> None:
    callback = LearnToLearn()
    learned = fit(Gan, callback, max_epochs=20)
    assert callback.learning_rates == [1e-3, 1e-3]
    assert same_state(learned, fit(Gan, max_epochs=20))


def test_watching_leaves_a_gan_as_it_is() -> None:
    assert unchanged(Gan)


class Reinforce(Regression):
    """One optimizer by hand; the loss is -(advantage x log-probability), of either sign."""

    def __init__(self) -> None:
        super().__init__(lambda parameters: torch.optim.Adam(parameters, lr=1e-5))
        self.automatic_optimization = False
        self.rewards: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        policy = torch.distributions.Normal(self.net(batch[0]), 0.3)
        action = policy.sample()
        reward = -(action - batch[1]).square()
        loss = -((reward - reward.mean()) * policy.log_prob(action)).mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.rewards.append(reward.mean().item())


def test_a_policy_gradient_by_hand_learns_its_rate() -> None:
    callback = LearnToLearn()
    plain, learned = fit(Reinforce, max_epochs=25), fit(Reinforce, callback, max_epochs=25)
    assert highest(callback) > 2e-5
    ends = [sum(trainer.lightning_module.rewards[-40:]) for trainer in (learned, plain)]
    assert ends[0] > ends[1]
    assert unchanged(Reinforce)


def test_a_training_step_that_steps_itself_is_never_called_for_a_held_out_gradient() -> None:
    with pytest.raises(MisconfigurationException, match="steps its optimizers by hand.*held_out_loss=fn"):
        fit(Reinforce, LearnToLearn(meta_data="val"))
    callback = LearnToLearn(held_out_loss=lambda module, batch: module.loss(batch))
    fit(Reinforce, callback)
    assert all(math.isfinite(record["held_out_loss"]) for record in callback.history)


def test_an_optimizer_that_steps_less_often_is_learned_at_its_own_pace() -> None:
    class Seldom(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            generator, _ = self.optimizers()
            step = generator.step
            if batch_idx % 4:
                generator.step = lambda *_, **__: None
            super().training_step(batch, batch_idx)
            generator.step = step

    callback = LearnToLearn()
    fit(Seldom, callback, max_epochs=10)
    last = {record["optimizer"]: record["step"] for record in callback.history}
    assert last[0] <= 20 < last[1] <= 80


EPOCHS = 8


def start() -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    net = Regression().net
    return net, batches()


def rates_of_a_plain_loop() -> list[list[float]]:
    net, loader = start()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    tuner = Displacement().attach(optimizer, planned_steps=EPOCHS * len(loader), modules=[net])
    for epoch in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            loss = functional.mse_loss(net(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            tuner.step(loss, passes=epoch)
    return [record["learning_rates"] for record in tuner.history]


def rates_of_fabric() -> list[list[float]]:
    net, loader = start()
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9))
    tuner = Displacement().attach(optimizer, planned_steps=EPOCHS * len(loader), modules=[net])
    for epoch in range(EPOCHS):
        for batch in fabric.setup_dataloaders(loader):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(batch[0]), batch[1])
            fabric.backward(loss)
            optimizer.step()
            tuner.step(loss, passes=epoch)
    return [record["learning_rates"] for record in tuner.history]


def rates_of_lightning(module: pl.LightningModule) -> list[list[float]]:
    module.net, loader = start()
    callback = LearnToLearn(meta_data="train")
    fit(module, callback, train=loader, max_epochs=EPOCHS)
    return [record["learning_rates"] for record in callback.history]


class Small(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def stepped_by_hand(module: Any, batch: Any) -> Tensor:
    """What a training step does with manual optimization."""
    optimizer, loss = module.optimizers(), module.loss(batch)
    optimizer.zero_grad()
    module.manual_backward(loss)
    optimizer.step()
    return loss


class ByHand(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return stepped_by_hand(self, batch)


@pytest.mark.feature("plain PyTorch, Fabric", "works", "`Displacement().attach(optimizer)`", topic="loop")
def test_a_plain_loop_fabric_and_lightning_learn_the_same_rates() -> None:
    plain = rates_of_a_plain_loop()
    assert plain[0] != plain[-1]
    for others in (rates_of_fabric(), rates_of_lightning(Small())):
        for ours, theirs in zip(plain, others, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_one_optimizer_that_is_stepped_by_hand_learns_like_an_automatic_one() -> None:
    by_hand, automatic = rates_of_lightning(ByHand()), rates_of_lightning(Small())
    # A loop by hand has no known length; the margin of the early steps and the decay at the end depend on it.
    assert max(by_hand)[0] > 2e-3 and max(automatic)[0] > 2e-3


@pytest.mark.parametrize("stage", ["Lightning", "Fabric"])
def test_a_wrapped_optimizer_is_unwrapped(stage: str) -> None:
    net, _ = start()
    raw = torch.optim.SGD(net.parameters(), lr=0.1)
    if stage == "Fabric":
        _, wrapped = Fabric(accelerator="cpu", devices=1).setup(net, raw)
    else:
        from lightning.pytorch.core.optimizer import LightningOptimizer

        wrapped = LightningOptimizer(raw)
    assert Displacement().attach(wrapped).optimizer is raw


def test_held_out_gradients_of_a_function_leave_a_plain_loop_as_it_is() -> None:
    def weights(watched: bool) -> tuple[dict[str, Tensor], list[Any]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        inputs, targets = examples(64, seed=5)[:]
        tuner = Displacement().attach(optimizer, meta_learning_rate=0, every_n_steps=2, modules=[net])
        held_out = tuner.held_out_gradient(lambda: functional.mse_loss(net(inputs), targets))
        for batch in batches():
            optimizer.zero_grad()
            loss = functional.mse_loss(net(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            if watched:
                tuner.step(loss, held_out=held_out)
        return net.state_dict(), tuner.history

    (watched, history), (plain, _) = weights(True), weights(False)
    assert history and all(math.isfinite(record["held_out_cosine"][0]) for record in history)
    assert all(torch.equal(watched[name], plain[name]) for name in plain)


class Slow(Regression):
    rate = 1e-6

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


@pytest.mark.feature("the same Trainer with another model", "works", "begins anew", topic="loop")
def test_another_model_in_the_same_trainer_begins_anew() -> None:
    callback = LearnToLearn()
    trainer = fit(Slow, callback, max_epochs=4)
    learned = max(record["learning_rates"][0] for record in callback.history)
    other = Regression()
    trainer.fit_loop.max_epochs = 8
    trainer.fit(other, batches(shuffle=True), batches(64, seed=5))
    assert learned > 2e-6
    assert callback.history[0]["step"] <= 12 and callback.history[0]["base_rates"] == [0.05]
    assert callback.history[0]["learning_rates"][0] < 0.05 * 3


@pytest.mark.feature("`fit` twice", "works", "goes on with what was learned", topic="loop")
def test_the_same_model_goes_on_with_what_was_learned() -> None:
    callback = LearnToLearn()
    trainer = fit(Slow, callback, max_epochs=4)
    learned, before = callback.learning_rates[0], len(callback.history)
    trainer.fit_loop.max_epochs = 8
    trainer.fit(trainer.lightning_module, batches(shuffle=True), batches(64, seed=5))
    assert len(callback.history) > before
    assert callback.history[before]["step"] > 32
    assert callback.history[before]["base_rates"] == pytest.approx([1e-6])
    assert callback.history[before]["learning_rates"][0] > learned / 3


def test_the_same_callback_in_another_trainer_begins_anew() -> None:
    callback = LearnToLearn()
    fit(Slow, callback, max_epochs=4)
    first = [record["learning_rates"] for record in callback.history]
    fit(Slow, callback, max_epochs=4)
    assert [record["learning_rates"] for record in callback.history] == first


@pytest.mark.feature("`max_time`", "works", "what the callback does counts", topic="loop")
def test_a_training_that_is_limited_in_time_ends_and_learns() -> None:
    callback = LearnToLearn()
    trainer = fit(Slow, callback, max_epochs=-1, max_time={"seconds": 2})
    assert trainer.global_step > 20 and highest(callback) > 2e-6


@pytest.mark.feature(
    "optimizers that are made anew during a fit", "works", "what was learned is kept", topic="optimizer"
)
def test_an_optimizer_that_is_made_anew_is_followed() -> None:
    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                self.learned = callback.learning_rates[0]
                trainer.strategy.setup_optimizers(trainer)

    anew, callback = Anew(), LearnToLearn()
    trainer = fit(Slow, anew, callback, max_epochs=6)
    assert anew.learned > 2e-6
    assert min(record["learning_rates"][0] for record in callback.history if record["step"] > 24) > anew.learned / 3
    assert {record["base_rates"][0] for record in callback.history} == {1e-6}
    assert trainer.optimizers[0].param_groups[0]["lr"] == callback.learning_rates[0]


@pytest.mark.feature("parameter groups that are added later", "works", "learned from then on", topic="optimizer")
def test_a_group_that_is_added_during_the_fit_has_a_rate_of_its_own_from_then_on() -> None:
    class Thaws(Slow):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                self.optimizers().add_param_group({"params": self.net[0].parameters(), "lr": 1e-5})

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=1e-6)

    callback = LearnToLearn()
    fit(Thaws, callback, max_epochs=8)
    assert [len(record["learning_rates"]) for record in callback.history][:: len(callback.history) - 1] == [1, 2]
    assert highest(callback) > 2e-5


@pytest.mark.feature("lazy modules", "works", topic="step")
@pytest.mark.parametrize("options", [{"fast_dev_run": 3}, {"num_sanity_val_steps": 1}, {}])
def test_lazy_modules_get_their_shapes_from_the_run(options: Any) -> None:
    class Lazy(Regression):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.LazyBatchNorm1d(), nn.LazyLinear(1))

    callback = LearnToLearn()
    learned = fit(Lazy, callback, **options)
    assert callback.learning_rates and learned.global_step > 0
    watch = LearnToLearn(meta_learning_rate=0, initial_search=False)
    assert same_state(fit(Lazy, watch, **options), fit(Lazy, **options))


@pytest.mark.feature("no validation data", "training gradients", topic="data")
def test_without_validation_data_the_training_gradients_are_used() -> None:
    class Bare(Regression):
        validation_step = pl.LightningModule.validation_step

    callback = LearnToLearn()
    fit(Bare, callback)
    assert callback.history and all(math.isnan(record["held_out_loss"]) for record in callback.history)
    with pytest.raises(MisconfigurationException, match="no validation data"):
        fit(Bare, LearnToLearn(meta_data="val"))


@pytest.mark.feature("`32-true`, `64-true`, `bf16-true`, `bf16-mixed`, `16-mixed`", topic="precision")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_in_any_precision_the_run_is_left_as_it_is_and_a_small_rate_rises(precision: Any) -> None:
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # with a gradient scaler, as on a GPU
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]}
    assert unchanged(Regression, **options)
    callback = LearnToLearn()
    # In bfloat16 weights do not move by less than a 256th of themselves.
    fit(Small, callback, max_epochs=8, **options)
    assert highest(callback) > 1e-3 and all(math.isfinite(r["cosine"][0]) for r in callback.history)


def noam(step: int) -> float:
    return float(64**-0.5 * min(max(step, 1) ** -0.5, max(step, 1) * 40**-1.5))


schedulers = torch.optim.lr_scheduler
SCHEDULES: dict[str, Any] = {
    "Noam": (1.0, lambda o: schedulers.LambdaLR(o, noam)),
    "a function that returns the rate": (1.0, lambda o: schedulers.LambdaLR(o, lambda step: 0.05 / (1 + step / 100))),
    "OneCycle": (0.05, lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=200)),
    "Cyclic": (0.05, lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=10)),
    "cosine": (0.05, lambda o: schedulers.CosineAnnealingLR(o, 80)),
}


@pytest.mark.feature(
    "Noam, OneCycle, Cyclic, cosine, factors that are rates",
    "works",
    "`get_last_lr()` is the applied rate",
    topic="schedule",
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_learned_multiplies_the_schedule_and_is_shown(name: str) -> None:
    given, make = SCHEDULES[name]

    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=given, momentum=0.9)
            return [optimizer], [{"scheduler": make(optimizer), "interval": "step"}]

        def on_train_batch_end(self, *_: Any) -> None:
            shown = self.lr_schedulers().get_last_lr()[0], self.optimizers().param_groups[0]["lr"]
            assert shown[0] == pytest.approx(shown[1])

    callback = LearnToLearn()
    fit(Scheduled, callback, max_epochs=10)
    reference = fit(Scheduled, max_epochs=10).optimizers[0].param_groups[0]["lr"]
    (tuner,) = callback.state_dict()["tuners"]
    assert tuner["base_rates"] == pytest.approx([reference], rel=1e-6)


class PlateauByHand(Regression):
    """One optimizer that is stepped by hand, and a scheduler that reads ``float(group["lr"])``."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.base: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return stepped_by_hand(self, batch)

    def on_train_epoch_end(self) -> None:
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(1.0)
        assert scheduler.get_last_lr() == [float(self.optimizers().param_groups[0]["lr"])]
        copy.deepcopy(scheduler), pickle.dumps(scheduler)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)]


@pytest.mark.feature("ReduceLROnPlateau that is stepped by hand", "works", "its base rate falls", topic="schedule")
def test_a_plateau_that_is_noticed_by_hand_cuts_the_base_rate() -> None:
    callback = LearnToLearn()
    trainer = fit(PlateauByHand, callback, max_epochs=6)
    assert callback.history[-1]["learning_rates"] != callback.history[-1]["base_rates"]
    for record in callback.history:
        assert record["base_rates"] == [1e-4 * 0.5 ** max(0, (record["step"] - 1) // 8 - 1)]
    assert "lr_schedulers" not in vars(trainer.lightning_module)


def test_a_plain_loop_hides_what_is_learned_from_a_scheduler_that_would_take_it_for_its_own() -> None:
    weight = nn.Parameter(torch.full((4, 4), 5.0))
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, eps=0)
    tuner = Displacement().attach(optimizer, planned_steps=100)
    for step in range(50):
        optimizer.zero_grad()
        loss = 0.5 * weight.square().sum()
        loss.backward()
        optimizer.step()
        tuner.step(loss)
        if step % 10 == 9:
            with tuner.rates.hidden():
                scheduler.step(1.0)
    assert tuner.rates.base == [1e-6 * 0.5**4] and tuner.rates.applied[0] > 1e-5


class Noise(Regression):
    """Targets that cannot be learned: the rate falls to zero in the last 15 % of the steps."""

    def loss(self, batch: Any) -> Tensor:
        return functional.mse_loss(self.net(batch[0]), torch.randn(len(batch[0]), 1))

    def train_dataloader(self) -> Any:
        return batches(64 if self.current_epoch < 2 else 256)

    def val_dataloader(self) -> Any:
        return batches(64, seed=5)


class SeesRates(pl.Callback):
    def __init__(self, learner: LearnToLearn) -> None:
        self.learner, self.rates = learner, list[float]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates += self.learner.learning_rates


@pytest.mark.feature("epochs that become longer (`reload_dataloaders_every_n_epochs`)", "works", topic="loop")
def test_the_rate_falls_at_the_end_of_a_training_whose_epochs_become_longer() -> None:
    callback = LearnToLearn()
    notes = SeesRates(callback)
    torch.manual_seed(1)
    trainer = pl.Trainer(
        **{**QUIET, "callbacks": [callback, notes], "max_epochs": 6, "reload_dataloaders_every_n_epochs": 1}
    )
    trainer.fit(Noise())
    assert len(notes.rates) == 2 * 2 + 4 * 8
    assert min(notes.rates[:30]) > 0.02 and notes.rates[-1] < 0.02 and callback.learning_rates == [0]


def test_a_training_that_goes_on_after_its_end_learns_again_until_the_new_one() -> None:
    callback = LearnToLearn()
    notes, module = SeesRates(callback), Noise()
    torch.manual_seed(1)
    trainer = pl.Trainer(**{**QUIET, "callbacks": [callback, notes], "max_epochs": 4})
    trainer.fit(module, batches())
    assert callback.learning_rates == [0]
    trainer.fit_loop.max_epochs = 8
    trainer.fit(module, batches())
    assert len(notes.rates) == 64 and min(notes.rates[32:54]) > 0.02 and callback.learning_rates == [0]


def test_a_run_of_unknown_length_that_goes_on_after_a_decay_has_a_rate() -> None:
    weight = nn.Parameter(torch.full((4, 4), 5.0))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def train(tuner: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (weight * torch.randn(4, 4)).sum()
            loss.backward()
            optimizer.step()
            tuner.step(loss)

    torch.manual_seed(0)
    first = Displacement().attach(optimizer, planned_steps=40, divergence_guard=False)
    train(first, 40)
    assert first.rates.applied == [0]
    state = first.state_dict()
    first.close()
    second = Displacement().attach(optimizer, divergence_guard=False)
    second.load_state_dict(state)
    train(second, 5)
    assert 0.05 < second.rates.applied[0] < 1


def test_steps_after_the_planned_ones_are_said_to_learn_nothing() -> None:
    weight = nn.Parameter(torch.full((4, 4), 5.0))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    tuner = Displacement().attach(optimizer, planned_steps=40, divergence_guard=False)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="after the 40 steps that were planned") as found:
        for _ in range(60):
            optimizer.zero_grad()
            loss = (weight * torch.randn(4, 4)).sum()
            loss.backward()
            optimizer.step()
            tuner.step(loss)
    assert len(found) == 1 and tuner.rates.applied == [0]


def test_a_copy_of_the_callback_in_mid_training_has_seen_what_it_has_seen_and_knows_no_model() -> None:
    class Copies(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.copied = pickle.loads(pickle.dumps(callback))
            self.history = copy.deepcopy(callback.history)

    callback, copies = LearnToLearn(average_weights=True), Copies()
    fit(Slow, callback, copies, max_epochs=3)
    assert copies.history and copies.copied.history == copies.history
    assert copies.copied.export_schedule() == callback.export_schedule()
    fit(Slow, copies.copied, max_epochs=3)
    assert copies.copied.history == callback.history  # another model begins anew


@pytest.mark.feature('`group["lr"] *= 0.7` by hand', "works", "the base rate falls", topic="schedule")
def test_a_rate_that_is_multiplied_by_hand_is_the_base_that_falls() -> None:
    class Halves(Regression):
        def on_train_epoch_end(self) -> None:
            for group in self.optimizers().param_groups:
                group["lr"] *= 0.7

    callback = LearnToLearn()
    fit(Halves, callback, max_epochs=10)
    for record in callback.history:
        assert record["base_rates"][0] == pytest.approx(0.05 * 0.7 ** ((record["step"] - 1) // 8), rel=1e-6)


@pytest.mark.feature("`maximize=True`", topic="optimizer")
def test_what_is_maximized_rises() -> None:
    class Likelihood(Regression):
        def loss(self, batch: Any) -> Tensor:
            return torch.exp(-super().loss(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9, maximize=True)

    callback = LearnToLearn()
    trainer = fit(Likelihood, callback, max_epochs=15)
    assert trainer.callback_metrics["val_loss"] > fit(Likelihood, max_epochs=15).callback_metrics["val_loss"]
    assert highest(callback) > 2e-4


@pytest.mark.skipif(lightning.__version__ < "2.6", reason="Lightning 2.2 takes no callback of the other namespace")
@pytest.mark.feature(
    "`pytorch_lightning` and `lightning.pytorch`",
    "works",
    "tested with 2.6; Lightning 2.2 takes no callback of the other namespace",
    topic="loop",
)
def test_both_namespaces_learn_the_same_rates() -> None:
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        loss, make_net = Small.loss, Small.make_net
        training_step, validation_step = Small.training_step, Small.validation_step
        configure_optimizers = Small.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net = self.make_net()

    found = []
    for trainer, module in ((pl.Trainer, Small), (pytorch_lightning.Trainer, Other)):
        callback = LearnToLearn()
        torch.manual_seed(0)
        made = module()
        trainer(**QUIET | {"max_epochs": 6}, callbacks=[callback]).fit(made, batches(), batches(64, seed=5))
        found.append([(r["learning_rates"], r["held_out_loss"]) for r in callback.history])
    assert found[0] == found[1] and all(math.isfinite(loss) for _, loss in found[1])
