"""Tensors that lie one after the other in memory, taken together again without a copy.

An update of many small tensors works on one long vector and returns views of it. Whoever treats all elements alike may
go on with the vector; this is how to find it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def merged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The elements of tensors without history in as few vectors as possible without a copy, in any order."""
    return [_vector(run) for run in _runs(sorted(tensors, key=Tensor.data_ptr))]


def mapped(tensors: Sequence[Tensor], function: Callable[[list[Tensor]], Sequence[Tensor]]) -> list[Tensor]:
    """An elementwise function of tensors without history, computed on as few vectors as possible.

    Args:
        tensors: Of any shapes and dtypes.
        function: Takes a list of vectors and returns as many of the same lengths.

    Returns:
        The results in the tensors' shapes; those of neighbours are neighbours.
    """
    order = sorted(range(len(tensors)), key=[tensor.data_ptr() for tensor in tensors].__getitem__)
    runs = _runs([tensors[place] for place in order])
    shaped: list[Tensor] = []
    for result, run in zip(function([_vector(run) for run in runs]), runs, strict=True):
        parts = torch.split(result, [tensor.numel() for tensor in run]) if len(run) > 1 else [result]
        # view_as, since view(shape) spends three times as long on parsing the shape.
        shaped += [part.view_as(tensor) for part, tensor in zip(parts, run, strict=True)]
    placed = dict(zip(order, shaped, strict=True))
    return [placed[place] for place in range(len(tensors))]


def _runs(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors, cut where one does not lie directly after the one before it."""
    runs: list[list[Tensor]] = []
    end = limit = 0
    for tensor in tensors:
        address = tensor.data_ptr()
        contiguous = tensor.is_contiguous()
        after = address + tensor.numel() * tensor.element_size()
        if runs and address == end and after <= limit and contiguous and tensor.dtype == runs[-1][0].dtype:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
            # Neighbours by chance are in different storages: a run must not leave that of its first tensor.
            storage = tensor.untyped_storage()
            limit = storage.data_ptr() + storage.nbytes() if contiguous else 0
        end = after
    return runs


def _vector(run: list[Tensor]) -> Tensor:
    if len(run) == 1:
        return run[0].reshape(-1)
    return run[0].as_strided((sum(tensor.numel() for tensor in run),), (1,))
