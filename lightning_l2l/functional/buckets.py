"""Which tensors can be updated as one: sorted into buckets by all that an update depends on.

Everything is looked at in columns, one attribute of all tensors at a time: with hundreds of small tensors, what Python
does for each of them is the cost of a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_l2l.functional.rule import Rule, is_tensor

# In elements. Larger tensors gain nothing from being concatenated, they only pay the copy; a larger concatenation
# leaves the cache. Measured on one CPU core, 100 to 500 tensors, with and without a graph.
LARGEST_CONCATENATED = 16_384
_LARGEST_CONCATENATION = 262_144


class Bucket(NamedTuple):
    """Tensors that can be updated as one vector; those of one shape are side by side.

    Attributes:
        names: Their names.
        parameters: Their values: tensors, or duals.
        gradients: The same.
        states: The optimizer's state for each; the keys are in the same order for all.
        shapes: Their shapes.
    """

    names: list[str]
    parameters: list[Any]
    gradients: list[Any]
    states: list[Mapping[str, Any]]
    shapes: list[torch.Size]


def buckets(
    rule: Rule,
    names: Iterable[str],
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    state: Mapping[str, Mapping[str, Any]],
) -> Iterator[Bucket]:
    """Parameters with a gradient, those together that can be updated as one vector.

    Raises:
        TypeError: A parameter is complex or a gradient sparse.
    """
    names = [name for name in names if gradients.get(name) is not None]
    own = [parameters[name] for name in names]
    everything = Bucket(
        names,
        own,
        [gradients[name] for name in names],
        [state.get(name, {}) for name in names],
        [parameter.shape for parameter in own],
    )
    sizes = [shape.numel() for shape in everything.shapes]
    largest = LARGEST_CONCATENATED if rule.elementwise else -1
    dtypes, layouts = [parameter.dtype for parameter in own], [gradient.layout for gradient in everything.gradients]
    _refuse_unsupported(names, dtypes, layouts)
    columns = [
        [None if size <= largest else name for name, size in zip(names, sizes, strict=True)],
        dtypes,
        [gradient.dtype for gradient in everything.gradients],
        [parameter.device for parameter in own],
        *_kinds(everything.states),
    ]
    found: dict[Hashable, dict[torch.Size, list[int]]] = {}
    for place, (key, shape) in enumerate(zip(_keys(columns), everything.shapes, strict=True)):
        found.setdefault(key, {}).setdefault(shape, []).append(place)
    for by_shape in found.values():
        for places in portions([place for alike in by_shape.values() for place in alike], sizes):
            yield Bucket._make([[column[place] for place in places] for column in everything])


def _kinds(states: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """What has to agree between states: the keys, Python numbers (the step), and of tensors the dtype."""
    keys = [tuple(entries) for entries in states]
    if _is_uniform(keys):
        return [[_kind(entries[key]) for entries in states] for key in (keys[0] if keys else ())]
    return [[tuple([(key, _kind(value)) for key, value in entries.items()]) for entries in states]]


def _kind(value: Any) -> Any:
    return value.dtype if is_tensor(value) else value


def _keys(columns: Sequence[Sequence[Any]]) -> list[Hashable]:
    """For each place a key, equal where all columns are; columns of one value, which most are, are left out."""
    varying = [column for column in columns if not _is_uniform(column)]
    return list(zip(*varying, strict=True)) if varying else [()] * len(columns[0])


def _is_uniform(column: Sequence[Any]) -> bool:
    return not column or column.count(column[0]) == len(column)


def portions(places: list[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """A bucket in pieces that stay in the cache, and small enough for the allocator to reuse their memory."""
    begin = elements = 0
    for end, place in enumerate(places):
        if end > begin and elements + sizes[place] > _LARGEST_CONCATENATION:
            yield places[begin:end]
            begin, elements = end, 0
        elements += sizes[place]
    yield places[begin:]


def _refuse_unsupported(names: list[str], dtypes: list[torch.dtype], layouts: list[torch.layout]) -> None:
    for dtype in set(dtypes):
        if dtype.is_complex:
            raise TypeError(
                f"Parameter {names[dtypes.index(dtype)]!r} is complex. The meta-gradient of a complex parameter is not "
                "defined here: hold its real and imaginary part (torch.view_as_real) as the parameter."
            )
    for layout in set(layouts):
        if layout != torch.strided:
            raise TypeError(
                f"The gradient of {names[layouts.index(layout)]!r} is sparse, and sparse updates have no derivative in "
                "torch. Build the embedding with sparse=False."
            )
