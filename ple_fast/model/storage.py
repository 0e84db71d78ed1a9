"""A model's directory: ``model.safetensors`` and ``config.json``, neither of them able to run code."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT, VERSION = "ple_fast.MultiTaskModel", 1


def write(model: nn.Module, config: Mapping[str, Any], directory: str | Path) -> None:
    """Writes both files, each at once: a reader, or a crash, never sees half a file.

    The configuration holds a checksum of the weights, so that files of two different saves are told apart. Both files
    are as readable as the umask lets any new file be.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    own = f"{os.getpid()}.{threading.get_ident()}"  # two threads may save at once
    fresh = {name: directory / f".{name}.{own}.tmp" for name in (WEIGHTS, CONFIG)}
    try:
        save_model(model, str(fresh[WEIGHTS]), metadata={"format": FORMAT})
        whole = {"format": FORMAT, "version": VERSION, **config, "weights_sha256": _sha256(fresh[WEIGHTS])}
        fresh[CONFIG].write_text(json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        for file in fresh.values():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        # safetensors makes files that only their owner reads; the other one has the mode of every new file here.
        fresh[WEIGHTS].chmod(stat.S_IMODE(fresh[CONFIG].stat().st_mode))
        for name, file in fresh.items():
            file.replace(directory / name)
    finally:
        for file in fresh.values():
            file.unlink(missing_ok=True)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The configuration in a directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: ``directory`` is a file; the configuration is no JSON, of another kind or version, or not that of
            the weights beside it.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(
            f"directory: expected the directory that save wrote, got a file in it; load {str(directory.parent)!r}"
        )
    file = directory / CONFIG
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON in UTF-8 ({error})") from error
    kind = config.get("format") if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or kind != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT!r}, got {kind!r}; it was not written by MultiTaskModel.save")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{file}: expected version {VERSION}, got {config.get('version')!r}; load it with the release of ple_fast "
            "that wrote it"
        )
    found = _sha256(directory / WEIGHTS)
    if found != config.get("weights_sha256"):
        raise ValueError(
            f"{directory}: {WEIGHTS} is not the one that {CONFIG} was written with (sha256 {found[:12]}..., expected "
            f"{str(config.get('weights_sha256'))[:12]}...): the files are of different saves, or damaged"
        )
    return config


def read_weights(model: nn.Module, directory: str | Path) -> None:
    """Fills every parameter and buffer of ``model``; the state dict must fit exactly."""
    load_model(model, str(Path(directory) / WEIGHTS))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
