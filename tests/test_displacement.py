"""The default estimator equals a slow twin that is written on one page: average, cosine, and rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import NotesRates, Plain, difference, examples, loader, sgd
from torch import Tensor, nn
from torch.nn import functional

from lightning_l2l import Displacement, LearnToLearn

Parameters = list[Tensor]


# The constants of the rule, as the documentation has them.
FIRST, RATIO, SPEED, MARGIN, FULL, EARLY_MARGIN, EARLY = 10.0, 1.2, 2.0, 0.05, 0.2, 0.3, 0.2
DECAY_AT, PROGRESS, MEMORY, PASSES, SAMPLES = 0.85, -0.02, 0.6, 3, 64
STILL, RAMP, UNANIMOUS, NOWHERE, FROM_NOWHERE = 0.3, 2.0, -0.1, 1e-5, 10.0
CARELESS, BOLD, NEARLY, CLEARLY = 0.003, 1.0, 0.7, -0.2
RISEN, FEWEST = 0.1, 3


class SlowTwin:
    """What a page of the documentation says, in float64 and one number at a time.

    Args:
        optimizer: The optimizer that is watched.
        planned: The steps of the whole training.
        per: What shares a factor.
        held_out: Writes held-out gradients into ``.grad``; returns their loss.
        ramps: Whether a rate that hardly moves the weights rises at once.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        planned: float,
        per: str = "optimizer",
        held_out: Callable[[], float] | None = None,
        ramps: bool = False,
    ) -> None:
        self.optimizer, self.planned, self.held_out, self.ramps = optimizer, planned, held_out, ramps
        self.units = [[g] for g in optimizer.param_groups] if per == "group" else [optimizer.param_groups]
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.log = [0.0] * len(self.units)
        self.held = [0.0] * len(self.units)
        self.first = self.training = math.nan  # losses: the first one and the mean of the last ones
        self.held_losses: list[float] = []  # running means
        self.capped = False  # learned by heart
        self.reaches: list[list[float]] = [[] for _ in self.units]
        self.still: list[list[float]] = [[] for _ in self.units]
        self.raised = [(0, 1.0) for _ in self.units]  # the step of the last rise, and by how much
        self.since: list[list[float]] = [[] for _ in self.units]
        self.cosines: list[list[float]] = [[] for _ in self.units]
        self.t, self.next, self.folded, self.decay_from = 0, FIRST, 0, math.inf
        self.end, self.last, self.passes = math.ceil(DECAY_AT * planned), 0, 0.0
        self.records: list[dict[str, Any]] = []
        self.average: dict[Tensor, Tensor] = {}

    def sampled(self, t: int) -> bool:
        return t % max(1, t // SAMPLES) == 0

    def sums(self, unit: int) -> tuple[float, float, float, float, float]:
        along = gradients = moved = far = weights = 0.0
        has_matrices = any(p.dim() > 1 for group in self.optimizer.param_groups for p in group["params"])
        for group in self.units[unit]:
            for p in group["params"]:
                if p in self.average and p.grad is not None:
                    gradient = (-1 if group.get("maximize") else 1) * p.grad.to_dense().double()
                    away = p.detach().double() - self.average[p]
                    along += (gradient * away).sum().item()
                    gradients, moved = gradients + gradient.square().sum().item(), moved + away.square().sum().item()
                    if p.dim() > 1 or not has_matrices:
                        far += away.square().sum().item()
                        weights += p.detach().double().square().sum().item()
        return along, gradients, moved, far, weights

    def cosine(self, unit: int) -> float:
        along, gradients, moved, *_ = self.sums(unit)
        return along / math.sqrt(gradients * moved) if gradients * moved > 0 else math.nan

    def before_step(self) -> None:
        if not self.sampled(self.t):
            return
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.average = {p: self.average.get(p, p.detach().double().clone()) for p in trained}
        for unit, cosines in enumerate(self.cosines):
            found = self.cosine(unit)
            if not math.isnan(found):
                cosines.append(found)
                self.since[unit].append(found)
            _, gradient, _, moved, weights = self.sums(unit)
            if not self.ramps or not gradient or not 3 < self.t + 1 <= EARLY * self.planned:
                continue
            moved = math.sqrt(moved / weights)
            nowhere = moved < NOWHERE and (not cosines or sum(cosines) < 0)
            if self.t + 1 - self.raised[unit][0] < 2:
                moved *= self.raised[unit][1]
                nowhere = moved < NOWHERE and (not cosines or sum(cosines) < 0)
            reach = moved / min(self.t + 1, (self.t + 9) / 9) * self.planned
            self.reaches[unit].append(reach)
            agree = sum(cosines) / len(cosines) if cosines else math.nan
            was_chosen, has_moved = self.reaches[unit][0] >= CARELESS, max(self.reaches[unit]) >= STILL
            nowhere = nowhere and not has_moved
            if reach < STILL and not has_moved:
                n, total = len(self.since[unit]), sum(self.since[unit])
                clear = total < 0 and total**2 / n >= CLEARLY**2
                rises = nowhere or (agree < UNANIMOUS if was_chosen else clear)
            elif was_chosen or reach < STILL:
                rises = False
            else:
                asked = max(CLEARLY, NEARLY * sum(self.still[unit]) / len(self.still[unit]))
                n, total = len(self.since[unit]), sum(self.since[unit])
                rises = reach < BOLD and total / n <= asked < 0 and n >= (CLEARLY / asked) ** 2
            if not has_moved and not math.isnan(found):
                self.still[unit].append(found)
            if rises:
                self.raised[unit] = self.t + 1, FROM_NOWHERE if nowhere else RAMP
                self.log[unit] += math.log(self.raised[unit][1])
                self.since[unit] = []

    def after_step(self) -> None:
        self.t += 1
        if self.sampled(self.t - 1):
            for step in range(self.folded + 1, self.t + 1):
                for p, average in self.average.items():
                    average += 9 / (step + 9) * (p.detach().double() - average)
            self.folded = self.t
        if self.t >= round(self.next) or self.last < self.end <= self.t:
            self.update()

    def update(self) -> None:
        margin = MARGIN + EARLY_MARGIN * max(0.0, 1 - self.t / (EARLY * self.planned))
        found, means = [], []
        if self.held_out is not None:
            loss = self.held_out()
            mean = self.held_losses[-1] if self.held_losses else loss
            self.held_losses.append(MEMORY * mean + (1 - MEMORY) * loss)
        for unit, cosines in enumerate(self.cosines):
            n = len(cosines)
            mean = sum(cosines) / n
            error = math.sqrt(sum((c - mean) ** 2 for c in cosines) / n / n) if n >= 3 else 1.0
            found.append((mean, error))
            if self.held_out is not None:
                self.held[unit] = MEMORY * self.held[unit] + (1 - MEMORY) * self.cosine(unit)
                mean = max(mean, self.held[unit])
            elif self.passes >= PASSES:
                mean = max(mean, -MARGIN)
            means.append(mean)
            if self.decay_from == math.inf:
                rise, fall = (-mean - error - margin) / FULL, (mean - error) / FULL
                self.log[unit] += SPEED * math.log(RATIO) * (min(1, max(0, rise)) - min(1, max(0, fall)))
                self.log[unit] = max(self.log[unit], 0.0)
        if len(self.held_losses) >= FEWEST:
            progress = self.first - min(self.held_losses)
            risen = self.held_losses[-1] - min(self.held_losses) > RISEN * progress > RISEN**2 * self.first
            self.capped = self.capped or risen and self.training < min(self.held_losses)
        if self.capped:
            self.log = [min(value, 0.0) for value in self.log]
        if self.end <= self.t < self.planned and self.decay_from == math.inf and max(means) > PROGRESS:
            self.decay_from = self.t
        while round(self.next) <= self.t:
            self.next *= RATIO
        self.last = self.t
        self.cosines = [[] for _ in self.units]
        self.records.append({"step": self.t, "cosine": found, "learning_rates": self.rates()})

    def rates(self) -> list[float]:
        left = 1.0 if self.decay_from == math.inf else (self.planned - self.t) / (self.planned - self.decay_from)
        return [rate * math.exp(self.log[min(i, len(self.log) - 1)]) * left for i, rate in enumerate(self.base)]


def assert_equal(history: list[dict[str, Any]], twin: SlowTwin, accuracy: float = 1e-6) -> None:
    assert [record["step"] for record in history] == [record["step"] for record in twin.records] and history
    for record, expected in zip(history, twin.records, strict=True):
        means, errors = zip(*expected["cosine"], strict=True)
        assert record["cosine"] == pytest.approx(means, abs=accuracy)
        # A variance is a difference of numbers that may be nearly equal.
        assert record["cosine_error"] == pytest.approx(errors, abs=10 * accuracy)
        assert record["learning_rates"] == pytest.approx(expected["learning_rates"], rel=10 * accuracy)


class TwoGroups(Plain):
    """Two layers with a rate each."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def configure_optimizers(self) -> Any:
        self.optimizer = self.optimizer([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}])
        self.optimizer.param_groups[1]["lr"] /= 5
        return self.optimizer


class Beside(pl.Callback):
    """The twin beside a run of Lightning's."""

    def __init__(self, held_out: Any = None, **options: Any) -> None:
        self.held_out, self.options = held_out, options

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def gradients() -> float:
            loss = functional.cross_entropy(pl_module.net(self.held_out[0]), self.held_out[1])
            parameters = list(pl_module.net.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            return loss.item()

        held_out = None if self.held_out is None else gradients
        self.twin = SlowTwin(
            trainer.optimizers[0], trainer.estimated_stepping_batches, held_out=held_out, **self.options
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.twin.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].item()
        if math.isnan(self.twin.first):
            self.twin.first = self.twin.training = loss
        self.twin.training += 0.2 * (loss - self.twin.training)
        if trainer.global_step > self.twin.t:
            self.twin.passes = trainer.current_epoch
            self.twin.after_step()


NOTED = lambda rate: lambda parameters: NotesRates(parameters, lr=rate, momentum=0.9)  # noqa: E731


@pytest.mark.parametrize("per", ["optimizer", "group"])
@pytest.mark.parametrize("with_held_out", [False, True], ids=["training gradients", "held-out gradients, too"])
@pytest.mark.parametrize("rate", [0.003, 0.3], ids=["small", "large"])
def test_a_whole_fit_is_that_of_the_twin(trainer: Any, per: Any, with_held_out: bool, rate: float) -> None:
    held_out = tuple(t.double() if t.is_floating_point() else t for t in examples(16, seed=2).tensors)
    callback = LearnToLearn(
        Displacement(per=per),
        meta_data=[held_out] if with_held_out else "train",
        initial_search=False,
        divergence_guard=False,
    )
    beside, module = Beside(held_out if with_held_out else None, per=per), TwoGroups(NOTED(rate))
    options = {"precision": "64-true", "max_epochs": 23, "check_val_every_n_epoch": 99}
    data = loader(96, shuffle=True), loader(24, 1)
    trainer(beside, callback, **options).fit(module, *data)  # 276 steps: the last ones in strides
    assert_equal(callback.history, beside.twin)
    rates = {record["step"]: record["learning_rates"] for record in callback.history}
    assert len({tuple(value) for value in rates.values()}) > 1
    assert module.optimizer.used[10:12] == [rates[10]] * 2  # what the record says is what is stepped with


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}])
def test_accumulated_and_clipped_gradients_are_those_that_the_optimizer_gets(trainer: Any, options: Any) -> None:
    callback = LearnToLearn(meta_data="train", initial_search=False, divergence_guard=False)
    beside, module = Beside(), TwoGroups(NOTED(0.1))
    trainer(beside, callback, precision="64-true", max_epochs=10, **options).fit(module, loader(), loader(16, 1))
    assert_equal(callback.history, beside.twin)


