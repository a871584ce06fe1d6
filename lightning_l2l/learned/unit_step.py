"""A rule to take as it is: a small network that corrects Adam's direction, with steps of a known size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.learned.coordinatewise import (
    CoordinateNetwork,
    CoordinatewiseOptimizer,
    State,
    constant,
    moving_average,
)
from lightning_l2l.learned.layout import Layout, SameShape

_MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
_SECOND_MOMENT_DECAYS = (0.95, 0.999)
_COORDINATE_FEATURES, _TENSOR_FEATURES = 13, 8
# Elements of each thread's share of a piece: what is computed of so many fits into its caches.
_PIECE = 2**15


class UnitStepOptimizer(CoordinatewiseOptimizer):
    r"""Adam's direction, corrected by two layers of eight units, in steps whose size per tensor is normalised.

    For each number ``p`` with gradient ``g``: momenta ``m`` (decays 0.9, 0.99, 0.999) and second moments ``v`` (0.95,
    0.999), all with bias correction, and ``f``, the factored form of ``v`` (from its means over rows and columns). Of a
    coordinate the network sees

    ``m (3), g, p, m / sqrt(v_0.999) (3), g / sqrt(v_0.999), m_0.9 / sqrt(v_0.95), g / sqrt(f), m_0.9 / sqrt(f),
    sqrt(v_0.999)``   (13, each divided by its root mean square over the tensor),

    of its tensor the root mean squares of ``m / sqrt(v_0.999)`` (3: how much of the gradient is signal), the cosines of
    ``g`` with the momenta before it (2) and of the momenta among each other (1), whether it is a matrix, and the
    logarithm of the root mean square of ``p``. With the outputs d and a

    ``p <- p - step_multiplier * exp(mean(a)) * u / rms(u)``,   ``u = m_0.9 / sqrt(v_0.999) / rms(...) + d``,

    the means over the tensor. With the last layer at zero, as it is drawn, that is Adam with steps of unit size.

    When it helps: where no rate has been tuned. ``LearnedOptimizer.pretrained("unit_step")`` was meta-trained with a
    linear schedule on trainings of 60 to 400 steps of small networks (8 x 8 digits, text, random teachers) by
    ``python examples/pretrained/train.py``, seed 0 (six minutes of one core; done twice, with the same weights to the
    last bit). At ``lr=1`` and with that schedule, on ten networks and data sets that it had not seen together, 300 and
    1000 steps (``python examples/pretrained/compare.py --seeds 2``), its test loss was 1.05 times (median) that of
    AdamW at the best of eleven rates *for each task*, from 0.51 (convnet with BatchNorm) to 2.3 (matrix factorisation),
    and below that of AdamW at 1e-3 on 15 of 20. So it is **not better than a tuned AdamW**. It overfits small tables:
    1.2 and 1.6 on 265 rows (diabetes), and on 106 rows that AdamW separates (wine) the test loss was 0.22 and 0.16
    instead of 0.0001 and 0.02. On five other tasks it was better than untrained (Adam with steps of one size) at 300
    steps, and worse at 1000. Longer trainings and larger networks were not tried.

    Cost: 13 features, computed twice, and two small layers for each number: for a million parameters 15 times a step of
    AdamW (foreach) as one matrix, 14 times as 57 tensors, on one thread (``tests/benchmarks/cost.py --part step``).
    Where it is differentiated, several times that. State: five numbers per parameter.

    Args:
        hidden_size: Units in each of the two hidden layers.
        step_multiplier: Root mean square of a step at ``lr=1``, where a is 0.

    Raises:
        ValueError: A size below 1, or a multiplier that is not positive.

    Source: normalised steps and the size of the network as in Celo2 (arXiv 2602.19142); that the network corrects
    Adam's direction, and the features of a tensor, are ours.

    Example:
        >>> learned = UnitStepOptimizer()
        >>> sum(parameter.numel() for parameter in learned.parameters())
        266
        >>> parameters = {"w": torch.randn(3, 2), "b": torch.randn(3)}
        >>> optimizer = learned.transformation()
        >>> updates, _ = optimizer.update(parameters, optimizer.init(parameters), params=parameters)
        >>> round(updates["w"].square().mean().sqrt().item(), 4)
        0.006
    """

    elements_at_once = 2**20  # step_ cuts them itself

    def __init__(self, hidden_size: int = 8, step_multiplier: float = 6e-3) -> None:
        super().__init__(step_multiplier, normalise_output=False)
        self.hidden_size = hidden_size
        sizes = (_COORDINATE_FEATURES + _TENSOR_FEATURES, hidden_size, hidden_size, 2)
        self.network = CoordinateNetwork(sizes, "zero_output")
        self._momentum_weights = constant([1.0 - decay for decay in _MOMENTUM_DECAYS])
        self._second_moment_weights = constant([1.0 - decay for decay in _SECOND_MOMENT_DECAYS])

    def configuration(self) -> dict[str, Any]:
        """The arguments that make such an optimizer."""
        return {"hidden_size": self.hidden_size, "step_multiplier": self.step_multiplier}

    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """``"momenta"``, shape ``(3, N)``, and ``"second_moments"``, ``(2, N)``."""
        return {"momenta": like.new_zeros(3, layout.size), "second_moments": like.new_zeros(2, layout.size)}

    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """See :class:`CoordinatewiseOptimizer`."""
        momenta = moving_average(state["momenta"], gradient, self._momentum_weights)
        second_moments = moving_average(state["second_moments"], gradient.square(), self._second_moment_weights)
        count = state["step"] + 1
        unbiased = [
            _unbiased(m, w, count)
            for m, w in ((momenta, self._momentum_weights), (second_moments, self._second_moment_weights))
        ]
        given = (layout.split(rows) for rows in (gradient[None], parameter[None], state["momenta"], *unbiased))
        found = [_features(part, *tensors) for part, *tensors in zip(layout.parts, *given, strict=True)]
        direction, magnitude = self.network(layout.join([features for features, _ in found])).unbind(0)
        steps = []
        for d, a, (_, adam) in zip(layout.split(direction), layout.split(magnitude), found, strict=True):
            moved = adam + d
            size = torch.exp(a.mean(-1, keepdim=True).clamp(-3.0, 3.0))
            steps.append(moved * size * _inverse_rms(moved))
        return layout.join(steps), {"momenta": momenta, "second_moments": second_moments}

    def step_(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """The same in pieces that fit into the caches, with the averages in place.

        Corrections of bias, normalisation and features of a tensor are factors and biases of the first layer.
        """
        moved = torch.empty_like(gradient)
        given = (gradient, parameter, state["momenta"], state["second_moments"], moved)
        for part, *rows in zip(layout.parts, *map(layout.split, given), strict=True):
            self._step_part(part, rows, state["step"] + 1)
        return moved, state

    def _step_part(self, part: SameShape, rows: list[Tensor], count: Tensor) -> None:
        """For tensors of one shape; the rows are gradient, parameter, momenta, second moments and where the step goes.

        Three passes: the averages; the mean squares of the features; the network. What they compute of a piece is
        written into the same few buffers: fresh memory costs as much as the arithmetic.
        """
        like, tensors = rows[0], len(part.names)
        width = part.size if like.device.type != "cpu" else max(1, _PIECE * torch.get_num_threads() // tensors)
        pieces = list(zip(*(torch.split(row, width, dim=-1) for row in rows), strict=True))
        decays = [weights.to(like)[:, None, None] for weights in (self._momentum_weights, self._second_moment_weights)]
        buffers = [_Buffers(like, self.hidden_size, tensors, min(width, part.size))]
        buffers = buffers * (len(pieces) - 1) + [buffers[0].narrowed(pieces[-1][0].shape[-1])]
        past = like.new_empty(2, len(pieces), 2, tensors)
        for buffer, (g, _, m, v, _), products, norms in zip(buffers, pieces, *past, strict=True):
            torch.sum(torch.mul(g, m[:2], out=buffer.roots), -1, out=products)
            torch.linalg.vector_norm(m[:2], dim=-1, out=norms)
            m.lerp_(g.expand_as(m), decays[0])
            v.lerp_(torch.mul(g, g, out=buffer.root).expand_as(v), decays[1])

        shares, second_shares = (
            _share(weights, count).to(like)[:, None]
            for weights in (self._momentum_weights, self._second_moment_weights)
        )
        second = rows[3][1:]
        mean = second.mean(-1) / second_shares[1:]
        floors = (second_shares * (1e-6 * mean + 1e-24)).unsqueeze(-1)
        factored = _factored_root(part, second, second_shares[1:, :, None])[0].split(width, dim=-1)
        norms, across = like.new_empty(len(pieces), _COORDINATE_FEATURES, tensors), like.new_empty(len(pieces), tensors)
        for index, (buffer, piece, ratio) in enumerate(zip(buffers, pieces, factored, strict=True)):
            g, p, m, v, _ = piece
            features = buffer.products(g, p, m, v, floors, ratio)
            torch.linalg.vector_norm(features, dim=-1, out=norms[index])
            torch.sum(torch.mul(features[0], features[2], out=buffer.root), -1, out=across[index])

        scale = torch.rsqrt(mean + 1e-24)
        units = _units(scale, shares, second_shares)
        sums = torch.cat([norms.square().sum(0), across.sum(0, keepdim=True)]) / part.size
        along = torch.cat([past[0].sum(0), past[1].square().sum(0)]) / part.size
        weight, bias, adam = self._first_layer(part, units, scale, sums, along)
        (second_weight, second_bias), (last_weight, last_bias) = (
            (weight.to(like).expand(tensors, -1, -1), bias.to(like)[:, None].expand(tensors, -1, 1))
            for weight, bias in zip(self.network.weights[1:], self.network.biases[1:], strict=True)
        )
        norms, sizes = like.new_empty(len(pieces), tensors), like.new_empty(len(pieces), tensors)
        for index, (buffer, piece, ratio) in enumerate(zip(buffers, pieces, factored, strict=True)):
            g, p, m, v, moved = piece
            features = buffer.products(g, p, m, v, floors, ratio)
            torch.baddbmm(bias, weight, buffer.by_tensor, out=buffer.first)
            torch.baddbmm(second_bias, second_weight, buffer.first.relu_(), out=buffer.second)
            torch.baddbmm(last_bias, last_weight, buffer.second.relu_(), out=buffer.outputs)
            torch.addcmul(buffer.direction, features[5], adam, out=moved)
            torch.linalg.vector_norm(moved, dim=-1, out=norms[index])
            torch.sum(buffer.magnitude, -1, out=sizes[index])
        size, square = sizes.sum(0) / part.size, norms.square().sum(0) / part.size
        rows[-1].mul_((torch.exp(size.clamp(-3.0, 3.0)) * torch.rsqrt(square + 1e-12)).unsqueeze(-1))

    def _first_layer(
        self, part: SameShape, units: Tensor, scale: Tensor, sums: Tensor, along: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and bias for the products of :func:`_products`, and the factor of that which is Adam's direction.

        Args:
            part: The tensors.
            units: What the products are to be multiplied by, ``(13, tensors)``.
            scale: ``mean(v)**-1/2``, ``(1, tensors)``.
            sums: The products' mean squares (13), and the mean product of the first and the last momentum.
            along: The mean products of the gradient with two momenta before it (2), and their mean squares (2).
        """
        inverse = torch.rsqrt(units.square() * sums[:-1] + _floor(units[:, 0])[:, None])
        factors = units * inverse
        cosines = along[:2] * scale.square() * inverse[3:4] * torch.rsqrt(along[2:] * scale.square() + 1e-12)
        across = sums[-1:] * factors[:1] * factors[2:3]
        matrix = torch.full_like(scale, float(len(part.shape) > 1))
        of_tensor = torch.cat([1.0 / inverse[5:8], cosines, across, matrix, -0.3 * torch.log(inverse[4:5])])
        weight, bias = self.network.weights[0].to(units), self.network.biases[0].to(units)
        constant = weight[:, _COORDINATE_FEATURES:] @ of_tensor + bias[:, None]
        folded = weight[:, :_COORDINATE_FEATURES] * factors.t().unsqueeze(1)
        return folded, constant.t().unsqueeze(-1), factors[5].unsqueeze(-1)


