"""Claims on the general engine: the estimators against closed forms and each other, the mirrors against torch.optim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from lightning_l2l.exact.meta_gradient import meta_gradient
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.experiments._claim import Claim
from lightning_l2l.functional import inner_optimizer, mirror, read_state
from lightning_l2l.learned import LearnedHyperparameters, LearnedStepSize
from lightning_l2l.tasks import Quadratic


def claims() -> Iterator[Claim]:
    """All claims of this file."""
    yield from _against_the_closed_form()
    yield from _against_central_differences()
    yield from _mirrors()


def _against_the_closed_form() -> Iterator[Claim]:
    task = Quadratic.random(20, seed=0, kind="wide")
    limit = float(task.stability_limit)
    for estimator in ("forward", "reverse"):
        worst = max(
            abs(
                _engine(task, step_size, steps, "log", estimator)
                / (float(task.meta_gradient(step_size, steps)) * step_size)
                - 1
            )
            for steps, step_size in ((5, 0.1 * limit), (80, 0.9 * limit), (80, 5 * limit), (400, 5 * limit))
        )
        text = f"general engine, {estimator}, against the closed form (also where plain backprop dies)"
        yield Claim(text, worst, 0.0, 1e-9)


def _engine(
    task: Quadratic, step_size: float, steps: int, objective: Objective, estimator: Literal["forward", "reverse"]
) -> float:
    """Derivative in the logarithm of the step size."""
    learned = LearnedStepSize(maximum=1e9).attach(inner_optimizer(torch.optim.SGD, lr=step_size))
    result = meta_gradient(
        task, task.initial_parameters(), learned, [None] * steps, None, objective=objective, estimator=estimator
    )
    return result.gradients["learning_rate"].item()


def _against_central_differences() -> Iterator[Claim]:
    """A network, Adam from a live state, rate and beta1: no closed form, so differences of the unrolled training."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 16, 4, generator=generator, dtype=torch.float64)
    batches = [(x, x.sin().sum(1, keepdim=True)) for x in inputs]
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    torch.set_rng_state(torch_state)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def loss(parameters: Any, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(functional_call(model, dict(parameters), (batch[0],)), batch[1])

    for batch in batches[:3]:
        optimizer.zero_grad()
        loss(dict(model.named_parameters()), batch).backward()
        optimizer.step()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    state = read_state(optimizer, model.named_parameters())
    learned = LearnedHyperparameters(("learning_rate", "beta1")).attach(mirror(optimizer, model.named_parameters()))

    def at(**moved: float) -> Any:
        learned.set_({name: torch.tensor([moved.get(name, 0.0)]).double() for name in ("learning_rate", "beta1")})
        return lambda estimator: meta_gradient(
            loss, parameters, learned, batches[:5], batches[5], objective="naive", estimator=estimator, state=state
        )

    forward, reverse = at()("forward").gradients, at()("reverse").gradients
    apart = max(float((forward[name] / reverse[name] - 1).abs().max()) for name in forward)
    yield Claim("a network under Adam, five steps: forward against reverse, relative", apart, 0.0, 1e-9)
    small = 1e-5
    for name in ("learning_rate", "beta1"):
        difference = (at(**{name: small})("reverse").value - at(**{name: -small})("reverse").value) / (2 * small)
        # The differences' own error is of order small**2 and rounding / small, about 1e-9 here.
        error = abs(float(reverse[name]) / difference - 1)
        yield Claim(f"the same, derivative in {name}, against central differences", error, 0.0, 1e-6)


def _mirrors() -> Iterator[Claim]:
    cases: tuple[tuple[type[torch.optim.Optimizer], dict[str, Any]], ...] = (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    )
    for cls, settings in cases:
        start = torch.linspace(-1, 1, 7, dtype=torch.float64)
        live = start.clone().requires_grad_()
        optimizer = cls([live], **settings)
        mirrored = {"w": start}
        transformation = inner_optimizer(cls, **settings).transformation()
        state = transformation.init(mirrored)
        for step in range(20):
            gradient = (live.detach() * 3 + step).sin()
            live.grad = gradient.clone()
            optimizer.step()
            updates, state = transformation.update({"w": (mirrored["w"] * 3 + step).sin()}, state, params=mirrored)
            mirrored = {"w": mirrored["w"] + updates["w"]}
        error = float((mirrored["w"] - live.detach()).abs().max())
        yield Claim(f"mirror of {cls.__name__} against torch.optim, 20 steps, float64", error, 0.0, 1e-12)
