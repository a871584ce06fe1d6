"""The names of optimizers and tasks on the command line, the landscape's figure, and the exit status of the claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lightning_l2l.experiments import landscape, sanity
from lightning_l2l.experiments._choices import OptimizerName, make_family, make_optimizer
from lightning_l2l.experiments._claim import Claim
from lightning_l2l.tasks import ImageClassification


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_every_optimizer_can_be_made_twice_alike_without_touching_the_global_numbers(name: Any) -> None:
    before = torch.get_rng_state()
    first, again, other = (make_optimizer(name, True, 0.02, seed) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(before)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(one.equal(two) for one, two in pairs)
    differs = any(not one.equal(two) for one, two in zip(first.parameters(), other.parameters(), strict=True))
    assert differs == (name not in ("adam", "sgd"))  # those start from the same numbers, whatever the seed
    if name not in ("adam", "sgd"):
        assert first.configuration()["step_multiplier"] == 0.02
        assert make_optimizer(name, True, None, 0).configuration()["step_multiplier"] == 0.01


def test_the_rate_of_a_learned_hyperparameter_starts_far_too_small() -> None:
    (adam,), (sgd,) = (make_optimizer(name, True, None, 0).values() for name in ("adam", "sgd"))
    assert adam["lr"] == 1e-4 and sgd["lr"] == 1e-3


def test_few_training_samples_are_drawn_anew_for_each_task() -> None:
    pytest.importorskip("sklearn")
    few, all_of_them = (make_family("digits", None, samples, 0.0) for samples in (50, None))
    assert isinstance(few, ImageClassification) and isinstance(all_of_them, ImageClassification)
    assert (few.train_samples, few.val_samples, few.resample) == (50, 50, True)
    assert (all_of_them.train_samples, all_of_them.val_samples, all_of_them.resample) == (1200, 297, False)


def test_mnist_without_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="needs mnist_folder"):
        make_family("mnist", None, None, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizons": ()}, "at least one number of steps"),
        ({"horizons": (0, 5)}, "at least one number of steps"),
        ({"points": 1}, "points=1"),
        ({"meta_steps": 0}, "meta_steps=0"),
        ({"initial_step_size": math.inf}, "positive and finite"),
        ({"initial_step_size": -1.0}, "positive and finite"),
    ],
)
def test_impossible_landscapes_are_refused_before_any_file(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landscape.run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_landscape_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = landscape.run(tmp_path, points=11, meta_steps=2)
    assert [path.name for path in files] == ["landscape.csv", "trajectory.csv", "landscape.png"]
    assert files[-1].stat().st_size > 10_000


@pytest.mark.parametrize("found", [2.0, 2.1, math.nan])
def test_a_claim_that_fails_is_the_exit_status(
    found: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def group() -> Iterator[Claim]:
        yield Claim("one and one", found, 2.0, tolerance=1e-9)

    monkeypatch.setattr(sanity, "_GROUPS", (group,))
    assert sanity.run() == (found != 2.0)
    assert ("FAILED" in capsys.readouterr().out) == (found != 2.0)


def test_figures_of_the_claims_are_refused_without_matplotlib_before_any_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_l2l.plotting.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="matplotlib"):
        sanity.run(plots=str(tmp_path))
    assert capsys.readouterr().out == ""
