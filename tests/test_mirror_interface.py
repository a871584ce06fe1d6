"""The mirrors as torchopt transformations, and the errors of everything that has none."""

from __future__ import annotations

import pytest
import torch
import torchopt
from test_mirror import Net, batches, gradients, grouped, train

from lightning_l2l.exact.clip import clip_gradient_norm
from lightning_l2l.functional import (
    InnerOptimizer,
    ParameterGroup,
    Rule,
    inner_optimizer,
    mirror,
    read_state,
    register_mirror,
)
from lightning_l2l.functional import mirror as mirror_function
from lightning_l2l.functional.rule import times


def one_step(transformation, parameters, given):
    return transformation.update(given, transformation.init(parameters), params=parameters, inplace=False)[0]


def test_chains_with_torchopt_and_with_clipping():
    net = Net()
    parameters = dict(net.named_parameters())
    given = gradients(net, parameters, batches(1)[0])
    adam = inner_optimizer(torch.optim.Adam, lr=0.1).transformation()
    alone = one_step(adam, parameters, given)
    halved = one_step(torchopt.combine.chain(adam, torchopt.transform.scale(0.5)), parameters, given)
    for name in parameters:
        torch.testing.assert_close(halved[name], 0.5 * alone[name], rtol=1e-15, atol=0.0)
    sgd = inner_optimizer(torch.optim.SGD, lr=1.0).transformation()
    clipped = one_step(torchopt.combine.chain(clip_gradient_norm(0.1), sgd), parameters, given)
    norm = torch.stack([update.norm() for update in clipped.values()]).norm()
    assert norm.item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="torchopt hands torch.autograd.grad a dictionary, which torch 2.6 does not take",
)
def test_runs_under_torchopt_func_optimizer():
    parameters = {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
    optimizer = torchopt.FuncOptimizer(inner_optimizer(torch.optim.SGD, lr=0.5, momentum=0.9).transformation())
    for _ in range(2):
        parameters = optimizer.step(parameters["w"].square().sum(), parameters)
    # w -> 0, buffer 2w; then the momentum step -0.5 * 0.9 * 2w.
    torch.testing.assert_close(parameters["w"].detach(), torch.tensor([-0.9, -1.8]))


def test_values_are_read_at_update_time():
    rate = torch.tensor(0.1, dtype=torch.float64)
    transformation = inner_optimizer(torch.optim.SGD, lr=0.1).transformation([{"lr": rate}])
    parameters = {"w": torch.ones(1)}
    rate.fill_(0.5)
    assert one_step(transformation, parameters, {"w": torch.ones(1)})["w"].item() == -0.5


def test_each_tensor_gets_its_own_value():
    rates = {"a": torch.tensor(0.25).double(), "b": torch.tensor(0.5).double(), "c": torch.tensor(2.0).double()}
    parameters = {"a": torch.ones(2), "b": torch.ones(3, 3), "c": torch.ones(())}
    transformation = inner_optimizer(torch.optim.SGD, lr=0.1).transformation([{"lr": rates}])
    updates = one_step(transformation, parameters, parameters)
    for name, rate in rates.items():
        assert (updates[name] == -rate).all()


def test_dtypes_and_large_tensors_may_be_mixed():
    parameters = {
        "double": torch.ones(3, dtype=torch.float64),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "single": torch.ones(2, 2),
        "scalar": torch.ones(()),
        "large": torch.ones(300, 300),
        "empty": torch.ones(0, 3),
    }
    values = {"lr": torch.tensor(0.25, dtype=torch.float64)}
    transformation = inner_optimizer(torch.optim.SGD, lr=0.1).transformation([values])
    updates = one_step(transformation, parameters, {name: p * 2 for name, p in parameters.items()})
    for name, p in parameters.items():
        assert updates[name].dtype == p.dtype and updates[name].shape == p.shape
        assert (updates[name] == -0.5).all()


def test_scale_equivariance_is_true_where_claimed():
    for settings in ({}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "maximize": True}):
        inner = inner_optimizer(torch.optim.SGD, lr=0.1, weight_decay=0.1, **settings)
        assert inner.scale_equivariant
        transformation = inner.transformation()
        results = []
        for c in (1.0, 1024.0):
            parameters = {"w": c * torch.tensor([1.0, -2.0])}
            given = {"w": c * torch.tensor([3.0, 5.0])}
            state = {"w": {"momentum_buffer": c * torch.tensor([0.3, 0.7])}}
            updates, state = transformation.update(given, state, params=parameters)
            results.append([updates["w"] / c, state["w"]["momentum_buffer"] / c])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not inner_optimizer(torch.optim.Adam).scale_equivariant


def named_linear(dtype=torch.float32):
    layer = torch.nn.Linear(2, 1, dtype=dtype)
    return list(layer.parameters()), list(layer.named_parameters())


