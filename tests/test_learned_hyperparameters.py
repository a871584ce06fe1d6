"""Learned step sizes and hyperparameters: the live value to the last bit, always legal, kept across attachments."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_l2l.functional import InnerOptimizer, ParameterGroup, Rule, inner_optimizer, mirror, read_state
from lightning_l2l.learned import LearnedHyperparameters, LearnedStepSize
from lightning_l2l.learned.parametrisation import PARAMETRISATIONS

SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
ALL = {
    torch.optim.SGD: (("learning_rate", "momentum", "dampening", "weight_decay"), SGD),
    torch.optim.AdamW: (
        ("learning_rate", "betas", "eps", "weight_decay"),
        {"lr": 0.1, "weight_decay": 0.3, "eps": 0.01},
    ),
    torch.optim.RMSprop: (
        ("learning_rate", "alpha", "momentum", "eps"),
        {"lr": 0.01, "momentum": 0.7, "eps": 0.01},
    ),
}


PER = pytest.mark.parametrize("per", ["optimizer", "group", "tensor"])


class Net(nn.Module):
    """Small, smooth, and with a tensor that only some batches use."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.bias, self.second, self.sometimes = (
            nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in ((4, 5), (5,), (5, 2), (3,))
        )

    def forward(self, batch):
        loss = (torch.tanh(batch["x"] @ self.first + self.bias) @ self.second - batch["y"]).square().mean()
        return loss + (self.sometimes.sin() * batch["y"][0, 0]).sum() if batch["use"] else loss


def batches(count, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return [{"x": draw(8, 4), "y": draw(8, 2), "use": index % 3 != 1} for index in range(count)]


def grouped(net, cls, settings):
    """Two groups that differ in their rate (and, where there is one, in their weight decay)."""
    other = {"lr": settings["lr"] / 2}
    if settings.get("weight_decay"):
        other["weight_decay"] = settings["weight_decay"] / 3
    groups = [{"params": [net.first, net.sometimes]}, {"params": [net.bias, net.second], **other}]
    return cls(groups, **settings)


def train(net, optimizer, data):
    for batch in data:
        optimizer.zero_grad(set_to_none=True)
        net(batch).backward()
        optimizer.step()


def gradients(net, parameters, batch, **options):
    loss = torch.func.functional_call(net, parameters, (batch,))
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, **options)
    return dict(zip(parameters, found, strict=True))


def attached(cls=torch.optim.SGD, per="group", dtype=torch.float64, steps=2):
    learn, live = ALL[cls]
    net = Net(dtype)
    optimizer = grouped(net, cls, live)
    train(net, optimizer, batches(steps, dtype))
    learned = LearnedHyperparameters(learn, per=per)
    return net, optimizer, learned.attach(mirror(optimizer, net.named_parameters()))


@PER
@pytest.mark.parametrize("cls", ALL)
def test_offset_zero_is_the_live_value_to_the_last_bit(cls, per):
    _, optimizer, learned = attached(cls, per)
    for group, values in zip(optimizer.param_groups, learned.values(), strict=True):
        for key, value in values.items():
            found = set(value.values()) if per == "tensor" else {value}
            assert found == {group[key]}


@settings(max_examples=200, deadline=None)
@given(base=st.floats(1e-12, 1 - 1e-12), offset=st.floats(-20, 20))
def test_parametrisation_is_exact_at_zero_and_inverts(base, offset):
    for how in (PARAMETRISATIONS["learning_rate"], PARAMETRISATIONS["beta2"]):
        tensor = torch.tensor(base, dtype=torch.float64)
        assert how.value(tensor, torch.zeros((), dtype=torch.float64)).item() == base
        value = how.value(tensor, torch.tensor(offset, dtype=torch.float64)).item()
        if how.legal(value) and 1 - value > 1e-9:  # beyond, 1 - value has no digits left
            assert how.offset(base, value) == pytest.approx(offset, rel=1e-6, abs=1e-6)


