"""Calls a module with other tensors instead of its own, and puts its own back whatever the module looks like."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], *arguments: Any) -> Any:
    """``module(*arguments)`` with these parameters and buffers; those that are not given are the module's own.

    ``torch.func.functional_call`` by itself leaves the substitutes in a module that holds another module under two
    names (``nn.Sequential(layer, nn.Tanh(), layer)``, say): it swaps them in twice, and so never finds what was there
    before (torch 2.13). The user's optimizer would go on with tensors that are in no module any more. Here every
    attribute that holds a tensor is swapped once.

    Args:
        module: The module.
        tensors: Substitutes, with the names of ``module.named_parameters()`` and ``module.named_buffers()``.
        arguments: What the module is called with.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> twice = nn.Sequential(layer, layer)
        >>> call_with(twice, {"0.weight": torch.tensor([[2.0]])}, torch.tensor([3.0]))
        tensor([12.])
        >>> isinstance(layer.weight, nn.Parameter)
        True
    """
    substitutes = {path: tensors[name] for path, name in _paths(module).items() if name in tensors}
    return functional_call(module, substitutes, arguments, tie_weights=False)


def _paths(module: nn.Module) -> dict[str, str]:
    """For every path to a tensor, each once, the name under which the tensor is known."""
    known: dict[int, str] = {}
    paths: dict[str, str] = {}
    for prefix, child in module.named_modules():  # a module with two names is there once, under the first
        for name, tensor in chain(child._parameters.items(), child._buffers.items()):
            if tensor is not None:
                path = f"{prefix}.{name}" if prefix else name
                paths[path] = known.setdefault(id(tensor), path)
    return paths
