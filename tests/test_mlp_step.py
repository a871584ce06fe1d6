"""The hand-written step of the MLP optimizer against the same function composed of ordinary operations."""

from __future__ import annotations

import pytest
import torch

from lightning_l2l.learned import mlp_work
from lightning_l2l.learned.layout import Layout
from lightning_l2l.learned.mlp_step import _Step, mlp_step, plain_step

# Two tensors of one shape, a vector and a scalar: more than one bucket, and one with several tensors.
LAYOUT = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(2, 3), "d": torch.zeros(())})
DECAYS = torch.tensor([0.5, 0.01], dtype=torch.float64)


def inputs(tasks=3, units=4, seed=0, dtype=torch.float64, layout=LAYOUT):
    generator = torch.Generator().manual_seed(seed)
    averages, size = len(DECAYS), layout.size
    shapes = [(tasks, size), (tasks, size), (tasks, averages, size), (tasks, averages, size)]
    shapes += [(units, 2 + 4 * averages), (tasks, units), (2, units), (2,)]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    found[3] = found[3].square() + 0.1
    return [tensor.to(dtype).requires_grad_() for tensor in found]


@pytest.fixture(params=[1, 2 * LAYOUT.size, 10**6], ids=["one at a time", "two at a time", "all at once"])
def portions(request, monkeypatch):
    monkeypatch.setattr(mlp_work, "_AT_ONCE", request.param)


def assert_equals_the_composed_function(given, settings):
    found, expected = _Step.apply(*given, settings), plain_step(*given, settings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in found]
    pulled = torch.autograd.grad(found, given, slopes)
    # Other orders of summation of the same float64 numbers.
    for one, other in zip(pulled, torch.autograd.grad(expected, given, slopes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("multiplier", [0.0, 0.3])
def test_step_and_derivative_equal_the_composed_function(portions, multiplier):
    assert_equals_the_composed_function(inputs(), (LAYOUT, DECAYS, multiplier))


# One tensor only, as in a quadratic, is a view of all; one element alone is normalised by itself.
@pytest.mark.parametrize("shapes", [[(10,)], [(1,)], [()], [(1,), (1,)]], ids=str)
@pytest.mark.parametrize("kind", ["any", "zero gradient", "zero averages", "all zero", "all equal"])
def test_step_and_derivative_are_right_for_few_elements_zeros_and_equal_features(shapes, kind):
    layout = Layout.of({str(place): torch.zeros(shape) for place, shape in enumerate(shapes)})
    given = [tensor.detach() for tensor in inputs(layout=layout)]
    zeroed = {"zero gradient": [0], "zero averages": [2, 3], "all zero": [0, 1, 2, 3]}.get(kind, [])
    for place in zeroed:
        given[place].zero_()
    if kind == "all equal":
        given[:4] = [tensor[..., :1].expand_as(tensor).contiguous() for tensor in given[:4]]
    assert_equals_the_composed_function([tensor.requires_grad_() for tensor in given], (layout, DECAYS, 1.0))


def test_all_derivatives_pass_gradcheck():
    given, settings = inputs(tasks=2, units=2), (LAYOUT, DECAYS, 0.3)

    def function(*tensors):
        return _Step.apply(*tensors, settings)

    assert torch.autograd.gradcheck(function, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, given)


def alone(gradient, parameter, momenta, second_moments, weight, bias, output_weight, output_bias):
    layers = [(weight, bias), (output_weight, output_bias)]
    return mlp_step(gradient, parameter, momenta, second_moments, layers, LAYOUT, DECAYS, 0.3)


@pytest.mark.parametrize("network", [None, 0], ids=["one network", "a network for each"])
def test_batched_transforms_equal_a_loop(network):
    given = inputs()
    dims = (0, 0, 0, 0, network, 0, network, network)
    stacked = [
        torch.stack([tensor, 2 * tensor, -tensor]) if dim == 0 and place in (4, 6, 7) else tensor
        for place, (tensor, dim) in enumerate(zip(given, dims, strict=True))
    ]

    def total(*tensors):
        return sum(part.square().sum() for part in alone(*tensors))

    found = torch.func.vmap(alone, dims)(*stacked)
    slopes = torch.func.vmap(torch.func.grad(total, tuple(range(8))), dims)(*stacked)
    for task in range(3):
        own = [tensor if dim is None else tensor[task] for tensor, dim in zip(stacked, dims, strict=True)]
        for one, other in zip(found, alone(*own), strict=True):
            torch.testing.assert_close(one[task], other, rtol=1e-13, atol=1e-14)
        for one, other in zip(slopes, torch.func.grad(total, tuple(range(8)))(*own), strict=True):
            torch.testing.assert_close(one[task], other, rtol=1e-11, atol=1e-12)


def test_an_unroll_keeps_nothing_but_what_goes_in():
    given = inputs()
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        _Step.apply(*given, (LAYOUT, DECAYS, 0.3))
    assert kept
    assert all(tensor.untyped_storage().data_ptr() in known for tensor in kept)
