"""The global random number generators as a value, so that a step can be taken again with the same numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Where the generators stand that a loss may draw from: torch's (CPU and CUDA), Python's and numpy's.

    Example:
        >>> before = RandomState.now()
        >>> first = torch.rand(1)
        >>> before.restore()
        >>> bool(torch.rand(1) == first)
        True
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """The present state.

        Args:
            devices: Where the computation runs. Of the CUDA generators only those of these devices are kept.
        """
        indices = {torch.cuda._utils._get_device_index(d, optional=True) for d in devices if d.type == "cuda"}
        cuda = {index: torch.cuda.get_rng_state(index) for index in indices}
        # A numpy that nobody has imported has not been drawn from.
        numpy = sys.modules.get("numpy")
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy and numpy.random.get_state())

    def restore(self) -> None:
        """Put the generators back to where they stood."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    @staticmethod
    def seed(seed: int, devices: Iterable[torch.device] = ()) -> None:
        """Seed the same generators.

        Args:
            seed: The seed.
            devices: Where the computation runs.
        """
        # Not torch.manual_seed: it seeds the generators of all devices.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
