"""Particles over processes, with threads in their place: each trains its share, together those of a single one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from test_processes import data, learned, loss, parameters, part, simulated
from torch import Tensor

from lightning_l2l import meta_gradient
from lightning_l2l.exact.estimators import Particles, over_processes
from lightning_l2l.exact.processes import ElsewhereError, Processes, StepSkippedError
from lightning_l2l.exact.tally import NegativeLossError
from lightning_l2l.exact.windows import Episode, Name, WindowEstimator

NAMES = [name for name in get_args(Name) if name != "auto"]


def ask(processes: Processes | None, given: Any = loss, estimator: Any = "es", count: int = 8, **options: Any) -> Any:
    """A meta-gradient by particles, from this process's part of the batches."""
    batches = [batch if processes is None else part(batch, processes) for batch in data(5, 1)]
    particles = Particles(count, seed=3, batching=options.pop("batching", "auto"))
    return meta_gradient(
        given, parameters(), learned(), batches[1:], batches[0],
        estimator=estimator, particles=particles, processes=processes, **options,
    )  # fmt: skip


def notes(result: Any) -> str:
    assert not isinstance(result, Exception), result
    return " / ".join(result.diagnostics.notes)


def same(found: Any, expected: Any) -> None:
    """Equal but for the order of additions, in double precision."""
    assert found.value == pytest.approx(expected.value, rel=1e-11)
    torch.testing.assert_close(dict(found.gradients), dict(expected.gradients), rtol=1e-9, atol=0)
    errors = dict(found.diagnostics.standard_error), dict(expected.diagnostics.standard_error)
    torch.testing.assert_close(*errors, rtol=1e-8, atol=0)


@pytest.mark.parametrize("estimator", ["es", "mixed"])
def test_each_process_trains_its_share_on_all_batches(estimator: str) -> None:
    def count(processes: Processes | None) -> tuple[int, Any]:
        calls = []

        def counted(params: Any, batch: Tensor) -> Tensor:
            calls.append(batch)
            return loss(params, batch)

        return 0, (ask(processes, counted, estimator, batching="loop"), len(calls))

    expected, of_one = count(None)[1]
    assert of_one == (8 + 1) * 5  # 8 particles and the unperturbed one; 4 steps and the meta-batch
    for _, (found, calls) in simulated(2, count):
        # Each on two parts of a batch; and 1 + 2 losses to see whether that is allowed.
        assert calls == (4 + 1) * 5 * 2 + 3
        assert "8 particles over 2 processes" in notes(found)
        same(found, expected)


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_spreading_changes_no_number(monkeypatch: pytest.MonkeyPatch, batching: str) -> None:
    """Buffers are those of process 0 in both ways: what its batches write goes on."""

    def averaging(params: Any, batch: Tensor) -> Tensor:
        params["average"].mul_(0.5).add_(batch.mean())
        return loss(params, batch + params["average"])

    def compute(processes: Processes) -> Any:
        buffers = {"average": torch.full((), 1.0 + processes.rank, dtype=torch.float64)}
        found = ask(processes, averaging, buffers=buffers, batching=batching)
        assert buffers["average"] == 1.0 + processes.rank
        return found

    spread = simulated(2, compute)
    monkeypatch.setattr(over_processes, "_is_the_same_everywhere", lambda *_: False)
    alike = simulated(2, compute)
    for found, expected in zip(spread, alike, strict=True):
        assert "over 2 processes" in notes(found) and "every particle on every process" in notes(expected)
        same(found, expected)
    assert spread[0].gradients["learning_rate"] == spread[1].gradients["learning_rate"]


def talking(processes: Processes) -> Any:
    """A loss with the outputs of all processes in it, as contrastive ones have."""

    def joined(params: Any, batch: Tensor) -> Tensor:
        own = (batch[:, :-1] @ params["first"]).mean(0)
        mean = processes.shared(lambda: [own], [torch.zeros(3, dtype=torch.float64)])[0]
        assert mean is not None
        return loss(params, batch) + mean.square().sum()

    return joined


def differing(processes: Processes) -> Any:
    """Another loss on each process."""
    return lambda params, batch: loss(params, batch) * (1 + processes.rank)


