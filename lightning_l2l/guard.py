"""When a training is lost, take it back to where it was well: what raises the suspicion, and the snapshot.

Losses alone cannot say that a run is lost: they are noisy, may be negative, and in some tasks they rise by right (a
penalty that is faded in, reinforcement learning). So they raise a suspicion; where the same batch can be evaluated
twice, what decides is whether the weights of the snapshot do better on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2l.preserve import local

# The running mean of the losses moves by this part of the way to each.
_MEAN = 0.2
# Times the size of the first loss above it: a mean loss that far is a suspicion at once, and one above `_HIGH` if it
# stays there for a twentieth of the training, and for ten steps at least (a hundred where nobody knows its end).
_FAR, _HIGH = 30.0, 1.0
_PATIENCE = 0.05
_SETTLED = 8


class LossWatch:
    """The training losses, and whether they raise the suspicion that the run is lost. Its state is plain numbers.

    Args:
        planned_steps: The length of the training; may be infinite.

    Example:
        >>> watch = LossWatch(1000)
        >>> for loss in (2.3, 2.1, 8.0, 1.9):
        ...     watch.see(loss)
        >>> watch.is_suspicious
        False
        >>> watch.see(900.0)
        >>> watch.is_suspicious
        True
    """

    def __init__(self, planned_steps: float = math.inf) -> None:
        self.first = math.nan
        self.mean = math.nan
        self.is_suspicious = False
        self._patience = max(10.0, _PATIENCE * planned_steps if planned_steps < math.inf else 100.0)
        self._high = 0
        self._seen = 0  # since the start, or since the run was rolled back
        self._returns = 0
        self._tolerance = 1.0
        self._lowest = math.inf

    def see(self, loss: float) -> None:
        """The loss of one training step."""
        if not math.isfinite(loss):
            self.is_suspicious = True
            return
        if math.isnan(self.first):
            self.first = loss
        self.mean = self.mean + _MEAN * (loss - self.mean) if self._seen else loss
        self._seen += 1
        size = self._tolerance * abs(self.first)
        self._high = self._high + 1 if self.mean > self.first + _HIGH * size else 0
        if self.mean > self.first + _FAR * size or self._high > self._patience:
            self.is_suspicious = True

    def has_improved(self) -> bool:
        """Whether the mean loss is lower than ever when this was asked, and lower than the first one."""
        improved = self._seen > _SETTLED and self.mean < min(self._lowest, self.first)
        if improved:
            self._lowest = self.mean
        return improved

    def never_learned(self) -> bool:
        """Whether losses rose from the start, or no retry has helped: the rate is wrong, not a batch."""
        rose = self.mean > self.first + _HIGH * abs(self.first)
        return self._lowest == math.inf and (rose or self._returns > 0)

    def forget(self) -> None:
        """The run was rolled back: what comes now is another training from the snapshot."""
        self._seen, self._high, self.is_suspicious = 0, 0, False
        self._returns += 1

    def unfounded(self) -> None:
        """The suspicion was none: be slower with the next one."""
        self._tolerance *= 4
        self._high, self.is_suspicious = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, in a training of its own length."""
        vars(self).update({**state, "_patience": self._patience})


def is_worse(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the present weights do worse than those of the snapshot, on the same batches.

    Never where the losses of the snapshot are no numbers themselves: then the batch, or the loss, is what is wrong.
    """
    level, present = sum(before), sum(now)
    return math.isfinite(level) and not present <= level


class Snapshot:
    """A copy of the weights and buffers, to go back to. The optimizer's state starts afresh there.

    **Memory**: one copy of the trained parameters and the buffers. Frozen parameters are copied while they are not the
    larger part (a teacher is; the base of an adapter is not).

    Args:
        modules: The modules whose parameters and buffers are taken along; may be empty.
        optimizer: The optimizer, whose parameters are taken along wherever they are.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self._modules = list(modules)
        self._optimizer = optimizer
        self._saved: dict[Tensor, Tensor] = {}
        self.take()

    def _tensors(self) -> list[Tensor]:
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        frozen = [p for module in self._modules for p in module.parameters() if not p.requires_grad]
        if sum(p.numel() for p in frozen) > sum(p.numel() for p in trained):
            frozen = []
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        tensors = dict.fromkeys([*trained, *frozen, *buffers])
        return [tensor for tensor in tensors if not nn.parameter.is_lazy(tensor)]

    @torch.no_grad()
    def take(self) -> None:
        """Copy the present state in place of the former one, into the same memory as far as that fits."""
        live = self._tensors()
        kept = {t: self._saved[t] for t in live if t in self._saved and self._saved[t].shape == local(t).shape}
        for tensor, saved in kept.items():
            saved.copy_(local(tensor))
        self._saved = {t: kept[t] if t in kept else local(t).clone() for t in live}

    @torch.no_grad()
    def load(self) -> None:
        """Write the saved values into the live tensors, bit for bit."""
        for tensor, saved in self._saved.items():
            if local(tensor).shape == saved.shape:
                local(tensor).copy_(saved)

    def restore(self) -> None:
        """Go back: :meth:`load`, and begin the optimizer's state anew."""
        self.load()
        self._optimizer.state.clear()
