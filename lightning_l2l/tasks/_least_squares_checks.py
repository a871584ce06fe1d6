"""Refusals of the least-squares tasks: what is wrong, why it matters, what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The paper truncates at a norm of 40 sigma.
_RADIUS_IN_NOISE = 40.0


def check_sizes(tasks: int, dimension: int, samples: int, noise: float) -> None:
    """Refuse empty problems and impossible noise.

    Raises:
        ValueError: A size is below one, or the noise is negative or not finite.
    """
    for name, number in (("tasks", tasks), ("dimension", dimension), ("samples", samples)):
        if number < 1:
            raise ValueError(f"{name}={number}, but a least-squares task needs at least 1.")
    _check_noise(noise)


def _check_noise(noise: float) -> None:
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(
            f"noise={noise}, but it is the standard deviation of the labels' noise: a finite number, 0 or more."
        )


def validation_count(samples: int, fraction: float | None, count: int | None) -> int:
    """The number of held-out samples, from either way to ask for it; 0 if neither is given.

    Raises:
        ValueError: Both are given, or the training or the asked-for validation side would be empty.
    """
    if fraction is not None and count is not None:
        raise ValueError("Give validation_fraction or validation_samples, not both.")
    if fraction is None and count is None:
        return 0
    asked = f"validation_fraction={fraction}" if fraction is not None else f"validation_samples={count}"
    if fraction is not None:
        # The margin keeps 0.3 * 10 at 3; a fraction that is not a number ends in the refusal below.
        found = math.floor(fraction * samples + 1e-9) if math.isfinite(fraction) else -1
    else:
        assert count is not None
        found = count
        if count == 0:
            return 0
    if not 0 < found < samples:
        raise ValueError(
            f"{asked} of {samples} samples leaves the {'validation' if found <= 0 else 'training'} side "
            f"empty; hold out between 1 and {samples - 1} samples, or none by leaving the argument out."
        )
    return found


def check_data(inputs: Tensor, targets: Tensor, solution: Tensor, validation_samples: int) -> None:
    """Refuse tensors that are not a batch of least-squares tasks.

    Raises:
        TypeError: Not floating point, or different dtypes.
        ValueError: Shapes that do not fit, an empty dimension, non-finite numbers, nothing to train on.
    """
    if inputs.dtype not in (torch.float32, torch.float64) or {targets.dtype, solution.dtype} != {inputs.dtype}:
        raise TypeError(
            f"inputs, targets and solution have dtypes {inputs.dtype}, {targets.dtype} and {solution.dtype}; "
            "all must be torch.float32 or all torch.float64 (the eigendecomposition knows no others)."
        )
    if inputs.ndim != 3 or targets.shape != inputs.shape[:2] or solution.shape != inputs.shape[::2]:
        raise ValueError(
            f"inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)} and solution "
            f"{tuple(solution.shape)} do not fit: they must be [tasks, samples, dimension], [tasks, samples] "
            "and [tasks, dimension]."
        )
    check_sizes(len(inputs), inputs.shape[2], inputs.shape[1], 0.0)
    for name, tensor in (("inputs", inputs), ("targets", targets), ("solution", solution)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity; clean the data before making tasks of it.")
    if not 0 <= validation_samples < inputs.shape[1]:
        raise ValueError(
            f"validation_samples={validation_samples} of {inputs.shape[1]} samples leaves nothing to train "
            f"on; hold out between 0 and {inputs.shape[1] - 1}."
        )


def truncation_radius_or_default(radius: float | None, noise: float, solution: Tensor) -> float:
    """The radius asked for, or 40 sigma.

    Raises:
        ValueError: It is not a positive number, or a solution lies outside of it.
    """
    _check_noise(noise)
    found = _RADIUS_IN_NOISE * noise if radius is None else float(radius)
    longest = float(torch.linalg.vector_norm(solution, dim=-1).max())
    if not found > longest:  # also refuses NaN
        origin = "40 * noise, the default" if radius is None else "given"
        raise ValueError(
            f"The truncation radius {found:g} ({origin}) is not larger than the norm {longest:.3g} of a "
            "solution w*, so runs that find it would be truncated. Pass a larger truncation_radius, e.g. "
            "truncation_radius=40."
        )
    return found


def check_step_sizes(step_size: float | Tensor, like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The step sizes as a float64 vector on the data's device, and the shape they came in.

    Raises:
        ValueError: Negative, not finite, none at all, or more than one dimension.
    """
    eta = torch.as_tensor(step_size, dtype=torch.float64, device=like.device).detach()
    if eta.ndim > 1 or eta.numel() == 0:
        raise ValueError(f"step_size has shape {tuple(eta.shape)}; give a number or a non-empty vector.")
    if not bool((torch.isfinite(eta) & (eta >= 0)).all()):
        raise ValueError(
            f"step_size={step_size} is negative or not finite; gradient descent is defined for finite step "
            "sizes of 0 or more."
        )
    return eta.reshape(-1), tuple(eta.shape)


def check_steps_and_order(steps: int, order: Tensor | None, tasks: int, samples: int, method: str) -> None:
    """Refuse impossible runs.

    Raises:
        ValueError: ``steps < 1``, an unknown method, a closed form of SGD, or an order that does not fit.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}, but a meta-objective looks at a run of at least 1 step.")
    if method not in ("auto", "closed_form", "unroll"):
        raise ValueError(f"method={method!r} is not known; choose 'auto', 'closed_form' or 'unroll'.")
    if order is None:
        return
    if method == "closed_form":
        raise ValueError(
            "SGD has no closed form: its steps use different samples and do not commute. Leave out order for "
            "gradient descent, or use method='unroll'."
        )
    if order.dtype != torch.int64 or order.ndim not in (2, 3):
        raise ValueError(
            f"order is {order.dtype} of shape {tuple(order.shape)}; it must hold int64 sample indices, "
            "[steps, batch] or [tasks, steps, batch]."
        )
    if order.shape[-2] < steps or order.shape[-1] < 1 or (order.ndim == 3 and len(order) != tasks):
        raise ValueError(
            f"order has shape {tuple(order.shape)}, but {tasks} task(s) of {steps} steps need [{steps}, "
            f"batch] or [{tasks}, {steps}, batch] with at least one sample in a batch."
        )
    if int(order.min()) < 0 or int(order.max()) >= samples:
        raise ValueError(
            f"order names samples {int(order.min())} to {int(order.max())}, but the training samples are 0 "
            f"to {samples - 1} (held-out samples are not for training)."
        )
