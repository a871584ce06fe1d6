"""A copy of what training changes, to go back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_l2l.host.training_step import owned_tensors

_Place = TypeVar("_Place")


class Snapshot:
    """Parameters that the optimizer moves, the module's buffers, and the optimizer's state.

    Memory: one copy of these, where they are. Learning rates, schedulers, loss scaling, random numbers and the data
    are not in it.

    Args:
        module: The user's module.
        optimizer: Its optimizer.

    Attributes:
        parameters: Copies by name.
        buffers: The same.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._states: dict[tuple[str, str], Any] = {}
        self._moved: set[str] = set()
        self.take(module, optimizer)

    @torch.no_grad()
    def take(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the present state in place of the former one, into the same memory as far as that fits."""
        parameters, buffers = owned_tensors(module, optimizer)
        states = {
            (name, key): value
            for name, tensor in parameters.items()
            for key, value in optimizer.state.get(tensor, {}).items()
        }
        self.parameters = _renewed(self.parameters, parameters)
        self.buffers = _renewed(self.buffers, buffers)
        self._states = _renewed(self._states, states)
        self._moved = {name for name, tensor in parameters.items() if tensor in optimizer.state}

    @torch.no_grad()
    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put everything back, bit for bit, into the same tensors where there are any.

        A parameter that the optimizer did not own yet when the snapshot was taken stays as it is.
        """
        parameters, buffers = owned_tensors(module, optimizer)
        for live, saved in ((parameters, self.parameters), (buffers, self.buffers)):
            for name, tensor in live.items():
                if name in saved:
                    tensor.copy_(saved[name])
        states: dict[str, dict[str, Any]] = {name: {} for name in self.parameters}
        for (name, key), value in self._states.items():
            states[name][key] = value
        for name, state in states.items():
            if name not in parameters:
                continue
            if name not in self._moved:  # it had no state yet
                optimizer.state.pop(parameters[name], None)
                continue
            present = optimizer.state[parameters[name]]
            for key in [key for key in present if key not in state]:
                del present[key]
            for key, value in state.items():
                held = present.get(key)
                if isinstance(held, Tensor) and isinstance(value, Tensor) and held.shape == value.shape:
                    held.copy_(value)  # whoever holds this tensor (captured graphs) goes on with it
                else:
                    present[key] = _copied(value)


def _renewed(saved: dict[_Place, Any], live: Mapping[_Place, Any]) -> dict[_Place, Any]:
    """Copies of the live values, in the memory of the saved ones where they are alike."""
    kept = {place: saved[place] for place, value in live.items() if _alike(saved.get(place), value)}
    if kept:
        torch._foreach_copy_(list(kept.values()), [live[place] for place in kept])
    return {place: kept[place] if place in kept else _copied(value) for place, value in live.items()}


def _alike(saved: Any, live: Any) -> bool:
    return (
        isinstance(saved, Tensor)
        and isinstance(live, Tensor)
        and saved.shape == live.shape
        and saved.dtype == live.dtype
        and saved.device == live.device
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return apply_to_collection(value, Tensor, lambda tensor: tensor.detach().clone())
