"""Mirrors against torch.optim: the same numbers from a live state, and the right derivatives.

Oracles: torch.optim itself for values, central differences in float64 for derivatives.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torchopt
from torch import nn

from lightning_l2l.functional import InnerOptimizer, mirror, read_state

OPTIM = torch.optim

# Every flag that changes the arithmetic, at least once, and learning rates where rounding shows.
CASES = {
    "sgd": (OPTIM.SGD, {"lr": 0.1}),
    "sgd-decay": (OPTIM.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd-momentum": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "sgd-nesterov": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "sgd-maximize": (OPTIM.SGD, {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.1}),
    "adam": (OPTIM.Adam, {"lr": 0.01}),
    "adam-large-rate": (OPTIM.Adam, {"lr": 0.1}),
    "adam-decay": (OPTIM.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}),
    "adam-amsgrad": (OPTIM.Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.9)}),
    "adam-maximize": (OPTIM.Adam, {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "adamw": (OPTIM.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    "adamw-default": (OPTIM.AdamW, {"lr": 0.01}),
    "adamw-amsgrad-maximize": (OPTIM.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "nadam": (OPTIM.NAdam, {"lr": 0.01}),
    "nadam-decay": (OPTIM.NAdam, {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.1}),
    "nadam-decoupled": (OPTIM.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "nadam-maximize": (OPTIM.NAdam, {"lr": 0.01, "maximize": True}),
    "radam": (OPTIM.RAdam, {"lr": 0.01}),
    "radam-never-adaptive": (OPTIM.RAdam, {"lr": 0.01, "betas": (0.9, 0.5)}),
    "radam-decay": (OPTIM.RAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "radam-decoupled": (OPTIM.RAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam-maximize": (OPTIM.RAdam, {"lr": 0.01, "maximize": True}),
    "rmsprop": (OPTIM.RMSprop, {"lr": 0.01}),
    "rmsprop-momentum": (OPTIM.RMSprop, {"lr": 0.01, "momentum": 0.9, "alpha": 0.9, "weight_decay": 0.1}),
    "rmsprop-centered": (OPTIM.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5, "eps": 1e-3}),
    "rmsprop-maximize": (OPTIM.RMSprop, {"lr": 0.01, "maximize": True}),
    "adagrad": (OPTIM.Adagrad, {"lr": 0.1}),
    "adagrad-decay": (OPTIM.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "adagrad-start": (OPTIM.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1, "maximize": True}),
}


def tolerance(case: str, dtype: torch.dtype) -> float:
    """Relative, over twenty steps. NAdam's product of momenta is itself rounded to float32 by torch."""
    if dtype == torch.float64:
        return 2e-15 if case.startswith("nadam") else 1e-15
    return 6e-7 if case.startswith("nadam") else 4e-7