def _share(weights: Tensor, count: Tensor) -> Tensor:
    """``1 - decay**count``, from the logarithm of the decay: exact for decays near 1."""
    return -torch.expm1(torch.log1p(-weights.to(count.device)) * count)


def _units(scale: Tensor, shares: Tensor, second_shares: Tensor) -> Tensor:
    """The factors that make features of the products: corrections of bias, and the scale of the loss."""
    roots, first, one = second_shares.sqrt(), 1.0 / shares[:1], torch.ones_like(scale)
    adam = [roots[1:] / shares * one, roots[1:] * one, roots[:1] * first * one]
    return torch.cat([scale / shares, scale, one, *adam, one, first * one, scale / roots[1:]])


def _floor(like: Tensor) -> Tensor:
    """Under the mean squares of the features. Biases start at zero: divided by their size they would be too steep."""
    floor = torch.full_like(like, 1e-12)
    floor[4] = 1e-3
    return floor


class _Buffers:
    """Where what is computed of a piece is written, and the views of it that are used.

    Attributes:
        features: ``(13, tensors, width)``.
        by_tensor: The same, ``(tensors, 13, width)``.
        roots: ``(2, tensors, width)``, for ``v**-1/2`` and for what is needed at once only.
        root: The second of them.
        first: ``(tensors, units, width)``, the first layer.
        second: The second layer.
        outputs: ``(tensors, 2, width)``.
        direction: The first output.
        magnitude: The second output.
    """

    def __init__(self, like: Tensor, hidden_size: int, tensors: int, width: int) -> None:
        self._all = [
            like.new_empty(_COORDINATE_FEATURES, tensors, width), like.new_empty(2, tensors, width),
            *(like.new_empty(tensors, units, width) for units in (hidden_size, hidden_size, 2)),
        ]  # fmt: skip
        self._view(width)

    def narrowed(self, width: int) -> _Buffers:
        """The same memory for the last piece, which may be shorter."""
        found = copy.copy(self)
        found._view(width)
        return found

    def _view(self, width: int) -> None:
        self.features, self.roots, self.first, self.second, self.outputs = (one[..., :width] for one in self._all)
        self.by_tensor, self.root = self.features.transpose(0, 1), self.roots[1]
        self.direction, self.magnitude = self.outputs.unbind(1)
        rows = self.features
        self._rows = rows[:3], rows[:4], rows[5:9], *rows.unbind(0)

    def products(self, g: Tensor, p: Tensor, m: Tensor, v: Tensor, floors: Tensor, factored: Tensor) -> Tensor:
        """The features but for a factor for each tensor, from averages without correction of bias."""
        momenta, seen, adam, *rows = self._rows
        momenta.copy_(m)
        rows[3].copy_(g)
        rows[4].copy_(p)
        torch.add(v, floors, out=self.roots).rsqrt_()
        torch.mul(seen, self.root, out=adam)
        torch.mul(rows[0], self.roots[0], out=rows[9])
        torch.mul(g, factored, out=rows[10])
        torch.mul(rows[0], factored, out=rows[11])
        torch.mul(v[1], self.root, out=rows[12])
        return self.features


