"""The displacement estimator in a Lightning run: which hooks tell it what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_l2l.exact.estimators import Displacement, Slope, displacement, slope
from lightning_l2l.exact.estimators.displacement import only_last, part_back
from lightning_l2l.exact.inner_step import Iterate
from lightning_l2l.exact.processes import Processes
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.host.applied import AppliedValues
from lightning_l2l.host.guarded import StepRefusedError, unless_diverged
from lightning_l2l.host.in_place import LearnedInPlace
from lightning_l2l.host.isolation import invisible
from lightning_l2l.host.live import LARGEST_SAVED, WindowIncompleteError
from lightning_l2l.host.look_ahead import LookAhead
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.trainer import live_optimizer, loss_scale, passes, planned_steps
from lightning_l2l.host.training_step import Window, owned_tensors
from lightning_l2l.learned import LearnedOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Measured on the four tasks that defaults are chosen by (docs, "opponents"): 50 is worse, 200 no better, less stable.
USUAL_MEMORY = 100


def displacement_obstacle(
    learned: LearnedOptimizer, applied: AppliedValues | LearnedInPlace, settings: Settings
) -> str:
    """Why the displacement of the parameters does not say what is asked; ``""`` if it does.

    Args:
        learned: The learned optimizer, attached.
        applied: What it makes of the live optimizer's values.
        settings: What the user asked for.
    """
    if isinstance(applied, LearnedInPlace) or learned.rate_places() is None:
        return (
            f"{type(learned).__name__} learns something else than factors on the learning rates, or the optimizer's "
            "steps are not known to be proportional to its rate"
        )
    if settings.unroll_steps == 1:
        return "unroll_steps=1 leaves no memory: the average of past parameters would be the present ones"
    if not only_last(settings.objective):
        return f"objective={settings.objective!r} counts losses on the way, and a displacement knows only the last"
    return ""


class DisplacementSteps:
    """Watches where the parameters go; at a meta-update, asks whether that was uphill.

    Held-out data are judged after a step, on copies of the buffers, where the run is or (early in a training of few
    passes whose end is known) some of the way back. Training data (``meta_data=
    "train"``) need no evaluation: the gradient that the step is about to use, of a batch that has not been trained on
    since the last epoch, says it before the step.

    Args:
        trainer: The Trainer.
        module: The user's LightningModule.
        look_ahead: What knows the user's step and the held-out data.
        learned: The learned optimizer, attached.
        settings: What the user asked for.
        reason: Why this estimator was chosen.
        processes: The other processes of the run.
    """

    steps = 0  # it needs none of the run's batches

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        look_ahead: LookAhead,
        learned: LearnedOptimizer,
        settings: Settings,
        reason: str,
        processes: Processes | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._look_ahead = look_ahead
        self._learned = learned
        self._settings = settings
        self._memory = settings.unroll_steps or USUAL_MEMORY
        self._reason = reason
        self._processes = processes
        self._way: Displacement | None = None
        self._is_due = False
        self._offsets: Tensor | None = None  # by which the way until now was made
        self._drop_judgement()

    def _drop_judgement(self) -> None:
        self._loss: Tensor | None = None
        self._training: Slope | None = None
        self._held_out: Slope | None = None

    def _owned(self) -> dict[str, Tensor]:
        return owned_tensors(self._module, live_optimizer(self._trainer))[0]

    def _follow(self, parameters: dict[str, Tensor]) -> Displacement:
        """The displacement of these since the start, or since layers were frozen or thawed."""
        if self._way is None or self._way.names != list(parameters):
            self._way = Displacement(parameters, self._memory)
        return self._way

    def before_batch(self, steps_to_go: int, *, first: bool) -> None:
        """A training batch begins.

        Args:
            steps_to_go: Optimizer steps until the meta-update, this one included.
            first: Whether an optimizer step begins with it.
        """
        if self._way is None:
            self._follow(self._owned())
        if first:
            self._take_over_rates()
            self._is_due = steps_to_go == 1
            self._drop_judgement()

    def _take_over_rates(self) -> None:
        """After a meta-update: rescale the way so far."""
        before = self._offsets
        if before is None:
            return
        now = self._like
        if before.shape == now.shape:  # else there are groups that were not there before
            factors = (now - before).exp().tolist()
            parameters = self._owned()
            self._follow(parameters).rescale(parameters, {n: factors[place] for n, place in self._places.items()})
        self._offsets = None

    def trial(self, loss: Tensor) -> str | None:
        """There is nothing to try: one derivative is what the training itself takes."""
        return None

    def see_loss(self, loss: Tensor) -> None:
        """Lightning is about to go backward from this loss."""
        if self._is_due:
            part = loss.detach().double() / loss_scale(self._trainer)
            self._loss = part if self._loss is None else self._loss + part

    def before_step(self) -> None:
        """The gradients are there, not clipped yet, and the optimizer is about to step."""
        if not self._is_due:
            return
        loss = self._loss
        if loss is None if self._processes is None else self._processes.any(loss is None):
            return  # the step returned None
        assert loss is not None
        (loss,) = self._look_ahead.inner_step().average(lambda: [loss], [loss])
        assert loss is not None
        parameters = self._owned()
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        self._training = self._slope(loss, gradients, parameters)

    @property
    def _places(self) -> dict[str, int]:
        places = self._learned.rate_places()
        assert places is not None
        return places

    @property
    def _like(self) -> Tensor:
        return self._learned.get_parameter("learning_rate").detach()

    def _slope(self, loss: Tensor, gradients: dict[str, Tensor | None], parameters: dict[str, Tensor]) -> Slope:
        return slope(loss, gradients, self._follow(parameters).of(parameters), self._places, self._like)

    def after_step(self) -> None:
        """The optimizer has stepped."""
        if self._way is not None and self._way.step():  # finding the parameters takes longer than looking at a few
            parameters = self._owned()
            self._follow(parameters).look(parameters)

    def needs_judge(self, *, is_time: bool) -> bool:
        """Whether held-out data have to judge the state after this step.

        Args:
            is_time: Whether a meta-update follows it.
        """
        return is_time and self._settings.meta_data != "train"

    def judge(self, judge: Window) -> None:
        """Evaluate the meta-loss where the run is now or, early on, a little back, on copies of its buffers."""
        parameters, buffers = owned_tensors(self._module, live_optimizer(self._trainer))
        planned = planned_steps(self._trainer)
        part = part_back(self._trainer.global_step, planned, passes(self._trainer, planned))
        place = self._follow(parameters).towards_average(parameters, part) if part else parameters

        def evaluate() -> Slope:
            with invisible(self._trainer, self._module, self._look_ahead.seed + self._trainer.global_step):
                step = self._look_ahead.inner_step(second_order=False)
                loss, found = step.judge(Iterate(place, {}, buffers), judge)
            return self._slope(loss, dict(zip(parameters, found, strict=True)), parameters)

        try:
            self._held_out = unless_diverged(evaluate, self._processes)
        except StepRefusedError:
            self._held_out = None  # the run goes on: what it would not train on, it is not judged by

    def rehearse(self, judge: Window) -> None:
        """Have this batch judge the start, so that what fails fails before the first step.

        Raises:
            NegativeLossError: The objective takes the logarithm of a negative loss.
        """
        self.judge(judge)
        if self._held_out is not None:
            self._meta_gradient(self._held_out)
        self._drop_judgement()

    def _meta_gradient(self, found: Slope) -> MetaGradient:
        return displacement(found, self._like, self._settings.objective, self._memory, self._reason, self._training)

    def drop(self, *, tangents: bool = False) -> None:
        """There is nothing to judge by.

        Args:
            tangents: The training goes on from somewhere else, too.
        """
        self._drop_judgement()
        if tangents:
            self._way = self._offsets = None

    def result(self) -> MetaGradient:
        """The meta-gradient.

        Raises:
            WindowIncompleteError: There is none.
        """
        found = self._training if self._settings.meta_data == "train" else self._held_out
        self._offsets = self._like.clone()
        if found is None:
            self._drop_judgement()
            raise WindowIncompleteError(
                "training_step returned or raised nothing that could be judged: no meta-gradient, the rate was kept."
            )
        result = self._meta_gradient(found)
        self._drop_judgement()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The average of past parameters; nothing if it is too large to save."""
        if self._way is None:
            return {}
        state = self._way.state_dict()
        size = sum(tensor.numel() * tensor.element_size() for tensor in state["average"].values())
        if size > LARGEST_SAVED:
            return {}
        rest: dict[str, Any] = {} if self._offsets is None else {"offsets": self._offsets}
        if self._training is not None:  # saved between the optimizer's step and the meta-update after it
            rest["training"] = vars(self._training)
        return {"names": self._way.names, **state, **rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, if it was saved for the same parameters; else the displacement begins anew."""
        parameters = self._owned()
        if "average" in state and state["names"] == list(parameters):  # another estimator has names of its own
            self._follow(parameters).load_state_dict(state)
            self._offsets = state["offsets"].to(self._like) if "offsets" in state else None
            device = self._module.device  # checkpoints are loaded on the CPU
            saved = {name: tensor.to(device) for name, tensor in state.get("training", {}).items()}
            self._training = Slope(**saved) if saved else None