@PER
@pytest.mark.parametrize("cls", ALL)
def test_meta_gradient_equals_central_differences(cls, per):
    net, optimizer, learned = attached(cls, per)
    state = read_state(optimizer, net.named_parameters())
    data = batches(3, seed=5)

    def meta_loss():
        own, transformation = state, learned.transformation()
        parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        for batch in data:
            found = gradients(net, parameters, batch, create_graph=True)
            updates, own = transformation.update(found, own, params=parameters)
            parameters = {n: p if updates[n] is None else p + updates[n] for n, p in parameters.items()}
        return torch.func.functional_call(net, parameters, (batches(1, seed=6)[0],))

    meta_parameters = dict(learned.named_parameters())
    found = torch.autograd.grad(meta_loss(), list(meta_parameters.values()))
    for offset, gradient in zip(meta_parameters.values(), found, strict=True):
        for index in range(len(offset)):
            differences = []
            for width in (1e-3, -1e-3, 2e-3, -2e-3):
                offset.data[index] += width
                differences.append(meta_loss().item())
                offset.data[index] -= width
            expected = (8 * (differences[0] - differences[1]) - (differences[2] - differences[3])) / 12e-3
            # Fourth order, width 1e-3: errors near 1e-12 of a loss of order one.
            assert gradient[index].item() == pytest.approx(expected, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_their_dtype_and_learning_nothing_changes_nothing(dtype):
    net, optimizer, learned = attached(dtype=torch.float32)
    parameters = {name: p.detach().to(dtype) for name, p in net.named_parameters()}
    given = {name: torch.ones_like(p) for name, p in parameters.items()}
    plain = mirror(optimizer, net.named_parameters()).transformation()
    expected, _ = plain.update(given, plain.init(parameters), params=parameters)
    own = learned.transformation()
    updates, state = own.update(given, own.init(parameters), params=parameters)
    for name, update in updates.items():
        assert update.dtype == dtype == state[name]["momentum_buffer"].dtype
        # Equal values in another form (a tensor is multiplied, a number folded into the operation): last bit.
        torch.testing.assert_close(update, expected[name], rtol=torch.finfo(dtype).eps, atol=0.0)


def test_values_fit_into_the_live_groups():
    net, optimizer, learned = attached(torch.optim.AdamW)
    with torch.no_grad():
        learned.learning_rate.copy_(torch.tensor([math.log(2), 0.0]))
        learned.beta1.fill_(math.log(0.5))
    values = learned.values()
    assert values[0]["lr"] == pytest.approx(0.2) and values[1]["lr"] == 0.05
    assert values[0]["betas"] == (pytest.approx(0.95), 0.999)
    for group, own in zip(optimizer.param_groups, values, strict=True):
        assert set(own) <= set(group)
    inner = mirror(optimizer, net.named_parameters())
    only = LearnedHyperparameters(("beta2",), per="tensor").attach(inner)
    assert only.values()[0]["betas"]["first"] == (0.9, 0.999)


@PER
def test_projection_brings_values_to_their_bounds_and_they_can_come_back(per):
    net, optimizer, _ = attached()
    bounds = {"learning_rate": (1e-3, 1.0), "momentum": (0.0, 0.99)}
    learned = LearnedHyperparameters(("learning_rate", "momentum"), per, bounds)
    learned.attach(mirror(optimizer, net.named_parameters()))
    for sign, rates, momentum in ((1, {1.0, 0.5}, 0.0), (-1, {1e-3, 2e-3}, 0.99)):
        with torch.no_grad():
            for offset in learned.parameters():
                offset.fill_(sign * 100.0)
        learned.project_()
        for group in learned.values():
            of = (lambda v: set(v.values())) if per == "tensor" else (lambda v: {v})
            for rate in of(group["lr"]):
                # per="optimizer" keeps both groups in bounds, so the one with half the rate ends inside.
                assert min(abs(rate / r - 1) for r in rates) < 1e-12 and 1e-3 * (1 - 1e-12) <= rate <= 1 + 1e-12
            assert all(abs(m - momentum) < 1e-12 and 0 <= m < 1 for m in of(group["momentum"]))
    before = learned.momentum.detach().clone()
    learned.project_()
    assert torch.equal(learned.momentum, before)
    # At its bound the derivative is not zero, so it can come back.
    updates, _ = learned.transformation().update(
        {"bias": torch.ones(5).double()}, read_state(optimizer, net.named_parameters()),
        params=dict(net.named_parameters()),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(updates["bias"].sum(), learned.learning_rate)
    assert gradient.abs().max() > 0


def test_bounds_are_about_the_rate_before_the_schedule():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)  # a warm-up that starts at zero
    assert optimizer.param_groups[0]["lr"] == 0.0
    learned = LearnedStepSize(minimum=1e-2, maximum=1.0).attach(mirror(optimizer, [("w", parameter)]))
    with torch.no_grad():
        learned.learning_rate.fill_(1.0)
    learned.project_()
    assert learned.learning_rate.item() == 1.0 and learned.values() == [{"lr": 0.0}]
    optimizer.param_groups[0]["lr"] = 0.1
    learned.attach(mirror(optimizer, [("w", parameter)]))
    assert learned.values()[0]["lr"] == pytest.approx(0.1 * math.e, rel=1e-15)


def test_rounding_at_a_bound_gives_no_value_that_torch_refuses():
    for base in torch.linspace(0.01, 0.99, 99).tolist():
        learned = LearnedHyperparameters(("momentum",))
        learned.attach(inner_optimizer(torch.optim.SGD, lr=0.1, momentum=base))
        with torch.no_grad():
            learned.momentum.fill_(100.0)
        learned.project_()
        assert 0 <= learned.values()[0]["momentum"] < 1e-15


def test_a_live_value_that_has_left_its_bounds_is_not_moved_by_projecting():
    learned = LearnedHyperparameters(("momentum",), bounds={"momentum": (0.5, 0.9)})
    learned.attach(inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.8))
    learned.attach(inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.95))  # cycled, as OneCycleLR does
    learned.project_()
    assert learned.values() == [{"momentum": 0.95}]


