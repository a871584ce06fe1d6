"""Other callbacks beside us: each does what it does without us, and we see what it did."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FEATURES, MemoryLogger, Plain, Rich, difference, learner, loader, loaders, observer, outcome, sgd
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_l2l import LearnToLearn

MAKERS: dict[str, Any] = {
    "early stopping": lambda: EarlyStopping("val_loss", patience=0, min_delta=9.0),
    "timer": lambda: Timer(timedelta(hours=1)),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=2),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
}


@pytest.mark.feature("`EarlyStopping`, `Timer`, `StochasticWeightAveraging`, `EMAWeightAveraging`, before or after us")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("first", [True, False], ids=["neighbour first", "neighbour last"])
def test_neighbours_do_what_they_do_without_us(trainer: Any, name: str, first: bool) -> None:
    def run(*ours: LearnToLearn) -> Any:
        torch.manual_seed(0)
        module, neighbour = Plain(sgd(0.1, momentum=0.9)), MAKERS[name]()
        callbacks = [neighbour, *ours] if first else [*ours, neighbour]
        fitted = trainer(*callbacks, max_epochs=4, logger=MemoryLogger())
        fitted.fit(module, **loaders())
        found = outcome(fitted, module)
        found.pop("python"), found.pop("numpy")
        return found

    watching, learning = observer(), learner()
    assert difference(run(), run(watching)) == "" and watching.history
    run(learning)
    assert learning.history and len({r["learning_rates"][0] for r in learning.history}) == len(learning.history)


def test_early_stopping_stops(trainer: Any) -> None:
    fitted = trainer(learner(), EarlyStopping("val_loss", patience=0, min_delta=9.0), max_epochs=9)
    fitted.fit(Plain(), **loaders())
    assert fitted.current_epoch == 2


@pytest.mark.feature("`ModelCheckpoint`", "works", "may monitor what we log")
def test_a_monitor_may_watch_our_values_and_checkpoints_have_our_state(trainer: Any, tmp_path: Path) -> None:
    callback = learner()
    best = ModelCheckpoint(tmp_path, monitor="l2l/meta_objective", save_top_k=1, save_last=True)
    fitted = trainer(best, callback, enable_checkpointing=True, max_epochs=3)
    fitted.fit(Plain(), **loaders())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert difference(checkpoint["callbacks"]["LearnToLearn"]["history"], callback.history) == ""
    assert math.isfinite(best.best_model_score)


def test_averaged_weights_are_not_what_is_looked_ahead_from(trainer: Any) -> None:
    """EMA swaps weights during validation only, and we look ahead in training only: the run is the one without EMA."""
    found = []
    for neighbours in ([], [EMAWeightAveraging(decay=0.9)]):
        torch.manual_seed(0)
        callback = learner()
        trainer(callback, *neighbours, max_epochs=3).fit(Plain(), loader(), loader(24, seed=1))
        found.append(callback.history)
    assert difference(*found) == "" and len(found[0]) == 6


@pytest.mark.feature("`LearningRateFinder`", "works", "its rate is the schedule")
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("search", [False, True])
def test_learning_rate_finder_comes_first_and_its_rate_is_the_schedule(trainer: Any, search: bool) -> None:
    class Tunable(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 1e-5

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    callback, module = learner(initial_search=search), Tunable()
    finder = LearningRateFinder(min_lr=1e-3, max_lr=1.0, num_training_steps=20)
    fitted = trainer(callback, finder, max_epochs=3)
    fitted.fit(module, DataLoader(loader(160).dataset, 8), loader(24, seed=1))
    assert module.lr != 1e-5 and len(callback.history) == 20
    if not search:
        (scheduled,) = [values["lr"] for values in callback.state_dict()["applied"]["scheduled"]]
        assert scheduled == module.lr


@pytest.mark.feature("`BatchSizeFinder`")
@pytest.mark.filterwarnings("ignore:.*")
def test_batch_size_finder_comes_first_and_its_batches_are_remembered(trainer: Any) -> None:
    class Sized(Plain):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return DataLoader(loader(64).dataset, self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(24, seed=1)

    # Looking ahead, since the live estimator keeps no batches.
    callback, module = learner(estimator="forward"), Sized()
    trainer(callback, BatchSizeFinder(max_trials=2, steps_per_trial=1)).fit(module)
    assert module.batch_size == 4 and len(callback.history) == 10
    ((batch, _),) = callback.state_dict()["source"]["windows"][0]["windows"][0]["batches"]
    assert batch[0].shape == (4, FEATURES)


@pytest.mark.feature("`TQDMProgressBar`, `RichProgressBar`", "works", "show the rate")
@pytest.mark.filterwarnings("ignore:.*unclosed.*")
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_the_rate_is_in_the_progress_bar(trainer: Any, bar: Any) -> None:
    fitted = trainer(learner(), bar(), enable_progress_bar=True, max_epochs=1)
    fitted.fit(Plain(), **loaders())
    shown, logged = fitted.progress_bar_metrics["l2l/learning_rate"], fitted.callback_metrics["l2l/learning_rate"]
    assert shown == pytest.approx(logged.item())


@pytest.mark.feature("`CSVLogger`, `TensorBoardLogger`")
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_loggers_get_our_values(trainer: Any, tmp_path: Path, kind: Any) -> None:
    logger = kind(tmp_path)
    trainer(learner(), logger=logger).fit(Rich(), **loaders())
    assert any(Path(logger.log_dir).iterdir())
    if kind is CSVLogger:
        header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"l2l/learning_rate", "l2l/meta_objective", "l2l/meta_gradient"} <= set(header)


OURS = {"l2l/learning_rate", "l2l/meta_objective", "l2l/meta_gradient"}


@pytest.mark.feature("`MLFlowLogger`")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_our_values(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.chdir(tmp_path)
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}", artifact_location=str(tmp_path / "files"))
    callback = learner()
    trainer(callback, logger=logger).fit(Plain(), **loaders())
    assert set(logger.experiment.get_run(logger.run_id).data.metrics) >= OURS
    rates = [entry.value for entry in logger.experiment.get_metric_history(logger.run_id, "l2l/learning_rate")]
    # The rate that a step was taken with: that of a meta-update shows from the next step on.
    assert len(rates) == 12 and rates[3] == pytest.approx(callback.history[0]["learning_rates"][0])


@pytest.mark.feature("`WandbLogger`, offline")
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_gets_our_values_offline(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer(learner(), logger=logger).fit(Plain(), **loaders())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert set(summary) >= OURS


@pytest.mark.feature("`validate`, `test`, `predict`, before and after `fit`", "works", "left alone")
def test_validate_test_and_predict_are_left_alone(trainer: Any) -> None:
    class Complete(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    module, callback = Complete(), learner()
    fitted = trainer(callback)
    for _ in range(2):
        fitted.validate(module, loader(), verbose=False)
        fitted.test(module, loader(), verbose=False)
        assert len(fitted.predict(module, loader())) == 6
        fitted.fit(module, **loaders())
    assert len(callback.history) == 4


@pytest.mark.feature("the `pytorch_lightning` namespace")
@pytest.mark.filterwarnings("ignore:.*")
def test_the_other_namespace_works_as_well(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.net = Plain().net

        loss, training_step, validation_step = Plain.loss, Plain.training_step, Plain.validation_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 2, "default_root_dir": tmp_path,
    }  # fmt: skip

    def fit(*callbacks: Any, module: Any = None) -> Any:
        torch.manual_seed(0)
        module = module or Other()
        fitted = other.Trainer(**options, callbacks=list(callbacks))
        fitted.fit(module, **loaders())
        return {name: value.clone() for name, value in module.state_dict().items()}, dict(fitted.callback_metrics)

    watching, learning = observer(), learner(initial_search=True)
    alone, watched = fit(), fit(watching)
    assert difference(alone[0], watched[0]) == ""
    assert difference(alone[1], {k: v for k, v in watched[1].items() if not k.startswith("l2l/")}) == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_l2l.host.look_ahead.search_steps", lambda budget: 3)
        fit(learning)
    assert learning.search_result is not None and len(learning.history) == len(watching.history) == 4

    class Clips(Other):
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            pass

    with pytest.raises(Exception, match="configure_gradient_clipping of your own"):
        fit(learner(), module=Clips())


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("shown", [True, False])
def test_the_initial_search_has_a_progress_bar_where_the_trainer_has_one(
    trainer: Any, capsys: Any, shown: bool
) -> None:
    callback = LearnToLearn()
    trainer(callback, enable_progress_bar=shown, max_epochs=1).fit(Plain(), **loaders())
    written = capsys.readouterr().err
    assert ("initial search" in written) is shown and callback.search_result is not None
