"""Dual numbers: a value together with its derivative along a few directions, for the arithmetic of the update rules.

A training step that carries a tangent has to know the derivative of the update rule along it. torch can tell in two
ways, both slow where tensors are small: two reverse passes build and walk a graph, and forward-mode tensors go through
Python for every operand without a tangent. The rules consist of some twenty elementwise operations, so here are their
derivatives, written out. The values are computed by the very same torch calls as without derivatives, so they are equal
to the last bit; that the derivatives are right is tested against the other two ways.

A tangent of ``None`` is zero, and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tangents = tuple[Tensor | None, ...]

# By the function that torch announces, what computes it on duals.
_DERIVATIVES: dict[Any, Callable[..., Any]] = {}


def derivative_of(function: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function over duals that stands for one of torch's."""

    def register(over_duals: Callable[..., Any]) -> Callable[..., Any]:
        _DERIVATIVES[function] = over_duals
        return over_duals

    return register


class Dual:
    """A tensor with tangents.

    Only what the update rules use is implemented; anything else raises a ``TypeError``, it is never computed without
    its derivative.

    Args:
        value: A tensor without history; 0-dim float64 for a hyperparameter.
        tangents: Its derivative along each direction, in the value's shape; ``None`` for zero.

    Example:
        >>> rate = Dual(torch.tensor(0.5), (torch.tensor(1.0),))
        >>> step = -(rate * torch.tensor([3.0, 4.0]))
        >>> step.value.tolist(), step.tangents[0].tolist()
        ([-1.5, -2.0], [-3.0, -4.0])
    """

    __slots__ = ("tangents", "value")

    def __init__(self, value: Tensor, tangents: Sequence[Tensor | None]) -> None:
        self.value = value
        self.tangents: Tangents = tuple(tangents)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for its functions and for operators with a tensor on the left."""
        derivative = _DERIVATIVES.get(function)
        if derivative is None:
            raise TypeError(
                f"{getattr(function, '__name__', function)} has no derivative in lightning_l2l.functional.dual. Add it "
                "there, or say dual_numbers=False in the rule that uses it."
            )
        return derivative(*args, **(kwargs or {}))

    # What concatenating and sorting tensors by kind looks at.
    @property
    def dtype(self) -> torch.dtype:
        """The value's."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """The value's."""
        return self.value.device

    @property
    def layout(self) -> torch.layout:
        """The value's."""
        return self.value.layout

    @property
    def shape(self) -> torch.Size:
        """The value's."""
        return self.value.shape

    def numel(self) -> int:
        """The value's number of elements."""
        return self.value.numel()

    def dim(self) -> int:
        """The value's number of dimensions."""
        return self.value.dim()

    def is_floating_point(self) -> bool:
        """Whether the value is."""
        return self.value.is_floating_point()

    def is_complex(self) -> bool:
        """Whether the value is."""
        return self.value.is_complex()

    def mapped(self, linear: Callable[[Tensor], Tensor]) -> Dual:
        """A linear function without constants (a reshape, a cast) of value and tangents."""
        return Dual(linear(self.value), [None if t is None else linear(t) for t in self.tangents])

    def reshape(self, *shape: int) -> Dual:
        """Value and tangents in another shape."""
        return self.mapped(lambda tensor: tensor.reshape(*shape))

    def to(self, *target: Any) -> Dual:
        """Value and tangents in another dtype or on another device."""
        return self.mapped(lambda tensor: tensor.to(*target))

    def double(self) -> Dual:
        """Value and tangents in float64."""
        return self.mapped(lambda tensor: tensor.double())

    def expand(self, *shape: Any) -> Dual:
        """Value and tangents, repeated without a copy."""
        return self.mapped(lambda tensor: tensor.expand(*shape))

    def repeat_interleave(self, counts: Tensor, output_size: int) -> Dual:
        """Each element so many times."""
        return self.mapped(lambda tensor: tensor.repeat_interleave(counts, output_size=output_size))

    # Comparisons choose branches; they have no derivative.
    def __gt__(self, other: Any) -> Tensor:
        larger: Tensor = self.value > other
        return larger

    def __neg__(self) -> Dual:
        return self.mapped(torch.neg)

    def __add__(self, other: Any) -> Dual:
        if not isinstance(other, Dual):
            return Dual(self.value + other, self.tangents)
        pairs = zip(self.tangents, other.tangents, strict=True)
        return Dual(self.value + other.value, [sum_of(left, right) for left, right in pairs])

    def __radd__(self, other: Any) -> Dual:
        return Dual(other + self.value, self.tangents)

    def __sub__(self, other: Any) -> Dual:
        if not isinstance(other, Dual):
            return Dual(self.value - other, self.tangents)
        pairs = zip(self.tangents, other.tangents, strict=True)
        return Dual(self.value - other.value, [difference_of(left, right) for left, right in pairs])

    def __rsub__(self, other: Any) -> Dual:
        return Dual(other - self.value, [None if t is None else -t for t in self.tangents])

    def __mul__(self, other: Any) -> Dual:
        if not isinstance(other, Dual):
            return Dual(self.value * other, [None if t is None else t * other for t in self.tangents])
        tangents = []
        for left, right in zip(self.tangents, other.tangents, strict=True):
            first = None if left is None else left * other.value
            if right is not None:
                first = self.value * right if first is None else first.addcmul_(self.value, right.to(first.dtype))
            tangents.append(first)
        return Dual(self.value * other.value, tangents)

    def __rmul__(self, other: Any) -> Dual:
        return Dual(other * self.value, [None if t is None else other * t for t in self.tangents])

    def __truediv__(self, other: Any) -> Dual:
        if not isinstance(other, Dual):
            return Dual(self.value / other, [None if t is None else t / other for t in self.tangents])
        quotient = self.value / other.value
        tangents: list[Tensor | None] = []
        for left, right in zip(self.tangents, other.tangents, strict=True):
            if left is None or right is None:
                numerator = left if right is None else -(quotient * right)
            else:
                numerator = torch.addcmul(left, quotient.to(left.dtype), right.to(left.dtype), value=-1)
            tangents.append(None if numerator is None else numerator / other.value)
        return Dual(quotient, tangents)

    def __rtruediv__(self, other: Any) -> Dual:
        quotient = other / self.value
        return Dual(quotient, [None if t is None else -(quotient * t) / self.value for t in self.tangents])

    def __pow__(self, exponent: float) -> Dual:
        value = self.value**exponent
        if all(tangent is None for tangent in self.tangents):
            return Dual(value, self.tangents)
        slope = exponent * self.value ** (exponent - 1)
        return Dual(value, [None if t is None else slope * t for t in self.tangents])

    def square_root(self) -> Dual:
        """The square root, with derivative 0 where it is 0 (see :func:`lightning_l2l.functional.rule.square_root`)."""
        root = self.value.sqrt()
        if all(tangent is None for tangent in self.tangents):
            return Dual(root, self.tangents)
        # 0 where that is infinite; comparing and masking take ten times as long (torch 2.13, CPU).
        slope = (0.5 / root).nan_to_num_(nan=math.nan, posinf=0.0)
        return Dual(root, [None if t is None else t * slope for t in self.tangents])


def sum_of(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum of two tangents."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


def difference_of(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The difference of two tangents."""
    if right is None:
        return left
    return -right if left is None else left - right
