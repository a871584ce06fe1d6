"""Known answers: problems on which truncation is known to fail, and the unbiased estimators to find the optimum.

Numbers of the other side are of an independent numpy implementation of the same problems.
"""

from __future__ import annotations

import pytest
import torch
from anchor_problems import InfluenceBalancing, MetaTrainingRun, ToyRegression

from lightning_l2l import EvolutionStrategies, Unroll


def estimator(method, objective, **options):
    if method == "truncated":
        return Unroll(objective=objective)
    return EvolutionStrategies(method=method, objective=objective, **options)


def influence_balancing(method):
    problem = InfluenceBalancing()
    how = estimator(method, "naive", particles=1000, standard_deviation=0.1)
    run = MetaTrainingRun(how, unroll_steps=1, unrolls=None, iterations=3000)
    run.train(problem, torch.optim.SGD(problem.parameters(), lr=1e-4))
    return problem


@pytest.mark.parametrize("method", ["pes", "es_single"])
def test_a1_unbiased_estimators_find_the_optimum_of_influence_balancing(method):
    problem = influence_balancing(method)
    assert problem.theta.item() == pytest.approx(-1 / 6, abs=1e-5)
    assert problem.final_loss() < 1e-9


def test_a1_truncation_goes_the_wrong_way():
    # The other implementation ends at theta 3.26 and loss 211, from loss 8.
    problem = influence_balancing("truncated")
    assert problem.theta.item() == pytest.approx(3.26, abs=0.01)
    assert problem.final_loss() == pytest.approx(211, abs=1)


def test_the_problems_are_those_of_the_other_implementation():
    assert InfluenceBalancing().final_loss() == pytest.approx(8.0, abs=1e-9)
    assert ToyRegression().total_loss() == pytest.approx(2487.8, abs=0.05)
    # Its grid optimum, at coordinates rounded to two digits.
    assert ToyRegression().total_loss(torch.tensor([2.75, -1.75])) == pytest.approx(555.5, abs=0.5)


def toy_regression(method, iterations):
    """The mean loss over the last 200 updates: it wiggles by 10 with tiny changes of theta."""
    problem, losses = ToyRegression(), []
    how = estimator(method, "naive_mean", particles=400, standard_deviation=0.3)
    annealing = 0.1 if method == "es_single" else 1 / 3
    run = MetaTrainingRun(how, unroll_steps=10, unrolls=10, iterations=iterations, factor=10.0, annealing=annealing)
    optimizer = torch.optim.Adam(problem.parameters(), lr=2e-2, betas=(0.99, 0.999))
    run.train(problem, optimizer, each=lambda iteration: losses.append(problem.total_loss()))
    return sum(losses[-200:]) / 200


@pytest.mark.slow
@pytest.mark.parametrize(("method", "loss"), [("pes", 570.0), ("es_single", 566.0)])
def test_a2_unbiased_estimators_come_close_to_the_optimum_of_toy_regression(method, loss):
    assert toy_regression(method, 2000) < loss


@pytest.mark.slow
@pytest.mark.parametrize("method", ["truncated", "es"])
def test_a2_truncated_estimators_are_stuck(method):
    # 1000 updates: they have stopped moving after 500.
    assert toy_regression(method, 1000) == pytest.approx(2423, abs=2)
