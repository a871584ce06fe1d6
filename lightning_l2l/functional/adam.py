"""Adam and AdamW as in ``torch.optim``: bias correction, amsgrad, both kinds of weight decay, maximize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.functional.rule import (
    Hyperparameters,
    Rule,
    State,
    coefficient,
    decayed_square,
    decoupled_decay,
    entry,
    interpolate,
    oriented,
    square_root,
    times,
)


def _update(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    learning_rate, beta1, beta2 = (hyperparameters[name] for name in ("lr", "beta1", "beta2"))
    decoupled = hyperparameters["decoupled_weight_decay"]
    gradient = oriented(parameter, gradient, hyperparameters, decay=not decoupled)
    shift = decoupled_decay(parameter, hyperparameters) if decoupled else None

    step = state.get("step", 0) + 1
    mean = interpolate(entry(state, "exp_avg", parameter), gradient, 1 - beta1)
    square = decayed_square(entry(state, "exp_avg_sq", parameter), gradient, beta2)
    new_state = {**state, "step": step, "exp_avg": mean, "exp_avg_sq": square}
    if hyperparameters["amsgrad"]:
        square = torch.maximum(entry(state, "max_exp_avg_sq", parameter), square)
        new_state["max_exp_avg_sq"] = square

    # Corrections in double precision (Python numbers, or float64 tensors when the betas are learned).
    correction1 = 1 - beta1**step
    correction2 = (1 - beta2**step) ** 0.5
    denominator = square_root(square) / coefficient(correction2, square)
    denominator = denominator + coefficient(hyperparameters["eps"], square)
    delta = times(mean / denominator, -(learning_rate / correction1))
    return delta if shift is None else shift + delta, new_state


ADAM = Rule(
    update=_update,
    defaults={
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    learnable=("lr", "beta1", "beta2", "eps", "weight_decay"),
    elementwise=True,
    dual_numbers=True,
    proportional_to_rate=True,
)

# Before torch 2.7 AdamW's groups do not say that their decay is decoupled; the class does.
ADAMW = replace(ADAM, defaults={**ADAM.defaults, "decoupled_weight_decay": True})
