"""The examples that people copy from run in small: language model, vision model by YAML, pretrained transformer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lightning_l2l import LearnToLearn

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_quickstart_prints_a_table_and_writes_the_figure(capsys: pytest.CaptureFixture[str]) -> None:
    runs = load("quickstart").main(["--steps", "24"])
    careless, usual, learned, best = runs.values()
    assert careless.first_rate == careless.largest_rate == learned.first_rate == 1e-5
    assert learned.largest_rate > 1e-5
    assert best.test_loss <= usual.test_loss < careless.test_loss
    printed = capsys.readouterr().out
    assert all(name in printed for name in runs)
    assert Path("quickstart.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's own use of jsonargparse
def test_a_vision_model_takes_the_callback_from_yaml(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vision_cli.py"])  # LightningCLI warns of pytest's own arguments
    cli = load("vision_cli").main(
        [
            *("fit", "--config", str(EXAMPLES / "vision.yaml"), "--optimizer.lr", "0.01", "--model.width", "8"),
            *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "25", "--trainer.accelerator", "cpu"),
        ]
    )
    (learner,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, LearnToLearn))
    assert learner.history
    assert cli.trainer.optimizers[0].defaults["lr"] == 0.01
    assert "accuracy" in capsys.readouterr().out
    assert Path("vision_cli.png").stat().st_size > 10_000


def test_a_transformer_is_fine_tuned_with_a_rate_for_body_and_head(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("finetune_transformer")
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # as where MiniLM is not installed
    results = module.main(["--learning-rate", "1e-3", "--pieces", "20"])
    assert 0 < results["val_loss"] < 10
    printed = capsys.readouterr().out
    assert "body" in printed and "head" in printed and "held-out loss" in printed