def train(
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    steps: int = 90,
    each: Callable[[int], None] = lambda step: None,
    closure: bool = False,
    ramps: bool = False,
    per: Any = "optimizer",
) -> tuple[Any, SlowTwin]:
    """A loop of plain PyTorch with the estimator and its twin."""
    twin = SlowTwin(optimizer, steps, per, ramps=ramps)
    tuner = Displacement(per=per).attach(optimizer, planned_steps=steps, initial_search=ramps, divergence_guard=ramps)
    for step in range(steps):
        each(step)

        def gradients(step: int = step) -> Tensor:
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            twin.before_step()
            return value

        if closure:
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()
        twin.after_step()
        tuner.step(loss(step).detach() if ramps else None)
    return tuner, twin


def noisy_valley(parameters: Parameters, sign: float = 1.0) -> Callable[[int], Tensor]:
    targets = torch.randn(200, sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))

    def loss(step: int) -> Tensor:
        weights = torch.cat([p.flatten() for p in parameters])
        curvature = torch.linspace(0.1, 1, len(weights))
        return sign * 0.5 * (curvature * (weights - 0.3 * targets[step].to(weights)) ** 2).sum()

    return loss


def two(dtype: torch.dtype = torch.float64) -> Parameters:
    return [nn.Parameter(torch.full((4, 3), 2.0, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adagrad", "RMSprop"])
def test_plain_loops_with_and_without_closures(kind: str, closure: bool) -> None:
    parameters = two()
    groups = [{"params": [parameter]} for parameter in parameters]
    tuner, twin = train(
        parameters, getattr(torch.optim, kind)(groups, lr=0.03), noisy_valley(parameters), closure=closure, per="group"
    )
    assert_equal(tuner.history, twin, 1e-9)


def test_a_rate_that_hardly_moves_the_weights_rises_at_once() -> None:
    parameters = two()
    tuner, twin = train(parameters, torch.optim.SGD(parameters, lr=1e-6), noisy_valley(parameters), ramps=True)
    assert_equal(tuner.history, twin, 1e-9)
    assert tuner.rates.applied[0] > 1e-4 or max(r["learning_rates"][0] for r in tuner.history) > 1e-4
    assert tuner.search_result.steps > 0 and "multiplied by" in tuner.search_result.reason


def test_a_rate_that_nobody_can_have_chosen_rises_further_than_one_that_is_small() -> None:
    ends = []
    for rate in (1e-6, 4e-3):
        parameters = two()
        tuner, twin = train(parameters, torch.optim.SGD(parameters, lr=rate), noisy_valley(parameters), ramps=True)
        assert_equal(tuner.history, twin, 1e-9)
        ends.append(max(record["learning_rates"][0] for record in tuner.history[:3]))
    assert ends[0] > ends[1]


def test_a_training_that_has_converged_early_is_not_one_whose_rate_is_too_small() -> None:
    weight = nn.Parameter(torch.full((3, 3), 2.0))
    optimizer = torch.optim.SGD([weight], lr=0.05)
    tuner = Displacement().attach(optimizer, planned_steps=1000, meta_learning_rate=1e-9)  # none but fast rises
    for _ in range(240):
        optimizer.zero_grad()
        loss = 0.5 * (weight - 1).square().sum()
        loss.backward()
        optimizer.step()
        tuner.step(loss)
    assert loss < 0.01  # so gradients agree, and move next to nothing
    assert tuner.factors() == [pytest.approx(1.0)]
    assert "moves the weights" in tuner.search_result.reason


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_where_the_held_out_loss_has_risen_no_rate_stays_above_the_one_that_was_given(noise: float) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 6)
    outputs = inputs @ torch.randn(6, 1) + noise * torch.randn(200, 1)
    net = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=2e-4)
    tuner = Displacement(final_decay=False).attach(optimizer, planned_steps=1000)
    held_out = tuner.held_out_gradient(lambda: functional.mse_loss(net(inputs[40:]), outputs[40:]))
    for step in range(700):
        optimizer.zero_grad()
        loss = functional.mse_loss(net(inputs[:40]), outputs[:40])
        loss.backward()
        optimizer.step()
        tuner.step(loss, held_out=held_out, passes=step)
    rates, losses = ([record[key] for record in tuner.history] for key in ("learning_rates", "held_out_loss"))
    assert max(rates)[0] > 5e-3
    has_risen = losses[-1] - min(losses) > 0.12 * (losses[0] - min(losses))
    assert has_risen == (noise == 2.0)
    assert (rates[-1][0] == pytest.approx(2e-4, rel=1e-9)) == has_risen
    falls = [before[0] / after[0] for before, after in zip(rates, rates[1:], strict=False)]
    assert (max(falls) > 20) == has_risen  # at once, not by and by


def test_weights_that_do_not_move_at_all_in_their_precision_are_no_dead_end() -> None:
    weight = nn.Parameter(torch.full((8,), 2.0))  # float32: steps of less than 1e-7 are none
    optimizer = torch.optim.Adam([weight], lr=1e-9)
    tuner = Displacement().attach(optimizer, planned_steps=200)
    for step in range(200):
        optimizer.zero_grad()
        loss = 0.5 * (weight - 1).square().mean()
        loss.backward()
        optimizer.step()
        if step == 3:
            assert weight.eq(2.0).all()
        tuner.step(loss)
    assert loss.item() < 1e-2


def fast(optimizer: torch.optim.Optimizer, gradient: Callable[[int], Any], steps: int = 100, **options: Any) -> Any:
    """A loop in which gradients come from nowhere; the largest factor of each group."""
    tuner = Displacement(**options).attach(optimizer, planned_steps=1000)
    largest = [1.0] * len(optimizer.param_groups)
    for step in range(steps):
        for group, value in zip(optimizer.param_groups, gradient(step), strict=True):
            for parameter in group["params"]:
                parameter.grad = None if value is None else torch.full_like(parameter, value)
        optimizer.step()
        tuner.step(1.0)
        largest = [max(pair) for pair in zip(largest, tuner.factors(), strict=True)]
    return largest


def weights(count: int) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(count)]


