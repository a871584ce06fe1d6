"""The paper's neural optimizer: a small network that sees averages of a gradient and says where to go."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_l2l.learned.coordinatewise import (
    FeatureOptimizer,
    Initialisation,
    State,
    constant,
    moving_average,
    normalised,
    time_features,
)
from lightning_l2l.learned.layout import Layout

_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
# The last is 300 000 in the published code, though 30 000 seems to have been meant.
_TIMESCALES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 300000.0)


class MLPOptimizer(FeatureOptimizer):
    r"""A multilayer perceptron as the optimizer, 31 features, 1090 meta-parameters.

    For each number ``p`` with gradient ``g``: moving averages ``m_k`` of ``g`` and ``v_k`` of ``g**2`` at five decays
    (0.5, 0.9, 0.99, 0.999, 0.9999; from zero, without bias correction) and ``r_k = (v_k + 1e-6)**-1/2`` give the
    features

    ``g, m_1 r_1 ... m_5 r_5, p, m_1 ... m_5, v_1 ... v_5, r_1 ... r_5``   (22, each normalised over its tensor),

    and with the step number ``t = 1, 2, ...`` the nine ``tanh(t / tau - 1)``. One hidden layer of ReLU units, two
    outputs d and a, and ``p <- p - step_multiplier * d * exp(exponent_multiplier * a)``.

    When it helps: to reproduce the paper's experiments. :class:`SmallFCOptimizer` sees more and costs less; with
    ``normalise_output=True`` either trains in minutes. Cost of a step: about 1100 multiplications per parameter;
    state: ten numbers per parameter. An unroll keeps about 100 numbers per parameter and step.

    Args:
        hidden_size: Units in the hidden layer.
        step_multiplier: Multiplies every step.
        exponent_multiplier: Multiplies the output that scales the step; 0 switches it off.
        initialisation: ``"reference"`` is the paper's: N(0, 1) weights, biases 0.1; it starts as a random walk.
            ``"scaled"`` starts with steps of the order of ``step_multiplier``, ``"zero_output"`` at rest.
        normalise_output: Every step has root mean square ``step_multiplier`` in each tensor (Celo2).

    Raises:
        ValueError: A size below 1, a multiplier that is not positive, an unknown initialisation.

    Source: Metz et al. 2019 (arXiv 1810.10180), in the form of Wang, Yuan, Wu, Ge (ICML 2021), section 5.

    Example:
        >>> import torch
        >>> learned = MLPOptimizer()
        >>> sum(parameter.numel() for parameter in learned.parameters())
        1090
        >>> parameters = {"w": torch.ones(3, 2), "b": torch.zeros(3)}
        >>> optimizer = learned.transformation()
        >>> state = optimizer.init(parameters)
        >>> updates, state = optimizer.update(parameters, state, params=parameters)
        >>> updates["w"].shape, state["momenta"].shape, state["step"].item()
        (torch.Size([3, 2]), torch.Size([5, 9]), 1)
    """

    def __init__(
        self,
        hidden_size: int = 32,
        step_multiplier: float = 1e-3,
        exponent_multiplier: float = 1e-3,
        initialisation: Initialisation = "reference",
        normalise_output: bool = False,
    ) -> None:
        super().__init__(
            2 + 4 * len(_DECAYS), _TIMESCALES, 1, hidden_size=hidden_size, step_multiplier=step_multiplier,
            exponent_multiplier=exponent_multiplier, initialisation=initialisation, normalise_output=normalise_output,
        )  # fmt: skip
        self._weights = constant([1.0 - decay for decay in _DECAYS])

    def initial_state(self, layout: Layout, like: Tensor) -> State:
        """``"momenta"`` and ``"second_moments"``, shape ``(5, N)`` each."""
        shape = (len(_DECAYS), layout.size)
        return {"momenta": like.new_zeros(shape), "second_moments": like.new_zeros(shape)}

    def features(
        self, gradient: Tensor, parameter: Tensor, state: State, layout: Layout
    ) -> tuple[Tensor, Tensor, State]:
        """22 normalised features, nine of the time, and the next averages."""
        momenta = moving_average(state["momenta"], gradient, self._weights)
        second_moments = moving_average(state["second_moments"], gradient.square(), self._weights)
        roots = torch.rsqrt(second_moments + 1e-6)
        raw = torch.cat([gradient[None], momenta * roots, parameter[None], momenta, second_moments, roots])
        time = time_features(state["step"] + 1, self.timescales, gradient.dtype)
        return normalised(raw, layout), time, {"momenta": momenta, "second_moments": second_moments}
