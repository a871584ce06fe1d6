"""A long inner training, looked at window by window: what is carried on, and one way to drive every estimator.

An *episode* is one inner training. It is cut into windows of K steps, and the meta-parameters may be updated after
each. What an estimator needs from one window to the next (where the training stands, where each particle stands, what
its perturbations add up to) is a value, :class:`Episode`: it goes in, a new one comes out, nothing is hidden.

The gradients of the windows of an episode add up to an estimate of the gradient of the *sum* of the windows'
meta-objectives. For ``pes`` and ``es_single`` that estimate has no bias (of the smoothed sum, with the meta-parameters
held fixed); the others leave out what a window does to later ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torchopt.base import GradientTransformation

from lightning_l2l.exact import estimators
from lightning_l2l.exact.estimators.es import meta_parameters
from lightning_l2l.exact.estimators.over_processes import shares
from lightning_l2l.exact.estimators.particle_unroll import spread
from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Loss, Tensors
from lightning_l2l.exact.objectives import Objective, check_objective
from lightning_l2l.exact.plain_state import plain, restored
from lightning_l2l.exact.processes import Processes
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.learned.base import LearnedOptimizer

Name = Literal["auto", "forward", "reverse", "segmented", "truncated", "es", "mixed", "pes", "es_single"]

# Above this number of scalars, the noise of evolution strategies costs more than the bias of truncation, as a rule.
_LARGEST_SAMPLED = 64


@dataclass(frozen=True)
class Episode:
    """Where an inner training stands between two windows.

    Attributes:
        estimator: The estimator that carries it; never ``"auto"``.
        iterate: Parameters, optimizer state and buffers; for ``pes`` and ``es_single`` those of all particles, with the
            particle as the first dimension of every tensor.
        directions: By meta-parameter, what the particles' values are credited to: the sum of all perturbations
            so far (``pes``), the one perturbation of the episode (``es_single``). Empty for the others.
        window: How many windows are behind.
        seed: The seed of the perturbations.
    """

    estimator: str
    iterate: Iterate
    directions: Tensors
    window: int
    seed: int

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, dictionaries and tuples only: safe to save, and to load with ``weights_only``."""
        return {
            "estimator": self.estimator,
            "parameters": plain(self.iterate.parameters),
            "state": plain(self.iterate.state),
            "buffers": plain(self.iterate.buffers),
            "directions": plain(self.directions),
            "window": self.window,
            "seed": self.seed,
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], learned: LearnedOptimizer) -> Episode:
        """The episode that :meth:`state_dict` was taken of.

        Args:
            saved: What it returned.
            learned: The learned optimizer; it tells the types of its state.
        """
        parameters = dict(saved["parameters"])
        state = restored(saved["state"], learned.transformation().init(parameters))
        iterate = Iterate(parameters, state, dict(saved["buffers"])).fresh()
        return cls(saved["estimator"], iterate, dict(saved["directions"]), saved["window"], saved["seed"])


