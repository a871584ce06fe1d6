"""When meta-updates are due."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from helpers import Plain, Resumable, Saves, difference, learner, loaders
from hypothesis import given
from hypothesis import strategies as st

from lightning_l2l import LearnToLearn
from lightning_l2l.host.cadence import Cadence


def due(of: Cadence, steps: int) -> list[int]:
    return [step for step in range(steps + 1) if of.is_due(step)]


def test_without_growth_meta_updates_are_due_at_every_multiple() -> None:
    assert due(Cadence(20, 0.0), 200) == list(range(20, 201, 20))


@given(st.integers(1, 50), st.floats(0, 2), st.integers(1, 3000))
def test_intervals_are_multiples_that_grow_with_the_run(every: int, growth: float, steps: int) -> None:
    found = due(Cadence(every, growth), steps)
    assert all(step % every == 0 for step in found)
    for before, after in pairwise(found):
        # Rounded to a multiple of the interval, at least one.
        assert abs(after - before - max(every, growth * before)) <= every / 2 + 1e-6 * before


@pytest.mark.parametrize(("planned", "interval"), [(40, 20), (39, 9), (8, 2), (3, 1), (1, 1)])
def test_a_run_shorter_than_two_intervals_has_four_of_its_own(planned: int, interval: int) -> None:
    assert Cadence(20, 0.1, planned).interval == interval


def test_a_run_is_looked_after_at_every_multiple_however_far_meta_updates_are_apart() -> None:
    of = Cadence(20, 1.0)
    assert [step for step in range(1, 101) if of.looks(step)] == [20, 40, 60, 80, 100]
    assert due(of, 100) == [20, 40, 80]


@given(st.integers(0, 5000), st.floats(0, 1))
def test_steps_to_go_is_counted_to_the_next_meta_update(step: int, growth: float) -> None:
    of = Cadence(7, growth)
    to_go = int(of.steps_to_go(step))
    assert [of.is_due(step + ahead) for ahead in range(1, to_go + 1)] == [False] * (to_go - 1) + [True]
    # Nothing is remembered from one question to the next: a resumed run gets the same answer.
    assert Cadence(7, growth).steps_to_go(step) == to_go
    assert of.steps_to_go(0) == 7


@pytest.mark.parametrize("estimator", ["live", "forward"])
@pytest.mark.parametrize("meta_data", ["val", "train"])
def test_a_run_has_its_meta_updates_when_they_are_due(trainer: Any, estimator: Any, meta_data: Any) -> None:
    # Windows as long as the interval: some follow each other without a gap, and later ones do not.
    options: dict[str, Any] = {"estimator": estimator, "meta_data": meta_data, "interval_growth": 0.5}
    callback = learner(unroll_steps=2, every_n_steps=2, **options)
    fitted = trainer(callback, max_epochs=8)
    fitted.fit(Plain(), **loaders())
    expected = due(Cadence(2, 0.5), fitted.global_step)
    assert [record["step"] for record in callback.history] == expected and len(expected) < fitted.global_step // 2
    usable = [record for record in callback.history if record["meta_gradient"]]
    assert len(usable) >= len(expected) - (meta_data == "train")  # the first window may have nothing before it


@pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*")
@pytest.mark.parametrize("stopped_at", [5, 7, 10, 13])
def test_a_run_resumed_between_growing_intervals_equals_the_uninterrupted_one(
    trainer: Any, tmp_path: Any, stopped_at: int
) -> None:
    def fitted(*others: Any, **options: Any) -> Any:
        callback = learner(every_n_steps=2, interval_growth=0.5)
        running = trainer(callback, *others, max_epochs=-1, max_steps=24)
        running.fit(Plain(), Resumable(), loaders()["val_dataloaders"], **options)
        return callback

    expected = fitted(Saves(tmp_path / "begun.ckpt", stopped_at))
    found = fitted(ckpt_path=tmp_path / "begun.ckpt")
    assert difference(expected.history, found.history) == ""


def test_negative_growth_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="must be finite and not negative; 0 for a meta-update every"):
        LearnToLearn(interval_growth=-0.1)
