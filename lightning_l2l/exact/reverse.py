"""Reverse mode: run forwards keeping each step's graph, then carry the adjoint back.

One pass gives the derivative for any number of meta-parameters. Cost: about one and a half gradients more per step than
plain training. Memory: the graphs of all K steps (:func:`reverse`), or of about ``sqrt(K)`` of them and as many stored
iterates (:func:`segmented`, which takes every step once more).

The graphs of the steps are not connected: the adjoint is handed from one to the next as a vector with its own exponent,
which is what keeps it in the number range where plain back-propagation through the whole unroll gives NaN or a silent
zero (Corollary 1 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.objectives import Accumulator, Objective, rate_per_step
from lightning_l2l.exact.random_state import RandomState
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.scaled import ScaledVector, largest_exponent, log2_norm

# Losses of a step that is taken again agree to rounding; an accelerator's reduced-precision kernels may differ more.
_REPLAY_TOLERANCE = 1e-2


@dataclass
class _Record:
    """One step with its graph.

    Attributes:
        inputs: The leaves before the step.
        outputs: The leaves after it, before the rescaling.
        rescaling: The power of two that a homogeneous problem's iterate was divided by afterwards; 0-dim float64.
        injection: Derivative of the meta-objective with respect to the leaves after the step, through the meta-loss
            there; ``None`` where it does not count.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    rescaling: Tensor
    injection: ScaledVector | None = None


@dataclass(frozen=True)
class _Checkpoint:
    """All that a segment needs to be run again. ``taken`` steps lie before it."""

    taken: int
    iterate: Iterate
    random_state: RandomState
    log_scale: Tensor


def reverse(
    step: InnerStep, start: Iterate, batches: Sequence[Any], meta_batch: Any, objective: Objective, reason: str = ""
) -> tuple[MetaGradient, Iterate]:
    """Meta-gradient by reverse mode, the graphs of all steps in memory.

    Args:
        step: The inner training step.
        start: The iterate to start from.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        reason: Why this mode was chosen, for the diagnostics.

    Returns:
        The result, and the iterate that the unroll arrived at (for a homogeneous problem up to a factor).
    """
    accumulator = Accumulator(objective, len(batches), step.homogeneity)
    iterate = step.packed(start).fresh()
    log_scale = torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)
    records: list[_Record] = []
    for taken, batch in enumerate(batches, start=1):
        loss = step.evaluate(iterate, batch)
        if taken == 1:
            step.check_second_order(loss)
        if not accumulator.add_training_loss(loss):
            break
        record, iterate, log_scale = _recorded(step, iterate, loss, log_scale)
        if taken in accumulator.weights:
            meta_loss, gradient = step.meta_loss(iterate, meta_batch)
            record.injection = _injection(iterate, gradient, *accumulator.add_meta_loss(taken, meta_loss, log_scale))
        records.append(record)
    adjoint = _Adjoint(step)
    adjoint.carry_back(records)
    growth = rate_per_step(adjoint.last_norm, adjoint.first_norm, len(batches) - 1)
    return accumulator.result("reverse", reason, adjoint.gradients(), growth), iterate.unpacked()


