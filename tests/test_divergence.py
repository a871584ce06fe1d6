"""When a training counts as lost: suspicions from losses, and verdicts from a comparison."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_l2l.exact.divergence import LossWatch, has_died, is_lost, zero_share


def watch(*losses: float) -> LossWatch:
    made = LossWatch()
    for loss in losses:
        made.see(loss)
    return made


@pytest.mark.parametrize("start", [2.3, 1e-6, 1e6, -5.0])
def test_three_losses_far_above_the_first_are_suspicious_at_any_scale_and_sign(start: float) -> None:
    high = start + 2.1 * abs(start)
    assert not watch(start, high, high).suspicious and watch(start, high, high, high).suspicious
    assert not watch(start, *[start + 1.9 * abs(start)] * 20).suspicious


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_one_loss_that_is_no_number_is_suspicious(loss: float) -> None:
    assert watch(2.3, loss).suspicious and watch(loss).suspicious and not watch(2.3).suspicious


def test_falling_losses_are_calm() -> None:
    assert watch(2.3, 2.0, 1.0, 0.1).calm and not watch(2.3, 9.0).calm and not watch(2.3, math.nan).calm


def test_unfounded_suspicions_become_rare() -> None:
    """Losses of heavy tails, never lost: a few dozen comparisons in ten thousand steps, not thousands."""
    generator = torch.Generator().manual_seed(0)
    made, comparisons = LossWatch(), 0
    for loss in (torch.randn(10_000, generator=generator) / torch.randn(10_000, generator=generator)).tolist():
        made.see(loss)
        if made.suspicious:
            comparisons += 1
            made.unfounded()
    assert 0 < comparisons < 40


def test_unfounded_suspicions_about_numbers_become_rare() -> None:
    made, comparisons = watch(1.0), 0
    for _ in range(1000):
        made.see(math.nan)
        if made.suspicious:
            comparisons += 1
            made.unfounded()
    assert 1 < comparisons < 15


def test_zeros_are_suspicious_once() -> None:
    made = watch(1.0)
    made.see_zeros(0.5)
    assert made.calm
    made.see_zeros(0.95)
    assert made.suspicious and not made.calm
    made.unfounded()  # a large embedding: its gradients are zero by right
    made.see_zeros(0.95)
    assert made.calm
    made.see_zeros(0.999)  # but not these as well
    assert made.suspicious


@pytest.mark.parametrize(("start", "low"), [(2.3, 0.3), (-1.0, -5.0)])
def test_losses_that_lose_half_of_what_was_won_are_a_relapse(start: float, low: float) -> None:
    won = start - low
    made = watch(start, *[low] * 10)
    assert made.calm and not made.suspicious
    for _ in range(6):  # the median of ten follows
        made.see(low + 0.3 * won)
    assert not made.calm and not made.suspicious  # nothing to go back to, and not to be kept
    for _ in range(6):
        made.see(low + 0.6 * won)
    assert made.relapsed and made.suspicious
    made.unfounded()
    assert made.calm


@pytest.mark.parametrize(
    "losses", [[2.3] * 10 + [2.6] * 20, [2.3, *[2.2] * 10, *[2.3] * 20], [2.3, *[0.3] * 10, *[2.3, 0.3] * 10, 0.3, 0.3]]
)
def test_little_that_was_won_and_single_losses_are_no_relapse(losses: list[float]) -> None:
    assert not any(watch(*losses[:until]).relapsed for until in range(len(losses)))


def test_after_a_relapse_a_smaller_difference_decides() -> None:
    assert not is_lost([], [1.0, 1.0], [1.3, 1.3])
    assert is_lost([], [1.0, 1.0], [1.3, 1.3], relapsed=True)
    assert not is_lost([], [1.0, 1.0], [1.05, 1.05], relapsed=True)  # the task has become harder, not the weights worse


def test_the_watch_goes_on_where_it_was_saved() -> None:
    made = watch(2.3, 9.0, 9.0, math.nan)
    made.see_zeros(0.9)
    again = LossWatch(made.state_dict())
    assert again.state_dict() == made.state_dict() and again.high == [9.0, 9.0]
    made.unfounded(), again.unfounded()
    for each in (made, again):
        each.see(9.5), each.see(9.5)
    assert again.state_dict() == made.state_dict()


HIGH = [30.0, 40.0, 50.0]


@pytest.mark.parametrize(
    ("high", "before", "now", "dead", "lost"),
    [
        (HIGH, [2.3, 2.3], [math.nan, 2.3], False, True),
        (HIGH, [2.3, 2.3], [40.0, 60.0], False, True),
        (HIGH, [2.30, 2.32], [2.30, 2.31], False, True),  # at chance level after an explosion
        ([7.0] * 3, [2.30, 2.32], [2.30, 2.31], False, False),  # loud and no better, but nothing exploded
        ([7.0] * 3, [2.30, 2.32], [2.30, 2.31], True, True),
        ([], [2.30, 2.32], [2.30, 2.31], True, True),
        (HIGH, [2.3, 2.3], [2.1, 2.2], False, False),  # better than before: whatever it was, it is over
        ([], [2.3, 2.3], [1.9, 2.0], True, True),  # what is left of a network learns a little
        ([], [2.3, 2.3], [1.5, 1.5], True, False),
        ([], [2.3, 2.3], [2.3, 2.3], False, False),  # a step that the loss scaler skipped
        (HIGH, [math.nan, 2.3], [math.nan, 2.3], True, False),  # the batch is broken, not the weights
        ([9.0] * 3, [-3.0, 3.1], [-2.0, 3.5], False, False),  # noise around zero: the spread is the measure
        (HIGH, [-50.0, -50.0], [-51.5, -51.5], False, False),
        ([5.0] * 3, [-50.0, -50.0], [-1.0, -1.0], False, True),
    ],
)  # fmt: skip
def test_verdict(high: list[float], before: list[float], now: list[float], dead: bool, lost: bool) -> None:
    assert is_lost(high, before, now, dead=dead) is lost


def test_zeros_are_counted_exactly() -> None:
    assert zero_share([]) == zero_share([None]) == 0.0
    assert zero_share([torch.eye(4), torch.full((4,), 1e-30)]) == 12 / 20
    assert has_died(0.5, 0.99) and has_died(0.9, 0.99) and not has_died(0.9, 0.95) and not has_died(0.5, 0.7)
