"""A learned optimizer as a ``torch.optim.Optimizer``, for any training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optree
import torch
from torch import Tensor, nn
from torchopt.base import GradientTransformation


class Learned(Protocol):
    """What is needed of a :class:`~lightning_l2l.LearnedOptimizer`, which is a module besides."""

    horizon: int | None
    elements_at_once: int

    def transformation(self) -> GradientTransformation: ...  # noqa: D102

    def update_(self, gradients: Any, state: Any, parameters: Any) -> tuple[Mapping[str, Any], Any]: ...  # noqa: D102

    @property
    def accepts_missing_gradients(self) -> bool: ...  # noqa: D102

    @property
    def independent_tensors(self) -> bool: ...  # noqa: D102

    def parameters(self) -> Iterable[nn.Parameter]: ...  # noqa: D102

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...  # noqa: D102


@dataclass
class Chunk:
    """Parameters that are updated together.

    Attributes:
        keys: Their names in the optimizer.
        state: The state of the learned optimizer's transformation for them.
    """

    keys: tuple[str, ...]
    state: Any


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
        ValueError: A negative number, or the meta-parameters are among the parameters.
    """

    def __init__(self, params: Iterable[Any], learned: Learned, lr: float = 1.0, weight_decay: float = 0.0) -> None:
        self.learned = learned
        self._chunks: list[Chunk] = []
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
        for chunk in self.chunks():
            parameters = {key: self._parameters[key] for key in chunk.keys}
            gradients: dict[str, Tensor | None] = {key: parameter.grad for key, parameter in parameters.items()}
            moving = [key for key, gradient in gradients.items() if gradient is not None]
            if not moving:
                continue
            if not self.learned.accepts_missing_gradients:
                gradients = {key: torch.zeros_like(parameters[key]) if g is None else g for key, g in gradients.items()}
            updates, chunk.state = self.learned.update_(gradients, chunk.state, parameters)
            self._apply(moving, updates)
        self._steps += 1
        self._warn_beyond_horizon()
        return loss

    def _apply(self, moving: Sequence[str], updates: Mapping[str, Any]) -> None:
        by_group: dict[int, list[str]] = {}
        for key in moving:
            if updates.get(key) is None:
                raise ValueError(
                    f"The learned optimizer has no update for parameter {key!r}, which would stay where it is for "
                    "ever. A LearnedHyperparameters that was attached to named parameters needs the names: "
                    "as_torch_optimizer(model.named_parameters())."
                )
            by_group.setdefault(self._groups[key], []).append(key)
        for index, keys in by_group.items():
            lr, decay = float(self.param_groups[index]["lr"]), float(self.param_groups[index]["weight_decay"])
            parameters = [self._parameters[key] for key in keys]
            if decay:
                torch._foreach_mul_(parameters, 1.0 - lr * decay)
            torch._foreach_add_(parameters, [updates[key] for key in keys], alpha=lr)

    def chunks(self) -> list[Chunk]:
        """The parameters that are updated together, with their states; a new one for those that are in none yet.

        A step may change their states in place.

        Raises:
            ValueError: Parameters join late, and the learned optimizer updates all of them together.
        """
        known = {key for chunk in self._chunks for key in chunk.keys}
        if len(known) == len(self._parameters):
            return self._chunks
        new = [key for key, p in self._parameters.items() if key not in known and p.requires_grad]
        if new and known and not self.learned.independent_tensors:
            raise ValueError(
                f"{type(self.learned).__name__} updates all parameters together, so parameters cannot join after the "
                "first step. Pass and unfreeze all of them at the beginning, or declare independent_tensors if each "
                "tensor's update depends on that tensor alone."
            )
        transformation = self.learned.transformation()
        for keys in self._divided(new):
            state = transformation.init({key: self._parameters[key].detach() for key in keys})
            self._chunks.append(Chunk(keys, state))
        return self._chunks

    def _divided(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """In chunks that are on one device and not too large, if it makes no difference to the update."""
        if not self.learned.independent_tensors:
            return [tuple(keys)] if keys else []
        chunks: list[list[str]] = []
        filling: dict[torch.device, tuple[list[str], int]] = {}
        largest = self.learned.elements_at_once
        for key in keys:
            parameter = self._parameters[key]
            device, size = parameter.device, parameter.numel()
            names, elements = filling.get(device, ([], largest))
            if elements + size > largest:
                chunks.append([key])
                if 2 * size <= largest:  # small ones may still join it
                    filling[device] = (chunks[-1], size)
            else:
                names.append(key)
                filling[device] = (names, elements + size)
        return [tuple(names) for names in chunks]

    def placed(self, key: str) -> tuple[Tensor, dict[str, Any]]:
        """The parameter that has this name in the optimizer, and its group."""
        return self._parameters[key], self.param_groups[self._groups[key]]

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

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as plain tensors, numbers, strings, lists and dictionaries."""
        own = {
            "class": type(self.learned).__name__,
            "meta_parameters": {name: tensor.detach().clone() for name, tensor in self.learned.state_dict().items()},
            "steps": self._steps,
            "chunks": [{"keys": list(chunk.keys), **_saved(copied(chunk.state))} for chunk in self._chunks],
        }
        return {**super().state_dict(), "learned": own}

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
        unknown = [key for chunk in saved["chunks"] for key in chunk["keys"] if key not in self._parameters]
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
        self._chunks = [self._restored(chunk, transformation) for chunk in saved["chunks"]]

    def _restored(self, saved: Mapping[str, Any], transformation: GradientTransformation) -> Chunk:
        parameters = {key: self._parameters[key].detach() for key in saved["keys"]}
        device = next(iter(parameters.values())).device
        state: Any = saved.get("state")
        if "leaves" in saved:
            state = optree.tree_unflatten(optree.tree_structure(transformation.init(parameters)), saved["leaves"])
        return Chunk(tuple(saved["keys"]), copied(state, device))

    def __getstate__(self) -> dict[str, Any]:
        """Also what torch does not know of, for copying and pickling."""
        own = ("learned", "_chunks", "_parameters", "_groups", "_steps", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def copied(state: Any, device: torch.device | None = None) -> Any:
    """A state that no step changes, on another device where one is given."""
    return optree.tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf, state)


def _saved(state: Any) -> dict[str, Any]:
    """A state as it is or, if it has torchopt's named tuples, which ``weights_only`` refuses, only its leaves."""
    return {"state": state} if _is_plain(state) else {"leaves": optree.tree_leaves(state)}


def _is_plain(tree: Any) -> bool:
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_plain(value) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return all(_is_plain(value) for value in tree)
    return tree is None or isinstance(tree, (Tensor, bool, int, float, str))
