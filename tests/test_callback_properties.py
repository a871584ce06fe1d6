"""Every combination of our arguments and the Trainer's features trains, or is refused before the first step."""

from __future__ import annotations

import math
import tempfile
import warnings
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from conftest import QUIET
from helpers import ALONG, Plain, examples, loader
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn, optim

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, LearnToLearn
from lightning_l2l.exact.meta_gradient import Estimator
from lightning_l2l.exact.objectives import Objective

# How a refusal looks: the kinds of exception that we raise on purpose.
REFUSALS = (TypeError, ValueError, MisconfigurationException)

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam, fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "Adam, tensor rate": lambda p: optim.Adam(p, lr=torch.tensor(0.01)),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "zero rate": lambda p: optim.SGD(p, lr=0.0),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p),
    "LBFGS": lambda p: optim.LBFGS(p, max_iter=2),
}

LEARNED: dict[str, Any] = {
    "default": lambda: None,
    "group": lambda: LearnedStepSize(per="group"),
    "tensor": lambda: LearnedStepSize(per="tensor"),
    "optimizer": lambda: LearnedStepSize(per="optimizer"),
    "momentum": lambda: LearnedHyperparameters(("learning_rate", "momentum")),
    "betas": lambda: LearnedHyperparameters(("learning_rate", "beta1", "weight_decay")),
    "the class": lambda: LearnedStepSize,
}

META_DATA: dict[str, Any] = {
    "val": lambda: "val",
    "train": lambda: "train",
    "loader": lambda: loader(24, seed=2),
    "list": lambda: [tuple(examples(8, seed=3).tensors)],
    "nothing": lambda: [],
    "misspelt": lambda: "validation",
}


def sometimes(valid: Any, invalid: Any) -> Any:
    """Mostly valid values: with every argument often invalid, hardly a combination would train."""
    return st.integers(0, 24).flatmap(lambda draw: invalid if draw == 0 else valid)


ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "learned": sometimes(st.sampled_from([*LEARNED][:4]), st.sampled_from([*LEARNED][4:])),
        "unroll_steps": sometimes(st.none() | st.integers(1, 4), st.sampled_from([0, -1, 1.5])),
        "every_n_steps": sometimes(st.integers(1, 5), st.sampled_from([0, None])),
        "objective": sometimes(st.sampled_from(get_args(Objective)), st.just("logarithm")),
        "meta_data": sometimes(st.sampled_from([*META_DATA][:4]), st.sampled_from([*META_DATA][4:])),
        "estimator": sometimes(st.sampled_from([*get_args(Estimator), *ALONG]), st.just("backward")),
        "meta_learning_rate": sometimes(
            st.floats(0, 2, allow_subnormal=False), st.sampled_from([-1.0, math.nan, math.inf])
        ),
        "initial_search": sometimes(st.booleans(), st.just("yes")),
        "search_budget": sometimes(st.floats(0.01, 1.0), st.sampled_from([0.0, 2.0])),
        "seed": sometimes(st.integers(0, 2**32 - 1), st.just(-1)),
    },
)

PRECISIONS: dict[str, Any] = {
    "32-true": lambda: {"precision": "32-true"},
    "64-true": lambda: {"precision": "64-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "16-mixed": lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
}

FEATURES = st.fixed_dictionaries(
    {
        "precision": st.sampled_from([*PRECISIONS]),
        "accumulate_grad_batches": st.integers(1, 3),
        "gradient_clip_val": st.sampled_from([None, 0.0, 0.1, 10.0]),
        "gradient_clip_algorithm": st.sampled_from(["norm", "value"]),
        "limit_train_batches": st.integers(1, 5),
        "limit_val_batches": st.integers(0, 2),
        "max_epochs": st.integers(1, 2),
        "num_sanity_val_steps": st.integers(0, 1),
    }
)


class Steps(pl.Callback):
    """Whether the run has begun: the optimizer has stepped."""

    begun = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.begun = trainer.global_step > 0


def callback_of(arguments: dict[str, Any]) -> LearnToLearn:
    made = dict(arguments)
    for name, choices in (("learned", LEARNED), ("meta_data", META_DATA)):
        if name in made:
            made[name] = choices[made[name]]()
    return LearnToLearn(**made)


def normalising() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 3))


class Normalised(Plain):
    make_net = staticmethod(normalising)


# Deterministic: the same combinations on every machine. 200 take about 15 s on one core.
@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(ARGUMENTS, FEATURES, st.sampled_from([*OPTIMIZERS]), st.sampled_from([Plain, Normalised]))
@example({}, {"precision": "32-true", "limit_train_batches": 1, "max_epochs": 1}, "SGD", Plain)
def test_every_combination_trains_or_is_refused_before_the_first_step(
    arguments: dict[str, Any], features: dict[str, Any], optimizer: str, make: Any
) -> None:
    torch.manual_seed(0)
    steps, module = Steps(), make(OPTIMIZERS[optimizer])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    options = {**QUIET, **features, **PRECISIONS[features["precision"]]()}
    if "plugins" in options:
        del options["precision"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice, and our own notes on diverging and on short runs
        try:
            callback = callback_of(arguments)
            fitted = pl.Trainer(**options, default_root_dir=folder, callbacks=[callback, steps])
            fitted.fit(module, loader(40, shuffle=True), loader(24, seed=1))
        except REFUSALS as error:
            note(f"refused: {error}")
            assert not steps.begun
            after = {name: value.to(before[name].dtype) for name, value in module.state_dict().items()}
            # 16 bits of a weight are lost where the precision says so, with or without us.
            tolerance = 1e-2 if features["precision"] == "bf16-true" else 0
            for name, value in before.items():
                torch.testing.assert_close(after[name], value, rtol=tolerance, atol=0)
            assert len(str(error)) > 40  # says what to do
            return
    per_epoch = -(-features["limit_train_batches"] // features.get("accumulate_grad_batches", 1))
    assert fitted.global_step == per_epoch * features["max_epochs"]
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())
    every = arguments.get("every_n_steps", 20)
    assert len(callback.history) >= min(1, fitted.global_step // every)
    rates = [rate for record in callback.history for rate in record["learning_rates"]] + callback.learning_rates
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
