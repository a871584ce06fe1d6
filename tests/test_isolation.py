"""The five protections, alone and in a run: each restores what it says, and each is needed."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MemoryLogger, Plain, Rich, TiedAndFrozen, Witness, difference, examples, loaders, observer, outcome
from torch import nn
from torchmetrics import MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_l2l.exact.inner_step import InnerStep
from lightning_l2l.host import isolation, look_ahead
from lightning_l2l.host.isolation import (
    hidden_attribute,
    isolated_random_state,
    muted_logging,
    preserved_attributes,
    twice_differentiable_kernels,
)


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_random_state_is_seeded_inside_and_back_afterwards() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = [draws(), draws()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = draws()
    with isolated_random_state(7):
        inside = draws()
    with isolated_random_state(7):
        again = draws()
    assert [first, draws()] == expected
    assert inside == again and inside[0] == torch.rand((), generator=torch.Generator().manual_seed(7)).item()


def test_random_state_is_back_after_an_exception() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with pytest.raises(KeyError), isolated_random_state(0):
        draws()
        raise KeyError
    assert difference(before, (torch.get_rng_state(), random.getstate(), np.random.get_state())) == ""


def test_hidden_attribute_gives_back_the_class_s_own_or_the_instance_s() -> None:
    module = Plain()
    with hidden_attribute(module, "log", "ours"):
        assert module.log == "ours"
    assert "log" not in vars(module) and callable(module.log)
    object.__setattr__(module, "log", "theirs")
    with pytest.raises(KeyError), hidden_attribute(module, "log", "ours"):
        raise KeyError
    assert vars(module)["log"] == "theirs"


class Keeper(nn.Module):
    """Attributes of every kind that a step may change."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.items, self.queue = 0, [1], deque([1], maxlen=2)
        self.table: dict[str, list[int]] = {"a": [1]}
        self.named, self.default, self.counted, self.seen = OrderedDict(a=1), defaultdict(list), Counter("a"), {1}
        self.total, self.last = torch.zeros(2), None
        self.child = nn.Dropout()

    def disturb(self) -> None:
        self.count += 1
        self.items.append(2)
        self.queue.extend([2, 3])
        self.table["a"].append(2)
        self.table["b"] = []
        self.named["b"] = 2
        self.default["x"].append(1)
        self.counted.update("ab")
        self.seen.add(2)
        self.total.add_(1)
        self.last = torch.ones(1, requires_grad=True) * 2
        self.fresh = 1
        self.child.eval()


def test_attributes_are_the_same_objects_with_the_same_content() -> None:
    keeper = Keeper()
    before, content = dict(vars(keeper)), copy.deepcopy({k: v for k, v in vars(keeper).items() if k != "_modules"})
    with pytest.raises(KeyError), preserved_attributes(keeper):
        keeper.disturb()
        assert keeper.count == 1 and keeper.items == [1, 2] and keeper.queue.maxlen == 2 and keeper.fresh == 1
        raise KeyError
    assert vars(keeper).keys() == before.keys()
    assert all(vars(keeper)[name] is value for name, value in before.items())
    assert difference(content, {name: vars(keeper)[name] for name in content}) == ""
    assert keeper.child.training


def test_states_of_metrics_are_the_same_objects_with_the_same_content() -> None:
    torch.manual_seed(0)
    module = Rich()
    module.listing = MulticlassAUROC(3)  # its states are lists that grow
    module.extremes = MinMaxMetric(MulticlassAccuracy(3))
    logits, targets = torch.randn(6, 3), torch.randint(3, (6,))
    metrics = [module.accuracy, module.metrics, module.listing, module.extremes]

    def use() -> list[Any]:
        return [metric(logits, targets) for metric in metrics]

    for used_before in (False, True):  # the collection merges its metrics in the first call
        expected = copy.deepcopy(module)
        kept = {name: value for name, value in vars(module.accuracy).items()}
        with preserved_attributes(module):
            logits = torch.randn(6, 3)
            use()
        assert all(vars(module.accuracy)[name] is value for name, value in kept.items())
        own, others = [[m.compute() if used_before else m for m in (x.accuracy, x.metrics)] for x in (module, expected)]
        assert difference(own if used_before else [], others if used_before else []) == ""
        found = use()
        oracles = [expected.accuracy, expected.metrics, expected.listing, expected.extremes]
        assert difference([metric(logits, targets) for metric in oracles], found) == ""
    assert difference([metric.compute() for metric in oracles], [metric.compute() for metric in metrics]) == ""


