"""Formulas of the core broken on purpose, one at a time: the oracle that is named beside each has to notice.

A mutation replaces a few characters in a function's source, compiles it and puts the code into the function that
everybody already holds. It fails as well if the formula is written differently one day: then say the new one here.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.exact import clip, objectives
from lightning_l2l.exact.estimators.adjoint import Adjoint
from lightning_l2l.exact.estimators.forward import hessian_vector_product, pushed
from lightning_l2l.exact.inner_step import InnerStep
from lightning_l2l.exact.meta_optimizer import MetaOptimizer
from lightning_l2l.exact.scaled import ScaledVector
from lightning_l2l.exact.tally import Tally
from lightning_l2l.functional import adam, dual_functions, inner_optimizer, rule, sgd
from lightning_l2l.functional.dual import Dual
from lightning_l2l.learned.parametrisation import UnitInterval

pytestmark = pytest.mark.slow

STEPS = 4
OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(inner_optimizer, torch.optim.SGD, lr=0.1),
    "momentum": partial(inner_optimizer, torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(inner_optimizer, torch.optim.Adam, lr=0.02),
}
BATCHES = [torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(STEPS + 1)]


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    weight, unused = torch.randn(5, 3, generator=generator).double(), torch.ones(2, dtype=torch.float64)
    return {"weight": weight, "unused": unused}


def loss(parameters: dict[str, Tensor], batch: Tensor) -> Tensor:
    """Not quadratic; with a parameter whose gradient is exactly zero, like that of a dead unit."""
    scores = (batch @ parameters["weight"]).tanh()
    return (scores - 0.3).square().mean() + 0.1 * scores.exp().mean() + 0.0 * parameters["unused"].square().sum()


def learn(optimizer: str) -> LearnedStepSize:
    return LearnedStepSize().attach(OPTIMIZERS[optimizer]())


def agrees_with_central_differences(optimizer: str, estimator: Any, objective: Any, clipped: bool = False) -> None:
    learned = learn(optimizer)
    transformation = clip.clip_gradient_norm(0.2) if clipped else None

    def found() -> Any:
        return meta_gradient(
            loss, start(), learned, BATCHES[:STEPS], BATCHES[STEPS],
            objective=objective, estimator=estimator, gradient_transformation=transformation,
        )  # fmt: skip

    result, ends = found(), []
    for offset in (1e-5, -1e-5):
        learned.set_({"learning_rate": torch.full((1,), offset)})
        ends.append(found().value)
    expected = (ends[0] - ends[1]) / 2e-5
    # Truncation 1e-10 and rounding 1e-11, of derivatives of 0.01 and more.
    assert abs(expected) > 1e-3 and result.gradients["learning_rate"].item() == pytest.approx(expected, rel=1e-6)


def agrees_with_torch_optim(cls: type[torch.optim.Optimizer], **options: Any) -> None:
    learned = LearnedStepSize().attach(inner_optimizer(cls, **options))
    step = InnerStep(loss, learned)
    iterate = step.start(start(), None, {})
    live = {name: nn.Parameter(tensor) for name, tensor in start().items()}
    optimizer = cls(live.values(), **options)
    for batch in BATCHES[:STEPS]:
        optimizer.zero_grad()
        loss(live, batch).backward()
        optimizer.step()
        gradients = step.gradients(step.evaluate(iterate, batch), iterate, create_graph=False)
        iterate = step.update(iterate, gradients).fresh()
    for name, tensor in live.items():  # float64: a few roundings
        torch.testing.assert_close(iterate.parameters[name].detach(), tensor.detach(), rtol=1e-12, atol=1e-14)


def is_the_objective_of_the_paper(objective: Any) -> None:
    live = {name: nn.Parameter(tensor) for name, tensor in start().items()}
    optimizer = torch.optim.SGD(live.values(), lr=0.1)
    losses = []
    for batch in BATCHES[:STEPS]:
        optimizer.zero_grad()
        loss(live, batch).backward()
        optimizer.step()
        losses.append(loss(live, BATCHES[STEPS]).item())
    logarithms = [math.log(value) / step for step, value in enumerate(losses, start=1)]
    expected = {
        "log": logarithms[-1],
        "log_mean": sum(logarithms) / STEPS,
        "naive_mean": sum(losses) / STEPS,
    }[objective]
    result = meta_gradient(loss, start(), learn("SGD"), BATCHES[:STEPS], BATCHES[STEPS], objective=objective)
    assert result.value == pytest.approx(expected, rel=1e-12)


class Parabola:
    """``w**2 / 2``: after K steps at rate r, ``(1 - r)**(2 K) / 2``."""

    homogeneity = 2.0

    def __call__(self, parameters: dict[str, Tensor], batch: None) -> Tensor:
        return 0.5 * parameters["w"].square().sum()


def is_exact_far_outside_the_number_range(estimator: Any, objective: Any = "log") -> None:
    rate, steps = 2.5, 400  # the loss ends at 1.5**800, 1e140; float32 ends at 1e38
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=rate))
    result = meta_gradient(
        Parabola(), {"w": torch.ones(1)}, learned, [None] * steps, None, objective=objective, estimator=estimator
    )
    halves = 1 if objective == "log" else sum(1 / step for step in range(1, steps + 1))
    # d/d log r of log(1 - r)**2; 400 roundings of float32, which are of either sign.
    assert result.value == pytest.approx(2 * math.log(rate - 1) - halves * math.log(2) / steps, rel=1e-5)
    assert result.gradients["learning_rate"].item() == pytest.approx(2 * rate / (rate - 1), rel=1e-4)


def first_meta_step_is_the_whole_step() -> None:
    learned = learn("SGD")
    MetaOptimizer(learned.parameters(), 0.4).apply(learned, {"learning_rate": torch.full((1,), 1e-5).double()})
    assert learned.learning_rate.tolist() == pytest.approx([-0.4])


def learned_momentum_starts_at_the_users_and_stays_below_one() -> None:
    momentum = UnitInterval("momentum", 0.0, 1 - 1e-4)
    base, offsets = torch.tensor(0.9, dtype=torch.float64), torch.tensor([0.0, -3.0], dtype=torch.float64)
    first, later = momentum.value(base, offsets).tolist()
    assert first == base.item() and later == pytest.approx(1 - 0.1 * math.exp(-3.0), rel=1e-12)


differences = agrees_with_central_differences
ORACLES: dict[str, Callable[[], None]] = {
    "differences: SGD, forward": partial(differences, "SGD", "forward", "naive"),
    "differences: SGD, reverse": partial(differences, "SGD", "reverse", "naive"),
    "differences: SGD, reverse, mean over the steps": partial(differences, "SGD", "reverse", "naive_mean"),
    "differences: SGD, logarithm": partial(differences, "SGD", "forward", "log"),
    "differences: SGD, clipped": partial(differences, "SGD", "forward", "naive", clipped=True),
    "differences: momentum, forward": partial(differences, "momentum", "forward", "naive"),
    "differences: Adam, forward": partial(differences, "Adam", "forward", "naive"),
    "differences: Adam, reverse": partial(differences, "Adam", "reverse", "naive"),
    "torch.optim: SGD": partial(agrees_with_torch_optim, torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "torch.optim: Adam": partial(agrees_with_torch_optim, torch.optim.Adam, lr=0.02),
    "torch.optim: AdamW": partial(agrees_with_torch_optim, torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "definition: log": partial(is_the_objective_of_the_paper, "log"),
    "definition: log_mean": partial(is_the_objective_of_the_paper, "log_mean"),
    "definition: naive_mean": partial(is_the_objective_of_the_paper, "naive_mean"),
    "number range: forward": partial(is_exact_far_outside_the_number_range, "forward"),
    "number range: reverse": partial(is_exact_far_outside_the_number_range, "reverse"),
    "number range: reverse, mean over the steps": partial(is_exact_far_outside_the_number_range, "reverse", "log_mean"),
    "first meta-step": first_meta_step_is_the_whole_step,
    "momentum in its interval": learned_momentum_starts_at_the_users_and_stays_below_one,
}


class Mutation(NamedTuple):
    function: Any
    right: str
    wrong: str
    oracle: str


MUTATIONS = {
    "sign of the Hessian-vector product": Mutation(
        hessian_vector_product, "[vector for _", "[-vector for _", "differences: SGD, forward"
    ),
    "unit of the meta-parameter next to a scaled tangent": Mutation(
        pushed, "torch.exp2(-exponent)", "torch.exp2(exponent)", "number range: forward"
    ),
    "product rule of dual numbers": Mutation(
        Dual.__mul__, "first.addcmul_(self.value, right.to(first.dtype))", "first", "differences: SGD, forward"
    ),
    "derivative of an interpolation": Mutation(
        dual_functions._lerp, "torch.lerp(da, db, weight)", "torch.lerp(db, da, weight)", "differences: Adam, forward"
    ),
    "derivative of a square": Mutation(dual_functions._addcmul, "2 * value", "value", "differences: Adam, forward"),
    "derivative of the square root": Mutation(Dual.square_root, "0.5 /", "1.0 /", "differences: Adam, forward"),
    "guard of the square root's derivative at zero": Mutation(
        rule.square_root, "(tensor + zero).sqrt() * (1 - zero)", "tensor.sqrt()", "differences: Adam, reverse"
    ),
    "momentum's first step": Mutation(
        sgd._update, "buffer = gradient\n", "buffer = times(gradient, 0.5)\n", "torch.optim: SGD"
    ),
    "Adam's first bias correction": Mutation(adam._update, "beta1**step", "beta1**(step + 1)", "torch.optim: Adam"),
    "Adam's second bias correction": Mutation(adam._update, "** 0.5", "** 1.0", "torch.optim: Adam"),
    "decoupled weight decay times the rate": Mutation(
        rule.decoupled_decay, 'hyperparameters["lr"] * weight_decay', "weight_decay", "torch.optim: AdamW"
    ),
    "derivative of a sum": Mutation(
        dual_functions._add, "torch.add(da, db, alpha=alpha)", "da", "differences: momentum, forward"
    ),
    "steps that a mean is over": Mutation(
        objectives.objective_weights,
        "1.0 / steps for step in range(1, steps + 1)",
        "1.0 / steps for step in range(1, steps)",
        "definition: naive_mean",
    ),
    "division of the logarithm by K": Mutation(
        objectives.objective_weights, "{steps: 1.0 / steps}", "{steps: 1.0}", "definition: log"
    ),
    "division of each logarithm by its own step": Mutation(
        objectives.objective_weights, "1.0 / (steps * step)", "1.0 / steps", "definition: log_mean"
    ),
    "slope of the logarithm": Mutation(Tally.add, "weight / loss", "weight * loss", "differences: SGD, logarithm"),
    "degree of homogeneity": Mutation(Tally.add, "self.homogeneity * log_scale", "log_scale", "number range: forward"),
    "exponent of a scaled vector": Mutation(ScaledVector.of, "start + shift", "start - shift", "number range: forward"),
    "mantissas at another exponent": Mutation(
        ScaledVector.at_exponent, "self.exponent - exponent", "exponent - self.exponent", "number range: reverse"
    ),
    "sum of scaled vectors": Mutation(
        ScaledVector.plus,
        "self.at_exponent(exponent)",
        "self.tensors",
        "number range: reverse, mean over the steps",
    ),
    "derivative by a meta-parameter that every step uses": Mutation(
        Adjoint._pull, "self._totals[index] + gradient", "gradient", "differences: SGD, reverse"
    ),
    "losses of several steps": Mutation(
        Adjoint.carry_back,
        "self._vector.plus(record.injection)",
        "self._vector",
        "differences: SGD, reverse, mean over the steps",
    ),
    "rescaling of the adjoint": Mutation(
        Adjoint._pull, "exponent - record", "exponent + record", "number range: reverse"
    ),
    "exponent of the adjoint": Mutation(Adjoint._pull, "torch.exp2(exponent)", "1.0", "number range: reverse"),
    "derivative of the clipped norm": Mutation(
        clip._norm, "vector_norm(safe, order)", "vector_norm(safe.detach(), order)", "differences: SGD, clipped"
    ),
    "start of the meta-optimizer's average": Mutation(
        MetaOptimizer.step, "/ (1 - _MEMORY**updates)", "", "first meta-step"
    ),
    "learned momentum at offset zero": Mutation(
        UnitInterval.value, "torch.expm1(offset)", "torch.exp(offset)", "momentum in its interval"
    ),
}


def mutated(mutation: Mutation) -> tuple[Any, CodeType]:
    """The plain function behind decorators, and its code with the mistake in it."""
    function = inspect.unwrap(getattr(mutation.function, "__func__", mutation.function))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.right) == 1, f"{mutation.right!r} is not there once: name the formula anew"
    tree = ast.parse(source.replace(mutation.right, mutation.wrong))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    names: dict[str, Any] = {}
    exec(compile(tree, "<mutation>", "exec", __future__.annotations.compiler_flag), function.__globals__, names)
    return function, names[definition.name].__code__


@pytest.mark.parametrize("name", ORACLES)
def test_the_oracle_accepts_the_core_as_it_is(name: str) -> None:
    ORACLES[name]()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_notices_the_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, code = mutated(MUTATIONS[name])
    monkeypatch.setattr(function, "__code__", code)
    with pytest.raises(AssertionError):
        ORACLES[MUTATIONS[name].oracle]()


def test_every_oracle_notices_something() -> None:
    assert {mutation.oracle for mutation in MUTATIONS.values()} == set(ORACLES)
