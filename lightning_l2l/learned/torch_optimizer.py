"""A learned optimizer as a ``torch.optim.Optimizer``, for any training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.cohorts import Cohort, divided
from lightning_l2l.learned.in_use import CohortInUse, OptimizerInUse


class LearnedTorchOptimizer(torch.optim.Optimizer):
    """What :meth:`LearnedOptimizer.as_torch_optimizer` returns.

    A step computes the update that the learned optimizer makes of gradients, parameters and its state, multiplies
    it by the group's ``lr`` (1 by default) and adds it; with ``weight_decay`` the parameter first shrinks by the
    fraction ``lr * weight_decay``. Parameters whose gradient is ``None`` are left alone; those that were frozen or
    did not exist at earlier steps join with a fresh state at their first step.

    The meta-parameters are not among its parameters and are not changed by ``step``. They are part of
    ``state_dict``, with all that the next step depends on: a run that is resumed goes on to the last bit. Loading a
    state therefore puts the meta-parameters of then into the learned optimizer.

    Args:
        params: Parameters, named parameters or parameter groups, as for any torch optimizer.
        learned: The learned optimizer. It is not copied: meta-training it changes what this optimizer does.
        lr: A factor on the learned step; any scheduler may change it.
        weight_decay: Decoupled weight decay, relative to ``lr``.

    Raises:
        TypeError: ``learned`` is no learned optimizer.
        ValueError: A negative number, or the meta-parameters are among the parameters.
    """

    def __init__(
        self, params: Iterable[Any], learned: LearnedOptimizer, lr: float = 1.0, weight_decay: float = 0.0
    ) -> None:
        """See the class."""
        if not isinstance(learned, LearnedOptimizer):
            raise TypeError(f"learned must be a LearnedOptimizer, got {type(learned).__name__}.")
        self.learned = learned
        self._cohorts: list[Cohort] = []
        self._parameters: dict[str, Tensor] = {}
        self._groups: dict[str, int] = {}
        self._steps = 0
        self._warned = False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as for any torch optimizer; they start with a fresh state.

        Raises:
            ValueError: A negative number, or the meta-parameters are among the parameters.
        """
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        meta = {id(parameter) for parameter in self.learned.parameters()}
        if any(id(parameter) in meta for parameter in group["params"]):
            self.param_groups.pop()
            raise ValueError(
                "The parameters to train contain the learned optimizer's own: it is probably an attribute of the "
                "module whose parameters() were passed, so torch made it a submodule. Keep it elsewhere, for example "
                "in a tuple, self.learned = (learned,), or load it in configure_optimizers."
            )
        for name in ("lr", "weight_decay"):
            if not float(group[name]) >= 0:
                self.param_groups.pop()
                raise ValueError(f"{name}={group[name]} must not be negative.")
        start = len(self._parameters)
        names = group.get("param_names") or [str(start + position) for position in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            self._parameters[name], self._groups[name] = parameter, index

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients of the parameters that have one.

        Args:
            closure: Clears the gradients, computes loss and gradients again, and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._enrol()
        transformation = self.learned.transformation()
        for cohort in self._cohorts:
            parameters = {key: self._parameters[key] for key in cohort.keys}
            gradients = {key: parameter.grad for key, parameter in parameters.items()}
            if all(gradient is None for gradient in gradients.values()):
                continue
            given: Mapping[str, Tensor | None] = gradients
            if not self.learned.accepts_missing_gradients:
                given = {key: torch.zeros_like(parameters[key]) if g is None else g for key, g in gradients.items()}
            updates, cohort.state = transformation.update(given, cohort.state, params=parameters, inplace=False)
            self._apply(parameters, gradients, updates)
        self._steps += 1
        self._warn_beyond_horizon()
        return loss

    def _apply(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], updates: Mapping[str, Any]
    ) -> None:
        moving: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for key, gradient in gradients.items():
            if gradient is None:
                continue
            if updates.get(key) is None:
                raise ValueError(
                    f"The learned optimizer has no update for parameter {key!r}, which would stay where it is for "
                    "ever. A LearnedHyperparameters that was attached to named parameters needs the names: "
                    "as_torch_optimizer(model.named_parameters())."
                )
            movers, moves = moving.setdefault(self._groups[key], ([], []))
            movers.append(parameters[key])
            moves.append(updates[key])
        for index, (movers, moves) in moving.items():
            lr, decay = float(self.param_groups[index]["lr"]), float(self.param_groups[index]["weight_decay"])
            if decay:
                torch._foreach_mul_(movers, 1.0 - lr * decay)
            torch._foreach_add_(movers, moves, alpha=lr)

    def _enrol(self) -> None:
        """Cohorts for trainable parameters that are in none yet."""
        enrolled = {key for cohort in self._cohorts for key in cohort.keys}
        if len(enrolled) == len(self._parameters):
            return
        new = [key for key, p in self._parameters.items() if key not in enrolled and p.requires_grad]
        if new and enrolled and not self.learned.independent_tensors:
            raise ValueError(
                f"{type(self.learned).__name__} updates all parameters together, so parameters cannot join after the "
                "first step. Pass and unfreeze all of them at the beginning, or declare independent_tensors if each "
                "tensor's update depends on that tensor alone."
            )
        transformation = self.learned.transformation()
        for keys in divided(new, self._parameters, self.learned.independent_tensors):
            state = transformation.init({key: self._parameters[key].detach() for key in keys})
            self._cohorts.append(Cohort(keys, state))

    def _warn_beyond_horizon(self) -> None:
        horizon = self.learned.horizon
        if horizon is not None and self._steps > horizon and not self._warned:
            self._warned = True
            warnings.warn(
                f"This {type(self.learned).__name__} was meta-trained on runs of {horizon} steps and is now in step "
                f"{self._steps}. What it does from here on was never trained: watch the loss, or lower lr towards "
                "the end.",
                stacklevel=3,
            )

    def mirror(self, named_parameters: Iterable[tuple[str, Tensor]]) -> OptimizerInUse:
        """What the next steps would do, as a pure function; for meta-training in the user's own run.

        Rates and decays are read now: mirror again after a scheduler has moved them.

        Args:
            named_parameters: The module's ``named_parameters()``.

        Returns:
            A learned optimizer with the same meta-parameters (the very tensors), for
            :func:`lightning_l2l.meta_gradient`, with :meth:`read_state` as its state.

        Raises:
            ValueError: A trainable parameter is not among ``named_parameters``.
        """
        self._enrol()
        names: dict[int, str] = {}
        for name, parameter in named_parameters:
            names.setdefault(id(parameter), name)
        for key in (key for cohort in self._cohorts for key in cohort.keys):
            if id(self._parameters[key]) not in names:
                raise ValueError(
                    f"Parameter {key!r} of the optimizer, shape {tuple(self._parameters[key].shape)}, is not among "
                    "the named parameters, so an unroll could not reach it. Pass the named_parameters() of the "
                    "module that holds all parameters of the optimizer."
                )
        cohorts = []
        for cohort in self._cohorts:
            groups = [self.param_groups[self._groups[key]] for key in cohort.keys]
            in_module = tuple(names[id(self._parameters[key])] for key in cohort.keys)
            rates = tuple(float(group["lr"]) for group in groups)
            decays = tuple(float(group["lr"]) * float(group["weight_decay"]) for group in groups)
            cohorts.append(CohortInUse(cohort.keys, in_module, rates, decays))
        return OptimizerInUse(self.learned, cohorts)

    def read_state(self) -> dict[str, Any]:
        """The state that :meth:`mirror`'s transformation takes. It is shared, but never changed in place."""
        self._enrol()
        return {str(number): cohort.state for number, cohort in enumerate(self._cohorts)}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as plain tensors, numbers, strings, lists and dictionaries."""
        state = super().state_dict()
        meta = {name: tensor.detach().clone() for name, tensor in self.learned.state_dict().items()}
        cohorts = [cohort.state_dict() for cohort in self._cohorts]
        own = {"class": type(self.learned).__name__, "meta_parameters": meta, "steps": self._steps}
        return {**state, "learned": {**own, "cohorts": cohorts}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another optimizer stood, with its meta-parameters.

        Raises:
            ValueError: The state is of another optimizer, of another learned optimizer, or of other parameters.
        """
        saved = state_dict.get("learned")
        if saved is None:
            raise ValueError(
                "This is the state of another optimizer: it has no entry 'learned'. A run that was begun with, say, "
                "Adam cannot be resumed with a learned optimizer; load the model's weights alone."
            )
        unknown = [key for cohort in saved["cohorts"] for key in cohort["keys"] if key not in self._parameters]
        if unknown:
            raise ValueError(
                f"The state has parameters that this optimizer does not have: {', '.join(unknown[:3])}. Resume with "
                "the same parameters, in the same form (named or not)."
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "learned"})
        try:
            self.learned.load_state_dict(saved["meta_parameters"])
        except RuntimeError as error:
            raise ValueError(
                f"The state belongs to a {saved['class']} with other meta-parameters than this "
                f"{type(self.learned).__name__}: {error}."
            ) from error
        self._steps = saved["steps"]
        transformation = self.learned.transformation()
        self._cohorts = [Cohort.restored(cohort, transformation, self._parameters) for cohort in saved["cohorts"]]

    def __getstate__(self) -> dict[str, Any]:
        """Also what torch does not know of, for copying and pickling."""
        own = ("learned", "_cohorts", "_parameters", "_groups", "_steps", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}
