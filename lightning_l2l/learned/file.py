"""The file format of a learned optimizer: one safetensors file, weights and a header that says what they are.

No pickle and no code: the header names a class and the arguments of its constructor as plain data. Which class that
is, :meth:`lightning_l2l.LearnedOptimizer.load` decides. A file can therefore be wrong, but not do anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightning_l2l.__about__ import __version__

FORMAT = "lightning_l2l.learned_optimizer"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Content:
    """What is in a file.

    Attributes:
        class_name: The class of the learned optimizer.
        configuration: What makes such an optimizer, as plain data.
        tensors: Its meta-parameters by name.
        horizon: See :class:`~lightning_l2l.LearnedOptimizer`.
        tasks: See :class:`~lightning_l2l.LearnedOptimizer`.
    """

    class_name: str
    configuration: Any
    tensors: Mapping[str, Tensor]
    horizon: int | None
    tasks: str


def write(content: Content, path: str | os.PathLike[str]) -> None:
    """Writes a file; whoever reads it meanwhile sees the old file or the new one.

    Raises:
        TypeError: The configuration is not plain data.
        OSError: The file cannot be written.
    """
    try:
        configuration = json.dumps(content.configuration, sort_keys=True)
    except TypeError as error:
        raise TypeError(
            f"{content.class_name}.configuration() must be plain data (strings, numbers, booleans, lists, "
            f"dictionaries): {error}."
        ) from error
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "class": content.class_name,
        "configuration": configuration,
        "horizon": json.dumps(content.horizon),
        "tasks": json.dumps(content.tasks),
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in content.tensors.items()}
    header["sha256"] = checksum(header, tensors)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(safetensors.torch.save(tensors, header))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> Content:
    """Reads a file; tensors on the CPU, in the dtypes that they were saved in.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a file of ours, incomplete, changed since it was written, or of a newer format.
    """
    header, tensors = _header_and_tensors(Path(path))
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not a learned optimizer saved by lightning_l2l: its header says "
            f"format={header.get('format')!r} instead of {FORMAT!r}."
        )
    version = header.get("format_version", "")
    if not version.isdecimal() or int(version) < 1:
        raise ValueError(f"{path} has no legible format version (found {version!r}): the header is damaged.")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, written by lightning_l2l {header.get('library_version')}; this "
            f"is {__version__} and reads versions up to {FORMAT_VERSION}. Update lightning_l2l."
        )
    if header.get("sha256") != checksum(header, tensors):
        raise ValueError(
            f"{path} was changed or damaged after it was written: its checksum is not that of its content. Copy "
            "it again from where it came from. (The checksum finds accidents; it proves nothing about the author.)"
        )
    lacking = [key for key in ("class", "configuration", "horizon", "tasks") if key not in header]
    if lacking:
        raise ValueError(f"{path} lacks the entries {', '.join(lacking)} in its header: it was not saved by save().")
    configuration, horizon, tasks = (_parsed(path, key, header) for key in ("configuration", "horizon", "tasks"))
    if not (horizon is None or type(horizon) is int) or not isinstance(tasks, str):
        raise ValueError(f"{path} has a horizon or tasks of a wrong type in its header: {horizon!r}, {tasks!r}.")
    return Content(header["class"], configuration, tensors, horizon, tasks)


def checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in the file but the checksum itself."""
    digest = hashlib.sha256()
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest.update(json.dumps([rest, described], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _header_and_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        others = sorted(file.name for file in path.absolute().parent.glob("*.safetensors") if file.is_file())[:10]
        instead = f"The folder has {', '.join(others)}." if others else "The folder has no .safetensors file at all."
        raise FileNotFoundError(
            f"There is no file {path}. {instead} learned.save(path), or `python -m lightning_l2l meta-train`, "
            "writes one."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # Clones, since the tensors are a view of the mapped file otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), tensors
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or not all of it: {error}. A learned optimizer is saved with "
            "learned.save(path); other formats (checkpoints, pickles) are not read, since they can run code."
        ) from error


def _parsed(path: Any, key: str, header: Mapping[str, str]) -> Any:
    try:
        return json.loads(header[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has an illegible {key} in its header (not JSON): {error}.") from error
