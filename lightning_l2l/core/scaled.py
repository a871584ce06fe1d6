"""Lists of tensors with a separate exponent, so that products over thousands of steps stay in the number range.

Tangents and adjoints of an unroll grow or shrink exponentially with the number of steps. They are linear, so they
may be carried as ``tensors * 2**exponent``: the tensors stay near one, the exponent is one float64 number. Scaling by a
power of two changes no bit of a mantissa, so nothing is lost. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this exponent the tensors are left small: 2**100 is still a float32 number, its inverse too.
_SMALLEST_EXPONENT = -100.0


def largest_exponent(tensors: Sequence[Tensor]) -> Tensor:
    """``floor(log2(max |x|))`` over all entries, zero where that is not finite; 0-dim float64.

    Example:
        >>> largest_exponent([torch.tensor([0.3, -9.0])])
        tensor(3., dtype=torch.float64)
    """
    # A zero-element tensor has no maximum norm.
    norms = [tensor.detach().abs().amax().double() for tensor in tensors if tensor.numel()]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    exponent = torch.stack(norms).amax().log2().floor()
    return torch.where(exponent.isfinite(), exponent, torch.zeros_like(exponent))


def multiply(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Each tensor times a 0-dim factor, in the tensor's own dtype."""
    return [tensor * factor.to(tensor.dtype) for tensor in tensors]


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
        """A scaled vector, normalised so that its largest entry lies in [1, 2)."""
        device = tensors[0].device
        start = torch.as_tensor(exponent, dtype=torch.float64, device=device)
        shift = largest_exponent(tensors).to(device)
        shift = torch.maximum(shift, _SMALLEST_EXPONENT - start)
        # Two halves, since 2**-shift itself may leave the range of the tensors' dtype.
        half = torch.exp2(-(shift / 2).floor())
        rest = torch.exp2(-(shift - (shift / 2).floor()))
        return cls(multiply(multiply(tensors, half), rest), start + shift)

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
    squares = [tensor.detach().double().square().sum() for tensor in vector.tensors]
    return vector.exponent + 0.5 * torch.stack(squares).sum().log2()


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum of all products, accumulated in float64; 0-dim."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(left, right, strict=True)]).sum()
