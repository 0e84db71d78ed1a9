"""One file that a training goes on from, where it was stopped."""

from __future__ import annotations

import functools
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..scalars import shown


class Checkpoint:
    """A file with the state of a training, and the settings that its loss curve depends on.

    It is replaced in one step: a kill while it is written leaves the one before.

    Args:
        file: where it stands; folders that are missing are made.
        settings: values that compare as equal where one run may go on with the other's state.
    """

    def __init__(self, file: str | Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = Path(file), dict(settings)

    def write(self, state: Mapping[str, Any]) -> None:
        """Puts a state in the place of the one before: tensors, numbers, text and containers of them."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_name(f"{self.file.name}.tmp")
        with fresh.open("wb") as handle:
            torch.save(_plain({"settings": self.settings, **state}), handle)
            handle.flush()
            os.fsync(handle.fileno())
        fresh.replace(self.file)

    def read(self) -> dict[str, Any] | None:
        """The state, on the CPU; None where there is no file. Nothing in it can run code.

        Raises:
            ValueError: it is no checkpoint.
        """
        if not self.file.exists():
            return None
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            state["settings"].items()
        except Exception as error:  # of pickle, of zip, of a file of another kind
            raise ValueError(
                f"{self.file}: expected a checkpoint of a training, got {shown(error)}; remove it, or name another file"
            ) from error
        found: dict[str, Any] = state
        return found

    def check(self, state: Mapping[str, Any]) -> None:
        """ValueError where a state is one of other settings."""
        if state["settings"] != self.settings:
            raise ValueError(
                f"{self.file}: expected its own settings, {state['settings']}, got {self.settings}; use those, or "
                "another file"
            )


def check_place(file: str | Path) -> None:
    """That a checkpoint can be written there, before a training that would be lost; missing folders are made.

    Raises:
        TypeError: no path.
        ValueError: it is a folder.
        OSError: nothing can be written into its folder.
    """
    if not isinstance(file, (str, os.PathLike)):
        raise TypeError(f"checkpoint: expected the path of a file, got {shown(file)}")
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"checkpoint: expected a file, got the folder {str(file)!r}; name one in it, such as run.pt")
    file.parent.mkdir(parents=True, exist_ok=True)
    trial = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    trial.touch(exist_ok=False)
    trial.unlink()


def _plain(value: Any) -> Any:
    """With NumPy's scalars, which options of optimizers and schedules may be, as Python's: others could not be read."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def described(function: Any) -> Any:
    """A function or class that a user gave, as a setting: its name, of a partial with the arguments."""
    if isinstance(function, functools.partial):
        arguments = [*map(described, function.args), *(f"{k}={described(v)}" for k, v in function.keywords.items())]
        return f"{described(function.func)}({', '.join(map(str, arguments))})"
    if callable(function):
        return str(getattr(function, "__qualname__", type(function).__qualname__))
    if isinstance(function, (list, tuple)):
        return f"[{', '.join(str(described(entry)) for entry in function)}]"
    return None if function is None else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(function))
