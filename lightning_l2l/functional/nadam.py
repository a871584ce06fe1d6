"""NAdam as in ``torch.optim.NAdam``: Nesterov momentum in Adam, with the momentum's own warm-up."""

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


def _product(product: Number, momentum: Number) -> Number:
    """The product of all momenta, rounded as ``torch.optim`` does: float32 even for float64 parameters."""
    if is_tensor(product) or is_tensor(momentum):
        # Learned betas: the exact product, as a rounded one would have no smooth derivative.
        return product * momentum
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return (torch.tensor(product, dtype=dtype) * momentum).item()


def _update(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    learning_rate, beta1, beta2 = (hyperparameters[name] for name in ("lr", "beta1", "beta2"))
    decoupled = hyperparameters["decoupled_weight_decay"]
    gradient = oriented(parameter, gradient, hyperparameters, decay=not decoupled)
    shift = decoupled_decay(parameter, hyperparameters) if decoupled else None

    step = state.get("step", 0) + 1
    decay = hyperparameters["momentum_decay"]
    momentum = beta1 * (1.0 - 0.5 * 0.96 ** (step * decay))
    next_momentum = beta1 * (1.0 - 0.5 * 0.96 ** ((step + 1) * decay))
    product = _product(state.get("mu_product", 1.0), momentum)
    mean = interpolate(entry(state, "exp_avg", parameter), gradient, 1 - beta1)
    square = decayed_square(entry(state, "exp_avg_sq", parameter), gradient, beta2)

    denominator = square_root(square / coefficient(1 - beta2**step, square))
    denominator = denominator + coefficient(hyperparameters["eps"], square)
    of_gradient = -learning_rate * (1.0 - momentum) / (1.0 - product)
    of_mean = -learning_rate * next_momentum / (1.0 - product * next_momentum)
    delta = times(gradient / denominator, of_gradient) + times(mean / denominator, of_mean)
    new_state = {**state, "step": step, "mu_product": product, "exp_avg": mean, "exp_avg_sq": square}
    return delta if shift is None else shift + delta, new_state


NADAM = Rule(
    update=_update,
    defaults={
        "lr": 2e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum_decay": 4e-3,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    learnable=("lr", "beta1", "beta2", "eps", "weight_decay"),
    elementwise=True,
    dual_numbers=True,
    proportional_to_rate=True,
)
