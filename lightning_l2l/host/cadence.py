"""When meta-updates are due."""

from __future__ import annotations

from bisect import bisect_right


class Cadence:
    """The optimizer steps with a meta-update: at multiples of an interval, and more and more seldom.

    The next one is about a fraction ``growth`` of the steps so far away. What is right for a part of the run is still
    about right a little later, and a meta-update costs a training step or several. Which steps these are follows from
    their number alone, so a resumed run goes on as it would have.

    Args:
        interval: Optimizer steps from one meta-update to the next, at first.
        growth: Least part of the steps so far that lies between two meta-updates; 0 for all multiples.
        planned: Optimizer steps of the whole run; ``inf`` where nobody knows. A run shorter than two intervals has
            correspondingly shorter ones.

    Example:
        >>> cadence = Cadence(interval=20, growth=0.1)
        >>> [step for step in range(700) if cadence.is_due(step)][-5:]
        [460, 500, 540, 600, 660]
    """

    def __init__(self, interval: int, growth: float, planned: float = float("inf")) -> None:
        self.interval = interval if planned >= 2 * interval else max(1, int(planned) // 4)
        self._growth = growth
        self._due = [self.interval]

    def steps_to_go(self, step: int) -> int:
        """Optimizer steps until the next meta-update, the coming one included.

        Args:
            step: Optimizer steps that have been taken.
        """
        while self._due[-1] <= step:
            intervals = max(1, round(self._growth * self._due[-1] / self.interval))
            self._due.append(self._due[-1] + intervals * self.interval)
        return self._due[bisect_right(self._due, step)] - step

    def is_due(self, step: int) -> bool:
        """Whether a meta-update follows the last optimizer step.

        Args:
            step: Optimizer steps that have been taken.
        """
        return step > 0 and self.steps_to_go(step - 1) == 1

    def looks(self, step: int) -> bool:
        """Whether the run is looked after now: at every multiple of the interval.

        Args:
            step: Optimizer steps that have been taken.
        """
        return step % self.interval == 0
