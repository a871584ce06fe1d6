"""What the initial search promises, on made-up losses."""

from __future__ import annotations

import math

import pytest

from lightning_l2l.exact.initial_search import (
    MARGIN,
    USUAL_STEPS,
    search_budget,
    search_learning_rate,
    search_margin,
    search_steps,
)

START_LOSS = 2.3
# 10.0**exponent is how the search makes its rates; sums of half-decades are exact in binary.
RATES = [10.0 ** (exponent / 2) for exponent in range(-14, 5)]


class Valley:
    """A loss like a network's: no change at tiny rates, a valley, a dead network above it, divergence further up."""

    def __init__(self, best: float, width: float = 1.0, steps: int = 20, dead: float = START_LOSS) -> None:
        self.best, self.width, self.steps, self.dead = best, width, steps, dead
        self.visited: list[float] = []

    def __call__(self, rate: float) -> tuple[float, int]:
        self.visited.append(rate)
        distance = math.log10(rate) - self.best
        if distance > 2.6:
            return math.inf, min(2, self.steps)
        if distance > 0.6:
            return self.dead - 5e-3 * distance, self.steps  # the larger the rate, the better: a false trail
        return START_LOSS - 1.8 * math.exp(-((distance / self.width) ** 2)), self.steps


@pytest.mark.parametrize("best", [-6.0, -5.0, -3.5, -2.0, -1.5, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("start_loss", [None, START_LOSS])
def test_the_bottom_of_the_valley_is_found_wherever_it_lies(best: float, start_loss: float | None) -> None:
    result = search_learning_rate(Valley(best), start_loss=start_loss)
    assert result.learning_rate == pytest.approx(10.0**best * MARGIN)


def test_a_dead_network_slightly_below_the_start_does_not_end_the_search() -> None:
    # Dead networks predict the class frequencies: a loss a little below that of the initial weights.
    valley = Valley(-4.0, dead=START_LOSS - 0.02)
    result = search_learning_rate(valley, start_loss=START_LOSS)
    assert result.learning_rate == pytest.approx(1e-4 * MARGIN)


def test_tiny_rates_are_not_visited_once_the_valley_has_been_passed() -> None:
    valley = Valley(-1.0)
    search_learning_rate(valley, start_loss=START_LOSS)
    assert min(valley.visited) >= 1e-3


def test_no_rate_is_tried_twice() -> None:
    valley = Valley(-1.0)
    result = search_learning_rate(valley)
    assert len(valley.visited) == len(set(valley.visited)) == len(result.losses)


def test_every_candidate_is_one_of_the_absolute_half_decades() -> None:
    for best in (-4.3, -1.1, 0.4):
        result = search_learning_rate(Valley(best), start_loss=START_LOSS)
        assert all(min(abs(rate / known - 1) for known in RATES) < 1e-12 for rate in result.losses)


def test_losses_come_in_increasing_order_of_the_rate() -> None:
    losses = search_learning_rate(Valley(-2.0)).losses
    assert list(losses) == sorted(losses)


def test_no_rate_is_given_when_every_candidate_diverges() -> None:
    result = search_learning_rate(lambda rate: (math.inf, 1), start_loss=START_LOSS)
    assert result.learning_rate is None
    assert result.steps == len(result.losses) == 10


def test_nan_counts_as_divergence() -> None:
    # NaN compares false with everything: a minimum over a list with NaN in front would be NaN.
    result = search_learning_rate(lambda rate: (math.nan if rate > 1e-3 else rate, 3), start_loss=START_LOSS)
    assert result.learning_rate is not None and math.isfinite(result.learning_rate)
    assert result.losses[1.0] == math.inf
    assert search_learning_rate(lambda rate: (math.nan, 3)).learning_rate is None


def test_on_a_plateau_of_rates_that_change_nothing_the_largest_is_taken() -> None:
    # Rates above 1e-4 make it worse, those below leave the weights as they are; the loss at the start is not known.
    result = search_learning_rate(lambda rate: (START_LOSS if rate < 2e-4 else START_LOSS + rate, 20))
    assert result.learning_rate == pytest.approx(1e-4 * MARGIN)


def test_where_training_starts_on_a_plateau_the_largest_rate_without_real_harm_is_taken() -> None:
    # A GRU does so: a few steps at any rate change the loss by less than which batches judge it.
    result = search_learning_rate(lambda rate: (START_LOSS * (1 - 1e-5 + 0.015 * rate), 20), start_loss=START_LOSS)
    assert result.learning_rate == pytest.approx(1.0 * MARGIN)  # 10 does 15 % of harm, 1 does 1.5 %


def test_a_small_but_visible_improvement_is_no_plateau() -> None:
    result = search_learning_rate(
        lambda rate: (START_LOSS * (0.99 if rate < 2e-4 else 1 + 0.015 * rate), 20), start_loss=START_LOSS
    )
    assert result.learning_rate == pytest.approx(10**-3.5 * MARGIN) or result.learning_rate == pytest.approx(
        1e-4 * MARGIN
    )


def test_negative_losses_are_searched_like_any_others() -> None:
    def loss_at(rate: float) -> tuple[float, int]:
        loss, steps = Valley(-2.0)(rate)
        return loss - 100.0, steps

    result = search_learning_rate(loss_at, start_loss=START_LOSS - 100.0)
    assert result.learning_rate == pytest.approx(1e-2 * MARGIN)


@pytest.mark.parametrize("budget", [0, 1, 8, 19, 20, 57, 100, 160, 500])
@pytest.mark.parametrize("best", [-6.0, -1.0, 1.0])
def test_the_budget_is_never_exceeded(budget: int, best: float) -> None:
    steps = search_steps(budget)
    result = search_learning_rate(Valley(best, steps=steps), steps=steps, budget=budget, start_loss=START_LOSS)
    assert result.steps <= budget


def test_a_spent_budget_gives_the_best_so_far() -> None:
    # 100 diverges at once, 10 and 1 kill the network, 0.1 is the best: then nothing is left for 0.01.
    result = search_learning_rate(Valley(-1.0), budget=3 * 20 + 2, start_loss=START_LOSS)
    assert result.learning_rate == pytest.approx(0.1 * MARGIN)
    assert min(result.losses) == pytest.approx(0.1)


def test_where_every_rate_so_far_did_harm_the_smallest_is_taken() -> None:
    # The budget ends while all candidates were dead networks, the larger rates less so by a hair.
    result = search_learning_rate(
        lambda rate: (START_LOSS + 0.1 - 0.005 * math.log10(rate), 20), budget=60, start_loss=START_LOSS
    )
    assert sorted(result.losses) == [1.0, 10.0, 100.0]
    assert result.learning_rate == pytest.approx(1.0 * MARGIN)


def test_without_a_budget_for_one_candidate_there_is_no_rate() -> None:
    result = search_learning_rate(Valley(-1.0), budget=19, start_loss=START_LOSS)
    assert (result.learning_rate, result.losses, result.steps) == (None, {}, 0)


@pytest.mark.parametrize("planned", [400, 1000, 2000, 10_000])
@pytest.mark.parametrize("best", [-3.0, -2.0, -1.0, 0.0])
def test_five_percent_of_the_run_are_enough_to_see_the_whole_of_a_usual_valley(planned: int, best: float) -> None:
    budget = search_budget(planned)
    steps = search_steps(budget)
    result = search_learning_rate(Valley(best, steps=steps), steps=steps, budget=budget, start_loss=START_LOSS)
    assert result.steps <= 0.05 * planned
    assert result.learning_rate == pytest.approx(10.0**best * search_margin(steps))


@pytest.mark.parametrize("planned", [1, 5, 10, 16, 100, 160, 319])
def test_a_short_run_is_searched_with_two_steps_for_each_candidate_but_never_longer_than_it_is(planned: int) -> None:
    budget = search_budget(planned)
    assert search_steps(budget) == (2 if planned >= 16 else 1)
    assert budget <= max(planned, 8)  # one step for each candidate is the least there can be


def test_the_budget_is_what_a_search_needs_where_the_run_has_no_known_end() -> None:
    assert search_steps(search_budget(math.inf)) == USUAL_STEPS


def test_the_shorter_the_run_the_smaller_the_margin() -> None:
    margins = [search_margin(steps) for steps in (1, 2, 5, 10, 20)]
    assert margins == sorted(margins) and margins[-1] == MARGIN == search_margin(1000)


def test_a_margin_that_is_given_is_used() -> None:
    assert search_learning_rate(Valley(-1.0), margin=1.0).learning_rate == pytest.approx(0.1)


def test_steps_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        search_learning_rate(Valley(-1.0), steps=0)
