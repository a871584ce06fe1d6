"""Factored second moments: the memory of a row and a column instead of a matrix (Adafactor, arXiv 1804.04235)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_l2l.learned.features import moving_average
from lightning_l2l.learned.layout import Bucket, Layout

# learned_optimization's constants (common.py and adafac_mlp_lopt.py), so that its formulas are reproduced.
_SQUARE, _ROOT, _MEAN, _FEATURE, _UNFACTORED_MOMENTUM = 1e-30, 1e-9, 1e-9, 1e-8, 1e-6


def row_sizes(layout: Layout) -> list[int]:
    """Numbers that the row moments of each tensor take (all its elements, for vectors and scalars)."""
    return [_row_size(bucket) for bucket in layout.buckets for _ in bucket.names]


def column_sizes(layout: Layout) -> list[int]:
    """Numbers that the column moments of each tensor take (none for vectors and scalars)."""
    return [_column_size(bucket) for bucket in layout.buckets for _ in bucket.names]


def factored_features(
    gradient: Tensor, momenta: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The six kinds of features from factored second moments, and the moments themselves one step on.

    For a tensor with two or more dimensions, ``row`` is the moving average of the mean of ``g**2`` over the largest
    dimension, ``column`` over the second largest; ``R = (row / mean(row))**-1/2``, ``C = column**-1/2``. The features
    are ``g R C``, ``row``, ``column``, ``row**-1/2``, ``column**-1/2`` and ``m R C``. For vectors and scalars
    ``row`` and ``column`` are both the moving average of ``g**2``, and ``R C`` its ``-1/2``-th power.

    Args:
        gradient: ``(N,)``.
        momenta: ``(K, N)``, already updated.
        rows: ``(K, sum(row_sizes))``.
        columns: ``(K, sum(column_sizes))``.
        weights: ``(K,)``, one minus the decays.
        layout: Where the tensors lie.

    Returns:
        Features ``(6 K, N)``, rows, columns.
    """
    count = len(layout.buckets)
    row_parts = rows.split([_row_size(bucket) * len(bucket.names) for bucket in layout.buckets], dim=-1)
    column_parts = columns.split([_column_size(bucket) * len(bucket.names) for bucket in layout.buckets], dim=-1)
    features, new_rows, new_columns = [], [], []
    gradients, moments = layout.split(gradient), layout.split(momenta)
    for index in range(count):
        bucket = layout.buckets[index]
        of_bucket = _matrices if bucket.factored else _vectors
        found, row, column = of_bucket(
            gradients[index], moments[index], row_parts[index], column_parts[index], weights, bucket
        )
        features.append(found)
        new_rows.append(row)
        new_columns.append(column)
    return layout.join(features), torch.cat(new_rows, -1), torch.cat(new_columns, -1)


def _matrices(
    gradient: Tensor, momenta: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, bucket: Bucket
) -> tuple[Tensor, Tensor, Tensor]:
    assert bucket.factored is not None
    second, largest = (position + 1 for position in bucket.factored)  # after the axis of the tensors
    shaped = gradient.unflatten(-1, bucket.shape)
    square = shaped.square() + _SQUARE
    over_largest, over_second = square.mean(largest, keepdim=True), square.mean(second, keepdim=True)
    row = moving_average(rows.reshape(-1, *over_largest.shape), over_largest, weights)
    column = moving_average(columns.reshape(-1, *over_second.shape), over_second, weights)
    row_factor = _safe_rsqrt(row / (row.mean(second + 1, keepdim=True) + _MEAN))
    factor = row_factor * _safe_rsqrt(column)
    full = factor.shape
    features = [
        shaped * factor,
        row.expand(full),
        column.expand(full),
        torch.rsqrt(row + _FEATURE).expand(full),
        torch.rsqrt(column + _FEATURE).expand(full),
        momenta.unflatten(-1, bucket.shape) * factor,
    ]
    return torch.cat(features).flatten(2), row.flatten(1), column.flatten(1)


def _vectors(
    gradient: Tensor, momenta: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, bucket: Bucket
) -> tuple[Tensor, Tensor, Tensor]:
    moment = moving_average(rows.reshape(-1, *gradient.shape), gradient.square() + _SQUARE, weights)
    root = torch.rsqrt(moment + _FEATURE)
    features = [
        gradient * _safe_rsqrt(moment + _ROOT),
        moment,
        moment,
        root,
        root,
        momenta * torch.rsqrt(moment + _UNFACTORED_MOMENTUM),
    ]
    return torch.cat(features), moment.flatten(1), columns


def _safe_rsqrt(tensor: Tensor) -> Tensor:
    return torch.rsqrt(tensor.clamp(min=_ROOT))


def _row_size(bucket: Bucket) -> int:
    return bucket.size if bucket.factored is None else _without(bucket, bucket.factored[1])


def _column_size(bucket: Bucket) -> int:
    return 0 if bucket.factored is None else _without(bucket, bucket.factored[0])


def _without(bucket: Bucket, dimension: int) -> int:
    # Not size // shape[dimension]: a dimension may be zero.
    size = 1
    for position, length in enumerate(bucket.shape):
        size *= 1 if position == dimension else length
    return size
