"""What every learned optimizer is: meta-parameters, and the ordinary optimizer that they make."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.functional import InnerOptimizer
from lightning_l2l.learned import file
from lightning_l2l.learned.torch_optimizer import LearnedTorchOptimizer

if TYPE_CHECKING:
    from typing_extensions import Self


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
        elements_at_once: Tensors that do not depend on each other are updated as one vector of at most so many elements
            (or one tensor): about what the caches hold of the hundred features and activations that each has.
    """

    horizon: int | None = None
    tasks: str = ""
    elements_at_once: int = 2**16

    @abc.abstractmethod
    def transformation(self) -> GradientTransformation:
        """The optimizer that the present meta-parameters make.

        Returns:
            A torchopt transformation over dictionaries of tensors by name, differentiable in
            :meth:`parameters`. It is made anew for each inner step, so making it must be cheap.
        """

    def update_(
        self, gradients: Mapping[str, Tensor | None], state: Any, parameters: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor | None], Any]:
        """The transformation's update where nothing will be differentiated, for a live optimizer.

        A subclass may do it faster and change ``state`` in place; the updates are the same up to rounding.

        Args:
            gradients: By name; ``None`` only where :attr:`accepts_missing_gradients`.
            state: The transformation's.
            parameters: By name.

        Returns:
            What is added to the parameters, and the state to go on with.
        """
        found: tuple[Any, Any] = self.transformation().update(gradients, state, params=parameters, inplace=False)
        return found

    def attach(self, inner: InnerOptimizer) -> Self:
        """Tells which optimizer this one sits on; called again whenever that one's hyperparameters have changed.

        Args:
            inner: The functional form of the optimizer that trains. The default ignores it.

        Returns:
            The learned optimizer itself.
        """
        return self

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

        A large set of tensors may then be updated in chunks, and tensors may join later. ``False`` is always right.
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
        """Sets meta-parameters in place, by name; those that are not named keep their values."""
        for name, parameter in self.named_parameters():
            if name in values:
                parameter.copy_(values[name])

    def project_(self) -> None:  # noqa: B027  (a default, not a forgotten implementation)
        """Puts the meta-parameters back into their bounds, in place; called after each meta-update."""

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
            >>> from lightning_l2l import SmallFCOptimizer
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = SmallFCOptimizer().as_torch_optimizer(model.parameters())
            >>> model(torch.ones(2, 3)).square().mean().backward()
            >>> optimizer.step()
        """
        return LearnedTorchOptimizer(params, self, lr=lr, weight_decay=weight_decay)

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
        name = type(self).__name__
        if _CLASSES.get(name) is not type(self):
            raise TypeError(
                f"{name} is not registered, so nobody could load the file. Decorate the class with "
                "lightning_l2l.learned.register_learned_optimizer."
            )
        file.write(file.Content(name, self.configuration(), self.state_dict(), self.horizon, self.tasks), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`save` wrote; runs no code from the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a file of ours, incomplete, changed, of a newer format, of an unknown class or of
                another class than this one, or its weights do not fit its configuration.
        """
        content = file.read(path)
        known = _CLASSES.get(content.class_name)
        if known is None:
            raise ValueError(
                f"{path} holds a {content.class_name!r}, which is not known here. Known: {', '.join(sorted(_CLASSES))}."
                " If the class is yours, import its module and decorate it with "
                "lightning_l2l.learned.register_learned_optimizer."
            )
        if not issubclass(known, cls):
            raise ValueError(f"{path} holds a {known.__name__}, not a {cls.__name__}; LearnedOptimizer.load reads any.")
        return known._of(content, path)

    @classmethod
    def pretrained(cls, name: str) -> Self:
        """A learned optimizer that comes with the package, meta-trained and ready for use.

        Args:
            name: ``"tensorwise"``: a :class:`~lightning_l2l.TensorwiseOptimizer`, which says what it was trained on, by
                which command, and how it compares with AdamW.

        Raises:
            ValueError: There is none of this name.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = LearnedOptimizer.pretrained("tensorwise").as_torch_optimizer(model.parameters(), lr=1.0)
            >>> schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1000)
        """
        known = {path.stem: path for path in _WEIGHTS.glob("*.safetensors")}
        if name not in known:
            there = ", ".join(sorted(known))
            raise ValueError(f"There is no pretrained {name!r}; these come with the package: {there}.")
        return cls.load(known[name])

    @classmethod
    def _of(cls, content: file.Content, path: Any) -> Self:
        try:
            # Without memory first: the sizes in the header are anybody's, and must be those of the tensors.
            with torch.device("meta"):
                expected = _shapes(cls.from_configuration(content.configuration).state_dict())
            found = _shapes(content.tensors)
            if expected == found:
                with torch.random.fork_rng(devices=[]):
                    learned = cls.from_configuration(content.configuration)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{path} has a configuration that this version's {cls.__name__} does not take: {error}"
            ) from error
        if expected != found:
            wrong = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ValueError(
                f"{path} does not fit together: its configuration makes a {cls.__name__} with shape "
                f"{expected.get(wrong, 'nothing')} for {wrong!r}, but the file has {found.get(wrong, 'nothing')}."
            )
        learned.load_state_dict(content.tensors, assign=True)
        learned.horizon, learned.tasks = content.horizon, content.tasks
        return learned


# In the wheel as files: nothing here is imported from an archive.
_WEIGHTS = Path(__file__).parent / "weights"
_CLASSES: dict[str, type[LearnedOptimizer]] = {}
_Class = TypeVar("_Class", bound=type[LearnedOptimizer])


def register_learned_optimizer(cls: _Class) -> _Class:
    """Lets files name a class of yours; usable as a decorator.

    The class is known by its bare name. Its ``configuration()`` must return the arguments of its constructor as
    strings, numbers, booleans, lists and dictionaries. Register before loading, wherever the class is defined.

    Args:
        cls: A subclass of :class:`~lightning_l2l.LearnedOptimizer`.

    Returns:
        The class itself.

    Raises:
        TypeError: It is no such class.
        ValueError: Another class has the same name.

    Example:
        >>> import torchopt
        >>> @register_learned_optimizer
        ... class MyDescent(LearnedOptimizer):
        ...     def configuration(self):
        ...         return {}
        ...     def transformation(self):
        ...         return torchopt.sgd(lr=0.1)
    """
    if not (isinstance(cls, type) and issubclass(cls, LearnedOptimizer)):
        raise TypeError(f"register_learned_optimizer needs a subclass of LearnedOptimizer, got {cls!r}.")
    known = _CLASSES.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"The name {cls.__name__!r} is taken by {known.__module__}.{known.__qualname__}: files could not tell "
            "the two apart. Rename your class."
        )
    _CLASSES[cls.__name__] = cls
    return cls


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
