"""Parameters that a live optimizer updates together, and the state that goes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torchopt.base import GradientTransformation

# Tensors that are updated as one vector may have this many elements: about what the caches hold of it (there are
# some hundred numbers of features, activations and state for each).
_LARGEST = 2**16


@dataclass
class Cohort:
    """Parameters that are updated together since they came together.

    Attributes:
        keys: Their names in the optimizer.
        state: The state of the learned optimizer's transformation for them.
    """

    keys: tuple[str, ...]
    state: Any

    def state_dict(self) -> dict[str, Any]:
        """As plain tensors, numbers, strings, lists and dictionaries."""
        if _is_plain(self.state):
            return {"keys": list(self.keys), "state": self.state}
        # torchopt's states are named tuples, which torch.load(weights_only=True) refuses.
        return {"keys": list(self.keys), "leaves": optree.tree_leaves(self.state)}

    @staticmethod
    def restored(
        saved: Mapping[str, Any], transformation: GradientTransformation, parameters: Mapping[str, Tensor]
    ) -> Cohort:
        """What :meth:`state_dict` described, on the parameters' device."""
        keys = tuple(saved["keys"])
        if "leaves" in saved:
            like = transformation.init({key: parameters[key].detach() for key in keys})
            state = optree.tree_unflatten(optree.tree_structure(like), saved["leaves"])
        else:
            state = saved["state"]
        device = parameters[keys[0]].device
        return Cohort(keys, optree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, state))


def divided(keys: Sequence[str], parameters: Mapping[str, Tensor], independent: bool) -> list[tuple[str, ...]]:
    """Which parameters to update together.

    Args:
        keys: Their names.
        parameters: The parameters by name.
        independent: Whether it makes no difference. Then they are on one device and not too many at once.

    Example:
        >>> divided(["a", "b"], {"a": torch.empty(2**16), "b": torch.empty(1)}, independent=True)
        [('a',), ('b',)]
    """
    if not independent:
        return [tuple(keys)] if keys else []
    filling: dict[torch.device, tuple[list[str], int]] = {}
    full: list[tuple[str, ...]] = []
    for key in keys:
        parameter = parameters[key]
        names, elements = filling.get(parameter.device, ([], 0))
        if names and elements + parameter.numel() > _LARGEST:
            full.append(tuple(names))
            names, elements = [], 0
        names.append(key)
        filling[parameter.device] = (names, elements + parameter.numel())
    return full + [tuple(names) for names, _ in filling.values()]


def _is_plain(tree: Any) -> bool:
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_plain(value) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return all(_is_plain(value) for value in tree)
    return tree is None or isinstance(tree, (Tensor, bool, int, float, str))
