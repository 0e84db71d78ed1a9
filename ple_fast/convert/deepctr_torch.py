"""DeepCTR-Torch: its PLE, with gates of hidden layers and tensors that nothing reads, and its MMOE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import PLE
from ..modules.unpack import Move
from ..topology import Topology
from . import penalties
from .converter import Converter, LevelSource, random_ids, register
from .fused_trunk import CHILD
from .library import Library, PlainLevel, tree, zeroed
from .plain_layers import PlainLayer
from .wiring import mixtures, ple_wiring

ACTIVATIONS = ("relu", "sigmoid", "identity", "prelu")


def from_deepctr_torch(source: nn.Module | Mapping[str, Tensor], *, like: PLE | None = None, prefix: str = "") -> PLE:
    """The fused trunk of a DeepCTR-Torch PLE, with its weights and statistics.

    Args:
        source: ``deepctr_torch.models.PLE``, or its state dict, which also needs ``like``.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``specific_experts`` in the names of the state dict.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    return LIBRARY.from_model_or_checkpoint(source, like, prefix)


def to_deepctr_torch(ple: PLE, target: nn.Module | None = None) -> nn.Module:
    """A trunk as DeepCTR-Torch has it.

    Args:
        ple: a trunk of ours.
        target: a DeepCTR-Torch PLE of the same configuration, whose trunk gets the weights; what it never reads stays.
            Default a tree of ordinary modules whose ``state_dict()`` is the trunk's part of DeepCTR-Torch's, with zeros
            in what it never reads.

    Raises:
        ValueError: DeepCTR-Torch cannot represent the trunk, or ``target`` is of another configuration.
    """
    return LIBRARY.to_tree_or_target(ple, target)


def _cgc_net(self: Any, inputs: Sequence[Tensor], level_num: int) -> list[Tensor]:
    return mixtures(self.ple_fast.levels[level_num], list(inputs))


class _DeepCTRConverter(Converter):
    """What the models have in common: a list of penalised weights."""

    library = "DeepCTR-Torch"

    def check(self, site: Any) -> None:
        """Refuse what this library cannot run itself, and several devices."""
        if len(getattr(site, "gpus", None) or ()) > 1:
            raise ValueError(
                "gpus: fit() would copy the model to several devices with nn.DataParallel, which is not supported; "
                "build it with gpus=None, and wrap the accelerated model in DistributedDataParallel"
            )

    def trained_unread(self, site: Any) -> Sequence[nn.Parameter]:
        return [parameter for parameter, _, _ in penalties.penalised(getattr(site, "regularization_weight", ()))]

    def renewed(self, site: Any, moves: Sequence[Move[nn.Parameter]]) -> dict[str, Any]:
        entries = getattr(site, "regularization_weight", None)
        if entries is None:
            return {}
        replaced = [site._modules[name] for name in (*self.children, CHILD) if name in site._modules]
        moved = {id(move.old) for move in moves}
        gone = [p for child in replaced for p in child.parameters() if id(p) not in moved]
        names = {id(p): name for name, p in site.named_parameters()}
        return {"regularization_weight": penalties.renewed(entries, moves, gone, names)}

    def noted(self, site: Any) -> Any:
        entries = getattr(site, "regularization_weight", None)
        return None if entries is None else penalties.noted(entries, site)

    def recalled(self, site: nn.Module, note: Any) -> dict[str, Any]:
        return {"regularization_weight": penalties.recalled(note, site)}


