"""Many small tensors as one long one: the cost of an update is then that of a single tensor.

Tensors that can be moved alike go into a bucket; a bucket is concatenated, updated as one vector, and cut up again into
views. Views that lie one after the other in memory are put together again without a copy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.core.inner.dual import Dual
from lightning_l2l.core.inner.dual_functions import joined
from lightning_l2l.core.inner.rule import Rule, State, is_tensor
from lightning_l2l.core.neighbours import end_to_end

# In elements. Larger tensors gain nothing from being concatenated, they only pay the copy; a larger concatenation
# leaves the cache. Measured on one CPU core, 100 to 500 tensors, with and without a graph.
_LARGEST_CONCATENATED = 16_384
_LARGEST_CONCATENATION = 262_144


def buckets(
    rule: Rule,
    names: Iterable[str],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    state: Mapping[str, Mapping[str, Any]],
) -> list[list[str]]:
    """Parameters with a gradient, those together that can be updated as one vector."""
    found: dict[Hashable, list[str]] = {}
    for name in names:
        gradient = gradients.get(name)
        if gradient is None:
            continue
        parameter = parameters[name]
        key: Hashable = name
        if rule.elementwise and parameter.numel() <= _LARGEST_CONCATENATED:
            entries = state.get(name, {}).items()
            # Python numbers (the step) must agree, tensors only in dtype.
            kinds = tuple([(k, v.dtype if is_tensor(v) else v) for k, v in entries])
            key = (parameter.dtype, gradient.dtype, gradient.layout, parameter.device, kinds)
        found.setdefault(key, []).append(name)
    for first, *_ in found.values():
        _refuse_unsupported(first, parameters[first], gradients[first])
    return [part for bucket in found.values() for part in _portions(bucket, parameters)]


def _portions(names: list[str], parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The bucket in pieces that stay in the cache, and small enough for the allocator to reuse their memory."""
    portion: list[str] = []
    elements = 0
    for name in names:
        size = parameters[name].numel()
        if portion and elements + size > _LARGEST_CONCATENATION:
            yield portion
            portion, elements = [], 0
        portion.append(name)
        elements += size
    yield portion


def _refuse_unsupported(name: str, parameter: Tensor, gradient: Tensor | None) -> None:
    if parameter.is_complex():
        raise TypeError(
            f"Parameter {name!r} is complex. The meta-gradient of a complex parameter is not defined here: "
            "hold its real and imaginary part (torch.view_as_real) as the parameter."
        )
    if gradient is not None and gradient.layout != torch.strided:
        raise TypeError(
            f"The gradient of {name!r} is sparse, and sparse updates have no derivative in torch. Build the "
            "embedding with sparse=False."
        )


def updated(
    rule: Rule,
    settings: Mapping[str, Any],
    names: Sequence[str],
    parameters: Sequence[Any],
    gradients: Sequence[Any],
    states: Sequence[Mapping[str, Any]],
    *,
    apply: bool,
) -> list[tuple[Any, State]]:
    """One update of tensors of a kind, as one vector: the cost of the arithmetic is that of a single tensor.

    Args:
        rule: The arithmetic.
        settings: The hyperparameters; what differs between tensors is a dictionary by name.
        names: The tensors.
        parameters: Their values: tensors, or duals.
        gradients: The same.
        states: The optimizer's state for each.
        apply: Whether to return the new parameters; else what is to be added to them.

    Returns:
        For each tensor the result and its new state.
    """
    if len(names) == 1:
        delta, state = rule.update(parameters[0], gradients[0], states[0], _of_tensor(settings, names[0]))
        return [(parameters[0] + delta if apply else delta, state)]
    sizes = [parameter.numel() for parameter in parameters]
    flat = _concatenated(parameters)
    joint: dict[str, Any] = {}
    for key, value in states[0].items():
        entries = [state[key] for state in states]
        joint[key] = _concatenated(_expanded(entries, parameters)) if is_tensor(value) else value
    delta, joint = rule.update(flat, _concatenated(gradients), joint, _of_elements(settings, names, sizes, flat))

    separated: list[State] = [{} for _ in names]
    for key, value in joint.items():
        split = is_tensor(value) and value.shape == flat.shape
        parts = _separated(value, sizes, parameters) if split else [value] * len(names)
        for own, part in zip(separated, parts, strict=True):
            own[key] = part
    return list(zip(_separated(flat + delta if apply else delta, sizes, parameters), separated, strict=True))


def _of_tensor(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Hyperparameters for one tensor."""
    return {key: value[name] if isinstance(value, Mapping) else value for key, value in settings.items()}


def _of_elements(
    settings: Mapping[str, Any], names: Sequence[str], sizes: Sequence[int], flat: Tensor
) -> dict[str, Any]:
    """Hyperparameters for a concatenation: those that differ between tensors as one value for each element."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, Mapping):
            counts = torch.tensor(sizes, device=flat.device)
            values = joined([value[name] for name in names], torch.stack).to(flat.device)
            found[key] = values.repeat_interleave(counts, output_size=flat.numel())
    return found


def _expanded(entries: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    # A 0-dim entry of a larger parameter (NAdam's product of learned momenta, which lives where they do) holds
    # for all its elements.
    pairs = zip(entries, like, strict=True)
    return [e if e.shape == tensor.shape else e.to(tensor.device).expand(tensor.shape) for e, tensor in pairs]


def _concatenated(tensors: Sequence[Any]) -> Any:
    if any(isinstance(tensor, Dual) for tensor in tensors):
        return joined(tensors, end_to_end)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _separated(flat: Any, sizes: list[int], like: Sequence[Any]) -> list[Any]:
    if isinstance(flat, Dual):
        shapes = [tensor.value if isinstance(tensor, Dual) else tensor for tensor in like]
        values = _separated(flat.value, sizes, shapes)
        nothing = [None] * len(sizes)
        columns = [nothing if t is None else _separated(t, sizes, shapes) for t in flat.tangents]
        return [Dual(value, tangents) for value, *tangents in zip(values, *columns, strict=True)]
    # One split is one node in the graph; slices would each make a zero tensor of full size going backward.
    parts = torch.split(flat, sizes)
    # view_as, since view(shape) spends three times as long on parsing the shape.
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
