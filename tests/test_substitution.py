"""Other tensors in a module for the time of a call, and the module's own back afterwards, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from lightning_l2l.exact.substitution import call_with


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(3))
        self.first.register_buffer("scale", self.scale)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs)) * self.scale * self.first.scale


def twice() -> nn.Module:
    layer, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    return nn.Sequential(layer, norm, nn.Sequential(layer, norm), nn.Linear(3, 3))


MODULES: dict[str, Any] = {
    "tied tensors": Tied,
    "a module in two places": twice,
    "a parametrized layer in two places": lambda: nn.Sequential(*[parametrizations.orthogonal(nn.Linear(3, 3))] * 2),
    "a recurrent layer in two places": lambda: nn.ModuleList([nn.GRU(3, 3)] * 2)[0],
    "a frozen layer": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)),
}


def places(module: nn.Module) -> list[Any]:
    """Every tensor in every place, and a copy of what is in it."""
    held = [tensor for child in module.modules() for tensor in (*child._parameters.values(), *child._buffers.values())]
    return [(id(tensor), type(tensor), None if tensor is None else tensor.tolist()) for tensor in held]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_in_a_module_is_in_it_afterwards(name: str, fails: bool) -> None:
    module = MODULES[name]()
    before = places(module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    substitutes = {key: tensor.detach() * 2 for key, tensor in tensors.items()}
    if fails:
        with pytest.raises((RuntimeError, ValueError)):
            call_with(module, substitutes, torch.ones(4, 7))
    else:
        call_with(module, substitutes, torch.ones(4, 3))
    assert places(module) == before


@pytest.mark.parametrize("name", MODULES)
def test_a_call_with_other_tensors_is_a_call_of_a_module_that_has_them(name: str) -> None:
    module, other = MODULES[name](), MODULES[name]()
    inputs = torch.randn(4, 3)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    found = call_with(module, {key: tensor.detach().clone() for key, tensor in tensors.items()}, inputs)
    expected = other(inputs)
    for left, right in zip(
        *(value if isinstance(value, tuple) else (value,) for value in (found, expected)), strict=True
    ):
        assert torch.equal(left, right)


def test_torch_s_own_call_still_needs_this() -> None:
    """If this fails, torch has mended `functional_call`, and `call_with` can go."""
    module = twice()
    weight = module[0].weight
    functional_call(module, {"0.weight": weight.detach() * 2}, (torch.ones(4, 3),))
    assert module[0].weight is not weight
