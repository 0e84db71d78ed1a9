"""Numbers, flags and sequences as users pass them, Python's or NumPy's: checked, and made Python's own.

What is kept of them is hashed, compared and written as JSON, so it is never a scalar or an array of another library.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

LONGEST = 200
"""Characters of a value in an error."""


def own_scalar(value: Any) -> Any:
    """The Python value of a NumPy scalar or of a tensor without axes; anything else as it is."""
    item = getattr(value, "item", None)
    kind = getattr(getattr(value, "dtype", None), "kind", "i")
    if callable(item) and getattr(value, "ndim", None) == 0 and kind not in ("m", "M"):  # whose item may be an int
        return item()
    return value


def is_sequence(value: Any) -> bool:
    """Whether a value is several: a list, tuple, range or array, and no text."""
    if isinstance(value, Sequence):
        return not isinstance(value, (str, bytes, bytearray))
    return callable(getattr(value, "tolist", None)) and getattr(value, "ndim", 0) > 0


def as_tuple(value: Any) -> tuple[Any, ...]:
    """The entries of what :func:`is_sequence` takes for several; those of an array as Python's own."""
    return tuple(value if isinstance(value, Sequence) else value.tolist())


def shown(value: Any) -> str:
    """A value in an error: on one line, and short; several numbers of an array or a tensor by their shape alone."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """An int of at least ``least``, or an error that names it.

    Raises:
        TypeError: no integer; a bool is none.
        ValueError: it is too small.
    """
    own = own_scalar(value)
    if isinstance(own, bool) or not hasattr(type(own), "__index__"):
        raise TypeError(f"{name}: expected an int, got {shown(value)} ({type(value).__name__})")
    try:
        count = operator.index(own)
    except TypeError as error:  # an array has the method, and refuses
        raise TypeError(f"{name}: expected an int, got {shown(value)} ({type(value).__name__})") from error
    if count < least:
        raise ValueError(f"{name}: expected {least} or more, got {count}")
    return count


def check_counts(name: str, values: Any, *, least: int = 1) -> tuple[int, ...]:
    """The entries of what :func:`is_sequence` takes for several, each an int of at least ``least``: ``check_count``."""
    return tuple(check_count(f"{name}[{place}]", value, least=least) for place, value in enumerate(as_tuple(values)))


def check_seed(value: Any) -> int:
    """A seed that PyTorch's generators take, or an error that names it."""
    seed = check_count("seed", value, least=-(2**63))
    if seed >= 2**64:
        raise ValueError(f"seed: expected less than 2 ** 64, got {seed}")
    return seed


def check_number(name: str, value: Any, what: str = "a number") -> float:
    """A float, or a TypeError that says what was expected; a bool and text are no numbers."""
    own = own_scalar(value)
    if isinstance(own, (bool, str, bytes, bytearray)) or is_sequence(own):
        raise TypeError(f"{name}: expected {what}, got {shown(value)}")
    try:
        return float(own)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: expected {what}, got {shown(value)}") from error


def check_flag(name: str, value: Any) -> bool:
    """A bool, or a TypeError that names it."""
    own = own_scalar(value)
    if not isinstance(own, bool):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")
    return own
