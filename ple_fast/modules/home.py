"""HoME: groups of related tasks in a hierarchy, experts that scale what they read, gates beside gates."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..checks import shape_of
from ..functional import Input, scaled
from ..home_wiring import check_groups, home_sets
from ..scalars import check_count, check_flag, shown
from ..specs import GateSpec, MLPSpec
from ..topology import Topology
from ..torch_backend.mix import index_of
from .network import CheckedModule, ExtractionNetwork
from .options import LevelOptions, experts_per_level, gate_spec, takes_options
from .stack import Stack
from .symbolic import call_module, fixed, is_symbolic

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class FeatureGates(CheckedModule):
    """What each of several readers sees of ``v``: ``v sum_l softmax(gate(v))_l 2 sigmoid(v A_l B_l)``, element-wise.

    Args:
        in_features: width ``D`` of ``v``.
        slots: of each reader the slot that is its ``v``, non-decreasing; if all are 0, ``v`` is ``(B, D)``.
        projections: ``L`` per reader, weighed by a gate; of one there is no gate.
        rank: of each projection.
        recompute, device, dtype: as in ``ExtractionNetwork``; ``network`` is one.
    """

    def __init__(self, in_features: int, slots: tuple[int, ...], projections: int, rank: int, **where: Any) -> None:
        super().__init__()
        kind: Literal["softmax", "static"] = "softmax" if projections > 1 else "static"
        topology = Topology(
            tuple(slot for slot in slots for _ in range(projections)),
            slots,
            tuple(tuple(range(i * projections, (i + 1) * projections)) for i in range(len(slots))),
            (kind,) * len(slots),
        )
        spec = MLPSpec((rank, in_features), "identity", last_activation="sigmoid", bias=False)
        self.network = ExtractionNetwork(in_features, topology, experts=spec, gate=GateSpec(), **where)
        self.slots = slots
        self._backend: Literal["torch"] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` or ``(B, S, D)`` to ``(B, readers, D)``."""
        if is_symbolic(x):
            traced: Tensor = call_module(self, x)
            return traced
        scale = self.network(x)
        return scaled(x if x.dim() == 2 else _selected(x, self.slots), scale, backend=self._backend)


class BesideShared(nn.Module):
    """What the gates of the task level read: of each slot its representation, then the shared one, which is the last.

    Args:
        slots: the representations, in the order of the level's slots.
    """

    def __init__(self, slots: tuple[int, ...]) -> None:
        super().__init__()
        self.slots = slots

    def forward(self, z: Tensor) -> Tensor:
        """``(B, G + 1, H)`` to ``(B, S, 2 H)``."""
        if is_symbolic(z):
            traced: Tensor = call_module(self, z)
            return traced
        own = _selected(z, self.slots)
        return torch.cat((own, z[:, -1:].expand_as(own)), dim=2)


def _selected(x: Tensor, slots: tuple[int, ...]) -> Tensor:
    """``(B, S, D)`` to ``(B, len(slots), D)``; itself where these are all, in order."""
    if slots == tuple(range(x.shape[1])):
        return x
    return x.index_select(1, index_of(slots, x.device))


