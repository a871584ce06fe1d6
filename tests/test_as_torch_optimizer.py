"""A learned optimizer as a torch.optim.Optimizer: groups, schedules, scaling, checkpoints, resuming."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchopt

from lightning_l2l import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LSTMOptimizer,
    MLPOptimizer,
    SmallFCOptimizer,
    TinyOptimizer,
)
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned import cohorts as cohorts_module


class TorchoptAdam(LearnedOptimizer):
    """Somebody's own, with torchopt's named tuples as its state."""

    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.tensor(-3.0))

    def transformation(self):
        return torchopt.adam(lr=lambda step: self.log_rate.exp())


MAKERS = {
    "mlp": lambda: MLPOptimizer(hidden_size=3, initialisation="scaled", step_multiplier=0.05),
    "small_fc": lambda: SmallFCOptimizer(step_multiplier=0.05),
    "tiny": lambda: TinyOptimizer(step_multiplier=0.05),
    "lstm": lambda: LSTMOptimizer(hidden_size=3, step_multiplier=0.1),
    "adam": lambda: LearnedHyperparameters(("learning_rate", "betas")).attach(
        inner_optimizer(torch.optim.Adam, lr=0.01)
    ),
    "sgd": lambda: LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "torchopt": TorchoptAdam,
}
KINDS = pytest.mark.parametrize("kind", list(MAKERS))


def made(kind):
    torch.manual_seed(3)
    return MAKERS[kind]()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
    return (model(inputs) - targets).square().mean()


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@KINDS
def test_steps_are_those_of_the_transformation(kind):
    learned, model = made(kind), network()
    optimizer = learned.as_torch_optimizer(model.parameters())
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    transformation = learned.transformation()
    state = transformation.init(parameters)
    for seed in range(3):
        model.zero_grad()
        loss_of(model, seed).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        with torch.no_grad():
            updates, state = transformation.update(gradients, state, params=parameters, inplace=False)
        parameters = {name: tensor + updates[name] for name, tensor in parameters.items()}
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name])
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in learned.parameters())


def test_groups_have_rates_and_decoupled_weight_decay():
    learned = made("tiny")
    parts = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    for part in parts:
        part.grad = torch.tensor([1.0, -2.0, 0.5])
    groups = [
        {"params": [parts[0]]},
        {"params": [parts[1]], "lr": 0.5},
        {"params": [parts[2]], "lr": 0.5, "weight_decay": 0.1},
    ]
    learned.as_torch_optimizer(groups).step()
    step = parts[0].detach() - 1.0
    assert step.abs().min() > 1e-4
    torch.testing.assert_close(parts[1].detach(), 1.0 + 0.5 * step)
    torch.testing.assert_close(parts[2].detach(), 0.95 + 0.5 * step)


def test_schedulers_scale_the_step():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = made("sgd").as_torch_optimizer([parameter])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    moved = parameter.detach().clone()
    assert torch.allclose(moved, torch.full((3,), 0.9))
    scheduler.step()
    optimizer.step()
    assert torch.equal(parameter, moved)


def test_closure_is_run_with_gradients_and_its_loss_returned():
    model = network()
    optimizer = made("mlp").as_torch_optimizer(model.parameters())
    before = copy.deepcopy(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == loss_of(before, 0).item()
    assert not same(model, before)


def test_frozen_and_unused_parameters_stay_and_join_later():
    model = network()
    reference = network()
    model[0].requires_grad_(False)
    optimizer = made("mlp").as_torch_optimizer(model.parameters())
    train(model, optimizer, range(2))
    assert torch.equal(model[0].weight, reference[0].weight)
    assert not torch.equal(model[2].weight, reference[2].weight)
    model[0].requires_grad_(True)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    train(model, optimizer, range(1))
    assert not torch.equal(model[0].weight, reference[0].weight)
    assert torch.equal(model[2].weight, before)
    resumed = made("mlp").as_torch_optimizer(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert [cohort.keys for cohort in resumed._cohorts] == [("2", "3"), ("0", "1")]


def test_a_group_may_be_added_during_training():
    model, extra = network(), torch.nn.Parameter(torch.ones(2))
    optimizer = made("small_fc").as_torch_optimizer(model.parameters())
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    extra.grad = torch.ones(2)
    optimizer.step()
    assert extra.ne(1.0).all()


def test_an_optimizer_that_couples_tensors_refuses_latecomers():
    model, extra = network(), torch.nn.Parameter(torch.ones(2))
    optimizer = made("torchopt").as_torch_optimizer(model.parameters())
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": [extra]})
    with pytest.raises(ValueError, match="independent_tensors"):
        optimizer.step()


# torchopt's couples its tensors, so it is never divided.
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "torchopt"])
def test_portions_make_no_difference(kind, monkeypatch):
    whole, parts = network(), network()
    one = made(kind).as_torch_optimizer(whole.parameters())
    train(whole, one, range(3))
    monkeypatch.setattr(cohorts_module, "_LARGEST", 12)
    several = made(kind).as_torch_optimizer(parts.parameters())
    train(parts, several, range(3))
    assert len(several._cohorts) > len(one._cohorts) == 1
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        # A matrix product of another width may sum in another order.
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_grad_scaler_skips_overflowing_steps_and_unscales_the_others():
    model, plain = network(), network()
    optimizer = made("mlp").as_torch_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(model, plain)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    train(plain, made("mlp").as_torch_optimizer(plain.parameters()), range(1))
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        # Scaling by a power of two is exact up to denormals.
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8)


def test_warns_once_beyond_the_horizon_it_was_trained_for():
    model, learned = network(), made("tiny")
    learned.horizon = 2
    optimizer = learned.as_torch_optimizer(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match="meta-trained on runs of 2 steps"):
        train(model, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(1))


def test_refuses_its_own_meta_parameters_and_negative_numbers():
    learned = made("tiny")
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), learned])
    with pytest.raises(ValueError, match="learned optimizer's own"):
        learned.as_torch_optimizer(model.parameters())
    with pytest.raises(ValueError, match="lr=-1"):
        learned.as_torch_optimizer(network().parameters(), lr=-1.0)
    with pytest.raises(ValueError, match="weight_decay"):
        learned.as_torch_optimizer(network().parameters(), weight_decay=-0.1)


def test_hyperparameters_by_name_need_named_parameters():
    model = network()
    inner = inner_optimizer(torch.optim.SGD, lr=0.1).with_names([name for name, _ in model.named_parameters()])
    learned = LearnedStepSize(per="tensor").attach(inner)
    with pytest.raises(ValueError, match="named_parameters"):
        train(model, learned.as_torch_optimizer(model.parameters()), range(1))
    before = copy.deepcopy(model)
    train(model, learned.as_torch_optimizer(model.named_parameters()), range(1))
    assert not same(model, before)