def _unbiased(average: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    return average / _share(weights, count).to(average.dtype)[:, None]


def _inverse_rms(values: Tensor) -> Tensor:
    return torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-12)


def _features(
    part: SameShape, gradient: Tensor, parameter: Tensor, before: Tensor, momenta: Tensor, second_moments: Tensor
) -> tuple[Tensor, Tensor]:
    """What the network sees of tensors of one shape, ``(features, tensors, size)``, and Adam's direction."""
    # Relative to the tensor's own second moment, so that nothing depends on the scale of the loss.
    scale = torch.rsqrt(second_moments[1:].mean(-1, keepdim=True) + 1e-24)
    root = torch.rsqrt(second_moments + 1e-6 * second_moments[1:].mean(-1, keepdim=True) + 1e-24)
    adam = momenta * root[1:]
    factored = _factored_root(part, second_moments[1:], second_moments.new_ones(()))
    raw = torch.cat(
        [
            momenta * scale,
            gradient * scale,
            parameter,
            adam,
            gradient * root[1:],
            momenta[:1] * root[:1],
            gradient * factored,
            momenta[:1] * factored,
            second_moments[1:] * root[1:] * scale,
        ]
    )
    inverse = torch.rsqrt(raw.square().mean(-1, keepdim=True) + _floor(raw[:, 0, 0])[:, None, None])
    unit, past = raw * inverse, before * _inverse_rms(before * scale) * scale
    cosines = [(unit[3:4] * past[:2]).mean(-1, keepdim=True), (unit[:1] * unit[2:3]).mean(-1, keepdim=True)]
    matrix = torch.full_like(cosines[1], float(len(part.shape) > 1))
    of_tensor = torch.cat([1.0 / inverse[5:8], *cosines, matrix, -0.3 * torch.log(inverse[4:5])])
    return torch.cat([unit, of_tensor.expand(-1, -1, raw.shape[-1])]), unit[5]


def _factored_root(part: SameShape, second_moment: Tensor, share: Tensor) -> Tensor:
    """Like ``v**-1/2``, of the product of the means of v over rows and columns (Adafactor, arXiv 1804.04235).

    Args:
        part: The tensors.
        second_moment: ``(1, tensors, size)``, v but for the correction of its bias.
        share: What it has to be divided by.
    """
    mean = second_moment.mean(-1, keepdim=True) / share + 1e-24
    if part.factored is None:
        return torch.rsqrt(second_moment / share + 1e-6 * mean)
    second, largest = (position + 2 for position in part.factored)  # after the axes of the feature and of the tensors
    shaped = second_moment.unflatten(-1, part.shape)
    whole, shares = (
        tensor.reshape(*mean.shape[:2], *[1] * len(part.shape)) for tensor in (mean, share * torch.ones_like(mean))
    )
    product: Tensor = (shaped.mean(largest, keepdim=True) / shares) * (shaped.mean(second, keepdim=True) / shares)
    return product.div_(whole).add_(1e-6 * whole).rsqrt_().flatten(2)
