"""Which estimator to use, why, and what each would cost, before anything is unrolled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torchopt.base import GradientTransformation

from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Loss
from lightning_l2l.exact.processes import together
from lightning_l2l.exact.step_memory import StepMemory, free_memory, measure_step
from lightning_l2l.learned.base import LearnedOptimizer

# Forward mode pays one Hessian-vector product per scalar and step, reverse mode about as much for all of them.
LARGEST_FORWARD = 2
# In shorter unrolls segments save less than a factor of two, and measuring a step would cost more than 1/16.
SHORTEST_MEASURED = 16
# Of the free memory, what an unroll may take unless the user says otherwise.
_SHARE = 0.5

_REMARKS = {
    "forward": "exact",
    "reverse": "exact",
    "segmented": "exact, the numbers of reverse",
    "mixed": "of the smoothed objective; noisy",
    "es": "of the smoothed objective; noisy",
}


@dataclass(frozen=True)
class Choice:
    """One estimator with what it would take.

    Attributes:
        estimator: Its name.
        memory: Bytes at the peak, beside what is passed in; ``None`` if unknown.
        gradients: Cost in plain training steps (a gradient each).
        remark: What it computes, or why it cannot be used.
        usable: Whether it can be used.
    """

    estimator: str
    memory: int | None
    gradients: float
    remark: str
    usable: bool


@dataclass(frozen=True)
class Plan:
    """What ``estimator="auto"`` would do. Print it.

    Attributes:
        estimator: The name of the estimator.
        reason: Why.
        steps: K.
        meta_parameters: Number of scalars.
        choices: Every estimator for a single unroll.
    """

    estimator: str
    reason: str
    steps: int
    meta_parameters: int
    choices: tuple[Choice, ...]

    @property
    def memory(self) -> int | None:
        """Bytes that the chosen estimator is predicted to need."""
        return next(choice.memory for choice in self.choices if choice.estimator == self.estimator)

    def __str__(self) -> str:
        """A table."""
        lines = [
            f"estimator {self.estimator!r}: {self.reason}",
            f"{self.steps} inner step(s), {self.meta_parameters} scalar meta-parameter(s)",
            f"{'':2}{'estimator':<11}{'memory':>10}{'plain steps':>13}  remark",
        ]
        for choice in self.choices:
            mark = "> " if choice.estimator == self.estimator else "  "
            cost = f"{choice.gradients:.0f}" if choice.usable else "-"
            memory = readable(choice.memory) if choice.usable else "-"
            lines.append(f"{mark}{choice.estimator:<11}{memory:>10}{cost:>13}  {choice.remark}")
        return "\n".join(lines)


def plan(
    loss: Loss,
    params: Mapping[str, Tensor],
    learned: LearnedOptimizer,
    batches: Sequence[Any],
    *,
    state: Any = None,
    buffers: Mapping[str, Tensor] | None = None,
    gradient_transformation: GradientTransformation | None = None,
    particles: Particles | None = None,
    memory_limit: int | None = None,
) -> Plan:
    """What :func:`lightning_l2l.meta_gradient` would do with these arguments, and what it would take.

    Runs a single inner step, twice, to measure it and to see whether its operations can be differentiated twice.
    Nothing that is passed in is changed.

    Args:
        loss: ``loss(params, batch)`` gives a tensor of one number.
        params: What the inner optimizer moves, by name.
        learned: The learned optimizer.
        batches: One batch for each inner step; only the first one is looked at.
        state: The inner optimizer's state to start from.
        buffers: Tensors that the loss reads, and may write in place, by name.
        gradient_transformation: A stateless torchopt transformation of the inner gradients.
        particles: For the estimators with particles.
        memory_limit: Bytes that an unroll may take; half of what is free, if not given.

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: No batches, no parameters, or no meta-parameters.

    Example:
        >>> import torch
        >>> from lightning_l2l import LearnedStepSize
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> found = plan(lambda params, batch: params["w"].square().sum(), {"w": torch.ones(8)}, learned, [None] * 50)
        >>> found.estimator, found.reason
        ('forward', '1 scalar meta-parameter(s): memory does not grow with the unroll')
    """
    if not batches:
        raise ValueError("batches is empty: a plan needs at least one training step to look at.")
    if not params:
        raise ValueError("params is empty: there is nothing for the inner optimizer to move.")
    if not scalars(learned):
        raise ValueError(f"{type(learned).__name__} has no parameter that requires a gradient: nothing to learn.")
    step = InnerStep(loss, learned, gradient_transformation)
    start = step.start(params, state, buffers or {})
    memory = measure_step(step, start, batches[0])
    count = scalars(learned)
    particles = particles or Particles()
    name, reason = choose(count, len(batches), memory, _limit(start, memory_limit))
    choices = tuple(_choice(estimator, memory, count, len(batches), particles) for estimator in _REMARKS)
    return Plan(name, reason, len(batches), count, choices)


def choose_estimator(
    learned: nn.Module,
    estimator: str,
    step: InnerStep | None = None,
    start: Iterate | None = None,
    batches: Sequence[Any] = (),
) -> tuple[str, str]:
    """The estimator that ``"auto"`` stands for, and why.

    Args:
        learned: The learned optimizer; its parameters that require a gradient are counted.
        estimator: The name asked for.
        step: The inner training step; it is measured if the choice depends on it.
        start: Where the unroll starts.
        batches: The batches of the unroll.

    Returns:
        The name of an estimator and a sentence.
    """
    if estimator != "auto":
        return estimator, "asked for"
    count = scalars(learned)
    if count <= LARGEST_FORWARD or len(batches) < SHORTEST_MEASURED or step is None or start is None:
        return choose(count, len(batches), None, None)
    with together(step.processes):
        memory = measure_step(replace(step, processes=None), start, batches[0])
        name, reason = choose(count, len(batches), memory, _limit(start, None))
    # Each process has its own free memory; they have to take the same.
    for cautious in ("es", "segmented"):
        if step.processes is not None and step.processes.any(name == cautious):
            return cautious, reason if name == cautious else f"another process needs it; here: {reason}"
    return name, reason


def choose(count: int, steps: int, memory: StepMemory | None, limit: int | None) -> tuple[str, str]:
    """The choice itself.

    Args:
        count: Number of scalar meta-parameters.
        steps: K.
        memory: What a step needs, if it was measured.
        limit: Bytes that may be used, if that is known.

    Example:
        >>> choose(1000, 200, StepMemory(10**6, 0, 10**7, 10**7), 10**9)[0]
        'segmented'
    """
    if memory is not None and memory.missing is not None:
        return "es", f"{memory.missing} has no second derivative, and evolution strategies need none"
    if count <= LARGEST_FORWARD:
        return "forward", f"{count} scalar meta-parameter(s): memory does not grow with the unroll"
    reason = f"{count} scalar meta-parameters: one backward pass serves all of them"
    if memory is None or limit is None:
        return "reverse", reason
    need = memory.need("reverse", steps, count)
    if need <= limit:
        return "reverse", f"{reason}, and its {readable(need)} for {steps} steps fit"
    segments = readable(memory.need("segmented", steps, count))
    return "segmented", (
        f"{reason}; all {steps} graphs would need {readable(need)}, more than the {readable(limit)} allowed, "
        f"segments need {segments}"
    )


def scalars(learned: nn.Module) -> int:
    """Number of scalar meta-parameters."""
    return sum(tensor.numel() for tensor in learned.parameters() if tensor.requires_grad)


def readable(count: int | None) -> str:
    """Bytes for people.

    Example:
        >>> readable(1536), readable(None)
        ('1.5 kB', 'unknown')
    """
    if count is None:
        return "unknown"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def _limit(start: Iterate, given: int | None) -> int | None:
    if given is not None:
        return given
    free = free_memory(start.leaves()[0].device)
    return None if free is None else int(_SHARE * free)


def _choice(estimator: str, memory: StepMemory | None, count: int, steps: int, particles: Particles) -> Choice:
    # In plain steps: a Hessian-vector product is about two gradients, a recorded step with its way back about two more.
    cost = {
        "forward": steps * (1 + 2 * count),
        "reverse": steps * 3,
        "segmented": steps * 4,
        "mixed": steps * 3 * (particles.count + 1),
        "es": steps * (particles.count + 1),
    }[estimator]
    need = None if memory is None else memory.need(estimator, steps, count, particles.count // particles.ranks)
    remark, usable = _REMARKS[estimator], True
    if estimator in ("es", "mixed"):
        remark += f"; {particles.count} particles at once"
    if memory is not None and memory.missing is not None and estimator != "es":
        remark, usable = f"impossible: {memory.missing} has no second derivative", False
    return Choice(estimator, need, float(cost), remark, usable)