@pytest.mark.parametrize("make", [talking, differing])
def test_a_loss_that_means_the_process_it_runs_on_is_found_out(make: Any) -> None:
    def compute(processes: Processes) -> Any:
        return ask(processes, make(processes), batching="loop")

    for found in simulated(2, compute):
        assert "every particle on every process: its loss is not the same function" in notes(found)
    if make is differing:
        expected = ask(None, lambda params, batch: (loss(params, batch[:6]) + 2 * loss(params, batch[6:])) / 2)
        same(found, expected)
    refusals = simulated(2, lambda processes: ask(processes, make(processes), "mixed"))
    assert all(isinstance(found, ValueError) and "Use 'reverse' or 'es'" in str(found) for found in refusals)


@dataclass(frozen=True)
class Packed:
    """A batch that is neither a tensor nor a container that is known everywhere."""

    rows: Tensor
    names: tuple[str, ...] = ("a", "b")


class Opaque:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


@pytest.mark.parametrize(("kind", "sent"), [(Packed, True), (Opaque, False)])
def test_batches_that_cannot_be_sent_stay_where_they_are(kind: Any, sent: bool) -> None:
    def compute(processes: Processes | None) -> Any:
        batches = [kind(batch if processes is None else part(batch, processes)) for batch in data(5, 1)]
        return meta_gradient(
            lambda params, batch: loss(params, batch.rows), parameters(), learned(), batches[1:], batches[0],
            estimator="es", particles=Particles(8, seed=3), processes=processes,
        )  # fmt: skip

    expected = compute(None)
    for found in simulated(2, compute):
        assert ("over 2 processes" in notes(found)) == sent
        assert ("a batch contains a Opaque" in notes(found)) != sent
        same(found, expected)


def test_what_is_sent_is_the_batch_and_not_the_storage_behind_it() -> None:
    rows = torch.zeros(1000, 4)
    sent = over_processes._sent({"rows": rows[:2], "more": (rows[2:3], None, "text", 7)})
    assert sent["rows"].untyped_storage().nbytes() == 2 * 4 * 4
    assert sent["more"][0].untyped_storage().nbytes() == 4 * 4 and sent["more"][1:] == (None, "text", 7)


def test_buffers_of_their_own_keep_particles_on_every_process() -> None:
    def compute(processes: Processes) -> Any:
        buffers = {"scale": torch.full((), 1.0 + processes.rank, dtype=torch.float64)}
        return ask(processes, lambda params, batch: loss(params, batch) * params["scale"], buffers=buffers)

    for found in simulated(2, compute, buffers_of_first=False):
        assert "each process has buffers of its own" in notes(found)


def test_their_number_is_rounded_up_to_pairs_on_each() -> None:
    expected = ask(None, count=12)
    for found in simulated(3, lambda processes: ask(processes, count=8)):
        assert "12 particles over 3 processes" in notes(found)
        same(found, expected)


def test_a_seed_that_was_left_open_is_that_of_the_first() -> None:
    def compute(processes: Processes) -> Any:
        batches = [part(batch, processes) for batch in data(5, 1)]
        return meta_gradient(
            loss, parameters(), learned(), batches[1:], batches[0], estimator="es", processes=processes
        )

    first, second = simulated(2, compute)
    assert torch.equal(first.gradients["learning_rate"], second.gradients["learning_rate"])


def test_a_negative_loss_of_one_particle_is_the_same_error_on_all() -> None:
    judged: list[float] = []

    def recorded(params: Any, batch: Tensor) -> Tensor:
        value = loss(params, batch)
        if torch.equal(batch, data(5, 1)[0]):
            judged.append(value.item())
        return value

    ask(None, recorded, batching="loop", objective="log")
    of_first, of_second = ([judged[index] for index in own] for own in ((0, 1, 4, 5, 8), (2, 3, 6, 7, 8)))
    # Below the lowest of one process, above the lowest of the other: a shift has no gradient.
    shift = (min(of_first) + min(of_second)) / 2

    def sinking(params: Any, batch: Tensor) -> Tensor:
        return loss(params, batch) - shift

    found = simulated(2, lambda processes: ask(processes, sinking, batching="loop", objective="log"))
    assert [type(error) for error in found] == [NegativeLossError, NegativeLossError]
    assert str(found[0]) == str(found[1]) and f"negative ({min(judged) - shift:.4g})" in str(found[0])


