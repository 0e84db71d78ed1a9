"""Mixtures that are added into one output: what such a wiring says, and what each output weighs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .scalars import as_tuple, check_counts, is_sequence, shown


def check_outputs(outputs: Any, num_mixtures: int) -> tuple[int, ...] | None:
    """``mixture_output`` of a topology; None where each mixture is an output of its own.

    Raises:
        TypeError: no sequence of ints.
        ValueError: not one per mixture, or not 0, 1, ... in order.
    """
    if outputs is None:
        return None
    if not is_sequence(outputs):
        raise TypeError(f"mixture_output: expected a sequence of ints, got {shown(outputs)} ({type(outputs).__name__})")
    found = check_counts("mixture_output", as_tuple(outputs), least=0)
    if len(found) != num_mixtures:
        raise ValueError(f"mixture_output: expected one per mixture ({num_mixtures}), got {len(found)}")
    if found[0] != 0 or any(b - a not in (0, 1) for a, b in pairwise(found)):
        raise ValueError(
            "mixture_output: expected outputs from 0 on, in order and none left out, such as "
            f"{tuple(o // 2 for o in range(num_mixtures))}; got {found}"
        )
    # One form for what is usual, which plans, files and comparisons then agree on.
    return None if found == tuple(range(num_mixtures)) else found


def experts_of_outputs(
    outputs: Sequence[int], mixture_experts: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """For each output the experts that its mixtures weigh, each once, in the order of the mixtures."""
    return tuple(
        tuple(dict.fromkeys(e for o, mixed in enumerate(mixture_experts) if outputs[o] == output for e in mixed))
        for output in range(outputs[-1] + 1)
    )
