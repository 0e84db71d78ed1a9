"""A level's call as the arguments of an operator: lists of tensors, numbers and text, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ..call import LevelCall
from ..plan import LevelPlan
from ..slots import Place
from ..state import LayerState, LevelState, NormState

NONE, LAYER, RUNNING, BATCH, MOVING = range(5)
"""Norms in a list of numbers: by running statistics, by the batch's, or by those, which running ones take up."""


class Arguments(NamedTuple):
    """What both operators begin with, in the order of their schemas."""

    x: Sequence[Tensor]
    places: Sequence[int]
    """Of the slots among ``x``, two numbers each."""
    gate_x: Sequence[Tensor]
    gate_places: Sequence[int]
    """Empty where the gates read what the experts read."""
    tensors: Sequence[Tensor | None]
    """The flat tuple of the level."""
    statistics: Sequence[Tensor]
    """Running mean and variance of every norm that is ``RUNNING`` or, in forward, ``MOVING``. They are only read."""
    seed: Tensor | None
    """Of dropout, one int64."""
    plan: str
    backend: str
    state: Sequence[float]
    """``numbers_of`` the level's state."""

    @property
    def all_tensors(self) -> list[Tensor | None]:
        """Those that may need a gradient, in the order of ``needed``."""
        return [*self.x, *self.gate_x, *self.tensors]

    def call(self, *, moments: Sequence[Tensor] = (), listed: bool = False) -> LevelCall:
        """The call; ``moments``: zeros that take the mean and variance of norms that are ``MOVING``.

        A seed stays a tensor: tracers call this too, and what runs on the CPU may read it.
        """
        plan = LevelPlan.from_text(self.plan)
        places = _places(self.places)
        gate_places = _places(self.gate_places) if self.gate_places else None
        state = _state_of(self.state, self.statistics, self.seed, moments)
        return LevelCall(plan, state, places, len(self.x), gate_places, len(self.gate_x), listed, False, self.backend)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.x[0].shape[0]

    def moving(self) -> list[Tensor]:
        """Of ``statistics``, those that the batch's are taken up in."""
        return _statistics_with(MOVING, self.state, self.statistics)


def arguments_of(call: LevelCall, tensors: Sequence[Tensor | None], state: Sequence[float],
                 statistics: Sequence[Tensor], seed: Tensor | None) -> Arguments:  # fmt: skip
    """The arguments of a call whose state is given as ``numbers_of`` and ``statistics_of``."""
    start = call.num_x + call.num_gate_x
    places = [number for place in call.places for number in place]
    gate_places = [] if call.gate_places is None else [number for place in call.gate_places for number in place]
    x: list[Tensor] = list(tensors[: call.num_x])  # type: ignore[arg-type]  # inputs are never None
    gate_x: list[Tensor] = list(tensors[call.num_x : start])  # type: ignore[arg-type]
    return Arguments(
        x, places, gate_x, gate_places, list(tensors[start:]), list(statistics), seed, call.plan.text, call.backend,
        list(state),
    )  # fmt: skip


def numbers_of(state: LevelState) -> tuple[float, ...]:
    """Code and epsilon of every norm, then the rates of dropout."""
    numbers: list[float] = []
    for norm in state.norms():
        numbers += (float(_code(norm)), 0.0 if norm is None else norm.eps)
    return (*numbers, *(layer.dropout for layer in state.layers))


def statistics_of(state: LevelState) -> list[Tensor]:
    """``Arguments.statistics``."""
    found = []
    for norm in state.norms():
        if norm is not None and _code(norm) in (RUNNING, MOVING):
            assert norm.running_mean is not None and norm.running_var is not None
            found += [norm.running_mean, norm.running_var]
    return found


def for_backward(state: Sequence[float], statistics: Sequence[Tensor]) -> tuple[list[float], list[Tensor]]:
    """State and statistics without norms that are ``MOVING``: backward has the batch's, and no use for the running."""
    numbers = list(state)
    for i, code in enumerate(_norm_codes(state)):
        numbers[2 * i] = float(BATCH if code == MOVING else code)
    return numbers, _statistics_with(RUNNING, state, statistics)


def _statistics_with(code: int, state: Sequence[float], statistics: Sequence[Tensor]) -> list[Tensor]:
    """The statistics of the norms with one of the codes that have any."""
    codes = [own for own in _norm_codes(state) if own in (RUNNING, MOVING) for _ in range(2)]
    return [tensor for tensor, own in zip(statistics, codes, strict=True) if own == code]


def _code(norm: NormState | None) -> int:
    if norm is None:
        return NONE
    if norm.kind == "layer":
        return LAYER
    if not norm.batch:
        return RUNNING
    return MOVING if norm.moves else BATCH


def _norm_codes(state: Sequence[float]) -> Iterator[int]:
    layers = (len(state) - 2) // 5  # two norms and a rate each, and the norm of the logits
    return (int(state[2 * i]) for i in range(2 * layers + 1))


def _state_of(
    state: Sequence[float], statistics: Sequence[Tensor], seed: Tensor | None, moments: Sequence[Tensor]
) -> LevelState:
    norms: list[NormState | None] = []
    given, taken = iter(statistics), iter(moments)
    for i, code in enumerate(_norm_codes(state)):
        eps = state[2 * i + 1]
        if code in (NONE, LAYER):
            norms.append(NormState("layer", eps) if code == LAYER else None)
        elif code == RUNNING:
            norms.append(NormState("batch", eps, False, 0.0, next(given), next(given)))
        elif code == MOVING:
            next(given), next(given)
            norms.append(NormState("batch", eps, True, 1.0, next(taken), next(taken)))
        else:
            norms.append(NormState("batch", eps, True))
    rates = state[2 * len(norms) :]
    layers = tuple(
        LayerState(norm, dice, rate) for norm, dice, rate in zip(norms[0:-1:2], norms[1:-1:2], rates, strict=True)
    )
    return LevelState(layers, norms[-1], seed)


def _places(flat: Sequence[int]) -> tuple[Place, ...]:
    return tuple(Place(flat[i], flat[i + 1]) for i in range(0, len(flat), 2))
