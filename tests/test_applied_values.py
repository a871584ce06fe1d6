"""AppliedValues alone: scheduled and applied values kept apart, through rounding, splitting, saving and copying."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import Plain, Witness, difference, learner, loaders
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchopt import sgd as torchopt_sgd

from lightning_l2l import LearnedOptimizer, LearnedStepSize
from lightning_l2l.functional import mirror
from lightning_l2l.host.applied import AppliedValues


def attached(optimizer: Any, module: Any, offset: float = 0.5, **options: Any) -> tuple[AppliedValues, LearnedStepSize]:
    learned = LearnedStepSize(**options)
    applied = AppliedValues(optimizer, module, learned)
    with torch.no_grad():
        learned.learning_rate.fill_(offset)
    applied.refresh(force=True)
    return applied, learned


def test_a_tensor_rate_is_not_compounded_by_its_own_rounding() -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1), foreach=False, capturable=False)
    rate = optimizer.param_groups[0]["lr"]
    applied, _ = attached(optimizer, module)
    for _ in range(50):
        applied.refresh()
        with applied.scheduled():
            assert rate.item() == torch.tensor(0.1).item()
    assert rate.item() == pytest.approx(0.1 * torch.tensor(0.5).exp().item(), rel=1e-6)
    assert optimizer.param_groups[0]["lr"] is rate


def test_split_groups_are_whole_again_whatever_happens() -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (whole,) = optimizer.param_groups
    applied, _ = attached(optimizer, module, per="tensor")
    applied.split()
    assert len(optimizer.param_groups) == 2
    applied.refresh()  # a GradScaler may skip the step, and with it the hook after it
    assert optimizer.param_groups == [whole] and optimizer.param_groups[0] is whole


def test_values_come_back_from_a_saved_state_and_a_foreign_rate_becomes_the_schedule() -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    applied, learned = attached(optimizer, module)
    saved = applied.state_dict()
    again = LearnedStepSize()
    again.load_state_dict(learned.state_dict())
    assert AppliedValues(optimizer, module, again, saved).scheduled_rates == [0.1]
    optimizer.param_groups[0]["lr"] = 0.7
    assert AppliedValues(optimizer, module, again, saved).scheduled_rates == [0.7]


def test_a_learned_optimizer_that_sets_nothing_is_refused() -> None:
    class Descent(LearnedOptimizer):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(0.1))

        def transformation(self) -> Any:
            return torchopt_sgd(0.1)

    module = torch.nn.Linear(2, 1)
    with pytest.raises(MisconfigurationException, match="never applied"):
        AppliedValues(torch.optim.SGD(module.parameters(), lr=0.1), module, Descent())


def test_the_module_can_be_copied_and_pickled_during_the_fit(trainer: Any) -> None:
    class Copies(Witness):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]

    copies, module = Copies(), Pickles(sgd_for_pickle)
    trainer(learner(), copies).fit(module, **loaders())
    for found in copies.copies:
        assert found.lr_scheduler_step.__func__ is type(module).lr_scheduler_step
        assert found.lr_scheduler_step.__self__ is found
        assert (
            difference(
                mirror(module.configure_optimizers(), module.named_parameters()).groups[0].names,
                mirror(found.configure_optimizers(), found.named_parameters()).groups[0].names,
            )
            == ""
        )


class Pickles(Plain):
    pass


def sgd_for_pickle(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
