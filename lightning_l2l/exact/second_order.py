"""Operations without a second derivative, or with a wrong one: recognised, so that neither is silent."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.autograd import function
from torch.autograd.function import BackwardCFunction

# What torch 2.13 and its libraries say: "derivative for 'aten::_ctc_loss_backward' is not implemented", "trying to
# differentiate twice a function that was marked with @once_differentiable", "double backward(s) is not supported".
_PATTERN = re.compile(
    r"derivative for .* is not implemented|differentiate twice|double backwards?\b.*not (currently )?support|"
    r"not (currently )?support double backward|not differentiable with respect to|once_differentiable",
    re.IGNORECASE | re.DOTALL,
)
_QUOTED = re.compile(r"derivative for '?(?:aten::)?([A-Za-z0-9_.]+)")
# Nodes of a loss's graph whose second derivative is wrong, silently (torch 2.13, found with gradgradcheck).
_WRONG = {
    "WeightNormInterfaceBackward0": (
        "weight_norm, whose second derivative PyTorch computes wrongly (its backward takes the saved norms for "
        "constants). Remove it with torch.nn.utils.parametrize.remove_parametrizations, or use LayerNorm"
    ),
}


def lacks_second_derivative(error: BaseException) -> str | None:
    """The operation that an error says cannot be differentiated twice; ``None`` for another kind of error.

    Example:
        >>> lacks_second_derivative(RuntimeError("derivative for aten::_ctc_loss_backward is not implemented"))
        '_ctc_loss_backward'
        >>> lacks_second_derivative(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
        True
    """
    message = str(error)
    if not isinstance(error, RuntimeError) or _PATTERN.search(message) is None:
        return None
    if "once_differentiable" in message:
        return "a torch.autograd.Function marked once_differentiable"
    quoted = _QUOTED.search(message)
    return quoted.group(1) if quoted else message.strip().splitlines()[0]


def check_second_derivatives(loss: Tensor) -> None:
    """Refuse a loss whose graph has an operation that PyTorch differentiates twice without noticing that it cannot.

    Raises:
        RuntimeError: It has one.
    """
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "The loss uses reentrant checkpointing, and torch.autograd.grad finds no gradient of what is inside. "
                "Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
            )
        if node.name() in _WRONG:
            raise RuntimeError(
                f"The loss uses {_WRONG[node.name()]}; or leave second derivatives out: Unroll(second_order=False), or "
                "EvolutionStrategies()."
            )
        if isinstance(node, BackwardCFunction) and _is_once_differentiable(node):
            # PyTorch raises only where the gradient that comes in has a history: a missing one is no error to it.
            raise RuntimeError(f"{node.name()} was marked with @once_differentiable.")
        following = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= following
        stack.extend(following)


def _is_once_differentiable(node: Any) -> bool:
    backward = node._forward_cls.backward
    return hasattr(backward, "__wrapped__") and backward.__code__.co_filename == function.__file__