def test_without_a_gradient_no_rate_rises() -> None:
    assert fast(torch.optim.SGD(weights(1), lr=1e-9), lambda step: [0.0]) == [1.0]


def test_a_rate_of_zero_is_no_rate_to_raise() -> None:
    groups = weights(2)
    groups[1]["lr"] = 0.0
    assert fast(torch.optim.SGD(groups, lr=1e-2), lambda step: [1e-2, 1.0], per="group")[1] == 1.0
    optimizer = torch.optim.SGD(weights(1), lr=0.0)

    def waits_and_warms_up(step: int) -> list[float]:
        if step >= 10:
            optimizer.param_groups[0]["lr"] = 1e-3
        return [1.0]

    assert fast(optimizer, waits_and_warms_up, steps=20)[0] < 5  # what updates give


def test_why_nothing_rises_fast_beside_a_rate_of_zero_is_said() -> None:
    groups = weights(2)
    groups[1]["lr"] = 0.0
    optimizer = torch.optim.SGD(groups, lr=1e-9)
    tuner = Displacement().attach(optimizer, planned_steps=100)
    for _ in range(40):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(3)
        optimizer.step()
        tuner.step(1.0)
    assert tuner.search_result is not None and tuner.rates.applied[1] == 0
    assert tuner.search_result.reason == "a learning rate of zero is a plan, so every rate is where you set it"


