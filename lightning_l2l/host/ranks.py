"""Values that differ between the processes of a distributed run."""

from __future__ import annotations

from typing import Any

import torch.distributed


def from_all_ranks(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks; with a single process a list of one.

    Every process has to call this at the same point.

    Example:
        >>> from_all_ranks({"steps": 3})
        [{'steps': 3}]
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
