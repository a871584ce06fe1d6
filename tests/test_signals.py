"""Signals: what they are on sequences whose answer is known, where they are found, and when a user is warned."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ALONG, MemoryLogger, Plain, Saves, difference, learner, loader, loaders, sgd
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, LearnToLearn, meta_gradient
from lightning_l2l.exact.estimators import LiveUnroll
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.signals import agreement, excess_growth, overfits, signal_to_noise
from lightning_l2l.functional import mirror, read_state


def luck(count: int, seed: int = 0) -> list[list[float]]:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed)).tolist()


# -- on known sequences -----------------------------------------------------------------------------------------------


def test_signal_to_noise_of_luck_and_of_a_signal() -> None:
    of_luck = [signal_to_noise(luck(10, seed)) for seed in range(200)]
    assert sum(of_luck) / 200 == pytest.approx(0.28, abs=0.06)  # mean |binomial(10) - 5| / 5, about 0.25, over its std
    shifted = [signal_to_noise([[g + 2.0] for (g,) in luck(10, seed)]) for seed in range(200)]
    assert sum(shifted) / 200 > 2
    assert signal_to_noise([[1.0]] * 10) == pytest.approx(math.sqrt(10))


def test_the_scale_of_meta_gradients_does_not_count() -> None:
    rows = [[10.0 ** (-3 * step), -(10.0**step)] for step in range(10)]
    assert signal_to_noise(rows) == pytest.approx(math.sqrt(10))
    assert agreement(rows, [[2 * a, 2 * b] for a, b in rows]) == pytest.approx(1.0)
    assert agreement([[1e-300]] * 9, [[-1e300]] * 9) == -1.0


def test_only_the_last_ten_usable_ones_count() -> None:
    before = [[1.0]] * 30
    assert signal_to_noise(before + [[-1.0]] * 10) == pytest.approx(math.sqrt(10))
    assert agreement(before + [[-1.0]] * 10, [[1.0]] * 40) == -1.0
    broken = [[math.nan], [], [math.inf], [1.0, 2.0]]
    assert signal_to_noise(broken + [[1.0]] * 6) == signal_to_noise([[1.0]] * 6)
    assert agreement(broken + [[1.0]] * 6, [[1.0]] * 10) == 1.0


def test_too_few_say_nothing() -> None:
    assert math.isnan(signal_to_noise([[1.0]] * 4)) and math.isnan(signal_to_noise([]))
    assert math.isnan(agreement([[1.0]] * 9, [[1.0]] * 4 + [[]] * 5))
    assert math.isnan(excess_growth(0.4, 1))


def test_a_meta_gradient_of_zero_has_no_direction() -> None:
    assert signal_to_noise([[0.0]] * 10) == 0.0 and agreement([[0.0]] * 10, [[1.0]] * 10) == 0.0


def test_luck_is_not_called_overfitting() -> None:
    false = sum(overfits(luck(20, seed), luck(20, seed + 5000)) for seed in range(2000))
    assert false == 0  # 0.1 % are opposite so often, and few of these positive so often
    assert overfits([[0.1]] * 17 + [[-0.1]] * 3, [[-1.0]] * 20)
    assert not overfits([[0.1]] * 16 + [[-0.1]] * 4, [[-1.0]] * 20)  # held-out batches do not mostly want less
    assert not overfits([[-0.1]] * 20, [[1.0]] * 20)  # opposite the other way round
    assert not overfits([[0.1]] * 20, [[1.0]] * 20)


# -- the training batch's meta-gradient -------------------------------------------------------------------------------


class Double(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.double()


def problem() -> tuple[Any, torch.optim.Optimizer, list[Any], Any, Any]:
    module = Double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    batches = [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in loader(40)]
    for inputs, targets in batches[:2]:  # so that there is momentum
        optimizer.zero_grad()
        functional.cross_entropy(module.net(inputs), targets).backward()
        optimizer.step()

    def loss(parameters: Any, batch: Any) -> Any:
        return functional.cross_entropy(
            functional.linear(batch[0], parameters["net.weight"], parameters["net.bias"]), batch[1]
        )

    learned = LearnedHyperparameters(["learning_rate", "momentum"]).attach(mirror(optimizer, module.named_parameters()))
    return module, optimizer, batches[2:], loss, learned


def test_forward_has_the_meta_gradient_of_the_last_training_batch() -> None:
    """It is what a shorter unroll, judged by that batch, gives."""
    module, optimizer, batches, loss, learned = problem()
    state = read_state(optimizer, module.named_parameters())
    parameters = dict(module.named_parameters())
    whole = meta_gradient(loss, parameters, learned, batches, batches[0], estimator="forward", state=state)
    shorter = meta_gradient(
        loss, parameters, learned, batches[:-1], batches[-1], objective="naive", estimator="reverse", state=state
    )
    assert set(whole.diagnostics.training_gradients) == set(shorter.gradients)
    for name, gradient in shorter.gradients.items():
        assert torch.allclose(whole.diagnostics.training_gradients[name], gradient, rtol=1e-12)  # double precision
        assert gradient.abs().max() > 1e-6
    one = meta_gradient(loss, parameters, learned, batches[:1], batches[0], estimator="forward", state=state)
    assert one.diagnostics.training_gradients == {}


def test_live_has_it_too() -> None:
    module, optimizer, batches, loss, learned = problem()
    state = read_state(optimizer, module.named_parameters())
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    expected = meta_gradient(
        loss, before, learned, batches[:-1], batches[-1], objective="naive", estimator="reverse", state=state
    )
    unroll = LiveUnroll(InnerStep(loss, learned), "log", len(batches))
    for batch in batches:
        parameters = dict(module.named_parameters())
        optimizer.zero_grad()
        value = loss(parameters, batch)
        unroll.see_loss(value, parameters)
        value.backward()
        live = read_state(optimizer, module.named_parameters())
        unroll.before_step(Iterate(parameters, live, {}), {name: p.grad for name, p in parameters.items()})
        optimizer.step()
        unroll.after_step()
    unroll.judge(Iterate(dict(module.named_parameters()), {}, {}), batches[0])
    found = unroll.result().diagnostics.training_gradients
    for name, gradient in expected.gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-12)


# -- in a run ---------------------------------------------------------------------------------------------------------


def run(trainer: Any, logger: Any = False, **options: Any) -> LearnToLearn:
    torch.manual_seed(0)
    callback = learner(**options)
    trainer(callback, max_epochs=6, logger=logger).fit(Plain(sgd(0.05)), **loaders())
    return callback


@pytest.mark.parametrize("estimator", ALONG)
def test_signals_are_in_the_history_and_in_the_log(trainer: Any, estimator: Any) -> None:
    logger = MemoryLogger()
    callback = run(trainer, logger, estimator=estimator)
    signals = [record["signals"] for record in callback.history]
    assert [math.isnan(s["signal_to_noise"]) for s in signals] == [True] * 4 + [False] * 8
    assert [math.isnan(s["agreement"]) for s in signals] == [True] * 4 + [False] * 8
    carries = estimator == "live"  # a tangent, and that can grow
    assert all(math.isfinite(s["excess_growth"]) == carries for s in signals)
    rows = {row["step"]: row for row in logger.rows if "l2l/signal_to_noise" in row}
    for record in callback.history[4:]:
        row = rows[record["step"] - 1]
        assert ("l2l/excess_growth" in row) == carries
        for name in ("signal_to_noise", "agreement", *(["excess_growth"] if carries else [])):
            assert row[f"l2l/{name}"] == pytest.approx(record["signals"][name], rel=1e-6)


@pytest.mark.parametrize("options", [{"meta_data": "train"}, {"estimator": "forward"}, {"estimator": "reverse"}])
def test_no_agreement_is_claimed_where_the_comparison_would_not_be_fair(trainer: Any, options: Any) -> None:
    """A look-ahead trains on batches that the run has just been trained on; training batches are no held-out ones."""
    callback = run(trainer, **options)
    assert all(math.isnan(record["signals"]["agreement"]) for record in callback.history)
    assert all(math.isfinite(record["signals"]["signal_to_noise"]) for record in callback.history[4:])


def test_many_meta_parameters_of_which_only_the_norm_is_kept_have_no_signs(trainer: Any) -> None:
    class Deep(Plain):
        def make_net(self) -> nn.Module:
            return nn.Sequential(*[nn.Linear(6, 6) for _ in range(60)], nn.Linear(6, 3))

    callback = learner(learned=LearnedStepSize(per="tensor"))
    trainer(callback, max_epochs=4).fit(Deep(sgd(0.01)), **loaders())
    assert len(callback.history) >= 5
    assert all(math.isnan(record["signals"]["signal_to_noise"]) for record in callback.history)


@pytest.mark.parametrize("estimator", ALONG)
def test_signals_are_the_same_after_a_resume(trainer: Any, tmp_path: Path, estimator: Any) -> None:
    whole, rest = (learner(estimator=estimator) for _ in range(2))
    data = {"train_dataloaders": loader(), "val_dataloaders": loader(24, seed=1)}
    path, (module, again) = tmp_path / "half.ckpt", (Plain(sgd(0.05)) for _ in range(2))
    trainer(whole, Saves(path, 18), max_epochs=6).fit(module, **data)  # of 36 steps
    trainer(rest, max_epochs=6).fit(again, **data, ckpt_path=path, weights_only=True)
    assert difference(whole.history, rest.history) == "" and whole.history[-1]["step"] > 18


def overfit_or_not(trainer: Any, count: int, epochs: int) -> list[str]:
    """Labels that are noise for a third: on a few examples a network learns them by heart."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count + 400, 6, generator=generator)
    targets = inputs[:, :3].argmax(1)
    noisy = torch.rand(count + 400, generator=generator) < 0.3
    targets[noisy] = torch.randint(0, 3, (int(noisy.sum()),), generator=generator)

    class Network(Plain):
        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))

    train, held_out = (TensorDataset(inputs[part], targets[part]) for part in (slice(count), slice(count, None)))
    torch.manual_seed(0)
    callback = LearnToLearn(every_n_steps=10, initial_search=False)
    module = Network(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=epochs).fit(module, DataLoader(train, 20, shuffle=True), DataLoader(held_out, 100))
    return [str(warning.message) for warning in seen if "LearnToLearn" in str(warning.message)]


def test_a_network_that_learns_noise_by_heart_is_warned_of_once(trainer: Any) -> None:
    (said,) = overfit_or_not(trainer, 60, 300)
    assert "the network overfits" in said and "stop early" in said


def test_a_healthy_run_is_not_warned_of(trainer: Any) -> None:
    assert overfit_or_not(trainer, 6000, 1) == []
