"""What applies a meta-gradient: Adam with a short memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class MetaOptimizer(torch.optim.Adam):
    """Adam for meta-parameters.

    The second moment forgets within about a hundred updates (``beta2 = 0.99``), since the scale of meta-gradients
    falls by orders of magnitude during a training. Meta-parameters may grow between two steps (a parameter group was added): the new
    entries start without memory.

    Args:
        parameters: The meta-parameters.
        learning_rate: Change of a meta-parameter per update, roughly; for a log step size, 0.3 is 35 %.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        """See the class."""
        super().__init__(parameters, lr=learning_rate, betas=(0.9, 0.99))

    def apply(self, learned: nn.Module, gradients: Mapping[str, Tensor]) -> None:
        """One step along gradients that are given by name."""
        for name, parameter in learned.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].detach().clone()
                self._grow(parameter)
        self.step()
        self.zero_grad()

    def _grow(self, parameter: nn.Parameter) -> None:
        for key in ("exp_avg", "exp_avg_sq"):
            memory = self.state.get(parameter, {}).get(key)
            if memory is not None and memory.shape != parameter.shape:
                grown = torch.zeros_like(parameter)
                grown[: len(memory)] = memory
                self.state[parameter][key] = grown
