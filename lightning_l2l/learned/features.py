"""What a learned optimizer sees of a number: averages of its gradient, the time, all of them normalised.

Everything is laid out *feature-major*, shape ``(features, N)`` with N the elements of all tensors together: the
long axis is the contiguous one. All functions are out of place, differentiable twice and in forward mode, and free
of control flow that depends on data, so they can be batched over tasks with ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_l2l.learned.layout import Layout

# learned_optimization's embedding of the step number.
TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


def constant(values: Sequence[float]) -> Tensor:
    """Numbers as a float64 tensor, to be cast where they are used.

    Not a module's buffer: ``module.half()`` would turn a decay of 0.9999 into 1, and casting 0.9999 to float32
    before subtracting it from 1 is already wrong in the fourth digit.
    """
    return torch.tensor(values, dtype=torch.float64)


def moving_average(average: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """Exponential moving averages with several decays, updated by one value; no bias correction.

    ``a_k <- (1 - w_k) a_k + w_k x``.

    Args:
        average: ``(K, ...)``.
        value: ``(...)``, the same for all K.
        weight: ``(K,)``, one minus the decay.
    """
    shaped = weight.to(average.device, average.dtype).reshape(-1, *[1] * value.dim())
    return torch.lerp(average, value.expand_as(average), shaped)


def time_features(step: Tensor, timescales: Tensor, dtype: torch.dtype) -> Tensor:
    """``tanh(step / tau - 1)`` for each time scale, shape ``(T,)``: how far the training is, at several scales.

    Args:
        step: The step number, 0-dim integer.
        timescales: ``(T,)``.
        dtype: Of the result.
    """
    return torch.tanh(step.to(dtype) / timescales.to(step.device, dtype) - 1.0)


def normalised(features: Tensor, layout: Layout, epsilon: float = 1e-5) -> Tensor:
    """Each feature divided by its root mean square over its tensor.

    ``x / sqrt(epsilon + mean(x**2))``, the mean over the elements of one tensor: what the network sees does not
    depend on the scale of the loss. (Metz et al. 2019, arXiv 1810.10180, appendix; the same in all its successors.)

    Args:
        features: ``(..., N)``.
        layout: Where the tensors lie.
        epsilon: Added to the mean square.

    Example:
        >>> layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(1)})
        >>> normalised(torch.tensor([[3.0, 4.0, -2.0]]), layout, epsilon=0.0)
        tensor([[ 0.8485,  1.1314, -1.0000]])
    """
    return layout.join(
        [part * torch.rsqrt(epsilon + part.square().mean(-1, keepdim=True)) for part in layout.split(features)]
    )


class LearnedDecays(nn.Module):
    """Decays of moving averages as meta-parameters.

    An offset ``d`` for each decay, zero at first: ``decay = 1 - (1 - initial) * exp(10 d)``. The factor 10 makes a
    meta-step of 0.01 a change of 10 % in the time scale. (``learned_optimization``, ``adafac_mlp_lopt.py``.)

    Args:
        initial: The decays to start from, in [0, 1).

    Example:
        >>> decays = LearnedDecays([0.9, 0.999])
        >>> 1 - decays.weights()
        tensor([0.9000, 0.9990], dtype=torch.float64, grad_fn=<RsubBackward1>)
    """

    _RATE = 10.0

    def __init__(self, initial: Sequence[float]) -> None:
        """See the class."""
        super().__init__()
        self._weights = constant([1.0 - decay for decay in initial])
        self.offset = nn.Parameter(torch.zeros(len(self._weights)))

    def weights(self, largest: float = float("inf")) -> Tensor:
        """One minus the decays, shape ``(K,)``, float64; at most ``largest``."""
        weights = self._weights.to(self.offset.device) * torch.exp(self._RATE * self.offset.double())
        return weights.clamp(max=largest)

    @torch.no_grad()
    def project_(self) -> None:
        """Keeps the decays in [0, 1 - 1e-7], in place: beyond, an average would explode or never move again."""
        low, high = (torch.log(bound / self._weights) / self._RATE for bound in (1e-7, 1.0))
        device, dtype = self.offset.device, self.offset.dtype
        self.offset.copy_(self.offset.clamp(low.to(device, dtype), high.to(device, dtype)))
