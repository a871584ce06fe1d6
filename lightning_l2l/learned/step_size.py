"""The step size as a meta-parameter: the simplest learned optimizer, and the default one."""

from __future__ import annotations

from typing import Any

from lightning_l2l.learned.attached import Per
from lightning_l2l.learned.hyperparameters import LearnedHyperparameters


class LearnedStepSize(LearnedHyperparameters):
    """Learns the learning rate of the optimizer that trains, as a positive factor on what the scheduler says.

    The meta-parameter ``learning_rate`` is the logarithm of that factor (float64, zero at first): meta-steps
    are relative, the rate cannot become negative, and the schedule goes on underneath. The paper learns a
    scalar step size by gradient descent on a meta-objective (arXiv 2006.16495, section 2); the logarithm is
    ours.

    Args:
        per: One factor for the whole optimizer, for each parameter group, or for each tensor.
        minimum: Smallest rate that may be learned (before the schedule).
        maximum: Largest rate that may be learned (before the schedule).

    Raises:
        ValueError: Unknown ``per``, or bounds that are no interval above 0.

    Example:
        >>> import torch
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> learned.learning_rate.tolist(), learned.values()
        ([0.0], [{'lr': 0.1}])
        >>> parameters = {"w": torch.tensor([1.0])}
        >>> optimizer = learned.transformation()
        >>> updates, _ = optimizer.update({"w": torch.tensor([3.0])}, optimizer.init(parameters), params=parameters)
        >>> updates["w"].sum().backward()  # d(-lr * 3) / d log lr
        >>> round(learned.learning_rate.grad.item(), 6)
        -0.3
    """

    def __init__(self, per: Per = "group", minimum: float = 1e-10, maximum: float = 1e4) -> None:
        """See the class."""
        super().__init__(("learning_rate",), per, {"learning_rate": (minimum, maximum)})

    def configuration(self) -> dict[str, Any]:
        """The arguments, and the optimizer that this one sits on."""
        minimum, maximum = (getattr(self._learned["learning_rate"], end) for end in ("minimum", "maximum"))
        inner = super().configuration()["inner"]
        return {"per": self.per, "minimum": minimum, "maximum": maximum, "inner": inner}
