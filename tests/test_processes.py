"""The mean over processes, with threads in their place: what each of them computes, decides and raises."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_l2l import EvolutionStrategies, LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.exact.processes import ElsewhereError, Processes, StepSkippedError
from lightning_l2l.functional import inner_optimizer

FEATURES = 4


def simulated(count: int, function: Callable[[Processes], Any], **options: Any) -> list[Any]:
    """What the function returns for each process, or what it raises."""
    # Who waits this long waits for somebody who does something else.
    meeting = threading.Barrier(count, timeout=20)
    slots: list[Any] = [None] * count
    results: list[Any] = [None] * count

    def exchange(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        meeting.wait()
        found = list(slots)
        meeting.wait()
        return found

    def run(rank: int) -> None:
        def total(tensor: Tensor) -> Tensor:
            parts = exchange(rank, tensor.detach().clone())
            assert len({(part.shape, part.dtype) for part in parts}) == 1, "processes at different points"
            summed = parts[0].clone()
            for part in parts[1:]:
                summed += part
            return summed

        processes = Processes(rank, count, total, lambda value: exchange(rank, value), **options)
        try:
            results[rank] = function(processes)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def data(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, FEATURES + 1, dtype=torch.float64, generator=generator) for _ in range(count)]


def part(batch: Tensor, processes: Processes) -> Tensor:
    return batch.chunk(processes.count)[processes.rank]


def loss(parameters: Any, batch: Tensor) -> Tensor:
    hidden = functional.softplus(batch[:, :-1] @ parameters["first"])
    return (hidden @ parameters["second"] - batch[:, -1]).square().mean()


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "first": torch.randn(FEATURES, 3, dtype=torch.float64, generator=generator),
        "second": torch.randn(3, dtype=torch.float64, generator=generator),
    }


def learned(kind: Any = LearnedStepSize) -> Any:
    return kind().attach(inner_optimizer(torch.optim.SGD, lr=0.05, momentum=0.8))


ESTIMATORS = {
    "forward": Unroll(mode="forward"),
    "reverse, mean": Unroll(mode="reverse", objective="naive_mean"),
    "reverse, first order": Unroll(mode="reverse", second_order=False),
    "segmented, mean": Unroll(mode="segmented", objective="log_mean"),
    "forward, first order": Unroll(mode="forward", objective="naive", second_order=False),
    "evolution strategies": EvolutionStrategies(particles=12, seed=3),
    "evolution strategies, loop": EvolutionStrategies(particles=4, seed=3, objective="naive_mean", batching="loop"),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_gives_the_meta_gradient_of_the_joined_batches(count: int, name: str) -> None:
    batches, held_out = data(5, 1), data(1, 2)[0]
    estimator = ESTIMATORS[name]

    def ask(processes: Processes) -> Any:
        own = [part(batch, processes) for batch in batches]
        return meta_gradient(
            loss, parameters(), learned(), own, part(held_out, processes), estimator=estimator, processes=processes
        )

    expected = meta_gradient(loss, parameters(), learned(), batches, held_out, estimator=estimator)
    for found in simulated(count, ask):
        assert not isinstance(found, Exception), found
        # Double precision: what is left is the order of additions.
        assert found.value == pytest.approx(expected.value, rel=1e-11)
        assert torch.allclose(found.diagnostics.losses, expected.diagnostics.losses, rtol=1e-11)
        for meta_parameter, gradient in expected.gradients.items():
            assert torch.allclose(found.gradients[meta_parameter], gradient, rtol=1e-9)


def test_the_mean_of_the_own_meta_gradients_is_something_else() -> None:
    """So the test above can fail: averaging at the end only is not enough."""
    batches, held_out = data(5, 1), data(1, 2)[0]
    expected = meta_gradient(loss, parameters(), learned(), batches, held_out)
    own = [
        meta_gradient(
            loss, parameters(), learned(), [batch.chunk(2)[rank] for batch in batches], held_out.chunk(2)[rank]
        )
        for rank in range(2)
    ]
    mean = sum(result.gradients["learning_rate"] for result in own) / 2
    assert abs(mean / expected.gradients["learning_rate"] - 1) > 1e-3


def test_means_count_what_is_missing_as_zero_unless_all_miss_it() -> None:
    like = [torch.zeros(2), torch.zeros(1, dtype=torch.bfloat16), torch.zeros(0), torch.zeros(3)]

    def ask(processes: Processes) -> Any:
        first = torch.full((2,), 4.0) if processes.rank == 1 else None
        tiny = torch.full((1,), float(processes.rank), dtype=torch.bfloat16)
        return processes.mean(lambda: [first, tiny, torch.zeros(0), None], like)

    for found in simulated(2, ask):
        assert found[0].tolist() == [2.0, 2.0] and found[3] is None
        assert found[1].dtype == torch.bfloat16 and found[1].item() == 0.5 and found[2].shape == (0,)


def test_a_mean_carries_this_process_s_share_of_the_derivative() -> None:
    def ask(processes: Processes) -> Any:
        weight = torch.tensor(3.0, requires_grad=True)
        (mean,) = processes.shared(lambda: [weight.square() * (processes.rank + 1)], [torch.zeros(())])
        (share,) = torch.autograd.grad(mean, weight, create_graph=True)
        (curvature,) = torch.autograd.grad(share, weight)
        return mean.item(), share.item(), curvature.item()

    assert simulated(2, ask) == [(13.5, 6.0, 2.0), (13.5, 12.0, 4.0)]


@pytest.mark.parametrize("method", ["mean", "together"])
def test_what_one_process_raises_is_raised_on_all(method: str) -> None:
    def fails(*errors: Exception | None) -> list[Any]:
        def ask(processes: Processes) -> Any:
            def compute() -> list[Tensor]:
                error = errors[processes.rank]
                if error is not None:
                    raise error
                return [torch.ones(1)]

            if method == "mean":
                return processes.mean(compute, [torch.zeros(1)])
            with processes.together():
                return compute()

        return simulated(len(errors), ask)

    own = ValueError("bad batch")
    skip = StepSkippedError("nothing to say")
    first, second, third = fails(None, own, skip)
    assert second is own  # a serious failure outweighs a batch that is skipped
    for other, rank in ((first, 0), (third, 2)):
        assert type(other) is ElsewhereError
        assert str(other) == f"Process 1 failed, so process {rank} cannot go on. ValueError: bad batch"
    assert [type(found) for found in fails(None, skip)] == [StepSkippedError, StepSkippedError]
    assert not any(isinstance(found, Exception) for found in fails(None, None))


def test_an_operation_without_a_second_derivative_on_one_process_makes_all_use_evolution_strategies() -> None:
    def ask(processes: Processes) -> Any:
        def partly(params: Any, batch: Tensor) -> Tensor:
            value = loss(params, batch)
            if processes.rank == 1:
                targets = torch.zeros(len(batch), dtype=torch.long)
                scores = batch[:, :-1] @ params["first"]
                value = value + functional.multi_margin_loss(scores, targets)
            return value

        own = [part(batch, processes) for batch in data(3, 1)]
        return meta_gradient(partly, parameters(), learned(), own, own[0], processes=processes)

    first, second = simulated(2, ask)
    assert first.diagnostics.estimator == second.diagnostics.estimator == "es", (first, second)
    assert torch.equal(first.gradients["learning_rate"], second.gradients["learning_rate"])


@pytest.mark.parametrize("of_first", [True, False])
def test_buffers_are_those_of_the_first_process_where_the_training_s_are(of_first: bool) -> None:
    def counted(params: Any, batch: Tensor) -> Tensor:
        params["seen"] += 1  # in place, as the averages of batch normalisation are
        return loss(params, batch) * params["seen"]

    def ask(processes: Processes) -> Any:
        seen = torch.full((), 10.0 * processes.rank, dtype=torch.float64)
        own = [batch for batch in data(3, 1)]
        result = meta_gradient(
            counted, parameters(), learned(), own, own[0], buffers={"seen": seen}, processes=processes
        )
        assert seen == 10.0 * processes.rank
        return result.diagnostics.losses[0].item()

    found = simulated(2, ask, buffers_of_first=of_first)
    plain = loss(parameters(), data(1, 1)[0]).item()
    # Counts of 1 and 1, or of 1 and 11.
    assert found == pytest.approx([plain * (1 if of_first else 6)] * 2)


def test_copies_are_exact_in_every_dtype() -> None:
    values = [
        torch.tensor([0.1, float("inf"), -3.0]),
        torch.tensor([2**53 + 1]),
        torch.tensor([True, False]),
        torch.tensor([0.1], dtype=torch.bfloat16),
        torch.zeros(0, 3),
    ]

    def ask(processes: Processes) -> list[Tensor]:
        own = [tensor.clone() if processes.rank == 0 else torch.ones_like(tensor) for tensor in values]
        processes.copy_first_(own)
        return own

    for found in simulated(3, ask):
        assert all(torch.equal(left, right) for left, right in zip(found, values, strict=True))
