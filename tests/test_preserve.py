"""Calls of the user's step that the run does not notice: all that a step may touch is put back, errors or not."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FEATURES, MemoryLogger, Plain, Rich, difference, learner, loader, loaders, observer, sgd
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_l2l import Displacement
from lightning_l2l.host.isolation import hidden_attribute, muted_logging, unnoticed
from lightning_l2l.preserve import (
    PreservedTensors,
    preserved_generators,
    preserved_module,
    preserved_random_state,
)


class Helper:
    """An object of the user's own that a module holds."""

    def __init__(self) -> None:
        self.count, self.seen, self.weights = 0, [1], torch.zeros(2)


class Keeper(Plain):
    """Everything that a step may touch."""

    def __init__(self) -> None:
        super().__init__(sgd(0.05))
        self.teacher = nn.Linear(FEATURES, 3).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.count, self.name_, self.last = 0, "a", None
        self.items, self.recent, self.table = [1], deque([1], maxlen=2), {"a": [1]}
        self.named, self.default, self.counted = OrderedDict(a=1), defaultdict(list), Counter("a")
        self.seen, self.pair = {1}, (torch.zeros(1), [1])
        self.running, self.array = torch.zeros(2), np.zeros(2)
        self.tensors, self.arrays = [torch.zeros(2)], {"x": {"y": np.zeros(2)}}
        self.generators = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]
        self.legacy = np.random.RandomState(1)
        self.helper = Helper()
        self.child = nn.Dropout()
        self.tuned: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch) + 0.0 * self.teacher(batch[0]).sum()
        self.disturb(batch)
        self.log("train_loss", loss)
        return loss

    def disturb(self, batch: Any = None) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)
        self.queue[int(self.pointer)] = 1 + self.queue[int(self.pointer) - 1]
        self.pointer[0] = (self.pointer[0] + 1) % 4
        self.count += 1
        self.name_ += "a"
        self.items.append(2)
        self.recent.extend([2, 3])
        self.table["a"].append(2)
        self.table["b"] = []
        self.named["b"] = 2
        self.default["x"].append(1)
        self.counted.update("ab")
        self.seen.add(len(self.seen))
        self.pair[0].add_(1), self.pair[1].append(1)
        self.running.add_(1)
        self.array += 1
        self.tensors[0].add_(1)
        self.arrays["x"]["y"] += 1
        self.last = torch.ones(1, requires_grad=True) * 2
        self.tuned.append((torch.rand(1, generator=self.generators[0]).item(), self.generators[1].random()))
        self.tuned.append((self.generators[2].random(), self.legacy.rand(), torch.rand(1).item(), random.random()))
        self.helper.count += 1
        self.helper.seen.append(2)
        self.helper.weights.add_(1)
        self.helper.fresh = 1
        self.fresh = 1
        self.child.eval()
        next(self.teacher.parameters()).requires_grad_(True)
        np.random.rand()


