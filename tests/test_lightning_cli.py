"""LightningCLI configures the callback and its estimator in a YAML file or on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Plain, loader

pytest.importorskip("jsonargparse")
import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from lightning_l2l import Displacement, LearnToLearn

YAML = """
trainer:
  callbacks:
    - class_path: lightning_l2l.LearnToLearn
      init_args:
        estimator:
          class_path: lightning_l2l.Displacement
          init_args: {per: group, final_decay: false}
        every_n_steps: 3
        meta_data: val
"""


class Model(Plain):
    def __init__(self, rate: float = 0.1) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=rate))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(24, seed=1)


QUIET = {
    "logger": "false", "enable_checkpointing": "false", "enable_progress_bar": "false", "accelerator": "cpu",
    "enable_model_summary": "false", "max_epochs": "2",
}  # fmt: skip
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a file": (["--config=x.yaml"], {"every_n_steps": 3, "estimator": Displacement(per="group", final_decay=False)}),
    "a file and an option": (
        ["--config=x.yaml", "--trainer.callbacks.init_args.every_n_steps=5"],
        {"every_n_steps": 5, "meta_data": "val"},
    ),
    "options alone": (
        [
            "--trainer.callbacks=lightning_l2l.LearnToLearn",
            "--trainer.callbacks.meta_learning_rate=0.5",
            "--trainer.callbacks.average_weights=true",
        ],
        {"meta_learning_rate": 0.5, "estimator": Displacement(), "meta_data": "auto", "average_weights": True},
    ),
}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's own use of jsonargparse
@pytest.mark.feature("LightningCLI", "works", "estimators by class_path")
@pytest.mark.parametrize("case", CASES)
def test_the_command_line_configures_the_callback(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(YAML, encoding="utf-8")
    arguments, expected = CASES[case]
    options = [f"--trainer.{name}={value}" for name, value in QUIET.items()]
    cli = LightningCLI(
        Model, Data, args=["fit", *arguments, *options], save_config_callback=None, seed_everything_default=0
    )
    (callback,) = (found for found in cli.trainer.callbacks if isinstance(found, LearnToLearn))
    assert {name: getattr(callback, name) for name in expected} == expected and callback.history


@pytest.mark.parametrize("wrong", ["every_n_steps=often", "meta_data=test", "unroll_steps=5"])
def test_what_is_wrong_ends_before_the_fit(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--trainer.callbacks=lightning_l2l.LearnToLearn", f"--trainer.callbacks.{wrong}"]
    with pytest.raises((SystemExit, ValueError)):
        LightningCLI(Model, Data, args=arguments, save_config_callback=None, seed_everything_default=0)
    capsys.readouterr()
