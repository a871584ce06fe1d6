"""Derivatives of mirrored steps: against central differences, forward against reverse, finite at zero gradients."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from test_mirror import CASES, Net, batches, grouped, train

from lightning_l2l.functional import inner_optimizer, mirror, read_state
from lightning_l2l.functional.rule import square_root

STEPS = 4


def smooth(case: str) -> tuple[type, dict]:
    """The case with an eps large enough to be seen by differences of float64 numbers."""
    cls, settings = CASES[case]
    return cls, settings if cls is torch.optim.SGD else {**settings, "eps": 0.01}


def start(case: str):
    """The mirror and the state of a live optimizer after some steps, and its hyperparameters that are not
    zero."""
    cls, settings = smooth(case)
    net = Net()
    optimizer = grouped(net, cls, settings)
    train(net, optimizer, batches(5))
    inner = mirror(optimizer, net.named_parameters())
    keys = [key for key in inner.rule.learnable if inner.groups[0].hyperparameters[key] != 0]
    live = torch.tensor([[group.hyperparameters[key] for key in keys] for group in inner.groups], dtype=torch.float64)
    return net, inner, read_state(optimizer, net.named_parameters()), keys, live


def meta_loss(net, inner, state, keys, values, per_tensor=False):
    """Held-out loss after some differentiable steps, as a function of the hyperparameters (groups x keys)."""
    settings = []
    for group, row in zip(inner.groups, values, strict=True):
        found = dict(zip(keys, row, strict=True))
        settings.append({k: dict.fromkeys(group.names, v) for k, v in found.items()} if per_tensor else found)
    transformation = inner.transformation(settings)
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    *training, held_out = batches(STEPS + 1, seed=1)
    for batch in training:
        parameters = {name: fresh(p) for name, p in parameters.items()}
        loss = torch.func.functional_call(net, parameters, (batch,))
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        given = dict(zip(parameters, found, strict=True))
        updates, state = transformation.update(given, state, params=parameters)
        parameters = {n: p if updates[n] is None else p + updates[n] for n, p in parameters.items()}
    return torch.func.functional_call(net, parameters, (held_out,))


def fresh(parameter: torch.Tensor) -> torch.Tensor:
    """Something that the inner gradient can be taken of: the tensor itself if it has a history."""
    if parameter.requires_grad:
        return parameter
    primal, tangent = fwAD.unpack_dual(parameter) if fwAD._current_level >= 0 else (parameter, None)
    leaf = primal.detach().requires_grad_()
    return leaf if tangent is None else fwAD.make_dual(leaf, tangent)


def five_point(function, values):
    """Fourth-order differences: error about 1e-12 at this width, rounding about 1e-13, relative to the
    loss."""
    result = torch.zeros_like(values)
    for index in range(values.numel()):
        # Widths relative to the value, and to the distance from 1 for the betas.
        value = values.view(-1)[index].item()
        width = 2e-3 * min(abs(value), abs(1 - value))
        total = 0.0
        for weight, multiple in ((1, -2), (-8, -1), (8, 1), (-1, 2)):
            moved = values.clone()
            moved.view(-1)[index] += multiple * width
            total += weight * function(moved).item()
        result.view(-1)[index] = total / (12 * width)
    return result


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_hyperparameter_has_the_derivative_of_central_differences(case, per_tensor):
    net, inner, state, keys, live = start(case)
    values = live.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(meta_loss(net, inner, state, keys, values, per_tensor), values)
    expected = five_point(lambda moved: meta_loss(net, inner, state, keys, moved).detach(), live)
    # Per relative step, as the meta-parameters take them. Reached: 4e-8 of the derivative, or 9e-12 of the
    # loss (which is of order one) where the derivative is that small; the differences' own rounding is the
    # larger part.
    scale = torch.minimum(live, (1 - live).abs())
    torch.testing.assert_close(gradient * scale, expected * scale, rtol=1e-7, atol=3e-11)


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_equals_reverse_mode(case):
    net, inner, state, keys, live = start(case)
    values = live.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(meta_loss(net, inner, state, keys, values), values)
    direction = torch.randn(live.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * live
    with fwAD.dual_level():
        value = meta_loss(net, inner, state, keys, fwAD.make_dual(live, direction))
        tangent = fwAD.unpack_dual(value).tangent
    torch.testing.assert_close(tangent, (gradient * direction).sum(), rtol=1e-10, atol=1e-13)


def dead(case: str, hyperparameters: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Loss after three steps on a quadratic that does not depend on the masked elements."""
    cls, settings = smooth(case)
    settings = {key: value for key, value in settings.items() if key not in ("lr", "weight_decay")}
    inner = inner_optimizer(cls, lr=0.1, **settings)
    transformation = inner.transformation([{"lr": hyperparameters}])
    parameters = {
        "w": torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)[: len(mask)].requires_grad_(),
        "v": torch.tensor([0.5], dtype=torch.float64).requires_grad_(),
    }
    loss = lambda p: (p["w"].square() * mask).sum() + 0.0 * p["v"].sum()  # noqa: E731
    state = transformation.init(parameters)
    for _ in range(3):
        found = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
        updates, state = transformation.update(dict(zip(parameters, found, strict=True)), state, params=parameters)
        parameters = {name: p + updates[name] for name, p in parameters.items()}
    return loss(parameters)