def segmented(
    step: InnerStep, start: Iterate, batches: Sequence[Any], meta_batch: Any, objective: Objective, reason: str = ""
) -> tuple[MetaGradient, Iterate]:
    """The numbers of :func:`reverse`; iterates are stored every sqrt(K) steps, the graphs in between are made again.

    A step that is taken again must be the same step: it starts from the stored parameters, optimizer state and buffers
    (BatchNorm's averages) with the random numbers of the first time (dropout). ``torch.utils.checkpoint`` cannot do
    this: the gradient inside each step triggers its recomputation at once.

    Args:
        step: The inner training step.
        start: The iterate to start from.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        objective: The meta-objective.
        reason: Why this mode was chosen, for the diagnostics.

    Returns:
        The result, and the iterate that the unroll arrived at (for a homogeneous problem up to a factor).

    Raises:
        RuntimeError: The loss gave another value when a step was taken again, so it depends on something that was not
            put back.
    """
    accumulator = Accumulator(objective, len(batches), step.homogeneity)
    length = math.isqrt(len(batches) - 1) + 1
    iterate = step.packed(start).fresh()
    devices = {leaf.device for leaf in iterate.leaves()}
    log_scale = torch.zeros((), dtype=torch.float64, device=iterate.leaves()[0].device)
    checkpoints: list[_Checkpoint] = []
    slopes: dict[int, tuple[Tensor, Tensor]] = {}
    complete = True
    for taken, batch in enumerate(batches, start=1):
        if (taken - 1) % length == 0:
            checkpoints.append(_Checkpoint(taken - 1, iterate.fresh(), RandomState.now(devices), log_scale))
        loss = step.evaluate(iterate, batch)
        if taken == 1:
            step.check_second_order(loss)
        complete = accumulator.add_training_loss(loss)
        if not complete:
            break
        iterate, gradients = iterate.gathered(step.gradients(loss, iterate, create_graph=False))
        with torch.no_grad():
            iterate = step.update(iterate, gradients)
        iterate, _, log_scale = _rescaled(step, iterate.fresh(), log_scale)
        if taken in accumulator.weights:
            # With gradients on, since some kernels draw other random numbers without.
            slopes[taken] = accumulator.add_meta_loss(taken, step.evaluate(iterate.fresh(), meta_batch), log_scale)
    del loss

    adjoint = _Adjoint(step)
    arrived = RandomState.now(devices)
    replayed: list[Tensor] = []
    while complete and checkpoints:
        checkpoint = checkpoints.pop()
        segment = batches[checkpoint.taken : checkpoint.taken + length]
        records, losses = _replay(step, checkpoint, segment, meta_batch, slopes)
        replayed = losses + replayed
        adjoint.carry_back(records)
    arrived.restore()
    if complete:
        _check_replay(accumulator.training_losses(), torch.stack(replayed))
    growth = rate_per_step(adjoint.last_norm, adjoint.first_norm, len(batches) - 1)
    return accumulator.result("segmented", reason, adjoint.gradients(), growth), iterate.unpacked()


def _replay(
    step: InnerStep,
    checkpoint: _Checkpoint,
    batches: Sequence[Any],
    meta_batch: Any,
    slopes: Mapping[int, tuple[Tensor, Tensor]],
) -> tuple[list[_Record], list[Tensor]]:
    """One segment again, this time with graphs: the records and the losses of its steps."""
    checkpoint.random_state.restore()
    iterate, log_scale = checkpoint.iterate, checkpoint.log_scale
    records, losses = [], []
    for taken, batch in enumerate(batches, start=checkpoint.taken + 1):
        loss = step.evaluate(iterate, batch)
        losses.append(loss.detach().double())
        record, iterate, log_scale = _recorded(step, iterate, loss, log_scale)
        if taken in slopes:
            _, gradient = step.meta_loss(iterate, meta_batch)
            record.injection = _injection(iterate, gradient, *slopes[taken])
        records.append(record)
    return records, losses


def _check_replay(first: Tensor, second: Tensor) -> None:
    differs = (second - first).abs() > _REPLAY_TOLERANCE * first.abs()
    if bool(differs.any()):
        index = int(differs.nonzero()[0])
        raise RuntimeError(
            f"mode='segmented' takes each step twice, and step {index + 1} had the loss {first[index].item():.6g} at "
            f"first and {second[index].item():.6g} the second time. So the loss depends on something that cannot be "
            "put back: a generator of its own, a counter, or tensors that are not in `parameters` and `buffers`. Draw "
            "from the global generators and pass what the loss writes as buffers, or use mode='reverse'."
        )


def _recorded(step: InnerStep, iterate: Iterate, loss: Tensor, log_scale: Tensor) -> tuple[_Record, Iterate, Tensor]:
    """One training step with its graph.

    Args:
        step: The inner training step.
        iterate: The present iterate, leaves that require a gradient.
        loss: The loss there.
        log_scale: Natural logarithm of the factor between the true iterate and this one.

    Returns:
        The record, the next iterate without history, and its ``log_scale``.
    """
    gradients = step.gradients(loss, iterate, create_graph=step.second_order)
    if not step.second_order:
        gradients = {name: None if g is None else g.detach() for name, g in gradients.items()}
    gathered, gradients = iterate.gathered(gradients)
    following = step.update(gathered, gradients)
    fresh, rescaling, log_scale = _rescaled(step, following.fresh(), log_scale)
    return _Record(iterate.leaves(), following.leaves(), rescaling), fresh, log_scale


