"""Tensors laid end to end for an unroll: the same unroll, to the last bit, as with each on its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_l2l import LearnedHyperparameters, Unroll
from lightning_l2l.exact.episodes import Episode
from lightning_l2l.functional import mirror, read_state

MODES = ("forward", "reverse", "segmented")
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


class Alone(LearnedHyperparameters):
    """The same, but no two tensors may share a vector."""

    def treated_alike(self, names):
        return [[name] for name in names]


class Branches(nn.Module):
    """Two layers, and one more that only some batches pass; a tensor that is too large to pack, and a strided one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.extra = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.large = nn.Parameter(torch.randn(20_000))
        self.strided = nn.Parameter(torch.randn(3, 5).t())

    def forward(self, batch):
        hidden = self.first(batch["x"]).tanh()
        output = self.second(hidden) + (self.extra(hidden) if batch["extra"] else 0.0)
        return (output + hidden @ self.strided + 1e-3 * self.large.square().mean()).square().mean()


def batches(extra):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, 4, generator=generator).double(), "extra": index in extra} for index in range(STEPS)]


def both(mode, optimizer, extra, learn=("learning_rate",), per="group"):
    """The same unroll, packed and each tensor on its own, from a live optimizer with two parameter groups."""
    torch.manual_seed(0)
    net = Branches().double()
    cls, options = OPTIMIZERS[optimizer]
    small = [*net.second.parameters(), *net.extra.parameters(), net.large, net.strided]
    live = cls([{"params": net.first.parameters()}, {"params": small, "lr": 0.03}], **options)
    for batch in batches(range(STEPS))[:2]:
        live.zero_grad()
        net(batch).backward()
        live.step()
    own = dict(net.named_parameters())
    estimator = Unroll(mode=mode, objective="log_mean")
    found = []
    for kind in (LearnedHyperparameters, Alone):
        learned = kind(learn, per).attach(mirror(live, net.named_parameters()))
        episode = Episode.begin(learned, own, estimator=estimator, state=read_state(live, own.items()))
        loss = lambda tensors, batch: functional_call(net, dict(tensors), (batch,))  # noqa: E731
        found.append(episode.unroll(loss, learned, batches(extra), batches(())[0]))
    return found


def assert_same(packed, alone):
    (found, episode), (expected, other) = packed, alone
    assert found.value == expected.value
    for name, gradient in expected.gradients.items():
        # The same products, added up in another order.
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-11, atol=1e-14)
        assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(episode.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("per", ["optimizer", "group", "tensor"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_packed_unroll_is_the_same_unroll(mode, optimizer, per):
    assert_same(*both(mode, optimizer, range(STEPS), per=per))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [(), (0, 1, 4), (2,), (3,)])
def test_a_tensor_that_lacks_a_gradient_at_some_steps_stays_there_with_its_state(extra, mode, optimizer):
    # Its momentum too, and its steps are not counted; so a zero in place of the gradient would be noticed.
    assert_same(*both(mode, optimizer, extra))


def test_several_forward_directions_survive_unpacking():
    assert_same(*both("forward", "Adam", (0, 1, 4), learn=("learning_rate", "betas")))
