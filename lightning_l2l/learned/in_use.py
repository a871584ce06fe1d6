"""The next steps of a live learned optimizer as a pure function: what an unroll in the user's own run needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.torch_optimizer import LearnedTorchOptimizer, copied


class _Placed(NamedTuple):
    """A parameter of a chunk: its names in optimizer and module, and by how much its step is scaled and it shrinks."""

    key: str
    name: str
    rate: float
    decay: float


class OptimizerInUse(LearnedOptimizer):
    """What the next steps of a live optimizer would do, differentiable in the meta-parameters.

    Its meta-parameters *are* those of the learned optimizer in use (the very tensors, under the prefix ``learned.``),
    so a meta-update changes what the live optimizer does. Its state is that of :meth:`read_state`. Rates and decays
    are read once, here: make another one after a scheduler has moved them.

    Args:
        optimizer: What :meth:`LearnedOptimizer.as_torch_optimizer` returned.
        named_parameters: The module's ``named_parameters()``.

    Raises:
        ValueError: A trainable parameter of the optimizer is not among ``named_parameters``.

    Example:
        >>> import torch
        >>> from lightning_l2l import SmallFCOptimizer, meta_gradient
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = SmallFCOptimizer().as_torch_optimizer(model.parameters())
        >>> in_use = OptimizerInUse(optimizer, model.named_parameters())
        >>> def loss(params, batch):
        ...     return (batch @ params["weight"].T).square().mean()
        >>> batch, parameters = torch.ones(3, 2), dict(model.named_parameters())
        >>> meta_gradient(loss, parameters, in_use, [batch] * 2, batch, state=in_use.read_state()).usable
        True
    """

    def __init__(self, optimizer: LearnedTorchOptimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        assert isinstance(optimizer.learned, LearnedOptimizer)
        self.learned = optimizer.learned
        self._optimizer = (optimizer,)
        names: dict[int, str] = {}
        for name, parameter in named_parameters:
            names.setdefault(id(parameter), name)
        self._chunks: list[list[_Placed]] = []
        for chunk in optimizer.chunks():
            placed = []
            for key in chunk.keys:
                parameter, group = optimizer.placed(key)
                if id(parameter) not in names:
                    raise ValueError(
                        f"Parameter {key!r} of the optimizer, shape {tuple(parameter.shape)}, is not among the named "
                        "parameters, so an unroll could not reach it. Pass the named_parameters() of the module that "
                        "holds all parameters of the optimizer."
                    )
                rate, decay = float(group["lr"]), float(group["weight_decay"])
                placed.append(_Placed(key, names[id(parameter)], rate, rate * decay))
            self._chunks.append(placed)

    def read_state(self) -> dict[str, Any]:
        """A copy of the live optimizer's state now, by the number of the chunk."""
        return {str(number): copied(chunk.state) for number, chunk in enumerate(self._optimizer[0].chunks())}

    @property
    def accepts_missing_gradients(self) -> bool:
        """Whether the learned optimizer does."""
        return self.learned.accepts_missing_gradients

    @property
    def scale_equivariant(self) -> bool:
        """Whether the learned optimizer is: rates and decays multiply."""
        return self.learned.scale_equivariant

    def scaled_rate(self, factor: float) -> dict[str, Tensor] | None:
        """Those of the learned optimizer, under the prefix."""
        found = self.learned.scaled_rate(factor)
        return None if found is None else {f"learned.{name}": value for name, value in found.items()}

    def project_(self) -> None:
        """The learned optimizer's own."""
        self.learned.project_()

    def transformation(self) -> GradientTransformation:
        """The optimizer, in torchopt's protocol; parameters in no chunk are not moved."""
        transformation = self.learned.transformation()

        def init(params: Mapping[str, Tensor]) -> dict[str, Any]:
            return {
                str(number): transformation.init({one.key: params[one.name] for one in chunk})
                for number, chunk in enumerate(self._chunks)
            }

        def update(
            updates: Any, state: Any, *, params: Any = None, inplace: bool = True
        ) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
            if params is None:
                raise ValueError("The update needs the parameters themselves: pass params=... to update().")
            moved: dict[str, Tensor | None] = dict.fromkeys(params)
            following = dict(state)
            for number, chunk in enumerate(self._chunks):
                gradients = {one.key: updates.get(one.name) for one in chunk}
                if all(gradient is None for gradient in gradients.values()):
                    continue  # as the live optimizer does
                parameters = {one.key: params[one.name] for one in chunk}
                found, following[str(number)] = transformation.update(
                    gradients, state[str(number)], params=parameters, inplace=False
                )
                for one in chunk:
                    delta = found.get(one.key)
                    if delta is not None:
                        delta = delta if one.rate == 1 else one.rate * delta
                        moved[one.name] = delta if one.decay == 0 else delta - one.decay * params[one.name]
            return moved, following

        return GradientTransformation(init, update)
