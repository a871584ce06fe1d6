"""One meta-gradient of the step size of SGD with momentum, by us and by every peer: the same network, data and numbers.

Each function takes the problem and the number of steps K, trains K steps differentiably from the same weights, and
returns the derivative of the held-out loss by the logarithm of the learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.functional import inner_optimizer

RATE, MOMENTUM = 0.01, 0.9


@dataclass
class Problem:
    """A classifier with two hidden layers of one width, a training and a held-out batch."""

    width: int
    batch: int

    def __post_init__(self) -> None:
        """Draw weights and data."""
        torch.manual_seed(0)
        layers = [nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(self.width, 10))
        self.train, self.held_out = self._draw(), self._draw()
        self.compiled: dict[Any, Any] = {}

    def _draw(self) -> tuple[Tensor, Tensor]:
        return torch.randn(self.batch, self.width), torch.randint(10, (self.batch,))

    def loss(self, tensors: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy at given parameters."""
        return nn.functional.cross_entropy(functional_call(self.net, dict(tensors), (batch[0],)), batch[1])


def plain(problem: Problem, steps: int) -> float:
    """The training itself, by torch.optim."""
    net = copy.deepcopy(problem.net)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(problem.train[0]), problem.train[1]).backward()
        optimizer.step()
    return 0.0


def _ours(estimator: Any) -> Callable[[Problem, int], float]:
    def run(problem: Problem, steps: int) -> float:
        learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=RATE, momentum=MOMENTUM))
        found = meta_gradient(
            problem.loss, dict(problem.net.named_parameters()), learned, [problem.train] * steps, problem.held_out,
            objective="naive", estimator=estimator,
        )  # fmt: skip
        return found.gradients["learning_rate"].item()

    return run


def by_torch_func(problem: Problem, steps: int) -> float:
    """Written by hand: torch.func.grad in a loop, and back through it all."""
    log_rate = torch.zeros((), requires_grad=True)
    parameters = {name: p.detach() for name, p in problem.net.named_parameters()}
    velocity: dict[str, Tensor] = {}
    for _ in range(steps):
        gradients = torch.func.grad(problem.loss)(parameters, problem.train)
        velocity = {n: MOMENTUM * velocity[n] + g if velocity else g for n, g in gradients.items()}
        parameters = {n: p - RATE * log_rate.exp() * velocity[n] for n, p in parameters.items()}
    problem.loss(parameters, problem.held_out).backward()
    assert log_rate.grad is not None
    return log_rate.grad.item()


def by_torchopt(problem: Problem, steps: int) -> float:
    """torchopt.MetaSGD; its learning rate is a tensor that the derivative reaches."""
    import torchopt

    net = copy.deepcopy(problem.net)
    rate = torch.tensor(RATE, requires_grad=True)
    optimizer = torchopt.MetaSGD(net, lr=rate, momentum=MOMENTUM)
    for _ in range(steps):
        optimizer.step(nn.functional.cross_entropy(net(problem.train[0]), problem.train[1]))
    nn.functional.cross_entropy(net(problem.held_out[0]), problem.held_out[1]).backward()
    assert rate.grad is not None
    return RATE * rate.grad.item()


def by_higher(problem: Problem, steps: int) -> float:
    """higher's differentiable copy of torch.optim.SGD."""
    import higher

    optimizer = torch.optim.SGD(problem.net.parameters(), lr=RATE, momentum=MOMENTUM)
    rate = torch.tensor(RATE, requires_grad=True)
    with higher.innerloop_ctx(problem.net, optimizer, override={"lr": [rate]}) as (net, differentiable):
        for _ in range(steps):
            differentiable.step(nn.functional.cross_entropy(net(problem.train[0]), problem.train[1]))
        loss = nn.functional.cross_entropy(net(problem.held_out[0]), problem.held_out[1])
        return RATE * torch.autograd.grad(loss, rate)[0].item()


def _in_jax(mode: str) -> Callable[[Problem, int], float]:
    """Jitted, with a scan over the steps; ``mode`` is forward, reverse or plain (the training alone)."""

    def run(problem: Problem, steps: int) -> float:
        import jax
        import jax.numpy as jnp

        if (mode, steps) not in problem.compiled:
            array = lambda tensor: jnp.asarray(tensor.detach().numpy())  # noqa: E731
            start = [array(p) for p in problem.net.parameters()]
            train, held_out = ((array(x), array(y)) for x, y in (problem.train, problem.held_out))

            def loss(parameters: Any, batch: Any) -> Any:
                hidden, (w1, b1, w2, b2, w3, b3) = batch[0], parameters
                hidden = jax.nn.relu(hidden @ w1.T + b1)
                hidden = jax.nn.relu(hidden @ w2.T + b2)
                logits = jax.nn.log_softmax(hidden @ w3.T + b3)
                return -jnp.take_along_axis(logits, batch[1][:, None], 1).mean()

            def unrolled(log_rate: Any) -> Any:
                def step(carry: Any, _: Any) -> Any:
                    parameters, velocity = carry
                    gradients = jax.grad(loss)(parameters, train)
                    velocity = [MOMENTUM * v + g for v, g in zip(velocity, gradients, strict=True)]
                    rate = RATE * jnp.exp(log_rate)
                    return ([p - rate * v for p, v in zip(parameters, velocity, strict=True)], velocity), None

                zero = [jnp.zeros_like(p) for p in start]
                (parameters, _), _ = jax.lax.scan(step, (start, zero), None, length=steps)
                return loss(parameters, held_out)

            transform = {"plain": lambda f: f, "forward": jax.jacfwd, "reverse": jax.grad}[mode]
            problem.compiled[mode, steps] = jax.jit(transform(unrolled))
        return float(problem.compiled[mode, steps](0.0))

    return run


# What is compared with ``plain``; JAX with its own training.
PEERS: dict[str, Callable[[Problem, int], float]] = {
    "ours, forward": _ours("forward"),
    "ours, reverse": _ours("reverse"),
    "torchopt.MetaSGD": by_torchopt,
    "torch.func, by hand": by_torch_func,
}
if find_spec("higher"):
    PEERS["higher"] = by_higher
JAX: dict[str, Callable[[Problem, int], float]] = {}
if find_spec("jax"):
    JAX = {name: _in_jax(name) for name in ("plain", "forward", "reverse")}
