"""The look-ahead is the run's own training: accumulation, clipping, precision."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import (
    ALONG,
    Plain,
    Recurrent,
    Rich,
    Witness,
    learner,
    loaders,
    observer,
    sgd,
)
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.exact.clip import clip_gradient_norm, clip_gradient_value
from lightning_l2l.functional import mirror, read_state
from lightning_l2l.host.look_ahead import LookAhead

# -- the oracle: the meta-gradient by hand, in plain PyTorch ----------------------------------------------------------


class Asks(Witness):
    """Before the look-ahead of a step, computes what it should give, from the live state and with plain functions."""

    def __init__(self, make_clip: Any = None) -> None:
        super().__init__()
        self.make_clip, self.expected = make_clip, []
        self.windows: list[list[Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.windows.append([])
        self.windows[-1].append([tensor.clone() for tensor in batch])

    def ask(self, trainer: Any, module: Any, judge: Any) -> None:
        optimizer, divisor = trainer.optimizers[0], trainer.accumulate_grad_batches

        def loss(parameters: Any, window: Any) -> Any:
            values = [
                functional.cross_entropy(functional.linear(x, parameters["net.weight"], parameters["net.bias"]), y)
                for x, y in window
            ]
            return sum(values) / (divisor if window is not judge else 1)

        self.expected.append(
            meta_gradient(
                loss,
                dict(module.named_parameters()),
                LearnedStepSize().attach(mirror(optimizer, module.named_parameters())),
                self.windows[-2:],
                judge,
                state=read_state(optimizer, module.named_parameters()),
                gradient_transformation=self.make_clip and self.make_clip(),
            )
        )


OPTIONS: dict[str, Any] = {
    "plain": ({}, None),
    "accumulated": ({"accumulate_grad_batches": 2}, None),
    "accumulated, short last window": ({"accumulate_grad_batches": 4}, None),
    "clipped by norm": ({"gradient_clip_val": 0.1}, lambda: clip_gradient_norm(0.1)),
    "clipped by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        lambda: clip_gradient_value(0.01),
    ),
}


@pytest.mark.feature("gradient accumulation", "works", "a look-ahead step is the whole window")
@pytest.mark.feature(
    "gradient clipping by norm and by value", "works", "part of the look-ahead, differentiable through the norm"
)
@pytest.mark.parametrize("case", OPTIONS)
def test_the_look_ahead_is_the_run_s_own_training(trainer: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    options, clip = OPTIONS[case]
    asks, original = Asks(clip), LookAhead.meta_gradient

    def asking(self: LookAhead, windows: Any, judge: Any) -> Any:
        if self._trainer.global_step > 0:  # not the rehearsal
            asks.ask(self._trainer, self._module, [tuple(batch) for batch, _ in judge.batches])
        return original(self, windows, judge)

    monkeypatch.setattr(LookAhead, "meta_gradient", asking)
    callback = observer(every_n_steps=2, estimator="forward")
    trainer(asks, callback, precision="64-true", **options).fit(Plain(sgd(0.1, momentum=0.9)), **loaders())
    assert len(callback.history) == len(asks.expected) >= 2
    for record, expected in zip(callback.history, asks.expected, strict=True):
        # The same numbers added up in another order, in float64.
        assert record["meta_objective"] == pytest.approx(expected.value, rel=1e-12)
        assert record["meta_gradient"]["learning_rate"] == pytest.approx(
            expected.gradients["learning_rate"].tolist(), rel=1e-9
        )
        assert record["meta_gradient"]["learning_rate"][0] != 0


@pytest.mark.feature("`GradientAccumulationScheduler`")
def test_an_accumulation_that_is_scheduled_is_followed(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], LookAhead.meta_gradient

    def noting(self: LookAhead, windows: Any, judge: Any) -> Any:
        seen.append([(len(window.batches), window.divisor) for window in windows])
        return original(self, windows, judge)

    monkeypatch.setattr(LookAhead, "meta_gradient", noting)
    callback = learner(every_n_steps=2, estimator="forward")
    trainer(GradientAccumulationScheduler({0: 1, 1: 4}), callback).fit(Plain(), **loaders())
    assert seen[1:] == [[(1, 1)] * 2] * 3 + [[(4, 4), (2, 4)]]  # 6 batches: the last window is short


# -- precision --------------------------------------------------------------------------------------------------------


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))


PRECISIONS: dict[str, Any] = {
    "32-true": lambda: {"precision": "32-true"},
    "64-true": lambda: {"precision": "64-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "16-mixed": lambda: {"plugins": [scaled()]},
}


@pytest.mark.feature(
    "precision `32-true`, `64-true`, `bf16-true`, `bf16-mixed`, `16-mixed`",
    "works",
    "the look-ahead runs in the run's precision",
)
@pytest.mark.parametrize("make", [Rich, Recurrent])
@pytest.mark.parametrize("estimator", ["forward", "reverse", *ALONG])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns_about_what_float64_learns(
    trainer: Any, precision: str, estimator: Any, make: Any
) -> None:
    def gradient(options: dict[str, Any]) -> float:
        callback = observer(estimator=estimator, every_n_steps=2)
        torch.manual_seed(1)
        trainer(callback, max_steps=2, **options).fit(make(sgd(0.1)), **loaders())
        return float(callback.history[0]["meta_gradient"]["learning_rate"][0])

    exact, found = gradient({"precision": "64-true"}), gradient(PRECISIONS[precision]())
    # bf16 has 8 bits: a few percent (0.1 to 4 were measured over many networks, 10 allows for bf16 weights).
    tolerance = {"64-true": 0.0, "32-true": 1e-4}.get(precision, 0.1)
    assert found == pytest.approx(exact, rel=tolerance) and exact != 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("estimator", ["forward", *ALONG])
def test_what_we_ask_runs_in_the_run_s_precision(trainer: Any, precision: str, estimator: Any) -> None:
    class Notes(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            context = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.get_default_dtype())
            notes["unroll" if "log" in vars(self) else "run"].add((*context, batch[0].dtype, self.net(batch[0]).dtype))
            return super().training_step(batch, batch_idx)

    notes: dict[str, set[Any]] = {"unroll": set(), "run": set()}
    trainer(learner(estimator=estimator), **PRECISIONS[precision]()).fit(Notes(), **loaders())
    assert notes["unroll"] == notes["run"] and len(notes["run"]) == 1


@pytest.mark.feature("steps that the gradient scaler skips")
@pytest.mark.parametrize("estimator", [*ALONG, "reverse"])
def test_a_step_that_the_scaler_skips_leaves_whole_groups(trainer: Any, estimator: Any) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**60))
    callback = learner(learned=LearnedStepSize(per="tensor"), estimator=estimator)
    fitted = trainer(callback, plugins=[plugin])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about schedulers, and overflow
        fitted.fit(Plain(), **loaders())
    assert len(fitted.optimizers[0].param_groups) == 1 and callback.history