def test_a_group_whose_gradients_come_late_does_not_jump() -> None:
    late = lambda step: [1.0, 1.0 if step >= 50 else None]  # noqa: E731
    assert fast(torch.optim.SGD(weights(2), lr=1e-2), late, steps=55, per="group")[1] < 2


def test_steps_that_an_optimizer_makes_small_at_first_say_nothing() -> None:
    assert fast(torch.optim.RAdam(weights(1), lr=1e-2), lambda step: [1e-6], steps=12)[0] < 3
    assert fast(torch.optim.RAdam(weights(1), lr=1e-2), lambda step: [1.0], steps=12)[0] < 3


def test_a_single_large_weight_does_not_hide_that_the_others_move() -> None:
    group = {"params": [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.tensor(1e6))]}
    assert fast(torch.optim.Adam([group], lr=3e-3), lambda step: [1.0], steps=12)[0] < 3


def test_without_a_guard_a_rate_rises_at_once_only_where_nothing_moves() -> None:
    def factor(rate: float, guard: bool, loss: float | None = 1.0) -> float:
        weight = nn.Parameter(torch.ones(3, 3))
        optimizer = torch.optim.SGD([weight], lr=rate)
        tuner = Displacement().attach(optimizer, planned_steps=1000, divergence_guard=guard)
        for _ in range(9):  # no update yet
            weight.grad = torch.ones(3, 3)
            optimizer.step()
            tuner.step(loss)
        return tuner.factors()[0]

    assert factor(1e-4, True) > 1 and factor(1e-4, False) == 1
    assert 1 < factor(1e-9, False) < factor(1e-9, True)
    assert factor(1e-4, True, loss=None) == 1  # a guard that sees no losses is none


