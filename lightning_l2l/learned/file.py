"""A learned optimizer in one safetensors file: weights, and in the header all that is needed to use them.

No pickle and no code: the header names one of a fixed table of classes and the arguments of its constructor, plain
data. A file can therefore be wrong, but not do anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightning_l2l.__about__ import __version__
from lightning_l2l.learned.base import LearnedOptimizer

FORMAT = "lightning_l2l.learned_optimizer"
FORMAT_VERSION = 1

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


def save(learned: LearnedOptimizer, path: str | os.PathLike[str]) -> None:
    """Writes a learned optimizer to one file; whoever reads it meanwhile sees the old file or the new one.

    Args:
        learned: Of a known class.
        path: Where to; the suffix ``.safetensors`` is customary.

    Raises:
        TypeError: The class is not known, or its configuration is not plain data.
        OSError: The file cannot be written.
    """
    cls = type(learned)
    if _CLASSES.get(cls.__name__) is not cls:
        raise TypeError(
            f"{cls.__name__} is not registered, so nobody could load the file. Decorate the class with "
            "lightning_l2l.learned.register_learned_optimizer."
        )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "class": cls.__name__,
        "configuration": _plain(cls.__name__, learned.configuration()),
        "horizon": json.dumps(learned.horizon),
        "tasks": json.dumps(learned.tasks),
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in learned.state_dict().items()}
    metadata["sha256"] = _digest(metadata, tensors)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(safetensors.torch.save(tensors, metadata))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> LearnedOptimizer:
    """Reads a learned optimizer; on the CPU, in the dtypes that it was saved in.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a file of ours, incomplete, changed since it was written, of a newer format, of an
            unknown class, or its weights do not fit its configuration.
    """
    metadata, tensors = _read(Path(path))
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not a learned optimizer saved by lightning_l2l: its header says "
            f"format={metadata.get('format')!r} instead of {FORMAT!r}."
        )
    _check_version(path, metadata)
    if metadata.get("sha256") != _digest(metadata, tensors):
        raise ValueError(
            f"{path} was changed or damaged after it was written: its checksum is not that of its content. Copy "
            "it again from where it came from. (The checksum finds accidents; it proves nothing about the author.)"
        )
    lacking = [key for key in ("class", "configuration", "horizon", "tasks") if key not in metadata]
    if lacking:
        raise ValueError(f"{path} lacks the entries {', '.join(lacking)} in its header: it was not saved by save().")
    name = metadata["class"]
    cls = _CLASSES.get(name)
    if cls is None:
        raise ValueError(
            f"{path} holds a {name!r}, which is not known here. Known: {', '.join(sorted(_CLASSES))}. If the class is "
            "yours, import its module and decorate it with lightning_l2l.learned.register_learned_optimizer."
        )
    configuration, horizon, tasks = (_parsed(path, key, metadata) for key in ("configuration", "horizon", "tasks"))
    if not (horizon is None or type(horizon) is int) or not isinstance(tasks, str):
        raise ValueError(f"{path} has a horizon or tasks of a wrong type in its header: {horizon!r}, {tasks!r}.")
    learned = _made(path, cls, configuration, tensors)
    learned.horizon, learned.tasks = horizon, tasks
    return learned


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. {_instead(path)}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # Clones, since the tensors are a view of the mapped file otherwise.
            return metadata, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or not all of it: {error}. A learned optimizer is saved with "
            "learned.save(path); other formats (checkpoints, pickles) are not read, since they can run code."
        ) from error


def _instead(path: Path) -> str:
    """What there is where a file was looked for, and how one is made."""
    folder = path.absolute().parent
    making = "learned.save(path), or `python -m lightning_l2l meta-train`, writes one."
    if not folder.is_dir():
        return f"The folder {folder} does not exist either. {making}"
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.is_file())
    if not others:
        return f"Nor is there any other .safetensors file in {folder}. {making}"
    return f"The .safetensors files in {folder} are: {', '.join(others[:10])}{', ...' if len(others) > 10 else ''}."


def _check_version(path: Any, metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) < 1:
        raise ValueError(f"{path} has no legible format version (found {version!r}): the header is damaged.")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, written by lightning_l2l {metadata.get('library_version')}; this "
            f"is {__version__} and reads versions up to {FORMAT_VERSION}. Update lightning_l2l."
        )


def _made(path: Any, cls: type[LearnedOptimizer], configuration: Any, tensors: dict[str, Tensor]) -> LearnedOptimizer:
    """The optimizer that the configuration makes, with the file's weights."""
    try:
        # Without memory first: the sizes in the header are anybody's, and must be those of the tensors.
        with torch.device("meta"):
            expected = cls.from_configuration(configuration).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes == found:
            with torch.random.fork_rng(devices=[]):
                learned = cls.from_configuration(configuration)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path} has a configuration that {cls.__name__} of lightning_l2l {__version__} does not take: {error}"
        ) from error
    if shapes != found:
        wrong = min(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not fit together: its configuration makes a {cls.__name__} with {_shape(shapes, wrong)} for "
            f"{wrong!r}, but the file has {_shape(found, wrong)}."
        )
    learned.load_state_dict(tensors, assign=True)
    return learned


def _parsed(path: Any, key: str, metadata: Mapping[str, str]) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has an illegible {key} in its header (not JSON): {error}.") from error


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"shape {shapes[name]}" if name in shapes else "nothing"


def _plain(name: str, configuration: Any) -> str:
    try:
        text = json.dumps(configuration, sort_keys=True)
    except TypeError as error:
        raise TypeError(
            f"{name}.configuration() must be plain data (strings, numbers, booleans, lists, dictionaries): {error}."
        ) from error
    return text


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A checksum of everything in the file but itself."""
    digest = hashlib.sha256()
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    digest.update(json.dumps([rest, described], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
