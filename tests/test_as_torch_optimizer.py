"""A learned optimizer as a torch.optim.Optimizer: groups, schedules, state, and its next steps as a function."""

from __future__ import annotations

import copy
import io
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
    TensorwiseOptimizer,
    Unroll,
    meta_gradient,
)
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned import OptimizerInUse


class TorchoptAdam(LearnedOptimizer):
    """Somebody's own, with torchopt's named tuples as its state; it couples the tensors by a shared step count."""

    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.tensor(-3.0))

    def transformation(self):
        return torchopt.adam(lr=lambda step: self.log_rate.exp())


def tensorwise():
    """One with all its numbers in use."""
    learned = TensorwiseOptimizer()
    learned.set_({name: 0.3 * torch.randn_like(parameter) for name, parameter in learned.named_parameters()})
    learned.set_({"log_sizes": learned.log_sizes - 3.0})
    return learned


MAKERS = {
    "mlp": lambda: MLPOptimizer(hidden_size=3, initialisation="scaled", step_multiplier=0.05),
    "small_fc": lambda: SmallFCOptimizer(step_multiplier=0.05),
    "lstm": lambda: LSTMOptimizer(hidden_size=3, step_multiplier=0.1),
    "tensorwise": tensorwise,
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


def functional_loss(model):
    def loss(parameters, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
        return (torch.func.functional_call(model, parameters, (inputs,)) - targets).square().mean()

    return loss


def loss_of(model, seed):
    return functional_loss(model)(dict(model.named_parameters()), seed)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def by_transformation(loss, transformation, state, parameters, seeds):
    """The parameters after training by pure functions."""
    for seed in seeds:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        gradients = dict(zip(leaves, torch.autograd.grad(loss(leaves, seed), list(leaves.values())), strict=True))
        with torch.no_grad():
            updates, state = transformation.update(gradients, state, params=leaves, inplace=False)
            parameters = {name: tensor.detach() + updates[name] for name, tensor in leaves.items()}
    return parameters


@KINDS
def test_steps_are_those_of_the_transformation(kind):
    learned, model = made(kind), network()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    transformation = learned.transformation()
    expected = by_transformation(
        functional_loss(model), transformation, transformation.init(parameters), parameters, range(3)
    )
    train(model, learned.as_torch_optimizer(model.parameters()), range(3))
    for name, parameter in model.named_parameters():
        # TensorwiseOptimizer sums in another order where nothing is differentiated.
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-6 if kind == "tensorwise" else 0)
    assert all(parameter.grad is None for parameter in learned.parameters())


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in ("torchopt", "tensorwise")])
def test_many_parameters_are_updated_in_chunks_with_the_same_result(kind):
    # Two of these do not fit into one chunk of 2**16 elements.
    parameters = {name: torch.nn.Parameter(torch.randn(200, 200)) for name in "abc"}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn(200, 200)
    learned = made(kind)
    optimizer = learned.as_torch_optimizer(list(parameters.items()))
    optimizer.step()
    assert [chunk.keys for chunk in optimizer.chunks()] == [("a",), ("b",), ("c",)]
    transformation = learned.transformation()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    updates, _ = transformation.update(gradients, transformation.init(before), params=before, inplace=False)
    for name, parameter in parameters.items():
        # A matrix product of another width may sum in another order.
        torch.testing.assert_close(parameter.detach(), before[name] + updates[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shapes",
    [
        {"matrix": (300, 400)},
        {
            f"{name}{i}": shape
            for i in range(5)
            for name, shape in (("w", (90, 110)), ("b", (90,)), ("k", (8, 3, 3, 3)))
        },
        {"scalar": (), "one": (1,), "vector": (70_000,)},
    ],
    ids=["one", "many", "odd"],
)
def test_the_tensorwise_rule_in_pieces_and_in_place_makes_the_steps_of_its_transformation(shapes):
    learned = made("tensorwise")
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    pure = {name: parameter.detach().double() for name, parameter in parameters.items()}
    transformation, optimizer = learned.transformation(), learned.as_torch_optimizer(list(parameters.items()))
    state = transformation.init(pure)
    for step in range(4):
        for name, parameter in parameters.items():
            # At step 2 some have no gradient: their averages stay.
            parameter.grad = None if step == 2 and name.startswith(("w", "one")) else torch.randn_like(parameter)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        gradients = {n: None if p.grad is None else p.grad.double() for n, p in parameters.items()}
        with torch.no_grad():
            updates, state = transformation.update(gradients, state, params=pure)
        optimizer.step()
        for name, parameter in parameters.items():
            # Of float32 in sums of thousands and in a cosine.
            expected = torch.zeros_like(parameter) if updates[name] is None else updates[name].float()
            size = expected.square().mean().sqrt().item()
            torch.testing.assert_close(parameter - before[name], expected, rtol=1e-4, atol=1e-4 * size + 1e-6)
            pure[name] = parameter.detach().double()


def test_groups_have_rates_and_decoupled_weight_decay():
    parts = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    for part in parts:
        part.grad = torch.tensor([1.0, -2.0, 0.5])
    groups = [
        {"params": [parts[0]]},
        {"params": [parts[1]], "lr": 0.5},
        {"params": [parts[2]], "lr": 0.5, "weight_decay": 0.1},
    ]
    made("mlp").as_torch_optimizer(groups).step()
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


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    model = network()
    optimizer, before = made("mlp").as_torch_optimizer(model.parameters()), copy.deepcopy(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == loss_of(before, 0).item()
    assert not same(model, before)


def test_frozen_parameters_stay_and_join_later_and_so_do_added_groups():
    model, reference, extra = network(), network(), torch.nn.Parameter(torch.ones(2))
    model[0].requires_grad_(False)
    optimizer = made("mlp").as_torch_optimizer(model.parameters())
    train(model, optimizer, range(2))
    assert torch.equal(model[0].weight, reference[0].weight)
    assert not torch.equal(model[2].weight, reference[2].weight)
    model[0].requires_grad_(True)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    extra.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(model[0].weight, reference[0].weight)
    assert torch.equal(model[2].weight, before)
    assert extra.ne(1.0).all()


def test_an_optimizer_that_couples_tensors_refuses_latecomers():
    model, extra = network(), torch.nn.Parameter(torch.ones(2))
    optimizer = made("torchopt").as_torch_optimizer(model.parameters())
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": [extra]})
    with pytest.raises(ValueError, match="independent_tensors"):
        optimizer.step()


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


def test_warns_once_beyond_the_horizon_that_it_was_trained_for_interruptions_or_not():
    model, learned = network(), made("small_fc")
    learned.horizon = 2
    optimizer = learned.as_torch_optimizer(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(2))
    resumed = learned.as_torch_optimizer(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="meta-trained on runs of 2 steps and is now in step 3"):
        train(model, resumed, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, resumed, range(1))


def test_refuses_its_own_meta_parameters_and_negative_numbers():
    learned = made("small_fc")
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), learned])
    with pytest.raises(ValueError, match="learned optimizer's own"):
        learned.as_torch_optimizer(model.parameters())
    for wrong in ({"lr": -1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=-"):
            learned.as_torch_optimizer(network().parameters(), **wrong)


def test_hyperparameters_by_name_need_named_parameters():
    model = network()
    inner = inner_optimizer(torch.optim.SGD, lr=0.1).with_names([name for name, _ in model.named_parameters()])
    learned = LearnedStepSize(per="tensor").attach(inner)
    with pytest.raises(ValueError, match="named_parameters"):
        train(model, learned.as_torch_optimizer(model.parameters()), range(1))
    before = copy.deepcopy(model)
    train(model, learned.as_torch_optimizer(model.named_parameters()), range(1))
    assert not same(model, before)


@KINDS
def test_resumes_to_the_last_bit_from_a_weights_only_checkpoint(kind):
    model = network()
    optimizer = made(kind).as_torch_optimizer(model.parameters())
    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(twin, twin_optimizer, range(3, 6))
    assert same(model, twin)

    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    again = network()
    again.load_state_dict(loaded["model"])
    torch.manual_seed(99)
    resumed = MAKERS[kind]().as_torch_optimizer(again.parameters())  # with other meta-parameters, at first
    resumed.load_state_dict(loaded["optimizer"])
    train(again, resumed, range(3, 6))
    assert same(model, again)


@KINDS
def test_a_saved_state_is_a_snapshot(kind):
    model = network()
    optimizer = made(kind).as_torch_optimizer(model.parameters())
    train(model, optimizer, range(2))
    saved, buffers = optimizer.state_dict(), [io.BytesIO(), io.BytesIO()]
    torch.save(saved, buffers[0])
    train(model, optimizer, range(2))
    with torch.no_grad():
        for parameter in optimizer.learned.parameters():
            parameter.add_(1.0)
    torch.save(saved, buffers[1])
    assert buffers[0].getvalue() == buffers[1].getvalue()


def test_foreign_and_unfitting_states_are_refused():
    model = network()
    optimizer = made("small_fc").as_torch_optimizer(model.parameters())
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="other meta-parameters"):
        made("mlp").as_torch_optimizer(model.parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="does not have"):
        made("small_fc").as_torch_optimizer(model.named_parameters()).load_state_dict(optimizer.state_dict())


@KINDS
@pytest.mark.parametrize("fresh", [False, True])
def test_the_optimizer_in_use_as_a_function_does_what_the_next_steps_do(kind, fresh):
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.1}, {"params": model[2].parameters()}]
    optimizer = made(kind).as_torch_optimizer(groups)
    if not fresh:
        train(model, optimizer, range(2))
    in_use = OptimizerInUse(optimizer, model.named_parameters())
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = by_transformation(
        functional_loss(model), in_use.transformation(), in_use.read_state(), parameters, range(5, 8)
    )
    train(model, optimizer, range(5, 8))
    for name, parameter in model.named_parameters():
        # The live step multiplies in place, the function adds: two roundings of 6e-8 in each of three steps.
        torch.testing.assert_close(parameter, expected[name], rtol=2e-6, atol=1e-7)


