"""Training batches, remembered as they pass: never read a second time, since that would move the run's shuffle."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_l2l.host.training_step import Window, copied_batch

# Remembered batches up to this many bytes go into checkpoints, so that a run resumes exactly.
_LARGEST_SAVED = 64 * 2**20


class RememberedWindows:
    """The last few optimizer steps' batches.

    Args:
        length: How many optimizer steps to remember.
        shares: By how many processes the room in a checkpoint is shared.
    """

    def __init__(self, length: int, shares: int = 1) -> None:
        self.length = length
        self._largest_saved = _LARGEST_SAVED // shares
        self._windows: deque[Window] = deque(maxlen=length)
        self._open: list[tuple[Any, int]] = []

    def see(self, batch: Any, batch_index: int, *, first: bool) -> None:
        """A micro-batch passes; it is copied, since the user's step may change it.

        Args:
            batch: The batch.
            batch_index: Its index in the epoch.
            first: Whether a new optimizer step begins with it; an epoch may have been left in the middle of one.
        """
        if first:
            self._open = []
        self._open.append((copied_batch(batch), batch_index))

    def skip(self) -> None:
        """The last micro-batch was not trained on: the step returned ``None``."""
        self._open = self._open[:-1]

    def close(self, divisor: int) -> None:
        """The optimizer has stepped on the micro-batches seen since the last time."""
        if self._open:
            self._windows.append(Window(tuple(self._open), divisor))
        self._open = []

    def forget(self) -> None:
        """Drop everything, an unfinished window too."""
        self._windows.clear()
        self._open = []

    def unfinished(self) -> Window:
        """The micro-batches seen since the optimizer last stepped; at least one."""
        return Window(tuple(self._open), len(self._open))

    def __len__(self) -> int:
        return len(self._windows)

    def last(self) -> list[Window]:
        """The windows, oldest first."""
        return list(self._windows)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly, or nothing if a batch is no plain container or is too large to save."""
        windows = [{"batches": list(window.batches), "divisor": window.divisor} for window in self._windows]
        state: dict[str, Any] = {"windows": windows, "open": list(self._open)}
        size = _plain_size(state)
        if size is None or size > self._largest_saved:
            return {}
        # Checkpoints are loaded to the CPU; a batch may have tensors there on purpose (lengths of sequences).
        state["on_device"] = [tensor.device.type != "cpu" for tensor in _tensors(state)]
        return state

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a saved state, with its tensors back where they were; from nothing, start to remember anew."""
        self.forget()
        saved = {"windows": state.get("windows", []), "open": state.get("open", [])}
        places = iter(state.get("on_device", []))
        saved = apply_to_collection(saved, torch.Tensor, lambda tensor: tensor.to(device if next(places) else "cpu"))
        for window in saved["windows"]:
            self._windows.append(Window(tuple(tuple(item) for item in window["batches"]), window["divisor"]))
        self._open = [tuple(item) for item in saved["open"]]


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    apply_to_collection(value, torch.Tensor, found.append)
    return found


def _plain_size(value: Any) -> int | None:
    """Bytes of the tensors in plain containers; ``None`` if there is something that a checkpoint cannot hold."""
    if type(value) is torch.Tensor:
        return value.numel() * value.element_size()
    if value is None or type(value) in (int, float, bool, str):
        return 0
    if type(value) is dict:
        value = [*value.keys(), *value.values()]
    if type(value) not in (list, tuple):
        return None
    sizes = [_plain_size(item) for item in value]
    return None if any(size is None for size in sizes) else sum(size for size in sizes if size is not None)
