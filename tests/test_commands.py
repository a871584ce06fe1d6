"""The command line: exit statuses, messages for people, and files where they were asked for."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_l2l import LearnedOptimizer
from lightning_l2l.__main__ import main
from lightning_l2l.commands import sanity
from lightning_l2l.commands.evaluate import train, tuned
from lightning_l2l.commands.meta_train import make_optimizer
from lightning_l2l.commands.sanity import Claim
from lightning_l2l.tasks import ImageClassification, RandomQuadratics


def test_sanity_holds_every_claim_and_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sanity"]) == 0
    lines = capsys.readouterr().out.splitlines()
    held = [line for line in lines if line.startswith("ok ")]
    assert len(held) == len(lines) - 2 >= 30  # a heading, the claims, a sum
    assert re.fullmatch(rf"{len(held)} claims hold, 0 fail, .* seconds", lines[-1])


@pytest.mark.parametrize(("found", "status"), [(2.0, 0), (2.1, 1), (float("nan"), 1)])
def test_a_claim_that_fails_is_the_exit_status(found: float, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanity.report(iter([Claim("three", 3.0, 3.0, 3.0), Claim("one and one", found, 2.0, 2.0)])) == status
    assert bool(re.search(r"^FAILED +one and one", capsys.readouterr().out, re.MULTILINE)) == bool(status)


def test_quadratic_finds_the_best_step_size_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["--dim", "5", "--steps", "20", "--unroll-steps", "5", "--updates", "40", "--figure", f"{tmp_path}/q.png"]
    assert main(["quadratic", *words]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "q.png").stat().st_size > 10_000
    for line in re.findall(r"^learned, .*$", printed, re.MULTILINE):
        assert float(line.split()[-2]) == pytest.approx(1.0, abs=0.01)  # over the best, which is known in closed form
    assert re.search(r"^LearnToLearn in a Trainer", printed, re.MULTILINE)
    differ = re.search(r"differ by (\S+) of the largest", printed)
    assert differ is not None and float(differ[1]) < 1e-9


def test_meta_train_writes_what_evaluate_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = "--optimizer small_fc --task quadratics --updates 2 --unroll-steps 20 --episode-steps 0 --compare-seeds 3"
    assert main(["meta-train", *words.split(), "--compare-steps", "20", "--output", str(tmp_path / "first")]) == 0
    written = {path.name for path in (tmp_path / "first").iterdir()}
    assert written == {"learned.safetensors", "comparison.csv", "comparison.png", "meta_loss.png"}
    assert "meta-trained in" in capsys.readouterr().out
    file = str(tmp_path / "first" / "learned.safetensors")
    assert LearnedOptimizer.load(file).tasks == "quadratics"
    words = "--task quadratics --steps 20 --seeds 3 --no-figure"
    assert main(["evaluate", "--learned", file, *words.split(), "--output", str(tmp_path / "again")]) == 0
    first, again = (
        list(csv.DictReader((tmp_path / folder / "comparison.csv").read_text().splitlines()))
        for folder in ("first", "again")
    )
    assert [row["optimizer"] for row in first] == ["adam", "sgd_momentum", "learned"]
    assert float(first[0]["speed_up"]) == 1.0
    for one, other in zip(first, again, strict=True):  # the same tasks, starts and batches
        assert one["mean_train_loss"] == other["mean_train_loss"]
    assert not (tmp_path / "again" / "comparison.png").exists()


def test_an_interrupted_meta_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    words = ["meta-train", "--task", "quadratics", "--optimizer", "mlp", "--updates", "53", "--unroll-steps", "2"]
    words += ["--episode-steps", "6", "--compare-seeds", "0", "--output", str(tmp_path)]
    file = tmp_path / "learned.safetensors"
    assert main([*words, "--no-figure"]) == 0
    # What a run that ends after 53 updates left behind is what one that was interrupted there would have.
    assert torch.load(tmp_path / "meta_training.ckpt", weights_only=True)["global_step"] == 50
    whole = LearnedOptimizer.load(file).state_dict()
    file.unlink()
    pytest.importorskip("matplotlib")
    assert main([*words, "--resume"]) == 0
    resumed = LearnedOptimizer.load(file).state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    assert (tmp_path / "meta_loss.png").stat().st_size > 10_000


def test_a_baseline_is_torch_optim_at_an_inner_point_of_the_grid() -> None:
    family = RandomQuadratics(dim=4)
    best = tuned("adam", family, 30, range(100, 104), range(4))
    assert best.learning_rate is not None and 1e-4 < best.learning_rate < 1
    by_hand = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        task = family.sample(generator)
        point = task.initial_parameters(generator)["point"].requires_grad_()
        optimizer = torch.optim.Adam([point], best.learning_rate)
        for _ in range(30):
            loss = task.loss({"point": point}, task.sample_batch("train", generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        by_hand.append(task.loss({"point": point}, task.sample_batch("test")).item())
    torch.testing.assert_close(best.test, torch.tensor(by_hand))


def test_a_run_that_diverges_is_counted_and_keeps_a_bad_loss() -> None:
    lost = train("sgd", lambda parameters: torch.optim.SGD(parameters, 1e3), RandomQuadratics(), 10, range(3))
    assert lost.diverged == 3 and lost.train.isfinite().all()
    torch.testing.assert_close(lost.train[:, -1], 11 * lost.train[:, 0])


def test_accuracy_is_reported_where_it_means_something() -> None:
    pytest.importorskip("sklearn")
    family = ImageClassification.digits(train_samples=100, val_samples=50)
    found = train("sgd", lambda parameters: torch.optim.SGD(parameters, 0.1), family, 100, range(1))
    assert found.test_accuracy.item() > 0.5
    quadratics = train("sgd", lambda parameters: torch.optim.SGD(parameters, 0.01), RandomQuadratics(), 2, range(1))
    assert quadratics.test_accuracy.isnan().all() and quadratics.test.isfinite().all()


@pytest.mark.parametrize("name", ["adam", "sgd", "small_fc", "mlp", "lstm"])
def test_an_optimizer_is_made_twice_alike_without_touching_the_global_numbers(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (make_optimizer(name, seed, multiplier=0.02) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(before)
    assert all(one.equal(two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
    differs = any(not one.equal(two) for one, two in zip(first.parameters(), other.parameters(), strict=True))
    assert differs == (name not in ("adam", "sgd"))  # those start from the same numbers, whatever the seed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage:"),
        (["sanitty"], "usage:"),
        (["sanity", "--fast"], "unrecognized"),
        (["meta-train", "--optimizer", "lion"], "invalid choice"),
        (["quadratic", "--steps", "0"], "at least 1"),
        (["quadratic", "--updates", "0"], "at least 1"),
        (["meta-train", "--task", "mnist"], "needs --mnist-folder"),
        (["meta-train", "--output", "nowhere", "--resume"], "no nowhere/meta_training.ckpt to resume from"),
    ],
)
def test_a_wrong_command_line_exits_with_two_and_the_reason(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quadratic", "meta-train"])
def test_a_figure_without_matplotlib_is_refused_before_the_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    options: dict[str, Any] = {"quadratic": ["--figure", "x.png"], "meta-train": ["--output", str(tmp_path / "new")]}
    with pytest.raises(SystemExit) as stopped:
        main([command, *options[command]])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and "matplotlib" in printed.err
    assert printed.out == "" and not (tmp_path / "new").exists()
