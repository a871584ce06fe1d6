"""The live estimator in plain PyTorch: the numbers of ``forward``, from steps that are taken anyway."""

from __future__ import annotations

import pytest
import torch
from test_meta_gradient import NETWORKS, OBJECTIVES, OPTIMIZERS, STEPS, Problem

from lightning_l2l.exact.clip import clip_gradient_norm
from lightning_l2l.exact.estimators import LiveUnroll
from lightning_l2l.exact.inner_step import InnerStep, Iterate
from lightning_l2l.exact.scaled import ScaledVector
from lightning_l2l.functional import read_state


def live(problem, learned, objective="log", clipping=None, accumulate=1, scale=1.0, carried=None, interrupt_at=None):
    """Train the problem's own network for STEPS steps with its own optimizer; the meta-gradient of those steps."""
    net, optimizer = problem.net, problem.optimizer
    step = InnerStep(problem.loss, learned, clipping)
    unroll = LiveUnroll(step, objective, STEPS, carried)
    owned = dict(net.named_parameters())
    torch.manual_seed(7)
    for number, batch in enumerate(problem.batches[3 : 3 + STEPS]):
        optimizer.zero_grad()
        for x, y in zip(batch[0].chunk(accumulate), batch[1].chunk(accumulate), strict=True):
            loss = problem.loss(owned, (x, y)) / accumulate * scale
            unroll.see_loss(loss, owned, scale)
            loss.backward()
        for parameter in owned.values():
            parameter.grad /= scale
        state = read_state(optimizer, net.named_parameters())
        iterate = Iterate(owned, state, dict(net.named_buffers()))
        unroll.before_step(iterate, {name: parameter.grad for name, parameter in owned.items()})
        if clipping is not None:
            torch.nn.utils.clip_grad_norm_(owned.values(), 0.3)
        optimizer.step()
        unroll.after_step()
        if unroll.is_due:
            unroll.judge(Iterate(owned, None, dict(net.named_buffers())), problem.batches[3 + STEPS])
        if number == interrupt_at:
            saved = unroll.state_dict()
            unroll = LiveUnroll(step, objective, STEPS, carried)
            unroll.load_state_dict(saved, torch.device("cpu"))
    return unroll


def agree(found, expected, tolerance=1e-10):
    # float64: another order of the same sums.
    assert found.usable and expected.usable
    assert found.value == pytest.approx(expected.value, rel=tolerance)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_live_equals_forward_replayed_on_the_same_batches(optimizer):
    problem = Problem(optimizer=optimizer)
    learned = problem.learned()
    expected = problem.gradient(learned, "forward")
    found = live(problem, learned).result()
    agree(found, expected)
    assert found.diagnostics.losses.tolist() == pytest.approx(expected.diagnostics.losses.tolist(), rel=1e-12)
    assert found.diagnostics.growth_rate == pytest.approx(expected.diagnostics.growth_rate, rel=1e-9)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "transformer"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_live_equals_forward_for_every_objective_and_network(network, objective):
    problem = Problem(network)
    learned = problem.learned()
    expected = problem.gradient(learned, "forward", objective=objective)
    agree(live(problem, learned, objective).result(), expected)


def test_live_learns_several_hyperparameters():
    problem = Problem()
    learned = problem.learned("learning_rate", "momentum", "weight_decay")
    expected = problem.gradient(learned, "forward")
    agree(live(problem, learned).result(), expected)


def test_live_in_float32_is_as_exact_as_forward():
    problem = Problem(dtype=torch.float32)
    learned = problem.learned()
    expected = problem.gradient(learned, "forward")
    # Rounding of float32 losses, a few times 1e-7.
    agree(live(problem, learned).result(), expected, 1e-5)


def test_accumulated_and_scaled_losses_give_the_same():
    expected = live(Problem(), Problem().learned()).result()
    problem = Problem()
    agree(live(problem, problem.learned(), accumulate=3, scale=1024.0).result(), expected)


def test_clipping_is_part_of_the_step():
    problem = Problem()
    learned = problem.learned()
    expected = problem.gradient(learned, "forward", gradient_transformation=clip_gradient_norm(0.3))
    unclipped = problem.gradient(learned, "forward")
    assert expected.value != pytest.approx(unclipped.value, rel=1e-3)
    agree(live(problem, learned, clipping=clip_gradient_norm(0.3)).result(), expected)


def test_the_run_is_what_it_would_have_been():
    watched, alone = Problem(), Problem()
    live(watched, watched.learned())
    torch.manual_seed(7)
    for batch in alone.batches[3 : 3 + STEPS]:
        alone.optimizer.zero_grad()
        alone.loss(dict(alone.net.named_parameters()), batch).backward()
        alone.optimizer.step()
    for left, right in zip(watched.net.parameters(), alone.net.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_carried_tangent_makes_two_windows_one():
    problem = Problem()
    learned = problem.learned()
    whole = problem.gradient(learned, "forward")
    problem_of_two = Problem()
    step = InnerStep(problem_of_two.loss, learned)
    owned = dict(problem_of_two.net.named_parameters())
    carried = None
    for first in (3, 3 + STEPS // 2):
        unroll = LiveUnroll(step, "log", STEPS // 2, carried)
        for batch in problem_of_two.batches[first : first + STEPS // 2]:
            problem_of_two.optimizer.zero_grad()
            loss = problem_of_two.loss(owned, batch)
            unroll.see_loss(loss, owned)
            loss.backward()
            state = read_state(problem_of_two.optimizer, problem_of_two.net.named_parameters())
            unroll.before_step(Iterate(owned, state, {}), {n: p.grad for n, p in owned.items()})
            problem_of_two.optimizer.step()
            unroll.after_step()
        carried = [ScaledVector(list(t.tensors), t.exponent) for t in unroll.tangents]
    unroll.judge(Iterate(owned, None, {}), problem_of_two.batches[3 + STEPS])
    found = unroll.result()
    # The logarithm is divided by the number of steps: twice as many in the whole.
    torch.testing.assert_close(
        found.gradients["learning_rate"] / 2, whole.gradients["learning_rate"], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("interrupt_at", range(STEPS - 1))
def test_an_interrupted_window_goes_on_exactly(interrupt_at):
    problem, interrupted = Problem(), Problem()
    expected = live(problem, problem.learned(), "naive_mean").result()
    found = live(interrupted, interrupted.learned(), "naive_mean", interrupt_at=interrupt_at).result()
    assert found.value == expected.value and found.gradients == expected.gradients


def test_a_step_that_is_not_taken_does_not_count():
    problem = Problem()
    learned = problem.learned()
    unroll = LiveUnroll(InnerStep(problem.loss, learned), "log", 1)
    owned = dict(problem.net.named_parameters())
    loss = problem.loss(owned, problem.batches[3])
    unroll.see_loss(loss, owned)
    gradients = dict(zip(owned, torch.autograd.grad(loss, owned.values()), strict=True))
    unroll.before_step(Iterate(owned, read_state(problem.optimizer, problem.net.named_parameters()), {}), gradients)
    assert unroll.has_pending_step and unroll.taken == 0 and not unroll.tangents


def test_a_state_of_other_meta_parameters_is_refused():
    problem = Problem()
    saved = live(problem, problem.learned()).state_dict()
    other = LiveUnroll(InnerStep(problem.loss, problem.learned("learning_rate", "momentum")), "log", STEPS)
    with pytest.raises(ValueError, match="1 tangents were saved, but 2 are needed"):
        other.load_state_dict(saved, torch.device("cpu"))
