"""Nothing of ours is left: after a fit, after an exception anywhere, after Ctrl-C; and memory does not grow."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import ALONG, Plain, Rich, learner, loader, loaders, sgd

from lightning_l2l import LearnedStepSize, LearnToLearn
from lightning_l2l.host import applied as applied_module
from lightning_l2l.host.displacement import DisplacementSteps
from lightning_l2l.host.live import LiveSteps
from lightning_l2l.host.look_ahead import LookAhead
from lightning_l2l.host.session import Session
from lightning_l2l.host.source import MetaGradientSource

HOOKS = [name for name in vars(LearnToLearn) if name.startswith("on_")]
HOOKS = [name for name in HOOKS if name not in ("on_exception", "on_load_checkpoint")]


OURS = {"log", "log_dict", "lr_scheduler_step"}


class Boom(Exception):
    pass


def traces(fitted: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Everything that we might have left behind."""
    optimizer = fitted.optimizers[0] if fitted.optimizers else None
    return {
        "module": {name for child in module.modules() for name in OURS & set(vars(child))},
        "loggers": [type(logger).__name__ for logger in fitted.loggers],
        "callbacks": [type(callback).__name__ for callback in fitted.callbacks],
        "hooks": [] if optimizer is None else list(optimizer._optimizer_step_post_hooks),
        "groups": 1 if optimizer is None else len(optimizer.param_groups),
        "training": {child.training for child in module.modules()},
        "stance": torch._dynamo.eval_frame._stance.stance,
        "default dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "gradients": [n for n, p in module.named_parameters() if p.grad_fn is not None],
    }


CLEAN = {
    "module": set(), "loggers": [], "callbacks": ["LearnToLearn"], "hooks": [], "groups": 1, "training": {True},
    "stance": "default", "default dtype": torch.float32, "grad": True, "gradients": [],
}  # fmt: skip


def assert_clean(fitted: pl.Trainer, module: pl.LightningModule, callback: LearnToLearn) -> None:
    assert traces(fitted, module) == CLEAN
    assert callback._session is None


class Untidy(Rich):
    """Fails in the run, or in the unroll, at the n-th call."""

    def __init__(self, error: BaseException, where: str, at: int) -> None:
        super().__init__()
        self.error, self.where, self.at, self.hits = error, where, at, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        unrolled = "log" in vars(self)  # muted
        if unrolled is (self.where == "unroll"):
            Untidy.calls += 1
            if Untidy.calls == self.at:
                raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("estimator", [*ALONG, "reverse"])
def test_nothing_is_left_after_a_fit(trainer: Any, estimator: Any) -> None:
    callback, module = learner(learned=LearnedStepSize(per="tensor"), estimator=estimator), Rich()
    fitted = trainer(callback)
    fitted.fit(module, **loaders())
    assert_clean(fitted, module, callback)


@pytest.mark.parametrize("where", ["run", "unroll"])
@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.parametrize("estimator", [*ALONG, "forward"])
def test_nothing_is_left_after_an_exception_in_the_user_s_step(
    trainer: Any, where: str, at: int, estimator: Any
) -> None:
    Untidy.calls = 0
    callback, module = learner(estimator=estimator), Untidy(Boom(), where, at)
    fitted = trainer(callback)
    with pytest.raises(Boom):
        fitted.fit(module, **loaders())
    assert_clean(fitted, module, callback)


@pytest.mark.feature("Ctrl-C", "works", "everything that was installed is removed")
@pytest.mark.parametrize("where", ["run", "unroll"])
@pytest.mark.parametrize("estimator", [*ALONG, "forward"])
def test_nothing_is_left_after_ctrl_c(trainer: Any, where: str, estimator: Any) -> None:
    Untidy.calls = 0
    callback, module = learner(estimator=estimator), Untidy(KeyboardInterrupt(), where, 5)
    fitted = trainer(callback)
    with pytest.raises(SystemExit):
        fitted.fit(module, **loaders())
    assert_clean(fitted, module, callback)


