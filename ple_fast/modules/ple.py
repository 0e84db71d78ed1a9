"""Stacks of extraction networks: PLE, CGC (its last level alone) and MMoE."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ..functional import Input
from ..specs import GateSpec, MLPSpec
from ..topology import Topology, check_count, check_task_counts
from .network import CheckedModule, ExtractionNetwork
from .symbolic import fixed

if TYPE_CHECKING:
    from typing_extensions import Self

Units = int | Sequence[int] | Sequence[Sequence[int]]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _per_level(name: str, value: Any, levels: int, *, depth: int) -> list[Any]:
    """``value`` for every level: the same one, or (nested ``depth`` sequences deep) one per level."""
    nested, inner = 0, value
    while _is_sequence(inner):
        nested += 1
        inner = inner[0] if inner else None
    if nested < depth:
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name}: expected one per level ({levels}), got {len(value)}: {value!r}")
    return list(value)


class _Stack(CheckedModule):
    """Extraction networks, the mixtures of one being the slots of the next."""

    levels: nn.ModuleList
    num_tasks: int
    last_shared: bool

    def _set_levels(self, levels: Sequence[ExtractionNetwork], num_tasks: int, last_shared: bool) -> None:
        self.levels = nn.ModuleList(levels)
        self.num_tasks, self.last_shared = num_tasks, last_shared

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
        return self._level(-1).out_features

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
    def forward(self, x: Input, *, return_gates: bool = False) -> Tensor | tuple[Tensor, list[list[Tensor]]]:
        """Run all levels.

        Args:
            x: ``(B, D)``, read by every slot of the first level, ``(B, S, D)``, or a list of S tensors ``(B, D)``.
            return_gates: also return all weights.

        Returns:
            ``(B, T, H)`` (``(B, T + 1, H)`` with ``last_shared``); read it with ``unbind(1)``. On request also, per
            level and per mixture, ``(B, |A(o)|)`` float32, differentiable.

        Raises:
            TypeError, ValueError: the input does not fit, or batch norm in train mode got one row.
        """
        y: Any = x
        gates: list[list[Tensor]] = []
        return_gates = fixed("return_gates", return_gates, False)
        for level in self.levels:
            gate_input = x if level.gate_spec.input == "raw" else None  # type: ignore[union-attr]  # ExtractionNetwork
            if return_gates:
                y, weights = level(y, gate_input, return_gates=True)
                gates.append(weights)
            else:
                y = level(y, gate_input)
        if not self.last_shared and level.topology.num_mixtures != self.num_tasks:  # type: ignore[union-attr]
            y = y[:, : self.num_tasks]
        return (y, gates) if return_gates else y


def _specs(
    units: Any, activation: Any, norm: Any, dropout: Any, gate_units: Any, gate_bias: bool
) -> tuple[MLPSpec, GateSpec]:
    """The dataclasses behind the flat keywords. Norm and dropout are the experts'; activation is shared."""
    single = activation if not _is_sequence(activation) or hasattr(activation, "_fields") else activation[0]
    return MLPSpec(units, activation, norm=norm, dropout=dropout), GateSpec(gate_units, single, bias=gate_bias)


