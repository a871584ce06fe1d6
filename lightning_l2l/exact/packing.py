"""The parameters of an unroll as few long vectors.

An unroll over many small tensors spends its time on taking each of them by name, not on arithmetic. Tensors that the
optimizer treats alike are therefore laid end to end once, before the first step: parameters, state, gradients and
tangents are then one vector each, from step to step. Only the loss sees the tensors by name, as views.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

Tensors = dict[str, Tensor]
States = Mapping[str, Mapping[str, Any]]

# In elements. Larger tensors gain nothing from being concatenated, they only pay the copy; a longer vector leaves the
# cache. Measured on one CPU core, 100 to 500 tensors, with and without a graph.
_LARGEST_PACKED = 16_384
_LONGEST_PACK = 262_144


@dataclass(frozen=True)
class Pack:
    """Tensors that lie end to end.

    Attributes:
        names: Whose they are.
        shapes: Empty tensors of their shapes. (view_as, since view(shape) spends three times as long on the shape.)
        sizes: Their numbers of elements.
    """

    names: tuple[str, ...]
    shapes: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """The tensors, as views of the vector."""
        if len(self.names) == 1:
            return [vector]
        # "Unsafe", since autograd does not know that they share memory: so a loss may write them in place, as it might
        # each on its own (an embedding with max_norm does), and the vector has it.
        parts = torch.unsafe_split_with_sizes(vector, self.sizes)
        return [part.view_as(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def vector(self, tensors: Mapping[str, Any]) -> Tensor:
        """The tensors end to end, as a copy; a single one as it is."""
        found: Tensor = tensors[self.names[0]]
        if len(self.names) > 1:
            # One call for all: reshaping each from Python takes three times as long.
            found = _flatten_dense_tensors([tensors[name] for name in self.names])
        return found

    def joint_state(self, state: States) -> Mapping[str, Any]:
        """The optimizer's state for the vector."""
        first = state.get(self.names[0], {})
        if len(self.names) == 1:
            return first
        return {
            key: self.vector({name: state[name][key] for name in self.names}) if isinstance(value, Tensor) else value
            for key, value in first.items()
        }

    def own_states(self, joint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The optimizer's state for each tensor."""
        own: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for key, value in joint.items():
            split = isinstance(value, Tensor) and value.dim() == 1 and len(value) == sum(self.sizes)
            values = self.pieces(value) if split else [value] * len(self.names)
            for entries, part in zip(own.values(), values, strict=True):
                entries[key] = part
        return own


@dataclass(frozen=True)
class Packing:
    """Which tensors lie end to end. A pack goes by the name of its first tensor, whose parameter group is its own.

    Attributes:
        names: All parameters, in the order in which the loss knows them.
        packs: By the name of the first tensor; one that lies alone is a pack, too.
    """

    names: tuple[str, ...]
    packs: Mapping[str, Pack]

    @classmethod
    def of(cls, parameters: Tensors, state: Any, alike: Sequence[Sequence[str]]) -> Packing | None:
        """What can be packed; ``None`` for nothing.

        Args:
            parameters: By name.
            state: The optimizer's state.
            alike: The names, those together that the optimizer treats alike.
        """
        if all(len(names) < 2 for names in alike):
            return None
        found: dict[Hashable, list[str]] = {}
        for group, names in enumerate(alike):
            for name in names:
                found.setdefault((group, _kind(name, parameters[name], state.get(name, {}))), []).append(name)
        packs = {}
        for names in found.values():
            for portion in _portions(names, parameters):
                tensors = [parameters[name] for name in portion]
                shapes = tuple([torch.empty_like(tensor, device="meta") for tensor in tensors])
                packs[portion[0]] = Pack(tuple(portion), shapes, tuple([tensor.numel() for tensor in tensors]))
        if len(packs) == len(parameters):
            return None
        return cls(tuple(parameters), {name: packs[name] for name in parameters if name in packs})

    def pieces(self, packed: Tensors) -> Tensors:
        """The tensors by name, as views, from one vector for each pack."""
        found: Tensors = {}
        for pack, vector in zip(self.packs.values(), packed.values(), strict=True):
            found.update(zip(pack.names, pack.pieces(vector), strict=True))
        return {name: found[name] for name in self.names}

    def packed(self, tensors: Tensors) -> Tensors:
        """One vector for each pack, as a copy, from the tensors by name."""
        return {name: pack.vector(tensors) for name, pack in self.packs.items()}

    def gathered(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None] | None:
        """Gradients as one vector for each pack; ``None`` if only some tensors of a pack have one."""
        found: dict[str, Tensor | None] = {}
        for first, pack in self.packs.items():
            missing = [gradients[name] is None for name in pack.names]
            if any(missing) and not all(missing):
                return None
            found[first] = None if missing[0] else pack.vector(gradients)
        return found

    def packed_state(self, state: States) -> dict[str, Mapping[str, Any]]:
        """The optimizer's state for each pack."""
        return {first: pack.joint_state(state) for first, pack in self.packs.items()}

    def state_by_name(self, state: States) -> dict[str, Mapping[str, Any]]:
        """The optimizer's state for each tensor."""
        own: dict[str, Mapping[str, Any]] = {}
        for first, pack in self.packs.items():
            own.update(pack.own_states(state.get(first, {})))
        return {name: own[name] for name in self.names}


def _kind(name: str, parameter: Tensor, entries: Mapping[str, Any]) -> Hashable:
    """Equal for tensors that may lie end to end; a large one gains nothing from it, and pays for the copies."""
    # A tensor with strides of its own keeps them: other kernels would run on a copy in another order.
    if parameter.numel() > _LARGEST_PACKED or not parameter.is_contiguous() or parameter.is_complex():
        return name
    tensors = [value for value in entries.values() if isinstance(value, Tensor)]
    if any(tensor.shape != parameter.shape for tensor in tensors):
        return name
    kinds = tuple([(key, v.dtype if isinstance(v, Tensor) else v) for key, v in entries.items()])
    return parameter.dtype, parameter.device, kinds


def _portions(names: Sequence[str], parameters: Tensors) -> Iterator[Sequence[str]]:
    """Names in pieces whose vectors stay in the cache."""
    begin = elements = 0
    for end, name in enumerate(names):
        if end > begin and elements + parameters[name].numel() > _LONGEST_PACK:
            yield names[begin:end]
            begin, elements = end, 0
        elements += parameters[name].numel()
    yield names[begin:]
