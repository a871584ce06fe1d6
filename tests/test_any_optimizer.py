"""Any optimizer: what its steps are in proportion to is learned, what is not is said."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_module import Regression, batches, examples, fit, highest, same_state
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_l2l import Displacement, LearnToLearn

optim = torch.optim


class Lion(Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023)."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.add_(average.lerp(p.grad, 1 - first).sign_(), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - second)
        return loss


class LARS(optim.SGD):
    """You et al., "Large Batch Training of Convolutional Networks" (2017): scales the gradients, then SGD steps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.1 * (p.norm() + 1e-3) / (p.grad.norm() + 1e-9))
        super().step()
        return loss


class ScheduleFree(Optimizer):
    """SGD of Defazio et al., "The Road Less Scheduled" (2024): trains between an iterate and its average."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = {"iterate": p.clone(), "average": p.clone()}
                iterate, average = self.state[p]["iterate"], self.state[p]["average"]
                iterate.sub_(p.grad, alpha=group["lr"])
                average.lerp_(iterate, 1 / group["steps"])
                p.copy_(iterate.lerp(average, 0.9))
        return loss


class Lookahead(Optimizer):
    """Zhang et al. (2019) around another optimizer; as published packages do, without ``Optimizer.__init__``."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.steps = inner, 0
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        self._optimizer_step_pre_hooks: dict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: dict[int, Any] = OrderedDict()
        self._patch_step_function()
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.steps += 1
        if self.steps % 5 == 0:
            weights = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(weights, self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))
        return loss


class Duck:
    """No ``torch.optim.Optimizer``, only what Lightning asks of one."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.inner = optim.SGD(parameters, lr=lr)
        self.param_groups, self.defaults, self.state = self.inner.param_groups, self.inner.defaults, self.inner.state

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=float(group["lr"]))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def matrices(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.dim() == 2]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: optim.SGD(p, lr=1e-5),
    "SGD, momentum, nesterov, weight decay": lambda p: optim.SGD(p, 1e-5, 0.9, nesterov=True, weight_decay=1e-4),
    "SGD, fused": lambda p: optim.SGD(p, lr=1e-5, fused=True),
    "SGD, foreach": lambda p: optim.SGD(p, lr=1e-5, foreach=True),
    "SGD, tensor rate": lambda p: optim.SGD(p, lr=torch.tensor(1e-5)),
    "Adam": lambda p: optim.Adam(p, lr=1e-6),
    "Adam, fused": lambda p: optim.Adam(p, lr=1e-6, fused=True),
    "Adam, amsgrad, foreach": lambda p: optim.Adam(p, lr=1e-6, amsgrad=True, foreach=True),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-6),
    "AdamW, fused, tensor rate": lambda p: optim.AdamW(p, lr=torch.tensor(1e-6), fused=True),
    "AdamW, tensor rate": lambda p: optim.AdamW(p, lr=torch.tensor(1e-6), foreach=False),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-6),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-6),
    "Adamax": lambda p: optim.Adamax(p, lr=1e-6),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-6, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-5),
    "Adagrad, fused": lambda p: optim.Adagrad(p, lr=1e-5, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1e-3),
    "ASGD": lambda p: optim.ASGD(p, lr=1e-5),
    "Adafactor": lambda p: optim.Adafactor(p, lr=1e-6),
    "Muon": lambda p: optim.Muon(matrices(p), lr=1e-6),
    "Lion": lambda p: Lion(p, lr=1e-6),
    "LARS (calls its base class's step)": lambda p: LARS(p, lr=1e-5),
    "schedule-free": lambda p: ScheduleFree(p, lr=1e-5),
    "Lookahead (a wrapper)": lambda p: Lookahead(optim.SGD(p, lr=1e-5)),
    "an object that only behaves like an optimizer": lambda p: Duck(p, lr=1e-5),
}


@pytest.mark.feature("every optimizer of torch, `foreach`, `fused`, rates that are tensors", "works", topic="optimizer")
@pytest.mark.feature("optimizers of others (Lion, LARS, schedule-free, Lookahead)", "works", topic="optimizer")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_that_is_far_too_small_is_raised_and_the_training_gains(name: str) -> None:
    plain, callback = fit(lambda: Regression(OPTIMIZERS[name]), max_epochs=8), LearnToLearn()
    learned = fit(lambda: Regression(OPTIMIZERS[name]), callback, max_epochs=8)
    assert highest(callback) > 2 * callback.history[0]["base_rates"][0]
    assert learned.callback_metrics["val_loss"] < plain.callback_metrics["val_loss"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_watching_leaves_the_run_as_it_is(name: str) -> None:
    callback = LearnToLearn(meta_learning_rate=0, initial_search=False)
    watched = fit(lambda: Regression(OPTIMIZERS[name]), callback)
    assert callback.history and same_state(watched, fit(lambda: Regression(OPTIMIZERS[name])))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_counted_once_and_afterwards_the_optimizer_is_as_it_was(name: str) -> None:
    module = Regression()
    optimizer = OPTIMIZERS[name](module.parameters())
    tuner = Displacement().attach(optimizer)
    for batch in batches():
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        optimizer.step()
        tuner.step(loss)
    assert tuner.steps == len(batches())
    tuner.close()
    assert all(type(group["lr"]) in (float, Tensor) for group in optimizer.param_groups)
    optimizer.step()
    assert tuner.steps == len(batches())


def test_a_rate_tensor_that_groups_share_becomes_one_for_each() -> None:
    class Shared(Regression):
        def configure_optimizers(self) -> Any:
            rate = torch.tensor(1e-6)
            groups = [
                {"params": self.net[0].parameters(), "lr": rate},
                {"params": self.net[2].parameters(), "lr": rate},
            ]
            return optim.AdamW(groups, lr=rate, foreach=False)

    class Numbers(Regression):
        def configure_optimizers(self) -> Any:
            return optim.AdamW([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=1e-6)

    tensors, numbers = (LearnToLearn(Displacement(per="group")) for _ in range(2))
    fit(Shared, tensors, max_epochs=8), fit(Numbers, numbers, max_epochs=8)
    (ours, theirs) = ([record["learning_rates"] for record in one.history] for one in (tensors, numbers))
    assert ours[5][0] != ours[5][1]
    for pair in zip(ours, theirs, strict=True):
        assert pair[0] == pytest.approx(pair[1], rel=1e-2)  # a float32 tensor holds the rate


@pytest.mark.feature("sparse gradients", "works", topic="optimizer")
def test_sparse_gradients_are_measured_like_dense_ones() -> None:
    class Words(Regression):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.EmbeddingBag(20, 1, mode="sum", sparse=sparse)

        def loss(self, batch: Any) -> Tensor:
            return (self.net((batch[0][:, :4].abs() * 9).long().clamp(max=19)) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return optim.SGD(self.parameters(), lr=0.01)

    found = []
    for sparse in (True, False):
        callback = LearnToLearn()
        fit(Words(sparse), callback, max_epochs=4)
        found.append([record["cosine"][0] for record in callback.history])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    callback = LearnToLearn()
    words = Words(True)
    words.configure_optimizers = lambda: optim.SparseAdam(words.parameters(), lr=1e-6)  # type: ignore[method-assign]
    fit(words, callback, max_epochs=8)
    assert highest(callback) > 2e-6


class RelativeStep(optim.SGD):
    """As others' Adafactor: a step size of the number of steps, whatever the rate."""

    def __init__(self, parameters: Any, lr: float | None = 0.1) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0] |= {"relative_step": True, "lr": lr}


