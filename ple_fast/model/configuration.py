"""The configuration of a saved model: what stands in it, checked key by key before anything is built of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ple_fast_encoder.columns import Column, from_json

from ..losses import TaskLoss
from .trunks import CUSTOM

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Rule(NamedTuple):
    """What a value may be, and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(holds, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


TEXT = Rule(_is_text, "text")
NAME = Rule(lambda value: isinstance(value, str) or _is_int(value), "text or an int")
INT = Rule(_is_int, "an int")
NUMBER = Rule(lambda value: _is_int(value) or isinstance(value, float), "a number")
OBJECT = Rule(lambda value: isinstance(value, Mapping), "an object")
LIST = Rule(lambda value: isinstance(value, (list, tuple)), "a list")
OBJECTS = Rule(_is_list_of(OBJECT.holds), "a list of objects")
INTS = Rule(_is_list_of(_is_int), "a list of ints")
TEXT_BY_NAME = Rule(lambda value: isinstance(value, Mapping) and all(map(_is_text, value.values())), "names by name")


def _or_null(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.words} or null")


WHOLE = {
    "dtype": Rule(lambda value: _is_text(value) and value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "columns": OBJECTS,
    "tasks": OBJECTS,
    "trunk": OBJECT,
    "tower_units": INTS,
    "tower_activation": TEXT,
    "tower_dropout": NUMBER,
    "given": TEXT_BY_NAME,
}
SOURCES = Rule(lambda value: isinstance(value, Mapping) and all(map(_is_list_of(_is_text), value.values())), "names")
NAMES = Rule(lambda value: isinstance(value, Mapping) and all(map(_is_list_of(NAME.holds), value.values())), "names")
LIST_OF_NAMES = Rule(_is_list_of(NAME.holds), "names")
COLUMNS = {
    "Categorical": {"kind": TEXT, "name": NAME, "values": _or_null(LIST), "size": _or_null(INT), "width": INT},
    "Hashed": {"kind": TEXT, "name": NAME, "buckets": INT, "width": INT},
    "Numeric": {
        "kind": TEXT,
        "name": NAME,
        "transform": _or_null(TEXT),
        "mean": NUMBER,
        "std": NUMBER,
        "missing": TEXT,
        "width": _or_null(INT),
    },
}
SHARING = {"kind": TEXT, "name": NAME, "share": NAME}
"""Of a categorical column without an embedding of its own."""
SEVERAL = {"pooling": TEXT, "max_length": INT, "padding": NAME, "keep": TEXT}
"""Of a column of several values per row."""
TASK = {"name": TEXT, "kind": TEXT, "num_classes": _or_null(INT), "weight": NUMBER, "gamma": NUMBER}
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
LATER = {
    "derived": SOURCES,  # of a trunk of the user's own: which of its entries follow from which
    "task_columns": NAMES,
    "domain_columns": LIST_OF_NAMES,
    "personal_columns": LIST_OF_NAMES,
    "prior_gate_units": INT,
    "sparse_embeddings": FLAG,
    "task_embeddings": INT,
    "balance": TEXT,
    "balance_weight": NUMBER,
}
"""Written only where there are any: older releases read the others."""
LATER_OF_TASK = {"pos_weight": NUMBER, "standardise": FLAG, "mean": NUMBER, "std": NUMBER}
"""Written only where they are not the default: older releases read the others."""
OWN_TRUNK = {"kind": TEXT, "class": TEXT}
NAMED_TRUNK = {"kind": TEXT, "options": OBJECT}


def check(where: str | Path, config: Mapping[str, Any]) -> None:
    """Looks at every key, and at the type of every value.

    Args:
        where: what errors begin with.

    Raises:
        ValueError: one is missing, unknown, or of another type.
    """
    _check_fields(where, "", config, WHOLE, may=LATER)
    for place, column in enumerate(config["columns"]):
        kind = column.get("kind")
        if not isinstance(kind, str) or kind not in COLUMNS:
            raise ValueError(f"{where}: columns[{place}]: expected a kind of {', '.join(COLUMNS)}, got {kind!r}")
        rules = SHARING if kind == "Categorical" and "share" in column else COLUMNS[kind]
        _check_fields(where, f"columns[{place}].", column, rules, may=None if kind == "Numeric" else SEVERAL)
    for place, task in enumerate(config["tasks"]):
        _check_fields(where, f"tasks[{place}].", task, TASK, may=LATER_OF_TASK)
    trunk = config["trunk"]
    _check_fields(where, "trunk.", trunk, OWN_TRUNK if trunk.get("kind") == CUSTOM else NAMED_TRUNK)


def _check_fields(
    where: str | Path,
    prefix: str,
    fields: Mapping[str, Any],
    rules: Mapping[str, Rule],
    may: Mapping[str, Rule] | None = None,
) -> None:
    known = {**rules, **(may or {})}
    for key, rule in known.items():
        if key not in fields:
            if key in rules:
                raise ValueError(f"{where}: {prefix}{key}: expected {rule.words}, got no such key")
        elif not rule.holds(fields[key]):
            raise ValueError(f"{where}: {prefix}{key}: expected {rule.words}, got {fields[key]!r:.200}")
    if unknown := [key for key in fields if key not in known]:
        raise ValueError(f"{where}: {prefix}{unknown[0]}: expected one of {', '.join(known)}, got this key")


@contextlib.contextmanager
def read_from(where: str | Path, key: str = "") -> Iterator[None]:
    """What a value in a file makes impossible is a ValueError that names the file."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:  # torch's are RuntimeErrors
        raise ValueError(f"{where}: {key}{error}") from error


def columns_of(where: str | Path, config: Mapping[str, Any]) -> list[Column]:
    """The columns of a configuration that was checked."""
    found = []
    for place, column in enumerate(config["columns"]):
        with read_from(where, f"columns[{place}]: "):
            found.append(from_json(column))
    return found


def task_to_json(task: TaskLoss) -> dict[str, Any]:
    """A task as plain values, for :func:`tasks_of`."""
    defaults = asdict(TaskLoss("any"))
    return {name: value for name, value in asdict(task).items() if name in TASK or value != defaults[name]}


def tasks_of(where: str | Path, config: Mapping[str, Any]) -> list[TaskLoss]:
    """The tasks of a configuration that was checked."""
    found = []
    for place, task in enumerate(config["tasks"]):
        with read_from(where, f"tasks[{place}]: "):
            found.append(TaskLoss(**task))
    return found
