"""Stochastic gradient descent as in ``torch.optim.SGD``: momentum, dampening, Nesterov, weight decay, maximize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_l2l.functional.rule import (
    Hyperparameters,
    Rule,
    State,
    add_scaled,
    always,
    is_number,
    oriented,
    times,
)


def _update(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    gradient = oriented(parameter, gradient, hyperparameters)
    momentum = hyperparameters["momentum"]
    if is_number(momentum, 0):
        return times(gradient, -hyperparameters["lr"]), dict(state)
    buffer = state.get("momentum_buffer")
    # The first buffer is the gradient itself: neither momentum nor dampening touch it.
    if buffer is None:
        buffer = gradient
    else:
        buffer = add_scaled(times(buffer, momentum), gradient, 1 - hyperparameters["dampening"])
    direction = add_scaled(gradient, buffer, momentum) if hyperparameters["nesterov"] else buffer
    return times(direction, -hyperparameters["lr"]), {**state, "momentum_buffer": buffer}


SGD = Rule(
    update=_update,
    defaults={
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    },
    learnable=("lr", "momentum", "dampening", "weight_decay"),
    elementwise=True,
    dual_numbers=True,
    proportional_to_rate=True,
    # Linear in all three, whatever the hyperparameters.
    scale_equivariant=always,
)
