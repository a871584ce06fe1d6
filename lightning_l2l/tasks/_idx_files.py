"""MNIST's own file format, IDX: a magic number, the sizes, the bytes."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

_UNSIGNED_BYTE = 0x08


def read_mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels, uint8.

    Raises:
        FileNotFoundError: One of the four files is missing.
        ValueError: One of them is damaged, or images and labels do not fit.
    """
    found = []
    for part in ("train", "t10k"):
        images = read_idx(_found(folder, f"{part}-images", "idx3-ubyte"), dimensions=3)
        labels = read_idx(_found(folder, f"{part}-labels", "idx1-ubyte"), dimensions=1)
        if len(images) != len(labels):
            raise ValueError(f"{folder} has {len(images)} {part} images, but {len(labels)} labels.")
        found += [images, labels]
    return found[0], found[1], found[2], found[3]


def read_idx(path: Path, dimensions: int) -> Tensor:
    """One file of unsigned bytes with that many dimensions, gzipped if its name ends so.

    Raises:
        ValueError: It is something else, shorter or longer than its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}): it is incomplete or no gzip file.") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        raise ValueError(
            f"{path} is not an IDX file of bytes with {dimensions} dimension(s): it begins with {content[:4].hex()}, "
            f"expected 0000{_UNSIGNED_BYTE:02x}{dimensions:02x}. A web page saved under this name is a common reason."
        )
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(sizes):
        raise ValueError(
            f"{path} announces {math.prod(sizes)} bytes of data but has {len(content) - header}: it is damaged or "
            "incomplete; copy it again."
        )
    # A bytearray, since torch warns about memory that is not writable.
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(sizes)


def _found(folder: Path, name: str, kind: str) -> Path:
    candidates = [folder / f"{name}{dot}{kind}{suffix}" for dot in "-." for suffix in ("", ".gz")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"There is no {candidates[0].name} (or {candidates[1].name}) in {folder}. MNIST is not downloaded: put its "
        "four standard files into a folder and name that folder."
    )