def test_a_resumed_run_whose_average_is_not_saved_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_l2l.tuner.LARGEST_SAVED", 0)
    optimizer = torch.optim.SGD(weights(1), lr=1e-2)
    first = Displacement().attach(optimizer, planned_steps=1000)

    def go(tuner: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            optimizer.step()
            tuner.step(1.0)

    go(first, 40)
    state, factor = first.state_dict(), first.factors()[0]
    first.close()
    second = Displacement().attach(optimizer, planned_steps=1000)
    second.load_state_dict(state)
    go(second, 20)
    assert second.factors()[0] < 3 * factor


@pytest.mark.parametrize("options", [{"meta_learning_rate": 0}, {"initial_search": False}, {"has_schedule": True}])
def test_what_a_resumed_run_must_not_raise_stays(options: Any) -> None:
    optimizer = torch.optim.SGD(weights(1), lr=1e-9)
    state = Displacement().attach(optimizer, planned_steps=1000).state_dict()
    tuner = Displacement().attach(optimizer, planned_steps=1000, **options)
    tuner.load_state_dict(state)
    for _ in range(9):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        tuner.step(1.0)
    assert tuner.factors() == [1.0]


def test_maximizing_is_minimizing_the_negative() -> None:
    found = []
    for sign, options in ((1.0, {}), (-1.0, {"maximize": True})):
        parameters = two()
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, **options)
        tuner, twin = train(parameters, optimizer, noisy_valley(parameters, sign))
        assert_equal(tuner.history, twin, 1e-9)
        found.append(tuner.history)
    assert difference(*found) == ""


