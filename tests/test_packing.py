"""Tensors laid end to end for an unroll: the same unroll, to the last bit, as with each on its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_l2l.exact import estimators
from lightning_l2l.exact.inner_step import InnerStep
from lightning_l2l.functional import mirror, read_state
from lightning_l2l.learned import LearnedHyperparameters
from lightning_l2l.learned.base import LearnedOptimizer

EXACT = {"forward": estimators.forward, "reverse": estimators.reverse, "segmented": estimators.segmented}
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.02}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.02}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}
STEPS = 5


class Branches(nn.Module):
    """Two layers, and one more that only some batches pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.extra = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, batch):
        hidden = self.first(batch["x"]).tanh()
        return self.second(hidden) + (self.extra(hidden) if batch["extra"] else 0.0)


def batches(extra):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, 4, generator=generator).double(), "extra": place in extra} for place in range(STEPS)]


def problem(optimizer, per="group", live_steps=2):
    """A net in two parameter groups, with its optimizer's state after some steps of training."""
    torch.manual_seed(0)
    net = Branches().double()
    cls, options = OPTIMIZERS[optimizer]
    first, *others = net.children()
    groups = [{"params": first.parameters()}, {"params": [p for m in others for p in m.parameters()], "lr": 0.03}]
    live = cls(groups, **options)
    for batch in batches(range(STEPS))[:live_steps]:
        live.zero_grad()
        net(batch).square().mean().backward()
        live.step()
    learned = LearnedHyperparameters(learn=("learning_rate",), per=per).attach(mirror(live, net.named_parameters()))
    step = InnerStep(lambda tensors, batch: functional_call(net, dict(tensors), (batch,)).square().mean(), learned)
    return step, step.start(dict(net.named_parameters()), read_state(live, net.named_parameters()), {})


def alone(self, names):
    return LearnedOptimizer.treated_alike(self, names)


def both(monkeypatch, step, start, estimator, batches):
    run = lambda: EXACT[estimator](step, start, batches, batches[0], "log_mean")  # noqa: E731
    packed = run()
    monkeypatch.setattr(LearnedHyperparameters, "treated_alike", alone)
    assert start.packed(step.learned) is start
    return packed, run()


def assert_same(packed, expected):
    (found, iterate), (right, place) = packed, expected
    assert found.value == right.value
    for name, gradient in right.gradients.items():
        # The same products, added up in another order.
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-11, atol=1e-14)
        assert gradient.abs().min() > 1e-6
    assert list(iterate.parameters) == list(place.parameters) and list(iterate.state) == list(place.state)
    for name, tensor in place.parameters.items():
        assert torch.equal(iterate.parameters[name], tensor)
        entries, right_entries = iterate.state[name], place.state[name]
        assert list(entries) == list(right_entries)
        for key, value in right_entries.items():
            same = torch.equal(entries[key], value) if isinstance(value, torch.Tensor) else entries[key] == value
            assert same, (name, key)


@pytest.mark.parametrize("per", ["optimizer", "group", "tensor"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", EXACT)
def test_a_packed_unroll_is_the_same_unroll(estimator, optimizer, per, monkeypatch):
    step, start = problem(optimizer, per)
    assert len(start.packed(step.learned).parameters) == (6 if per == "tensor" else 2)
    assert_same(*both(monkeypatch, step, start, estimator, batches(range(STEPS))))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("extra", [(), (0, 1, 4), (2,), (3,)])
def test_a_tensor_that_lacks_a_gradient_at_some_steps_stays_where_it_is_there(extra, estimator, optimizer, monkeypatch):
    # Its momentum too, and its steps are not counted; so a zero in place of the gradient would be noticed.
    step, start = problem(optimizer)
    assert_same(*both(monkeypatch, step, start, estimator, batches(extra)))


def test_several_forward_directions_survive_unpacking(monkeypatch):
    step, start = problem("Adam")
    learned = LearnedHyperparameters(learn=("learning_rate", "betas")).attach(step.learned._inner)
    assert_same(*both(monkeypatch, replace(step, learned=learned), start, "forward", batches((0, 1, 4))))


def test_what_differs_in_kind_is_not_packed():
    step, start = problem("Adam", live_steps=0)
    for change in (
        lambda tensor: tensor.float(),
        lambda tensor: tensor.t().contiguous().t(),  # would be moved in another order
        lambda tensor: torch.zeros(16_385, dtype=torch.float64),  # gains nothing
    ):
        parameters = {**start.parameters, "second.weight": change(start.parameters["second.weight"])}
        packing = replace(start, parameters=parameters).packed(step.learned).packing
        assert packing.packs["second.weight"].names == ("second.weight",)
        assert packing.packs["second.bias"].names == ("second.bias", "extra.weight", "extra.bias")
    state = {**start.state, "extra.bias": {"step": 3}}
    packing = replace(start, state=state).packed(step.learned).packing
    assert packing.packs["second.weight"].names == ("second.weight", "second.bias", "extra.weight")