class Net(nn.Module):
    """Small, smooth, with a tensor of every kind: matrix, vector, scalar, one that only some batches use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        draw = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))  # noqa: E731
        self.first, self.bias, self.second = draw(4, 5), draw(5), draw(5, 2)
        self.gain, self.sometimes = draw(), draw(3)

    def forward(self, batch: dict) -> torch.Tensor:
        hidden = torch.tanh(batch["x"] @ self.first + self.bias)
        loss = ((hidden @ self.second) * self.gain - batch["y"]).square().mean()
        if batch["use"]:
            loss = loss + (self.sometimes.sin() * batch["y"][0, 0]).sum()
        return loss


def batches(count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    # Every third batch leaves one parameter without a gradient: None for torch.optim, None for the mirror.
    return [{"x": draw(8, 4), "y": draw(8, 2), "use": index % 3 != 1} for index in range(count)]


def grouped(net: Net, cls: type, settings: dict, **live: object) -> torch.optim.Optimizer:
    """Two groups that differ in their rate (and, where there is one, in their weight decay)."""
    other = {"lr": settings["lr"] / 2}
    if settings.get("weight_decay"):
        other["weight_decay"] = settings["weight_decay"] / 3
    groups = [{"params": [net.first, net.gain, net.sometimes]}, {"params": [net.bias, net.second], **other}]
    return cls(groups, **settings, **live)


def train(net: Net, optimizer: torch.optim.Optimizer, data: list[dict]) -> None:
    for batch in data:
        optimizer.zero_grad(set_to_none=True)
        net(batch).backward()
        optimizer.step()


def gradients(net: Net, parameters: dict, batch: dict, **options: bool) -> dict:
    loss = torch.func.functional_call(net, parameters, (batch,))
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, **options)
    return dict(zip(parameters, found, strict=True))


def largest_difference(net, optimizer, transformation, state, data) -> float:
    """Steps both; the largest difference of any element at any step, relative where the element is above 1."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    worst = 0.0
    for batch in data:
        updates, state = transformation.update(gradients(net, parameters, batch), state, params=parameters)
        moved = torchopt.apply_updates(parameters, updates, inplace=False)
        parameters = {name: p.detach().requires_grad_() for name, p in moved.items()}
        train(net, optimizer, [batch])
        for name, p in net.named_parameters():
            difference = (p - parameters[name]).abs() / p.abs().clamp(min=1.0)
            worst = max(worst, difference.max().item())
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_parity_with_torch_over_twenty_steps_from_a_live_state(case, dtype):
    cls, settings = CASES[case]
    net = Net(dtype)
    data = batches(30, dtype)
    optimizer = grouped(net, cls, settings)
    train(net, optimizer, data[:10])
    inner = mirror(optimizer, net.named_parameters())
    state = read_state(optimizer, net.named_parameters())
    assert largest_difference(net, optimizer, inner.transformation(), state, data[10:]) <= tolerance(case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_parity_from_a_fresh_start(case):
    cls, settings = CASES[case]
    net = Net()
    optimizer = grouped(net, cls, settings)
    transformation = mirror(optimizer, net.named_parameters()).transformation()
    state = transformation.init(dict(net.named_parameters()))
    assert largest_difference(net, optimizer, transformation, state, batches(20)) <= tolerance(case, torch.float64)


def tensor_values(inner: InnerOptimizer, per_tensor: bool, skip: tuple = ()) -> list[dict]:
    """Every learnable hyperparameter that is not zero, at its own value, as a float64 tensor."""
    values = []
    for group in inner.groups:
        found: dict = {}
        for key in inner.rule.learnable:
            number = group.hyperparameters[key]
            if number != 0 and key not in skip:
                tensor = torch.tensor(number, dtype=torch.float64, requires_grad=True)
                found[key] = {name: tensor for name in group.names} if per_tensor else tensor
        values.append(found)
    return values


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_parity_when_every_hyperparameter_is_a_tensor(case, per_tensor):
    cls, settings = CASES[case]
    net = Net(torch.float32)
    data = batches(30, torch.float32)
    optimizer = grouped(net, cls, settings)
    train(net, optimizer, data[:10])
    inner = mirror(optimizer, net.named_parameters())
    transformation = inner.transformation(tensor_values(inner, per_tensor))
    state = read_state(optimizer, net.named_parameters())
    difference = largest_difference(net, optimizer, transformation, state, data[10:])
    # The tensors are float64 throughout, the parameters must stay float32.
    assert difference <= tolerance(case, torch.float32)
    updates, state = transformation.update(
        gradients(net, dict(net.named_parameters()), data[0]), state, params=dict(net.named_parameters())
    )
    assert {update.dtype for update in updates.values()} == {torch.float32}


FUSED = ["sgd-nesterov", "adam", "adamw-amsgrad-maximize", "adagrad"]
FOREACH = [*FUSED, "nadam", "radam", "rmsprop-centered"]


@pytest.mark.parametrize(
    ("case", "live"), [(case, "fused") for case in FUSED] + [(case, "foreach") for case in FOREACH]
)
def test_parity_with_foreach_and_fused_implementations(case, live):
    cls, settings = CASES[case]
    net = Net(torch.float32)
    data = batches(30, torch.float32)
    # Other implementations of the same formulas, which round differently.
    optimizer = grouped(net, cls, settings, **{live: True})
    train(net, optimizer, data[:10])
    inner = mirror(optimizer, net.named_parameters())
    state = read_state(optimizer, net.named_parameters())
    assert all(type(entries.get("step", 0)) is int for entries in state.values())
    assert largest_difference(net, optimizer, inner.transformation(), state, data[10:]) <= 1e-6


def test_state_of_a_capturable_optimizer_with_tensor_rate_is_read():
    # capturable itself runs on accelerators only; its state looks like this (step tensors, tensor lr).
    net = Net()
    optimizer = grouped(net, OPTIM.Adam, {"lr": 0.01})
    train(net, optimizer, batches(4))
    for group in optimizer.param_groups:
        group["capturable"], group["lr"] = True, torch.tensor(0.125)
    state = read_state(optimizer, net.named_parameters())
    assert state["first"]["step"] == 4 and type(state["first"]["step"]) is int
    assert state["sometimes"]["step"] == 3  # one of the four batches gave it no gradient
    assert mirror(optimizer, net.named_parameters()).groups[0].hyperparameters["lr"] == 0.125


def test_state_is_a_detached_copy_in_plain_types():
    net = Net()
    for cls in (OPTIM.NAdam, OPTIM.SGD):
        optimizer = grouped(net, cls, {"lr": 0.01})
        train(net, optimizer, batches(3))
        before = copy.deepcopy(optimizer.state_dict())
        state = read_state(optimizer, net.named_parameters())
        for entries in state.values():
            for value in entries.values():
                assert isinstance(value, int | float | torch.Tensor)
                if isinstance(value, torch.Tensor):
                    assert not value.requires_grad
                    value.fill_(7.0)
        assert str(optimizer.state_dict()) == str(before)
    # torch leaves momentum_buffer None in the state of a plain SGD; absence says the same.
    assert state["first"] == {}


def test_no_gradient_keeps_state_and_step():
    net = Net()
    optimizer = grouped(net, OPTIM.Adam, {"lr": 0.01})
    train(net, optimizer, batches(3))
    transformation = mirror(optimizer, net.named_parameters()).transformation()
    state = read_state(optimizer, net.named_parameters())
    parameters = dict(net.named_parameters())
    given = {name: None for name in parameters}
    given["bias"] = torch.ones(5, dtype=torch.float64)
    del given["gain"]  # missing is the same as None
    updates, after = transformation.update(given, state, params=parameters)
    assert [name for name, update in updates.items() if update is not None] == ["bias"]
    assert after["first"] is state["first"] and after["gain"] is state["gain"]
    assert after["bias"]["step"] == state["bias"]["step"] + 1
    moved = torchopt.apply_updates(parameters, updates, inplace=False)
    assert torch.equal(moved["first"], parameters["first"])


def test_frozen_and_tied_parameters():
    net = Net()
    net.first.requires_grad_(False)
    net.alias = net.second  # tied: one tensor, two names
    optimizer = OPTIM.SGD([net.first, net.second, net.bias], lr=0.1)
    (group,) = mirror(optimizer, net.named_parameters(remove_duplicate=False)).groups
    assert group.names == ("second", "bias")
    assert set(read_state(optimizer, net.named_parameters(remove_duplicate=False))) == {"second", "bias"}


def test_parameters_in_no_group_do_not_move():
    net = Net()
    optimizer = OPTIM.SGD([net.bias], lr=0.1)
    parameters = dict(net.named_parameters())
    transformation = mirror(optimizer, net.named_parameters()).transformation()
    updates, _ = transformation.update(
        gradients(net, parameters, batches(1)[0]), transformation.init(parameters), params=parameters
    )
    assert [name for name, update in updates.items() if update is not None] == ["bias"]


@pytest.mark.parametrize("case", CASES)
def test_second_use_equals_first_use(case):
    """torchopt 0.7.3 keeps "first momentum step" in a closure, so that its second run differs from its
    first."""
    cls, settings = CASES[case]
    net = Net()
    transformation = mirror(grouped(net, cls, settings), net.named_parameters()).transformation()
    runs = []
    for _ in range(2):
        parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        state = transformation.init(parameters)
        for batch in batches(4):
            updates, state = transformation.update(gradients(net, parameters, batch), state, params=parameters)
            parameters = torchopt.apply_updates(parameters, updates, inplace=False)
        runs.append(parameters)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_modified_in_place_even_if_asked(case):
    cls, settings = CASES[case]
    net = Net()
    optimizer = grouped(net, cls, settings)
    train(net, optimizer, batches(3))
    transformation = mirror(optimizer, net.named_parameters()).transformation()
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = read_state(optimizer, net.named_parameters())
    given = {name: torch.ones_like(p) for name, p in parameters.items()}
    before = copy.deepcopy((parameters, state, given))
    transformation.update(given, state, params=parameters, inplace=True)
    assert str(before) == str((parameters, state, given))
