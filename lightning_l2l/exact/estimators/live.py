"""Live: forward mode along the training steps that are taken anyway.

The other estimators look ahead: they train a copy for K steps and throw it away. Here the K steps are those of the
training itself. Before each of them the tangent ``dz/dtheta`` of parameters and optimizer state is where it was left;
the loss that the training is about to differentiate gives one exact Hessian-vector product, on its own graph, and the
gradient that the optimizer is about to take moves the tangent on. After K steps one gradient of the held-out loss makes
it a meta-gradient. No step is thrown away, no random number is drawn, and memory does not grow with K.

What it answers is the past tense of a look-ahead: how the held-out loss would differ *now*, had the meta-parameters
been a little different during the last K steps.

The caller drives: :meth:`LiveUnroll.see_loss` for every micro-batch, :meth:`LiveUnroll.before_step` once the gradients
are there, :meth:`LiveUnroll.after_step`, and :meth:`LiveUnroll.result` at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from lightning_l2l.exact.estimators.forward import (
    averaged,
    beside,
    by_name,
    hessian_vector_product,
    largest_norm,
    pushed,
    slopes_along,
    training_slopes,
)
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.scaled import ScaledVector
from lightning_l2l.exact.tally import Tally, rate_per_step
from lightning_l2l.exact.update_derivative import UpdateDerivative

MaybeTensors = Mapping[str, Tensor | None]


class LiveUnroll:
    """A window of training steps with the tangent that travels along.

    **Cost** beside the training: per step and scalar meta-parameter one Hessian-vector product (about two training
    steps' arithmetic) and the derivative of the update; nothing for the first step of a window that carries no tangent.
    Memory: one tangent of parameters and optimizer state per scalar, and the graph of one gradient.

    Args:
        step: The training step; its loss is used for judging only.
        objective: The meta-objective.
        steps: The number of steps K.
        carried: Tangents to start with, one for each scalar of the meta-parameters; zero if not given.
    """

    def __init__(
        self, step: InnerStep, objective: Objective, steps: int, carried: list[ScaledVector] | None = None
    ) -> None:
        self._step = step
        self._directions = UpdateDerivative(step).directions
        self._tally = Tally(objective, steps, None)
        self._tangents: list[ScaledVector | None] = [*carried] if carried else [None] * len(self._directions)
        self._curvatures: list[MaybeTensors] = [{} for _ in self._directions]
        self._loss: Tensor | None = None
        self._pending: list[ScaledVector | None] | None = None
        self._slopes: list[Tensor] = []
        self._training: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._steps = steps
        self.taken = 0

    @property
    def tangents(self) -> list[ScaledVector]:
        """One for each scalar of the meta-parameters; none before the first step."""
        return [tangent for tangent in self._tangents if tangent is not None]

    @property
    def needs_graph(self) -> bool:
        """Whether the next step's loss has to be seen: not if every tangent is zero."""
        return self._step.second_order and bool(self.tangents)

    def see_loss(self, loss: Tensor, parameters: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Take the Hessian-vector products from the graph of a loss that the training will differentiate.

        The graph stays as it was. With accumulation this is called for every micro-batch of a step.

        Args:
            loss: The training loss, with its graph.
            parameters: The leaves that it was computed from: those that the optimizer moves, by name.
            scale: What the loss was multiplied by against underflow.

        Raises:
            RuntimeError: An operation of the loss has no second derivative.
        """
        part = loss.detach().double() / scale
        self._loss = part if self._loss is None else self._loss + part
        if not self.needs_graph:
            return
        names = list(parameters)
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        gradients = dict(zip(names, found, strict=True))
        for index, tangent in enumerate(self.tangents):
            # The training needs the graph of the loss again.
            product = hessian_vector_product(gradients, parameters, tangent, keep_graph=True)
            self._curvatures[index] = _sum(self._curvatures[index], product, 1.0 / scale)

    def fits(self, iterate: Iterate) -> bool:
        """Whether a step from here continues the window: its loss was seen, and the tangents are of these tensors."""
        shapes = [leaf.shape for leaf in iterate.leaves()]
        return self._loss is not None and all([t.shape for t in tan.tensors] == shapes for tan in self.tangents)

    def before_step(self, iterate: Iterate, gradients: MaybeTensors) -> None:
        """The optimizer is about to step: move the tangents along with it.

        Args:
            iterate: Parameters and optimizer state before the step; neither is changed nor kept.
            gradients: What the optimizer is given, before clipping; with several processes, already their mean.
        """
        assert self._loss is not None
        (self._loss,) = self._step.average(lambda: [self._loss], [self._loss])
        if self.taken == self._steps - 1:
            self._training = training_slopes(gradients, self._tangents)
        curvatures: list[MaybeTensors] = [dict.fromkeys(gradients) for _ in self._directions]
        if self.needs_graph:
            curvatures = [averaged(self._step, partial(dict, change), iterate) for change in self._curvatures]
        # Made anew, since a schedule moves what the meta-parameters are relative to.
        _, self._pending = pushed(UpdateDerivative(self._step), iterate, gradients, self._tangents, curvatures)

    def after_step(self) -> None:
        """The optimizer has stepped; without this call the step does not count."""
        assert self._pending is not None and self._loss is not None
        self._tangents, self._pending = self._pending, None
        self._tally.diverged(self._loss)
        self._curvatures, self._loss = [{} for _ in self._directions], None
        self.taken += 1
        if self.taken in (1, self._steps):
            self._norms.append(largest_norm(self._tangents))

    @property
    def has_pending_step(self) -> bool:
        """Whether :meth:`before_step` was called and :meth:`after_step` was not."""
        return self._pending is not None

    @property
    def is_due(self) -> bool:
        """Whether the meta-objective counts the loss after the last step, so that it has to be judged."""
        return self.taken in self._tally.weights

    def judge(self, iterate: Iterate, meta_batch: Any) -> None:
        """Evaluate the meta-loss after the last step.

        Args:
            iterate: Parameters and buffers as they are now.
            meta_batch: The batch to judge by.
        """
        loss, gradients = self._step.judge(iterate, meta_batch)
        zero = torch.zeros((), dtype=torch.float64, device=loss.device)
        parts = slopes_along(gradients, self._tangents, *self._tally.add(self.taken, loss, zero))
        self._slopes = [a + b for a, b in zip(self._slopes, parts, strict=True)] if self._slopes else parts

    def result(self, reason: str = "") -> MetaGradient:
        """The meta-gradient of the window.

        Raises:
            NegativeLossError: The objective takes the logarithm of a negative loss.
        """
        update = UpdateDerivative(self._step)
        first, last = self._norms[0], self._norms[-1]
        found = by_name(update, self._slopes)
        result = self._tally.result("live", reason, found, rate_per_step(first, last, self._steps - 1))
        return beside(result, by_name(update, self._training))

    def state_dict(self) -> dict[str, Any]:
        """Where the window stands, between two steps: plain tensors, numbers and containers."""
        return {
            "taken": self.taken,
            "tangents": [{"tensors": list(t.tensors), "exponent": t.exponent} for t in self.tangents],
            "slopes": list(self._slopes),
            "training": list(self._training),
            "norms": list(self._norms),
            "losses": self._tally.inner_losses,
            "meta_losses": list(self._tally.meta_losses),
            "value": torch.as_tensor(self._tally.value, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: It was saved for other meta-parameters.
        """
        tree: Any = state
        moved: Any = optree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
        if len(moved["tangents"]) not in (0, len(self._directions)):
            raise ValueError(f"{len(moved['tangents'])} tangents were saved, but {len(self._directions)} are needed")
        if moved["tangents"]:
            self._tangents = [ScaledVector(t["tensors"], t["exponent"]) for t in moved["tangents"]]
        self.taken, self._slopes, self._norms = moved["taken"], moved["slopes"], moved["norms"]
        self._training = moved["training"]
        self._tally.restore(moved["losses"], moved["meta_losses"], moved["value"])


def _sum(total: MaybeTensors, part: MaybeTensors, factor: float) -> dict[str, Tensor | None]:
    added: dict[str, Tensor | None] = dict(total)
    for name, tensor in part.items():
        if tensor is not None:
            scaled = tensor.detach() if factor == 1.0 else tensor.detach() * factor
            before = added.get(name)
            added[name] = scaled if before is None else before + scaled
    return added
