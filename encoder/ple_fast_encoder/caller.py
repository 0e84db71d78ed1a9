"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings


def warn_caller(message: str) -> None:
    """A UserWarning at the first line outside of our packages: whoever called the model."""
    level, frame = 1, sys._getframe()
    ours = ("ple_fast", "ple_fast_encoder", "torch")  # which calls forward
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ours:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
