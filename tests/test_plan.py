"""The plan: which estimator, why, and a prediction of the memory that holds."""

from __future__ import annotations

import pytest
import torch
from live_memory import LiveMemory
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.plan import choose, choose_estimator, plan
from lightning_l2l.exact.step_memory import StepMemory
from lightning_l2l.functional import inner_optimizer

SGD = inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


class Problem:
    def __init__(self, steps=20, width=64, per="optimizer"):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 4))
        self.batch = (torch.randn(128, 32), torch.randint(4, (128,)))
        self.batches = [self.batch] * steps
        params = dict(self.net.named_parameters())
        self.learned = LearnedStepSize(per).attach(SGD.with_names(params))
        self.arguments = (self.loss, params, self.learned, self.batches)
        self.options = {"buffers": dict(self.net.named_buffers())}

    def loss(self, tensors, batch):
        return nn.functional.cross_entropy(functional_call(self.net, dict(tensors), (batch[0],)), batch[1])


@pytest.mark.parametrize("estimator", ["forward", "reverse", "segmented", "es", "mixed"])
@pytest.mark.parametrize("width", [16, 128])
def test_predicted_memory_is_within_a_factor_of_two_of_the_measured(estimator, width):
    problem = Problem(16, width)
    particles = Particles(count=4)
    choices = {c.estimator: c for c in plan(*problem.arguments, particles=particles, **problem.options).choices}
    options = {**problem.options, "estimator": estimator, "particles": particles}
    meta_gradient(*problem.arguments, problem.batch, **options)  # one-off allocations
    with LiveMemory() as memory:
        meta_gradient(*problem.arguments, problem.batch, **options)
    assert 0.5 < choices[estimator].memory / memory.peak < 2


def test_one_scalar_takes_forward_and_many_take_reverse():
    assert plan(*Problem().arguments, **Problem().options).estimator == "forward"
    problem = Problem(per="tensor")
    found = plan(*problem.arguments, **problem.options)
    assert found.estimator == "reverse"
    assert "6 scalar meta-parameters" in found.reason and "fit" in found.reason


def test_reverse_that_does_not_fit_is_segmented():
    problem = Problem(steps=100, per="tensor")
    found = plan(*problem.arguments, memory_limit=10_000_000, **problem.options)
    assert found.estimator == "segmented"
    assert "more than the 9.5 MB allowed" in found.reason
    assert found.memory < next(c.memory for c in found.choices if c.estimator == "reverse") / 3


def test_operations_without_a_second_derivative_take_evolution_strategies():
    problem = Problem()
    loss = lambda params, batch: functional.embedding_bag(torch.tensor([[0, 1]]), params["3.weight"]).square().sum()  # noqa: E731
    found = plan(loss, *problem.arguments[1:], **problem.options)
    assert found.estimator == "es"
    assert "_embedding_bag_backward has no second derivative" in found.reason
    assert [choice.usable for choice in found.choices] == [False, False, False, False, True]


def test_auto_does_what_the_plan_says():
    for problem in (Problem(), Problem(per="tensor"), Problem(steps=4, per="tensor")):
        found = plan(*problem.arguments, **problem.options)
        result = meta_gradient(*problem.arguments, problem.batch, **problem.options)
        assert result.diagnostics.estimator == found.estimator
        assert result.diagnostics.reason.split(":")[0] in found.reason


def test_a_plan_changes_nothing():
    problem = Problem()
    before = {name: tensor.clone() for name, tensor in problem.net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    plan(*problem.arguments, **problem.options)
    assert torch.equal(torch.rand(1), expected)
    torch.testing.assert_close(dict(problem.net.state_dict()), before, rtol=0, atol=0)


def test_a_printed_plan_has_a_line_for_each_estimator_and_marks_the_chosen_one():
    lines = str(plan(*Problem().arguments, **Problem().options)).splitlines()
    assert lines[0].startswith("estimator 'forward': 1 scalar meta-parameter(s)")
    assert [line.split()[0] for line in lines[3:]] == [">", "reverse", "segmented", "mixed", "es"]
    assert "MB" in lines[4] and "60" in lines[4]


def test_a_loss_that_uses_torch_func_inside_has_a_plan_without_memory():
    def loss(params, batch):
        return torch.func.grad(lambda w: w.square().sum())(params["w"]).square().sum()

    learned = LearnedStepSize().attach(SGD)
    found = plan(loss, {"w": torch.ones(2)}, learned, [None] * 20)
    assert found.memory is None and "unknown" in str(found)
    result = meta_gradient(loss, {"w": torch.ones(2)}, learned, [None] * 20, None, objective="naive")
    assert result.usable


def test_the_choice_without_a_measurement_counts_only():
    assert choose_estimator(nn.Linear(1, 1), "auto")[0] == "forward"
    assert choose_estimator(nn.Linear(9, 9), "auto")[0] == "reverse"
    assert choose_estimator(nn.Linear(9, 9), "es") == ("es", "asked for")
    assert choose(100, 1000, StepMemory(1, 1, 1, 1), None)[0] == "reverse"
    with pytest.raises(ValueError, match="batches is empty"):
        plan(lambda p, b: p["w"].sum(), {"w": torch.ones(1)}, LearnedStepSize().attach(SGD), [])
    with pytest.raises(ValueError, match="params is empty"):
        plan(lambda p, b: b, {}, LearnedStepSize().attach(SGD), [None])
    with pytest.raises(ValueError, match="nothing to learn"):
        plan(lambda p, b: p["w"].sum(), {"w": torch.ones(1)}, LearnedStepSize().attach(SGD).requires_grad_(False), [0])
