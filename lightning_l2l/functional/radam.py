"""RAdam as in ``torch.optim.RAdam``: Adam that waits until its second moment can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.functional.rule import (
    Hyperparameters,
    Number,
    Rule,
    State,
    coefficient,
    decayed_square,
    decoupled_decay,
    entry,
    interpolate,
    is_tensor,
    oriented,
    square_root,
    times,
)

# Length of the averaging window above which the variance is tractable, and the adaptive step is taken.
_TRACTABLE = 5.0


def _window(beta2: Number, step: int) -> tuple[Number, Number]:
    """Length of the averaging window: in the long run, and after so many steps."""
    longest = 2 / (1 - beta2) - 1
    return longest, longest - 2 * step * beta2**step / (1 - beta2**step)


def _rectification(longest: Number, length: Number) -> Number:
    """Square of the rectification term, for a tractable length."""
    return (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)


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

    plain = times(times(mean, 1 / (1 - beta1**step)), -learning_rate)
    longest, length = _window(beta2, step)
    denominator = square_root(square) + coefficient(hyperparameters["eps"], square)
    correction = 1 - beta2**step
    if is_tensor(length) and is_tensor(longest):
        # Both branches are computed: the one not taken gets harmless lengths, or zero times infinity is NaN.
        tractable = length > _TRACTABLE
        ratio = _rectification(torch.where(tractable, longest, 9.0), torch.where(tractable, length, 9.0))
        adaptive = times(plain / denominator, (ratio * correction) ** 0.5)
        delta = torch.where(tractable.to(plain.device), adaptive, plain)
    elif length > _TRACTABLE:
        delta = times(plain / denominator, (_rectification(longest, length) * correction) ** 0.5)
    else:
        delta = plain
    return delta if shift is None else shift + delta, new_state


RADAM = Rule(
    update=_update,
    defaults={
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    learnable=("lr", "beta1", "beta2", "eps", "weight_decay"),
    elementwise=True,
    dual_numbers=True,
    proportional_to_rate=True,
)
