"""A long inner training that is differentiated unroll by unroll.

An *episode* is one inner training, cut into unrolls of K steps; the meta-parameters may be updated after each. What an
estimator needs from one unroll to the next (the iterate, each particle's iterate, what its perturbations add up to) is
a value, :class:`Episode`: :meth:`Episode.unroll` returns the next one, nothing is hidden.

The gradients of the unrolls of an episode add up to an estimate of the gradient of the *sum* of their meta-objectives.
For the methods ``"pes"`` and ``"es_single"`` of evolution strategies that estimate has no bias (of the smoothed sum,
with the meta-parameters held fixed). All others are truncated: they leave out what an unroll does to later ones, so
that step sizes and schedules come out too small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.exact.evolution import credited_unroll, evolution_strategies, perturbations, spread
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Loss, Tensors
from lightning_l2l.exact.meta_gradient import check_batches, check_problem, unrolled
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.learned.base import LearnedOptimizer


@dataclass(frozen=True)
class Episode:
    """An inner training between two unrolls.

    Attributes:
        estimator: How its meta-gradients are computed.
        iterate: Parameters, optimizer state and buffers; for ``"pes"`` and ``"es_single"`` those of all particles,
            with the particle as the first dimension of every tensor.
        directions: By meta-parameter, what the particles' values are credited to: the sum of all perturbations so far
            (``"pes"``), the one perturbation of the episode (``"es_single"``). Empty for the others.
        unrolls: How many unrolls are behind.

    Example:
        Five steps of gradient descent on ``w**2 / 2`` from ``w = 1``, one step per unroll, measured by the loss after
        each step. The derivative of the sum of the five losses in log(rate) at rate 0.1 is -0.798. Truncation sees two
        fifths of it, the unbiased estimators all of it.

        >>> import torch
        >>> from lightning_l2l import LearnedStepSize
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> def loss(parameters, batch):
        ...     return 0.5 * parameters["w"].square().sum()
        >>> def total(estimator):
        ...     episode = Episode.begin(learned, {"w": torch.ones(1, dtype=torch.float64)}, estimator=estimator)
        ...     gradient = 0.0
        ...     for _ in range(5):
        ...         result, episode = episode.unroll(loss, learned, [None], None)
        ...         gradient += result.gradients["learning_rate"].item()
        ...     return gradient
        >>> round(total(Unroll(objective="naive")), 3)
        -0.309
        >>> single = EvolutionStrategies(
        ...     method="es_single", objective="naive", particles=2000, standard_deviation=0.01
        ... )
        >>> abs(total(single) / -0.798 - 1) < 0.1
        True
    """

    estimator: Unroll | EvolutionStrategies
    iterate: Iterate
    directions: Tensors
    unrolls: int = 0

    @classmethod
    def begin(
        cls,
        learned: LearnedOptimizer,
        parameters: Mapping[str, Tensor],
        *,
        estimator: Unroll | EvolutionStrategies,
        state: Any = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Episode:
        """A new episode. Nothing that is passed in is changed, now or later.

        Args:
            learned: The learned optimizer.
            parameters: What the inner optimizer moves, by name.
            estimator: How its meta-gradients are computed.
            state: The inner optimizer's state to start from; ``None`` for a fresh one.
            buffers: Tensors that the loss reads, and may write in place, by name.

        Raises:
            ValueError: No parameters, or no meta-parameters.
        """
        check_problem(learned, parameters)
        step = InnerStep(_no_loss, learned)
        iterate = step.start(parameters, state, buffers or {})
        directions: Tensors = {}
        if _carries_particles(estimator):
            assert isinstance(estimator, EvolutionStrategies)
            iterate = spread(iterate, estimator.particles)
            directions = perturbations(estimator, step.meta_parameters(), 0)
            if estimator.method == "pes":
                directions = {name: tensor * 0 for name, tensor in directions.items()}
        return cls(estimator, iterate, directions)

    def unroll(
        self, loss: Loss, learned: LearnedOptimizer, batches: Sequence[Any], meta_batch: Any
    ) -> tuple[MetaGradient, Episode]:
        """The next unroll: its contribution to the meta-gradient, and the episode after it.

        Args:
            loss: ``loss(parameters, batch)``, as for :func:`lightning_l2l.meta_gradient`.
            learned: The learned optimizer; its present meta-parameters are used.
            batches: One batch for each step.
            meta_batch: The batch that the unroll's meta-objective is evaluated on, steps counted from its beginning.

        Raises:
            ValueError: No batches, or other meta-parameters than the episode was begun with.
        """
        check_batches(self.estimator, batches)
        # No homogeneity: the iterate that is carried on has to be the true one.
        step = InnerStep(loss, learned, second_order=getattr(self.estimator, "second_order", True))
        directions = self.directions
        if isinstance(self.estimator, Unroll):
            result, iterate = unrolled(step, self.iterate, batches, meta_batch, self.estimator)
        elif not directions:
            result, iterate = evolution_strategies(
                step, self.iterate, batches, meta_batch, self.estimator, self.unrolls
            )
        else:
            meta = step.meta_parameters()
            if sorted(meta) != sorted(directions):
                raise ValueError(
                    f"The episode carries perturbations of {sorted(directions)}, but the learned optimizer now has "
                    f"{sorted(meta)} to learn. Begin a new episode when what is learned changes."
                )
            moves = directions
            if self.estimator.method == "pes":
                moves = perturbations(self.estimator, meta, self.unrolls)
                directions = {name: tensor + directions[name] for name, tensor in moves.items()}
            result, iterate = credited_unroll(
                step, self.iterate, directions, moves, batches, meta_batch, self.estimator
            )
        return result, replace(self, iterate=iterate.fresh(), directions=directions, unrolls=self.unrolls + 1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, dictionaries and tuples only: safe to save, and to load with ``weights_only``."""
        return {
            "parameters": _plain(self.iterate.parameters),
            "state": _plain(self.iterate.state),
            "buffers": _plain(self.iterate.buffers),
            "directions": _plain(self.directions),
            "unrolls": self.unrolls,
        }

    @classmethod
    def from_state_dict(
        cls, saved: Mapping[str, Any], learned: LearnedOptimizer, estimator: Unroll | EvolutionStrategies
    ) -> Episode:
        """The episode that :meth:`state_dict` was taken of.

        Args:
            saved: What it returned.
            learned: The learned optimizer; it tells the types of its state.
            estimator: That of the episode.

        Raises:
            ValueError: It was saved with an estimator that carries something else, or another number of particles.
        """
        found = {len(tensor) for tensor in saved["directions"].values()}
        needed = {estimator.particles} if _carries_particles(estimator) else set()  # type: ignore[union-attr]
        if found != needed:
            raise ValueError(
                f"The saved episode carries {max(found, default=0)} particles, but {estimator} needs "
                f"{max(needed, default=0)}. Use the estimator that it was begun with, or begin a new one."
            )
        parameters = dict(saved["parameters"])
        state = _restored(saved["state"], learned.transformation().init(parameters))
        iterate = Iterate(parameters, state, dict(saved["buffers"])).fresh()
        return cls(estimator, iterate, dict(saved["directions"]), saved["unrolls"])


def _carries_particles(estimator: Unroll | EvolutionStrategies) -> bool:
    return isinstance(estimator, EvolutionStrategies) and estimator.method != "es"


def _no_loss(parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
    raise AssertionError("An episode begins without a loss.")


def _plain(tree: Any) -> Any:
    """The same tree with named tuples as tuples, and tensors without history."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, dict):
        return {key: _plain(child) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return (list if isinstance(tree, list) else tuple)(_plain(child) for child in tree)
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"An optimizer state holds a {type(tree).__name__}, which cannot be saved in a checkpoint that is safe to "
        "load. Keep states to tensors, numbers, strings, dictionaries, lists and (named) tuples."
    )


def _restored(tree: Any, like: Any) -> Any:
    """A plain tree with the named tuples of another one, which may lack entries that come with the first step."""
    if isinstance(tree, dict):
        known = like if isinstance(like, dict) else {}
        return {key: _restored(child, known.get(key)) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        alike = isinstance(like, (list, tuple)) and len(like) == len(tree)
        children = [_restored(*pair) for pair in zip(tree, like if alike else [None] * len(tree), strict=True)]
        if isinstance(tree, list):
            return children
        return type(like)(*children) if alike and hasattr(like, "_fields") else tuple(children)
    return tree
