"""A copy of what training changes, to go back to."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_l2l.host.training_step import owned_tensors


class Snapshot:
    """Parameters that the optimizer moves, the module's buffers, and the optimizer's state.

    Memory: one copy of these, where they are. Learning rates, schedulers, loss scaling, random numbers and the data
    are not in it.

    Args:
        module: The user's module.
        optimizer: Its optimizer.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters, buffers = owned_tensors(module, optimizer)
        self.parameters = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        self.buffers = {name: tensor.detach().clone() for name, tensor in buffers.items()}
        self._states = {name: _copied(optimizer.state.get(tensor)) for name, tensor in parameters.items()}

    @torch.no_grad()
    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put everything back, bit for bit, into the same tensors where there are any.

        A parameter that the optimizer did not move yet when the snapshot was taken stays as it is.
        """
        parameters, buffers = owned_tensors(module, optimizer)
        for live, saved in ((parameters, self.parameters), (buffers, self.buffers)):
            for name, tensor in live.items():
                if name in saved:
                    tensor.copy_(saved[name])
        for name, parameter in parameters.items():
            if name not in self._states:
                continue
            state = _copied(self._states[name])
            if state is None:
                optimizer.state.pop(parameter, None)
                continue
            present = optimizer.state[parameter]
            for key in [key for key in present if key not in state]:
                del present[key]
            for key, value in state.items():
                held = present.get(key)
                if isinstance(held, Tensor) and isinstance(value, Tensor) and held.shape == value.shape:
                    held.copy_(value)  # whoever holds this tensor (captured graphs) goes on with it
                else:
                    present[key] = value


def _copied(state: Any) -> Any:
    return apply_to_collection(state, Tensor, lambda tensor: tensor.detach().clone())
