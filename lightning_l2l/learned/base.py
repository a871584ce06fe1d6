"""What every learned optimizer is: meta-parameters, and the ordinary optimizer that they make."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

if TYPE_CHECKING:
    from typing_extensions import Self

    from lightning_l2l.functional import InnerOptimizer
    from lightning_l2l.learned.torch_optimizer import LearnedTorchOptimizer


class LearnedOptimizer(torch.nn.Module, abc.ABC):
    """A function from meta-parameters to an optimizer.

    The meta-parameters are this module's parameters, so they are moved, saved and optimized like any others.
    A subclass implements :meth:`transformation`; the other methods have defaults that suit an optimizer that
    stands on its own.

    Example:
        >>> import torch, torchopt
        >>> class LearnedDescent(LearnedOptimizer):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_rate = torch.nn.Parameter(torch.tensor(-2.0))
        ...     def transformation(self):
        ...         return torchopt.sgd(lr=lambda step: self.log_rate.exp())
        >>> sorted(dict(LearnedDescent().named_parameters()))
        ['log_rate']

    Attributes:
        horizon: The number of steps of the runs that it was meta-trained on; ``None`` if that does not matter.
        tasks: What it was meta-trained on, in words.
    """

    horizon: int | None = None
    tasks: str = ""

    def attach(self, inner: InnerOptimizer) -> Self:
        """Tells which optimizer this one sits on; called again whenever that one's hyperparameters have changed.

        Args:
            inner: The mirror of the optimizer that trains. The default ignores it.

        Returns:
            The learned optimizer itself.
        """
        return self

    @abc.abstractmethod
    def transformation(self) -> GradientTransformation:
        """The optimizer that the present meta-parameters make.

        Returns:
            A torchopt transformation over dictionaries of tensors by name, differentiable in
            :meth:`parameters`. It is made anew for each inner step, so making it must be cheap.
        """

    @property
    def scale_equivariant(self) -> bool:
        """Whether (parameters, gradients, state) times c give updates and new state times c, as for plain SGD.

        An unroll that leaves the number range may then be rescaled. ``False`` is always right.
        """
        return False

    @property
    def accepts_missing_gradients(self) -> bool:
        """Whether the transformation takes ``None`` for the gradient of a parameter that a loss does not depend on.

        Where ``False``, the unroll passes zeros instead: torchopt 0.7.3 with momentum never moves a parameter
        again whose gradient was ``None`` once.
        """
        return False

    @property
    def independent_tensors(self) -> bool:
        """Whether the update of a tensor depends on that tensor, its gradient and its state alone.

        A large set of tensors may then be updated in portions, and tensors may join later. ``False`` is always right.
        """
        return False

    def treated_alike(self, names: Sequence[str]) -> list[list[str]]:
        """Parameters that one vector may stand for: their tensors end to end, under the first name.

        An unroll over many small tensors is faster then. Only for a transformation that works element by element and
        whose state is a dictionary by name of dictionaries; the default, each on its own, is always right.

        Args:
            names: All parameters.
        """
        return [[name] for name in names]

    def values(self) -> list[dict[str, Any]]:
        """Hyperparameters to write into the live optimizer's groups; none, unless the subclass learns some."""
        return []

    def scaled_rate(self, factor: float) -> dict[str, Tensor] | None:
        """Meta-parameters with which the learning rate would be ``factor`` times what it is now.

        Args:
            factor: A positive number.

        Returns:
            New values by meta-parameter name, or ``None`` if no meta-parameter stands for a learning rate.
        """
        return None

    @torch.no_grad()
    def set_(self, values: Mapping[str, Tensor]) -> None:
        """Sets meta-parameters in place, by name."""
        for name, parameter in self.named_parameters():
            if name in values:
                parameter.copy_(values[name])

    def project_(self) -> None:  # noqa: B027  (a default, not a forgotten implementation)
        """Puts the meta-parameters back into their bounds, in place; called after each meta-update."""

    def configuration(self) -> dict[str, Any]:
        """The arguments that :meth:`from_configuration` makes such an optimizer from, as plain data.

        Raises:
            TypeError: The class does not say.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be saved, since it does not say how it is made: define configuration(), "
            "returning the arguments of its constructor as strings, numbers, booleans, lists and dictionaries."
        )

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """The optimizer that :meth:`configuration` describes, meta-parameters aside."""
        return cls(**configuration)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes class, arguments, meta-parameters, horizon and tasks to one safetensors file, atomically.

        Raises:
            TypeError: A class that is not registered, or a configuration that is not plain data.
            OSError: The file cannot be written.
        """
        from lightning_l2l.learned import file

        file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`save` wrote; runs no code from the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a file of ours, incomplete, changed, of a newer format, of an unknown class or of
                another class than this one, or its weights do not fit its configuration.
        """
        from lightning_l2l.learned import file

        learned = file.load(path)
        if not isinstance(learned, cls):
            raise ValueError(
                f"{path} holds a {type(learned).__name__}, not a {cls.__name__}; LearnedOptimizer.load reads any."
            )
        return learned

    def as_torch_optimizer(
        self, params: Iterable[Any], lr: float = 1.0, weight_decay: float = 0.0
    ) -> LearnedTorchOptimizer:
        """This optimizer as a ``torch.optim.Optimizer``, for ``configure_optimizers`` or any training loop.

        Args:
            params: Parameters, named parameters or parameter groups (with their own ``lr`` and ``weight_decay``).
            lr: A factor on the learned step, for schedulers.
            weight_decay: Decoupled weight decay: a parameter shrinks by the fraction ``lr * weight_decay`` each step.

        Returns:
            The optimizer; this object stays its source of meta-parameters.

        Example:
            >>> import torch
            >>> from lightning_l2l import TinyOptimizer
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = TinyOptimizer().as_torch_optimizer(model.parameters())
            >>> model(torch.ones(2, 3)).square().mean().backward()
            >>> optimizer.step()
        """
        from lightning_l2l.learned.torch_optimizer import LearnedTorchOptimizer

        return LearnedTorchOptimizer(params, self, lr=lr, weight_decay=weight_decay)
