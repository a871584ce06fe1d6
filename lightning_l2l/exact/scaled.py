"""Lists of tensors with a separate exponent, so that products over thousands of steps stay in the number range.

Tangents and adjoints of an unroll grow or shrink exponentially with the number of steps. They are linear, so they may
be carried as ``tensors * 2**exponent``: the tensors stay near one, the exponent is one float64 number. Scaling by a
power of two changes no bit of a mantissa, so nothing is lost. Nothing here waits for an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Below this exponent the tensors are left small: 2**100 is still a float32 number, its inverse too.
_SMALLEST_EXPONENT = -100.0
# The largest of the tensors' norms may have an exponent of this share of the dtype's: 15 either way in float32. So the
# next step, which may make it much larger or smaller once more, stays in range, and most steps need no scaling.
_SLACK = 1 / 8


def largest_exponent(tensors: Sequence[Tensor]) -> Tensor:
    """``floor(log2(max |x|))`` over all entries, zero where that is not finite; 0-dim float64.

    Example:
        >>> largest_exponent([torch.tensor([0.3, -9.0])])
        tensor(3., dtype=torch.float64)
    """
    extrema = _extrema(tensors)
    if not extrema:
        return torch.zeros((), dtype=torch.float64)
    exponent = torch.stack([end.double() for end in extrema]).abs().amax().log2().floor()
    return torch.where(exponent.isfinite(), exponent, 0.0)


def _extrema(tensors: Sequence[Tensor]) -> list[Tensor]:
    # Not a maximum norm: that one is not vectorised (torch 2.13, CPU), fourteen times slower than the extrema.
    return [end for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor.detach())]


def _is_near_one(tensors: Sequence[Tensor]) -> bool:
    """Whether the norm is within the slack on both sides of 1; as numbers, since on a CPU that is faster."""
    largest = max([norm.item() for norm in torch._foreach_norm([tensor.detach() for tensor in tensors])], default=1.0)
    slack = 2.0 ** (_SLACK * min([_largest_power(tensor.dtype) for tensor in tensors]))
    return bool(1 / slack <= largest <= slack)


@cache
def _largest_power(dtype: torch.dtype) -> int:
    return math.floor(math.log2(torch.finfo(dtype).max)) - 1


def multiply(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Each tensor times a 0-dim factor, in the tensor's own dtype; without history."""
    return [tensor.detach() * factor.to(tensor.dtype) for tensor in tensors]


@dataclass(frozen=True)
class ScaledVector:
    """The vector ``tensors * 2**exponent``.

    Attributes:
        tensors: The mantissas, any shapes and dtypes.
        exponent: 0-dim float64.
    """

    tensors: list[Tensor]
    exponent: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor], exponent: Tensor | float = 0.0) -> ScaledVector:
        """A scaled vector, normalised if it is far from 1: its largest entry then lies in [1, 2) or comes close."""
        device = tensors[0].device
        start = torch.as_tensor(exponent, dtype=torch.float64, device=device)
        # Looking at the numbers would wait for an accelerator, where scaling costs little.
        if device.type == "cpu" and _is_near_one(tensors):
            return cls(list(tensors), start)
        # 2**-shift has to be a number of every dtype as well.
        limit = min([_largest_power(tensor.dtype) for tensor in tensors])
        shift = torch.maximum(largest_exponent(tensors).to(device), _SMALLEST_EXPONENT - start).clamp(-limit, limit)
        return cls(multiply(tensors, torch.exp2(-shift)), start + shift)

    def at_exponent(self, exponent: Tensor) -> list[Tensor]:
        """The mantissas that the vector has at another exponent."""
        return multiply(self.tensors, torch.exp2(self.exponent - exponent))

    def plus(self, other: ScaledVector) -> ScaledVector:
        """The sum, at the larger of the two exponents, so that neither overflows."""
        exponent = torch.maximum(self.exponent, other.exponent)
        pairs = zip(self.at_exponent(exponent), other.at_exponent(exponent), strict=True)
        return ScaledVector.of([a + b for a, b in pairs], exponent)


def log2_norm(vector: ScaledVector) -> Tensor:
    """``log2`` of the Euclidean norm; 0-dim float64, ``-inf`` for the zero vector."""
    norms = torch._foreach_norm([tensor.detach() for tensor in vector.tensors])
    norm: Tensor = torch.linalg.vector_norm(torch.stack([part.double() for part in norms]))
    return vector.exponent + norm.log2()


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum of all products, accumulated in float64; 0-dim."""
    products = torch._foreach_mul(list(left), list(right))
    return torch.stack([product.sum(dtype=torch.float64) for product in products]).sum()
