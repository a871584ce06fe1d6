"""Many tensors as one vector: how parameters of any shapes lie in it, and what is the same for one tensor's part.

A learned optimizer that treats every number alike needs one call for all of them. What it needs of the tensors is
their extent (a feature is normalised by its mean square over its tensor) and their shape (row and column means).
Tensors of equal shape lie next to each other, so that such a mean is a mean over axes of a view: the cost is that
of a few operations for each *shape*, not for each tensor, and the sums are in a fixed order on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class SameShape:
    """Tensors of one shape, by name."""

    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Elements of one of the tensors."""
        return math.prod(self.shape)

    @property
    def elements(self) -> int:
        """Elements of all of them."""
        return self.size * len(self.names)

    @property
    def factored(self) -> tuple[int, int] | None:
        """Second largest and largest dimension, by position; ``None`` for vectors and scalars.

        As in Adafactor and ``learned_optimization``'s ``factored_dims``; of equal dimensions the later is larger.
        """
        if len(self.shape) < 2:
            return None
        *_, second, largest = sorted(range(len(self.shape)), key=self.shape.__getitem__)
        return second, largest


@dataclass(frozen=True)
class Layout:
    """Where the elements of a dictionary of tensors lie in one vector of N elements.

    Attributes:
        parts: The tensors by shape, in the order of the first of each shape.

    Example:
        >>> layout = Layout.of({"w": torch.zeros(2, 3), "b": torch.zeros(2), "v": torch.ones(2, 3)})
        >>> layout.names, layout.size
        (('w', 'v', 'b'), 14)
        >>> layout.spread(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    """

    parts: tuple[SameShape, ...]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of these tensors; the same for the same names and shapes in the same order."""
        return _layout(tuple((name, tensor.shape) for name, tensor in tensors.items()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names in the order in which the tensors lie."""
        return tuple(name for part in self.parts for name in part.names)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each tensor, in the same order."""
        return tuple(part.size for part in self.parts for _ in part.names)

    @cached_property
    def size(self) -> int:
        """The number of elements N."""
        return sum(part.elements for part in self.parts)

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The tensors as one vector, shape ``(N,)``."""
        flat = [tensors[name].reshape(-1) for name in self.names]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).to(dtype)

    def unflatten(self, vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: a dictionary in the order of ``like``, each tensor in its dtype."""
        # One split is one node in the graph; a slice for each tensor would cost a full-size zero tensor each.
        parts = dict(zip(self.names, torch.split(vector, list(self.sizes)), strict=True))
        return {name: parts[name].view_as(tensor).to(tensor.dtype) for name, tensor in like.items()}

    def split(self, rows: Tensor) -> list[Tensor]:
        """Views of a tensor of shape ``(..., N)``, one for each part, of shape ``(..., tensors, size)``."""
        if len(self.parts) == 1:
            pieces: Sequence[Tensor] = (rows,)
        else:
            pieces = torch.split(rows, [part.elements for part in self.parts], dim=-1)
        pairs = zip(pieces, self.parts, strict=True)
        return [piece.unflatten(-1, (len(part.names), part.size)) for piece, part in pairs]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`; shape ``(..., N)``."""
        flat = [piece.flatten(-2) for piece in pieces]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def spread(self, values: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """One value for each tensor, shape ``(tensors,)``, as one for each element, shape ``(N,)``.

        Args:
            values: In the order of :attr:`names`.
            sizes: How often each value is repeated; :attr:`sizes` by default.
        """
        counts = self.sizes if sizes is None else sizes
        repeats = torch.tensor(counts, device=values.device)
        return values.repeat_interleave(repeats, output_size=sum(counts))


@lru_cache(maxsize=256)
def _layout(tensors: tuple[tuple[str, torch.Size], ...]) -> Layout:
    names: dict[tuple[int, ...], list[str]] = {}
    for name, shape in tensors:
        names.setdefault(tuple(shape), []).append(name)
    return Layout(tuple(SameShape(shape, tuple(found)) for shape, found in names.items()))
