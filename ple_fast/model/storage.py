"""A model's directory: one file, ``model.safetensors``, in which the configuration stands beside the weights.

A save has one point of commit, the replacement of that file. So whoever reads it, whenever, reads one save, whole; and
whatever happens to a save leaves the file of the one before. Nothing in it can run code.

Version 1 was two files, whose second, ``config.json``, held the checksum of the first. It is still read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from . import tensor_file
from .tensor_file import Content

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""The second is, since version 2, the name of a tensor: the bytes of the JSON. A header may not be as long as a
vocabulary may be."""
FORMAT, VERSION = "ple_fast.MultiTaskModel", 2
READS = 5
"""Of a directory of version 1, while others write into it."""
OLD = 24 * 3600
"""Seconds after which a temporary file is nobody's, where files cannot be locked."""


class Saved(NamedTuple):
    """What one save wrote."""

    where: Path
    """The file that the configuration stands in, for errors."""
    config: dict[str, Any]
    state: dict[str, Tensor]
    """On the CPU, by name."""


def write(state: Mapping[str, Tensor], config: Mapping[str, Any], directory: str | Path) -> None:
    """Puts a model in the place of the one in a directory. Until the last step the old one is there, then the new one.

    Any number of threads and processes may save into one directory: the last one stays. The file is as readable as the
    umask lets any new file be.
    """
    directory = Path(directory)
    text = json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=1, ensure_ascii=False, allow_nan=False)
    # Vocabularies may hold half of a surrogate pair, which Python makes of file names that are no text.
    letters = bytearray(text.encode("utf-8", "surrogatepass"))
    entries = {**state, CONFIG: torch.frombuffer(letters, dtype=torch.uint8)}
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    _remove_left(directory)
    handle, fresh = _new_file(directory)
    try:
        with handle:
            tensor_file.write(handle, entries, {"format": FORMAT, "version": str(VERSION)})
            handle.flush()
            os.fsync(handle.fileno())
            if fcntl is None:  # Windows, which moves no open file
                handle.close()
            fresh.replace(directory / WEIGHTS)
    finally:
        fresh.unlink(missing_ok=True)
    for folder in (directory, *(folder.parent for folder in made)):
        _sync_folder(folder)
    _remove_old_config(directory / CONFIG)


def read(directory: str | Path) -> Saved:
    """The model in a directory; others may save into it meanwhile.

    Raises:
        FileNotFoundError: there is none.
        ValueError: ``directory`` is a file; the files are damaged, of another kind or version, or (version 1) of two
            saves.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(
            f"directory: expected the directory that save wrote, got a file in it; load {str(directory.parent)!r}"
        )
    file = directory / WEIGHTS
    before = None
    for _ in range(READS):
        content = tensor_file.read(file)
        if CONFIG in content.tensors or "version" in content.metadata or tensor_file.CHECKSUM in content.metadata:
            return _second_version(file, content)
        try:
            return _first_version(directory, content)
        except (OSError, ValueError) as error:
            problem = error
        if content.sha256 == before:
            break
        before = content.sha256  # the other file may be of a save that was done since
    raise problem


def _second_version(file: Path, content: Content) -> Saved:
    if not content.is_whole or CONFIG not in content.tensors:
        raise ValueError(
            f"{file}: expected the sha256 {content.metadata.get(tensor_file.CHECKSUM, 'of a save')[:12]}..., got "
            f"{content.sha256[:12]}...; the file is damaged"
        )
    text = content.tensors.pop(CONFIG).numpy().tobytes()
    return Saved(file, _parsed(file, text, VERSION), content.tensors)


def _first_version(directory: Path, content: Content) -> Saved:
    file = directory / CONFIG
    config = _parsed(file, file.read_bytes(), 1)
    expected = config.pop("weights_sha256", None)
    if expected != content.sha256:
        raise ValueError(
            f"{directory}: {WEIGHTS} is not the one that {CONFIG} was written with (sha256 {content.sha256[:12]}..., "
            f"expected weights_sha256 {str(expected)[:12]}...): the files are of different saves, or damaged"
        )
    state = content.tensors
    for name, kept in content.metadata.items():  # of tensors over the same memory one was written
        if kept in state:
            state.setdefault(name, state[kept])
    return Saved(file, config, state)


def _parsed(file: Path, text: bytes, version: int) -> dict[str, Any]:
    """The configuration, of this version."""
    try:
        config: Any = json.loads(text.decode("utf-8", "surrogatepass"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON in UTF-8 ({error})") from error
    kind = config.pop("format", None) if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or kind != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT!r}, got {kind!r}; it was not written by MultiTaskModel.save")
    found = config.pop("version", None)
    if type(found) is not int or found != version:
        raise ValueError(
            f"{file}: expected version {version}, got {found!r}; load it with the release of ple_fast that wrote it"
        )
    return config


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


# A save locks its temporary file for as long as it lives: the lock of a process that was killed is free.


def _lock(handle: BinaryIO, *, wait: bool) -> bool | None:
    """Whether the file is ours now; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _new_file(directory: Path) -> tuple[BinaryIO, Path]:
    """A temporary file of a name of its own, locked."""
    while True:
        path = directory / f".{WEIGHTS}.{secrets.token_hex(8)}.tmp"
        handle = path.open("xb")
        _lock(handle, wait=True)
        if path.exists():
            return handle, path
        handle.close()  # another save found it before it was locked, and took it for one that was left


def _remove_left(directory: Path) -> None:
    """Removes the temporary files of saves that were killed; those of version 1 had two."""
    for name in (WEIGHTS, CONFIG):
        for path in directory.glob(f".{name}.*.tmp"):
            # Of another user, or gone since: it does not matter to this save.
            with contextlib.suppress(OSError), path.open("rb+") as handle:
                is_left = _lock(handle, wait=False)
                if is_left is None:
                    is_left = time.time() - os.fstat(handle.fileno()).st_mtime > OLD
                if is_left:
                    path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that one may only write into; any on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not do it
            raise
    finally:
        os.close(descriptor)


def _remove_old_config(file: Path) -> None:
    """Removes the ``config.json`` of a save of version 1, which nobody reads any more; not one of somebody else's."""
    with contextlib.suppress(OSError, ValueError):
        _parsed(file, file.read_bytes(), 1)
        file.unlink()