@PER
def test_attaching_again_keeps_what_was_learned_and_refreshes_the_bases(per):
    net, optimizer, learned = attached(per=per)
    parameter = learned.learning_rate
    with torch.no_grad():
        parameter.copy_(torch.arange(1.0, len(parameter) + 1))
    kept = parameter.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] *= 10
    learned.attach(mirror(optimizer, net.named_parameters()))
    assert learned.learning_rate is parameter and torch.equal(parameter, kept)
    rate = learned.values()[0]["lr"]
    assert (rate["first"] if per == "tensor" else rate) == pytest.approx(math.e, rel=1e-14)


@PER
def test_added_groups_start_at_zero_and_the_old_ones_keep_theirs(per):
    net = Net()
    optimizer = torch.optim.SGD([net.first], lr=0.1, momentum=0.5)
    learned = LearnedStepSize(per).attach(mirror(optimizer, net.named_parameters()))
    parameter = learned.learning_rate
    with torch.no_grad():
        parameter.fill_(2.0)
    optimizer.add_param_group({"params": [net.bias, net.second]})
    learned.attach(mirror(optimizer, net.named_parameters()))
    expected = {"optimizer": [2.0], "group": [2.0, 0.0], "tensor": [2.0, 0.0, 0.0]}
    assert learned.learning_rate is parameter and parameter.tolist() == expected[per]
    learned.transformation()
    with pytest.raises(ValueError, match="now meets one with 1") if per != "optimizer" else contextlib.nullcontext():
        learned.attach(mirror(torch.optim.SGD([net.first], lr=0.1), net.named_parameters()))


@PER
def test_state_loads_before_and_after_attaching(per):
    net, optimizer, learned = attached(per=per)
    with torch.no_grad():
        for index, offset in enumerate(learned.parameters()):
            offset.copy_(torch.arange(len(offset)) + index / 10)
    saved = learned.state_dict()
    assert set(saved) == {"learning_rate", "momentum", "dampening", "weight_decay"}
    inner = mirror(optimizer, net.named_parameters())
    for attach_first in (True, False):
        other = LearnedHyperparameters(ALL[torch.optim.SGD][0], per=per)
        if attach_first:
            other.attach(inner)
        other.load_state_dict(copy.deepcopy(saved))
        other.attach(inner)
        assert other.values() == learned.values()
        assert copy.deepcopy(other).values() == learned.values()


