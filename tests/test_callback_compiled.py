"""Compiled modules: the run stays compiled, and a look-ahead, which compiled code cannot differentiate, is eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Plain, difference, learner, loaders, observer, outcome
from torch import nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # by Dynamo itself
    "ignore:.*TensorFloat32.*",
)

BACKEND: dict[str, Any] = {"backend": "aot_eager"}  # needs no compiler


class Doubling(nn.Module):
    def forward(self, inputs: Any) -> Any:
        return inputs.tanh()


class WithChild(Plain):
    """With a layer that is compiled, or not."""

    def __init__(self, compiled: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        self.compiled = compiled
        super().__init__()

    def make_net(self) -> Any:
        return nn.Sequential(nn.Linear(6, 4), self.compiled(Doubling()), nn.Linear(4, 3))

    def forward(self, inputs: Any) -> Any:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # No self.log: Dynamo cannot trace it, with or without us (Lightning 2.6.6, torch 2.13).
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def in_place(module: Any) -> Any:
    module.compile(**BACKEND)
    return module


def wrapped(module: Any) -> Any:
    return torch.compile(module, **BACKEND)


MODULES: dict[str, Callable[[], Any]] = {
    "child": lambda: WithChild(wrapped),
    "child, in place": lambda: WithChild(in_place),
    "whole": lambda: wrapped(WithChild()),
    "whole, in place": lambda: in_place(WithChild()),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    torch.compiler.reset()


def fit(trainer: Any, module: Any, *callbacks: Any) -> dict[str, Any]:
    torch.manual_seed(0), np.random.seed(0)
    fitted = trainer(*callbacks)
    fitted.fit(module, **loaders())
    return outcome(fitted, fitted.lightning_module)


@pytest.mark.feature(
    "`torch.compile` of the module or of a child", "works", "the run stays compiled; look-aheads are eager"
)
@pytest.mark.parametrize("how", MODULES)
def test_compiled_modules_are_looked_ahead_of_eagerly(trainer: Any, how: str) -> None:
    found = []
    for make in (MODULES[how], WithChild):
        callback = learner(objective="log_mean", estimator="auto" if make is not WithChild else "forward")
        fit(trainer, make(), callback)
        assert {record["diagnostics"]["estimator"] for record in callback.history} == {"forward"}
        found.append([record["learning_rates"][0] for record in callback.history])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(set(found[0])) == 4


@pytest.mark.parametrize("how", MODULES)
def test_learning_rates_of_compiled_modules_are_those_of_eager_ones(trainer: Any, how: str) -> None:
    found = []
    for make in (MODULES[how], WithChild):
        callback = learner(unroll_steps=None)
        fit(trainer, make(), callback)
        assert {record["diagnostics"]["estimator"] for record in callback.history} == {"displacement"}
        found.append([record["meta_gradient"]["learning_rate"][0] for record in callback.history])
    # Float32: what is traced may be taken apart into other operations.
    assert found[0] == pytest.approx(found[1], rel=1e-3) and len(set(found[0])) == 4


@pytest.mark.parametrize("how", MODULES)
@pytest.mark.parametrize("estimator", ["displacement", "forward"])
def test_runs_of_compiled_modules_are_unchanged_by_watching(trainer: Any, how: str, estimator: Any) -> None:
    callback = observer(estimator=estimator)
    expected, found = fit(trainer, MODULES[how]()), fit(trainer, MODULES[how](), callback)
    for run in (expected, found):  # an address is among them
        run["attributes"] = {name: value for name, value in run["attributes"].items() if "_torchdynamo" not in name}
    assert difference(expected, found) == "" and len(callback.history) == 4


@pytest.mark.parametrize("how", MODULES)
def test_the_run_of_a_compiled_module_is_compiled(trainer: Any, how: str) -> None:
    torch._dynamo.utils.counters.clear()
    fit(trainer, MODULES[how](), learner())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