class Prodigy(optim.SGD):
    """Only its groups matter here: they hold an own estimate of the step size."""

    def __init__(self, parameters: Any, lr: float = 1.0) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group |= {"d": 1e-6, "growth_rate": float("inf")}


REASONS = {
    "Rprop": (lambda p: optim.Rprop(p), "step size of its own for each weight"),
    "LBFGS": (lambda p: optim.LBFGS(p, lr=0.1, max_iter=3), "several steps in one"),
    "Prodigy": (lambda p: Prodigy(p), "estimates its own step size"),
    "RelativeStep": (lambda p: RelativeStep(p), "from the number of steps"),
}


@pytest.mark.feature(
    "Rprop, LBFGS, Prodigy, D-Adaptation, `relative_step=True`",
    "observes",
    "their steps are not in proportion to the rate",
    topic="optimizer",
)
@pytest.mark.parametrize("name", REASONS)
def test_where_steps_are_not_in_proportion_to_the_rate_it_is_said_once_and_only_observed(name: str) -> None:
    make, reason = REASONS[name]
    callback = LearnToLearn()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learned = fit(lambda: Regression(make), callback, max_epochs=3)
    said = [str(warning.message) for warning in caught if "learning rate is left alone" in str(warning.message)]
    assert len(said) == 1 and name in said[0] and reason in said[0]
    assert callback.history and all(r["learning_rates"] == r["base_rates"] for r in callback.history)
    assert same_state(learned, fit(lambda: Regression(make), max_epochs=3))


def test_a_closure_that_is_called_several_times_is_one_step() -> None:
    module, batch = Regression(), examples()[:32]
    optimizer = optim.LBFGS(module.parameters(), lr=0.1, max_iter=7)
    with pytest.warns(UserWarning, match="LBFGS"):
        tuner = Displacement().attach(optimizer, every_n_steps=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        return loss

    for _ in range(3):
        tuner.step(optimizer.step(closure))
    assert tuner.steps == 3 and [record["step"] for record in tuner.history] == [1, 2, 3]


def test_what_a_subclass_does_after_its_base_class_has_stepped_belongs_to_the_step() -> None:
    class Halves(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.5)

    weight = nn.Parameter(torch.ones(1))
    optim.SGD([weight], lr=0.0)  # torch runs the hooks of the base class once it has been used by itself
    optimizer = Halves([weight], lr=0.0)
    tuner = Displacement().attach(optimizer)
    weight.grad = torch.ones(1)
    optimizer.step()
    # From 1 to 0.5; the average goes 9/10 of the way in the first step.
    assert tuner.average.measure(0)[2].item() == pytest.approx(0.05**2)


@pytest.mark.filterwarnings("ignore:RelativeStep")
def test_an_optimizer_without_a_rate_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="has no learning rate 'lr'"):
        fit(lambda: Regression(lambda p: RelativeStep(p, lr=None)), LearnToLearn())


def test_a_copy_of_a_watched_optimizer_steps_without_us() -> None:
    module = Regression()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    tuner = Displacement().attach(optimizer)
    module.loss(examples()[:32]).backward()
    copy.deepcopy(optimizer).step()
    assert tuner.steps == 0
