"""The command line: exit statuses, messages for people, and files where they were asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_l2l import __main__ as command_line
from lightning_l2l.experiments import sanity
from lightning_l2l.experiments._claim import Claim


def test_sanity_holds_every_claim_and_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["sanity"]) == 0
    lines = capsys.readouterr().out.splitlines()
    claims = [line for line in lines if line.startswith("ok ")]
    assert len(claims) == len(lines) - 2 >= 30  # a heading, the claims, a sum
    assert re.fullmatch(rf"{len(claims)} claims hold, 0 fail, .* seconds", lines[-1])


def test_sanity_exits_with_one_if_a_claim_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> Iterator[Claim]:
        yield Claim("a sum", 2.0, 3.0)
        yield Claim("a sum that is right", 3.0, 3.0)

    monkeypatch.setattr(sanity, "_GROUPS", (wrong,))
    assert command_line.main(["sanity"]) == 1
    assert re.search(r"^FAILED +a sum +2 +3$", capsys.readouterr().out, re.MULTILINE)


def test_claim_with_nan_fails() -> None:
    assert not Claim("nothing", float("nan"), 0.0, tolerance=1.0).holds
    assert not Claim("nothing", float("nan"), 0.0, up_to=1.0).holds


def test_sanity_needs_no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    monkeypatch.setattr(sanity, "_GROUPS", ())
    assert command_line.main(["sanity"]) == 0


def test_sanity_names_every_figure_that_its_experiments_drew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def draws(*names: str) -> Any:
        def run(folder: Path, **_options: Any) -> Any:
            folder.mkdir(parents=True)
            files = [folder / name for name in names]
            for file in files:
                file.touch()
            return SimpleNamespace(files=files) if "quadratic.csv" in names else files

        return run

    monkeypatch.setattr(sanity, "_GROUPS", ())
    monkeypatch.setattr("lightning_l2l.experiments.landscape.run", draws("landscape.png"))
    monkeypatch.setattr("lightning_l2l.experiments.quadratic.run", draws("one.png", "quadratic.csv"))
    monkeypatch.setattr("lightning_l2l.experiments.least_squares.run", draws("sweep.png", "sweep.csv"))
    assert command_line.main(["sanity", "--plots", str(tmp_path)]) == 0
    named = re.findall(r"^figure: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(named) == sorted(str(path) for path in tmp_path.rglob("*.png")) and len(named) == 4


def test_sanity_refuses_figures_without_matplotlib_before_any_claim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("lightning_l2l.plotting.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="need matplotlib"):
        sanity.run(plots=str(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_sanity_writes_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sanity, "_GROUPS", ())
    assert command_line.main(["sanity", "--plots", str(tmp_path)]) == 0
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert {"landscape/landscape.png", "quadratic/step_size.png", "least_squares/trajectories.png"} <= names
    assert "least_squares_by_samples/sweep.png" in names


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["quadratic"])
    assert stopped.value.code == 2
    assert 'pip install "lightning-l2l[cli,plots]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "files"),
    [
        ("landscape", ["--points=11", "--meta_steps=2", "--plots=false"], {"landscape.csv", "trajectory.csv"}),
        (
            "quadratic",
            ["--dim=3", "--steps=5", "--meta_steps=5", "--horizons=[1,2]", "--plots=false", "--progress=false"],
            {"step_size.csv", "optimal_step_size.csv", "meta_gradient.csv"},
        ),
        (
            "least-squares",
            ["--dimension=20", "--samples=10", "--tasks=5", "--tests=2", "--plots=false", "--progress=false"],
            {"summary.csv", "meta_objectives.csv", "trajectories.csv"},
        ),
    ],
)
def test_experiment_writes_its_tables(
    name: str, options: list[str], files: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    assert command_line.main([name, f"--output={tmp_path}", *options]) == 0
    assert {path.name for path in tmp_path.iterdir()} == files
    assert f"written to {tmp_path}" in capsys.readouterr().out


def test_experiment_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["least-squares", "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--samples" in printed and "Samples n of each task" in printed  # the docstrings are the help


def test_setting_that_makes_no_sense_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["landscape", f"--output={tmp_path}", "--points=1"])
    assert stopped.value.code == 2
    assert "points=1 must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["sanitty"], ["sanity", "--fast"], ["landscape", "--horizon=3"]])
def test_wrong_command_line_exits_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit) as stopped:
        command_line.main(words)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err