def test_sparse_gradients_are_those_of_the_dense_ones() -> None:
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(12, 3, sparse=sparse, dtype=torch.float64)
        parameters = list(embedding.parameters())
        loss = lambda step, e=embedding: (e(torch.tensor([step % 12, 3, 3])) - 1).square().sum()  # noqa: E731
        tuner, twin = train(parameters, torch.optim.SGD(parameters, lr=0.05), loss)
        assert_equal(tuner.history, twin, 1e-9)
        found.append(tuner.rates.applied)
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_what_is_frozen_does_not_count_and_what_is_thawed_counts_from_where_it_is() -> None:
    parameters = two()

    def thaw(step: int) -> None:
        parameters[0].requires_grad_(20 <= step < 50)

    tuner, twin = train(parameters, torch.optim.SGD(parameters, lr=0.05), noisy_valley(parameters), each=thaw)
    assert_equal(tuner.history, twin, 1e-9)


def test_a_parameter_without_a_gradient_does_not_count() -> None:
    parameters, unused = two(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    tuner, twin = train(parameters, torch.optim.SGD([*parameters, unused], lr=0.05), noisy_valley(parameters))
    assert_equal(tuner.history, twin, 1e-9)


def test_a_group_without_a_gradient_has_zeros_that_go_with_the_numbers_of_the_others() -> None:
    parameters, unused = two(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    groups = [{"params": [unused]}, {"params": parameters}]
    tuner, _ = train(parameters, torch.optim.SGD(groups, lr=0.05), noisy_valley(parameters), steps=2)
    unmeasured, measured = (tuner.average.measure(group) for group in range(2))
    assert unmeasured.dtype == measured.dtype == torch.float64 and unmeasured.device == measured.device
    assert not unmeasured.any() and measured.all()


def test_complex_weights_are_pairs_of_real_ones() -> None:
    records, averages = [], []
    for kind in (torch.complex128, torch.float64):
        weight = nn.Parameter(torch.tensor([[3.0, -1.0], [0.5, 2.0]], dtype=torch.float64))
        if kind is torch.complex128:
            weight = nn.Parameter(torch.view_as_complex(weight.detach()))
        optimizer = torch.optim.SGD([{"params": [weight]}], lr=0.01)
        tuner = Displacement().attach(optimizer, planned_steps=90)
        generator = torch.Generator().manual_seed(0)
        for _ in range(90):
            pairs = torch.view_as_real(weight) if weight.is_complex() else weight
            noise = torch.randn(2, 2, generator=generator, dtype=torch.float64)
            loss = (pairs.square() * torch.tensor([1.0, 3.0])).sum() + 0.1 * (noise * pairs).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tuner.step(loss)
        again = Displacement().attach(optimizer, planned_steps=90)
        again.load_state_dict(tuner.state_dict())
        before = weight.detach().clone()
        again.average.exchange()
        averages.append((torch.view_as_real(weight) if weight.is_complex() else weight).detach().clone())
        again.average.exchange()
        assert torch.equal(before, weight)
        records.append([(record["cosine"], record["learning_rates"]) for record in tuner.history])
    for (cosine, rates), (expected, expected_rates) in zip(*records, strict=True):
        assert cosine == pytest.approx(expected, abs=1e-9) and rates == pytest.approx(expected_rates)
    assert torch.allclose(*averages) and not torch.equal(averages[1], before)
    assert records[0][-1][1] != [0.01]


def test_a_group_that_is_added_is_measured_from_then_on() -> None:
    parameters = two()
    optimizer = torch.optim.SGD(parameters[:1], lr=0.05)

    def add(step: int) -> None:
        if step == 25:
            optimizer.add_param_group({"params": parameters[1:]})

    tuner, twin = train(parameters, optimizer, noisy_valley(parameters), each=add)
    assert [len(record["learning_rates"]) for record in tuner.history] == [
        1 if record["step"] <= 25 else 2 for record in tuner.history
    ]
    assert [record["cosine"][0] for record in tuner.history] == pytest.approx(
        [expected["cosine"][0][0] for expected in twin.records], abs=1e-9
    )


def test_half_precision_has_a_finer_average() -> None:
    parameters = two(torch.bfloat16)
    tuner, twin = train(parameters, torch.optim.SGD(parameters, lr=0.05), noisy_valley(parameters))
    assert_equal(tuner.history, twin, 1e-5)  # sums in float32
    assert all(average.dtype == torch.float32 for average in tuner.average.state_dict()["average"])


def test_nothing_is_learned_from_gradients_that_are_no_numbers() -> None:
    parameters = two()
    valley = noisy_valley(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.05)

    def loss(step: int) -> Tensor:
        return valley(step)

    def spoil(_: Any, __: Any, ___: Any) -> None:
        if tuner.steps == 30:
            for parameter in parameters:
                parameter.grad.zero_()  # no direction, no cosine

    tuner = Displacement().attach(optimizer, planned_steps=90, divergence_guard=False)
    hook = optimizer.register_step_pre_hook(spoil)
    for step in range(90):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        tuner.step()
    hook.remove()
    assert all(math.isfinite(record["cosine"][0]) for record in tuner.history)


def test_rates_fall_to_zero_at_the_end_where_noise_rules_and_nobody_else_schedules(trainer: Any) -> None:
    def last(estimator: Any, schedule: Any = None, **options: Any) -> float:
        torch.manual_seed(1)
        module = Plain(lambda p: NotesRates(p, lr=3.0), schedule)
        callback = LearnToLearn(estimator, initial_search=False, divergence_guard=False)
        fitted = trainer(callback, **{"max_epochs": 10, **options})
        fitted.fit(module, loader(shuffle=True), loader(24, 1))
        (optimizer,) = fitted.optimizers
        return optimizer.used[-1][0] / max(rates[0] for rates in optimizer.used)

    assert 0 < last(Displacement()) < 0.2
    constant = lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)  # noqa: E731
    assert last(Displacement(final_decay=False)) > 0.2 and last(Displacement(), constant) > 0.2
    assert last(Displacement(), max_epochs=-1, max_steps=60) < 0.2


def test_a_schedule_is_not_raised_after_the_passes_that_it_was_made_for(trainer: Any) -> None:
    constant = lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)  # noqa: E731

    def rises(schedule: Any) -> list[int]:
        callback = LearnToLearn(meta_data="val", initial_search=False)
        trainer(callback, max_epochs=25).fit(Plain(sgd(1e-4), schedule), loader(), loader(24, 1))
        rates = [(record["step"], record["learning_rates"][0]) for record in callback.history]
        return [after[0] for before, after in zip(rates, rates[1:], strict=False) if after[1] > 1.001 * before[1]]

    per_epoch = len(loader())
    assert max(rises(None)) > 4 * per_epoch + 1 >= max(rises(constant))


def test_updates_every_n_steps(trainer: Any) -> None:
    callback = LearnToLearn(every_n_steps=4, initial_search=False)
    trainer(callback, max_epochs=4).fit(Plain(sgd(0.1)), loader(), loader(24, 1))
    assert [record["step"] for record in callback.history] == [
        4,
        8,
        12,
        16,
        20,
        21,
        24,
    ]  # 21: where the decay may begin