@pytest.mark.parametrize("error", [ValueError("a bad batch"), StepSkippedError("nothing to say")])
@pytest.mark.parametrize("late", [False, True])
def test_what_one_process_raises_ends_the_unroll_on_all(error: Exception, late: bool) -> None:
    def compute(processes: Processes) -> Any:
        calls = []

        def raising(params: Any, batch: Tensor) -> Tensor:
            calls.append(1)
            if processes.rank == 1 and len(calls) > (20 if late else 0):
                raise error
            return loss(params, batch)

        return ask(processes, raising, batching="loop")

    first, second = simulated(2, compute)
    assert second is error
    assert type(first) is (StepSkippedError if isinstance(error, StepSkippedError) else ElsewhereError)


def windowed(
    processes: Processes | None, name: Any, given: Any = loss, interrupted: bool = False, windows: int = 3
) -> list[Any]:
    estimator = WindowEstimator(name, Particles(8, 0.1, seed=3), processes=processes)
    rule = learned()
    episode = estimator.begin(rule, parameters())
    results = []
    for number in range(windows):
        batches = [batch if processes is None else part(batch, processes) for batch in data(3, number)]
        result, episode = estimator.meta_gradient(given, rule, episode, batches[1:], batches[0])
        results.append(result)
        with torch.no_grad():  # the meta-parameters move between the windows
            rule.learning_rate -= 0.1 * result.gradients["learning_rate"]
        if interrupted:
            episode = Episode.from_state_dict(episode.state_dict(), rule)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_windows_of_several_processes_are_those_of_one_with_all_batches(name: str) -> None:
    expected = windowed(None, name)
    found = simulated(2, lambda processes: windowed(processes, name))
    for results in found:
        assert not isinstance(results, Exception), results
        for result, one in zip(results, expected, strict=True):
            same(result, one)
    for left, right in zip(*found, strict=True):
        assert torch.equal(left.gradients["learning_rate"], right.gradients["learning_rate"])
    again = simulated(2, lambda processes: windowed(processes, name, interrupted=True))
    for left, right in zip(again[1], found[1], strict=True):
        assert torch.equal(left.gradients["learning_rate"], right.gradients["learning_rate"])


@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_particles_that_are_carried_cannot_do_without_being_spread(name: str) -> None:
    for found in simulated(2, lambda processes: windowed(processes, name, differing(processes))):
        assert isinstance(found, ValueError) and f"estimator='{name}' carries particles" in str(found)


def test_an_episode_goes_on_with_the_same_number_of_processes_only() -> None:
    def begin(processes: Processes) -> Episode:
        return WindowEstimator("pes", Particles(8, seed=3), processes=processes).begin(learned(), parameters())

    episode = simulated(2, begin)[0]
    with pytest.raises(ValueError, match="carries 4 particles on this process, but Particles now asks for 8"):
        WindowEstimator("pes", Particles(8)).meta_gradient(loss, learned(), episode, data(1, 0), data(1, 1)[0])


def test_particles_that_were_divided_by_hand_are_not_divided_again() -> None:
    def compute(processes: Processes) -> Any:
        divided = Particles(8, seed=3, rank=processes.rank, ranks=2, mean_over_ranks=lambda tensor: tensor)
        return WindowEstimator("pes", divided, processes=processes).begin(learned(), parameters())

    for found in simulated(2, compute):
        assert isinstance(found, ValueError) and "divided among ranks=2 already" in str(found)


def test_random_numbers_are_those_of_the_process_again_afterwards() -> None:
    """With a single thread: two would share the generators."""
    alone = Processes(0, 1, total=lambda tensor: tensor, gather=lambda value: [value])

    def noisy(params: Any, batch: Tensor) -> Tensor:
        return loss(params, batch) * (1 + 0.1 * torch.rand(()) + 0.1 * random.random())

    def draw(calls: int) -> list[Any]:
        torch.manual_seed(0), random.seed(0)
        gradients = [ask(alone, noisy).gradients["learning_rate"].item() for _ in range(calls)]
        return [*gradients, random.random(), torch.randint(2**62, ()).item()]

    once, twice = draw(1), draw(2)
    assert once[0] == twice[0] != twice[1]  # other masks in the next unroll
    random.seed(0)
    assert once[1] == twice[2] == random.random()
    assert replace(alone).count == 1
