"""When the real training is lost, take it back to where it was well.

Losses raise a suspicion (:mod:`lightning_l2l.exact.divergence`), a comparison of the present weights with the last good
ones on the same batches decides. On the CPU of a single process losses are looked at in every step; elsewhere that
would cost a synchronisation each, and they are looked at every ``every_n_steps`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_l2l.exact.divergence import LossWatch, has_died, is_better, is_lost, share_of_zeros, zero_share
from lightning_l2l.exact.processes import Processes, StepSkippedError, together
from lightning_l2l.host.applied import AppliedValues
from lightning_l2l.host.in_place import LearnedInPlace
from lightning_l2l.host.isolation import invisible
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.snapshot import Snapshot
from lightning_l2l.host.trainer import live_optimizer
from lightning_l2l.host.training_step import TrainingStep, Window, owned_tensors
from lightning_l2l.learned import LearnedOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

# What the rate is multiplied by where losses had risen, or units had died: such a rate is beyond the edge of stability,
# and good ones are several times below it. Smaller cuts left networks half dead.
_CUT = 0.1
# The same where a loss was no number out of nowhere: that may as well have been the batch.
_SMALL_CUT = 0.3
# A run that is lost more often than this has another problem.
_MOST_ROLLBACKS = 10


class _Judged(NamedTuple):
    """What a state does on some batches: its losses, and the share of zero gradients on the first of them."""

    losses: list[float]
    zero_share: float


class DivergenceGuard:
    """Watches the losses of the real run; keeps a snapshot; goes back to it.

    It does nothing where only observed (``meta_learning_rate=0``), nor where there is no learning rate to cut.

    Args:
        trainer: The running Trainer.
        module: The user's LightningModule.
        learned: The learned optimizer, attached to the live one.
        applied: What it makes of the live optimizer's values.
        settings: What the user asked for.
        processes: The other processes of the run.
        saved: What :meth:`state_dict` returned in the run that is resumed.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        learned: LearnedOptimizer,
        applied: AppliedValues | LearnedInPlace,
        settings: Settings,
        processes: Processes | None = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        saved = saved or {}
        self._trainer = trainer
        self._module = module
        self._learned = learned
        self._applied = applied
        self._processes = processes
        self._seed = settings.seed
        wanted = settings.divergence_guard and settings.meta_learning_rate > 0
        self._acts = wanted and isinstance(applied, AppliedValues) and learned.scaled_rate(1.0) is not None
        self._watch = LossWatch(saved.get("watch"))
        self._losses = [torch.tensor(loss, device=module.device) for loss in saved.get("losses", [])]
        self._pending = [torch.tensor(loss, device=module.device) for loss in saved.get("pending", [])]
        self.rollbacks: int = saved.get("rollbacks", 0)
        self._since_snapshot: int = saved.get("since_snapshot", 0)
        self._snapshot: Snapshot | None = None

    def keep_first(self) -> None:
        """Training starts, or goes on, from a state that is as good as any."""
        if self._acts and self._snapshot is None:
            self._snapshot = Snapshot(self._module, live_optimizer(self._trainer))

    def see(self, outputs: Any) -> None:
        """The training step of a micro-batch returned this."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._acts and isinstance(loss, Tensor):
            self._losses.append(loss.detach())  # divided by the number of them, by Lightning

    def check(self, judges: Callable[[], list[Window]], *, due: bool) -> str:
        """The optimizer has stepped: if the run is lost, take it back and cut the rate.

        Args:
            judges: Gives batches to compare the present weights and those of the snapshot by.
            due: Whether to look in any case, if that takes a synchronisation.

        Returns:
            What was done, in words; nothing if nothing was.
        """
        if self._losses:
            total, share = sum(self._losses[1:], self._losses[0]), self._trainer.accumulate_grad_batches
            self._pending.append(total if share == len(self._losses) else total * (share / len(self._losses)))
        self._losses = []
        if self._snapshot is None or self.rollbacks >= _MOST_ROLLBACKS or not (due or self._looks_at_every_step):
            return ""
        zeros = None
        if due:  # the gradients of the last step are still there
            groups = live_optimizer(self._trainer).param_groups
            moved = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
            zeros = share_of_zeros([parameter.grad for parameter in moved])
        numbers = _numbers([*self._pending, *([] if zeros is None else [zeros])])
        for loss in numbers[: len(self._pending)]:
            self._watch.see(loss)
        self._pending = []
        if due:
            self._watch.see_zeros(numbers[-1] if zeros is not None else 0.0)
        # One process's bad news are everybody's.
        if not self._any(self._watch.suspicious):
            return ""
        if not self._is_lost(judges(), self._snapshot):
            self._watch.unfounded()
            return ""
        return self._go_back(self._snapshot)

    @property
    def _looks_at_every_step(self) -> bool:
        return self._module.device.type == "cpu" and self._processes is None

    def all_is_well(self, judges: Callable[[], list[Window]]) -> None:
        """A meta-gradient here was usable: keep this state, unless the losses of the run say otherwise.

        After a rollback, or where the losses are above the first one, the new state has to be better than the one that
        is kept, on the same batches: a network that is damaged may train calmly.

        Args:
            judges: Gives these batches.
        """
        if not self._acts or not self._all(self._watch.calm):
            return
        proven = self._since_snapshot == 0 and self._watch.below_the_first
        if self._snapshot is not None and not self._all(proven):
            before, now = self._compared(judges(), self._snapshot)
            if not self._all(is_better(before.losses, now.losses)):
                return
        if self._snapshot is None:
            self.keep_first()
        else:
            self._snapshot.take(self._module, live_optimizer(self._trainer))
        self._since_snapshot = 0

    def _any(self, decision: bool) -> bool:
        return decision if self._processes is None else self._processes.any(decision)

    def _all(self, decision: bool) -> bool:
        return not self._any(not decision)

    def _compared(self, judges: list[Window], snapshot: Snapshot) -> tuple[_Judged, _Judged]:
        with together(self._processes):
            before = self._judged(judges, snapshot.parameters, snapshot.buffers)
            return before, self._judged(judges, *owned_tensors(self._module, live_optimizer(self._trainer)))

    def _is_lost(self, judges: list[Window], snapshot: Snapshot) -> bool:
        high = list(self._watch.high)
        before, now = self._compared(judges, snapshot)
        if before.losses:
            died = has_died(before.zero_share, now.zero_share)
            lost = is_lost(high, before.losses, now.losses, dead=died, relapsed=self._watch.relapsed)
        else:  # nothing to compare by: the losses of the run have to do
            lost = self._watch.alarming and is_lost(high, [self._watch.start], high[-1:])
        return self._any(lost)

    def _judged(self, judges: list[Window], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> _Judged:
        loss = TrainingStep(self._trainer, self._module)
        losses: list[float] = []
        share = 0.0
        for judge in judges:
            # The same random numbers for both states; buffers are copied, since the step may write them.
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
            own = {name: buffer.detach().clone() for name, buffer in buffers.items()}
            with invisible(self._trainer, self._module, self._seed):
                try:
                    value = loss({**leaves, **own}, judge)
                except StepSkippedError:
                    continue
                if not losses:
                    share = zero_share(torch.autograd.grad(value, list(leaves.values()), allow_unused=True))
                losses.append(value.item())
        return _Judged(losses, share)

    def _go_back(self, snapshot: Snapshot) -> str:
        snapshot.restore(self._module, live_optimizer(self._trainer))
        nowhere = self._watch.out_of_nowhere and not self._since_snapshot
        # A process whose losses are well has no say; the others have to agree, or their rates would differ.
        cut = _CUT if self._any(self._watch.suspicious and not nowhere) else _SMALL_CUT
        what = "had diverged" if self._any(self._watch.alarming) else "had lost half of what it had won"
        self._watch.forget()
        self.rollbacks += 1
        self._since_snapshot += 1
        self._learned.set_(self._learned.scaled_rate(cut) or {})
        self._learned.project_()
        self._applied.refresh(force=True)
        note = (
            f"The training {what}. Weights, buffers and optimizer state were taken back to the last good "
            f"snapshot, and the learning rate was multiplied by {cut}."
        )
        if self.rollbacks == _MOST_ROLLBACKS:
            note += (
                f" That was the {_MOST_ROLLBACKS}th time, and the last one: the learning rate is not what is wrong. "
                "Look for broken batches or a loss that is not a number."
            )
        return note

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. The snapshot is not in it: a resumed run keeps a new one, of the state it starts from."""
        return {
            "watch": self._watch.state_dict(),
            "losses": [loss.item() for loss in self._losses],
            "pending": [loss.item() for loss in self._pending],
            "rollbacks": self.rollbacks,
            "since_snapshot": self._since_snapshot,
        }


def _numbers(losses: list[Tensor]) -> list[float]:
    """One number for each, with one synchronisation; of a single one without a copy, since that is every step's."""
    if len(losses) <= 1:
        return [loss.item() for loss in losses]
    return [float(loss) for loss in torch.stack([loss.reshape(()).double() for loss in losses]).tolist()]
