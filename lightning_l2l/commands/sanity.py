"""Check every claim of the package and of the paper in seconds; the exit status is 0 only if all hold.

Needs no extras, no data and no network. The oracles are independent of what they check: exact rational arithmetic,
closed forms against the general engine, torch.optim, the paper's theorems, and measured numbers of the paper's
experiments in a smaller dimension.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.functional import inner_optimizer, mirror, read_state
from lightning_l2l.tasks import LeastSquares, Quadratic


@dataclass(frozen=True)
class Claim:
    """What is claimed, the number found, and the range that it must lie in; a NaN fails.

    Example:
        >>> Claim("a ratio", 1.16, 1.10, 1.22).holds, Claim("a count", 3.0, 2.0, 2.0).holds
        (True, False)
    """

    text: str
    found: float
    lowest: float
    highest: float

    @property
    def holds(self) -> bool:
        """Whether the number is in the range."""
        return self.lowest <= self.found <= self.highest

    @property
    def expectation(self) -> str:
        """The range in words."""
        if self.lowest == self.highest:
            return f"{self.lowest:.7g}"
        return f"{self.lowest:g} to {self.highest:g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(options: argparse.Namespace | None = None) -> int:
    """Print a line for each claim; 0 if all hold, otherwise 1."""
    return report(
        claim for claims in (quadratic, back_propagation, engine, mirrors, least_squares) for claim in claims()
    )


def report(claims: Iterator[Claim]) -> int:
    """Print claims as they are found; 0 if all hold, otherwise 1.

    Example:
        >>> report(iter([Claim("one and one", 2.0, 3.0, 3.0)]))  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
               claim               found   expected
        FAILED one and one             2   3
        0 claims hold, 1 fail, 0.0 seconds
        1
    """
    began, held, failed = time.perf_counter(), 0, 0
    print(f"{'':7}{'claim':78}{'found':>12}   expected")
    for claim in claims:
        held, failed = held + claim.holds, failed + (not claim.holds)
        print(
            f"{'ok' if claim.holds else 'FAILED':7}{claim.text:78}{claim.found:>12.6g}   {claim.expectation}",
            flush=True,
        )
    print(f"{held} claims hold, {failed} fail, {time.perf_counter() - began:.1f} seconds")
    return int(failed > 0)


def quadratic() -> Iterator[Claim]:
    """Section 3 of the paper: the closed form, and what the logarithm does to the meta-objective."""
    eigenvalues = (Fraction(1), Fraction(1, 2), Fraction(1, 16))
    start = (Fraction(1, 2), Fraction(-1, 4), Fraction(3, 4))
    values, point = (torch.tensor([float(x) for x in row], dtype=torch.float64) for row in (eigenvalues, start))
    small = Quadratic(torch.diag(values), point)
    worst = 0.0
    for steps in (1, 10, 200):
        for eta in (Fraction(1, 2**20), Fraction(3, 4), Fraction(15, 8), Fraction(33, 16), Fraction(20)):
            terms = [(c * c * lam, lam, 1 - eta * lam) for lam, c in zip(eigenvalues, start, strict=True)]
            slope = sum((weight * lam * b ** (2 * steps - 1) for weight, lam, b in terms), Fraction(0))
            loss = sum((weight * b ** (2 * steps) for weight, lam, b in terms), Fraction(0))
            worst = max(worst, abs(float(small.meta_gradient(float(eta), steps)) / float(-2 * slope / loss) - 1))
    yield Claim("log meta-gradient against exact fractions, 15 cells: relative error", worst, 0.0, 1e-12)

    task, condition = _wide(), _condition_two()
    limit, largest, smallest = (
        float(value) for value in (task.stability_limit, task.largest_curvature, task.smallest_curvature)
    )
    sizes = torch.logspace(-6, math.log10(10 * limit), 2001, dtype=torch.float64)
    gradients = task.meta_gradient(sizes, 1000)
    steepest = float(gradients.abs().max()) * (largest - smallest) / (2 * largest * (largest + smallest))
    yield Claim("log meta-gradient, steepest of 2001 step sizes, over 2L(L+a)/(L-a)", steepest, 0.0, 1.05)
    yield Claim("log meta-gradient: sign changes (one minimum)", int((gradients.sign().diff() != 0).sum()), 1, 1)
    for words, one, step_size, low, high in (
        ("at twice the stability limit", task, 2 * limit, 900, 1000),
        ("at a good step size, condition number 2", condition, 1.0, -620, -580),
    ):
        decades = float(one.signed_log_meta_gradient(step_size, 1000, "naive").log_magnitude) / math.log(10)
        yield Claim(f"naive meta-gradient {words}, 1000 steps: decades", decades, low, high)
    ratio = float(task.optimal_step_size(1000) / task.limiting_step_size)
    yield Claim("optimal step size for 1000 steps over 2/(L+a)", ratio, 0.9965, 1.0)
    at_optimum = float(task.meta_gradient(task.optimal_step_size(80), 80).abs()) / largest
    yield Claim("size of the log meta-gradient at the optimal step size, over L", at_optimum, 0.0, 1e-6)


def back_propagation() -> Iterator[Claim]:
    """Corollary 1: computed by plain back-propagation, the bounded gradient of the log objective is lost."""
    task, condition = _wide(), _condition_two()
    step_size = 2 * float(task.stability_limit)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        largest = math.log(torch.finfo(dtype).max / 2)
        too_large = (t for t in range(1, 1000) if t * float(task.meta_objective(step_size, t)) > largest)
        dead = (t for t in range(1, 1000) if _back_propagated(task, step_size, t, dtype) == 0)
        predicted = next(too_large, math.nan)
        text = f"plain back-propagation in {name} is 0 at twice the stability limit, from step"
        yield Claim(text, next(dead, math.nan), predicted - 2, predicted + 2)
    best = float(condition.optimal_step_size(60))
    dead = (t for t in range(1, 400) if math.isnan(_back_propagated(condition, best, t, torch.float32)))
    yield Claim("and NaN at the optimum, condition number 2, by underflow, from step", next(dead, math.nan), 35, 45)

    def descend(one: Quadratic, gradient: Callable[[float], float], meta_steps: int) -> list[float]:
        """The paper's schedule for the step size, from 0.1; a gradient that is not finite is skipped."""
        path = [0.1]
        for k in range(1, meta_steps + 1):
            slope = gradient(path[-1])
            path.append(max(0.0, path[-1] - 0.01 / math.sqrt(k) * (slope if math.isfinite(slope) else 0.0)))
        return path

    frozen = descend(task, lambda eta: _back_propagated(task, eta, 80, torch.float32), 20)
    yield Claim("paper's schedule on float32 back-propagation from 0.1, after 20 meta-steps", frozen[-1], 0.1, 0.1)
    arrived = 0
    for seed in range(4):
        one = Quadratic.random(20, seed=seed)
        path = descend(one, lambda eta, one=one: float(one.meta_gradient(eta, 80)), 400)  # type: ignore[misc]
        arrived += abs(sum(path[-100:]) / 100 / float(one.optimal_step_size(80)) - 1) < 0.1
    yield Claim("the same on the exact gradient: of 4 random quadratics, within 10 % of the optimum", arrived, 3, 4)


