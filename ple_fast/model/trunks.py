"""The trunks that a model knows by name; any other is a module of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..losses import balance_loss
from ..modules import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    AsymmetricSharing,
    CrossStitch,
    CustomizedSharing,
    HardSharing,
    HoME,
    MLMMoE,
    MMoE,
    SingleTask,
)
from ..scalars import as_tuple, own_scalar, shown
from ..topology import Topology
from .eval_view import eval_view
from .saved_state import uncompiled

Trunk = str | nn.Module | Callable[[int], nn.Module]
CUSTOM = "custom"

TRUNKS: dict[str, Callable[..., nn.Module]] = {
    "ple": PLE,
    "cgc": CGC,
    "mmoe": MMoE,
    "ml_mmoe": MLMMoE,
    "adatt": AdaTT,
    "stem": STEM,
    "home": HoME,
    "cross_stitch": CrossStitch,
    "hard_sharing": HardSharing,
    "customized_sharing": CustomizedSharing,
    "asymmetric_sharing": AsymmetricSharing,
    "single_task": SingleTask,
}
"""Called with ``in_features``, ``num_tasks`` and the options, which are the keywords of the class."""


def plain(name: str, value: Any) -> Any:
    """A value that JSON can hold, lists as tuples, so that a model and its saved copy are built from the same.

    Scalars and arrays of NumPy become Python's own.

    Raises:
        ValueError: it holds anything else.
    """
    value = own_scalar(value)
    if isinstance(value, str):
        return str(value)  # np.str_ is one
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) in (list, tuple, range, np.ndarray):
        return tuple(plain(f"{name}[{place}]", item) for place, item in enumerate(as_tuple(value)))
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    raise ValueError(
        f"{name}: expected numbers, strings, tuples and dicts, which the configuration can hold, got {shown(value)}; "
        "say an activation by its name, or build the trunk yourself and pass the module"
    )


def options_of(kind: str) -> dict[str, bool]:
    """The options of the trunk of a name, each with whether it has to be given."""
    given = ("in_features", "num_tasks")
    parameters = inspect.signature(TRUNKS[kind]).parameters.values()
    # A model is built where its user says with model.to, in the dtype that its towers have.
    return {p.name: p.default is p.empty for p in parameters if p.name not in (*given, "device", "dtype")}


OF_TASKS = {"home": "groups", "asymmetric_sharing": "sources"}
"""By name of the trunk its option that lists tasks."""


def number_tasks(trunk: Trunk, options: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The options with numbers in the place of names of tasks.

    Raises:
        ValueError: a name that no task has.
    """
    option = OF_TASKS.get(trunk) if isinstance(trunk, str) else None
    if option is None or not isinstance(options.get(option), tuple):
        return dict(options)

    def number(place: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in tasks:
            raise ValueError(f"{place}: expected one of the tasks {list(tasks)}, or its number, got {value!r}")
        return tasks.index(value)

    rows = [
        tuple(number(f"trunk_options[{option!r}][{i}][{j}]", value) for j, value in enumerate(row))
        if isinstance(row, tuple)
        else row
        for i, row in enumerate(options[option])
    ]
    return {**options, option: tuple(rows)}


def build_trunk(kind: str, in_features: int, num_tasks: int, options: Mapping[str, Any]) -> nn.Module:
    """The trunk of that name.

    Raises:
        ValueError: an unknown name, or options that the trunk refuses.
        TypeError: an option that the trunk does not have, or one that it needs is missing.
    """
    if kind not in TRUNKS:
        raise ValueError(f"trunk: expected one of {', '.join(TRUNKS)}, a module or a function, got {kind!r}")
    known = options_of(kind)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"trunk_options: expected options of {kind!r}, {', '.join(known)}; got {unknown}")
    missing = [name for name, needed in known.items() if needed and name not in options]
    if missing:
        raise TypeError(f"trunk_options: expected {', '.join(missing)}, which {kind!r} needs, got {sorted(options)}")
    return TRUNKS[kind](in_features, num_tasks, **options)