@pytest.mark.parametrize("case", CASES)
def test_dead_elements_leave_first_and_second_derivative_as_if_they_were_not_there(case):
    results = []
    for mask in ([1.0, 1.0, 0.0], [1.0, 1.0]):
        rate = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        value = dead(case, rate, torch.tensor(mask, dtype=torch.float64))
        (first,) = torch.autograd.grad(value, rate, create_graph=True)
        (second,) = torch.autograd.grad(first, rate)
        with fwAD.dual_level():
            dual = fwAD.make_dual(torch.tensor(0.01, dtype=torch.float64), torch.ones((), dtype=torch.float64))
            forward = fwAD.unpack_dual(dead(case, dual, torch.tensor(mask, dtype=torch.float64))).tangent
        results.append(torch.stack([value.detach(), first.detach(), second, forward.detach()]))
    assert results[0].isfinite().all()
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[0][1], results[0][3], rtol=1e-10, atol=0.0)


def test_square_root_keeps_the_value_and_has_finite_derivatives_at_zero():
    x = torch.tensor([0.0, 4.0, 1e-300], dtype=torch.float64, requires_grad=True)
    root = square_root(x)
    assert torch.equal(root, x.sqrt())
    (first,) = torch.autograd.grad(root[:2].sum(), x, create_graph=True)
    assert first.tolist() == [0.5, 0.25, 0.0]
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [-0.25, -1 / 32, 0.0]


def test_the_root_of_a_mean_square_of_zero_gradients_has_derivative_zero():
    gradient = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(square_root(0.1 * gradient.square()).sum(), gradient)
    assert first.tolist() == [0.0, 0.0]
    with fwAD.dual_level():
        dual = fwAD.make_dual(gradient.detach(), torch.ones(2).double())
        assert fwAD.unpack_dual(square_root(0.1 * dual.square())).tangent.tolist() == [0.0, 0.0]


def test_learned_betas_stay_exact_where_float32_would_not():
    """1 - 0.999**step needs float64 digits: computed in float32 the step would be 1e-5 off."""
    inner = inner_optimizer(torch.optim.Adam, lr=0.1)
    parameters = {name: torch.ones(3) for name in "ab"}
    given = {name: torch.full((3,), 2.0) for name in "ab"}
    plain = inner.with_names("ab").transformation()
    betas = {"beta1": torch.tensor(0.9).double(), "beta2": torch.tensor(0.999).double()}
    for values in (betas, {key: dict.fromkeys("ab", beta) for key, beta in betas.items()}):
        learned = inner.with_names("ab").transformation([values])
        updates, _ = learned.update(given, learned.init(parameters), params=parameters)
        expected, _ = plain.update(given, plain.init(parameters), params=parameters)
        torch.testing.assert_close(updates["a"], expected["a"], rtol=2e-7, atol=0.0)
