"""What is known of a row beforehand: gates of some columns that scale the features, and what towers read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import EPNet, PPNet
from ..scalars import check_count, own_scalar, shown


class PriorOptions:
    """The options that describe ``Priors``, checked.

    Raises:
        TypeError: no list of names, or no number of units.
        ValueError: a column that there is not, or is named twice; no column; units without columns.
    """

    def __init__(self, domain: Any, personal: Any, units: Any, columns: Sequence[str]) -> None:
        self.domain = _names("domain_columns", domain, columns)
        self.personal = _names("personal_columns", personal, columns)
        self.units = None if units is None else check_count("prior_gate_units", units)
        if self.units is not None and not self:
            raise ValueError("prior_gate_units: expected domain_columns or personal_columns with it, got neither")

    def __bool__(self) -> bool:
        return bool(self.domain or self.personal)

    def to_config(self) -> dict[str, Any]:
        """As keywords of the model, those that are used."""
        found = {"domain_columns": self.domain, "personal_columns": self.personal}
        used: dict[str, Any] = {name: list(names) for name, names in found.items() if names}
        return used | ({} if self.units is None else {"prior_gate_units": self.units})


def _names(option: str, names: Any, columns: Sequence[str]) -> tuple[str, ...]:
    if names is None:
        return ()
    if isinstance(names, (str, Mapping)) or not isinstance(names, Iterable):
        raise TypeError(f"{option}: expected a list of names of columns, got {shown(names)}")
    found = tuple(map(own_scalar, names))
    for name in found:
        if name not in columns:
            raise ValueError(f"{option}: expected some of the columns {list(columns)[:60]}, got {shown(name)}")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{option}: expected at least one column, each once, got {shown(names)}")
    return found


class Priors(nn.Module):
    """PEPNet beside a trunk: features ``(B, F)`` to those that the trunk reads, and the scales of the towers' layers.

    Args:
        features: of each feature the name of its column.
        options: which columns the gates read.
        num_tasks: towers.
        tower_features: what each layer of a tower reads.
    """

    def __init__(
        self, features: Sequence[str], options: PriorOptions, num_tasks: int, tower_features: Sequence[int]
    ) -> None:
        super().__init__()
        self._domain, self._personal = _runs(features, options.domain), _runs(features, options.personal)
        width = len(features)
        self.domain = self.personal = None
        if self._domain:
            self.domain = EPNet(width, _width(self._domain), hidden_units=options.units)
        if self._personal:
            self.personal = PPNet(width, _width(self._personal), num_tasks, tower_features, hidden_units=options.units)

    @property
    def factor(self) -> float:
        """Of the scales."""
        return 2.0 if self.personal is None else self.personal.factor

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``(B, F)`` to ``(B, F)``, and ``(B, T, D)`` for each layer of the towers, or nothing."""
        scaled = features
        if self.domain is not None:
            scaled = self.domain(features, _picked(features, self._domain))
        if self.personal is None:
            return scaled, []
        scales: list[Tensor] = self.personal(scaled, _picked(features, self._personal))
        return scaled, scales


def _runs(features: Sequence[str], names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Where the features of these columns stand, as first and last + 1."""
    found, start = [], 0
    for is_one, run in groupby(name in names for name in features):
        stop = start + len(list(run))
        if is_one:
            found.append((start, stop))
        start = stop
    return tuple(found)


def _width(runs: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in runs)


def _picked(features: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    parts = [features[:, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