class PLE(_Stack):
    """Progressive Layered Extraction (Tang et al., RecSys 2020, section 4.2): a trunk, ``(B, D)`` to ``(B, T, H)``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: extraction networks, at least 1; 1 is CGC.
        task_experts: experts per task: an int, one per task, or one such list per level.
        shared_experts: an int, or one per level; 0 means none, at every level.
        expert_units: widths of an expert's layers, or one such tuple per level.
        shared_expert_units: the same for shared experts; default ``expert_units``. Last widths must agree.
        gate_units: widths of the gates' hidden layers; ``()`` is the paper's single linear layer.
        gate_bias: bias of the gates' last layer.
        activation: of experts (one, or one per layer) and of the gates' hidden layers: relu, leaky_relu, prelu, gelu,
            gelu_tanh, silu, tanh, sigmoid, dice, identity, or a ``torch.nn`` class or instance.
        norm: of the experts' layers, before the activation: None, ``"batch"`` or ``"layer"``.
        dropout: after the experts' layers.
        shared_gate_scope: the shared mixture weighs ``"all"`` experts (the paper) or the ``"shared"`` ones.
        last_shared: keep a shared mixture at the last level: the output is ``(B, T + 1, H)``, shared last.
        recompute: save inputs only, and run the forward again in backward: less memory, more time.
        device, dtype: of the parameters.

    Norms, biases and activations that differ from layer to layer, and gates that read the raw input, are for
    ``ExtractionNetwork`` and ``from_levels``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        num_levels: int = 2,
        task_experts: int | Sequence[int] | Sequence[Sequence[int]] = 2,
        shared_experts: int | Sequence[int] = 2,
        expert_units: Units = (256, 128),
        shared_expert_units: Units | None = None,
        gate_units: Sequence[int] = (),
        gate_bias: bool = True,
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        shared_gate_scope: Literal["all", "shared"] = "all",
        last_shared: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("num_tasks", num_tasks)
        check_count("num_levels", num_levels)
        counts = _per_level("task_experts", task_experts, num_levels, depth=2)
        shared = _per_level("shared_experts", shared_experts, num_levels, depth=1)
        units = _per_level("expert_units", expert_units, num_levels, depth=2)
        shared_units = (
            units
            if shared_expert_units is None
            else _per_level("shared_expert_units", shared_expert_units, num_levels, depth=2)
        )
        if last_shared and not all(shared):
            raise ValueError(f"last_shared: needs shared experts at every level, got shared_experts={shared_experts}")
        levels, width = [], in_features
        for i in range(num_levels):
            if i and bool(shared[i]) != bool(shared[0]):
                raise ValueError(
                    "shared_experts: expected some at every level or none at any, because the shared mixture of a "
                    f"level is the shared slot of the next; got {shared}"
                )
            topology = Topology.ple(
                num_tasks,
                check_task_counts("task_experts", counts[i], num_tasks),
                shared[i],
                last=i == num_levels - 1 and not last_shared,
                shared_gate_scope=shared_gate_scope,
            )
            own, gate = _specs(units[i], activation, norm, dropout, gate_units, gate_bias)
            common, _ = _specs(shared_units[i], activation, norm, dropout, gate_units, gate_bias)
            experts = (own,) * (topology.num_experts - shared[i]) + (common,) * shared[i]
            levels.append(
                ExtractionNetwork(
                    width, topology, experts=experts, gate=gate, recompute=recompute, device=device, dtype=dtype
                )
            )
            width = levels[-1].out_features
        self._set_levels(levels, num_tasks, last_shared)

    @classmethod
    def from_levels(
        cls, levels: Sequence[ExtractionNetwork], *, num_tasks: int | None = None, last_shared: bool = False
    ) -> PLE:
        """A trunk of existing levels, which it holds and does not copy.

        Args:
            levels: the mixtures of each are the slots of the next.
            num_tasks: ``T``; default the mixtures of the last level (less the shared one with ``last_shared``).
            last_shared: the last level's last mixture is shared, and stays in the output.

        Raises:
            TypeError: an entry is no ``ExtractionNetwork``.
            ValueError: no levels, or levels that do not fit together.
        """
        levels = list(levels)
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
            if below.topology.num_mixtures != level.topology.num_slots:
                raise ValueError(
                    f"levels[{i}]: expected {below.topology.num_mixtures} slots, the mixtures of the level below, "
                    f"got {level.topology.num_slots}"
                )
            if level.gate_spec.input == "raw" and level.gate_features != raw:
                raise ValueError(f"levels[{i}]: its gates read the raw input of width {raw}, got {level.gate_features}")
        mixtures = levels[-1].topology.num_mixtures
        tasks = mixtures - last_shared if num_tasks is None else check_count("num_tasks", num_tasks)
        if not 0 < tasks <= mixtures - last_shared:
            raise ValueError(
                f"num_tasks: expected 1 to {mixtures - last_shared}, the mixtures of the last level, got {tasks}"
            )
        ple = cls.__new__(cls)
        nn.Module.__init__(ple)
        ple._set_levels(levels, tasks, last_shared)
        return ple

    def extra_repr(self) -> str:
        shared = ", last_shared=True" if self.last_shared else ""
        return f"in_features={self.in_features}, num_tasks={self.num_tasks}{shared}"


class CGC(_Stack):
    """Customized Gate Control (paper section 4.1): PLE's last level alone, ``(B, D)`` to ``(B, T, H)``.

    Arguments are those of ``PLE``, for one level.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        task_experts: int | Sequence[int] = 2,
        shared_experts: int = 2,
        expert_units: int | Sequence[int] = (256, 128),
        shared_expert_units: int | Sequence[int] | None = None,
        gate_units: Sequence[int] = (),
        gate_bias: bool = True,
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        topology = Topology.ple(num_tasks, task_experts, shared_experts, last=True)
        own, gate = _specs(expert_units, activation, norm, dropout, gate_units, gate_bias)
        common, _ = _specs(
            expert_units if shared_expert_units is None else shared_expert_units,
            activation, norm, dropout, gate_units, gate_bias,
        )  # fmt: skip
        experts = (own,) * (topology.num_experts - shared_experts) + (common,) * shared_experts
        level = ExtractionNetwork(
            in_features, topology, experts=experts, gate=gate, recompute=recompute, device=device, dtype=dtype
        )
        self._set_levels([level], num_tasks, False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_tasks={self.num_tasks}"


class MMoE(_Stack):
    """Multi-gate Mixture-of-Experts (Ma et al., KDD 2018, eq. 6-7): ``(B, D)`` to ``(B, T, H)``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``: one gate each, over all experts.
        experts: number of experts, every one shared.
        expert_units, gate_units, gate_bias, activation, norm, dropout, recompute, device, dtype: as in ``PLE``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        experts: int = 8,
        expert_units: int | Sequence[int] = (256, 128),
        gate_units: Sequence[int] = (),
        gate_bias: bool = True,
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec, gate = _specs(expert_units, activation, norm, dropout, gate_units, gate_bias)
        level = ExtractionNetwork(
            in_features, Topology.mmoe(num_tasks, experts), experts=spec, gate=gate, recompute=recompute,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._set_levels([level], num_tasks, False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_tasks={self.num_tasks}"
