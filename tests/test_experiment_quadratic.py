"""The quadratic experiment end to end, small."""

from __future__ import annotations

import csv
import math

import pytest

from lightning_l2l.experiments.quadratic import run
from lightning_l2l.tasks import Quadratic

SMALL = {"dim": 5, "steps": 80, "initial_step_size": 0.5, "meta_steps": 12, "horizons": (80, 1, 10), "progress": False}


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tables_and_figures_are_written_and_say_the_same_as_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    report = run(tmp_path / "new" / "folder", seeds=(3, 4), kind="wide", **SMALL)
    assert sorted(path.name for path in report.files) == [
        "meta_gradient.csv", "meta_gradient.png", "optimal_step_size.csv", "optimal_step_size.png",
        "step_size.csv", "step_size.png",
    ]  # fmt: skip
    for path in report.files:
        assert path.exists() and path.stat().st_size > 100
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    folder = tmp_path / "new" / "folder"
    rows = read(folder / "step_size.csv")
    assert len(rows) == len(report.meta_steps)
    assert {(row["seed"], row["method"]) for row in rows} == {
        (seed, method) for seed in "34" for method in ("exact", "float32_backprop", "bisection")
    }
    for row, seen in zip(rows, report.meta_steps, strict=True):
        assert float(row["step_size"]) == seen.step_size and int(row["meta_step"]) == seen.meta_step
    optima = read(folder / "optimal_step_size.csv")
    assert [(row["seed"], row["steps"]) for row in optima] == [(s, t) for s in "34" for t in ("1", "10", "80")]
    task = Quadratic.random(5, seed=4, kind="wide")
    assert float(optima[-1]["optimal_step_size"]) == float(task.optimal_step_size(80))


def test_float32_backpropagation_is_frozen_where_the_exact_gradient_and_bisection_move(tmp_path):
    report = run(tmp_path, seeds=(0,), kind="wide", plots=False, **SMALL)
    visited = {
        method: [row for row in report.meta_steps if row.method == method]
        for method in ("exact", "float32_backprop", "bisection")
    }
    assert len(visited["exact"]) == len(visited["float32_backprop"]) == 13
    assert {row.step_size for row in visited["float32_backprop"]} == {0.5}
    assert len({row.step_size for row in visited["exact"]}) > 5
    optimum = report.optima[-1].optimal_step_size
    assert visited["bisection"][-1].step_size == pytest.approx(optimum, rel=1e-5)
    dead = [row for row in report.gradients if row.float32_backprop_status == "overflow"]
    assert dead and all(row.float32_backprop == 0 or math.isnan(row.float32_backprop) for row in dead)
    alive = [row for row in report.gradients if row.float32_backprop_status == "ok"]
    assert alive and all(row.float32_backprop == pytest.approx(row.log, rel=1e-4) for row in alive)
    # explodes exponentially against bounded
    assert report.gradients[-1].naive_log10 > 50 and abs(report.gradients[-1].log) < 100


@pytest.mark.parametrize("objective", ["naive", "naive_mean", "log_mean", "log_of_mean"])
def test_every_objective_runs_and_bisection_finds_its_optimum(tmp_path, objective):
    settings = {**SMALL, "steps": 20, "initial_step_size": 5.0, "meta_steps": 3, "horizons": (20,)}
    report = run(tmp_path, kind="condition", condition_number=5.0, plots=False, objective=objective, **settings)
    last = [row for row in report.meta_steps if row.method == "bisection"][-1].step_size
    task = Quadratic.random(5, seed=0, kind="condition", condition_number=5.0)
    below, above = (float(task.meta_gradient(last * factor, 20, objective)) for factor in (0.99, 1.01))
    assert below < 0 < above


def test_progress_goes_to_standard_error_only_when_asked_for(tmp_path, capsys):
    settings = {**SMALL, "meta_steps": 1, "horizons": (1,)}
    run(tmp_path, plots=False, **settings)
    assert capsys.readouterr() == ("", "")
    run(tmp_path, plots=False, **{**settings, "progress": True})
    seen = capsys.readouterr()
    assert seen.out == "" and "seed 0" in seen.err


def test_bad_settings_are_refused_before_anything_is_written(tmp_path):
    for setting, words in (
        ({"initial_step_size": 0.0}, "initial_step_size"), ({"seeds": ()}, "seeds"), ({"horizons": ()}, "horizons"),
        ({"dim": 0}, "dim"), ({"steps": 0}, "steps"), ({"objective": "mean"}, "objective"),
        ({"meta_steps": -1}, "meta_steps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(tmp_path / "none", **{**SMALL, "plots": False, **setting})
    assert not (tmp_path / "none").exists()
