"""Torch's functions over dual numbers: those that the update rules call by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.functional.dual import Dual, derivative_of, sum_of


def _parts(*operands: Any) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """The values of duals and plain tensors, and for each direction their tangents."""
    count = next(len(operand.tangents) for operand in operands if isinstance(operand, Dual))
    values = [operand.value if isinstance(operand, Dual) else operand for operand in operands]
    tangents = [operand.tangents if isinstance(operand, Dual) else (None,) * count for operand in operands]
    return values, [list(column) for column in zip(*tangents, strict=True)]


@derivative_of(torch.add)
def _add(left: Any, right: Any, *, alpha: float = 1) -> Dual:
    (a, b), columns = _parts(left, right)
    tangents = []
    for da, db in columns:
        if da is None or db is None:
            tangents.append(da if db is None else db * alpha)
        else:
            tangents.append(torch.add(da, db, alpha=alpha))
    return Dual(torch.add(a, b, alpha=alpha), tangents)


@derivative_of(torch.lerp)
def _lerp(start: Any, end: Any, weight: float) -> Dual:
    (a, b), columns = _parts(start, end)
    tangents: list[Tensor | None] = []
    for da, db in columns:
        if da is None or db is None:
            tangents.append(db * weight if db is not None else None if da is None else da * (1 - weight))
        else:
            tangents.append(torch.lerp(da, db, weight))
    return Dual(torch.lerp(a, b, weight), tangents)


@derivative_of(torch.addcmul)
def _addcmul(base: Any, first: Any, second: Any, *, value: float = 1) -> Dual:
    (a, b, c), columns = _parts(base, first, second)
    tangents = []
    for da, db, dc in columns:
        moved = da
        # A square has twice the derivative.
        terms = ((c, db, 2 * value),) if first is second else ((c, db, value), (b, dc, value))
        for factor, tangent, weight in terms:
            if tangent is None:
                continue
            moved = factor * tangent * weight if moved is None else torch.addcmul(moved, factor, tangent, value=weight)
        tangents.append(moved)
    return Dual(torch.addcmul(a, b, c, value=value), tangents)


@derivative_of(torch.exp)
def _exp(exponent: Dual) -> Dual:
    value = torch.exp(exponent.value)
    return Dual(value, [None if t is None else value * t for t in exponent.tangents])


@derivative_of(torch.expm1)
def _expm1(exponent: Dual) -> Dual:
    value = torch.expm1(exponent.value)
    return Dual(value, [None if t is None else torch.exp(exponent.value) * t for t in exponent.tangents])


@derivative_of(torch.maximum)
def _maximum(left: Any, right: Any) -> Dual:
    (a, b), columns = _parts(left, right)
    # torch gives each side half of the derivative where both are equal.
    weight = (a > b).to(a.dtype) + 0.5 * (a == b).to(a.dtype)
    tangents = [
        sum_of(None if da is None else da * weight, None if db is None else db * (1 - weight)) for da, db in columns
    ]
    return Dual(torch.maximum(a, b), tangents)


@derivative_of(torch.where)
def _where(condition: Tensor, yes: Any, no: Any) -> Dual:
    (a, b), columns = _parts(yes, no)
    tangents: list[Tensor | None] = []
    for da, db in columns:
        both_zero = da is None and db is None
        tangents.append(None if both_zero else torch.where(condition, _or_zero(da), _or_zero(db)))
    return Dual(torch.where(condition, a, b), tangents)


def _or_zero(tangent: Tensor | None) -> Tensor | float:
    return 0.0 if tangent is None else tangent


def _joined(join: Callable[[list[Tensor]], Tensor], duals: Sequence[Any]) -> Dual:
    values, columns = _parts(*duals)
    tangents: list[Tensor | None] = []
    for column in columns:
        if all(tangent is None for tangent in column):
            tangents.append(None)
            continue
        filled = [torch.zeros_like(v) if t is None else t for v, t in zip(values, column, strict=True)]
        tangents.append(join(filled))
    return Dual(join(values), tangents)


def joined(tensors: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Several tensors made one (concatenated, stacked); duals if any of them is."""
    if any([isinstance(tensor, Dual) for tensor in tensors]):
        return _joined(join, tensors)
    return join(list(tensors))


# A constant has no tangent, so it is an ordinary tensor.
@derivative_of(torch.zeros_like)
def _zeros_like(dual: Dual) -> Tensor:
    return torch.zeros_like(dual.value)


@derivative_of(torch.full_like)
def _full_like(dual: Dual, number: float) -> Tensor:
    return torch.full_like(dual.value, number)


# Operators with a tensor on the left.
derivative_of(torch.Tensor.add)(lambda left, right: right.__radd__(left))
derivative_of(torch.Tensor.sub)(lambda left, right: right.__rsub__(left))
derivative_of(torch.Tensor.mul)(lambda left, right: right.__rmul__(left))
derivative_of(torch.Tensor.div)(lambda left, right: right.__rtruediv__(left))
