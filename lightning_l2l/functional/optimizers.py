"""The seven rules: SGD, Adam, AdamW, NAdam, RAdam, RMSprop and Adagrad, as in ``torch.optim``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.functional.rule import (
    Hyperparameters,
    Number,
    Rule,
    State,
    add_scaled,
    coefficient,
    decayed_square,
    decoupled_decay,
    entry,
    interpolate,
    is_number,
    oriented,
    square_root,
    times,
)


def _sgd(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    """Momentum, dampening, Nesterov, weight decay, maximize."""
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
    update=_sgd,
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
    homogeneous=True,
)


def _moments(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, Tensor | None, State]:
    """What Adam and its relatives begin with: the gradient, the decoupled decay, both moments after this step."""
    decoupled = hyperparameters["decoupled_weight_decay"]
    gradient = oriented(parameter, gradient, hyperparameters, decay=not decoupled)
    shift = decoupled_decay(parameter, hyperparameters) if decoupled else None
    mean = interpolate(entry(state, "exp_avg", parameter), gradient, 1 - hyperparameters["beta1"])
    square = decayed_square(entry(state, "exp_avg_sq", parameter), gradient, hyperparameters["beta2"])
    return gradient, shift, {**state, "step": state.get("step", 0) + 1, "exp_avg": mean, "exp_avg_sq": square}


def _adam(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    """Bias correction, amsgrad, both kinds of weight decay, maximize."""
    _, shift, new_state = _moments(parameter, gradient, state, hyperparameters)
    step, square = new_state["step"], new_state["exp_avg_sq"]
    if hyperparameters["amsgrad"]:
        square = torch.maximum(entry(state, "max_exp_avg_sq", parameter), square)
        new_state["max_exp_avg_sq"] = square
    # Corrections in double precision (Python numbers, or float64 tensors when the betas are learned).
    correction1 = 1 - hyperparameters["beta1"] ** step
    correction2 = (1 - hyperparameters["beta2"] ** step) ** 0.5
    denominator = square_root(square) / coefficient(correction2, square)
    denominator = denominator + coefficient(hyperparameters["eps"], square)
    delta = times(new_state["exp_avg"] / denominator, -(hyperparameters["lr"] / correction1))
    return delta if shift is None else shift + delta, new_state


_ADAM_LEARNABLE = ("lr", "beta1", "beta2", "eps", "weight_decay")
_ADAM_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "maximize": False,
    "decoupled_weight_decay": False,
}

ADAM = Rule(update=_adam, defaults={**_ADAM_DEFAULTS, "amsgrad": False}, learnable=_ADAM_LEARNABLE, elementwise=True)
# Before torch 2.7 AdamW's groups do not say that their decay is decoupled; the class does.
ADAMW = replace(ADAM, defaults={**ADAM.defaults, "decoupled_weight_decay": True})


def _momentum_product(product: Number, momentum: Number) -> Number:
    """The product of all momenta, rounded as ``torch.optim`` does: float32 even for float64 parameters."""
    if isinstance(product, Tensor) or isinstance(momentum, Tensor):
        # Learned betas: the exact product, as a rounded one would have no smooth derivative.
        return product * momentum
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return (torch.tensor(product, dtype=dtype) * momentum).item()


def _nadam(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    """Nesterov momentum in Adam, with the momentum's own warm-up."""
    gradient, shift, new_state = _moments(parameter, gradient, state, hyperparameters)
    learning_rate, beta1, beta2 = (hyperparameters[name] for name in ("lr", "beta1", "beta2"))
    step, square = new_state["step"], new_state["exp_avg_sq"]
    decay = hyperparameters["momentum_decay"]
    momentum = beta1 * (1.0 - 0.5 * 0.96 ** (step * decay))
    next_momentum = beta1 * (1.0 - 0.5 * 0.96 ** ((step + 1) * decay))
    product = _momentum_product(state.get("mu_product", 1.0), momentum)
    denominator = square_root(square / coefficient(1 - beta2**step, square))
    denominator = denominator + coefficient(hyperparameters["eps"], square)
    of_gradient = -learning_rate * (1.0 - momentum) / (1.0 - product)
    of_mean = -learning_rate * next_momentum / (1.0 - product * next_momentum)
    delta = times(gradient / denominator, of_gradient) + times(new_state["exp_avg"] / denominator, of_mean)
    return delta if shift is None else shift + delta, {**new_state, "mu_product": product}


NADAM = Rule(
    update=_nadam,
    defaults={**_ADAM_DEFAULTS, "lr": 2e-3, "momentum_decay": 4e-3},
    learnable=_ADAM_LEARNABLE,
    elementwise=True,
)

# RAdam's averaging length above which the variance is tractable, and the adaptive step is taken.
_TRACTABLE = 5.0


def _rectification(longest: Number, length: Number) -> Number:
    """Square of RAdam's rectification term, for a tractable length."""
    return (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)


def _radam(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    """Adam that waits until its second moment can be trusted."""
    _, shift, new_state = _moments(parameter, gradient, state, hyperparameters)
    beta1, beta2, step = hyperparameters["beta1"], hyperparameters["beta2"], new_state["step"]
    square = new_state["exp_avg_sq"]
    plain = times(times(new_state["exp_avg"], 1 / (1 - beta1**step)), -hyperparameters["lr"])
    correction = 1 - beta2**step
    # The averaging length: in the long run, and after so many steps.
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction
    denominator = square_root(square) + coefficient(hyperparameters["eps"], square)
    if isinstance(length, Tensor) and isinstance(longest, Tensor):
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


RADAM = Rule(update=_radam, defaults=_ADAM_DEFAULTS, learnable=_ADAM_LEARNABLE, elementwise=True)


def _rmsprop(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    """Plain or centered, with momentum on the scaled gradient."""
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
    update=_rmsprop,
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
)


def _adagrad(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Hyperparameters
) -> tuple[Tensor, State]:
    """Sum of squares, decaying learning rate, initial accumulator."""
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
    update=_adagrad,
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
)
