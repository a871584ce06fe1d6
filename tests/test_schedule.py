"""The learned schedule is the user's to keep: a table, to the last bit what was applied, replayed without us."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NotesRates, Rich, difference, learner, loaders, outcome, sgd
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler

from lightning_l2l import LearnedSchedule, LearnToLearn
from lightning_l2l.rates import AppliedRecord

COSINE = lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 20), "interval": "step"}  # noqa: E731
BY_EPOCH = lambda o: lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731


class WarmUp(Rich):
    """Writes the rate in ``optimizer_step``, as many modules do."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class TwoGroups(Rich):
    def configure_optimizers(self) -> Any:
        first, *rest = self.net
        parts = [{"params": first.parameters(), "lr": 0.05}, {"params": nn.Sequential(*rest).parameters(), "lr": 0.2}]
        optimizer = self.optimizer(parts)
        schedule = None if self.schedule is None else self.schedule(optimizer)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}


# The module that learns, the one to replay in, optimizer and schedule, options of the callback and of the Trainer.
CASES: dict[str, Any] = {
    "constant": (Rich, Rich, (sgd(0.1, momentum=0.9), None), {}, {}),
    "cosine": (Rich, Rich, (sgd(0.1, momentum=0.9), COSINE), {}, {}),
    "by epoch": (Rich, Rich, (ADAM, BY_EPOCH), {}, {}),
    "warm-up": (WarmUp, Rich, (sgd(0.1), None), {}, {}),
    "in the search": (Rich, Rich, (sgd(1e-6), None), {"initial_search": True}, {}),
    "accumulated": (Rich, Rich, (sgd(0.1), COSINE), {"every_n_steps": 2}, {"accumulate_grad_batches": 4}),
    "groups": (TwoGroups, TwoGroups, (sgd(0.01), None), {"initial_search": True}, {}),
    "decay": (Rich, Rich, (sgd(3.0), None), {}, {}),
}


def train(trainer: Any, module: Any, *callbacks: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    fitted = trainer(*callbacks, **{"max_epochs": 3, **options})
    fitted.fit(module, **loaders())
    return outcome(fitted, module)["state"]


@pytest.mark.parametrize("case", CASES)
def test_replaying_without_the_callback_reaches_the_same_weights(trainer: Any, tmp_path: Path, case: str) -> None:
    make, again, (optimizer, schedule), ours, options = CASES[case]
    callback = learner(divergence_guard=False, **ours)
    expected = train(trainer, make(optimizer, schedule), callback, **options)
    callback.export_schedule().to_csv(tmp_path / "schedule.csv")
    table = LearnedSchedule.from_csv(tmp_path / "schedule.csv")
    assert table == callback.export_schedule() and callback.history
    replay = lambda o: {"scheduler": table.scheduler(o), "interval": "step"}  # noqa: E731
    assert difference(expected, train(trainer, again(optimizer, replay), **options)) == ""


def test_the_table_has_the_rate_of_every_step_and_one_row_for_each_change(trainer: Any) -> None:
    callback = learner(initial_search=True)
    make = lambda parameters: NotesRates(parameters, lr=1e-6)  # noqa: E731
    module = Rich(make)
    train(trainer, module, callback, max_epochs=8)
    used = module.trainer.optimizers[0].used
    table = callback.export_schedule()
    assert [[table.at(step)["lr"]] for step in range(len(used))] == used and len({rate for (rate,) in used}) > 3
    assert list(table.steps) == [0, *(step for step in range(1, len(used)) if used[step] != used[step - 1])]
    assert table.rows[0] == {"step": 0, "lr": 1e-6} and table.at(10**6)["lr"] == used[-1][0]


def test_a_group_that_is_added_later_has_an_empty_cell_until_then(tmp_path: Path) -> None:
    record = AppliedRecord()
    record.note(0, {"lr/0": 0.1})
    record.note(5, {"lr/0": 0.1, "lr/1": 0.2})
    again = AppliedRecord()
    again.load_state_dict(record.state_dict())
    again.note(7, {"lr/0": 0.1, "lr/1": 0.2})  # no change, no row
    table = again.schedule()
    assert table.steps == (0, 5) and table.groups == ("0", "1") and math.isnan(table.values[0][1])
    table.to_csv(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().splitlines()[1] == "0,0.1,"
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
    LearnedSchedule.from_csv(tmp_path / "x.csv").scheduler(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_a_step_that_the_scaler_leaves_out_costs_no_row(trainer: Any) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**18))
    callback = learner()
    train(trainer, Rich(sgd(0.1)), callback, plugins=plugin)
    assert sorted(set(callback.export_schedule().steps)) == list(callback.export_schedule().steps)


def test_observing_exports_the_schedule_of_the_run_and_the_replay_leaves_nothing_of_ours(
    trainer: Any, tmp_path: Path
) -> None:
    callback = learner(meta_learning_rate=0)
    train(trainer, Rich(sgd(0.1), COSINE), callback)
    table = callback.export_schedule()
    expected = [0.1 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(18)]
    assert [table.at(step)["lr"] for step in range(18)] == pytest.approx(expected, rel=1e-9)
    replay = lambda o: {"scheduler": table.scheduler(o), "interval": "step"}  # noqa: E731
    fitted = trainer(max_epochs=1)
    fitted.fit(Rich(sgd(0.1), replay), **loaders())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    assert "lightning_l2l" not in (tmp_path / "x.ckpt").read_bytes().decode("latin-1")
    torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_every_hyperparameter_of_a_table_is_replayed() -> None:
    table = LearnedSchedule(
        ("lr", "beta1", "beta2", "weight_decay"), (0, 2), ((0.1, 0.9, 0.99, 0.0), (0.2, 0.8, 0.98, 0.1))
    )
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = table.scheduler(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.8, 0.98), 0.1)


def test_a_number_of_no_optimizer_is_refused_with_how_many_there_are(trainer: Any) -> None:
    callback = learner()
    trainer(callback, max_epochs=1).fit(Rich(), **loaders())
    with pytest.raises(ValueError, match=r"export_schedule\(optimizer=1\): there are 1, counted from 0"):
        callback.export_schedule(1)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no optimizer step has been made"):
        LearnToLearn().export_schedule()
    for columns, steps, values in (
        (("lr",), (), ()),
        (("lr",), (0, 0), ((1.0,), (2.0,))),
        (("lr",), (0,), ((1.0, 2.0),)),
    ):
        with pytest.raises(ValueError, match="table with at least one row"):
            LearnedSchedule(columns, steps, values)
    (tmp_path / "x.csv").write_text("time,lr\n0,1\n")
    with pytest.raises(ValueError, match="first column is not 'step'"):
        LearnedSchedule.from_csv(tmp_path / "x.csv")
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="has 2 parameter groups"):
        LearnedSchedule(("lr/a", "lr/b"), (0,), ((1.0, 2.0),)).scheduler(optimizer)
    with pytest.raises(ValueError, match="no learning rate 'lr'"):
        LearnedSchedule(("momentum",), (0,), ((1.0,),)).scheduler(optimizer)
