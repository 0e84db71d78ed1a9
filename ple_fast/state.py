"""What a level reads at one call besides its differentiable tensors: norms' settings and statistics, dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn


class NormState(NamedTuple):
    """A norm's settings and buffers at one call, read from the module that owns them."""

    kind: str
    eps: float
    batch: bool = False
    """Batch norm: normalise by the statistics of this batch."""
    factor: float = 0.0
    """Weight of this batch in the running statistics."""
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    module: nn.Module | None = None
    """A norm that somebody put in the place of ours (synchronised over ranks, say): it is called as it is."""

    @property
    def moves(self) -> bool:
        """Whether running statistics take up those of this batch."""
        return self.batch and self.factor > 0.0 and self.running_mean is not None


class LayerState(NamedTuple):
    """What one layer reads at one call besides its differentiable tensors."""

    norm: NormState | None
    dice: NormState | None
    dropout: float
    """Probability, 0 outside training."""


NO_STATE = LayerState(None, None, 0.0)
"""Of a layer without norms that drops nothing."""


class LayerKind(NamedTuple):
    """What of a ``LayerState`` decides which arithmetic runs; of a norm ``"layer"``, ``"batch"`` or ``"running"``."""

    norm: str | None
    dice: str | None
    drops: bool


NO_KIND = LayerKind(None, None, False)


class LevelKind(NamedTuple):
    """The same of a ``LevelState``."""

    layers: tuple[LayerKind, ...]
    gate_norm: str | None


@lru_cache(maxsize=1024)
def _bare_kind(num_layers: int) -> LevelKind:
    """Of a level that has neither norms nor dropout."""
    return LevelKind((NO_KIND,) * num_layers, None)


def _kind_of(norm: NormState | None) -> str | None:
    return None if norm is None else "running" if norm.kind == "batch" and not norm.batch else norm.kind


class LevelState(NamedTuple):
    """The states of all layers, in the order of ``flatten``, and what the level draws at one call."""

    layers: tuple[LayerState, ...]
    gate_norm: NormState | None
    seed: int | Tensor | None
    """Seed of the dropout masks; None where nothing is dropped. A tensor: one int64 on the device of kernels."""

    @property
    def is_plain(self) -> bool:
        """Whether there are no norms and no dropout: nothing that a call changes or draws."""
        return all(n is None for n in self.norms()) and not any(layer.dropout for layer in self.layers)

    @property
    def has_foreign_norm(self) -> bool:
        """Whether any norm is not ours."""
        for layer in self.layers:  # plain loops: every call waits for this
            for norm in (layer.norm, layer.dice):
                if norm is not None and norm.module is not None:
                    return True
        return self.gate_norm is not None and self.gate_norm.module is not None

    def kind(self) -> LevelKind:
        """What decides which arithmetic runs."""
        if self.gate_norm is None and self.layers.count(NO_STATE) == len(self.layers):
            return _bare_kind(len(self.layers))
        layers = tuple([
            NO_KIND if own is NO_STATE else LayerKind(_kind_of(own.norm), _kind_of(own.dice), own.dropout > 0.0)
            for own in self.layers
        ])  # fmt: skip
        return LevelKind(layers, _kind_of(self.gate_norm))

    def still(self) -> LevelState:
        """Of a forward that is run again: batch statistics are taken, running ones stay."""

        def norm(own: NormState | None) -> NormState | None:
            return (
                own._replace(factor=0.0, running_mean=None, running_var=None) if own is not None and own.batch else own
            )

        layers = tuple(own._replace(norm=norm(own.norm), dice=norm(own.dice)) for own in self.layers)
        return self._replace(layers=layers, gate_norm=norm(self.gate_norm))

    def read_by_backward(self) -> list[Tensor]:
        """Tensors that a backward reads: running statistics that stood in for the batch's, and a seed on a device."""
        found: list[Tensor] = []
        norms = [self.gate_norm]  # plain loops: a small batch waits for this
        for layer in self.layers:
            norms += (layer.norm, layer.dice)
        for norm in norms:
            if norm is not None and not norm.batch and norm.running_mean is not None:
                found += (norm.running_mean, norm.running_var)  # type: ignore[arg-type]  # it has both
        if isinstance(self.seed, Tensor):
            found.append(self.seed)
        return found

    def form(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        """All that the arithmetic reads of the state: settings, to compare by, and tensors."""
        settings: list[Any] = []
        tensors: list[Tensor] = []
        for layer in self.layers:
            if layer is not NO_STATE:
                settings += (layer.dropout, _form_of(layer.norm, tensors), _form_of(layer.dice, tensors))
            else:
                settings.append(None)
        settings.append(_form_of(self.gate_norm, tensors))
        if isinstance(self.seed, Tensor):
            tensors.append(self.seed)
        return tuple(settings), tensors

    def with_saved(self, tensors: Sequence[Tensor]) -> LevelState:
        """The same state with these in the place of those that are ``read_by_backward``."""
        given = iter(tensors)

        def norm(own: NormState | None) -> NormState | None:
            if own is None or own.batch or own.running_mean is None:
                return own
            return own._replace(running_mean=next(given), running_var=next(given))

        gate_norm = norm(self.gate_norm)
        layers = tuple(layer._replace(norm=norm(layer.norm), dice=norm(layer.dice)) for layer in self.layers)
        return LevelState(layers, gate_norm, next(given) if isinstance(self.seed, Tensor) else self.seed)

    def norms(self) -> Iterator[NormState | None]:
        """Every norm, in order."""
        for layer in self.layers:
            yield layer.norm
            yield layer.dice
        yield self.gate_norm


def _form_of(norm: NormState | None, tensors: list[Tensor]) -> tuple[Any, ...] | None:
    if norm is None:
        return None
    running = [t for t in (norm.running_mean, norm.running_var) if t is not None]
    tensors += running
    return norm.kind, norm.eps, norm.batch, norm.factor, len(running)