def test_logging_is_muted_and_back(trainer: Any) -> None:
    logger = MemoryLogger()
    fitted = trainer(logger=logger)
    module, child = Plain(), Plain()
    module.child = child
    with muted_logging(fitted, module):
        module.log("loss", 1.0), child.log_dict({"loss": 1.0}, prog_bar=True)
        fitted.logger.log_metrics({"direct": 1.0})
        fitted.logger.experiment.add_scalar("x", 1.0)
    assert logger.rows == [] and fitted.loggers == [logger]
    assert "log" not in vars(module) and "log_dict" not in vars(child)


def test_without_a_logger_there_is_none_inside_either(trainer: Any) -> None:
    fitted = trainer()
    with muted_logging(fitted, Plain()):
        assert fitted.logger is None


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_children_run_eagerly_inside(how: str) -> None:
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(graph)
        return graph.forward

    class Doubling(nn.Module):
        def forward(self, inputs: Any) -> Any:
            return inputs * 2

    inner = Doubling()
    if how == "wrapped":
        module = nn.Sequential(torch.compile(inner, backend=backend))
    else:
        inner.compile(backend=backend)
        module = nn.Sequential(inner)
    with twice_differentiable_kernels(module):
        module(torch.ones(1, 2))
    assert calls == []
    module(torch.ones(1, 2))
    assert len(calls) == 1  # the oracle: outside it is compiled
    torch.compiler.reset()


# -- each is needed: without it a run is noticed ---------------------------------------------------------------------


def fitted_outcome(trainer: Any, make: Any, *callbacks: Any) -> dict[str, Any]:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    witness = Witness()
    fitted = trainer(witness, *callbacks, logger=MemoryLogger(), accumulate_grad_batches=2)
    module = make()
    fitted.fit(module, **loaders())
    return {**outcome(fitted, module), "gradients": witness.gradients}


def by_backward(
    step: Any, value: Any, iterate: Any, *, create_graph: bool, gradients: Any = InnerStep.gradients
) -> Any:
    value.backward(create_graph=create_graph, retain_graph=True)
    return gradients(step, value, iterate, create_graph=create_graph)


REMOVALS = {
    "random state": (isolation, "isolated_random_state", Rich),
    "attributes": (isolation, "preserved_attributes", Rich),
    "logging": (isolation, "muted_logging", Rich),
    "buffers": (look_ahead, "owned_tensors", Rich),
    "autograd.grad": (InnerStep, "gradients", TiedAndFrozen),
}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.filterwarnings("ignore:You called `self.log")
@pytest.mark.parametrize("protection", REMOVALS)
def test_every_protection_is_needed(trainer: Any, monkeypatch: pytest.MonkeyPatch, protection: str) -> None:
    from contextlib import nullcontext

    owner, name, make = REMOVALS[protection]
    expected = fitted_outcome(trainer, make)
    assert difference(expected, fitted_outcome(trainer, make, observer(every_n_steps=1, estimator="reverse"))) == ""
    original = getattr(owner, name)
    replacement: Any = {
        "buffers": lambda *arguments: (original(*arguments)[0], {}),
        "autograd.grad": by_backward,
    }.get(protection, lambda *_: nullcontext())
    monkeypatch.setattr(owner, name, replacement)
    found = fitted_outcome(trainer, make, observer(every_n_steps=1, estimator="reverse"))
    assert difference(expected, found) != ""


def test_batches_that_the_step_changes_in_place_are_seen_unchanged_every_time(trainer: Any) -> None:
    class ScalesInPlace(Plain):
        def loss(self, batch: Any) -> Any:
            batch[0].mul_(0.5)
            return super().loss(batch)

    class ScalesACopy(Plain):
        def loss(self, batch: Any) -> Any:
            return super().loss((batch[0] * 0.5, batch[1]))

    assert len(examples()) == 48
    histories = []
    for make in (ScalesInPlace, ScalesACopy):
        callback = observer()
        torch.manual_seed(0)
        fresh = torch.utils.data.DataLoader(examples(), 8, shuffle=True)
        trainer(callback).fit(make(), fresh, loaders()["val_dataloaders"])
        histories.append([(record["meta_objective"], record["meta_gradient"]) for record in callback.history])
    assert histories[0] == histories[1] and len(histories[0]) == 4
