"""Optimizer states as plain containers, for checkpoints that are loaded without running code."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def plain(tree: Any) -> Any:
    """The same tree with named tuples as tuples, and tensors without history.

    Args:
        tree: Dictionaries, lists, (named) tuples, tensors, numbers, strings and ``None``.

    Raises:
        TypeError: Something else, which a checkpoint could not be loaded with safely.
    """
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, dict):
        return {key: plain(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [plain(child) for child in tree]
    if isinstance(tree, tuple):
        return tuple(plain(child) for child in tree)
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"An optimizer state holds a {type(tree).__name__}, which cannot be saved in a checkpoint that is safe to "
        "load. Keep states to tensors, numbers, strings, dictionaries, lists and (named) tuples."
    )


def restored(tree: Any, like: Any) -> Any:
    """A plain tree with the container types of another one, where they correspond.

    Args:
        tree: What :func:`plain` returned.
        like: A tree of the original's types, e.g. the fresh state of the same optimizer; it may lack entries that
            come with the first step.

    Example:
        >>> from collections import namedtuple
        >>> Trace = namedtuple("Trace", ["velocity"])
        >>> restored(plain({"w": Trace(1.0)}), {"w": Trace(0.0)})
        {'w': Trace(velocity=1.0)}
    """
    if isinstance(tree, dict):
        known = like if isinstance(like, dict) else {}
        return {key: restored(child, known.get(key)) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        known_children = like if isinstance(like, (list, tuple)) and len(like) == len(tree) else [None] * len(tree)
        children = [restored(child, known) for child, known in zip(tree, known_children, strict=True)]
        if isinstance(tree, list):
            return children
        named = isinstance(like, tuple) and hasattr(like, "_fields") and len(like) == len(tree)
        return type(like)(*children) if named else tuple(children)
    return tree
