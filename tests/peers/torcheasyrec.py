"""Stand-ins for TorchEasyRec's PLE, MMoE, DBMTL (alibaba/TorchEasyRec, commit 54cac31) and PEPNet (commits d0fc488 and
2655e6c): same names and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.swap_proof import ROWS, Case


class Dice(nn.Module):
    """``z * (p + alpha * (1 - p))``."""

    def __init__(self, hidden_size: int, dim: int = 2) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(hidden_size, affine=False)
        self.alpha = nn.Parameter(torch.zeros(hidden_size))
        self.dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """``(B, H)`` to the same."""
        p = torch.sigmoid(self.bn(z))
        return z * (p + self.alpha * (1 - p))


def create_activation(name: str, width: int) -> nn.Module:
    """``"nn.LeakyReLU(negative_slope=0.1)"``, say, or ``"Dice"``."""
    if name == "Dice":
        return Dice(width)
    kind, _, given = name.removeprefix("nn.").rstrip(")").partition("(")
    options = dict(item.split("=") for item in given.split(",") if item)
    made: nn.Module = getattr(nn, kind)(**{key: float(value) for key, value in options.items()})
    return made


class Perceptron(nn.Module):
    """Linear, norm, activation, dropout."""

    def __init__(
        self, width: int, units: int, activation: str, use_bn: bool, bias: bool, dropout: float, use_ln: bool
    ) -> None:
        super().__init__()
        self.perceptron = nn.Sequential(nn.Linear(width, units, bias=bias and not use_bn))
        if use_bn:
            self.perceptron.append(nn.BatchNorm1d(units))
        if use_ln:
            self.perceptron.append(nn.LayerNorm(units))
        if activation:
            self.perceptron.append(create_activation(activation, units))
        if dropout:
            self.perceptron.append(nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, H)``."""
        y: Tensor = self.perceptron(x)
        return y


