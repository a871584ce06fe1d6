"""Adagrad as in ``torch.optim.Adagrad``: sum of squares, decaying learning rate, initial accumulator."""

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
    oriented,
    square_root,
    times,
)


def _update(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    gradient = oriented(parameter, gradient, hyperparameters)
    total = state.get("sum")
    if total is None:
        total = torch.full_like(parameter, hyperparameters["initial_accumulator_value"])
    step = state.get("step", 0) + 1
    total = torch.addcmul(total, gradient, gradient)
    learning_rate = hyperparameters["lr"] / (1 + (step - 1) * hyperparameters["lr_decay"])
    denominator = square_root(total) + coefficient(hyperparameters["eps"], total)
    return times(gradient / denominator, -learning_rate), {**state, "step": step, "sum": total}


ADAGRAD = Rule(
    update=_update,
    defaults={
        "lr": 1e-2,
        "lr_decay": 0.0,
        "eps": 1e-10,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "maximize": False,
    },
    learnable=("lr", "lr_decay", "eps", "weight_decay"),
    elementwise=True,
    dual_numbers=True,
    proportional_to_rate=True,
)
