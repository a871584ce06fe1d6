"""What the meta-optimizer promises."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_l2l.exact.meta_optimizer import MetaOptimizer
from lightning_l2l.learned import LearnedStepSize
from lightning_l2l.learned.base import LearnedOptimizer


class Learned(LearnedOptimizer):
    """Two kinds of meta-parameters: logarithms of rates, and something else."""

    def __init__(self, rates: int = 1) -> None:
        super().__init__()
        self.learning_rate = nn.Parameter(torch.zeros(rates, dtype=torch.float64))
        self.other = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def transformation(self) -> None:  # type: ignore[override]
        raise NotImplementedError

    def scaled_rate(self, factor: float) -> dict[str, Tensor]:
        return {"learning_rate": self.learning_rate.detach() + math.log(factor)}


def gradient(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def after(gradients: list[float], learning_rate: float = 0.4) -> list[float]:
    """The logarithm of the rate after each of these meta-gradients."""
    learned = Learned()
    meta_optimizer = MetaOptimizer(learned.parameters(), learning_rate)
    walk = []
    for value in gradients:
        meta_optimizer.apply(learned, {"learning_rate": gradient(value)})
        walk.append(learned.learning_rate.item())
    return walk


def test_the_first_step_is_the_learning_rate_down_or_a_quarter_of_it_up() -> None:
    assert after([3e-7]) == [pytest.approx(-0.4)]
    assert after([-3e-7]) == [pytest.approx(0.1)]


def test_other_meta_parameters_go_both_ways_alike() -> None:
    learned = Learned()
    MetaOptimizer(learned.parameters(), 0.4).apply(learned, {"other": gradient(2.0, -2.0)})
    assert learned.other.tolist() == pytest.approx([-0.4, 0.4])
    assert learned.learning_rate.item() == 0.0


def test_a_rate_in_another_parametrisation_is_raised_with_caution_too() -> None:
    class Inverted(Learned):
        def scaled_rate(self, factor: float) -> dict[str, Tensor]:
            return {"learning_rate": self.learning_rate.detach() - math.log(factor)}

    learned = Inverted()
    MetaOptimizer(learned.parameters(), 0.4).apply(learned, {"learning_rate": gradient(1.0)})
    assert learned.learning_rate.item() == pytest.approx(-0.1)  # the rate rises where this one falls


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e12])
def test_the_scale_of_the_meta_gradients_does_not_matter(scale: float) -> None:
    signs = [-1.0, -0.5, 2.0, 0.3, -1.0]
    # The scale is not a power of two: rounding in float64.
    assert after([scale * sign for sign in signs]) == pytest.approx(after(signs), rel=1e-9)


def test_the_direction_turns_soon_after_small_meta_gradients_have_turned() -> None:
    # The failure that this optimizer was made for: large early meta-gradients, then small ones of the other sign.
    early, late = [-0.3, -0.1, -0.03, -0.01], [0.003] * 8
    walk = after([*early, *late])
    assert walk[-1] < walk[-2] < walk[-3] < max(walk)
    # Adam is still going up by then; if it were not, there would be no need for anything else.
    parameter = nn.Parameter(gradient(0.0))
    adam = torch.optim.Adam([parameter], lr=0.4, betas=(0.9, 0.99))
    adams = []
    for value in [*early, *late]:
        parameter.grad = gradient(value)
        adam.step()
        adams.append(parameter.item())
    assert adams[-1] == max(adams)


def test_steps_are_bounded_whatever_comes() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(300, generator=generator) * 10 ** (3 * torch.randn(300, generator=generator))).tolist()
    walk = [0.0, *after(values)]
    changes = [now - then for then, now in zip(walk, walk[1:], strict=False)]
    # A vote is at most 1 / sqrt(1 - 0.5), when all before it were negligible.
    assert min(changes) >= -0.4 * math.sqrt(2) and max(changes) <= 0.1 * math.sqrt(2)


def test_meta_gradients_of_random_sign_move_the_rate_less_than_those_that_agree() -> None:
    agreeing = after([1.0] * 40)[-1]
    generator = torch.Generator().manual_seed(1)
    noise = after(torch.randn(40, generator=generator).tolist())[-1]
    assert agreeing == pytest.approx(-16.0)
    assert abs(noise) < 3.0


def test_a_meta_gradient_of_zero_moves_nothing() -> None:
    assert after([0.0, 0.0]) == [0.0, 0.0]


def test_meta_parameters_without_a_gradient_stay() -> None:
    learned = Learned()
    meta_optimizer = MetaOptimizer(learned.parameters(), 0.4)
    meta_optimizer.apply(learned, {"learning_rate": gradient(1.0), "other": gradient(1.0, 1.0)})
    held = learned.other.detach().clone()
    learned.other.grad = gradient(1.0, 1.0)  # left by somebody's backward()
    meta_optimizer.apply(learned, {"learning_rate": gradient(1.0)})
    assert torch.equal(learned.other, held)
    assert all(parameter.grad is None for parameter in learned.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_before_it_is_remembered(bad: float) -> None:
    learned = Learned()
    meta_optimizer = MetaOptimizer(learned.parameters(), 0.4)
    with pytest.raises(ValueError, match=r"'other' is not finite.*usable"):
        meta_optimizer.apply(learned, {"learning_rate": gradient(1.0), "other": gradient(0.0, bad)})
    assert learned.learning_rate.item() == 0.0 and not meta_optimizer.state


def test_a_new_entry_starts_without_memory_and_the_old_ones_keep_theirs() -> None:
    grown, alone = Learned(rates=1), Learned(rates=1)
    meta_optimizer, other = MetaOptimizer(grown.parameters(), 0.4), MetaOptimizer(alone.parameters(), 0.4)
    for value in (1.0, -0.2, 0.7):
        meta_optimizer.apply(grown, {"learning_rate": gradient(value)})
        other.apply(alone, {"learning_rate": gradient(value)})
    # As when a parameter group is added: the same Parameter with more entries.
    grown.learning_rate.data = torch.cat([grown.learning_rate.data, gradient(0.0)])
    meta_optimizer.apply(grown, {"learning_rate": gradient(0.1, 1e-8)})
    other.apply(alone, {"learning_rate": gradient(0.1)})
    assert grown.learning_rate[0].item() == alone.learning_rate.item()
    assert grown.learning_rate[1].item() == pytest.approx(-0.4)  # a first step, as long as any first step


def test_state_is_plain_and_a_resumed_run_is_the_same_run() -> None:
    values = [-1.0, 0.3, 0.2, -0.1, 0.5, 0.4]
    learned = Learned()
    meta_optimizer = MetaOptimizer(learned.parameters(), 0.4)
    for value in values[:3]:
        meta_optimizer.apply(learned, {"learning_rate": gradient(value)})
    file = io.BytesIO()
    torch.save({"learned": learned.state_dict(), "meta_optimizer": meta_optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = Learned()
    resumed.load_state_dict(saved["learned"])
    again = MetaOptimizer(resumed.parameters(), 0.4)
    again.load_state_dict(saved["meta_optimizer"])
    for value in values[3:]:
        again.apply(resumed, {"learning_rate": gradient(value)})
    assert resumed.learning_rate.item() == after(values)[-1]


def test_with_a_learning_rate_of_zero_nothing_moves() -> None:
    assert after([1.0, -1.0, 1.0], learning_rate=0.0) == [0.0, 0.0, 0.0]


def test_the_default_learned_step_size_is_handled() -> None:
    from lightning_l2l.functional import inner_optimizer

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
    meta_optimizer = MetaOptimizer(learned.parameters(), 0.4)
    meta_optimizer.apply(learned, {"learning_rate": gradient(-1.0)})
    assert learned.values()[0]["lr"] == pytest.approx(0.1 * math.exp(0.1))
