"""Whether a training is lost: from its losses, and from a comparison with an earlier state on the same batches.

Losses alone cannot say it: they are noisy, may be negative, and of some tasks they rise by right (a penalty that is
faded in, reinforcement learning). So they only raise a suspicion; what decides is whether earlier weights do better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A loss above the first one by more than this many times its size is high.
_HIGH = 2.0
# So many of them since the last time that all was well are a suspicion. One may be a batch.
_SEVERAL = 3
_RECENT = 10
# Parts of what the lowest median of recent losses had won (if that was at least _WON of the first loss, and clearly
# more than these losses differ): a run that has lost the first is not well, one that has lost the second has relapsed.
_SLIP = 0.25
_RELAPSE = 0.5
_WON = 0.1
_CLEARLY_MORE = 3.0
# In units of the loss before, or of its spread over batches where that is larger.
_CLEARLY_WORSE = 0.5
_WORSE = 0.1
_CLEARLY_BETTER = 0.02
_FAR_ABOVE = 9.0
# Share of gradient entries that are exactly zero (measured on digits: 0.1 to 0.6 in networks that train well, 0.8 to 1
# in those whose units have died).
_MANY_ZEROS = 0.8
# A network has died if so much less of its gradient is left; what is left has to do this much better to be spared.
_LEFT_OVER = 0.25
_MUCH_BETTER = 0.25


class LossWatch:
    """The losses of a training, and whether they are suspicious. Its state is plain numbers.

    A loss is high if it lies above the first one by more than twice its size. Three high losses, or one that is
    not a number, are a suspicion; so are gradients that are almost all exactly zero, and a relapse: the recent losses
    have lost half of what had been won. Each suspicion that turns out to be unfounded makes the next one harder to
    raise, so a task whose losses do such things is soon left alone.

    Args:
        saved: What :meth:`state_dict` returned in the run that is resumed.

    Example:
        >>> watch = LossWatch()
        >>> for loss in (2.3, 2.1, 8.0, 1.9):
        ...     watch.see(loss)
        >>> watch.suspicious, watch.calm
        (False, False)
        >>> for loss in (40.0, 900.0):
        ...     watch.see(loss)
        >>> watch.suspicious
        True
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {}
        self.start: float = saved.get("start", math.nan)
        self._threshold: float = saved.get("threshold", math.nan)
        self._tolerated: int = saved.get("tolerated", 0)
        self._broken: int = saved.get("broken", 0)
        self._recent: list[float] = list(saved.get("recent", []))
        self._lowest: float = saved.get("lowest", math.inf)
        self._spread: float = saved.get("spread", 0.0)
        self._relapse: float = saved.get("relapse", _RELAPSE)
        self.high: list[float] = list(saved.get("high", []))
        self._zeros: float = saved.get("zeros", 0.0)
        self._tolerated_zeros: float = saved.get("tolerated_zeros", _MANY_ZEROS)

    def see(self, loss: float) -> None:
        """The loss of one training step."""
        if not math.isfinite(loss):
            self._broken += 1
            return
        self._recent = [*self._recent, loss][-_RECENT:]
        if self._level < self._lowest:
            self._lowest, self._spread = self._level, statistics.pstdev(self._recent)
        if math.isnan(self.start):
            self.start, self._threshold = loss, loss + _HIGH * abs(loss)
        elif loss > self._threshold:
            self.high.append(loss)

    def see_zeros(self, share: float) -> None:
        """The share of gradient entries of the last step that are exactly zero."""
        self._zeros = share

    @property
    def _silent(self) -> bool:
        return self._zeros > self._tolerated_zeros

    @property
    def _level(self) -> float:
        return statistics.median(self._recent) if len(self._recent) == _RECENT else math.inf

    @property
    def relapsed(self) -> bool:
        """Whether the recent losses have lost half of what had been won."""
        return self._has_lost(self._relapse)

    def _has_lost(self, part: float) -> bool:
        won = self.start - self._lowest
        has_won = won > max(_WON * abs(self.start), _CLEARLY_MORE * self._spread)
        return has_won and math.inf > self._level > self._lowest + part * won

    @property
    def suspicious(self) -> bool:
        """Whether the losses since the last time that all was well call for a comparison."""
        return self.alarming or self.relapsed

    @property
    def alarming(self) -> bool:
        """The same, but for a relapse: that needs something to compare by."""
        return len(self.high) >= _SEVERAL or self._broken > self._tolerated or self._silent

    @property
    def calm(self) -> bool:
        """Whether there was nothing at all since."""
        return not (self.high or self._broken or self._silent or self._has_lost(_SLIP))

    @property
    def below_the_first(self) -> bool:
        """Whether the recent losses are mostly not above the first one."""
        return bool(self._recent) and statistics.median(self._recent) <= self.start

    @property
    def out_of_nowhere(self) -> bool:
        """Whether there was a loss that is no number, and no sign of it before."""
        return self._broken > 0 and not self.high and not self._silent

    def forget(self) -> None:
        """All is well, or well again."""
        self.high, self._recent, self._broken, self._zeros = [], [], 0, 0.0

    def unfounded(self) -> None:
        """The suspicion was none: be slower with the next one."""
        if self.high:
            self._threshold = max(self._threshold, *self.high)
        if self._silent:  # a large embedding has many zeros by right
            self._tolerated_zeros = (1 + self._zeros) / 2
        self._tolerated = max(self._tolerated, 2 * self._broken)
        if self.relapsed:
            self._relapse *= 2
        self._lowest = math.inf
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "start": self.start,
            "threshold": self._threshold,
            "tolerated": self._tolerated,
            "broken": self._broken,
            "high": list(self.high),
            "recent": list(self._recent),
            "lowest": self._lowest,
            "spread": self._spread,
            "relapse": self._relapse,
            "zeros": self._zeros,
            "tolerated_zeros": self._tolerated_zeros,
        }


