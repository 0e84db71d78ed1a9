"""A stack of extraction networks, and how its levels are built and checked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from ..functional import GateShares, Input
from ..specs import GateSpec, MLPSpec
from ..topology import Topology
from .layers import OffsetStart
from .network import CheckedModule, ExtractionNetwork
from .options import UngatedOptions
from .symbolic import fixed, is_symbolic

if TYPE_CHECKING:
    from typing_extensions import Self


class Stack(CheckedModule):
    """Extraction networks, the mixtures of one being the slots of the next.

    The first ``num_tasks * parts`` mixtures of the last level are the tasks', ``parts`` for each, side by side in the
    output; with ``last_shared`` the others follow.
    """

    levels: nn.ModuleList
    num_tasks: int
    last_shared: bool
    parts: int

    def _set_levels(
        self, levels: Sequence[ExtractionNetwork], num_tasks: int, last_shared: bool = False, parts: int = 1
    ) -> None:
        self.levels = nn.ModuleList(levels)
        self.num_tasks, self.last_shared, self.parts = num_tasks, last_shared, parts

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    @property
    def in_features(self) -> int:
        """Input width ``D``."""
        return self._level(0).in_features

    @property
    def out_features(self) -> int:
        """Output width ``H`` of every task."""
        return self._level(-1).out_features * self.parts

    def _level(self, index: int) -> ExtractionNetwork:
        level = self.levels[index]
        assert isinstance(level, ExtractionNetwork)
        return level

    def for_inference(self, *, plain: bool = False) -> Self:
        """A copy for deployment, in eval mode, with every level as ``ExtractionNetwork.for_inference`` makes it.

        Args:
            plain: run, trace and export PyTorch's own operators, on a GPU too, whatever ``use_backend`` says.

        Raises:
            TypeError, ValueError: a norm cannot be served; the message names it.
        """
        levels: dict[int, Any] = {
            id(level): self._level(i).for_inference(plain=plain) for i, level in enumerate(self.levels)
        }
        return copy.deepcopy(self, levels).requires_grad_(False).eval()

    def reset_parameters(self) -> None:
        """Initialise every level anew."""
        for level in self.levels:
            assert isinstance(level, ExtractionNetwork)
            level.reset_parameters()

    @overload
    def forward(self, x: Input, *, return_gates: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Input, *, return_gates: Literal[True]) -> tuple[Tensor, list[list[Tensor]]]: ...
    @overload
    def forward(self, x: Input, *, return_gates: Literal["shares"]) -> tuple[Tensor, list[GateShares]]: ...
    def forward(
        self, x: Input, return_gates: bool | Literal["shares"] = False
    ) -> Tensor | tuple[Tensor, list[list[Tensor]]] | tuple[Tensor, list[GateShares]]:
        """Run all levels.

        Args:
            x: ``(B, D)``, read by every slot of the first level, ``(B, S, D)``, or a list of S tensors ``(B, D)``.
            return_gates: also return all weights; or with ``"shares"`` what ``JointLoss(balance=...)`` reads.

        Returns:
            ``(B, T, H)`` (``(B, T + 1, H)`` with ``last_shared``); read it with ``unbind(1)``. On request also, per
            level and per mixture, ``(B, |A(o)|)`` float32, differentiable; or per level its :class:`GateShares`.

        Raises:
            TypeError, ValueError: the input does not fit, or batch norm in train mode got one row.
        """
        y: Any = x
        gates: list[Any] = []
        if return_gates is not False and not isinstance(return_gates, str):
            return_gates = fixed("return_gates", return_gates, False)
        level: Any
        for level in self.levels:
            gate_input = self._raw(x) if level.gate_spec.input == "raw" else None
            if return_gates:
                y, weights = level(y, gate_input, return_gates=return_gates)
                gates.append(weights)
            else:
                y = level(y, gate_input)
        out: Tensor = y
        mixtures = self.num_tasks * self.parts
        if not self.last_shared and level.topology.num_outputs != mixtures:
            out = out[:, :mixtures]
        if self.parts > 1:
            out = out.reshape(-1, self.num_tasks, self.out_features)
        return (out, gates) if return_gates else out

    def _raw(self, x: Input) -> Input:
        """What gates on the raw input read. The only slot of a first level serves levels of any number of slots."""
        if self._level(0).topology.num_slots != 1 or is_symbolic(x):  # a trace is of one form of the input
            return x
        if isinstance(x, Tensor):
            return x[:, 0] if x.dim() == 3 else x
        return x[0] if len(x) == 1 else x

    def extra_repr(self) -> str:
        shared = ", last_shared=True" if self.last_shared else ""
        return f"in_features={self.in_features}, num_tasks={self.num_tasks}{shared}"


def build_levels(
    in_features: int,
    topologies: Sequence[Topology],
    experts: Sequence[MLPSpec | Sequence[MLPSpec]],
    gates: Sequence[GateSpec],
    options: UngatedOptions,
    offsets: Sequence[OffsetStart | None] | None = None,
) -> list[ExtractionNetwork]:
    """One level per topology, each as wide as the one below it puts out; raw gates read ``in_features``."""
    levels, width = [], in_features
    starts = [None] * len(topologies) if offsets is None else offsets
    for topology, spec, gate, start in zip(topologies, experts, gates, starts, strict=True):
        level = ExtractionNetwork(
            width,
            topology,
            experts=spec,
            gate=gate,
            gate_features=in_features if gate.input == "raw" else None,
            recompute=options["recompute"],
            device=options["device"],
            dtype=options["dtype"],
            _offset=start,
        )
        levels.append(level)
        width = level.out_features
    return levels


def check_levels(levels: Sequence[ExtractionNetwork]) -> None:
    """The mixtures of each level can be the slots of the next.

    Raises:
        TypeError: an entry is no ``ExtractionNetwork``.
        ValueError: no levels, or levels that do not fit together.
    """
    if not levels:
        raise ValueError("levels: expected at least one level, got none")
    for i, level in enumerate(levels):
        if not isinstance(level, ExtractionNetwork):
            raise TypeError(f"levels[{i}]: expected an ExtractionNetwork, got {type(level).__name__}")
    raw = levels[0].in_features
    for i in range(1, len(levels)):
        below, level = levels[i - 1], levels[i]
        if below.out_features != level.in_features:
            raise ValueError(
                f"levels[{i}]: expected in_features={below.out_features}, the output width of the level below, "
                f"got {level.in_features}"
            )
        if below.topology.num_outputs != level.topology.num_slots:
            raise ValueError(
                f"levels[{i}]: expected {below.topology.num_outputs} slots, the mixtures of the level below, "
                f"got {level.topology.num_slots}"
            )
        if level.gate_spec.input == "raw" and level.gate_features != raw:
            raise ValueError(f"levels[{i}]: its gates read the raw input of width {raw}, got {level.gate_features}")
