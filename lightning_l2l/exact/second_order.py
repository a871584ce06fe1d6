"""Which operations can be differentiated twice: recognising the errors, and finding them before they raise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

# What torch 2.13 and its libraries say: "derivative for 'aten::_ctc_loss_backward' is not implemented", "trying to
# differentiate twice a function that was marked with @once_differentiable", "double backward(s) is not supported".
_PATTERN = re.compile(
    r"derivative for .* is not implemented|differentiate twice|double backwards?\b.*not (currently )?support|"
    r"not (currently )?support double backward|not differentiable with respect to|once_differentiable",
    re.IGNORECASE | re.DOTALL,
)
_QUOTED = re.compile(r"derivative for '?(?:aten::)?([A-Za-z0-9_.]+)")

# Node in the graph of the loss -> what is wrong with its second derivative (torch 2.13, found with gradgradcheck).
KNOWN_WRONG = {
    "WeightNormInterfaceBackward0": (
        "weight_norm: its second derivative is wrong, silently (PyTorch's backward takes the saved norms for "
        "constants). Remove it with torch.nn.utils.parametrize.remove_parametrizations, or use LayerNorm."
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


def graph_nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """Every node of the graphs behind some tensors, once."""
    stack = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def not_twice_differentiable(gradients: Iterable[Tensor | None]) -> list[str]:
    """All operations behind some gradients that have no derivative, by name.

    Each node is called on its own with zeros, so that one operation without a derivative does not hide the others.

    Args:
        gradients: First derivatives with their graph (``create_graph=True``).
    """
    found: list[str] = []
    for node in graph_nodes(gradients):
        # Leaves have no derivative to take, and a user's own function cannot be called as a node.
        if node.name().endswith("AccumulateGrad") or isinstance(node, BackwardCFunction):
            continue
        zeros = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in node._input_metadata]
        try:
            node(*zeros)
        except RuntimeError as error:  # anything else than a missing derivative is only our zeros not fitting
            name = lacks_second_derivative(error)
            if name is not None and name not in found:
                found.append(name)
    return found


def known_wrong(loss: Tensor) -> list[str]:
    """Operations behind a loss whose second derivative is known to be wrong, each with advice."""
    names = {node.name() for node in graph_nodes([loss])}
    return [advice for name, advice in KNOWN_WRONG.items() if name in names]


def custom_functions(loss: Tensor) -> list[str]:
    """The user's own ``torch.autograd.Function`` classes behind a loss, whose second derivative only they know."""
    own = {type(node).__name__ for node in graph_nodes([loss]) if isinstance(node, BackwardCFunction)}
    return sorted(name.removesuffix("Backward") for name in own)


def wrong_modules(module: nn.Module) -> list[str]:
    """Modules whose derivatives are known to be wrong but leave no trace in the graph, each with advice."""
    names = [
        name for name, child in module.named_modules() if isinstance(child, nn.Embedding) and child.max_norm is not None
    ]
    return [
        f"nn.Embedding with max_norm ({name}): it rescales its weights in place, outside autograd. Use max_norm=None."
        for name in names
    ]
