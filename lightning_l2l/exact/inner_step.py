"""One differentiable training step: loss, gradient, update. All that the estimators know about a problem.

The loss and the learned optimizer are the user's; they meet here and nowhere else, so this is also where their results
are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchopt.base import GradientTransformation

from lightning_l2l.exact.packing import Packing
from lightning_l2l.exact.processes import Processes, together
from lightning_l2l.exact.scaled import ScaledVector
from lightning_l2l.exact.second_order import check_second_derivatives
from lightning_l2l.learned.base import LearnedOptimizer

Tensors = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], Any], Tensor]


def twice_differentiable() -> AbstractContextManager[Any]:
    """Attention by the math kernel: the fused ones have no second derivative (torch 2.13, CPU and CUDA)."""
    switches = torch.backends.cuda  # of the CPU's kernels as well
    if not (switches.flash_sdp_enabled() or switches.mem_efficient_sdp_enabled() or switches.cudnn_sdp_enabled()):
        return nullcontext()  # already so: switching costs as much as a small layer
    return sdpa_kernel(SDPBackend.MATH)


def _update(learned: LearnedOptimizer, gradients: Any, state: Any, parameters: Tensors) -> Any:
    return learned.transformation().update(gradients, state, params=parameters, inplace=False)


class _Update(nn.Module):
    """Lets ``functional_call`` reach ``learned.transformation()`` with substituted meta-parameters."""

    def __init__(self, learned: LearnedOptimizer) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, gradients: Any, state: Any, parameters: Tensors) -> Any:
        return _update(self.learned, gradients, state, parameters)


@dataclass(frozen=True)
class Iterate:
    """The state of an inner training: parameters, optimizer state and buffers.

    Attributes:
        parameters: What the inner optimizer moves, by name; if packed, one vector for each pack.
        state: The inner optimizer's state, any tree of tensors and numbers.
        buffers: Everything else that the loss reads by name; what the loss writes in place lands here.
        packing: Which parameters lie end to end; ``None`` for each on its own.
    """

    parameters: Tensors
    state: Any
    buffers: Tensors
    packing: Packing | None = None

    @cached_property
    def named(self) -> Tensors:
        """The parameters as the loss knows them; if packed, views."""
        return self.parameters if self.packing is None else self.packing.pieces(self.parameters)

    def unpacked(self) -> Iterate:
        """The same iterate with each parameter on its own, as a view; differentiable."""
        if self.packing is None:
            return self
        return Iterate(self.named, self.packing.state_by_name(self.state), self.buffers)

    def gathered(self, gradients: Mapping[str, Tensor | None]) -> tuple[Iterate, dict[str, Tensor | None]]:
        """Gradients that were taken by :attr:`named`, for each of :attr:`parameters`.

        A parameter without a gradient stays where it is, its state too. If it lies in a pack with others that have one,
        the iterate comes back unpacked.
        """
        gathered = dict(gradients) if self.packing is None else self.packing.gathered(gradients)
        return (self.unpacked(), dict(gradients)) if gathered is None else (self, gathered)

    @cached_property
    def _tree(self) -> tuple[list[Any], Any]:
        return optree.tree_flatten(self.state)

    @cached_property
    def _leaves(self) -> list[Tensor]:
        return [*self.parameters.values(), *[leaf for leaf in self._tree[0] if _carries_derivative(leaf)]]

    def leaves(self) -> list[Tensor]:
        """The tensors a derivative flows through: the parameters, then the floating-point state."""
        return list(self._leaves)

    def with_leaves(self, leaves: Sequence[Tensor], buffers: Tensors | None = None) -> Iterate:
        """The same iterate with other tensors for those that :meth:`leaves` lists, and other buffers if given."""
        parameters = dict(zip(self.parameters, leaves, strict=False))
        rest = iter(leaves[len(parameters) :])
        flat, structure = self._tree
        state = [next(rest) if _carries_derivative(leaf) else leaf for leaf in flat]
        buffers = self.buffers if buffers is None else buffers
        moved = Iterate(parameters, optree.tree_unflatten(structure, state), buffers, self.packing)
        vars(moved).update(_tree=(state, structure), _leaves=list(leaves))  # known, so it need not be found out
        return moved

    def fresh(self) -> Iterate:
        """The same iterate as leaves that require a gradient, without history, and with its own buffers."""
        buffers = {name: buffer.detach().clone() for name, buffer in self.buffers.items()}
        return self.with_leaves([leaf.detach().requires_grad_() for leaf in self.leaves()], buffers)

    def divided(self, exponent: Tensor) -> Iterate:
        """The iterate of a homogeneous problem divided by ``2**exponent`` (0-dim float64), without history."""
        leaves = ScaledVector(self.leaves(), -exponent).at_exponent(torch.zeros_like(exponent))
        return self.with_leaves([leaf.requires_grad_() for leaf in leaves])


def _carries_derivative(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@dataclass(frozen=True)
class InnerStep:
    """A training step ``iterate -> iterate``, differentiable in the iterate and in the meta-parameters.

    Attributes:
        loss: ``loss(parameters, batch) -> scalar``; ``parameters`` holds the buffers as well.
        learned: The learned optimizer.
        gradient_transformation: Applied to the gradients first, e.g. a clipping; ``None`` for nothing.
        second_order: ``False`` treats the inner gradients as constants (cheaper, biased; with the user's own kernels).
        homogeneity: Degree p if ``loss(c w) = |c|**p loss(w)`` and the update is linear, else ``None``.
        processes: The other processes of a data-parallel training: losses and gradients are means over them.
    """

    loss: Loss
    learned: LearnedOptimizer
    gradient_transformation: GradientTransformation | None = None
    second_order: bool = True
    homogeneity: float | None = None
    processes: Processes | None = None

    def meta_parameters(self) -> Tensors:
        """The learned optimizer's meta-parameters by name, detached."""
        return {name: tensor.detach() for name, tensor in self.learned.named_parameters() if tensor.requires_grad}

    def start(self, parameters: Mapping[str, Tensor], state: Any, buffers: Mapping[str, Tensor]) -> Iterate:
        """The first iterate: clones, so that nothing of the caller's is ever written to."""
        own = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        if state is None:
            state = self.learned.transformation().init(own)
        # A state that the caller holds is not modified: updates are out of place.
        iterate = Iterate(own, state, dict(buffers))
        return iterate.with_leaves([leaf.detach().clone() for leaf in iterate.leaves()]).fresh()

    def packed(self, start: Iterate) -> Iterate:
        """The iterate with those parameters end to end that the optimizer treats alike; detached.

        Not with a clipping, which looks at single tensors.
        """
        if self.gradient_transformation is not None:
            return start
        packing = Packing.of(start.parameters, start.state, self.learned.treated_alike(list(start.parameters)))
        if packing is None:
            return start
        with torch.no_grad():
            return Iterate(packing.packed(start.parameters), packing.packed_state(start.state), start.buffers, packing)

    def evaluate(self, iterate: Iterate, batch: Any) -> Tensor:
        """The loss at an iterate, as a mean over the processes.

        Raises:
            TypeError: The loss is not a tensor of one floating-point number.
        """
        if self.processes is None:
            return self.evaluate_here(iterate, batch)
        self.share_buffers(iterate)
        like = [torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)]
        value = self.processes.shared(lambda: [self.evaluate_here(iterate, batch)], like)[0]
        assert value is not None
        return value

    def share_buffers(self, iterate: Iterate) -> None:
        """Start from the buffers of the first process, in place, where the training does that."""
        if self.processes is not None and self.processes.buffers_of_first and iterate.buffers:
            self.processes.copy_first_(list(iterate.buffers.values()))

    def evaluate_here(self, iterate: Iterate, batch: Any) -> Tensor:
        """The loss of this process alone.

        Raises:
            TypeError: The loss is not a tensor of one floating-point number.
        """
        with twice_differentiable() if self.second_order else nullcontext():
            value = self.loss({**iterate.named, **iterate.buffers}, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            found = (
                f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise TypeError(
                f"The loss must be one floating-point number in a tensor, but it is {found}. Meta-gradients are "
                "derivatives of that number: reduce it (for example with .mean()) before returning it."
            )
        return value.reshape(())

    def check_second_order(self, loss: Tensor) -> None:
        """Refuse a loss whose second derivative is known to be wrong, if it is needed.

        Raises:
            RuntimeError: It is.
        """
        if self.second_order:
            with together(self.processes):
                check_second_derivatives(loss)

    def gradients(self, value: Tensor, iterate: Iterate, *, create_graph: bool) -> dict[str, Tensor | None]:
        """Gradient of a loss for each parameter (by :attr:`Iterate.named`); ``None`` for those it does not depend on.

        A mean over the processes. Its graph (``create_graph``) is that of this process's own gradients, so what is
        pulled back through it has to be averaged: :meth:`average`.

        Raises:
            ValueError: The loss depends on none of the parameters.
        """
        names, parameters = list(iterate.named), list(iterate.named.values())
        if self.processes is None:
            found = self._gradients_here(value, parameters, create_graph)
        else:
            found = self.processes.shared(lambda: self._gradients_here(value, parameters, create_graph), parameters)
        return dict(zip(names, found, strict=True))

    def average(
        self, compute: Callable[[], Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """What ``compute`` pulls back through gradients, as a mean over the processes; ``like`` has its shapes."""
        return compute() if self.processes is None else self.processes.mean(compute, like)

    @staticmethod
    def _gradients_here(value: Tensor, parameters: list[Tensor], create_graph: bool) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if value.requires_grad:
            found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise ValueError(
                "The loss does not depend on any parameter that the optimizer moves, so there is nothing to unroll. "
                "Compute it from the parameters that are passed in, with gradients on (no torch.no_grad, no "
                "detach, no .item())."
            )
        return found

    def meta_loss(self, iterate: Iterate, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The meta-loss at an iterate and its gradient for each of its parameters; the iterate stays as it is."""
        here = iterate.fresh()
        value = self.evaluate(here, batch)
        gradients = self.gradients(value, here, create_graph=False)
        filled = {
            name: torch.zeros_like(here.named[name]) if gradient is None else gradient
            for name, gradient in gradients.items()
        }
        packed = filled if iterate.packing is None else iterate.packing.packed(filled)
        return value.detach(), list(packed.values())

    def update(
        self,
        iterate: Iterate,
        gradients: Mapping[str, Tensor | None],
        meta_parameters: Mapping[str, Tensor] | None = None,
    ) -> Iterate:
        """The next iterate.

        Args:
            iterate: The present one.
            gradients: One for each parameter.
            meta_parameters: Used in place of the learned optimizer's own, by name.
        """
        moved: Any = dict(gradients)
        if not self.learned.accepts_missing_gradients:
            # torchopt 0.7.3 freezes a parameter for good once its gradient was None with momentum.
            moved = {
                name: torch.zeros_like(iterate.parameters[name]) if gradient is None else gradient
                for name, gradient in moved.items()
            }
        if self.gradient_transformation is not None:
            moved, _ = self.gradient_transformation.update(
                moved, self.gradient_transformation.init(iterate.parameters), inplace=False
            )
        arguments = (moved, iterate.state, iterate.parameters)
        if meta_parameters is None:
            updates, state = _update(self.learned, *arguments)
        else:
            substitutes = {f"learned.{name}": tensor for name, tensor in meta_parameters.items()}
            updates, state = functional_call(_Update(self.learned), substitutes, arguments)
        parameters = {
            name: tensor if updates.get(name) is None else tensor + updates[name]
            for name, tensor in iterate.parameters.items()
        }
        return Iterate(parameters, state, iterate.buffers, iterate.packing)
