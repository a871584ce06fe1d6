"""Two online rules for the learning rate, written small, around any of SGD, Adam and AdamW with one parameter group.

Self-contained. Both look at training gradients alone and move the rate at every step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class OnlineRate:
    """What a plain loop needs of an optimizer: ``zero_grad`` and ``step``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        (self.group,) = optimizer.param_groups
        self.weights: list[Tensor] = self.group["params"]
        self.trace: list[Tensor] | None = None

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @property
    def gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.weights if weight.grad is not None]

    def step(self) -> Any:
        raise NotImplementedError


class Hypergradient(OnlineRate):
    """Hypergradient descent with the multiplicative rule: the rate times 1 + beta cos(gradient, last direction).

    Source: Baydin, Cornish, Martinez Rubio, Schmidt, Wood, "Online Learning Rate Adaptation with Hypergradient Descent"
    (ICLR 2018). Of its two rules the one that does not depend on the scale of loss and rate; the additive one with its
    published constants cannot leave a start that is wrong by decades. With beta = 0.02 (ours) the rate can move by
    eight decades in 1000 steps.
    """

    BETA = 0.02

    @torch.no_grad()
    def step(self) -> None:
        """Move the rate, then the weights."""
        if self.trace is not None:
            norms = math.sqrt(inner(self.gradients, self.gradients) * inner(self.trace, self.trace))
            if norms > 0:
                self.group["lr"] *= 1 + self.BETA * inner(self.gradients, self.trace) / norms
        before = [weight.clone() for weight in self.weights]
        self.optimizer.step()
        # Minus the update over the rate, but for a positive factor, which the cosine does not see.
        self.trace = [old - weight for old, weight in zip(before, self.weights, strict=True)]


class MetaOptimize(OnlineRate):
    """MetaOptimize with a scalar rate, its Hessian-free trace, and Lion for the logarithm of the rate.

    Source: Sharifnassab, Salehkaleybar, Sutton, "MetaOptimize" (ICML 2025), after the authors' AdamW class
    (``MetaOptimize_AdamW_Lion_hg``), whose constants these are but for the meta step size: the published 1e-3 moves a
    rate by a factor of e in 1000 steps at most. For SGD the trace takes the gradient as it is.
    """

    META_STEP_SIZE, GAMMA, MOMENTUM, MIX = 1e-2, 0.9999, 0.99, 0.9

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.trace = [torch.zeros_like(weight) for weight in self.weights]
        self.momentum = 0.0

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights, then the rate."""
        assert self.trace is not None
        rate, decay = self.group["lr"], self.group["weight_decay"]
        product = inner(self.gradients, self.trace)
        self.optimizer.step()
        for weight, gradient, trace in zip(self.weights, self.gradients, self.trace, strict=True):
            trace.mul_(self.GAMMA * (1 - rate * decay)).add_(self._scaled(weight, gradient), alpha=rate)
        self.momentum = self.MOMENTUM * self.momentum + (1 - self.MOMENTUM) * product
        move = self.MIX * self.momentum + (1 - self.MIX) * product
        self.group["lr"] *= math.exp(self.META_STEP_SIZE * math.copysign(float(move != 0), move))

    def _scaled(self, weight: Tensor, gradient: Tensor) -> Tensor:
        state = self.optimizer.state[weight]
        if "exp_avg_sq" not in state:
            return gradient
        corrected = state["exp_avg_sq"] / (1 - self.group["betas"][1] ** float(state["step"]))
        return gradient / (corrected.sqrt() + self.group["eps"])


def inner(one: list[Tensor], other: list[Tensor]) -> float:
    """Inner product over all elements."""
    return float(sum(torch.vdot(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)))