class PLEConverter(_DeepCTRConverter):
    """``deepctr_torch.models.PLE``: a whole model, whose levels are lists side by side."""

    class_name = "PLE"
    children = (
        "specific_experts",
        "shared_experts",
        "specific_gate_dnn",
        "specific_gate_dnn_final_layer",
        "shared_gate_dnn",
        "shared_gate_dnn_final_layer",
    )
    methods = (("cgc_net", _cgc_net),)
    trial_method = "cgc_net"

    def recognises(self, module: nn.Module) -> bool:
        needed = ("specific_experts", "shared_experts", "specific_gate_dnn_final_layer", "shared_gate_dnn_final_layer")
        return all(hasattr(module, name) for name in needed)

    def read(self, site: Any) -> list[LevelSource]:
        self.check(site)
        return [self._level(site, i) for i in range(len(site.specific_experts))]

    def _level(self, site: Any, i: int) -> LevelSource:
        own, made = site.specific_experts[i], site.shared_experts[i][0]
        ends = [*site.specific_gate_dnn_final_layer[i], site.shared_gate_dnn_final_layer[i]]
        shared = ends[0].out_features - len(own[0])  # it makes as many shared experts as a task has of its own
        if shared > len(made):
            raise ValueError(
                f"expected at most {len(made)} shared experts, because DeepCTR-Torch makes only specific_expert_num of "
                f"them, got shared_expert_num={shared}: its own forward raises IndexError"
            )
        bodies = [None] * len(ends)
        if hasattr(site, "specific_gate_dnn"):
            bodies = [*(gate[0] for gate in site.specific_gate_dnn[i]), site.shared_gate_dnn[i]]
        unread: list[nn.Module] = [*made[shared:]]
        is_last = i == len(site.specific_experts) - 1
        if is_last:
            unread += [module for module in (bodies.pop(), ends.pop()) if module is not None]
        gates = [[*_dnn(body), end] for body, end in zip(bodies, ends, strict=True)]
        experts = [list(_dnn(dnn)) for dnn in [*(dnn for task in own for dnn in task), *made[:shared]]]
        topology = ple_wiring([len(task) for task in own], shared, shared_gate=not is_last)
        return LevelSource(topology, experts, gates, unread=unread)

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        return next(iter(self.trials(site, draw)))

    def trials(self, site: Any, draw: Callable[[int], Tensor]) -> Iterator[tuple[Any, ...]]:
        for i, own in enumerate(site.specific_experts):
            yield [draw(own[0][0].linears[0].in_features) for _ in range(len(own) + 1)], i


def _mmoe_forward(self: Any, X: Tensor) -> Tensor:
    embedded, dense = self.input_from_feature_columns(X, self.dnn_feature_columns, self.embedding_dict)
    (level,) = self.ple_fast.levels
    rows = mixtures(level, torch.cat([part.flatten(1) for part in [*embedded, *dense]], dim=1))
    if len(self.tower_dnn_hidden_units) > 0:
        rows = [tower(row) for tower, row in zip(self.tower_dnn, rows, strict=True)]
    ends = zip(rows, self.tower_dnn_final_layer, self.out, strict=True)
    return torch.cat([out(last(row)) for row, last, out in ends], dim=-1)


class MMOEConverter(_DeepCTRConverter):
    """``deepctr_torch.models.MMOE``: a whole model."""

    class_name = "MMOE"
    children = ("expert_dnn", "gate_dnn", "gate_dnn_final_layer")
    methods = (("forward", _mmoe_forward),)

    def recognises(self, module: nn.Module) -> bool:
        needed = ("expert_dnn", "gate_dnn_final_layer", "tower_dnn_final_layer", "feature_index", "dnn_feature_columns")
        return all(hasattr(module, name) for name in needed)

    def read(self, site: Any) -> list[LevelSource]:
        self.check(site)
        ends = list(site.gate_dnn_final_layer)
        bodies = getattr(site, "gate_dnn", [None] * len(ends))
        gates = [[*_dnn(body), end] for body, end in zip(bodies, ends, strict=True)]
        experts = [list(_dnn(dnn)) for dnn in site.expert_dnn]
        return [LevelSource(Topology.mmoe(len(ends), len(experts)), experts, gates)]

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        inputs = draw(max(stop for _, stop in site.feature_index.values()))
        for column in site.dnn_feature_columns:
            start, stop = site.feature_index[column.name]
            if hasattr(column, "vocabulary_size"):
                inputs[:, start:stop] = random_ids(draw, stop - start, column.vocabulary_size).to(inputs.dtype)
            if getattr(column, "length_name", None) is not None:
                start, stop = site.feature_index[column.length_name]
                inputs[:, start:stop] = 1
        return (inputs,)

    def probes(self, site: Any) -> Sequence[nn.Module]:
        return list(getattr(site, "tower_dnn", site.tower_dnn_final_layer))


def _dnn(dnn: Any) -> Iterator[nn.Module]:
    """The modules of a ``DNN`` in the order in which they run; None has none."""
    for i, linear in enumerate(() if dnn is None else dnn.linears):
        activation = dnn.activation_layers[i]
        if getattr(activation, "dim", 2) != 2:
            raise ValueError(
                f"{type(activation).__name__} in DeepCTR-Torch's DNN is made for inputs of 3 dimensions, so that its "
                "own forward fails; use relu, prelu, sigmoid or linear"
            )
        yield linear
        if hasattr(dnn, "bn"):
            yield dnn.bn[i]
        if type(activation).__name__ != "Identity":  # a class of its own
            yield activation
        yield dnn.dropout


