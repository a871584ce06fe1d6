"""The RMSProp of TensorFlow 1, which the paper's code applies to meta-gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class TF1RMSProp(torch.optim.Optimizer):
    r"""RMSProp as ``tf.train.RMSPropOptimizer`` computes it.

    ``s <- decay * s + (1 - decay) * g**2``, ``b <- momentum * b + lr * g / sqrt(s + eps)``, ``p <- p - b``, with
    **s = 1** at first. ``torch.optim.RMSprop`` starts at s = 0 and has eps outside the root, so that its first step
    is ``lr / sqrt(1 - decay)`` however small the gradient; here a small gradient makes a step of about ``lr * g``.

    When it helps: to reproduce the published experiments. A meta-gradient of the order of 1e-3 is then hardly
    rescaled for the first tens of steps, since s has to forget its 1.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        decay: Of the average of squares.
        momentum: Of the steps.
        eps: Added to the average under the root.

    Raises:
        ValueError: A negative ``lr`` or ``eps``, or a ``decay`` or ``momentum`` outside [0, 1).

    Source: TensorFlow 1.15, ``ApplyRMSProp``. Wang, Yuan, Wu, Ge (ICML 2021) use ``lr=0.01`` and the defaults.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = TF1RMSProp([w], lr=0.01)
        >>> w.grad = torch.tensor([3.0], dtype=torch.float64)
        >>> optimizer.step()
        >>> round(w.item(), 8)  # 1 - 0.01 * 3 / sqrt(0.9 + 0.1 * 9)
        0.97763932
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        decay: float = 0.9,
        momentum: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative.")
        for name, value in (("decay", decay), ("momentum", momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be in [0, 1).")
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, along the gradients of the parameters that have one.

        Args:
            closure: Evaluates the loss again and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["mean_square"] = torch.ones_like(parameter)
        square: Tensor = state["mean_square"]
        square.mul_(group["decay"]).addcmul_(gradient, gradient, value=1 - group["decay"])
        step = gradient * torch.rsqrt(square + group["eps"])
        if group["momentum"] > 0:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            # The step size is in the buffer, so a schedule acts on later steps only, as in TensorFlow.
            step = state["momentum_buffer"].mul_(group["momentum"]).add_(step, alpha=group["lr"])
            parameter.sub_(step)
        else:
            parameter.sub_(step, alpha=group["lr"])
