"""Stand-ins for MTReclib's PLE, MMoE and OMoE (easezyc/Multitask-Recommendation-Library, commit 8c6529c)."""

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


class _Model(nn.Module):
    """Embeddings and towers; what lies between is of the class."""

    tower: nn.ModuleList

    def __init__(self, field_dims: Sequence[int], numerical_num: int, embed_dim: int, task_num: int) -> None:
        super().__init__()
        self.embedding = EmbeddingLayer(field_dims, embed_dim)
        self.numerical_layer = nn.Linear(numerical_num, embed_dim)
        self.embed_output_dim = (len(field_dims) + 1) * embed_dim
        self.task_num = task_num

    def read(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        """The fields side by side."""
        return torch.cat([self.embedding(categorical_x), self.numerical_layer(numerical_x).unsqueeze(1)], 1).flatten(1)

    def ends(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Probabilities ``(B,)`` per task."""
        return [tower(x).squeeze(1).sigmoid() for tower, x in zip(self.tower, rows, strict=True)]


def _gate(width: int, logits: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, logits), nn.Softmax(dim=1))


class PLEModel(_Model):
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
        super().__init__(categorical_field_dims, numerical_num, embed_dim, task_num)
        self.task_experts, self.task_gates = nn.ModuleList(), nn.ModuleList()
        self.share_experts, self.share_gates = nn.ModuleList(), nn.ModuleList()
        width = self.embed_output_dim
        for units in bottom_mlp_dims:

            def experts(count: int, width: int = width, units: int = units) -> nn.ModuleList:
                return nn.ModuleList(MultiLayerPerceptron(width, [units], dropout, False) for _ in range(count))

            self.share_experts.append(experts(shared_expert_num))
            self.share_gates.append(_gate(width, shared_expert_num + task_num * specific_expert_num))
            self.task_experts.append(nn.ModuleList(experts(specific_expert_num) for _ in range(task_num)))
            self.task_gates.append(
                nn.ModuleList(_gate(width, shared_expert_num + specific_expert_num) for _ in range(task_num))
            )
            width = units
        self.tower = nn.ModuleList(MultiLayerPerceptron(width, tower_mlp_dims, dropout) for _ in range(task_num))

    def shared_input(self, streams: list[Tensor]) -> Tensor:
        """What the shared experts read; a task's stream in commits before September 2022."""
        return streams[-1]

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
        """Probabilities ``(B,)`` per task."""
        streams = [self.read(categorical_x, numerical_x)] * (self.task_num + 1)
        lists = (self.task_experts, self.task_gates, self.share_experts, self.share_gates)
        levels: Any = zip(*lists, strict=True)
        for groups, gates, common, shared_gate in levels:
            shared = [expert(self.shared_input(streams)) for expert in common]
            own = [[expert(x) for expert in group] for group, x in zip(groups, streams, strict=False)]
            mixed = [_mix(gate(x), [*row, *shared]) for gate, x, row in zip(gates, streams, own, strict=False)]
            every = [*(y for row in own for y in row), *shared]
            is_last = common is self.share_experts[-1]
            streams = [*mixed, streams[-1] if is_last else _mix(shared_gate(streams[-1]), every)]
        return self.ends(streams[: self.task_num])


class _Mixture(_Model):
    """Experts of as many layers as ``bottom_mlp_dims`` has, then towers, then what ``gates`` makes."""

    def __init__(
        self,
        categorical_field_dims: Sequence[int],
        numerical_num: int,
        embed_dim: int,
        bottom_mlp_dims: Sequence[int],
        tower_mlp_dims: Sequence[int],
        task_num: int,
        expert_num: int,
        dropout: float,
    ) -> None:
        super().__init__(categorical_field_dims, numerical_num, embed_dim, task_num)
        self.expert_num = expert_num
        width, out = self.embed_output_dim, bottom_mlp_dims[-1]
        self.expert = nn.ModuleList(
            MultiLayerPerceptron(width, bottom_mlp_dims, dropout, False) for _ in range(expert_num)
        )
        self.tower = nn.ModuleList(MultiLayerPerceptron(out, tower_mlp_dims, dropout) for _ in range(task_num))
        self.gate = self.gates()

    def gates(self) -> nn.Module:
        """One per task."""
        return nn.ModuleList(_gate(self.embed_output_dim, self.expert_num) for _ in range(self.task_num))


class MMoEModel(_Mixture):
    """A gate per task."""

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
        """Probabilities ``(B,)`` per task."""
        x = self.read(categorical_x, numerical_x)
        experts, gates = [expert(x) for expert in self.expert], self.gate
        assert isinstance(gates, nn.ModuleList)
        return self.ends([_mix(gate(x), experts) for gate in gates])


class OMoEModel(_Mixture):
    """One gate, whose mixture all towers read."""

    def gates(self) -> nn.Module:
        """One."""
        return _gate(self.embed_output_dim, self.expert_num)

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
        """Probabilities ``(B,)`` per task."""
        x = self.read(categorical_x, numerical_x)
        return self.ends([_mix(self.gate(x), [expert(x) for expert in self.expert])] * self.task_num)


def _mix(weights: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return torch.bmm(weights.unsqueeze(1), torch.stack(list(experts), 1)).squeeze(1)


def _case(name: str, kind: type[nn.Module], units: Sequence[int], *counts: int) -> Case:
    def make() -> nn.Module:
        return kind([5, 7, 3], 4, 6, units, [4], *counts, 0.0)

    def arguments(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        categorical = torch.stack([torch.randint(0, size, (ROWS,)) for size in (5, 7, 3)], 1)
        return categorical, torch.randn(ROWS, 4, dtype=dtype)

    return Case(f"MTReclib, {name}", make, arguments)


CASES = [
    _case("two levels", PLEModel, (9, 6), 2, 1, 2),
    _case("three levels, three tasks", PLEModel, (8, 5, 7), 3, 2, 1),
    _case("one level, nothing shared", PLEModel, (6,), 2, 0, 2),
]
MMOES = [
    _case("MMoE, three tasks", MMoEModel, (9, 6), 3, 2),
    _case("MMoE, one task", MMoEModel, (6,), 1, 3),
    _case("OMoE", OMoEModel, (8, 5), 2, 3),
]
