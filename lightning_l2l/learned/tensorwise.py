"""A rule to take as it is: Adam's direction, with a step size that each tensor finds while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2l.learned.coordinatewise import CoordinatewiseOptimizer, State, constant, moving_average
from lightning_l2l.learned.layout import Layout, SameShape

_MOMENTUM_DECAYS, _SECOND_MOMENT_DECAY = (0.9, 0.99), 0.999
_USUAL_INPUTS, _USUAL_WEIGHT, _SMALLEST_WEIGHT = 16.0, 0.2, 0.01
_FORGET, _FARTHEST = 10.0, 4.0
# Elements of each thread's share of a piece: what is computed of so many fits into its caches.
_PIECE = 2**17


class TensorwiseOptimizer(CoordinatewiseOptimizer):
    r"""Adam's direction in steps whose size each tensor finds by how far successive gradients agree.

    For each tensor ``p`` with gradient ``g``, in step t = 1, 2, ...: momenta ``m`` and ``n`` (decays 0.9, 0.99) and the
    second moment ``v`` (0.999), bias corrected, and

    ``u = (m + b_1 g + b_2 n) / sqrt(v)``, ``a <- a + k (cos(g, m_before) - c) 10 / (t + 9)``, at most 4 in size,
    ``p <- p - rms(u)**-e_3 exp(a + s) u``,

    where ``s = s_1 + e_1 log(inputs / 16) + e_2 log(rms(p) / 0.2)`` for matrices (``inputs``: numbers of a row, as
    torch has them; ``rms(p)`` counts as 0.01 at least) and ``s = s_2`` for vectors and scalars. As long as gradients
    agree with those before them the size grows; where they alternate, since steps undo each other, it shrinks. Both the
    less the later, so that trainings of any length are the same problem. The nine numbers b, e, s, k and c are learned.

    When it helps: where no rate has been tuned, with a schedule that falls to zero, on networks that are trained from
    scratch. ``LearnedOptimizer.pretrained("tensorwise")`` was meta-trained on trainings of 100 to 1000 steps of small
    networks (classifiers and autoencoders of 8 x 8 and 12 x 12 images, text, random teachers) by ``python
    examples/pretrained/train.py`` (seed 0, a quarter of an hour of one core), from where an evolution on the choosing
    half of ``tests/benchmarks/population`` had ended. How it compares with a tuned AdamW is in
    ``docs/learned-optimizers.md``. It overfits small tables, and is too fast for a language model of a million
    parameters. The sizes are those of a training from scratch: for a pretrained network take another optimizer.

    Cost: for a million parameters 2.6 to 2.7 times a step of AdamW (foreach), on one thread
    (``tests/benchmarks/cost.py --part step``). State: three numbers per parameter, and one per tensor.

    Source: growth by agreeing gradients as in delta-bar-delta (Jacobs 1988) and hypergradient descent (Baydin et al.,
    arXiv 1703.04782), here for each tensor and in proportion to the steps so far; normalised steps as in Celo2 (arXiv
    2602.19142); sizes by the number of inputs as in Tensor Programs V (arXiv 2203.03466).

    Example:
        >>> learned = TensorwiseOptimizer()
        >>> sum(parameter.numel() for parameter in learned.parameters())
        9
        >>> parameters = {"w": torch.randn(3, 2), "b": torch.randn(3)}
        >>> optimizer = learned.transformation()
        >>> updates, _ = optimizer.update(parameters, optimizer.init(parameters), params=parameters)
        >>> updates["b"].shape
        torch.Size([3])
    """

    elements_at_once = 2**20

    def __init__(self) -> None:
        super().__init__(step_multiplier=1.0, normalise_output=False)
        # What an evolution over the tasks of tests/benchmarks/population (its choosing half) found, rounded.
        self.log_sizes = nn.Parameter(torch.tensor([-4.0, -4.0]))
        self.exponents = nn.Parameter(torch.tensor([-0.7, 0.0, 0.4]))
        self.blend = nn.Parameter(torch.tensor([0.6, -0.35]))
        self.pace = nn.Parameter(torch.tensor([0.25, -0.15]))
        self._momentum_weights = constant([1.0 - decay for decay in _MOMENTUM_DECAYS])
        self._second_moment_weight = constant([1.0 - _SECOND_MOMENT_DECAY])

    def configuration(self) -> dict[str, Any]:
        """No arguments."""
        return {}

    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """``"momenta"``, shape ``(2, N)``, ``"second_moment"``, ``(N,)``, and ``"growth"``, a for each tensor."""
        return {
            "momenta": like.new_zeros(2, layout.size),
            "second_moment": like.new_zeros(layout.size),
            "growth": like.new_zeros(len(layout.names)),
        }

    def extents(self, layout: Layout) -> Mapping[str, list[int]]:
        """One number for each tensor."""
        return {"growth": [1] * len(layout.names)}

    def step(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """See :class:`CoordinatewiseOptimizer`."""
        before, momenta = state["momenta"], moving_average(state["momenta"], gradient, self._momentum_weights)
        square = moving_average(state["second_moment"][None], gradient.square(), self._second_moment_weight)[0]
        shares, (ahead, slow) = self._shares(state["step"] + 1, gradient), self._numbers("blend", gradient)
        blend = momenta[0] / shares[0] + ahead * gradient + slow * momenta[1] / shares[1]
        directions, sums = [], []
        rows = (gradient, parameter, before[0], square, blend)
        for g, p, m, v, u in zip(*map(layout.split, rows), strict=True):
            u = u * torch.rsqrt((v + 1e-6 * v.mean(-1, keepdim=True)) / shares[2] + 1e-24)
            sums.append(torch.stack([(g * m).sum(-1), *(x.square().sum(-1) for x in (g, m, p, u))]))
            directions.append(u)
        size, growth = self._sizes(torch.cat(sums, -1), state, layout)
        parts = size.split([len(part.names) for part in layout.parts], -1)
        moved = layout.join([u * part[..., None] for u, part in zip(directions, parts, strict=True)])
        return moved, {"momenta": momenta, "second_moment": square, "growth": growth}

    def step_(self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """The same in pieces that fit into the caches, with the averages in place."""
        moved, sums = torch.empty_like(gradient), []
        shares = self._shares(state["step"] + 1, gradient)
        one = torch.ones_like(shares[0])
        ahead, slow = self._numbers("blend", gradient) * shares[0] / torch.stack([one, shares[1]])
        rows = (gradient, parameter, *state["momenta"], state["second_moment"], moved)
        for part, *tensors in zip(layout.parts, *map(layout.split, rows), strict=True):
            sums.append(self._directions(part, tensors, ahead, slow, shares[2]))
        found = torch.cat(sums, -1)
        found[-1] /= shares[0].square()
        size, growth = self._sizes(found, state, layout)
        parts = (size * shares[2].sqrt() / shares[0]).split([len(part.names) for part in layout.parts])
        for u, own in zip(layout.split(moved), parts, strict=True):
            u.mul_(own[:, None])
        return moved, {**state, "growth": growth}

    def _directions(
        self, part: SameShape, rows: Sequence[Tensor], ahead: Tensor, slow: Tensor, share: Tensor
    ) -> Tensor:
        """For tensors of one shape: u, times the share of m, into the last row; the sums that :meth:`_sizes` takes."""
        tensors = len(part.names)
        width = part.size if rows[0].device.type != "cpu" else max(1, _PIECE * torch.get_num_threads() // tensors)
        pieces = list(zip(*(torch.split(row, width, dim=-1) for row in rows), strict=True))
        along, mean = rows[0].new_empty(2, len(pieces), tensors)
        norms, buffer = rows[0].new_empty(4, len(pieces), tensors), torch.empty_like(pieces[0][0])
        for index, (g, p, m, n, v, _) in enumerate(pieces):
            torch.linalg.vecdot(g, m, out=along[index])
            for place, x in enumerate((g, m, p)):
                torch.linalg.vector_norm(x, dim=-1, out=norms[place, index])
            m.lerp_(g, 1 - _MOMENTUM_DECAYS[0])
            n.lerp_(g, 1 - _MOMENTUM_DECAYS[1])
            v.lerp_(torch.mul(g, g, out=buffer[:, : g.shape[1]]), 1 - _SECOND_MOMENT_DECAY)
            torch.sum(v, -1, out=mean[index])
        floor = (1e-6 / part.size * mean.sum(0) + 1e-24 * share)[:, None]
        for index, (g, _, m, n, v, u) in enumerate(pieces):
            root = buffer[:, : g.shape[1]]
            torch.mul(g, ahead, out=u).add_(m).add_(torch.mul(n, slow, out=root))
            u.mul_(torch.add(v, floor, out=root).rsqrt_())
            torch.linalg.vector_norm(u, dim=-1, out=norms[3, index])
        squares = norms.square().sum(1)
        squares[3] *= share
        return torch.cat([along.sum(0, keepdim=True), squares])

    def _numbers(self, name: str, like: Tensor) -> Tensor:
        value: Tensor = getattr(self, name)  # in an unroll it is no parameter, but takes the place of one
        return value.to(like)

    def _shares(self, count: Tensor, like: Tensor) -> Tensor:
        """``1 - decay**count`` for both momenta and the second moment; exact for decays near 1."""
        weights = torch.cat([self._momentum_weights, self._second_moment_weight]).to(count.device)
        return -torch.expm1(torch.log1p(-weights) * count).to(like)

    def _sizes(self, sums: Tensor, state: State, layout: Layout) -> tuple[Tensor, Tensor]:
        """What each tensor's u is multiplied by, and its growth from now on.

        Args:
            sums: For each tensor the inner product of gradient and momentum, and the squared lengths of gradient,
                momentum, parameter and u.
            state: Before the step.
            layout: The tensors.
        """
        along, gradient, momentum, parameter, direction = sums.unbind(0)
        gain, neutral = self._numbers("pace", sums)
        seen = (momentum > 0) * (along * torch.rsqrt(gradient * momentum + 1e-30) - neutral)
        by = gain * seen * _FORGET / (state["step"].to(sums) + _FORGET)
        growth = (state["growth"] + by).clamp(-_FARTHEST, _FARTHEST)
        matrix, vector = self._numbers("log_sizes", sums)
        inputs, weight, normalised = self._numbers("exponents", sums)
        count, fan, is_matrix = (sums.new_tensor(column) for column in zip(*_known(layout), strict=True))
        rms = 0.5 * torch.log((parameter / count).clamp(min=_SMALLEST_WEIGHT**2)) - math.log(_USUAL_WEIGHT)
        own = torch.where(is_matrix > 0, matrix + inputs * fan + weight * rms, vector)
        return torch.exp(growth + own - 0.5 * normalised * torch.log(direction / count + 1e-24)), growth


@lru_cache(maxsize=256)
def _known(layout: Layout) -> tuple[tuple[float, float, float], ...]:
    """For each tensor its size, the logarithm of its inputs over the usual number, and whether it is a matrix."""
    found = []
    for part in layout.parts:
        is_matrix = len(part.shape) > 1
        fan = math.log(part.size / part.shape[0] / _USUAL_INPUTS) if is_matrix else 0.0
        found += [(float(part.size), fan, float(is_matrix))] * len(part.names)
    return tuple(found)
