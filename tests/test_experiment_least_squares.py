"""The least-squares experiment writes what it found."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lightning_l2l.experiments.least_squares import run

TINY: dict[str, Any] = {"dimension": 40, "samples": 20, "steps": 10, "tasks": 5, "tests": 2, "progress": False}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("sweep", "values"), [("none", None), ("samples", [20, 60]), ("noise", [0.5, 2.0]), ("steps", [5, 10])]
)
def test_files_and_returned_rows_agree(tmp_path: Path, sweep: Any, values: Any) -> None:
    pytest.importorskip("matplotlib")
    rows = run(tmp_path / "new" / "folder", **TINY, sweep=sweep, sweep_values=values)
    folder = tmp_path / "new" / "folder"
    count = 1 if values is None else len(values)
    assert len(rows) == count
    if values is not None:
        assert [getattr(row, sweep) for row in rows] == values
    summary = _rows(folder / "summary.csv")
    for row, written in zip(rows, summary, strict=True):
        for name, text in written.items():
            assert float(text) == getattr(row, name)
    curves = _rows(folder / "meta_objectives.csv")
    assert len(curves) == 25 * count
    first = curves[:25]
    best = min(first, key=lambda point: float(point["train_by_validation"]))
    assert float(best["step_size"]) == rows[0].step_size_validation
    assert first[-1]["truncated_train"] == str(TINY["tasks"])
    paths = _rows(folder / "trajectories.csv")
    assert len(paths) == 4 * sum(row.steps + 1 for row in rows)
    last = [path for path in paths if (path["tuned_on"], path["judged_on"]) == ("train", "test")][rows[0].steps]
    assert float(last["rmse_mean"]) == rows[0].test_rmse_train
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"trajectories.png", "meta_objectives.png"} | ({"sweep.png"} if sweep != "none" else set())
    assert all(path.stat().st_size > 10_000 for path in folder.glob("*.png"))


def test_same_seed_same_numbers_and_other_seed_others(tmp_path: Path) -> None:
    first, again, other = (run(tmp_path, **TINY, plots=False, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.test_rmse_train != other.test_rmse_train


def test_portions_cover_all_tasks_and_leave_the_test_tasks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, **TINY, plots=False)[0]
    monkeypatch.setattr("lightning_l2l.experiments._least_squares_comparison._PORTION", 2 * 20 * 40)
    portions = run(tmp_path, **TINY, plots=False)[0]
    counted = _rows(tmp_path / "meta_objectives.csv")[-1]["truncated_train"]
    assert counted == "5"  # 2 + 2 + 1, all of which diverge at the largest step size
    # The test tasks are drawn first: with the same step size they give the same numbers.
    assert portions.step_size_train == whole.step_size_train
    assert portions.test_rmse_train == whole.test_rmse_train


def test_no_pictures_without_plots(tmp_path: Path) -> None:
    run(tmp_path, **TINY, plots=False)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep": "colour"}, "sweep='colour'"),
        ({"sweep_values": [1.0]}, "sweep='none'"),
        ({"sweep": "steps", "sweep_values": [1.5]}, "positive integers"),
        ({"sweep": "noise", "sweep_values": []}, "must be positive"),
        ({"tests": 0}, "tests=0"),
        ({"tasks": 0}, "tasks=0"),
        ({"steps": 0}, "steps=0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"validation_fraction": 0.0}, "validation side empty"),
        ({"smallest_step_size": 0.0}, "grid"),
        ({"grid_points": 1}, "grid"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{**TINY, **settings}, plots=False)


@pytest.mark.parametrize(
    "values", [[20, 24, 28, 32, 40], [100, 250, 500, 750, 1000, 1500, 2000, 4000], [4000, 3990, 3980], [50]]
)
def test_labels_of_a_sweep_do_not_overlap(values: list[float]) -> None:
    pytest.importorskip("matplotlib")
    from lightning_l2l.experiments._least_squares_figures import _figure, _logarithmic

    figure, axes = _figure(3)
    axis = axes[0, 0]
    axis.plot(values, values)
    _logarithmic(axis, values)
    figure.draw_without_rendering()
    labels = [label for label in axis.get_xticklabels(which="both") if label.get_text()]
    assert str(max(values)) in {label.get_text() for label in labels}
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