@takes_options(LevelOptions, activation="silu", norm="batch")
class HoME(Stack):
    """Hierarchy of Multi-gate Experts (Wang et al., KDD 2025, arXiv 2408.05430): ``(B, D)`` to ``(B, T, H)``.

    The meta level reads ``x`` and gives one representation ``z_g`` per group of tasks, out of the group's experts and
    the shared ones, and one that is shared, ``z_s``, out of all. At the task level a task's own experts and those of
    its group read ``z_g``, the shared ones ``z_s``. The output of a task weighs these three kinds by a gate that reads
    ``z_g`` and ``z_s`` side by side. To each output of both levels the experts of its owner are added once more,
    weighed by a *self gate* of their own: a sigmoid for one expert, a softmax over several. Experts read their slot
    through a *feature gate*: element by element it is scaled by a mixture of ``2 sigmoid(v A_l B_l)``.
    Experts end in batch norm and Swish.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        groups: the tasks of each group of related ones, such as ``[[0, 2], [1]]``.
        task_experts: of each task, at the task level: an int, or one per task.
        group_experts: of each group, at both levels: an int, or one per group.
        shared_experts: that all share, at both levels.
        self_gates: whether there are self gates.
        feature_gate_experts: low-rank projections of each feature gate; 0: there are no feature gates.
        feature_gate_rank: rank of each projection; a multiple of 32 is fast on a GPU.
        feature_gate_scope: the experts of one ``"owner"``, a task, a group or all, have one feature gate, or each
            ``"expert"`` its own.
        options: the keywords of ``LevelOptions``.

    ``levels`` are the meta and the task level, ``feature_gates.{l}`` what stands before each. Published descriptions
    differ in what the gates read: here neither gates nor self gates read what a feature gate has scaled, and a self
    gate reads what the gate beside it reads.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        groups: Sequence[Sequence[int]],
        task_experts: int | Sequence[int] = 2,
        group_experts: int | Sequence[int] = 2,
        shared_experts: int = 2,
        self_gates: bool = True,
        feature_gate_experts: int = 2,
        feature_gate_rank: int = 32,
        feature_gate_scope: Literal["owner", "expert"] = "owner",
        **options: Unpack[LevelOptions],
    ) -> None:
        super().__init__()
        in_features, num_tasks = check_count("in_features", in_features), check_count("num_tasks", num_tasks)
        self.groups = check_groups(groups)
        if sum(map(len, self.groups)) != num_tasks:
            raise ValueError(
                f"groups: expected each of the {num_tasks} tasks in one group, got {sum(map(len, self.groups))} tasks: "
                f"{shown(groups)}"
            )
        projections = check_count("feature_gate_experts", feature_gate_experts, least=0)
        rank, self_gates = check_count("feature_gate_rank", feature_gate_rank), check_flag("self_gates", self_gates)
        if feature_gate_scope not in ("owner", "expert"):
            raise ValueError(f'feature_gate_scope: expected "owner" or "expert", got {shown(feature_gate_scope)}')
        if options["gate_joint_k"] and self_gates:
            raise ValueError(
                "gate_joint_k: expected 0 with self gates, which weigh an owner's experts alone, so that no expert is "
                f"there for all gates to choose; got {options['gate_joint_k']}; self_gates=False would do"
            )
        where: dict[str, Any] = {
            "recompute": options["recompute"], "device": options["device"], "dtype": options["dtype"]
        }  # fmt: skip
        levels, gates = [], []
        width = gate_width = in_features
        for tasks, experts in zip((None, task_experts), experts_per_level(options, 2), strict=True):
            sets = home_sets(self.groups, group_experts, shared_experts, tasks)
            topology = Topology.home(
                self.groups, group_experts, shared_experts, task_experts=tasks, self_gates=self_gates
            )
            readers = [(own.slot, own.experts) for own in sets]
            if feature_gate_scope == "expert":
                readers = [(own.slot, (expert,)) for own in sets for expert in own.experts]
            if projections:
                slots = (0,) * len(readers) if tasks is None else tuple(slot for slot, _ in readers)
                gates.append(FeatureGates(width, slots, projections, rank, **where))
                topology = _slot_per_reader(topology, [experts for _, experts in readers])
            is_scaled = projections > 0 or tasks is not None  # the gates read something else than the experts
            level = ExtractionNetwork(
                width,
                topology,
                experts=experts,
                gate=gate_spec(options, input="raw" if is_scaled else "previous"),
                gate_features=gate_width,
                **where,
            )
            levels.append(level)
            width, gate_width = level.out_features, 2 * level.out_features
        self._set_levels(levels, num_tasks)
        self.feature_gates = nn.ModuleList(gates)
        self.gate_input = BesideShared(
            tuple(slot for slot, _ in readers) if projections else tuple(range(len(self.groups) + 1))
        )

    def _networks(self) -> Iterator[ExtractionNetwork]:
        yield self._level(0)
        yield self._level(1)
        for gates in self.feature_gates:
            assert isinstance(gates, FeatureGates)
            yield gates.network

    def reset_parameters(self) -> None:
        """Initialise every level and feature gate anew."""
        for network in self._networks():
            network.reset_parameters()

    def for_inference(self, *, plain: bool = False) -> Self:
        """A copy for deployment, in eval mode, as that of every trunk."""
        networks: dict[int, Any] = {id(network): network.for_inference(plain=plain) for network in self._networks()}
        served = copy.deepcopy(self, networks).requires_grad_(False).eval()
        for gates in served.feature_gates:
            assert isinstance(gates, FeatureGates)
            gates._backend = "torch" if plain else gates._backend
        return served

    def forward(self, x: Input, return_gates: bool | Literal["shares"] = False) -> Any:
        """Run both levels.

        Args:
            x: ``(B, D)``, ``(B, 1, D)``, or a list of one tensor: all experts read the same.
            return_gates: also return the weights of both levels; or with ``"shares"`` what ``JointLoss(balance=...)``
                reads.

        Returns:
            ``(B, T, H)``; read it with ``unbind(1)``. On request also, per level and per mixture, ``(B, |A(o)|)``
            float32, differentiable: of each output the gate's, then the self gate's; or per level its shares.

        Raises:
            TypeError, ValueError: the input does not fit, or batch norm in train mode got one row.
        """
        if return_gates is not False and not isinstance(return_gates, str):
            return_gates = fixed("return_gates", return_gates, False)
        if isinstance(x, (list, tuple)) and len(x) == 1:
            x = x[0]
        elif isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == 1:
            x = x[:, 0]
        if not is_symbolic(x) and (not isinstance(x, Tensor) or x.dim() != 2):
            got = f"shape {shape_of(x)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected shape (B, {self.in_features}), which all experts of HoME read, got {got}")
        weights: list[Any] = []
        z = self._run(0, x, x, return_gates, weights)
        y = self._run(1, z, self.gate_input(z), return_gates, weights)
        return (y, weights) if return_gates else y

    def _run(
        self, number: int, x: Any, gate_input: Any, return_gates: bool | Literal["shares"], weights: list[Any]
    ) -> Any:
        """A level: its output; what its gates weigh is added to ``weights``."""
        level = self.levels[number]
        if self.feature_gates:
            x = self.feature_gates[number](x)
        elif number == 0:
            gate_input = None
        if not return_gates:
            return level(x, gate_input)
        y, own = level(x, gate_input, return_gates=return_gates)
        weights.append(own)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def _slot_per_reader(topology: Topology, readers: Sequence[Sequence[int]]) -> Topology:
    """The wiring with a slot for the experts of each feature gate; a gate's is that of its first expert."""
    own = tuple(number for number, experts in enumerate(readers) for _ in experts)
    slots = tuple(own[experts[0]] for experts in topology.mixture_experts)
    return replace(topology, expert_slot=own, mixture_slot=slots, num_slots=len(readers))
