"""The step of the MLP optimizer, with a derivative that is written by hand.

Composed of ordinary operations, an unroll keeps about 100 numbers for each parameter and step (features, normalised
features, hidden units) and spends most of its time moving them through memory. Here only what goes in is kept, which
the unroll holds anyway; features and hidden units are made again in the backward pass, a few tasks at a time, in
buffers that stay in the cache.

:func:`plain_step` is the same function composed of ordinary operations. It is what the tests compare with, and what
takes over where the derivative is differentiated again (forward mode) or where meta-parameters are batched (particles).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.learned.features import moving_average, normalised
from lightning_l2l.learned.layout import Layout
from lightning_l2l.learned.mlp_work import ROOT_EPSILON, Work
from lightning_l2l.learned.network import combined_step

# Gradient, parameter, momenta, second moments; weight and bias of the hidden layer, weight and bias of the output.
_INPUTS, _OF_TASKS, _WEIGHTS = 8, (0, 1, 2, 3, 5), (4, 6, 7)


def mlp_step(
    gradient: Tensor,
    parameter: Tensor,
    momenta: Tensor,
    second_moments: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    layout: Layout,
    weights: Tensor,
    exponent_multiplier: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the network makes of gradient, parameter and averages, shape ``(N,)``, and the next averages.

    Differentiable as often as one likes, in both modes, and batched by ``torch.func.vmap``.

    Args:
        gradient: ``(N,)``.
        parameter: ``(N,)``.
        momenta: Before this gradient, ``(K, N)``.
        second_moments: The same.
        layers: Weight ``(units, 2 + 4 K)`` and bias ``(units,)`` of the hidden layer, with the time in the bias; weight
            ``(2, units)`` and bias ``(2,)`` of the output.
        layout: Where the tensors lie.
        weights: One minus the decays, ``(K,)``; constants.
        exponent_multiplier: See :class:`~lightning_l2l.learned.MLPOptimizer`.
    """
    (weight, bias), output = layers
    tasks = (tensor.unsqueeze(0) for tensor in (gradient, parameter, momenta, second_moments))
    settings = (layout, weights, exponent_multiplier)
    step, momenta, second_moments = _Step.apply(*tasks, weight, bias.unsqueeze(0), *output, settings)
    return step.squeeze(0), momenta.squeeze(0), second_moments.squeeze(0)


def raw_features(gradient: Tensor, parameter: Tensor, momenta: Tensor, second_moments: Tensor) -> Tensor:
    """The features before they are normalised, ``(..., 2 + 4 K, N)`` from ``(..., N)`` and ``(..., K, N)``."""
    roots = torch.rsqrt(second_moments + ROOT_EPSILON)
    first = [gradient.unsqueeze(-2), momenta * roots, parameter.unsqueeze(-2)]
    return torch.cat([*first, momenta, second_moments, roots], dim=-2)


def plain_step(
    gradient: Tensor,
    parameter: Tensor,
    momenta: Tensor,
    second_moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    settings: tuple[Layout, Tensor, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mlp_step` for ``B`` tasks: ``(B, N)``, averages ``(B, K, N)``, and a bias ``(B, units)`` for each."""
    layout, weights, exponent_multiplier = settings
    momenta, second_moments = (
        moving_average(average.movedim(-2, 0), value, weights).movedim(0, -2)
        for average, value in ((momenta, gradient), (second_moments, gradient.square()))
    )
    raw = raw_features(gradient, parameter, momenta, second_moments)
    values = torch.relu(weight @ normalised(raw, layout) + bias.unsqueeze(-1))
    direction, magnitude = (output_weight @ values + output_bias.unsqueeze(-1)).unbind(-2)
    return combined_step(direction, magnitude, exponent_multiplier), momenta, second_moments


def _plain(settings: Any) -> Callable[..., Any]:
    """:func:`plain_step` of the tensors alone."""
    return lambda *inputs: plain_step(*inputs, settings)  # type: ignore[call-arg]  # eight of them


def _plain_pullback(settings: Any) -> Callable[..., Any]:
    """Three slopes and the inputs to the slopes of the inputs."""
    return lambda *tensors: torch.func.vjp(_plain(settings), *tensors[3:])[1](tensors[:3])


class _Step(torch.autograd.Function):
    """:func:`plain_step` in portions; nothing but its inputs is kept."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, settings = arguments[:_INPUTS], arguments[_INPUTS]
        found = tuple(torch.empty_like(inputs[place]) for place in (0, 2, 3))
        work = Work(inputs, *settings, derivative=False)
        for tasks in work.portions():
            work.step(tasks, found)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:_INPUTS])
        ctx.save_for_forward(*inputs[:_INPUTS])
        ctx.settings = inputs[_INPUTS]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return (*_Pullback.apply(*slopes, *ctx.saved_tensors, ctx.settings), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        primals = tuple(ctx.saved_tensors)
        pairs = zip(primals, tangents[:_INPUTS], strict=True)
        filled = tuple(torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs)
        # Forward mode cannot be nested (torch 2.13), so this is a reverse pass through a reverse pass.
        found, pull = torch.func.vjp(_plain(ctx.settings), *primals)[:2]
        return torch.func.vjp(pull, tuple(torch.zeros_like(one) for one in found))[1](filled)[0]

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        if any(dims[place] is not None for place in _WEIGHTS):
            return torch.func.vmap(_plain(arguments[-1]), dims[:-1])(*arguments[:-1]), (0,) * 3
        # More tasks: another batch dimension is folded into the first one.
        given = list(arguments)
        for place in _OF_TASKS:
            tensor, dim = given[place], dims[place]
            batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            given[place] = batched.flatten(0, 1)
        return tuple(found.unflatten(0, (info.batch_size, -1)) for found in _Step.apply(*given)), (0,) * 3


class _Pullback(torch.autograd.Function):
    """Vectors times the derivative of :class:`_Step` with respect to each input."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        slopes, inputs, settings = arguments[:3], arguments[3:-1], arguments[-1]
        of_tasks = [torch.empty_like(tensor) for tensor in inputs[:4]]
        work = Work(inputs, *settings, derivative=True)
        for tasks in work.portions():
            work.pull(tasks, slopes, of_tasks)
        return (*of_tasks, *work.of_network())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.settings = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        pull = torch.func.vjp(_plain_pullback(ctx.settings), *ctx.saved_tensors)[1]
        return (*pull(slopes), None)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return torch.func.vmap(_plain_pullback(arguments[-1]), dims[:-1])(*arguments[:-1]), (0,) * _INPUTS
