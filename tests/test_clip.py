"""Clipping: torch.nn.utils' numbers, with the derivative through the norm."""

from __future__ import annotations

import math

import pytest
import torch
import torch.autograd.forward_ad as fwAD

from lightning_l2l.exact.clip import clip_gradient_norm, clip_gradient_value

NORM_TYPES = [1.0, 1.5, 2.0, 3.0, math.inf]


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 2), "b": (4,), "c": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def apply(transformation, gradients):
    return transformation.update(gradients, transformation.init(gradients), inplace=False)[0]


def by_torch(gradients, clip):
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    clip(parameters)
    return {name: parameter.grad for name, parameter in zip(gradients, parameters, strict=True)}


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_clipping_equals_torch(max_norm, norm_type, dtype):
    gradients = draw(dtype)
    expected = by_torch(gradients, lambda p: torch.nn.utils.clip_grad_norm_(p, max_norm, norm_type))
    found = apply(clip_gradient_norm(max_norm, norm_type), gradients)
    for name in gradients:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("value", [0.0, 0.5, 100.0])
def test_value_clipping_equals_torch(value):
    gradients = draw()
    expected = by_torch(gradients, lambda p: torch.nn.utils.clip_grad_value_(p, value))
    found = apply(clip_gradient_value(value), gradients)
    for name in gradients:
        assert torch.equal(found[name], expected[name])


def flat(transformation):
    def function(x):
        found = apply(transformation, {"a": x[:6].view(3, 2), "none": None, "b": x[6:]})
        return torch.cat([found["a"].reshape(-1), found["b"]])

    return function


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_clipping_is_differentiable_through_the_norm_twice_and_forwards(norm_type):
    x = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    function = flat(clip_gradient_norm(0.5, norm_type))
    # gradcheck's own central differences in float64, reverse and forward; at default tolerances (1e-5, 1e-3).
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)
    # Scaling the input does not change a clipped gradient (but for the 1e-6 in the formula): J x = 0. A norm
    # taken as constant, as torchopt 0.7.3 does, would give J x = the clipped gradient.
    jacobian = torch.autograd.functional.jacobian(function, x)
    assert (jacobian @ x).norm() < 1e-5


def test_value_clipping_is_differentiable():
    x = torch.tensor([0.3, -0.2, 0.9, -3.0], dtype=torch.float64, requires_grad=True)
    clipped = apply(clip_gradient_value(0.5), {"x": x, "none": None})
    assert clipped["none"] is None
    assert torch.autograd.grad(clipped["x"].sum(), x)[0].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_zero_gradients_leave_every_derivative_finite(norm_type):
    """A parameter with a zero gradient among others, and all of them zero."""
    clip = clip_gradient_norm(0.5, norm_type)
    for factor in (0.0, 1.0):
        dead = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        other = (factor * torch.tensor([2.0, -1.0], dtype=torch.float64)).requires_grad_()
        found = apply(clip, {"dead": dead, "other": other})
        loss = (found["dead"] + 1.0).square().sum() + found["other"].square().sum()
        first = torch.autograd.grad(loss, [dead, other], create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), [dead, other], allow_unused=True)
        assert all(g.isfinite().all() for g in (*first, *(s for s in second if s is not None)))
        with fwAD.dual_level():
            dual = fwAD.make_dual(dead.detach(), torch.ones_like(dead))
            tangent = fwAD.unpack_dual(apply(clip, {"dead": dual, "other": other.detach()})["dead"]).tangent
        assert tangent.isfinite().all()
        if factor == 0.0:  # nothing to clip: the identity
            assert torch.equal(tangent, torch.ones_like(dead))


def test_nothing_to_clip_and_nothing_in_place():
    clip = clip_gradient_norm(1.0)
    assert apply(clip, {"a": None}) == {"a": None}
    gradient = torch.full((2,), 5.0)
    clip.update({"a": gradient}, (), inplace=True)
    assert gradient.tolist() == [5.0, 5.0]


def test_mixed_dtypes_keep_theirs():
    found = apply(clip_gradient_norm(1.0), {"a": torch.ones(2).bfloat16(), "b": torch.ones(2).double()})
    assert found["a"].dtype == torch.bfloat16 and found["b"].dtype == torch.float64


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_senseless_limits_are_refused(bad):
    with pytest.raises(ValueError, match="max_norm must be 0 or more"):
        clip_gradient_norm(bad)
    with pytest.raises(ValueError, match="value must be 0 or more"):
        clip_gradient_value(bad)
    with pytest.raises(ValueError, match="norm_type must be above 0"):
        clip_gradient_norm(1.0, bad)
