"""The comparison with opponents runs, goes on where it was interrupted, and compares the same trainings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn")


@pytest.fixture
def opponents(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, which is no part of a package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    known = set(sys.modules)
    import opponents

    yield opponents
    for name in set(sys.modules) - known:  # names such as "digits" are the examples', too
        if "benchmarks" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def small(results: Path, *more: str) -> list[str]:
    return ["--results", str(results), "--tasks", "least squares", "--optimizers", "adamw", "--seeds", "1", *more]


@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_finished_runs_are_not_run_again_and_all_methods_are_in_the_table(
    opponents: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "runs.csv"
    arguments = small(results, "--epochs", "3", "--starts", "0.001", "--learn-to-learn", '{"every_n_steps": 10}')
    opponents.main([*arguments, "--methods", "constant", "Trainer"])
    rows = results.read_text().splitlines()
    assert len(rows) == 1 + 11 + 1
    opponents.main([*arguments, "--figure", str(tmp_path / "figure.png")])
    assert results.read_text().splitlines()[: len(rows)] == rows  # what was there is kept, and nothing is there twice
    assert len({row.rsplit(",", 4)[0] for row in results.read_text().splitlines()}) == len(
        results.read_text().splitlines()
    )
    printed = capsys.readouterr().out
    for method in (
        "best constant",
        "best cosine",
        "LearningRateFinder",
        "hypergradient",
        "MetaOptimize",
        "LearnToLearn",
    ):
        assert f"| AdamW | {method} |" in printed
    assert "Plain loop against Trainer: 1 pairs, differing by 0.0e+00 at most." in printed
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["least squares", "convnet"])
def test_the_plain_loop_of_the_opponents_is_the_fit_of_the_trainer(opponents: ModuleType, name: str) -> None:
    methods = sys.modules["opponents_methods"]
    run = methods.Run("constant", name, "sgd", 0.01, 0, 2)
    assert methods.plain(run).test_loss == pytest.approx(methods.fit(run).test_loss, rel=1e-6)


def test_the_three_parts_of_every_task_share_no_row(opponents: ModuleType) -> None:
    tasks = sys.modules["opponents_tasks"]
    for name in (*tasks.CHOSEN_ON, *tasks.CONFIRMED_ON):
        of = tasks.task(name)
        rows = [
            {(tuple(x.flatten().tolist()), tuple(y.flatten().tolist())) for x, y in part}
            for part in (of.train, of.held_out, of.test)
        ]
        # Of text and of digits a few rows are alike by chance, no more.
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert len(rows[one] & rows[other]) <= 0.01 * len(rows[other]), name


def test_a_run_at_chance_level_counts_as_lost(opponents: ModuleType) -> None:
    report, methods = sys.modules["opponents_report"], sys.modules["opponents_methods"]
    run = methods.Run("constant", "digits MLP", "sgd", 0.01, 0, 2)
    for loss, expected in ((0.1, False), (2.29, True), (float("nan"), True), (float("inf"), True)):
        assert report.lost(run, methods.Outcome(loss, 1, 1, 1)) is expected
