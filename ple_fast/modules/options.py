"""The keywords that trunks have in common: type, default and meaning of each stand here, once."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import torch

from ..scalars import as_tuple, check_count, is_sequence, shown
from ..specs import Activation, GateSpec, MLPSpec

Units = int | Sequence[int] | Sequence[Sequence[int]]
Class = TypeVar("Class", bound=type)


class Option(NamedTuple):
    """What a keyword is where nobody gives it, and what it means."""

    default: Any
    meaning: str


class UngatedOptions(TypedDict, total=False):
    """Keywords of every trunk."""

    expert_units: Annotated[
        Units,
        Option(
            (256, 128),
            "widths of an expert's layers; with ``num_levels`` also one such tuple per level.",
        ),
    ]
    activation: Annotated[
        Any,
        Option(
            "relu",
            "of experts, one or one per layer: relu, leaky_relu, prelu, gelu, gelu_tanh, silu, tanh, sigmoid, dice, "
            "row_dice, identity, or a ``torch.nn`` class or instance.",
        ),
    ]
    norm: Annotated[
        Any, Option(None, 'of the experts\' layers, before the activation: None, ``"batch"`` or ``"layer"``.')
    ]
    dropout: Annotated[Any, Option(0.0, "after the experts' layers.")]
    recompute: Annotated[
        bool, Option(False, "save inputs only, and run the forward again in backward: less memory, more time.")
    ]
    device: Annotated[torch.device | str | None, Option(None, "of the parameters.")]
    dtype: Annotated[torch.dtype | None, Option(None, "of the parameters.")]


class LevelOptions(UngatedOptions, total=False):
    """Keywords of every trunk that has gates."""

    gate_units: Annotated[
        Sequence[int],
        Option(
            (),
            "widths of the gates' hidden layers, whose activation is the (first) one of experts; ``()`` is the paper's "
            "single linear layer.",
        ),
    ]
    gate_bias: Annotated[bool, Option(True, "bias of the gates' last layer.")]
    gate_top_k: Annotated[
        int | None,
        Option(None, "experts that a gate chooses for each row, those of the largest logits; None: it weighs all."),
    ]
    gate_joint_k: Annotated[
        int,
        Option(0, "of ``gate_top_k``, experts that are chosen for all gates of a level together, as in ``GateSpec``."),
    ]


def takes_options(kind: type, **own_defaults: Any) -> Callable[[Class], Class]:
    """A trunk whose ``__init__`` ends in ``**options: Unpack[kind]``: it gets all of them, defaults filled in.

    ``own_defaults``: of options whose default differs in this trunk.

    The signature, and the docstring in the place of its line ``options: ...``, name them one by one, for ``help()``,
    ``inspect`` and editors that read them. An unknown keyword is a TypeError that says the nearest name.
    """
    types = get_type_hints(kind)
    options = {name: hint.__metadata__[0] for name, hint in get_type_hints(kind, include_extras=True).items()}
    defaults = {name: own_defaults.get(name, option.default) for name, option in options.items()}

    def decorate(cls: Class) -> Class:
        init = cls.__init__  # type: ignore[misc]  # that of this very class
        del init.__annotations__["options"]  # Unpack is there for type checkers only
        own = inspect.signature(init, eval_str=True)
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, default in defaults.items()
        ]
        signature = own.replace(parameters=[*list(own.parameters.values())[:-1], *keywords])

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **given: Any) -> None:
            for name in given:
                if name not in signature.parameters:
                    near = difflib.get_close_matches(name, signature.parameters, n=1, cutoff=0.75)
                    hint = f". Did you mean {near[0]!r}?" if near else ""
                    raise TypeError(f"{init.__qualname__}() got an unexpected keyword argument {name!r}{hint}")
            init(self, *args, **{**defaults, **given})

        annotations = {name: p.annotation for name, p in list(signature.parameters.items())[1:]}
        __init__.__annotations__ = {**annotations, "return": None}
        __init__.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it, stubs do not know it
        cls.__init__ = __init__  # type: ignore[misc]
        if cls.__doc__:  # None under python -OO
            cls.__doc__ = _listed(cls.__doc__, options)
        return cls

    return decorate


def _listed(doc: str, options: dict[str, Option]) -> str:
    """A docstring with a line for each option in the place of ``options: ...``."""

    def lines(found: re.Match[str]) -> str:
        return "\n".join(
            textwrap.fill(
                f"{name}: {option.meaning}", 120, initial_indent=found[1], subsequent_indent=found[1] + "    "
            )
            for name, option in options.items()
        )

    return re.sub(r"^( *)options: .*$", lines, doc, count=1, flags=re.MULTILINE)


def per_level(name: str, value: Any, levels: int, *, depth: int) -> list[Any]:
    """``value`` for every level: the same one, or (nested ``depth`` sequences deep) one per level."""
    nested, inner = 0, value
    while is_sequence(inner):
        nested += 1
        inner = next(iter(as_tuple(inner)), None)
    if nested < depth:
        return [value] * levels
    rows = as_tuple(value)
    if len(rows) != levels:
        raise ValueError(f"{name}: expected one per level ({levels}), got {len(rows)}: {shown(value)}")
    return list(rows)


def shared_per_level(shared_experts: int | Sequence[int], levels: int) -> list[int]:
    """Shared experts of every level.

    Raises:
        ValueError: there are some at one level and none at another.
    """
    counts = per_level("shared_experts", shared_experts, levels, depth=1)
    shared = [check_count("shared_experts", count, least=0) for count in counts]
    if len({bool(count) for count in shared}) > 1:
        raise ValueError(
            "shared_experts: expected some at every level or none at any, because the shared mixture of a "
            f"level is the shared slot of the next; got {shared}"
        )
    return shared


def expert_spec(units: Any, options: UngatedOptions) -> MLPSpec:
    """An expert behind the keywords, with layers of these widths."""
    return MLPSpec(units, options["activation"], norm=options["norm"], dropout=options["dropout"])


def experts_per_level(options: UngatedOptions, levels: int) -> list[MLPSpec]:
    """The experts of every level behind the keywords."""
    units = per_level("expert_units", options["expert_units"], levels, depth=2)
    return [expert_spec(widths, options) for widths in units]


def gate_spec(options: LevelOptions, **more: Any) -> GateSpec:
    """The gate behind the keywords; its hidden layers have the (first) activation of the experts."""
    activation = options["activation"]
    several = is_sequence(activation) and not isinstance(activation, Activation)
    single = as_tuple(activation)[0] if several else activation
    units: Any = options["gate_units"]
    return GateSpec(
        units, single, bias=options["gate_bias"], top_k=options["gate_top_k"], joint_k=options["gate_joint_k"], **more
    )
