"""The population's engine trains in lockstep what the package trains one by one."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor

from lightning_l2l import Displacement, LearnToLearn, Unroll

POPULATION = Path(__file__).parent / "benchmarks" / "population"
RATES = (1e-6, 1e-3, 0.03, 1.0, 10.0)
STEPS = 120


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Data, weights and arithmetic in float64, and the benchmark's own modules while a test runs."""
    before = set(sys.modules)
    sys.path.insert(0, str(POPULATION))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    sys.path.remove(str(POPULATION))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(POPULATION)):
            del sys.modules[name]


def make(optimizer: str, weights: list[Tensor], rate: float) -> torch.optim.Optimizer:
    if optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9)
    if optimizer == "adam":
        return torch.optim.Adam(weights, lr=rate)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=0.05)


def one_by_one(family: str, optimizer: str, rate: float, held_out: bool, times: set[int]) -> tuple[float, float]:
    """Test loss and last factor of a run with the package's own tuner in a plain loop, on the engine's batches."""
    from engine import Task
    from families import FAMILIES

    task = Task(FAMILIES[family], 1)
    weights = [p[0].clone().requires_grad_() for p in task.split(task.initial)]
    inner = make(optimizer, weights, rate)
    tuner = Displacement().attach(inner, planned_steps=STEPS)

    def loss(batch: list[Tensor]) -> Tensor:
        return task.family.loss([w[None] for w in weights], tuple(batch))[0]

    order, drawn = task.batches(STEPS), torch.Generator().manual_seed(6)
    per_pass, size = task.train[0].shape[1] // order.shape[2], min(task.family.batch, task.held[0].shape[1])
    for step in range(STEPS):
        batch = [part[:, order[0, step]] for part in task.train]
        inner.zero_grad()
        value = loss(batch)
        value.backward()
        inner.step()
        held, passes = None, step // per_pass
        if step + 1 in times:
            choice = torch.randint(task.held[0].shape[1], (1, size), generator=drawn)[0]
            part = [p[:, choice] for p in task.held]
        if held_out and passes > 0 and tuner.is_due():
            held = tuner.held_out_gradient(lambda part=part: loss(part))
        compare = tuner.held_out_gradient(lambda batch=batch: loss(batch))
        tuner.step(value, held_out=held, compare=compare, passes=passes)
    factor = tuner.factors()[0]
    return loss([p for p in task.test]).item(), factor


@pytest.mark.parametrize(("family", "optimizer"), [("wine", "sgd"), ("finetune-regression", "adam"), ("hinge", "sgd")])
@pytest.mark.parametrize("rule", ["held", "few"])
def test_the_rule_of_the_population_is_that_of_the_package(family: str, optimizer: str, rule: str) -> None:
    from engine import Runs, Task, train
    from families import FAMILIES
    from rule import RULES

    mine = RULES[rule]()
    runs = Runs(torch.tensor(RATES), torch.zeros(len(RATES)), [(mine, slice(0, len(RATES)))])
    found = train(Task(FAMILIES[family], 1), optimizer, STEPS, runs)
    for rate, last, factor in zip(RATES, found["last"][0], found["factor"][0], strict=True):
        expected = one_by_one(family, optimizer, rate, rule == "held", mine.times())
        # A run that goes back when an update is due has that one step later in the package.
        assert (last.item(), factor.item()) == pytest.approx(expected, rel=0.01), rate


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_the_derivative_of_an_unroll_is_that_of_differences(optimizer: str) -> None:
    from engine import Task, direction, fresh, unrolled
    from families import FAMILIES

    task = Task(FAMILIES["teacher"], 2)
    weights, memory, rates = task.initial, fresh(task.initial), torch.tensor([0.01, 0.02])
    batches = [[p[:, 16 * k : 16 * k + 16] for p in task.train] for k in range(6)]
    first = task.gradient(weights, batches[5])[1]  # so that the optimizer has something in its memory
    memory = direction(optimizer, task.family.shapes, memory, first, weights)[1]

    def reached(log: float) -> Tensor:
        now, state = weights, memory
        for batch in batches[:5]:
            step, state = direction(optimizer, task.family.shapes, state, task.gradient(now, batch)[1], now)
            now = now - rates[:, None] * math.exp(log) * step
        return task.losses(now, task.held).log() / 5

    found, diverged = unrolled(task, optimizer, weights, memory, rates, batches[:5], task.held)
    assert found.tolist() == pytest.approx(((reached(1e-5) - reached(-1e-5)) / 2e-5).tolist(), rel=1e-5)
    assert not diverged.any() and found.abs().min() > 1e-4


@pytest.mark.filterwarnings("ignore:LearnToLearn. after step")
@pytest.mark.parametrize(("rate", "optimizer"), [(1e-3, "adam"), (0.03, "adam"), (0.1, "sgd"), (30.0, "sgd")])
def test_the_unrolls_of_the_population_are_those_of_the_callback(rate: float, optimizer: str, trainer: Any) -> None:
    from engine import Runs, Task, train
    from families import FAMILIES
    from rule import RULES

    family = replace(FAMILIES["teacher"], train=2000, held=1)  # a single example is in every held-out batch
    task = Task(family, 1)
    runs = Runs(torch.tensor([rate]), torch.zeros(1), [(RULES["unroll"](), slice(0, 1))])
    found = train(task, optimizer, STEPS, runs)

    order, held = task.batches(STEPS)[0], [p[0] for p in task.held]
    weights = torch.nn.ParameterList([p[0].clone() for p in task.split(task.initial)])

    class Module(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weights = weights

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return family.loss([w[None] for w in self.weights], tuple(t[None] for t in batch))[0]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make(optimizer, list(self.weights), rate)

    batches = [[part[0, pick] for part in task.train] for pick in order]
    learner = LearnToLearn(Unroll(steps=5), meta_data=[held])
    trainer(learner, max_epochs=1).fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))
    last = task.batch_losses(torch.cat([w.detach().flatten() for w in weights])[None], task.test)
    assert found["factor"].item() == pytest.approx(learner.learning_rates[0] / rate, rel=1e-4)
    assert found["last"].item() == pytest.approx(last.item(), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_other_method_trains_from_a_usual_rate(optimizer: str) -> None:
    from engine import Runs, Task, train
    from families import FAMILIES
    from opponents import OPPONENTS
    from run import defined

    methods = [kind() for name, kind in OPPONENTS.items() if defined(name, optimizer)]
    task = Task(FAMILIES["digits"], 1)
    parts = [(method, slice(i, i + 1)) for i, method in enumerate(methods)]
    found = train(task, optimizer, 60, Runs(torch.full((len(methods),), 3e-3), torch.zeros(len(methods)), parts))
    initial = task.losses(task.initial, task.test)
    assert (found["last"] < initial).all()
