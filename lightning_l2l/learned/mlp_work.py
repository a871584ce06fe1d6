"""The arithmetic of the MLP optimizer's step and of its derivative, in buffers that are used again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_l2l.learned.layout import Layout
from lightning_l2l.learned.network import combined_step

ROOT_EPSILON = 1e-6
_NORMALISATION_EPSILON = 1e-5
# Parameters that are worked on at once on a CPU. Measured with 2410 parameters per task and one megabyte of
# second-level cache: 4 to 8 tasks at once are best, 32 take a third longer.
_AT_ONCE = 20_000


class Work:
    """Features and hidden units of a few tasks, the step that they make, and the derivative of that step.

    A last feature and a last hidden unit are constant one, so that biases are columns of the weights.

    Args:
        inputs: Gradient, parameter, momenta, second moments, weight, bias, output weight, output bias; shapes as for
            :func:`~lightning_l2l.learned.mlp_step.plain_step`.
        layout: Where the tensors lie.
        weights: One minus the decays, ``(K,)``.
        multiplier: The exponent multiplier.
        derivative: Whether :meth:`pull` will be called, :meth:`step` otherwise.
    """

    def __init__(
        self, inputs: Sequence[Tensor], layout: Layout, weights: Tensor, multiplier: float, *, derivative: bool
    ) -> None:
        weight, bias, output_weight, output_bias = inputs[4:]
        self._tasks, self._layout, self._multiplier = inputs[:4], layout, multiplier
        self._count, size, averages = len(inputs[0]), inputs[0].shape[1], inputs[2].shape[1]
        ends = [1, 1 + averages, 2 + averages, 2 + 2 * averages, 2 + 3 * averages, 2 + 4 * averages]
        self._mr, self._p, self._m, self._v, self._r = (slice(*pair) for pair in pairwise(ends))
        features, units = ends[-1], len(weight)
        self._weights = weights.to(inputs[0].device, inputs[0].dtype).reshape(-1, 1)
        self._weight = torch.cat([weight.expand(self._count, -1, -1), bias.unsqueeze(-1)], dim=-1)
        self._output_weight = torch.cat([output_weight, output_bias.unsqueeze(-1)], dim=-1)
        at_once = max(1, _AT_ONCE // size) if weight.device.type == "cpu" else self._count
        self._at_once = min(at_once, self._count)

        def buffer(rows: int) -> Tensor:
            return inputs[0].new_empty(self._at_once, rows, size)

        self._feature, self._unit, self._product = buffer(features + 1), buffer(units + 1), buffer(features)
        self._feature[:, -1], self._unit[:, -1] = 1.0, 1.0
        if derivative:
            self._averages = buffer(averages), buffer(averages)
            self._of_feature, self._of_unit = buffer(features), buffer(units)
            # Transposed: that way around the product over the parameters takes half the time (MKL, 32 units).
            self._of_weight = torch.empty_like(self._weight.mT, memory_format=torch.contiguous_format)
            self._of_output_weight = torch.zeros_like(self._output_weight)

    def portions(self) -> list[slice]:
        """The tasks that are worked on at once."""
        starts = range(0, self._count, self._at_once)
        return [slice(start, min(start + self._at_once, self._count)) for start in starts]

    def step(self, tasks: slice, found: Sequence[Tensor]) -> None:
        """Writes the step of these tasks and their next averages to ``found``."""
        step, momenta, second_moments = (tensor[tasks] for tensor in found)
        self._average(tasks, momenta, second_moments)
        direction, magnitude = self._outputs(tasks, momenta, second_moments).unbind(1)
        step.copy_(combined_step(direction, magnitude, self._multiplier))

    def _average(self, tasks: slice, momenta: Tensor, second_moments: Tensor) -> None:
        gradient, _, old_momenta, old_second_moments = (tensor[tasks] for tensor in self._tasks)
        for old, value, new in (
            (old_momenta, gradient, momenta),
            (old_second_moments, gradient.square(), second_moments),
        ):
            torch.lerp(old, value.unsqueeze(1).expand_as(old), self._weights, out=new)

    def _outputs(self, tasks: slice, momenta: Tensor, second_moments: Tensor) -> Tensor:
        """The outputs of the network, ``(tasks, 2, N)``; features and units stay in the buffers."""
        count = len(momenta)
        feature, unit = self._feature[:count], self._unit[:count]
        feature[:, 0], feature[:, self._p] = self._tasks[0][tasks], self._tasks[1][tasks].unsqueeze(1)
        feature[:, self._m], feature[:, self._v] = momenta, second_moments
        roots = torch.add(second_moments, ROOT_EPSILON, out=feature[:, self._r]).rsqrt_()
        torch.mul(momenta, roots, out=feature[:, self._mr])
        self._scales = []
        parts = (self._layout.split(rows) for rows in (feature[:, :-1], self._product[:count]))
        for value, product in zip(*parts, strict=True):
            scale = torch.mul(value, value, out=product).mean(-1, keepdim=True).add_(_NORMALISATION_EPSILON).rsqrt_()
            value.mul_(scale)
            self._scales.append(scale)
        torch.bmm(self._weight[tasks], feature, out=unit[:, :-1]).clamp_(min=0.0)
        return torch.bmm(self._output_weight.expand(count, -1, -1), unit)

    def pull(self, tasks: slice, slopes: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Pulls the derivatives for what :meth:`step` gives back to what went in.

        Those for the tasks are written to ``found``, those for the network are added in :meth:`of_network`.
        """
        count = tasks.stop - tasks.start
        momenta, second_moments = (average[:count] for average in self._averages)
        self._average(tasks, momenta, second_moments)
        outputs = self._outputs(tasks, momenta, second_moments)
        feature, unit = self._feature[:count], self._unit[:count]
        of_output = self._through_step(outputs, slopes[0][tasks])
        self._of_output_weight += torch.bmm(of_output, unit.transpose(1, 2)).sum(0)
        weight = self._output_weight[:, :-1].t().expand(count, -1, -1)
        of_unit = torch.bmm(weight, of_output, out=self._of_unit[:count])
        torch.ops.aten.threshold_backward.grad_input(of_unit, unit[:, :-1], 0, grad_input=of_unit)
        torch.bmm(feature, of_unit.transpose(1, 2), out=self._of_weight[tasks])
        weight = self._weight[tasks, :, :-1].transpose(1, 2)
        of_feature = torch.bmm(weight, of_unit, out=self._of_feature[:count])
        self._through_normalisation(feature[:, :-1], of_feature, self._product[:count])
        self._through_averages(tasks, of_feature, slopes, found)

    def _through_step(self, outputs: Tensor, slope: Tensor) -> Tensor:
        if self._multiplier == 0:
            return torch.stack([slope, torch.zeros_like(slope)], dim=1)
        scaled = slope * torch.exp(self._multiplier * outputs[:, 1])
        return torch.stack([scaled, scaled * outputs[:, 0] * self._multiplier], dim=1)

    def _through_normalisation(self, feature: Tensor, of_feature: Tensor, product: Tensor) -> None:
        """In place; for ``y = s x``, ``s = (eps + mean(x**2))**-1/2``, that is ``s (dy - y mean(y dy))``."""
        torch.mul(feature, of_feature, out=product)
        split = [self._layout.split(tensor) for tensor in (feature, of_feature, product)]
        for value, slope, both, scale in zip(*split, self._scales, strict=True):
            slope.addcmul_(value, both.mean(-1, keepdim=True), value=-1.0).mul_(scale)

    def _through_averages(
        self, tasks: slice, of_feature: Tensor, slopes: Sequence[Tensor], found: Sequence[Tensor]
    ) -> None:
        count = len(of_feature)
        momenta, second_moments = (average[:count] for average in self._averages)
        of_gradient, of_parameter, of_momenta, of_second_moments = (tensor[tasks] for tensor in found)
        of_product, of_root = of_feature[:, self._mr], of_feature[:, self._r]
        of_root.addcmul_(of_product, momenta)
        roots = second_moments.add_(ROOT_EPSILON).rsqrt_()
        torch.addcmul(of_feature[:, self._m], of_product, roots, out=of_momenta).add_(slopes[1][tasks])
        # The derivative of (v + eps)**-1/2 is -1/2 times its third power.
        of_root.mul_(roots).mul_(roots).mul_(roots)
        torch.sub(of_feature[:, self._v], of_root, alpha=0.5, out=of_second_moments).add_(slopes[2][tasks])
        rows = self._weights.t().expand(count, -1, -1)
        torch.baddbmm(of_feature[:, :1], rows, of_momenta, out=of_gradient.unsqueeze(1))
        of_gradient.addcmul_(torch.bmm(rows, of_second_moments).squeeze(1), self._tasks[0][tasks], value=2.0)
        of_parameter.unsqueeze(1).copy_(of_feature[:, self._p])
        of_momenta.mul_(1.0 - self._weights)
        of_second_moments.mul_(1.0 - self._weights)

    def of_network(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The derivatives for weights and biases, in the order of the inputs."""
        hidden, output = self._of_weight, self._of_output_weight
        weight, bias = hidden[:, :-1].sum(0).t().contiguous(), hidden[:, -1].clone()
        return weight, bias, output[:, :-1].clone(), output[:, -1].clone()
