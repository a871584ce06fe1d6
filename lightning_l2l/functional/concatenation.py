"""Many small tensors as one long one: the cost of an update is then that of a single tensor.

A bucket is concatenated, updated as one vector, and cut up again into views. A run of tensors of one shape is cut by a
single operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from lightning_l2l.functional.buckets import Bucket
from lightning_l2l.functional.dual import Dual
from lightning_l2l.functional.dual_functions import joined
from lightning_l2l.functional.rule import Rule, State, is_tensor

# Number and shape of tensors side by side.
_Run = tuple[int, torch.Size]


def updated(rule: Rule, settings: Mapping[str, Any], bucket: Bucket, *, apply: bool) -> tuple[list[Any], list[State]]:
    """One update of tensors of a kind, as one vector: the cost of the arithmetic is that of a single tensor.

    Args:
        rule: The arithmetic.
        settings: The hyperparameters; what differs between tensors is a dictionary by name.
        bucket: The tensors.
        apply: Whether to return the new parameters; else what is to be added to them.

    Returns:
        For each tensor the result, and its new state.
    """
    names, parameters, gradients, states, shapes = bucket
    if len(names) == 1:
        delta, state = rule.update(parameters[0], gradients[0], states[0], _of_tensor(settings, names[0]))
        return [parameters[0] + delta if apply else delta], [state]
    flat = _concatenated(parameters)
    joint: dict[str, Any] = {}
    for key, value in states[0].items():
        entries = [state[key] for state in states]
        joint[key] = _concatenated(_expanded(entries, parameters, shapes)) if is_tensor(value) else value
    delta, joint = rule.update(flat, _concatenated(gradients), joint, _of_elements(settings, names, shapes, flat))

    runs = [(len(list(same)), shape) for shape, same in groupby(shapes)]
    separated: list[State] = [{} for _ in names]
    for key, value in joint.items():
        split = is_tensor(value) and value.shape == flat.shape
        parts = _separated(value, runs) if split else [value] * len(names)
        for own, part in zip(separated, parts, strict=True):
            own[key] = part
    return _separated(flat + delta if apply else delta, runs), separated


def _of_tensor(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Hyperparameters for one tensor."""
    return {key: value[name] if isinstance(value, Mapping) else value for key, value in settings.items()}


def _of_elements(
    settings: Mapping[str, Any], names: Sequence[str], shapes: Sequence[torch.Size], flat: Tensor
) -> dict[str, Any]:
    """Hyperparameters for a concatenation: those that differ between tensors as one value for each element."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, Mapping):
            counts = torch.tensor([shape.numel() for shape in shapes], device=flat.device)
            values = joined([value[name] for name in names], torch.stack).to(flat.device)
            found[key] = values.repeat_interleave(counts, output_size=flat.numel())
    return found


def _expanded(entries: Sequence[Any], like: Sequence[Any], shapes: Sequence[torch.Size]) -> Sequence[Any]:
    # A 0-dim entry of a larger parameter (NAdam's product of learned momenta, which lives where they do) holds
    # for all its elements.
    if [entry.shape for entry in entries] == shapes:
        return entries
    return [entry.to(tensor.device).expand(tensor.shape) for entry, tensor in zip(entries, like, strict=True)]


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, as a copy."""
    # Inside vmap: torch 2.13 cannot batch the one call.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    # One call for all: reshaping each from Python takes three times as long.
    vector: Tensor = _flatten_dense_tensors(tensors)
    return vector


def _concatenated(tensors: Sequence[Any]) -> Any:
    return joined(tensors, flattened)


def _separated(flat: Any, runs: Sequence[_Run]) -> list[Any]:
    """A vector cut into tensors of these shapes, as views."""
    if isinstance(flat, Dual):
        values = _separated(flat.value, runs)
        nothing = [None] * len(values)
        columns = [nothing if t is None else _separated(t, runs) for t in flat.tangents]
        return [Dual(value, tangents) for value, *tangents in zip(values, *columns, strict=True)]
    # Few nodes in the graph; slices would each make a zero tensor of full size going backward.
    parts = torch.split(flat, [count * shape.numel() for count, shape in runs])
    return [
        view for part, (count, shape) in zip(parts, runs, strict=True) for view in part.view(count, *shape).unbind()
    ]
