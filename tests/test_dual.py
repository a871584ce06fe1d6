"""Dual numbers against the two reverse passes that they replace, and neighbours in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mirror import CASES, Net, batches, gradients, grouped, train

from lightning_l2l.exact.clip import clip_gradient_norm
from lightning_l2l.exact.inner_step import InnerStep
from lightning_l2l.exact.neighbours import mapped, merged
from lightning_l2l.exact.update_derivative import Movement, UpdateDerivative
from lightning_l2l.functional import inner_optimizer, mirror, read_state, register_mirror
from lightning_l2l.functional.dual import Dual
from lightning_l2l.functional.rule import Rule
from lightning_l2l.learned import LearnedHyperparameters

NAMES = {"lr": "learning_rate"}


def problem(case, per, clipping=None, steps=5, use=True):
    """A live optimizer after some steps, and everything that its next step moves along, in two directions."""
    cls, settings_ = CASES[case]
    net = Net()
    optimizer = grouped(net, cls, settings_)
    train(net, optimizer, batches(steps))
    inner = mirror(optimizer, net.named_parameters())
    values = inner.groups[0].hyperparameters
    keys = [NAMES.get(k, k) for k in inner.rule.learnable if k != "lr_decay" and values[k] != 0]
    learned = LearnedHyperparameters(learn=keys, per=per).attach(inner)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for offset in learned.parameters():
            offset.add_(0.1 * torch.randn(offset.shape, generator=generator, dtype=torch.float64))
    step = InnerStep(lambda tensors, batch: torch.func.functional_call(net, dict(tensors), (batch,)), learned, clipping)
    iterate = step.start(dict(net.named_parameters()), read_state(optimizer, net.named_parameters()), {})
    found = gradients(net, iterate.parameters, {**batches(1, seed=1)[0], "use": use})
    draw = lambda tensor: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)  # noqa: E731
    directions = [(name, place) for name, offset in learned.named_parameters() for place in range(len(offset))]
    movements = [
        Movement(
            [draw(leaf) for leaf in iterate.leaves()] if moving else None,
            {name: None if g is None or not moving else draw(g) for name, g in found.items()},
            torch.tensor(0.25, dtype=torch.float64),
        )
        for _ in directions
        for moving in (True, False)
    ]
    twice = [direction for direction in directions for _ in (True, False)]
    return step, twice, (iterate, found, movements)


def both_ways(monkeypatch, step, directions, arguments):
    fast = UpdateDerivative(step, directions).moved_along(*arguments)
    monkeypatch.setattr(type(step.learned), "dual_step", lambda *_: None)
    return fast, UpdateDerivative(step, directions).moved_along(*arguments)


@pytest.mark.parametrize("per", ["optimizer", "group", "tensor"])
@pytest.mark.parametrize("case", CASES)
def test_dual_numbers_equal_two_reverse_passes(case, per, monkeypatch):
    (fast, fast_tangents), (slow, slow_tangents) = both_ways(monkeypatch, *problem(case, per))
    for found, expected in zip(fast.leaves(), slow.leaves(), strict=True):
        # The same torch calls, so the same bits.
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert any(t.abs().max() > 1e-3 for tangents in slow_tangents for t in tangents)
    for found, expected in zip(fast_tangents, slow_tangents, strict=True):
        for left, right in zip(found, expected, strict=True):
            # float64; some derivatives are differences of larger terms.
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "rmsprop-centered", "nadam"])
def test_the_first_step_and_a_missing_gradient_have_the_right_derivative_too(case, monkeypatch):
    (fast, fast_tangents), (slow, slow_tangents) = both_ways(monkeypatch, *problem(case, "group", steps=0, use=False))
    for found, expected in zip([fast.leaves(), *fast_tangents], [slow.leaves(), *slow_tangents], strict=True):
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam"])
def test_clipping_has_the_right_derivative_before_dual_numbers(case, monkeypatch):
    arguments = problem(case, "group", clip_gradient_norm(0.5))
    (fast, fast_tangents), _ = both_ways(monkeypatch, *arguments)
    # The oracle clips inside the update, so that one graph holds both.
    from lightning_l2l.exact.linearised_update import LinearisedUpdate

    step, directions, (iterate, found, movements) = arguments
    meta = {name: offset.detach() for name, offset in step.learned.named_parameters()}
    update = LinearisedUpdate(step, iterate, found, meta)
    for (name, place), movement, tangents in zip(directions, movements, fast_tangents, strict=True):
        unit = torch.zeros_like(meta[name])
        unit[place] = movement.by
        expected = update.along(movement.leaves, movement.gradients, {name: unit})
        for left, right in zip(tangents, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)
    for left, right in zip(fast.leaves(), update.following.leaves(), strict=True):
        assert torch.equal(left, right)


def test_a_lone_scalar_parameter_keeps_its_dtype():
    inner = inner_optimizer(torch.optim.Adam, lr=0.1)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer = inner.transformation([{"lr": rate}])
    parameters = {"w": torch.tensor(1.0)}
    updates, _ = optimizer.update({"w": torch.tensor(1.0)}, optimizer.init(parameters), params=parameters)
    assert updates["w"].dtype == torch.float32


def test_an_operation_without_a_derivative_is_an_error_and_not_a_zero():
    class Sine(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

    def sine(parameter, gradient, state, hyperparameters):
        return torch.sin(gradient) * -hyperparameters["lr"], dict(state)

    def tangents(dual_numbers):
        register_mirror(Sine, Rule(sine, defaults={"lr": 0.1}, dual_numbers=dual_numbers))
        learned = LearnedHyperparameters(learn=("learning_rate",)).attach(inner_optimizer(Sine))
        step = InnerStep(lambda tensors, batch: tensors["w"].square().sum(), learned)
        iterate = step.start({"w": torch.ones(2)}, None, {})
        one = torch.tensor(1.0, dtype=torch.float64)
        movement = Movement(None, {"w": None}, one)
        return UpdateDerivative(step).moved_along(iterate, {"w": torch.ones(2)}, [movement])

    with pytest.raises(TypeError, match="sin has no derivative"):
        tangents(dual_numbers=True)
    _, ((moved,),) = tangents(dual_numbers=False)
    torch.testing.assert_close(moved, -0.1 * torch.ones(2).sin())


@pytest.mark.parametrize("function", [torch.exp, torch.expm1, lambda x: x**3, lambda x: 2.0 / x, lambda x: 1.0 - x])
def test_functions_of_one_dual_have_the_derivative_of_autograd(function):
    point = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    found = function(Dual(point.detach(), (torch.ones_like(point), None)))
    (expected,) = torch.autograd.grad(function(point).sum(), point)
    torch.testing.assert_close(found.tangents[0], expected)
    assert found.tangents[1] is None or not found.tangents[1].any()


shapes = st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shapes, st.randoms(use_true_random=False), st.booleans())
def test_functions_of_merged_tensors_are_those_of_each(shapes, random, together):
    tensors = [torch.randn(shape) for shape in shapes]
    if together:
        whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
        parts = whole.split([tensor.numel() for tensor in tensors])
        tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    random.shuffle(tensors)
    found = mapped(tensors, lambda vectors: [vector * 2 for vector in vectors])
    for left, right in zip(found, tensors, strict=True):
        assert torch.equal(left, right * 2) and left.shape == right.shape
    assert sum(vector.numel() for vector in merged(tensors)) == sum(tensor.numel() for tensor in tensors)
    if together:
        assert len([vector for vector in merged(tensors) if vector.numel()]) <= 1


def test_tensors_of_different_storages_are_never_merged_even_side_by_side():
    whole = torch.arange(4.0)
    first = torch.empty(0).set_(whole.untyped_storage(), 0, (2,))
    alone = torch.frombuffer(bytearray(8), dtype=torch.float32)
    assert len(merged([first, alone])) == 2
    transposed = torch.arange(6.0).view(2, 3).t()
    assert len(merged([transposed, alone])) == 2