@pytest.mark.parametrize("hook", ["setup", *HOOKS, "teardown"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("estimator", ALONG)
def test_nothing_is_left_after_an_exception_in_any_of_our_hooks(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, hook: str, when: str, estimator: Any
) -> None:
    original = getattr(LearnToLearn, hook)

    def fails(*arguments: Any, **options: Any) -> None:
        if when == "after":
            original(*arguments, **options)
        raise Boom

    monkeypatch.setattr(LearnToLearn, hook, fails)
    callback, module = learner(estimator=estimator), Rich()
    fitted = trainer(callback)
    with pytest.raises(Boom):
        fitted.fit(module, **loaders())
    assert_clean(fitted, module, callback)


STAGES = [
    (MetaGradientSource, "see_batch"), (MetaGradientSource, "rehearse"), (MetaGradientSource, "see_loss"),
    (MetaGradientSource, "before_step"), (MetaGradientSource, "after_step"), (Session, "finish_step"),
    (Session, "search"),
    (Session, "state_dict"),
    (LookAhead, "__init__"), (LookAhead, "held_out"), (LookAhead, "meta_gradient"),
    (DisplacementSteps, "before_batch"), (DisplacementSteps, "judge"), (DisplacementSteps, "_slope"),
    (DisplacementSteps, "after_step"), (DisplacementSteps, "result"), (DisplacementSteps, "state_dict"),
    (LiveSteps, "see_loss"), (LiveSteps, "judge"), (LiveSteps, "result"),
    (applied_module.AppliedValues, "split"), (applied_module.AppliedValues, "_write"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), STAGES, ids=[f"{owner.__name__}.{name}" for owner, name in STAGES])
def test_nothing_is_left_after_an_exception_inside(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    def fails(*_arguments: Any, **_options: Any) -> None:
        raise Boom

    monkeypatch.setattr(owner, name, fails)
    estimator = {LookAhead: "forward", LiveSteps: "live"}.get(owner, "displacement")
    callback, module = learner(learned=LearnedStepSize(per="tensor"), estimator=estimator), Rich()
    fitted = trainer(callback)
    with pytest.raises(Boom):
        fitted.fit(module, **loaders())
    assert_clean(fitted, module, callback)


def test_groups_are_whole_after_an_exception_between_our_hook_and_the_step(trainer: Any) -> None:
    class Fails(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert len(optimizer.param_groups) > 1  # one for each tensor
            raise Boom

    callback, module = learner(learned=LearnedStepSize(per="tensor")), Rich()
    fitted = trainer(callback, Fails())
    with pytest.raises(Boom):
        fitted.fit(module, **loaders())
    fitted.callbacks.pop()
    assert_clean(fitted, module, callback)


def test_the_session_and_the_batches_are_freed_after_the_fit(trainer: Any) -> None:
    callback = learner()
    sessions = []
    original = Session.__init__

    def noting(self: Session, *arguments: Any) -> None:
        original(self, *arguments)
        sessions.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", noting)
        trainer(callback).fit(Plain(), **loaders())
    gc.collect()
    assert len(sessions) == 1 and sessions[0]() is None


class Watches(pl.Callback):
    """Counts what is alive after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.found = steps, []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            gc.collect()
            alive = gc.get_objects()
            tensors = sum(issubclass(type(item), torch.Tensor) for item in alive)
            self.found.append((tensors, len(alive), tracemalloc.get_traced_memory()[0]))


def grown(trainer: Any, updates: int, **options: Any) -> list[int]:
    """Tensors, objects and traced bytes that came after the first fifth of the meta-updates and stayed."""
    steps = 2 if options.get("estimator") == "displacement" else 1
    watches, callback = Watches(updates // 5, updates), learner(every_n_steps=1, unroll_steps=steps, **options)
    fitted = trainer(callback, watches, max_epochs=-1, max_steps=updates)
    fitted.fit(Plain(sgd(0.01)), loader(shuffle=True), loader(24, seed=1))
    assert len(callback.history) == updates
    first, last = watches.found
    return [int(count) for count in np.subtract(last, first)]


@pytest.mark.parametrize("estimator", ["forward", "reverse", *ALONG])
def test_nothing_piles_up_over_50_meta_updates(trainer: Any, estimator: Any) -> None:
    tensors, objects, _ = grown(trainer, 50, estimator=estimator)
    # A record of the history is some ten containers for each of the 40 updates in between: the margin is twice that.
    assert tensors <= 2 and objects <= 20 * 40


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ALONG)
def test_memory_is_flat_over_1000_meta_updates(trainer: Any, estimator: Any) -> None:
    tracemalloc.start()
    try:
        tensors, _, memory = grown(trainer, 1000, estimator=estimator)
    finally:
        tracemalloc.stop()
    # A record of the history takes about 2 kB, and is what is meant to stay; 3 kB is the margin.
    assert tensors <= 2 and memory < 3000 * 800