def test_zero_stays_zero_in_a_group_but_not_in_all():
    net = Net()
    groups = [{"params": [net.first], "weight_decay": 0.1}, {"params": [net.bias], "weight_decay": 0.0}]
    inner = mirror(torch.optim.AdamW(groups), net.named_parameters())
    learned = LearnedHyperparameters(("weight_decay",)).attach(inner)
    with torch.no_grad():
        learned.weight_decay.fill_(1.0)
    assert learned.values()[1]["weight_decay"] == 0.0
    learned.project_()
    assert learned.weight_decay.tolist() == [1.0, 1.0]
    shared = LearnedHyperparameters(("weight_decay",), per="optimizer").attach(inner)
    with torch.no_grad():
        shared.weight_decay.fill_(1.0)
    shared.project_()  # the group with 0 does not hold the other one back
    assert [group["weight_decay"] for group in shared.values()] == [pytest.approx(0.1 * math.e), 0.0]
    with pytest.raises(ValueError, match="'weight_decay' is 0.*a factor times 0 stays 0"):
        LearnedHyperparameters(("weight_decay",)).attach(inner_optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="'learning_rate' is 0"):
        LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.0))


def test_errors_say_what_to_do():
    sgd = inner_optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"attach\(mirror\(optimizer, model.named_parameters\(\)\)\).*inner_optim"):
        LearnedStepSize().transformation()
    with pytest.raises(ValueError, match="'beta1' cannot be learned.*learning_rate, momentum, dampening, weight_d"):
        LearnedHyperparameters(("betas",)).attach(sgd)
    with pytest.raises(ValueError, match="no hyperparameter 'lr'.*learning_rate"):
        LearnedHyperparameters(("lr",))
    with pytest.raises(ValueError, match="learn is empty"):
        LearnedHyperparameters(())
    with pytest.raises(ValueError, match="per must be"):
        LearnedStepSize("layer")
    with pytest.raises(ValueError, match="momentum is 0.*momentum=0.1"):
        LearnedHyperparameters().attach(sgd)
    with pytest.raises(ValueError, match="needs to know the tensors.*with_names"):
        LearnedStepSize("tensor").attach(sgd)
    assert LearnedStepSize("tensor").attach(sgd.with_names("ab")).values() == [{"lr": {"a": 0.1, "b": 0.1}}]
    with pytest.raises(ValueError, match=r"outside its bounds \[1e-10, 0.01\]"):
        LearnedStepSize(maximum=0.01).attach(sgd)
    for bounds in ((0.0, 1.0), (1.0, 0.1), (1e-3, math.inf), (1e-3, math.nan)):
        with pytest.raises(ValueError, match="increasing pair of numbers above 0"):
            LearnedStepSize("group", *bounds)
    with pytest.raises(ValueError, match=r"increasing pair of numbers in \[0, 1\)"):
        LearnedHyperparameters(("momentum",), bounds={"momentum": (0.5, 1.0)})
    with pytest.raises(ValueError, match="Bounds are given for 'eps'"):
        LearnedHyperparameters(("momentum",), bounds={"eps": (1e-8, 1.0)})


def test_only_sgd_is_scale_equivariant():
    assert LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1)).scale_equivariant
    assert not LearnedStepSize().attach(inner_optimizer(torch.optim.Adam)).scale_equivariant


def test_every_learnable_hyperparameter_has_a_name():
    keys = {how.key for how in PARAMETRISATIONS.values()}
    for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop):
        assert set(inner_optimizer(cls, lr=0.1).rule.learnable) <= keys


def test_those_of_an_optimizer_that_no_file_can_name_cannot_be_saved(tmp_path):
    rule = Rule(lambda p, g, s, h: (-h["lr"] * g, dict(s)), defaults={"lr": 0.1})
    learned = LearnedStepSize().attach(InnerOptimizer(rule, (ParameterGroup(None, {"lr": 0.1}),)))
    with pytest.raises(TypeError, match="one of torch.optim's"):
        learned.save(tmp_path / "own.safetensors")
