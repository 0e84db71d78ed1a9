"""Stand-ins for FuxiCTR's PLE and MMoE (reczoo/FuxiCTR, commit 0245987): same classes, names and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.swap_proof import ROWS, Case


class MLP_Block(nn.Module):
    """Linear, batch norm, activation and dropout per hidden layer, and a linear end if ``output_dim`` is given."""

    def __init__(
        self,
        input_dim: int,
        hidden_units: Sequence[int],
        activation: str | None,
        dropout: float,
        batch_norm: bool,
        output_dim: int | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for units in hidden_units:
            layers.append(nn.Linear(input_dim, units))
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            if activation:
                layers.append(nn.PReLU(units, init=0.1) if activation == "prelu" else getattr(nn, activation)())
            if dropout:
                layers.append(nn.Dropout(dropout))
            input_dim = units
        if output_dim is not None:
            layers.append(nn.Linear(input_dim, output_dim))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, H)``."""
        y: Tensor = self.mlp(x)
        return y


class CGC_Layer(nn.Module):
    """One level, every one with a shared mixture: of shared experts only."""

    def __init__(
        self,
        num_shared_experts: int,
        num_specific_experts: int,
        num_tasks: int,
        input_dim: int,
        expert_hidden_units: Sequence[int],
        gate_hidden_units: Sequence[int],
        hidden_activations: str | None = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"activation": hidden_activations, "dropout": net_dropout, "batch_norm": batch_norm}

        def experts(count: int) -> nn.ModuleList:
            return nn.ModuleList(MLP_Block(input_dim, expert_hidden_units, **options) for _ in range(count))

        self.shared_experts = experts(num_shared_experts)
        self.specific_experts = nn.ModuleList(experts(num_specific_experts) for _ in range(num_tasks))
        logits = [num_specific_experts + num_shared_experts] * num_tasks + [num_shared_experts]
        self.gate = nn.ModuleList(MLP_Block(input_dim, gate_hidden_units, **options, output_dim=n) for n in logits)
        self.gate_activation = nn.Softmax(dim=-1)

    def forward(self, x: Sequence[Tensor], require_gate: bool = False) -> Any:
        """T + 1 inputs ``(B, D)`` to as many mixtures; on request also the mean weights of each."""
        shared = [expert(x[-1]) for expert in self.shared_experts]
        specific: Any = self.specific_experts
        own = [[expert(y) for expert in experts] for experts, y in zip(specific, x, strict=False)]
        weights = [self.gate_activation(gate(y)) for gate, y in zip(self.gate, x, strict=True)]
        pools = [torch.stack(row, 1) for row in [*([*row, *shared] for row in own), shared]]
        mixtures = [torch.einsum("be,beh->bh", weight, pool) for weight, pool in zip(weights, pools, strict=True)]
        return (mixtures, [weight.mean(0) for weight in weights]) if require_gate else mixtures


class PLE(nn.Module):
    """The levels and towers of a model. FuxiCTR's own also has embeddings, losses and an optimizer."""

    def __init__(self, num_layers: int, num_tasks: int, width: int, last: int, **options: Any) -> None:
        super().__init__()
        self.cgc_layers = nn.ModuleList(
            CGC_Layer(num_tasks=num_tasks, input_dim=width if i == 0 else last, **options) for i in range(num_layers)
        )
        self.tower = nn.ModuleList(MLP_Block(last, [4], "ReLU", 0.0, False, output_dim=1) for _ in range(num_tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``(B, 1)`` by task."""
        inputs = [x] * (len(self.tower) + 1)
        for layer in self.cgc_layers:
            inputs = layer(inputs)
        return {f"{t}_pred": tower(y).sigmoid() for t, (tower, y) in enumerate(zip(self.tower, inputs, strict=False))}

    def regularization_loss(self, factor: float = 0.1) -> Tensor:
        """An L2 penalty, of the parameters that are called weight or bias in their module."""
        named = [p for module in self.modules() for name, p in module.named_parameters() if name in ("weight", "bias")]
        return torch.stack([factor / 2 * p.square().sum() for p in named if p.requires_grad]).sum()


class MMoE_Layer(nn.Module):
    """Experts, and a gate per task; every argument has to be given, as in FuxiCTR."""

    def __init__(
        self,
        num_experts: int,
        num_tasks: int,
        input_dim: int,
        expert_hidden_units: Sequence[int],
        gate_hidden_units: Sequence[int],
        hidden_activations: str | None,
        net_dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_tasks = num_experts, num_tasks
        options: dict[str, Any] = {"activation": hidden_activations, "dropout": net_dropout, "batch_norm": batch_norm}
        self.experts = nn.ModuleList(MLP_Block(input_dim, expert_hidden_units, **options) for _ in range(num_experts))
        self.gate = nn.ModuleList(
            MLP_Block(input_dim, gate_hidden_units, **options, output_dim=num_experts) for _ in range(num_tasks)
        )
        self.gate_activation = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, D)`` to a mixture ``(B, H)`` per task."""
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        return [torch.einsum("be,beh->bh", self.gate_activation(gate(x)), experts) for gate in self.gate]


class MMoE(nn.Module):
    """The layer and towers of a model. FuxiCTR's own also has embeddings, losses and an optimizer."""

    def __init__(self, num_tasks: int, width: int, last: int, **options: Any) -> None:
        super().__init__()
        self.mmoe_layer = MMoE_Layer(num_tasks=num_tasks, input_dim=width, **options)
        self.tower = nn.ModuleList(MLP_Block(last, [4], "ReLU", 0.0, False, output_dim=1) for _ in range(num_tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``(B, 1)`` by task."""
        ends = zip(self.tower, self.mmoe_layer(x), strict=True)
        return {f"{t}_pred": tower(y).sigmoid() for t, (tower, y) in enumerate(ends)}


def _case(name: str, levels: int, tasks: int, own: int, shared: int, units: list[int], **options: Any) -> Case:
    def make() -> nn.Module:
        return PLE(
            levels,
            tasks,
            7,
            units[-1],
            num_specific_experts=own,
            num_shared_experts=shared,
            expert_hidden_units=units,
            **options,
        )

    return Case(f"FuxiCTR, {name}", make, lambda dtype: (torch.randn(ROWS, 7, dtype=dtype),))


CASES = [
    _case("plain gates", 2, 2, 2, 2, [9, 6], gate_hidden_units=[]),
    _case("hidden gates with batch norm", 2, 3, 1, 2, [8, 5], gate_hidden_units=[6, 4], batch_norm=True),
    _case("one level, one shared expert", 1, 2, 3, 1, [5], gate_hidden_units=[6], hidden_activations="Tanh"),
]


def _mmoe(name: str, tasks: int, experts: int, units: list[int], gates: list[int], **options: Any) -> Case:
    given = {"hidden_activations": "ReLU", "net_dropout": 0, "batch_norm": False, **options}
    sizes: dict[str, Any] = {"num_experts": experts, "expert_hidden_units": units, "gate_hidden_units": gates}
    return Case(
        f"FuxiCTR, MMoE, {name}",
        lambda: MMoE(tasks, 7, units[-1], **sizes, **given),
        lambda dtype: (torch.randn(ROWS, 7, dtype=dtype),),
    )


MMOES = [
    _mmoe("hidden gates with batch norm", 3, 2, [8, 5], [6, 4], batch_norm=True),
    _mmoe("plain gates", 2, 4, [6], []),
    _mmoe("one expert, tanh", 2, 1, [5], [3], hidden_activations="Tanh"),
]
