"""Every example runs, quickly, and does what its first lines say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "digits_task")
COPIED = {"quickstart", "finetune_transformer", "vision_cli"}  # run in small by test_programs_to_copy.py


@pytest.fixture(autouse=True)
def _at_home_in_the_folder_of_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As if each had been started from an empty folder: files land there, and one thread stays their own choice."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_quadratic_meta_gradients_are_those_of_the_closed_form(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = load("quadratic").main(["--quick"])
    assert [step for step, *_ in rows] == list(range(10, 41, 2))  # once there are ten steps to unroll
    for _, _, _, found, exact in rows:
        assert found == pytest.approx(exact, rel=1e-9)  # float64; ten steps of rounding
    rates = [rate for _, rate, *_ in rows]
    assert rates == sorted(rates) and rates[-1] > 3 * rates[0]  # a hundredth of the best one to start with
    assert "in closed form" in capsys.readouterr().out
    assert (tmp_path / "quadratic.png").stat().st_size > 10_000


def test_plain_pytorch_learns_without_lightning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = load("plain_pytorch").main(["--quick"])
    assert {rate for _, rate, _ in runs["constant"]} == {1e-4}
    assert max(rate for _, rate, _ in runs["learned"]) > 1e-3  # from a rate that is far too small
    assert runs["learned"][-1][2] < runs["constant"][-1][2]
    assert "held-out loss" in capsys.readouterr().out
    assert (tmp_path / "plain_pytorch.png").stat().st_size > 10_000


def test_fabric_learns_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    runs = load("fabric").main(["--quick"])
    assert {rate for rate, _ in runs["constant"]} == {1e-4}
    assert max(rate for rate, _ in runs["learned"]) > 1e-3
    assert runs["learned"][-1][1] < runs["constant"][-1][1]
    assert "held-out loss" in capsys.readouterr().out


def test_a_meta_trained_optimizer_is_saved_loaded_and_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from lightning_l2l import SmallFCOptimizer

    runs = load("meta_train_optimizer").main(["--quick"])
    assert all(len(losses) == 200 for losses in runs.values())
    untrained, trained = runs["SmallFC, not trained"], runs["SmallFC, meta-trained"]
    assert untrained != trained and untrained[0] == trained[0]  # the same weights to start from
    loaded = SmallFCOptimizer.load(tmp_path / "learned.safetensors")
    assert loaded.tasks == "digits, 64-32-10" and loaded.hidden_size == 8
    assert "mean training loss" in capsys.readouterr().out
    assert (tmp_path / "meta_train_optimizer.png").stat().st_size > 10_000


def test_per_group_learns_a_factor_for_each_group(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    body, head = load("per_group").main(["--quick"])
    assert body > 1e-4 and head > 1e-4 and body != head
    assert "one for both" in capsys.readouterr().out
    assert (tmp_path / "per_group.png").stat().st_size > 10_000


def test_momentum_and_decay_are_learned_and_stay_legal(tmp_path: Path) -> None:
    last = load("momentum_and_decay").main(["--quick"])
    assert last["momentum"] != 0.9 and 0 <= last["momentum"] < 1
    assert last["weight_decay"] != 1e-3 and last["weight_decay"] > 0
    assert (tmp_path / "momentum_and_decay.png").stat().st_size > 10_000


QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", str(EXAMPLES / "digits.yaml")], ("group", "auto")),
        (
            ["--config", str(EXAMPLES / "digits.yaml"), "--trainer.callbacks.init_args.meta_data=train"],
            ("group", "train"),
        ),
        (
            ["--trainer.callbacks=lightning_l2l.LearnToLearn", "--trainer.callbacks.meta_data=val"],
            ("optimizer", "val"),
        ),
    ],
    ids=["yaml", "yaml and an option", "options alone"],
)
def test_command_line_configures_the_callback(arguments: list[str], expected: tuple[str, str]) -> None:
    pytest.importorskip("jsonargparse")
    from lightning_l2l import LearnToLearn

    cli = load("digits_cli").main(["fit", *arguments, *QUIET, "--trainer.max_epochs=2", "--trainer.accelerator=cpu"])
    (callback,) = (found for found in cli.trainer.callbacks if isinstance(found, LearnToLearn))
    assert (callback.estimator.per, callback.meta_data) == expected
    assert callback.history
    assert Path("digits_cli.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in COPIED | {"digits_cli"}])
def test_example_runs_to_its_end_without_quick_too(name: str) -> None:
    load(name).main([])
    assert name == "fabric" or Path(f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_says_how_to_run_it(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in source.split('"""')[1]
