"""Segmented reverse mode: the numbers of reverse, the memory of a square root."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from live_memory import LiveMemory
from torch import nn
from torch.func import functional_call

from lightning_l2l import EvolutionStrategies, LearnedHyperparameters, LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import Quadratic

OBJECTIVES = ("log", "naive", "log_mean", "naive_mean")


class Problem:
    """A network with BatchNorm and dropout, and batches."""

    def __init__(self, steps, dtype=torch.float64):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.4), nn.Linear(12, 3)).to(
            dtype
        )
        self.batches = [(torch.randn(8, 6, dtype=dtype), torch.randint(3, (8,))) for _ in range(steps)]
        self.meta_batch = (torch.randn(8, 6, dtype=dtype), torch.randint(3, (8,)))

    def loss(self, tensors, batch):
        return nn.functional.cross_entropy(functional_call(self.net, dict(tensors), (batch[0],)), batch[1])

    def meta_gradient(self, mode, objective="log", optimizer=torch.optim.SGD, **options):
        inner = inner_optimizer(optimizer, **(options or {"lr": 0.2, "momentum": 0.9}))
        torch.manual_seed(1)
        return meta_gradient(
            self.loss,
            dict(self.net.named_parameters()),
            LearnedHyperparameters(("learning_rate",)).attach(inner),
            self.batches,
            self.meta_batch,
            buffers=dict(self.net.named_buffers()),
            estimator=EvolutionStrategies(particles=2) if mode == "es" else Unroll(objective=objective, mode=mode),
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 2, 7, 9, 10])
def test_equals_reverse_with_dropout_and_batchnorm(steps, objective):
    problem = Problem(steps)
    expected = problem.meta_gradient("reverse", objective)
    after = torch.rand(1)
    found = problem.meta_gradient("segmented", objective)
    # The same operations on the same numbers in the same order: not even rounding differs.
    assert found.value == expected.value
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=0)
    assert torch.equal(found.diagnostics.losses, expected.diagnostics.losses)
    assert found.diagnostics.growth_rate == pytest.approx(expected.diagnostics.growth_rate, rel=1e-9, nan_ok=True)
    # Dropout really drew something, and the generator ends where reverse leaves it.
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    assert expected.gradients["learning_rate"].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.Adam, {"lr": 0.02}), (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5})],
)
def test_equals_reverse_with_optimizers_that_keep_state(optimizer, options):
    problem = Problem(11)
    expected = problem.meta_gradient("reverse", "log_mean", optimizer, **options)
    found = problem.meta_gradient("segmented", "log_mean", optimizer, **options)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=0)


def test_is_exact_where_plain_back_propagation_leaves_the_number_range():
    task = Quadratic.random(5, seed=0)
    step_size = 8.0 * float(task.optimal_step_size(10))
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=step_size))
    result = meta_gradient(
        task, task.initial_parameters(), learned, [None] * 300, None, estimator=Unroll(mode="segmented")
    )
    # The learned number is the logarithm of the step size.
    expected = step_size * float(task.meta_gradient(step_size, steps=300))
    assert result.gradients["learning_rate"].item() == pytest.approx(expected, rel=1e-9)


def test_a_diverging_run_gives_nan_and_says_where():
    problem = Problem(6)
    problem.batches[3] = (problem.batches[3][0] * torch.inf, problem.batches[3][1])
    result = problem.meta_gradient("segmented")
    assert result.diagnostics.truncated_step == 4
    assert result.gradients["learning_rate"].isnan().all()


def test_replays_the_generators_of_python_and_numpy():
    problem = Problem(9)
    plain = problem.loss

    def noisy(tensors, batch):
        noise = random.random() + np.random.random()
        return plain(tensors, (batch[0] * (1 + noise), batch[1]))

    problem.loss = noisy
    found = []
    for mode in ("reverse", "segmented"):
        random.seed(0), np.random.seed(0)
        found.append(problem.meta_gradient(mode).gradients)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_replays_buffers_that_the_loss_reads_and_writes():
    def loss(tensors, batch):
        tensors["average"].mul_(0.5).add_(tensors["w"].detach())
        return (tensors["w"] * tensors["average"] - 1).square().sum() + 1

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.05))
    params = {"w": torch.tensor([0.5, 2.0], dtype=torch.float64)}
    buffers = {"average": torch.zeros(2, dtype=torch.float64)}
    found = [
        meta_gradient(loss, params, learned, [None] * 10, None, buffers=buffers, estimator=Unroll(mode=mode))
        for mode in ("reverse", "segmented")
    ]
    torch.testing.assert_close(found[1].gradients, found[0].gradients, rtol=1e-12, atol=0)
    assert torch.equal(buffers["average"], torch.zeros(2, dtype=torch.float64))


def test_refuses_a_loss_that_cannot_be_replayed():
    problem = Problem(9)
    plain, own = problem.loss, torch.Generator().manual_seed(0)
    problem.loss = lambda tensors, batch: plain(tensors, batch) * (1 + torch.rand((), generator=own))
    with pytest.raises(RuntimeError, match="takes each step twice, and step .* cannot be"):
        problem.meta_gradient("segmented")


def peak(mode, steps):
    problem = Problem(1, torch.float32)
    problem.batches = problem.batches * steps
    torch.manual_seed(1)
    with LiveMemory() as memory:
        problem.meta_gradient(mode)
    return memory.peak


@pytest.mark.parametrize(
    ("mode", "smallest", "largest"),
    # Four times the steps. segmented also stores the generators (20 kB each time), which is why it is not below 2.
    [("reverse", 3.0, 4.2), ("segmented", 1.5, 2.3), ("forward", 0.9, 1.1), ("es", 0.9, 1.1)],
)
def test_memory_grows_as_promised(mode, smallest, largest):
    peak(mode, 2)  # one-off allocations
    assert smallest < peak(mode, 64) / peak(mode, 16) < largest
