"""RMSprop as in ``torch.optim.RMSprop``: plain or centered, with momentum on the scaled gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.functional.rule import (
    Hyperparameters,
    Rule,
    State,
    coefficient,
    decayed_square,
    entry,
    interpolate,
    is_number,
    oriented,
    square_root,
    times,
)


def _update(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    gradient = oriented(parameter, gradient, hyperparameters)
    alpha, momentum = hyperparameters["alpha"], hyperparameters["momentum"]

    square = decayed_square(entry(state, "square_avg", parameter), gradient, alpha)
    new_state = {**state, "step": state.get("step", 0) + 1, "square_avg": square}
    if hyperparameters["centered"]:
        mean = interpolate(entry(state, "grad_avg", parameter), gradient, 1 - alpha)
        new_state["grad_avg"] = mean
        square = torch.addcmul(square, mean, mean, value=-1)
    scaled = gradient / (square_root(square) + coefficient(hyperparameters["eps"], square))
    if not is_number(momentum, 0):
        scaled = times(entry(state, "momentum_buffer", parameter), momentum) + scaled
        new_state["momentum_buffer"] = scaled
    return times(scaled, -hyperparameters["lr"]), new_state


RMSPROP = Rule(
    update=_update,
    defaults={
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "maximize": False,
    },
    learnable=("lr", "alpha", "eps", "weight_decay", "momentum"),
    elementwise=True,
    dual_numbers=True,
    proportional_to_rate=True,
)
