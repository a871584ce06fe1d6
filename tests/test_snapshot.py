"""Snapshots of the training: everything comes back bit for bit, in place, whatever the optimizer has done since."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2l.host.snapshot import Snapshot


def step(module: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    optimizer.zero_grad()
    module(inputs).square().mean().backward()
    optimizer.step()


def contents(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return [torch.as_tensor(value).clone() for value in [*module.state_dict().values(), *state]]


@pytest.mark.parametrize("steps_before", [0, 2], ids=["before the first step", "later"])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_everything_comes_back(make: Any, steps_before: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = make(module.parameters(), lr=0.1, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    batches = torch.randn(6, 8, 3)
    for batch in batches[:steps_before]:
        step(module, optimizer, batch)
    tensors, before = list(module.parameters()), contents(module, optimizer)
    snapshot = Snapshot(module, optimizer)
    for batch in batches[2:]:
        step(module, optimizer, 100 * batch)
        next(iter(optimizer.state.values()))["something of later"] = torch.ones(1)
    snapshot.restore(module, optimizer)
    after = contents(module, optimizer)
    assert len(before) == len(after) and all(one.equal(two) for one, two in zip(before, after, strict=True))
    assert all(one is two for one, two in zip(tensors, module.parameters(), strict=True))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_taking_a_snapshot_again_is_taking_a_new_one_in_the_same_memory(make: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = make(module.parameters(), lr=0.1, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    snapshot = Snapshot(module, optimizer)  # without a state
    memory = {name: tensor.data_ptr() for name, tensor in [*snapshot.parameters.items(), *snapshot.buffers.items()]}
    for batch in torch.randn(3, 8, 3):
        step(module, optimizer, batch)
        snapshot.take(module, optimizer)
    before = contents(module, optimizer)
    assert memory == {n: tensor.data_ptr() for n, tensor in [*snapshot.parameters.items(), *snapshot.buffers.items()]}
    step(module, optimizer, torch.randn(8, 3))
    snapshot.restore(module, optimizer)
    after = contents(module, optimizer)
    assert len(before) == len(after) and all(one.equal(two) for one, two in zip(before, after, strict=True))


def test_a_state_of_another_shape_is_replaced() -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    step(module, optimizer, torch.ones(1, 2))
    snapshot, buffer = Snapshot(module, optimizer), optimizer.state[module.weight]["momentum_buffer"].clone()
    optimizer.state[module.weight]["momentum_buffer"] = torch.zeros(5)
    snapshot.restore(module, optimizer)
    assert optimizer.state[module.weight]["momentum_buffer"].equal(buffer)


def test_a_parameter_that_the_optimizer_got_later_stays_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.1, momentum=0.9)
    snapshot = Snapshot(module, optimizer)
    optimizer.add_param_group({"params": list(module[1].parameters())})
    step(module, optimizer, torch.ones(1, 2))
    late, state = module[1].weight.detach().clone(), optimizer.state[module[1].weight]["momentum_buffer"].clone()
    snapshot.restore(module, optimizer)
    assert optimizer.state[module[1].weight]["momentum_buffer"].equal(state) and module[1].weight.equal(late)
    assert module[0].weight not in optimizer.state