def _rescaled(step: InnerStep, iterate: Iterate, log_scale: Tensor) -> tuple[Iterate, Tensor, Tensor]:
    """A homogeneous problem's iterate divided by a power of two, that power, and the new logarithm of the scale."""
    if step.homogeneity is None:
        return iterate, torch.zeros_like(log_scale), log_scale
    exponent = largest_exponent(list(iterate.parameters.values())).to(log_scale.device)
    return iterate.divided(exponent), exponent, log_scale + exponent * math.log(2.0)


def _injection(iterate: Iterate, gradient: Sequence[Tensor], slope: Tensor, exponent: Tensor) -> ScaledVector:
    """Derivative of the meta-objective with respect to the leaves through one meta-loss.

    Args:
        iterate: The iterate that the meta-loss was evaluated at.
        gradient: The meta-loss's, for each parameter.
        slope: Derivative of the meta-objective with respect to the meta-loss: mantissa.
        exponent: The same: binary exponent.
    """
    vectors = [*gradient, *(torch.zeros_like(leaf) for leaf in iterate.leaves()[len(gradient) :])]
    # The slope of a logarithm, weight / loss, may be as far out as the loss: it joins the exponent.
    power = slope.abs().log2().floor().nan_to_num(0.0, 0.0, 0.0)
    mantissa = slope * torch.exp2(-power)
    normalised = ScaledVector.of(vectors)
    scaled = [vector * mantissa.to(vector.dtype) for vector in normalised.tensors]
    return ScaledVector(scaled, normalised.exponent + exponent + power)


class _Adjoint:
    """The derivative of the meta-objective with respect to the iterate, on its way from the last step to the first.

    Args:
        step: The inner training step.

    Attributes:
        last_norm: ``log2`` of its norm after the last step.
        first_norm: The same after the first step that it has reached so far.
    """

    def __init__(self, step: InnerStep) -> None:
        self._step = step
        self._meta = {name: tensor for name, tensor in step.learned.named_parameters() if tensor.requires_grad}
        self._totals = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self._meta.items()}
        self._vector: ScaledVector | None = None
        self.last_norm: Tensor | None = None
        self.first_norm: Tensor | None = None

    def carry_back(self, records: list[_Record]) -> None:
        """Pull the adjoint through these steps, the last one first; the list is emptied on the way."""
        while records:
            record = records.pop()  # frees the step's graph as soon as it has been used
            if record.injection is not None:
                self._vector = record.injection if self._vector is None else self._vector.plus(record.injection)
            if self._vector is None:
                continue
            if self.last_norm is None or not records:
                self.first_norm = log2_norm(self._vector)
                self.last_norm = self.first_norm if self.last_norm is None else self.last_norm
            self._vector = self._pull(record, self._vector)

    def gradients(self) -> dict[str, Tensor]:
        """The derivative for each meta-parameter, from the steps that were passed."""
        return {name: self._totals[name].to(tensor.dtype) for name, tensor in self._meta.items()}

    def _pull(self, record: _Record, vector: ScaledVector) -> ScaledVector:
        exponent = vector.exponent - record.rescaling
        pairs = [(out, v) for out, v in zip(record.outputs, vector.tensors, strict=True) if out.requires_grad]
        outputs, vectors = zip(*pairs, strict=True)
        inputs = [*record.inputs, *self._meta.values()]
        pulled = self._step.average(lambda: torch.autograd.grad(outputs, inputs, vectors, allow_unused=True), inputs)
        count = len(record.inputs)
        for name, gradient in zip(self._meta, pulled[count:], strict=True):
            if gradient is not None:
                self._totals[name] = self._totals[name] + gradient.double() * torch.exp2(exponent)
        filled = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(record.inputs, pulled[:count], strict=True)
        ]
        return ScaledVector.of(filled, exponent)