def test_a_meta_step_through_the_optimizer_in_use_changes_the_live_optimizer():
    model = network()
    optimizer = made("mlp").as_torch_optimizer(model.parameters(), weight_decay=0.01)
    train(model, optimizer, range(3))
    in_use = OptimizerInUse(optimizer, model.named_parameters())
    parameters, loss = dict(model.named_parameters()), functional_loss(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}

    def unrolled():
        return meta_gradient(
            loss, parameters, in_use, [5, 6, 7], 8, state=in_use.read_state(), estimator=Unroll(objective="naive")
        )

    result = unrolled()
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    length = sum(gradient.square().sum() for gradient in result.gradients.values())
    change = 1e-3 * result.value / length.item()
    in_use.set_({name: p.detach() - change * result.gradients[name] for name, p in in_use.named_parameters()})
    after = unrolled().value
    # To first order the meta-loss falls by 1e-3 of itself.
    assert result.value - after == pytest.approx(1e-3 * result.value, rel=0.05)
    train(model, optimizer, range(5, 8))
    assert loss(parameters, 8).item() == pytest.approx(after, rel=1e-5)


def test_parameters_that_the_module_does_not_name_are_refused():
    model = network()
    optimizer = made("small_fc").as_torch_optimizer(model.parameters())
    with pytest.raises(ValueError, match="not among the named parameters"):
        OptimizerInUse(optimizer, model[0].named_parameters())