def content(module: nn.Module) -> Any:
    """All that it holds, in plain containers."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, torch.Generator):
            return value.get_state()
        if isinstance(value, np.random.Generator):
            return plain(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return value.get_state()[1].copy()
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, Helper):
            return plain(vars(value))
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, deque)):
            return [plain(item) for item in value]
        return copy.copy(value) if isinstance(value, (set, np.ndarray, int, float, str, bool)) else None

    found = {
        f"{name}.{key}": plain(v) for name, m in module.named_modules() for key, v in vars(m).items() if key[0] != "_"
    }
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    grads = {name: plain(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {"attributes": found, "flags": flags, "state": state, "gradients": grads}


@pytest.mark.parametrize("fails", [False, True])
def test_everything_that_a_step_touches_is_put_back(trainer: Any, fails: bool) -> None:
    module, logger = Keeper(), MemoryLogger()
    fitted = trainer(logger=logger)
    fitted.strategy._lightning_module = module
    batch = next(iter(loader()))
    module.loss(batch).backward()
    before, objects = content(module), {key: value for key, value in vars(module).items()}
    flags = {key: value for key, value in vars(fitted).items()}
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    preserved = PreservedTensors([module], optimizer)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in range(3):  # the first call finds out what the step moves
        raised = pytest.raises(KeyError) if fails else torch.enable_grad()
        with raised, preserved(), unnoticed(fitted, module, 7):
            assert all(p.grad is None for p in module.parameters())
            module.training_step(batch, 0).backward()
            fitted.should_stop = True
            fitted.fresh = 1
            fitted.logger.log_metrics({"x": 1.0})
            assert module.count == 1 and module.items == [1, 2] and module.recent.maxlen == 2
            if fails:
                raise KeyError
        assert difference(before, content(module)) == ""
        assert (
            all(vars(module)[key] is value for key, value in objects.items()) and vars(module).keys() == objects.keys()
        )
        assert all(vars(fitted)[key] is value for key, value in flags.items()) and vars(fitted).keys() == flags.keys()
        assert difference(states, (torch.get_rng_state(), np.random.get_state()[1], random.getstate())) == ""
        assert module.child.training and logger.rows == []


def test_a_large_frozen_part_is_not_copied_unless_the_step_moves_it() -> None:
    backbone, head = nn.Linear(50, 50).requires_grad_(False), nn.Linear(5, 1)
    moved = nn.Linear(20, 20).requires_grad_(False)
    module = nn.ModuleList([backbone, moved, head])
    preserved = PreservedTensors([module], torch.optim.SGD(head.parameters(), 0.1))
    for number in range(3):
        before = copy.deepcopy(module.state_dict())
        with preserved(), torch.no_grad():
            moved.weight.data.add_(1)
            head.weight.add_(1)
        assert difference(before, module.state_dict()) == "", number


def test_states_of_metrics_are_the_same_objects_with_the_same_content() -> None:
    torch.manual_seed(0)
    module = Rich()
    module.listing = MulticlassAUROC(3)  # its states are lists that grow
    module.extremes = MinMaxMetric(MulticlassAccuracy(3))
    logits, targets = torch.randn(6, 3), torch.randint(3, (6,))
    for _ in range(2):  # the collection merges its metrics in the first call
        expected = copy.deepcopy(module)
        with preserved_module(module):
            for metric in (module.accuracy, module.metrics, module.listing, module.extremes):
                metric(torch.randn(6, 3), targets)
        found, oracles = (
            [metric(logits, targets) for metric in (m.accuracy, m.metrics, m.listing, m.extremes)]
            for m in (module, expected)
        )
        assert difference(oracles, found) == ""
        assert difference(expected.listing.compute(), module.listing.compute()) == ""


def test_random_numbers_are_seeded_inside_and_back_afterwards() -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random()]

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    found = []
    for _ in range(2):
        with pytest.raises(KeyError), preserved_random_state(5):
            found.append(draw())
            raise KeyError
    assert found[0] == found[1] != expected and draw() == expected
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with preserved_random_state():
        assert draw() == expected
    assert draw() == expected


def test_generators_of_data_sets_and_of_what_they_wrap_are_back() -> None:
    class Noisy(Dataset):
        def __init__(self, inner: Any = None) -> None:
            self.generator, self.inner, self.count = torch.Generator().manual_seed(1), inner, 0

        def __getitem__(self, index: int) -> Any:
            self.count += 1
            own = torch.rand((), generator=self.generator).item()
            return own, None if self.inner is None else self.inner[index]

    data, twin = Noisy(Noisy()), Noisy(Noisy())
    with preserved_generators(data):
        _ = data[0], data[1]
    assert data[0] == twin[0] and data.count == data.inner.count == 1
    with preserved_generators([1, 2]):  # nothing to preserve
        pass


def test_logging_is_muted_and_attributes_of_loggers_pass_through(trainer: Any, tmp_path: Path) -> None:
    logger, memory = CSVLogger(tmp_path, "name", "version"), MemoryLogger()
    fitted = trainer(logger=[logger, memory])
    module, child = Plain(), Plain()
    module.child = child
    with muted_logging(fitted, module):
        module.log("loss", 1.0), child.log_dict({"loss": 1.0}, prog_bar=True), module.print("x")
        assert isinstance(fitted.logger, CSVLogger) and fitted.logger.log_dir == logger.log_dir
        assert fitted.logger.version == "version" and fitted.logger.save_dir == str(tmp_path)
        for each in fitted.loggers:
            each.log_metrics({"direct": 1.0}, 1), each.log_hyperparams({"x": 1}), each.save(), each.finalize("ok")
        fitted.logger.experiment.log_metrics({"x": 1.0})
        assert fitted.logger.experiment.metrics == []
    assert memory.rows == [] and fitted.loggers == [logger, memory] and logger.experiment.metrics == []
    assert "log" not in vars(module) and "log_dict" not in vars(child) and not list(tmp_path.rglob("*.csv"))


def test_without_a_logger_there_is_none_inside_either(trainer: Any) -> None:
    fitted = trainer()
    with muted_logging(fitted, Plain()):
        assert fitted.logger is None


def test_hidden_attributes_give_back_the_class_s_own_or_the_instance_s() -> None:
    module = Plain()
    with hidden_attribute(module, "loss", 5):
        assert module.loss == 5
        with hidden_attribute(module, "loss", 6):
            assert module.loss == 6
        assert module.loss == 5
    assert "loss" not in vars(module) and callable(module.loss)


def test_a_run_with_a_module_that_touches_everything_is_the_run_without_us(trainer: Any) -> None:
    found = []
    for callbacks in ([], [observer(meta_data="val", every_n_steps=1)]):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        module = Keeper()
        trainer(*callbacks).fit(module, **loaders())
        found.append(content(module))
    assert difference(*found) == "" and callbacks[0].history


def test_batches_that_the_step_changes_in_place(trainer: Any) -> None:
    class ScalesInPlace(Plain):
        def loss(self, batch: Any) -> Any:
            batch[0].mul_(0.5)
            return super().loss(batch)

    class ScalesACopy(Plain):
        def loss(self, batch: Any) -> Any:
            return super().loss((batch[0] * 0.5, batch[1]))

    histories = []
    for make in (ScalesInPlace, ScalesACopy):
        callback = learner(meta_data="val")
        torch.manual_seed(0)
        trainer(callback).fit(make(), **loaders())
        histories.append(callback.history)
    assert difference(*histories) == ""


def test_held_out_gradients_of_plain_loops_put_everything_back() -> None:
    module = Keeper()
    batch = next(iter(loader()))
    optimizer = torch.optim.SGD(module.net.parameters(), 0.1)
    tuner = Displacement().attach(optimizer, planned_steps=20, modules=[module], every_n_steps=1)
    module.log = lambda *_: None
    gradient = tuner.held_out_gradient(lambda: module.training_step(batch, 0))
    module.loss(batch).backward()
    before, state = content(module), torch.get_rng_state()
    with gradient(0, None) as loss:
        assert loss.item() > 0 and module.net.weight.grad is not None and module.count == 1
    assert difference(before, content(module)) == "" and torch.equal(state, torch.get_rng_state())