def is_lost(
    high: Sequence[float],
    before: Sequence[float],
    now: Sequence[float],
    *,
    dead: bool = False,
    relapsed: bool = False,
) -> bool:
    """Whether to go back to an earlier state.

    Args:
        high: The training losses that raised the suspicion; those that are numbers.
        before: Losses of the earlier state on some batches.
        now: Losses of the present state on the same batches, with the same random numbers.
        dead: Whether almost all gradients have become zero since (:func:`has_died`).
        relapsed: Whether the training losses say so, too (:attr:`LossWatch.relapsed`).

    Returns:
        ``True`` where the present state's losses are no numbers or clearly worse. Where they are about the same, that
        depends on what happened in between: a network that was at ten times the loss is now a ruined one, and a dead
        one will not recover. Never where the earlier state's losses are no numbers themselves.

    Example:
        >>> is_lost([], before=[2.3, 2.4], now=[math.nan, math.nan])
        True
        >>> is_lost([7.1, 7.5, 7.2], before=[2.3, 2.4], now=[2.2, 2.2])  # loud, but it learned something
        False
        >>> is_lost([300.0, 900.0, 80.0], before=[2.31, 2.32], now=[2.3, 2.31])  # ruined: at chance level again
        True
    """
    level, present = _mean(before), _mean(now)
    if not math.isfinite(level):
        return False
    if not math.isfinite(present):
        return True
    size = max(abs(level), statistics.pstdev(before))
    if present > level + (_WORSE if relapsed else _CLEARLY_WORSE) * size:
        return True
    if present < level - (_MUCH_BETTER if dead else _CLEARLY_BETTER) * size:
        return False
    return dead or bool(high) and statistics.median(high) > level + _FAR_ABOVE * size


def is_better(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the present state has a lower loss than the earlier one, on the same batches.

    Example:
        >>> is_better([2.3, 2.5], [2.4, 2.3]), is_better([2.3], [math.nan]), is_better([], [])
        (True, False, False)
    """
    return _mean(now) < _mean(before)


def zero_share(gradients: Sequence[Tensor | None]) -> float:
    """The share of gradient entries that are exactly zero; parameters without a gradient do not count.

    Example:
        >>> zero_share([torch.tensor([0.0, 0.0, 1.0]), None, torch.zeros(1)])
        0.75
    """
    share = share_of_zeros(gradients)
    return 0.0 if share is None else share.item()


def share_of_zeros(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The same, where the gradients are, without waiting for it; ``None`` if there are none."""
    present = [gradient for gradient in gradients if gradient is not None]
    entries = sum(gradient.numel() for gradient in present)
    if not entries:
        return None
    # Not the zeros: a comparison makes a tensor to count in (and is five times as slow; torch 2.13, CPU).
    others = torch.stack([gradient.count_nonzero() for gradient in present]).sum()
    return (entries - others).double() / entries


def has_died(before: float, now: float) -> bool:
    """Whether the share of zero gradients on the same batch has become that of a network whose units are off.

    Example:
        >>> has_died(before=0.3, now=0.998), has_died(before=0.95, now=0.96)
        (True, False)
    """
    return now > _MANY_ZEROS and 1 - now < _LEFT_OVER * (1 - before)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