class MLP(nn.Module):
    """Perceptrons."""

    def __init__(
        self,
        in_features: int,
        hidden_units: Sequence[int],
        bias: bool = True,
        activation: str = "nn.ReLU",
        use_bn: bool = False,
        dropout_ratio: float = 0.0,
        use_ln: bool = False,
        return_hidden_layer_feature: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden_units]
        self.return_hidden_layer_feature = return_hidden_layer_feature
        self.mlp = nn.ModuleList(
            Perceptron(width, units, activation, use_bn, bias, dropout_ratio, use_ln)
            for width, units in zip(widths, hidden_units, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, H)``."""
        for layer in self.mlp:
            x = layer(x)
        return x


class ExtractionNet(nn.Module):
    """One level. Without a shared gate the second output is None."""

    def __init__(
        self,
        in_extraction_networks: Sequence[int],
        in_shared_expert: int,
        network_name: str,
        share_num: int,
        expert_num_per_task: int,
        share_expert_net: dict[str, Any],
        task_expert_net: dict[str, Any],
        final_flag: bool = False,
    ) -> None:
        super().__init__()
        self.name = network_name
        tasks = len(in_extraction_networks)
        self._shared_layers = nn.ModuleList(MLP(in_shared_expert, **share_expert_net) for _ in range(share_num))
        self._shared_gate = (
            None if final_flag else nn.Linear(in_shared_expert, tasks * expert_num_per_task + share_num)
        )  # fmt: skip
        self._task_layers = nn.ModuleList(
            nn.ModuleList(MLP(width, **task_expert_net) for _ in range(expert_num_per_task))
            for width in in_extraction_networks
        )
        self._task_gates = nn.ModuleList(
            nn.Linear(width, expert_num_per_task + share_num) for width in in_extraction_networks
        )

    def forward(
        self, extraction_network_fea: Sequence[Tensor], shared_expert_fea: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """T inputs and the shared one, each ``(B, D)``."""
        shared = [expert(shared_expert_fea) for expert in self._shared_layers]
        layers: Any = self._task_layers
        own = [[expert(x) for expert in experts] for experts, x in zip(layers, extraction_network_fea, strict=True)]
        outputs = [
            _mix(gate(x), [*experts, *shared])
            for gate, x, experts in zip(self._task_gates, extraction_network_fea, own, strict=True)
        ]
        if self._shared_gate is None:
            return outputs, None
        return outputs, _mix(self._shared_gate(shared_expert_fea), [*(y for row in own for y in row), *shared])


def _mix(logits: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return (logits.softmax(1).unsqueeze(2) * torch.stack(list(experts), 1)).sum(1)


class PLE(nn.Module):
    """The trunk of a model, with a linear tower per task. TorchEasyRec builds it from a configuration."""

    def __init__(self, width: int, tasks: int, levels: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self._extraction_nets = nn.ModuleList()
        out = width
        for i, options in enumerate(levels):
            net = ExtractionNet([out] * tasks, out, f"level{i}", final_flag=i == len(levels) - 1, **options)
            self._extraction_nets.append(net)
            out = options["task_expert_net"]["hidden_units"][-1]
        self._task_tower = nn.ModuleList(nn.Linear(out, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits ``(B, 1)`` by task."""
        own: list[Tensor] = [x] * len(self._task_tower)
        shared = x
        for net in self._extraction_nets:
            own, shared = net(own, shared)
        return {f"logits_{t}": tower(y) for t, (tower, y) in enumerate(zip(self._task_tower, own, strict=True))}


class MMoE(nn.Module):
    """Experts and, per task, a gate: the layers of ``gate_mlp``, if any, and a linear end."""

    def __init__(
        self,
        in_features: int,
        expert_mlp: dict[str, Any],
        num_expert: int,
        num_task: int,
        gate_mlp: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_expert, self.num_task = num_expert, num_task
        self.expert_mlps = nn.ModuleList(MLP(in_features, **expert_mlp) for _ in range(num_expert))
        self.has_gate_mlp = gate_mlp is not None
        width = in_features
        if gate_mlp is not None:
            self.gate_mlps = nn.ModuleList(MLP(in_features, **gate_mlp) for _ in range(num_task))
            width = gate_mlp["hidden_units"][-1]
        self.gate_finals = nn.ModuleList(nn.Linear(width, num_expert) for _ in range(num_task))

    def forward(self, input: Tensor) -> list[Tensor]:
        """``(B, D)`` to a mixture ``(B, H)`` per task."""
        experts = [expert(input) for expert in self.expert_mlps]
        hidden = [body(input) for body in self.gate_mlps] if self.has_gate_mlp else [input] * self.num_task
        return [_mix(end(y), experts) for end, y in zip(self.gate_finals, hidden, strict=True)]


class MMoEModel(nn.Module):
    """A mixture and a linear tower per task. TorchEasyRec builds it from a configuration."""

    def __init__(self, width: int, tasks: int, **options: Any) -> None:
        super().__init__()
        self.mmoe = MMoE(width, num_task=tasks, **options)
        self._task_tower = nn.ModuleList(nn.Linear(options["expert_mlp"]["hidden_units"][-1], 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits ``(B, 1)`` by task."""
        ends = zip(self._task_tower, self.mmoe(x), strict=True)
        return {f"logits_{t}": tower(y) for t, (tower, y) in enumerate(ends)}


MMoEModel.__name__ = "MMoE"  # the library's model has the name of its mixture


class DBMTL(nn.Module):
    """A mixture between a bottom and towers, each of which but the first also reads the one before."""

    def __init__(self, width: int, tasks: int, **options: Any) -> None:
        super().__init__()
        out = options["expert_mlp"]["hidden_units"][-1]
        self.bottom_mlp = MLP(width, [6])
        self.mmoe = MMoE(6, num_task=tasks, **options)
        self.relation_mlps = nn.ModuleList(MLP(out if t == 0 else out + 4, [4]) for t in range(tasks))
        self.task_outputs = nn.ModuleList(nn.Linear(4, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits ``(B, 1)`` by task."""
        read: list[Tensor] = []
        for relation, y in zip(self.relation_mlps, self.mmoe(self.bottom_mlp(x)), strict=True):
            read.append(relation(torch.cat([y, *read[-1:]], 1)))
        return {f"logits_{t}": end(y) for t, (end, y) in enumerate(zip(self.task_outputs, read, strict=True))}


class GateNU(nn.Module):
    """``gamma sigmoid(relu(x W + b) W' + b')``."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, gamma: float = 2.0) -> None:
        super().__init__()
        self._gamma, self._output_dim = gamma, output_dim
        self.dense_layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim), nn.Sigmoid()
        )

    def output_dim(self) -> int:
        """Width of what it scales."""
        return self._output_dim

    def forward(self, x: Tensor) -> Tensor:
        """``(B, P)`` to ``(B, D)``."""
        y: Tensor = self._gamma * self.dense_layers(x)
        return y


class EPNet(nn.Module):
    """Features scaled by a gate of the domain and of the features."""

    def __init__(self, main_dim: int, domain_dim: int, hidden_dim: int, gamma: float = 2.0) -> None:
        super().__init__()
        self._domain_dim, self._main_dim = domain_dim, main_dim
        self.gate_nu = GateNU(domain_dim + main_dim, hidden_dim, main_dim, gamma)

    def output_dim(self) -> int:
        """Width of the features."""
        return self.gate_nu.output_dim()

    def forward(self, main_emb: Tensor, domain_emb: Tensor) -> Tensor:
        """``(B, D)`` and ``(B, P)`` to ``(B, D)``."""
        y: Tensor = self.gate_nu(torch.cat([domain_emb, main_emb.detach()], -1)) * main_emb
        return y


class PPNet(nn.Module):
    """Per task layers whose outputs a gate scales, task after task in each list."""

    def __init__(
        self,
        main_feature: int,
        uia_feature: int,
        num_task: int,
        hidden_units: Sequence[int],
        activation: str = "nn.ReLU",
        dropout_ratio: float = 0.0,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.main_feature, self.uia_feature, self.num_task = main_feature, uia_feature, num_task
        self.hidden_units, self.len_hidden = hidden_units, len(hidden_units)
        self.linears, self.activations = nn.ModuleList(), nn.ModuleList()
        self.dropout_ratios, self.gate_nus = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_task):
            width = main_feature
            for units in hidden_units:
                self.linears.append(nn.Linear(width, units))
                self.activations.append(create_activation(activation, units))
                self.dropout_ratios.append(nn.Dropout(dropout_ratio))
                self.gate_nus.append(GateNU(main_feature + uia_feature, units, units, gamma))
                width = units

    def forward(self, main_emb: Tensor, uia_emb: Tensor) -> list[Tensor]:
        """``(B, D)`` and ``(B, P)`` to ``(B, H)`` per task."""
        outputs = []
        for task in range(self.num_task):
            prior, y = torch.cat([uia_emb, main_emb.detach()], -1), main_emb
            for i in range(task * self.len_hidden, (task + 1) * self.len_hidden):
                y = self.activations[i](self.linears[i](y))
                y = self.dropout_ratios[i](y * self.gate_nus[i](prior))
            outputs.append(y)
        return outputs


class PEPNet(nn.Module):
    """Both and a tower per task. TorchEasyRec builds it from a configuration."""

    def __init__(
        self, width: int, domain: int, person: int, tasks: int, units: Sequence[int], gamma: float = 2.0, **options: Any
    ) -> None:
        super().__init__()
        self.widths = [width, domain, person]
        self.epnet = EPNet(width, domain, 5, gamma)
        self.ppnet = PPNet(self.epnet.output_dim(), person, tasks, units, gamma=gamma, **options)
        self._task_tower = nn.ModuleList(nn.Sequential(MLP(units[-1], [3]), nn.Linear(3, 1)) for _ in range(tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits ``(B, 1)`` by task."""
        main, domain, person = x.split(self.widths, 1)
        inputs = self.ppnet(self.epnet(main, domain), person)
        return {f"logits_{t}": tower(y) for t, (tower, y) in enumerate(zip(self._task_tower, inputs, strict=True))}


def _level(own: int, shared: int, net: dict[str, Any], shared_net: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "share_num": shared,
        "expert_num_per_task": own,
        "task_expert_net": net,
        "share_expert_net": shared_net or net,
    }


def _case(name: str, tasks: int, *levels: dict[str, Any]) -> Case:
    return _made(name, lambda: PLE(7, tasks, levels))


def _made(name: str, make: Callable[[], nn.Module]) -> Case:
    return Case(f"TorchEasyRec, {name}", make, lambda dtype: (torch.randn(ROWS, 7, dtype=dtype),))


CASES = [
    _case(
        "batch norm, wider shared experts",
        2,
        _level(2, 1, {"hidden_units": [9, 6], "use_bn": True}, {"hidden_units": [12, 6], "use_bn": True}),
        _level(1, 2, {"hidden_units": [5], "use_bn": True, "dropout_ratio": 0.0}),
    ),
    _case(
        "plain, levels of their own",
        3,
        _level(2, 2, {"hidden_units": [8]}),
        _level(1, 1, {"hidden_units": [6, 5], "bias": False}, {"hidden_units": [5]}),
    ),
    _case(
        "layer norm",
        2,
        _level(1, 1, {"hidden_units": [8, 6], "use_ln": True, "activation": "nn.SiLU"}),
        _level(2, 1, {"hidden_units": [4], "use_ln": True, "activation": "nn.LeakyReLU(negative_slope=0.1)"}),
    ),
    _case(
        "dice, nothing shared",
        2,
        _level(2, 0, {"hidden_units": [6], "activation": "Dice"}),
        _level(2, 0, {"hidden_units": [6], "activation": "nn.PReLU"}),
    ),
]

_EXPERT: dict[str, Any] = {"hidden_units": [8, 5], "use_bn": True}
MMOES = [
    _made("MMoE, batch norm", lambda: MMoEModel(7, 2, expert_mlp=_EXPERT, num_expert=3)),
    _made(
        "MMoE, hidden gates with layer norm",
        lambda: MMoEModel(
            7,
            3,
            expert_mlp={"hidden_units": [6], "bias": False, "activation": "nn.SiLU"},
            num_expert=2,
            gate_mlp={"hidden_units": [5, 4], "use_ln": True, "activation": "nn.Tanh"},
        ),
    ),
    _made("MMoE, one task, one expert", lambda: MMoEModel(7, 1, expert_mlp={"hidden_units": [5]}, num_expert=1)),
    _made(
        "DBMTL",
        lambda: DBMTL(
            7,
            3,
            expert_mlp={"hidden_units": [6, 4], "activation": "Dice"},
            num_expert=4,
            gate_mlp={"hidden_units": [3]},
        ),
    ),
]

PEPNETS = [
    _made("PEPNet", lambda: PEPNet(4, 1, 2, 3, (6, 5))),
    _made("PEPNet, one task, one layer", lambda: PEPNet(3, 2, 2, 1, (6,), gamma=1.5, activation="nn.SiLU")),
    _made("PEPNet, dice", lambda: PEPNet(3, 2, 2, 2, (6, 4), activation="Dice")),
    _made("PEPNet, prelu", lambda: PEPNet(3, 2, 2, 2, (6, 6, 4), activation="nn.PReLU")),
]
