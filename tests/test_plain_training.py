"""What a candidate's short run promises: plain training, and nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_l2l import LearnedStepSize
from lightning_l2l.exact.initial_search import search_learning_rate
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.plain_training import loss_after_training
from lightning_l2l.functional import inner_optimizer

RATE = 0.05


def quadratic(parameters: Mapping[str, Tensor], target: Tensor) -> Tensor:
    return 0.5 * (parameters["w"] - target).square().sum()


def started(momentum: float = 0.0, loss: Any = quadratic) -> tuple[InnerStep, Iterate]:
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=RATE, momentum=momentum))
    step = InnerStep(loss, learned)
    return step, step.start({"w": torch.ones(3, dtype=torch.float64)}, None, {})


def at_rate(step: InnerStep, rate: float) -> dict[str, Tensor]:
    values = step.learned.scaled_rate(rate / RATE)
    assert values is not None
    return values


TARGETS = [torch.full((3,), 0.1 * number, dtype=torch.float64) for number in range(6)]


@pytest.mark.parametrize("rate", [1e-3, 0.05, 0.3])
def test_the_loss_is_that_of_torch_optim_after_the_same_steps(rate: float) -> None:
    step, start = started(momentum=0.9)
    loss, taken = loss_after_training(step, start, TARGETS, TARGETS[:2], at_rate(step, rate))

    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=rate, momentum=0.9)
    for target in TARGETS:
        optimizer.zero_grad()
        quadratic({"w": weights}, target).backward()
        optimizer.step()
    expected = sum(quadratic({"w": weights}, target).item() for target in TARGETS[:2]) / 2
    assert loss == pytest.approx(expected, rel=1e-12)  # float64 rounding of six steps
    assert taken == len(TARGETS)


def test_nothing_changes_at_the_start() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def loss(tensors: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        return functional_call(module, dict(tensors), (batch,)).square().mean()

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.Adam, lr=RATE))
    step = InnerStep(loss, learned)
    start = step.start(parameters, None, buffers)
    watched = [*parameters.values(), *buffers.values(), *start.leaves(), *start.buffers.values(), *learned.parameters()]
    before = [tensor.detach().clone() for tensor in watched]
    batches = [torch.randn(16, 4) for _ in range(4)]
    first = loss_after_training(step, start, batches, batches[:2], at_rate(step, 0.1))
    for tensor, held in zip(watched, before, strict=True):
        assert torch.equal(tensor, held)
    assert all(parameter.grad is None for parameter in module.parameters())
    # And so a second run from there is the first one again.
    assert loss_after_training(step, start, batches, batches[:2], at_rate(step, 0.1)) == first


def test_without_batches_the_loss_is_that_of_the_start() -> None:
    step, start = started()
    loss, taken = loss_after_training(step, start, [], TARGETS[:1])
    assert (loss, taken) == (1.5, 0)


def test_a_run_that_diverges_is_stopped_at_once() -> None:
    step, start = started()
    loss, taken = loss_after_training(step, start, TARGETS[:1] * 50, TARGETS[:1], at_rate(step, 10.0))
    assert loss == math.inf
    assert taken == 1  # the loss after one step, 81 times the first, is enough


def test_a_loss_that_rises_and_comes_back_is_waited_for() -> None:
    # Twice the first loss is no divergence: good candidates pass through such values (docs, "initial search").
    step, start = started()
    targets = [torch.zeros(3, dtype=torch.float64), torch.full((3,), -0.4, dtype=torch.float64)] * 3
    loss, taken = loss_after_training(step, start, targets, targets[:1], at_rate(step, 0.1))
    assert math.isfinite(loss) and taken == len(targets)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_divergence(bad: float) -> None:
    def loss(parameters: Mapping[str, Tensor], batch: float) -> Tensor:
        return parameters["w"].sum() * 0 + batch

    step, start = started(loss=loss)
    assert loss_after_training(step, start, [1.0, bad, 1.0], [1.0]) == (math.inf, 1)
    assert loss_after_training(step, start, [1.0, 1.0], [1.0, bad]) == (math.inf, 2)


def test_a_first_loss_of_zero_is_no_yardstick() -> None:
    # A penalty that starts at zero rises with any step that trains anything.
    step, start = started()
    targets = [torch.ones(3, dtype=torch.float64), *TARGETS]
    loss, taken = loss_after_training(step, start, targets, TARGETS[:1])
    assert math.isfinite(loss) and taken == len(targets)


def test_negative_losses_are_no_divergence() -> None:
    def loss(parameters: Mapping[str, Tensor], target: Tensor) -> Tensor:
        return quadratic(parameters, target) - 100.0

    step, start = started(loss=loss)
    assert loss_after_training(step, start, TARGETS, TARGETS[:1])[0] < -99.0


def test_held_out_batches_are_needed() -> None:
    step, start = started()
    with pytest.raises(ValueError, match="held-out"):
        loss_after_training(step, start, TARGETS, [])


def test_the_search_finds_the_stable_rates_of_a_quadratic() -> None:
    step, start = started()
    targets = [torch.zeros(3, dtype=torch.float64)] * 20

    def loss_at(rate: float) -> tuple[float, int]:
        return loss_after_training(step, start, targets, targets[:1], at_rate(step, rate))

    result = search_learning_rate(loss_at, start_loss=1.5, margin=1.0)
    assert result.learning_rate == pytest.approx(1.0)  # one step to the minimum; 2 is the edge of stability
    assert result.losses[10.0] == math.inf
