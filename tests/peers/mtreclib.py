"""Stand-ins for MTReclib's PLE (easezyc/Multitask-Recommendation-Library, commit 8c6529c): same names and results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tests.swap_proof import ROWS, Case


class EmbeddingLayer(nn.Module):
    """One table for all fields."""

    def __init__(self, field_dims: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        self.offsets = [0, *accumulate(field_dims[:-1])]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, fields)`` to ``(B, fields, D)``."""
        y: Tensor = self.embedding(x + torch.tensor(self.offsets, device=x.device))
        return y


class MultiLayerPerceptron(nn.Module):
    """Linear, batch norm, ReLU and dropout per layer, and an output layer for towers."""

    def __init__(self, width: int, units: Sequence[int], dropout: float, output_layer: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for unit in units:
            layers += [nn.Linear(width, unit), nn.BatchNorm1d(unit), nn.ReLU(), nn.Dropout(dropout)]
            width = unit
        self.mlp = nn.Sequential(*layers, *([nn.Linear(width, 1)] if output_layer else []))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, H)``."""
        y: Tensor = self.mlp(x)
        return y


class PLEModel(nn.Module):
    """Embeddings, levels of one-layer experts, towers."""

    def __init__(
        self,
        categorical_field_dims: Sequence[int],
        numerical_num: int,
        embed_dim: int,
        bottom_mlp_dims: Sequence[int],
        tower_mlp_dims: Sequence[int],
        task_num: int,
        shared_expert_num: int,
        specific_expert_num: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = EmbeddingLayer(categorical_field_dims, embed_dim)
        self.numerical_layer = nn.Linear(numerical_num, embed_dim)
        self.embed_output_dim = (len(categorical_field_dims) + 1) * embed_dim
        self.task_num = task_num
        self.task_experts, self.task_gates = nn.ModuleList(), nn.ModuleList()
        self.share_experts, self.share_gates = nn.ModuleList(), nn.ModuleList()
        width = self.embed_output_dim
        for units in bottom_mlp_dims:

            def experts(count: int, width: int = width, units: int = units) -> nn.ModuleList:
                return nn.ModuleList(MultiLayerPerceptron(width, [units], dropout, False) for _ in range(count))

            def gate(logits: int, width: int = width) -> nn.Sequential:
                return nn.Sequential(nn.Linear(width, logits), nn.Softmax(dim=1))

            self.share_experts.append(experts(shared_expert_num))
            self.share_gates.append(gate(shared_expert_num + task_num * specific_expert_num))
            self.task_experts.append(nn.ModuleList(experts(specific_expert_num) for _ in range(task_num)))
            self.task_gates.append(
                nn.ModuleList(gate(shared_expert_num + specific_expert_num) for _ in range(task_num))
            )
            width = units
        self.tower = nn.ModuleList(MultiLayerPerceptron(width, tower_mlp_dims, dropout) for _ in range(task_num))

    def shared_input(self, streams: list[Tensor]) -> Tensor:
        """What the shared experts read; a task's stream in commits before September 2022."""
        return streams[-1]

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
        """Probabilities ``(B,)`` per task."""
        fields = torch.cat([self.embedding(categorical_x), self.numerical_layer(numerical_x).unsqueeze(1)], 1)
        streams = [fields.flatten(1)] * (self.task_num + 1)
        lists = (self.task_experts, self.task_gates, self.share_experts, self.share_gates)
        levels: Any = zip(*lists, strict=True)
        for groups, gates, common, shared_gate in levels:
            shared = [expert(self.shared_input(streams)) for expert in common]
            own = [[expert(x) for expert in group] for group, x in zip(groups, streams, strict=False)]
            mixed = [_mix(gate(x), [*row, *shared]) for gate, x, row in zip(gates, streams, own, strict=False)]
            every = [*(y for row in own for y in row), *shared]
            is_last = common is self.share_experts[-1]
            streams = [*mixed, streams[-1] if is_last else _mix(shared_gate(streams[-1]), every)]
        return [tower(x).squeeze(1).sigmoid() for tower, x in zip(self.tower, streams, strict=False)]


def _mix(weights: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return torch.bmm(weights.unsqueeze(1), torch.stack(list(experts), 1)).squeeze(1)


def _case(name: str, units: Sequence[int], tasks: int, shared: int, own: int) -> Case:
    def make() -> nn.Module:
        return PLEModel([5, 7, 3], 4, 6, units, [4], tasks, shared, own, 0.0)

    def arguments(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        categorical = torch.stack([torch.randint(0, size, (ROWS,)) for size in (5, 7, 3)], 1)
        return categorical, torch.randn(ROWS, 4, dtype=dtype)

    return Case(f"MTReclib, {name}", make, arguments)


CASES = [
    _case("two levels", (9, 6), 2, 1, 2),
    _case("three levels, three tasks", (8, 5, 7), 3, 2, 1),
    _case("one level, nothing shared", (6,), 2, 0, 2),
]
