"""DeepCTR-Torch: its PLE, with gates of hidden layers and tensors that nothing reads, and its MMOE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import PLE, MMoE
from ..modules.unpack import Move
from .converter import LevelSource, random_ids, register
from .fused_trunk import CHILD
from .library import Library, PlainLevel, mixtures, ple_wiring, tree, zeroed
from .mmoe import Classes, MMoELibrary
from .optimizers import by_new, successors
from .plain_layers import PlainLayer, PlainStack

ACTIVATIONS = ("relu", "sigmoid", "identity", "prelu")
Entry = tuple[list[Any], float, float]
"""Of ``regularization_weight``: weights, which are parameters or pairs of a name and a parameter, l1 and l2."""


def from_deepctr_torch(
    source: nn.Module | Mapping[str, Tensor], *, like: PLE | MMoE | None = None, prefix: str = ""
) -> PLE:
    """The fused trunk of a DeepCTR-Torch PLE or MMOE, with its weights and statistics.

    Args:
        source: ``PLE`` or ``MMOE`` of ``deepctr_torch.models``, or its state dict, which also needs ``like``.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``specific_experts`` or ``expert_dnn`` in the names of the state dict.

    Returns:
        ``(B, D)`` to ``(B, T, H)``: of an MMOE a trunk of one level, wired as ``ple_fast.MMoE``.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    return LIBRARY.to_ours(source, like, prefix)


def to_deepctr_torch(ple: PLE | MMoE, target: nn.Module | None = None) -> nn.Module:
    """A trunk as DeepCTR-Torch has it.

    Args:
        ple: a trunk of ours: an MMoE, or else a PLE.
        target: a DeepCTR-Torch model of the same configuration, whose trunk gets the weights; what it never reads
            stays. Default a tree of ordinary modules whose ``state_dict()`` is the trunk's part of DeepCTR-Torch's,
            with zeros in what it never reads.

    Raises:
        TypeError: ``target`` is something else.
        ValueError: DeepCTR-Torch cannot represent the trunk, or ``target`` is of another configuration.
    """
    return LIBRARY.to_theirs(ple, target)


def _cgc_net(self: Any, inputs: Sequence[Tensor], level_num: int) -> list[Tensor]:
    return mixtures(self.ple_fast.levels[level_num], list(inputs))


