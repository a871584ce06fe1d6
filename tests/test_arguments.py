"""What is given is checked where it is given, what is refused says why and what to do, what is shown is plain."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import Plain, examples, learner, loader, loaders, sgd, steady_loaders
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_l2l import Displacement, LearnToLearn

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"estimator": "displacement"}, TypeError, "an estimator is an object"),
    ({"estimator": Displacement}, TypeError, "an estimator is an object"),
    ({"every_n_steps": 0}, ValueError, "at least 1"),
    ({"every_n_steps": 2.5}, TypeError, "whole number"),
    ({"every_n_steps": True}, TypeError, "whole number"),
    ({"meta_data": "test"}, ValueError, r"choose one of \['auto', 'val', 'train'\]"),
    ({"meta_data": examples()}, TypeError, r"Wrap it: DataLoader\(dataset"),
    ({"meta_data": 5}, TypeError, "loader of batches"),
    ({"held_out_loss": 1.0}, TypeError, "function of the module and a batch"),
    ({"held_out_loss": print, "meta_data": "train"}, ValueError, "contradict each other"),
    ({"meta_learning_rate": -1}, ValueError, "not negative"),
    ({"meta_learning_rate": math.nan}, ValueError, "finite"),
    ({"meta_learning_rate": math.inf}, ValueError, "finite"),
    ({"meta_learning_rate": "fast"}, TypeError, "number"),
    ({"seed": "a"}, TypeError, "whole number"),
    ({"initial_search": "yes"}, TypeError, "True or False"),
    ({"divergence_guard": None}, TypeError, "True or False"),
    ({"average_weights": 0.999}, TypeError, "True or False"),
]


@pytest.mark.parametrize(("options", "kind", "words"), WRONG, ids=[str(options)[:40] for options, _, _ in WRONG])
def test_every_argument_is_checked_where_it_is_given(options: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        LearnToLearn(**options)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"planned_steps": 0}, ValueError, "at least one. Leave it out"),
        ({"planned_steps": math.nan}, ValueError, "at least one"),
        ({"planned_steps": "all"}, TypeError, "must be a number"),
        ({"every_n_steps": 0}, ValueError, "at least 1"),
        ({"every_n_steps": -1}, ValueError, "at least 1"),
        ({"every_n_steps": 2.5}, TypeError, "whole number"),
        ({"meta_learning_rate": -1}, ValueError, "not negative"),
        ({"modules": nn.Linear(1, 1)}, TypeError, r"modules=\[module\]"),
    ],
    ids=str,
)
def test_every_argument_of_a_tuner_is_checked_where_it_is_given(options: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        Displacement().attach(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_a_loss_of_several_numbers_is_refused_with_what_to_pass() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    tuner = Displacement().attach(optimizer)
    losses = weight.square()
    losses.mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"given 3 numbers, of shape \(3,\).*loss.mean\(\)"):
        tuner.step(losses)


def test_options_have_names_and_unknown_ones_are_errors() -> None:
    with pytest.raises(TypeError):
        LearnToLearn(Displacement(), 5)  # type: ignore[misc]
    with pytest.raises(TypeError):
        LearnToLearn(unroll_steps=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"choose one of \['optimizer', 'group'\]"):
        Displacement(per="tensor")  # type: ignore[arg-type]


def test_an_optimizer_is_needed(trainer: Any) -> None:
    class Nothing(Plain):
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(MisconfigurationException, match="no optimizer"), pytest.warns(UserWarning):
        trainer(learner()).fit(Nothing(), **loaders())


def test_two_callbacks_in_one_trainer_are_refused(trainer: Any) -> None:
    class Own(LearnToLearn):
        """A subclass."""

    with pytest.raises(MisconfigurationException, match=r"2 LearnToLearn callbacks.*LearnToLearn, Own"):
        trainer(learner(), Own()).fit(Plain(), **loaders())
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(learner(), learner())


@pytest.mark.feature("DeepSpeed", "refused", "its engine keeps gradients and steps to itself")
def test_deepspeed_is_refused_by_its_name(trainer: Any) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(MisconfigurationException, match="cannot be used with DeepSpeed.*strategy='ddp'"):
        trainer(learner(), strategy=DeepSpeedStrategy("cpu")).fit(Plain(), **loaders())


def test_a_group_without_a_learning_rate_is_refused(trainer: Any) -> None:
    class NoRate(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> Any:
            return None if closure is None else closure()

    with pytest.raises(ValueError, match="NoRate has no learning rate 'lr'"):
        trainer(learner()).fit(Plain(NoRate), **loaders())


# -- what is shown ----------------------------------------------------------------------------------------------------


def plain_only(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain_only(item) for key, item in value.items())
    if isinstance(value, list):
        return all(plain_only(item) for item in value)
    return type(value) in (bool, int, float, str)


def test_records_are_plain_and_complete(trainer: Any) -> None:
    callback = learner(meta_data="val")
    trainer(callback).fit(Plain(), **loaders())
    keys = {"step", "learning_rates", "base_rates", "training_loss", "held_out_loss", "cosine", "cosine_error"}
    for record in callback.history:
        assert record.keys() == keys | {"held_out_cosine", "diagnostics"} and plain_only(record)
        assert record["diagnostics"] == {"trouble": "", "note": "", "estimator": "displacement"}
        assert all(-1 <= cosine <= 1 for cosine in record["cosine"] + record["held_out_cosine"])
    assert {3, 6, 9, 12} <= {record["step"] for record in callback.history}
    assert callback.learning_rates == callback.history[-1]["learning_rates"]


def test_several_optimizers_have_records_with_their_number(trainer: Any) -> None:
    class Players(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def make_net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=1e-5) for layer in self.net]

    callback = learner(initial_search=True)
    trainer(callback).fit(Players(), **steady_loaders())
    assert {record["optimizer"] for record in callback.history} == {0, 1} and len(callback.learning_rates) == 2
    assert callback.export_schedule(1).values[-1][0] > 1e-5


def test_one_line_at_the_end_says_what_was_learned(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback = learner(estimator=Displacement(final_decay=False), initial_search=True)
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer(callback, max_epochs=12).fit(Plain(sgd(1e-6)), **steady_loaders())
    (line,) = [r.getMessage() for r in caplog.records if "your learning rate was multiplied by" in r.getMessage()]
    factor = float(line.split("multiplied by ")[1].split()[0])
    assert factor == pytest.approx(callback.learning_rates[0] / 1e-6, rel=0.01) and factor > 10
    assert caplog.text.count("hardly moved the weights: it was multiplied by") == 1


def test_short_fits_and_fits_without_steps(trainer: Any) -> None:
    callback = LearnToLearn()
    trainer(callback, max_epochs=0).fit(Plain(), **loaders())
    assert callback.history == [] and callback.learning_rates == []
    trainer(callback, fast_dev_run=True).fit(Plain(), **loaders())
    assert callback.learning_rates == [0.1]
    trainer(callback, max_epochs=2).fit(Plain(), **loaders())  # twelve steps
    assert callback.history and callback.history[0]["step"] <= 10


@pytest.mark.parametrize("options", [{"max_epochs": -1, "max_steps": 20}, {"max_epochs": None, "max_steps": 20}])
def test_runs_whose_length_is_given_in_steps_or_unknown(trainer: Any, options: Any) -> None:
    callback = LearnToLearn()
    trainer(callback, **options).fit(Plain(), **loaders())
    assert callback.history

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 20

    unknown = LearnToLearn()
    trainer(unknown, Stops(), max_epochs=-1).fit(Plain(), **loaders())
    assert [record["step"] for record in unknown.history] == [10, 12, 14, 17]


def test_a_barebones_trainer(trainer: Any) -> None:
    callback = learner()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    options = {**quiet, "num_sanity_val_steps": None, "log_every_n_steps": None}

    class Silent(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer(callback, barebones=True, **options).fit(Silent(), loader(), loader(24, 1))
    assert callback.history