def engine() -> Iterator[Claim]:
    """The general engine against the closed form, and on a network under Adam against central differences."""
    task = _wide()
    limit = float(task.stability_limit)
    for estimator in _ESTIMATORS:
        worst = 0.0
        for steps, step_size in ((5, 0.1 * limit), (80, 0.9 * limit), (80, 5 * limit), (400, 5 * limit)):
            learned = LearnedStepSize(maximum=1e9).attach(inner_optimizer(torch.optim.SGD, lr=step_size))
            unroll = Unroll(mode=estimator)
            found = meta_gradient(task, task.initial_parameters(), learned, [None] * steps, None, estimator=unroll)
            exact = float(task.meta_gradient(step_size, steps)) * step_size  # the meta-parameter is the logarithm
            worst = max(worst, abs(found.gradients["learning_rate"].item() / exact - 1))
        text = f"exact unroll, {estimator}, against the closed form (also where plain backprop dies)"
        yield Claim(text, worst, 0.0, 1e-9)
    yield from _network()


def _network() -> Iterator[Claim]:
    inputs = torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [(x, x.sin().sum(1, keepdim=True)) for x in inputs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def loss(parameters: Any, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(functional_call(model, dict(parameters), (batch[0],)), batch[1])

    for batch in batches[:3]:
        optimizer.zero_grad()
        loss(dict(model.named_parameters()), batch).backward()
        optimizer.step()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    state = read_state(optimizer, model.named_parameters())
    names = ("learning_rate", "beta1")
    learned = LearnedHyperparameters(names).attach(mirror(optimizer, model.named_parameters()))

    def unrolled(estimator: Literal["forward", "reverse"], **moved: float) -> Any:
        learned.set_({name: torch.tensor([moved.get(name, 0.0)]).double() for name in names})
        unroll = Unroll(objective="naive", mode=estimator)
        return meta_gradient(loss, parameters, learned, batches[:5], batches[5], estimator=unroll, state=state)

    forward, reverse = (unrolled(estimator).gradients for estimator in _ESTIMATORS)
    apart = max(float((forward[name] / reverse[name] - 1).abs().max()) for name in names)
    yield Claim("a network under Adam, five steps: forward against reverse, relative error", apart, 0.0, 1e-9)
    for name in names:
        # The differences' own error is of order 1e-5 squared and rounding / 1e-5, about 1e-9 here.
        difference = (unrolled("reverse", **{name: 1e-5}).value - unrolled("reverse", **{name: -1e-5}).value) / 2e-5
        error = abs(float(reverse[name]) / difference - 1)
        yield Claim(f"the same, derivative in {name}, against central differences", error, 0.0, 1e-6)


def mirrors() -> Iterator[Claim]:
    """The optimizers as transformations against torch.optim."""
    cases: tuple[tuple[type[torch.optim.Optimizer], dict[str, Any]], ...] = (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    )
    for cls, settings in cases:
        start = torch.linspace(-1, 1, 7, dtype=torch.float64)
        live = start.clone().requires_grad_()
        optimizer, functional = cls([live], **settings), {"w": start}
        transformation = inner_optimizer(cls, **settings).transformation()
        state = transformation.init(functional)
        for step in range(20):
            live.grad = (live.detach() * 3 + step).sin()
            optimizer.step()
            gradients = {"w": (functional["w"] * 3 + step).sin()}
            updates, state = transformation.update(gradients, state, params=functional)
            functional = {"w": functional["w"] + updates["w"]}
        error = float((functional["w"] - live.detach()).abs().max())
        yield Claim(f"functional {cls.__name__} against torch.optim, 20 steps, float64", error, 0.0, 1e-12)


def least_squares() -> Iterator[Claim]:
    """Section 4 of the paper: when a step size needs held-out data.

    The paper's setting has dimension 1000; here it is 200 with the same ratios of samples to dimension, on which the
    numbers depend. Expected ranges are those of the full setting, in this package and in the paper's own code.
    """
    dimension, tasks = 200, 60
    half = LeastSquares.sample(tasks, dimension, dimension // 2, 1.0, seed=0)
    split = half.split(validation_fraction=0.5)
    grid = torch.logspace(-4, 0, 33, dtype=torch.float64)
    products = [steps * split.best_step_size(steps, grid=grid) for steps in (10, 20, 40, 80, 160)]
    apart = max(products) / min(products)
    yield Claim("train-by-validation step size times steps, 10 to 160: largest over smallest", apart, 1.0, 1.4)
    for share, low, high in ((0.1, 0.98, 1.05), (0.5, 1.10, 1.22), (1, 1.25, 1.45), (4, 1.0, 1.06)):
        samples = int(share * dimension)
        tuned = LeastSquares.sample(tasks, dimension, samples, 1.0, seed=2)
        by_train = tuned.best_step_size(40, grid=grid, meta_data="train")
        by_validation = tuned.split(validation_fraction=0.5).best_step_size(40, grid=grid)
        new = LeastSquares.sample(tasks, dimension, samples, 1.0, seed=1)
        step_sizes = torch.tensor([by_train, by_validation], dtype=torch.float64)
        errors = new.meta_gradient(step_sizes, 40, meta_data="train").population_error.mean(0).tolist()
        if share == 0.5:
            yield Claim("train-by-train step size, n = d/2, 40 steps", by_train, 0.2, 0.45)
            yield Claim("train-by-validation step size there", by_validation, 0.002, 0.008)
            yield Claim("population error of train-by-train there", errors[0], 1.35, 1.6)
            yield Claim("population error of train-by-validation there", errors[1], 0.75, 0.92)
        ratio = math.sqrt((errors[0] + 1) / (errors[1] + 1))  # the noise has variance 1
        yield Claim(f"test RMSE, tuned on training over tuned on held-out data, n = {share:g} d", ratio, low, high)
    diverged = half.meta_gradient(1.0, 40, "naive", meta_data="train")
    yield Claim("step size 1: tasks that are reported as truncated", int(diverged.truncated.sum()), tasks, tasks)
    yield Claim("and whose gradient is NaN, not a silent zero", int(diverged.gradient.isnan().sum()), tasks, tasks)
    yield Claim("their loss, (40^2 + 1 + 1)/2 in the mean", float(diverged.value.mean()), 700, 900)


_ESTIMATORS: tuple[Literal["forward", "reverse"], ...] = ("forward", "reverse")


def _wide() -> Quadratic:
    return Quadratic.random(20, seed=0, kind="wide")


def _condition_two() -> Quadratic:
    return Quadratic.random(20, seed=0, kind="condition", condition_number=2.0)


def _back_propagated(task: Quadratic, step_size: float, steps: int, dtype: torch.dtype) -> float:
    """The log meta-gradient by plain reverse-mode differentiation through the steps."""
    hessian, point = task.hessian.to(dtype), task.initial_point.to(dtype)
    eta = torch.tensor(step_size, dtype=dtype, requires_grad=True)
    for _ in range(steps):
        point = point - eta * (hessian @ point)
    loss = 0.5 * (point @ (hessian @ point))
    return float(torch.autograd.grad(loss.log() / steps, eta)[0])