def make_trunk(trunk: Trunk, in_features: int, num_tasks: int, options: Mapping[str, Any]) -> nn.Module:
    """The trunk that a user names, passes or has a function for.

    Raises:
        ValueError: as ``build_trunk``, or options with a trunk that has no name.
        TypeError: as ``build_trunk``, or it is none of the three.
    """
    if isinstance(trunk, str):
        return build_trunk(trunk, in_features, num_tasks, options)
    if options:
        raise ValueError(f"trunk_options: expected none with a trunk of your own, got {sorted(options)}")
    if not callable(trunk):
        raise TypeError(f"trunk: expected a name, a module, or a function of in_features, got {shown(trunk)}")
    made = trunk if isinstance(trunk, nn.Module) else trunk(in_features)
    if not isinstance(made, nn.Module):
        raise TypeError(f"trunk: expected the function to return a module, got {shown(made)}")
    return made


def known_slots(trunk: Any) -> int | None:
    """Slots of a trunk of levels with a topology."""
    trunk = uncompiled(trunk) if isinstance(trunk, nn.Module) else trunk
    levels: Any = getattr(trunk, "levels", None) or [trunk]
    first = uncompiled(levels[0]) if isinstance(levels[0], nn.Module) else None
    topology = getattr(first, "topology", None)
    return topology.num_slots if isinstance(topology, Topology) else None


def trunk_slots(trunk: nn.Module, num_tasks: int) -> int:
    """Slots of a trunk that has one for each task.

    Raises:
        TypeError: a trunk of the user's own without topologies.
        ValueError: it has fewer.
    """
    slots = known_slots(trunk)
    if slots is None:
        raise TypeError(
            "task_embeddings: expected a trunk of levels with a topology, which says how many slots it has, got "
            f"{type(trunk).__name__}"
        )
    if slots < num_tasks:
        raise ValueError(
            f"task_embeddings: expected a trunk with a slot for each of the {num_tasks} tasks (STEM, PLE, CGC, AdaTT, "
            f"CrossStitch), got {type(trunk).__name__}, whose first level has {slots}"
        )
    return slots


def _parts(trunk: nn.Module) -> set[int]:
    return {id(part) for part in (*trunk.modules(), *trunk.parameters(), *trunk.buffers())}


def _first_call(trunk: nn.Module, x: Tensor) -> Any:
    """In eval mode; nobody else can use a trunk that has no weights yet, so its own flags may be set."""
    modes = [(module, module.training) for module in trunk.modules()]
    try:
        return trunk.eval()(x)
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def trunk_width(trunk: nn.Module, in_features: int, num_tasks: int, like: Tensor) -> int:
    """H of a trunk that returns ``(B, T, H)``, from one call in eval mode on two rows of zeros.

    A trunk that makes its parameters at the first call (``nn.LazyLinear``) has them afterwards.

    Raises:
        ValueError: it returns something else.
    """
    zeros = like.new_zeros(2, in_features)
    if any(isinstance(parameter, UninitializedParameter) for parameter in trunk.parameters()):
        y = _first_call(trunk, zeros)
    else:
        view = eval_view(trunk)
        before = _parts(trunk), _parts(view)
        y = view(zeros)
        if view is not trunk and (_parts(trunk), _parts(view)) != before:  # which went to the view
            y = _first_call(trunk, zeros)
    if not isinstance(y, Tensor) or y.dim() != 3 or tuple(y.shape[:2]) != (2, num_tasks):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"trunk: expected {type(trunk).__name__} to return (B, {num_tasks}, H), one row per task, "
            f"for an input (B, {in_features}); for (2, {in_features}) got {got}"
        )
    return int(y.shape[2])


@torch.no_grad()
def check_balanced(trunk: nn.Module, in_features: int, like: Tensor) -> None:
    """The trunk has gates whose use can be balanced: it takes ``return_gates="shares"``.

    Raises:
        ValueError: it does not, or has no gates.
    """
    try:
        _, gates = eval_view(trunk)(like.new_zeros(2, in_features), return_gates="shares")
        balance_loss(gates, "gate")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'balance: expected a trunk with gates, which takes return_gates="shares" as PLE does, got '
            f"{type(trunk).__name__} ({error})"
        ) from error