@pytest.mark.parametrize(
    "cls", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.ASGD]
)
def test_optimizer_without_mirror_is_refused_with_the_list_and_the_way_out(cls):
    parameters, named = named_linear()
    with pytest.raises(TypeError, match=rf"{cls.__name__}.*Adam, AdamW, NAdam, RAdam.*register_mirror"):
        mirror(cls(parameters, lr=0.1), named)


def test_subclass_is_mirrored_unless_it_changes_the_step():
    parameters, named = named_linear()

    class OtherDefaults(torch.optim.AdamW):
        def __init__(self, params):
            super().__init__(params, lr=0.5)

    class OtherStep(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    inner = mirror(OtherDefaults(parameters), named)
    assert inner.groups[0].hyperparameters["lr"] == 0.5
    assert inner.groups[0].hyperparameters["decoupled_weight_decay"]
    with pytest.raises(TypeError, match="OtherStep inherits from AdamW but overrides step"):
        mirror(OtherStep(parameters), named)


def test_scheduler_and_hooks_do_not_make_it_another_optimizer():
    parameters, named = named_linear()
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1)  # replaces optimizer.step
    hyperparameters = mirror(optimizer, named).groups[0].hyperparameters
    assert hyperparameters["lr"] == pytest.approx(0.05) and hyperparameters["initial_lr"] == 0.5


def test_registered_optimizer_is_mirrored_tensor_by_tensor():
    class Normalized(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad / p.grad.norm())

    def update(parameter, gradient, state, hyperparameters):
        return times(gradient / gradient.norm(), -hyperparameters["lr"]), dict(state)

    register_mirror(Normalized, Rule(update, defaults={"lr": 1e-3}))
    net = Net()
    optimizer = Normalized(net.parameters(), lr=0.1)
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    batch = batches(1)[0]
    given = gradients(net, dict(net.named_parameters()), batch)
    # Not elementwise: the norm of a concatenation would be another one.
    updates = one_step(mirror(optimizer, net.named_parameters()).transformation(), parameters, given)
    train(net, optimizer, [batch])
    for name, p in net.named_parameters():
        torch.testing.assert_close(parameters[name] + updates[name], p.detach(), rtol=1e-15, atol=1e-15)


def test_foreign_parameter_is_refused():
    parameters, named = named_linear()
    optimizer = torch.optim.SGD([*parameters, torch.nn.Parameter(torch.zeros(7))], lr=0.1)
    for function in (mirror_function, read_state):
        with pytest.raises(ValueError, match=r"parameter 2 of group 0.*\(7,\).*not among the named parameters"):
            function(optimizer, named)


def test_complex_and_sparse_are_refused():
    parameters, named = named_linear(torch.complex64)
    with pytest.raises(TypeError, match="'weight' is complex"):
        mirror(torch.optim.SGD(parameters, lr=0.1), named)
    transformation = inner_optimizer(torch.optim.SGD, lr=0.1).transformation()
    with pytest.raises(TypeError, match="'w' is complex"):
        one_step(transformation, {"w": torch.ones(1, dtype=torch.complex64)}, {"w": torch.ones(1)})
    with pytest.raises(TypeError, match="gradient of 'w' is sparse.*sparse=False"):
        one_step(transformation, {"w": torch.ones(2)}, {"w": torch.ones(2).to_sparse()})


def test_wrong_arguments_are_refused():
    inner = inner_optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"1 parameter group\(s\), but values were given for 2"):
        inner.transformation([{}, {}])
    with pytest.raises(ValueError, match="'nesterov' cannot be a tensor.*these can: lr, momentum"):
        inner.transformation([{"nesterov": torch.tensor(1.0)}])
    with pytest.raises(ValueError, match="pass params="):
        inner.transformation().update({"w": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="must be the only group"):
        InnerOptimizer(inner.rule, (inner.groups[0], ParameterGroup(("a",), {})))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        inner_optimizer(torch.optim.SGD, lr=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        inner_optimizer(torch.optim.SGD, lr=0.1, momentums=0.9)
    with pytest.raises(TypeError, match="needs a torch.optim.Optimizer class"):
        register_mirror(torch.nn.Linear, inner.rule)
    with pytest.raises(TypeError, match="needs a Rule"):
        register_mirror(torch.optim.LBFGS, lambda *_: None)


def test_named_groups_of_a_grouped_optimizer_keep_their_order():
    net = Net()
    inner = mirror(grouped(net, torch.optim.SGD, {"lr": 0.1}), net.named_parameters())
    assert [group.names for group in inner.groups] == [("first", "gain", "sometimes"), ("bias", "second")]
    assert inner.with_names("xyz") is inner