class _DeepCTR(Library):
    """What the models have in common: a list of penalised weights, ``regularization_weight``, and make-ups."""

    library = "DeepCTR-Torch"

    def check(self, site: Any) -> None:
        """Refuse what this library cannot run itself, and several devices."""
        if len(getattr(site, "gpus", None) or ()) > 1:
            raise ValueError(
                "gpus: fit() would copy the model to several devices with nn.DataParallel, which is not supported; "
                "build it with gpus=None, and wrap the accelerated model in DistributedDataParallel"
            )

    def trained_unread(self, site: Any) -> Sequence[nn.Parameter]:
        return [parameter for parameter, _ in _penalised(getattr(site, "regularization_weight", ()))]

    def renewed(self, site: Any, moves: Sequence[Move[nn.Parameter]]) -> dict[str, Any]:
        """New parameters in the place of old ones, each as often as its parts were; without what is gone."""
        entries = getattr(site, "regularization_weight", None)
        if entries is None:
            return {}
        _check_penalties(entries, moves, {id(p): name for name, p in site.named_parameters()})
        replaced = [site._modules[name] for name in (*self.children, CHILD) if name in site._modules]
        gone, news = {id(p) for child in replaced for p in child.parameters()}, successors(moves)
        # The k-th time that a part is penalised is the k-th time for the whole; entries without penalty count apart.
        met: dict[tuple[bool, int], int] = {}
        placed: dict[tuple[bool, int], int] = {}
        made: list[Entry] = []
        for weights, l1, l2 in entries:
            free = not (l1 > 0 or l2 > 0)
            kept: list[Any] = []
            for weight in weights:
                old = _parameter(weight)
                if id(old) not in news:
                    kept += [] if id(old) in gone else [weight]
                    continue
                times = met[free, id(old)] = met.get((free, id(old)), 0) + 1
                for new in news[id(old)]:
                    if placed.get((free, id(new)), 0) < times:
                        placed[free, id(new)] = times
                        kept.append((weight[0], new) if isinstance(weight, tuple) else new)
            made.append((kept, l1, l2))
        return {"regularization_weight": made}

    def noted(self, site: Any) -> Any:
        entries = getattr(site, "regularization_weight", None)
        if entries is None:
            return None
        names = {id(p): name for name, p in site.named_parameters(remove_duplicate=False)}
        note = [
            ([(w[0] if isinstance(w, tuple) else None, names.get(id(_parameter(w)))) for w in weights], l1, l2)
            for weights, l1, l2 in entries
        ]
        return None if any(name is None for rows, _, _ in note for _, name in rows) else note

    def recalled(self, site: nn.Module, note: Any) -> dict[str, Any]:
        def weight(label: str | None, name: str) -> Any:
            parameter = site.get_parameter(name)
            return parameter if label is None else (label, parameter)

        return {"regularization_weight": [([weight(*row) for row in rows], l1, l2) for rows, l1, l2 in note]}

    def check_alike(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> None:
        """All layers, of experts and of gates, are made alike in this library.

        Raises:
            ValueError: they are not, or are made in a way that it does not have.
        """
        for gate in gates:
            end = gate.layers[-1] if gate.layers else None
            if end is None or end.norm is not None or end.linear.bias is not None or not gate.ends_plainly:
                self.cannot("its gates end in a linear layer without bias, norm and temperature")
        bodies = [gate.layers[:-1] for gate in gates]
        layers = [layer for stack in (*experts, *bodies) for layer in stack]
        first = layers[0].spec
        for layer in layers:
            spec = layer.spec
            if spec.norm not in (None, "batch") or (spec.norm and layer.norm_after) or not spec.bias:
                self.cannot("its layers have a bias, and a batch norm before the activation or none")
            if spec.activation.name not in ACTIVATIONS:
                self.cannot(f"the activation {spec.activation.name} is none of {', '.join(ACTIVATIONS)}")
            if (spec.activation.name, spec.norm, spec.dropout) != (first.activation.name, first.norm, first.dropout):
                self.cannot("all its experts and gates have the same activation, norm and dropout")
        widths, hidden = (
            {tuple(x.linear.out_features for x in stack) for stack in stacks} for stacks in (experts, bodies)
        )
        if len(widths) > 1 or len(hidden) > 1:
            self.cannot(
                "all its experts have the same widths, at every level, and so have its gates; got "
                f"{sorted(widths)} and {sorted(hidden)}"
            )


def _parameter(weight: Any) -> Any:
    return weight[1] if isinstance(weight, tuple) else weight


def _penalised(entries: Iterable[Entry]) -> Iterator[tuple[nn.Parameter, tuple[float, float]]]:
    """Every occurrence of a parameter under a penalty that is not 0, with that."""
    for weights, l1, l2 in entries:
        if l1 > 0 or l2 > 0:
            yield from ((_parameter(weight), (l1, l2)) for weight in weights)


def _check_penalties(entries: Iterable[Entry], moves: Sequence[Move[nn.Parameter]], names: Mapping[int, str]) -> None:
    found: dict[int, list[tuple[float, float]]] = {}
    for parameter, penalty in _penalised(entries):
        found.setdefault(id(parameter), []).append(penalty)
    for first, *others in by_new(moves):
        theirs = found.get(id(first.old), [])
        for move in others:
            ours = found.get(id(move.old), [])
            if ours != theirs:
                raise ValueError(
                    f"{names[id(first.old)]} and {names[id(move.old)]} become one stacked parameter and have different "
                    f"penalties (l1, l2): {theirs} and {ours}; add them to the regularisation with equal l1 and l2"
                )


class PLEConverter(_DeepCTR):
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

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        self.check_alike([x for level in levels for x in level.experts], [x for level in levels for x in level.gates])
        lists: dict[str, list[Any]] = {name: [] for name in self.children}
        for level in levels:
            counts = level.counts
            shared = len(level.experts) - sum(counts)
            if len(set(counts)) > 1 or counts[0] < max(shared, 1):
                self.cannot(f"every task has as many experts, at least 1 and as many as shared: {counts} and {shared}")
            own, others = level.split([_dnn_tree(expert) for expert in level.experts])
            dead = [zeroed(own[0][0]) for _ in range(counts[0] - shared)]
            lists["specific_experts"].append(own)
            lists["shared_experts"].append([[*others, *dead]])
            ends = [gate.layers[-1].linear for gate in level.gates]
            bodies = [_dnn_tree(gate.layers[:-1]) for gate in level.gates if len(gate.layers) > 1]
            if level.is_last:  # it has a shared gate there, too, which nothing reads
                like: dict[str, Any] = {"device": ends[0].weight.device, "dtype": ends[0].weight.dtype}
                ends.append(zeroed(nn.Linear(ends[0].in_features, len(level.experts), bias=False, **like)))
                bodies += [zeroed(bodies[0])] if bodies else []
            lists["specific_gate_dnn_final_layer"].append(ends[:-1])
            lists["shared_gate_dnn_final_layer"].append(ends[-1])
            if bodies:
                lists["specific_gate_dnn"].append([[body] for body in bodies[:-1]])
                lists["shared_gate_dnn"].append(bodies[-1])
        return tree({name: modules for name, modules in lists.items() if modules})


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


def _mmoe_forward(self: Any, X: Tensor) -> Tensor:
    embedded, dense = self.input_from_feature_columns(X, self.dnn_feature_columns, self.embedding_dict)
    (level,) = self.ple_fast.levels
    rows = mixtures(level, torch.cat([part.flatten(1) for part in [*embedded, *dense]], dim=1))
    if len(self.tower_dnn_hidden_units) > 0:
        rows = [tower(row) for tower, row in zip(self.tower_dnn, rows, strict=True)]
    ends = zip(rows, self.tower_dnn_final_layer, self.out, strict=True)
    return torch.cat([out(last(row)) for row, last, out in ends], dim=-1)


class MMOEConverter(_DeepCTR, MMoELibrary):
    """``deepctr_torch.models.MMOE``: a whole model."""

    class_name = "MMOE"
    children = ("expert_dnn", "gate_dnn", "gate_dnn_final_layer")
    methods = (("forward", _mmoe_forward),)

    def recognises(self, module: nn.Module) -> bool:
        rest = ("tower_dnn_final_layer", "feature_index", "dnn_feature_columns")
        needed = () if type(module) is nn.Module else rest  # a tree has the trunk alone
        return all(hasattr(module, name) for name in ("expert_dnn", "gate_dnn_final_layer", *needed))

    def read(self, site: Any) -> list[LevelSource]:
        self.check(site)
        ends = list(site.gate_dnn_final_layer)
        bodies = getattr(site, "gate_dnn", [None] * len(ends))
        gates = [[*_dnn(body), end] for body, end in zip(bodies, ends, strict=True)]
        experts = [list(_dnn(dnn)) for dnn in site.expert_dnn]
        return self.level(experts, gates)

    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        self.check_alike(experts, gates)
        made: dict[str, Any] = {"expert_dnn": [_dnn_tree(expert) for expert in experts]}
        if len(gates[0].layers) > 1:
            made["gate_dnn"] = [_dnn_tree(gate.layers[:-1]) for gate in gates]
        return {**made, "gate_dnn_final_layer": [gate.layers[-1].linear for gate in gates]}

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


LIBRARY = Classes(PLEConverter(), MMOEConverter())
for library in LIBRARY.every:
    register(library)
