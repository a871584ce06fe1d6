"""Tasks under a Trainer."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest

from lightning_l2l import LearnToLearn, TaskModule, Unroll
from lightning_l2l.tasks import LeastSquares, Quadratic


def fit(module, *callbacks, max_steps=60):
    trainer = pl.Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return trainer


def test_training_is_gradient_descent_on_the_task():
    task = Quadratic.random(4, seed=0)
    step_size = 0.5 * float(task.stability_limit)
    module = TaskModule(task, learning_rate=step_size)
    fit(module, max_steps=7)
    found = float(module.loss(None).detach().log() / 7)
    assert found == pytest.approx(float(task.meta_objective(step_size, 7)), rel=1e-10)


def test_learn_to_learn_runs_on_the_quadratic_unchanged():
    task = Quadratic.random(4, seed=0)
    start = 1e-3 * float(task.stability_limit)
    callback = LearnToLearn(every_n_steps=5, initial_search=False)
    learned, plain = (TaskModule(task, learning_rate=start) for _ in range(2))
    fit(learned, callback)
    fit(plain)
    assert start < callback.learning_rates[0] < float(task.stability_limit)
    assert learned.loss(None) < plain.loss(None)


def test_the_callbacks_first_meta_gradient_is_the_closed_form():
    task = Quadratic.random(4, seed=0)
    step_size = 0.3 * float(task.stability_limit)
    callback = LearnToLearn(Unroll(steps=3), every_n_steps=3, initial_search=False, meta_learning_rate=0.0)
    fit(TaskModule(task, learning_rate=step_size), callback, max_steps=6)
    point = task.initial_point
    for _ in range(3):
        point = point - step_size * task.hessian @ point
    start = Quadratic(task.hessian, point)  # unrolled from where the training is
    (found,) = callback.history[0]["meta_gradient"]["learning_rate"]
    assert found == pytest.approx(step_size * float(start.meta_gradient(step_size, 3)), rel=1e-9)


def test_least_squares_runs_with_its_own_held_out_batches():
    task = LeastSquares.sample(tasks=1, dimension=8, samples=16, noise=0.5, seed=0, validation_fraction=0.5)
    callback = LearnToLearn(every_n_steps=5)
    fit(TaskModule(task, learning_rate=1e-4), callback, max_steps=30)
    assert callback.search_result is not None
    assert len(callback.history) >= 6
    assert all(math.isfinite(record["training_loss"]) for record in callback.history)


def test_an_epoch_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        TaskModule(Quadratic.random(2, seed=0), steps_per_epoch=0)
