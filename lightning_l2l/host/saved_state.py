"""What LearnToLearn puts into checkpoints: plain tensors, numbers, strings and containers, with a version.

torch loads checkpoints with ``weights_only``: anything else would make the whole resume fail.
"""

from __future__ import annotations

from typing import Any

VERSION = 2
_KEYS = {
    "learned": dict,
    "meta_optimizer": dict,
    "applied": dict,
    "source": dict,
    "steps_seen": int,
    "guard": dict,
    "schedule": dict,
    "history": list,
}
_WAY_OUT = (
    "Or remove 'LearnToLearn' from the checkpoint's 'callbacks' to go on from the learning rate that the "
    "optimizer had, without what was learned."
)


def check_saved(state: Any) -> None:
    """Refuse a state that cannot be resumed from.

    Raises:
        ValueError: It is of another version, or damaged.
    """
    if not isinstance(state, dict) or not isinstance(state.get("version"), int):
        raise ValueError(
            "The checkpoint's state of LearnToLearn is damaged: it has no version. Resume from another checkpoint. "
            f"{_WAY_OUT}"
        )
    if state["version"] != VERSION:
        raise ValueError(
            f"The checkpoint's state of LearnToLearn has version {state['version']}, but this lightning_l2l reads "
            f"version {VERSION}. Resume with the lightning_l2l that wrote it. {_WAY_OUT}"
        )
    damaged = [key for key, kind in _KEYS.items() if not isinstance(state.get(key), kind)]
    if damaged:
        raise ValueError(
            f"The checkpoint's state of LearnToLearn is damaged: {', '.join(damaged)} missing or of the wrong type. "
            f"Resume from another checkpoint. {_WAY_OUT}"
        )
