"""The live estimator in a Lightning run: which hooks tell it what, and where it cannot be used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_l2l.exact.estimators import LiveUnroll
from lightning_l2l.exact.inner_step import Iterate
from lightning_l2l.exact.plan import LARGEST_FORWARD, scalars
from lightning_l2l.exact.processes import Processes, together
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.scaled import ScaledVector
from lightning_l2l.exact.second_order import lacks_second_derivative
from lightning_l2l.functional import read_state
from lightning_l2l.host.applied import AppliedValues
from lightning_l2l.host.guarded import StepRefusedError, unless_diverged
from lightning_l2l.host.in_place import LearnedInPlace
from lightning_l2l.host.isolation import invisible, is_compiled
from lightning_l2l.host.look_ahead import LookAhead
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.trainer import live_optimizer, loss_scale
from lightning_l2l.host.training_step import Window, owned_tensors
from lightning_l2l.learned import LearnedOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class WindowIncompleteError(Exception):
    """A step of the window was not seen, so there is no meta-gradient."""


# Tangents up to this many bytes go into checkpoints, so that a run resumes exactly within a window.
LARGEST_SAVED = 64 * 2**20


def live_obstacle(
    trainer: pl.Trainer, module: nn.Module, learned: LearnedOptimizer, applied: AppliedValues | LearnedInPlace
) -> str:
    """Why the training's own graph cannot be differentiated twice without the run noticing; ``""`` if it can.

    Args:
        trainer: The Trainer.
        module: The user's module.
        learned: The learned optimizer, attached.
        applied: What it makes of the live optimizer's values.
    """
    if isinstance(applied, LearnedInPlace):
        return f"{type(learned).__name__} has {scalars(learned)} meta-parameters, each of which would need a tangent"
    if getattr(module, "_compiler_ctx", None) is not None or any(is_compiled(child) for child in module.modules()):
        return "compiled code cannot be differentiated twice"
    hooked = [name for name, child in module.named_modules() if child._backward_hooks or child._backward_pre_hooks]
    hooked += [name for name, parameter in module.named_parameters() if parameter._backward_hooks]
    if hooked:
        return f"the backward hooks of the module ({hooked[0] or 'its own'}) would run more often"
    if getattr(trainer.strategy.model, "static_graph", False):
        return "DDP with static_graph=True counts the backward passes"
    if torch.cuda.is_initialized() and any(isinstance(child, nn.RNNBase) for child in module.modules()):
        return "cuDNN's recurrent networks cannot be differentiated twice"
    return ""


def prefers_live(learned: LearnedOptimizer) -> bool:
    """Whether ``estimator="auto"`` should be live where a displacement does not do and nothing is in its way."""
    return scalars(learned) <= LARGEST_FORWARD


class LiveSteps:
    """Watches the last steps before each meta-update.

    Args:
        trainer: The Trainer.
        module: The user's LightningModule.
        look_ahead: What knows the user's step, the clipping and the held-out data.
        settings: What the user asked for.
        steps: The length of a window.
        reason: Why this estimator was chosen.
        processes: The other processes of the run.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        look_ahead: LookAhead,
        settings: Settings,
        steps: int,
        reason: str,
        processes: Processes | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._look_ahead = look_ahead
        self._settings = settings
        self._steps = steps
        self._reason = reason
        self._processes = processes
        self._unroll: LiveUnroll | None = None
        self._carried: list[ScaledVector] | None = None
        self._names: list[str] = []
        self._scaled = False

    @property
    def steps(self) -> int:
        """The length of a window."""
        return self._steps

    def before_batch(self, steps_to_go: int, *, first: bool) -> None:
        """A training batch begins.

        Args:
            steps_to_go: Optimizer steps until the meta-update, this one included.
            first: Whether an optimizer step begins with it.
        """
        if first and steps_to_go == self._steps:
            self._open()
        elif self._unroll is not None and first and self._unroll.taken != self._steps - steps_to_go:
            self._unroll = None  # a step is missing: it was skipped, or the epoch ended in the middle of it

    def _open(self) -> None:
        names = list(self._owned())
        if names != self._names:  # layers were frozen or thawed since
            self._names, self._carried = names, None
        self._unroll = LiveUnroll(self._look_ahead.inner_step(), self._settings.objective, self._steps, self._carried)

    def _owned(self) -> dict[str, Tensor]:
        return owned_tensors(self._module, live_optimizer(self._trainer))[0]

    def see_loss(self, loss: Tensor) -> None:
        """Lightning is about to go backward from this loss."""
        if self._unroll is not None:
            parameters = self._owned()
            if list(parameters) != self._names:
                self._unroll = None
                return
            scale = loss_scale(self._trainer)
            self._scaled = scale != 1.0
            self._unroll.see_loss(loss, parameters, scale)

    def trial(self, loss: Tensor) -> str | None:
        """Differentiate the first loss of the fit twice, so that what fails fails before the first step.

        Returns:
            What cannot be differentiated twice, on this process or another.
        """
        parameters = list(self._owned().values())
        missing = None
        with together(self._processes):
            try:
                first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                moving = [gradient for gradient in first if gradient is not None and gradient.requires_grad]
                if moving:
                    ones = [torch.ones_like(gradient) for gradient in moving]
                    torch.autograd.grad(moving, parameters, ones, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                missing = lacks_second_derivative(error)
                if missing is None:
                    raise
        if self._processes is not None and self._processes.any(missing is not None):
            missing = missing or "something on another process"
        return missing

    def before_step(self) -> None:
        """The gradients are there, not clipped yet, and the optimizer is about to step."""
        if self._unroll is None:
            return
        parameters, buffers = owned_tensors(self._module, live_optimizer(self._trainer))
        if list(parameters) != self._names:
            self._unroll = None
            return
        state = read_state(live_optimizer(self._trainer), self._module.named_parameters(), copy=False)
        iterate = Iterate(parameters, state, buffers)
        # Not if the optimizer was made anew, or the step returned None, on whichever process.
        fits = self._unroll.fits(iterate)
        if not fits if self._processes is None else self._processes.any(not fits):
            self._unroll = None
            return
        self._unroll.before_step(iterate, {name: parameter.grad for name, parameter in parameters.items()})

    def after_step(self) -> None:
        """The optimizer has stepped."""
        if self._unroll is not None and self._unroll.has_pending_step:
            self._unroll.after_step()

    def needs_judge(self, *, is_time: bool) -> bool:
        """Whether the state after this step has to be judged; a step that the scaler left out ends the window.

        Args:
            is_time: Whether a meta-update follows it; some objectives count steps before that one.
        """
        if self._unroll is not None and self._unroll.has_pending_step:
            self._unroll = None
        return self._unroll is not None and self._unroll.is_due

    def judge(self, judge: Window) -> None:
        """Evaluate the meta-loss where the run is now, on copies of its buffers."""
        assert self._unroll is not None
        parameters, buffers = owned_tensors(self._module, live_optimizer(self._trainer))
        unroll = self._unroll

        def evaluate() -> None:
            with invisible(self._trainer, self._module, self._look_ahead.seed + self._trainer.global_step):
                unroll.judge(Iterate(parameters, {}, buffers), judge)

        try:
            unless_diverged(evaluate, self._processes)
        except StepRefusedError:
            self.drop()  # the run goes on: what it would not train on, it is not judged by

    def drop(self, *, tangents: bool = False) -> None:
        """There is nothing to judge this window by.

        Args:
            tangents: What would be carried into the next one is worth nothing either.
        """
        self._unroll = None
        if tangents:
            self._carried = None

    def result(self) -> MetaGradient:
        """The window's meta-gradient.

        Raises:
            WindowIncompleteError: There is none, or it overflowed for the scaling of the loss.
            NegativeLossError: The objective takes the logarithm of a negative loss.
        """
        unroll, self._unroll = self._unroll, None
        if unroll is None or unroll.taken != self._steps:
            raise WindowIncompleteError(
                "A step of the window was skipped, or not seen since the run was resumed within it: no meta-gradient, "
                "the rate was kept."
            )
        if self._settings.carry > 0:
            shift = math.log2(self._settings.carry)
            self._carried = [ScaledVector(t.tensors, t.exponent + shift) for t in unroll.tangents]
        result = unroll.result(self._reason)
        if not result.usable:
            self._carried = None
            if self._scaled and result.diagnostics.overflow:
                raise WindowIncompleteError(
                    "The scaled loss of half precision left the number range when it was differentiated twice: no "
                    "meta-gradient, the rate was kept. The scale comes down by itself, or takes a smaller init_scale."
                )
        return result

    def state_dict(self) -> dict[str, Any]:
        """Where the window stands; nothing if its tangents are too large to save."""
        state: dict[str, Any] = {"names": list(self._names)}
        if self._unroll is not None and self._unroll.taken:
            state["unroll"] = self._unroll.state_dict()
        if self._carried is not None:
            state["carried"] = [{"tensors": list(t.tensors), "exponent": t.exponent} for t in self._carried]
        tangents = state.get("carried", []) + state.get("unroll", {}).get("tangents", [])
        size = sum(tensor.numel() * tensor.element_size() for tangent in tangents for tensor in tangent["tensors"])
        return state if size <= LARGEST_SAVED else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, if it was saved for the same parameters."""
        if not state or state["names"] != list(self._owned()):
            return
        device = self._module.device
        self._names = list(state["names"])
        if "carried" in state:
            self._carried = [
                ScaledVector([tensor.to(device) for tensor in t["tensors"]], t["exponent"].to(device))
                for t in state["carried"]
            ]
        if "unroll" in state:
            self._open()
            assert self._unroll is not None
            self._unroll.load_state_dict(state["unroll"], device)
