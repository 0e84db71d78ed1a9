"""Stand-ins for the modules of AdaTT's ``mtl_lib`` (facebookresearch/AdaTT, commit 0efdd82): same names and results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.swap_proof import ROWS, Case


class MLP(nn.Module):
    """Linear and ReLU per layer."""

    def __init__(self, width: int, units: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for unit in units:
            layers += [nn.Linear(width, unit), nn.ReLU()]
            width = unit
        self.mlp_net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, H)``."""
        y: Tensor = self.mlp_net(x)
        return y


def _gate(width: int, logits: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, logits), nn.Softmax(dim=-1))


class _Levels(nn.Module):
    """Experts of units, and a gate per unit that goes on."""

    def __init__(
        self, width: int, dims: Sequence[Sequence[int]], units: Sequence[int], logits: list[list[int]]
    ) -> None:
        super().__init__()
        self.experts, self.gate_weights = nn.ModuleList(), nn.ModuleList()
        self._units = [u for u, count in enumerate(units) for _ in range(count)]
        for out, sizes in zip(dims, logits, strict=True):
            self.experts.append(nn.ModuleList(MLP(width, out) for _ in self._units))
            self.gate_weights.append(nn.ModuleList(_gate(width, size) for size in sizes))
            width = out[-1]

    def run(self, level: int, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs of the experts ``(B, E, H)``, and weights per gate."""
        experts: Any = self.experts[level]
        gates: Any = self.gate_weights[level]
        outputs = torch.stack([expert(inputs[:, u]) for expert, u in zip(experts, self._units, strict=True)], 1)
        return outputs, [gate(inputs[:, g]) for g, gate in enumerate(gates)]


class PLE(_Levels):
    """``(B, T + 1, D)`` to ``(B, T, H)``."""

    def __init__(
        self,
        input_dim: int,
        expert_out_dims: Sequence[Sequence[int]],
        num_tasks: int,
        num_task_experts: int | list[int],
        num_shared_experts: int,
    ) -> None:
        own = [num_task_experts] * num_tasks if isinstance(num_task_experts, int) else num_task_experts
        logits = [count + num_shared_experts for count in own]
        inner = [*logits, sum(own) + num_shared_experts]
        super().__init__(
            input_dim, expert_out_dims, [*own, num_shared_experts], [inner] * (len(expert_out_dims) - 1) + [logits]
        )
        self.num_tasks, self.num_task_experts = num_tasks, num_task_experts
        self.num_shared_experts = num_shared_experts

    def forward(self, inputs: Tensor) -> Tensor:
        """Every unit's input to the tasks' outputs."""
        for level in range(len(self.experts)):
            outputs, weights = self.run(level, inputs)
            pools = [[e for e, u in enumerate(self._units) if u in (t, self.num_tasks)] for t in range(self.num_tasks)]
            pools.append(list(range(len(self._units))))
            inputs = torch.stack([torch.einsum("be,beh->bh", w, outputs[:, p]) for w, p in zip(weights, pools)], 1)  # noqa: B905  # the last level has no shared gate
        return inputs


class _AdaTT(_Levels, ABC):
    def __init__(
        self, width: int, dims: Sequence[Sequence[int]], units: Sequence[int], last: int, residual: bool
    ) -> None:
        logits = [[sum(units)] * len(units)] * (len(dims) - 1) + [[sum(units)] * last]
        super().__init__(width, dims, units, logits)
        self.self_exp_res_connect = residual

    @abstractmethod
    def scalars(self, level: int, unit: int) -> Tensor:
        """What is added to the weights of the unit's own experts: the two classes keep it in tensors of their own."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Every unit's input to the tasks' outputs."""
        for level in range(len(self.experts)):
            outputs, weights = self.run(level, inputs)
            mixed = []
            for unit, weight in enumerate(weights):
                y = torch.einsum("be,beh->bh", weight, outputs)
                if self.self_exp_res_connect:
                    native = [e for e, u in enumerate(self._units) if u == unit]
                    y = y + torch.einsum("e,beh->bh", self.scalars(level, unit).to(y.dtype), outputs[:, native])
                mixed.append(y)
            inputs = torch.stack(mixed, 1)
        return inputs


class AdaTTSp(_AdaTT):
    """``(B, T, D)`` to ``(B, T, H)``."""

    def __init__(
        self,
        input_dim: int,
        expert_out_dims: Sequence[Sequence[int]],
        num_tasks: int,
        num_task_experts: int,
        self_exp_res_connect: bool = True,
    ) -> None:
        super().__init__(input_dim, expert_out_dims, [num_task_experts] * num_tasks, num_tasks, self_exp_res_connect)
        self.num_tasks, self.num_task_experts = num_tasks, num_task_experts
        learned = len(expert_out_dims) if self_exp_res_connect and num_task_experts > 1 else 0
        self.self_exp_weights = nn.ParameterList(torch.rand(num_tasks, num_task_experts) for _ in range(learned))

    def scalars(self, level: int, unit: int) -> Tensor:
        """Of a task."""
        return self.self_exp_weights[level][unit] if len(self.self_exp_weights) else torch.ones(1)


class AdaTTWSharedExps(_AdaTT):
    """``(B, T + 1, D)`` to ``(B, T, H)``."""

    def __init__(
        self,
        input_dim: int,
        expert_out_dims: Sequence[Sequence[int]],
        num_tasks: int,
        num_shared_experts: int,
        num_task_experts: int | None = None,
        num_task_expert_list: list[int] | None = None,
        self_exp_res_connect: bool = True,
    ) -> None:
        self_own = [num_task_experts or 0] * num_tasks if num_task_expert_list is None else num_task_expert_list
        units = [*self_own, num_shared_experts]
        super().__init__(input_dim, expert_out_dims, units, num_tasks, self_exp_res_connect)
        self.num_tasks, self.num_expert_list = num_tasks, units
        self.self_exp_weights = nn.ParameterList()
        if self_exp_res_connect and any(count != 1 for count in units):
            for unit, count in enumerate(units):
                self.self_exp_weights.append(torch.rand(len(expert_out_dims) - (unit == num_tasks), count))

    def scalars(self, level: int, unit: int) -> Tensor:
        """Of a unit."""
        return self.self_exp_weights[unit][level] if len(self.self_exp_weights) else torch.ones(1)


class MLMMoE(nn.Module):
    """``(B, D)`` to ``(B, T, H)``."""

    def __init__(
        self,
        input_dim: int,
        expert_archs: Sequence[Sequence[int]],
        gate_archs: Sequence[Sequence[int]],
        num_tasks: int,
        num_experts: int,
    ) -> None:
        super().__init__()
        self.experts, self.gates = nn.ModuleList(), nn.ModuleList()
        width = input_dim
        for level, (units, hidden) in enumerate(zip(expert_archs, gate_archs, strict=True)):
            count = num_tasks if level == len(expert_archs) - 1 else num_experts
            self.experts.append(nn.ModuleList(MLP(width, units) for _ in range(num_experts)))
            self.gates.append(
                nn.ModuleList(
                    nn.Sequential(MLP(input_dim, hidden), *_gate([input_dim, *hidden][-1], num_experts))
                    for _ in range(count)
                )
            )
            width = units[-1]

    def forward(self, input: Tensor) -> Tensor:
        """The model's input to the tasks' outputs."""
        levels: Any = zip(self.experts, self.gates, strict=True)
        x = [input]
        for experts, gates in levels:
            x = x if len(x) == len(experts) else x * len(experts)
            outputs = torch.stack([expert(y) for expert, y in zip(experts, x, strict=True)], 1)
            x = [torch.einsum("be,beh->bh", gate(input), outputs) for gate in gates]
        return torch.stack(x, 1)


class CrossStitch(nn.Module):
    """``(B, T, D)`` to ``(B, T, H)``: an expert per task, and a matrix behind every level."""

    def __init__(self, input_dim: int, expert_archs: Sequence[Sequence[int]], num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.experts, self.stitchs = nn.ModuleList(), nn.ModuleList()
        for units in expert_archs:
            self.experts.append(nn.ModuleList(MLP(input_dim, units) for _ in range(num_tasks)))
            self.stitchs.append(nn.Linear(num_tasks, num_tasks, bias=False))
            input_dim = units[-1]

    def forward(self, input: Tensor) -> Tensor:
        """Every task's input to the tasks' outputs."""
        levels: Any = zip(self.experts, self.stitchs, strict=True)
        for experts, stitch in levels:
            outputs = [expert(input[:, t]) for t, expert in enumerate(experts)]
            input = torch.einsum("kt,tbh->bkh", stitch.weight, torch.stack(outputs))
        return input


class CentralTaskArch(nn.Module):
    """A trunk with a tower per task."""

    def __init__(self, mtl_arch: nn.Module, width: int, num_tasks: int) -> None:
        super().__init__()
        self.mtl_arch = mtl_arch
        self.task_modules = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """A logit ``(B, 1)`` per task."""
        y = self.mtl_arch(inputs)
        return [tower(y[:, t]) for t, tower in enumerate(self.task_modules)]


def _case(name: str, kind: Any, slots: int, tasks: int, dims: list[list[int]], **options: Any) -> Case:
    def make() -> nn.Module:
        first = "expert_archs" if kind in (MLMMoE, CrossStitch) else "expert_out_dims"
        return CentralTaskArch(kind(7, **{first: dims}, num_tasks=tasks, **options), dims[-1][-1], tasks)

    shape = (ROWS, slots, 7) if slots else (ROWS, 7)
    return Case(f"AdaTT, {name}", make, lambda dtype: (torch.randn(shape, dtype=dtype),))


CASES = [
    _case("PLE", PLE, 3, 2, [[9, 6], [5]], num_task_experts=2, num_shared_experts=1),
    _case("PLE, experts per task", PLE, 4, 3, [[6], [6], [4]], num_task_experts=[2, 1, 3], num_shared_experts=2),
    _case("PLE of one task and level", PLE, 2, 1, [[6, 5]], num_task_experts=2, num_shared_experts=2),
    _case("AdaTTSp", AdaTTSp, 3, 3, [[6], [5]], num_task_experts=2),
    _case("AdaTTSp, one expert per task", AdaTTSp, 2, 2, [[6, 5], [5]], num_task_experts=1),
    _case("AdaTTSp, no residual", AdaTTSp, 2, 2, [[6]], num_task_experts=2, self_exp_res_connect=False),
    _case(
        "AdaTTWSharedExps", AdaTTWSharedExps, 3, 2, [[6], [5], [5]], num_task_expert_list=[1, 3], num_shared_experts=2
    ),
    _case("AdaTTWSharedExps, one level", AdaTTWSharedExps, 3, 2, [[6]], num_task_experts=2, num_shared_experts=1),
    _case(
        "AdaTTWSharedExps, one of each", AdaTTWSharedExps, 3, 2, [[6], [5]], num_task_experts=1, num_shared_experts=1
    ),
    _case("MLMMoE", MLMMoE, 0, 2, [[9, 6], [5]], gate_archs=[[], []], num_experts=3),
    _case("MLMMoE, hidden gates", MLMMoE, 0, 3, [[7], [7]], gate_archs=[[4], [4]], num_experts=2),
    _case("MMoE", MLMMoE, 0, 2, [[6, 5]], gate_archs=[[]], num_experts=4),
]
STITCHED = [
    _case("CrossStitch", CrossStitch, 3, 3, [[6], [5]]),
    _case("CrossStitch, one task, one level", CrossStitch, 1, 1, [[6, 5]]),
]
