"""What an object of Python refers to: where modules and parameters may be held beside a module's own children."""

from __future__ import annotations

from collections.abc import Sequence
from types import CellType, FunctionType
from typing import Any


def remembered(function: FunctionType) -> list[Any]:
    """What a function closes over, and its defaults."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def attributes(value: Any) -> list[Any]:
    """The attributes of an object, those in slots too."""
    slots = [name for base in type(value).__mro__ for name in _slots(base)]
    try:
        return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    except Exception:  # it stands for something that is gone, or not there yet, and holds nothing itself
        return []


def _slots(kind: type) -> Sequence[str]:
    """What a class keeps outside of ``__dict__``, by the names under which it is found."""
    given = vars(kind).get("__slots__", ())
    names = [name for name in ((given,) if isinstance(given, str) else given) if not name.endswith("__")]
    return [f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name for name in names]


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