@dataclass(frozen=True)
class WindowEstimator:
    """Meta-gradients over the windows of an episode, by any estimator.

    Args:
        estimator: ``"pes"`` and ``"es_single"`` are unbiased, ``"truncated"`` is the cheapest. ``"forward"``,
            ``"reverse"``, ``"segmented"``, ``"es"`` and ``"mixed"`` compute the gradient inside a window that way and
            carry the unperturbed training on, so they are truncated too. ``"auto"`` takes ``"es_single"`` for up to 64
            scalar meta-parameters and ``"truncated"`` above.
        particles: For those with particles.
        gradient_transformation: A stateless torchopt transformation of the inner gradients, e.g. a clipping.
        second_order: ``False`` leaves out the derivative of the inner gradients.
        processes: In a data-parallel training, where each process has the same learned optimizer and parameters, and
            its own batches: how they reach each other. Then the gradients are those of all batches together, on
            each process, and ``pes`` and ``es_single`` carry a share of the particles on each. An
            :class:`Episode` of theirs is that share; it goes on with the same number of processes only.

    Raises:
        ValueError: An unknown estimator; particles divided by hand, in a data-parallel training.

    Example:
        Five steps of gradient descent on ``w**2 / 2`` from ``w = 1``, one step per window, judged by the loss after
        each step. The sum of the five losses is ``sum((1 - rate)**(2 k)) / 2``; its derivative in log(rate) at rate 0.1
        is -0.798. Truncation sees two fifths of it, the unbiased estimators all of it.

        >>> import torch
        >>> from lightning_l2l import LearnedStepSize
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> def loss(params, batch):
        ...     return 0.5 * params["w"].square().sum()
        >>> def total(name):
        ...     windows = WindowEstimator(name, Particles(count=2000, standard_deviation=0.01, seed=0))
        ...     episode = windows.begin(learned, {"w": torch.ones(1, dtype=torch.float64)})
        ...     gradient = 0.0
        ...     for _ in range(5):
        ...         result, episode = windows.meta_gradient(loss, learned, episode, [None], None, objective="naive")
        ...         gradient += result.gradients["learning_rate"].item()
        ...     return gradient
        >>> exact = -sum(k * 0.1 * 0.9 ** (2 * k - 1) for k in range(1, 6))
        >>> round(exact, 3), round(total("truncated"), 3), abs(total("es_single") / exact - 1) < 0.1
        (-0.798, -0.309, True)
    """

    estimator: Name = "auto"
    particles: Particles = field(default_factory=Particles)
    gradient_transformation: GradientTransformation | None = None
    second_order: bool = True
    processes: Processes | None = None

    def __post_init__(self) -> None:
        """Refuses an unknown name."""
        if self.estimator not in get_args(Name):
            raise ValueError(f"estimator={self.estimator!r} is not known; choose one of {list(get_args(Name))}.")

    def begin(
        self,
        learned: LearnedOptimizer,
        params: Mapping[str, Tensor],
        *,
        state: Any = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Episode:
        """A new episode. Nothing that is passed in is changed, now or later.

        Args:
            learned: The learned optimizer.
            params: What the inner optimizer moves, by name.
            state: The inner optimizer's state to start from; ``None`` for a fresh one.
            buffers: Tensors that the loss reads, and may write in place, by name.

        Raises:
            ValueError: No parameters, or no meta-parameters.
        """
        name, _ = choose_window_estimator(learned, self.estimator)
        if not params:
            raise ValueError("params is empty: there is nothing for the inner optimizer to move.")
        if not any(tensor.requires_grad for tensor in learned.parameters()):
            raise ValueError(f"{type(learned).__name__} has no parameter that requires a gradient: nothing to learn.")
        step = InnerStep(_no_loss, learned, processes=self.processes)
        iterate = step.start(params, state, buffers or {})
        step.share_buffers(iterate)
        particles = shares(self.particles, self.processes)
        assert particles.seed is not None
        directions: Tensors = {}
        if name in ("pes", "es_single"):
            iterate = spread(iterate, particles.count // particles.ranks)
            meta = meta_parameters(step)
            directions = particles.directions(meta, particles.seed, window=0)
            if name == "pes":
                directions = {key: tensor * 0 for key, tensor in directions.items()}
        return Episode(name, iterate, directions, 0, particles.seed)

    def meta_gradient(
        self,
        loss: Loss,
        learned: LearnedOptimizer,
        episode: Episode,
        batches: Sequence[Any],
        meta_batch: Any,
        *,
        objective: Objective = "log",
    ) -> tuple[MetaGradient, Episode]:
        """The next window: its contribution to the meta-gradient, and where the episode stands after it.

        Args:
            loss: ``loss(params, batch)``, as for :func:`lightning_l2l.meta_gradient`.
            learned: The learned optimizer; its present meta-parameters are used.
            episode: Where the training stands; it is not changed.
            batches: One batch for each step of the window.
            meta_batch: The batch that the window's meta-objective is evaluated on.
            objective: The meta-objective of the window, steps counted from its beginning.

        Raises:
            ValueError: No batches, or an episode that was begun with another estimator or number of particles.
        """
        check_objective(objective)
        if not batches:
            raise ValueError("batches is empty: a window needs at least one training step.")
        name, reason = choose_window_estimator(learned, self.estimator)
        self._refuse_foreign(name, episode, learned)
        # No homogeneity: the iterate that is carried on has to be the true one.
        step = InnerStep(
            loss, learned, self.gradient_transformation, self.second_order, processes=self.processes
        )  # fmt: skip
        start, directions = episode.iterate, episode.directions
        common = (batches, meta_batch, objective, reason)
        if name in ("pes", "es_single"):
            own = shares(replace(self.particles, seed=episode.seed), self.processes)
            if name == "pes":
                new = own.directions(meta_parameters(step), episode.seed, episode.window)
                result, iterate, directions = estimators.pes(step, start, directions, new, *common, own)
            else:
                result, iterate = estimators.es_single(step, start, directions, *common, own)
        elif name in ("es", "mixed"):
            seed = random.Random(f"{episode.seed}/{episode.window}").getrandbits(62)
            sampled = {"es": estimators.es, "mixed": estimators.mixed}[name]
            result, iterate = sampled(step, start, *common, replace(self.particles, seed=seed))
            if self.processes is not None:
                self.processes.copy_first_(iterate.leaves())  # each has computed it, to the same last bit or not
        else:
            exact = {
                "forward": estimators.forward,
                "reverse": estimators.reverse,
                "segmented": estimators.segmented,
                "truncated": estimators.truncated,
            }[name]
            result, iterate = exact(step, start, *common)
        following = replace(episode, iterate=iterate.fresh(), directions=directions, window=episode.window + 1)
        return result, following

    def _refuse_foreign(self, name: str, episode: Episode, learned: LearnedOptimizer) -> None:
        if episode.estimator != name:
            raise ValueError(
                f"The episode was begun with estimator={episode.estimator!r}, which carries other things than "
                f"{name!r} needs. Begin a new episode to change the estimator."
            )
        asked = [key for key, tensor in learned.named_parameters() if tensor.requires_grad]
        if episode.directions and sorted(asked) != sorted(episode.directions):
            raise ValueError(
                f"The episode carries perturbations of {sorted(episode.directions)}, but the learned optimizer now has "
                f"{sorted(asked)} to learn. Begin a new episode when what is learned changes."
            )
        own = shares(replace(self.particles, seed=episode.seed), self.processes)
        expected = own.count // own.ranks
        for direction in episode.directions.values():
            if len(direction) != expected:
                raise ValueError(
                    f"The episode carries {len(direction)} particles on this process, but Particles now asks for "
                    f"{expected}. Begin a new episode to change their number."
                )


def choose_window_estimator(learned: nn.Module, estimator: Name) -> tuple[str, str]:
    """The estimator over windows that ``"auto"`` stands for, and why."""
    if estimator != "auto":
        return estimator, "asked for"
    count = sum(tensor.numel() for tensor in learned.parameters() if tensor.requires_grad)
    if count <= _LARGEST_SAMPLED:
        return "es_single", f"{count} scalar meta-parameter(s): few enough to sample, and no bias from truncation"
    return "truncated", (
        f"{count} scalar meta-parameters are too many to sample cheaply; truncation ignores effects beyond a window"
    )


def _no_loss(parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
    raise AssertionError("An episode begins without a loss.")