def _dnn_tree(layers: Sequence[PlainLayer]) -> nn.Module:
    content: dict[str, Any] = {"dropout": layers[0].dropout or nn.Dropout(0)}
    content["linears"] = [layer.linear for layer in layers]
    if layers[0].norm is not None:
        content["bn"] = [layer.norm for layer in layers]
    content["activation_layers"] = [layer.activation or nn.Identity() for layer in layers]
    return tree(content)


def _check_layers(layers: Sequence[PlainLayer]) -> None:
    """All layers, of experts and of gates, are made alike in this library."""
    first = layers[0].spec
    for layer in layers:
        spec = layer.spec
        if spec.norm not in (None, "batch") or (spec.norm and layer.norm_after) or not spec.bias:
            LIBRARY.cannot("its layers have a bias, and a batch norm before the activation or none")
        if spec.activation.name not in ACTIVATIONS:
            LIBRARY.cannot(f"the activation {spec.activation.name} is none of {', '.join(ACTIVATIONS)}")
        if (spec.activation.name, spec.norm, spec.dropout) != (first.activation.name, first.norm, first.dropout):
            LIBRARY.cannot("all its experts and gates have the same activation, norm and dropout")


def _write(levels: list[PlainLevel]) -> nn.Module:
    _check_layers([x for _, experts, gates in levels for stack in experts for x in stack] + [
        x for _, _, gates in levels for gate in gates for x in gate.layers[:-1]
    ])  # fmt: skip
    widths = {tuple(x.linear.out_features for x in expert) for _, experts, _ in levels for expert in experts}
    hidden = {tuple(x.linear.out_features for x in gate.layers[:-1]) for _, _, gates in levels for gate in gates}
    if len(widths) > 1 or len(hidden) > 1:
        LIBRARY.cannot(
            "all its experts have the same widths, at every level, and so have its gates; got "
            f"{sorted(widths)} and {sorted(hidden)}"
        )
    lists: dict[str, list[Any]] = {name: [] for name in PLEConverter.children}
    for level, experts, gates in levels:
        is_last = level is levels[-1].level
        tasks = level.topology.num_mixtures - (not is_last)
        counts = [level.topology.expert_slot.count(t) for t in range(tasks)]
        own, shared = counts[0], len(experts) - sum(counts)
        if len(set(counts)) > 1 or own < max(shared, 1):
            LIBRARY.cannot(f"every task has as many experts, at least 1 and as many as shared: {counts} and {shared}")
        for gate in gates:
            end = gate.layers[-1] if gate.layers else None
            if end is None or end.norm is not None or end.linear.bias is not None or gate.temperature != 1.0:
                LIBRARY.cannot("its gates end in a linear layer without bias, norm and temperature")
        trees = [_dnn_tree(expert) for expert in experts]
        lists["specific_experts"].append([trees[t * own : (t + 1) * own] for t in range(tasks)])
        dead = [zeroed(trees[0]) for _ in range(own - shared)]
        lists["shared_experts"].append([[*trees[tasks * own :], *dead]])
        ends: list[nn.Module] = [gate.layers[-1].linear for gate in gates]
        bodies = [_dnn_tree(gate.layers[:-1]) for gate in gates if len(gate.layers) > 1]
        if is_last:  # it has a shared gate there, too, which nothing reads
            like = gates[0].layers[-1].linear
            last = nn.Linear(like.in_features, len(experts), bias=False, device=like.weight.device)
            ends.append(zeroed(last.to(like.weight.dtype)))
            bodies += [zeroed(bodies[0])] if bodies else []
        lists["specific_gate_dnn_final_layer"].append(ends[:tasks])
        lists["shared_gate_dnn_final_layer"].append(ends[tasks])
        if bodies:
            lists["specific_gate_dnn"].append([[body] for body in bodies[:tasks]])
            lists["shared_gate_dnn"].append(bodies[tasks])
    return tree({name: modules for name, modules in lists.items() if modules})


CONVERTER = PLEConverter()
LIBRARY = Library(CONVERTER, lambda model: [model], _write)
register(CONVERTER)
register(MMOEConverter())
