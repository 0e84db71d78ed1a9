"""Tensors in one file of the safetensors format, each way in one pass: nothing is held but the tensors themselves.

``safetensors`` reads these files, and its files are read here. Beside it there is the checksum, over every bit of the
file: what is read has been hashed, and not what lay at the same path a moment before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
METADATA, CHECKSUM = "__metadata__", "sha256"
UNKNOWN = "0" * 64
"""In the place of the checksum while it is computed."""
CHUNK = 1 << 20


class Content(NamedTuple):
    """What is in a file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str
    """Of the whole file as it was read, with ``UNKNOWN`` in the place of the checksum that it holds, if it does."""

    @property
    def is_whole(self) -> bool:
        """Whether the file holds its checksum, and is what was written."""
        return self.metadata.get(CHECKSUM) == self.sha256


def write(handle: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file from its begin: tensors of a dtype of ``DTYPES``, from any device, and their checksum."""
    # As safetensors does: large elements first, so that each lies at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {METADATA: {**metadata, CHECKSUM: UNKNOWN}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode("ascii")
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    for part in (len(header).to_bytes(8, "little"), header):
        digest.update(part)
        handle.write(part)
    for _, tensor in ordered:
        # A copy of each chunk: somebody may train the model meanwhile, and what is hashed must be what is written.
        for chunk in map(bytes, _chunks(tensor.detach().cpu().contiguous())):
            digest.update(chunk)
            handle.write(chunk)
    handle.seek(8 + header.index(_checksum(UNKNOWN)))
    handle.write(_checksum(digest.hexdigest()))


def read(file: Path) -> Content:
    """Every tensor, on the CPU. The file is opened once: replace it meanwhile, and the old one is read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not of this format, or ends too early; the checksum is only computed.
    """
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size - 8
        begin = handle.read(8)
        length = int.from_bytes(begin, "little")
        if size < 0 or length > size:
            raise ValueError(f"{file}: expected the format of safetensors, got no header; the file is damaged")
        header = handle.read(length)
        places, metadata = _parsed(file, header, size - length)
        own = metadata.get(CHECKSUM, "")
        digest = hashlib.sha256(begin)
        digest.update(header.replace(_checksum(own), _checksum(UNKNOWN), 1) if CHECKSUM in metadata else header)
        tensors = {}
        for name, (dtype, shape) in places.items():
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            for chunk in _chunks(tensors[name]):
                if handle.readinto(chunk) != len(chunk):
                    raise ValueError(f"{file}: expected {size + 8} bytes, got fewer; somebody is writing into it")
                digest.update(chunk)
    return Content(tensors, metadata, digest.hexdigest())


def _checksum(digits: str) -> bytes:
    return f'"{CHECKSUM}":"{digits}"'.encode()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The memory of a contiguous tensor on the CPU."""
    memory = tensor.reshape(-1).view(torch.uint8).numpy().data
    return (memory[start : start + CHUNK] for start in range(0, len(memory), CHUNK))


def _parsed(
    file: Path, header: bytes, size: int
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, str]]:
    """Dtype and shape by name, in the order of the data, which must be ``size`` bytes without a gap; the metadata."""
    damaged = f"{file}: expected the format of safetensors, got a header with"
    try:
        entries = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged} no JSON ({error}); the file is damaged") from error
    metadata = entries.pop(METADATA, {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{damaged} no metadata as text; the file is damaged")
    places: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    spans: dict[str, list[int]] = {}
    for name, entry in entries.items():
        fields = entry if isinstance(entry, dict) else {}
        code, shape, span = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if (
            not isinstance(code, str)
            or code not in DTYPES
            or not _is_counts(shape)
            or not _is_counts(span)
            or len(span) != 2
        ):
            raise ValueError(f"{damaged} {name!r}: {entry!r:.200}, which is no tensor of {', '.join(DTYPES)}")
        places[name], spans[name] = (DTYPES[code], tuple(shape)), span
    end = 0
    ordered = sorted(places, key=lambda name: spans[name])
    for name in ordered:
        begin, (dtype, shape) = end, places[name]
        end += math.prod(shape) * dtype.itemsize
        if spans[name] != [begin, end]:
            raise ValueError(f"{damaged} {name!r} at {spans[name]}, expected [{begin}, {end}]; the file is damaged")
    if end != size:
        raise ValueError(f"{file}: expected {end} bytes of tensors, got {size}; the file is damaged")
    return {name: places[name] for name in ordered}, metadata


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of ints that count something."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
