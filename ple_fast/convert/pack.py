"""A fused level out of ordinary modules: same weights, same results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..modules import ExtractionNetwork
from ..modules.layers import ExpertBlock, Gate, StackedLayer
from ..modules.plain import WeightOffset
from ..modules.unpack import Move, gate_moves, layer_moves, offset_move, tensor_named
from ..scalars import shown
from ..specs import GateSpec, MLPSpec
from ..topology import Topology
from .plain_layers import PlainLayer, PlainStack, kind, parse, refuse


def pack(
    experts: Sequence[Any] | nn.ModuleList,
    gates: Sequence[Any] | nn.ModuleList,
    topology: Topology,
    *,
    gate_input: Literal["previous", "with_shared", "raw"] | None = None,
) -> ExtractionNetwork:
    """The fused level that computes what ordinary modules compute (paper eq. 2-4), in train and in eval mode.

    Weights and buffers are copied; dtype, device, ``requires_grad``, the settings of norms and the mode are carried
    over. Gradients, and the state of an optimizer, are not.

    Args:
        experts: one stack per expert of ``topology``: Linear, BatchNorm1d, LayerNorm, activations and Dropout, in any
            nesting of Sequential, ModuleList and lists.
        gates: one stack per mixture, ending in its logits in the order of ``topology.mixture_experts``, or in a
            Softmax over them; None for static mixtures. All gates have the same hidden layers.
        topology: the wiring.
        gate_input: what the gates read at every level of a trunk: ``"previous"`` (the level's slots), ``"with_shared"``
            (each slot plus the last one) or ``"raw"`` (the model's input); default previous, and raw where their width
            is not that of the experts' input.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a layer cannot be packed; the message has its path, as ``experts[2].1.3``, and says what can.
    """
    return packed(experts, gates, topology, gate_input=gate_input).level


class Placed(NamedTuple):
    """An ordinary layer, the stacked one that it becomes a row of, and where its tensors lie in that."""

    plain: PlainLayer
    stacked: StackedLayer | Gate
    moves: list[Move[str]]

    def holder(self, role: str) -> nn.Module:
        """The stacked module that has the mode of the module of that role."""
        path = {"norm": "norm", "activation": "activation", "dice_norm": "activation.norm"}.get(role, "")
        try:
            return self.stacked.get_submodule(path)
        except AttributeError:  # it has no tensors, so that nothing of it is kept
            return self.stacked


class Packed(NamedTuple):
    """A fused level, and the ordinary layers that it was built of."""

    level: ExtractionNetwork
    layers: list[Placed]
    offsets: dict[int, WeightOffset]
    """Per mixture the module that brought its learned scalars."""


@torch.inference_mode(False)  # parameters made in it could never be trained
def packed(
    experts: Sequence[Any] | nn.ModuleList,
    gates: Sequence[Any] | nn.ModuleList,
    topology: Topology,
    *,
    gate_input: Literal["previous", "with_shared", "raw"] | None = None,
    splits: Collection[int] = (),
) -> Packed:
    """``pack``, with what it read of the modules; the experts ``splits`` begin a block."""
    if not isinstance(topology, Topology):
        raise TypeError(f"topology: expected a Topology, got {shown(topology)} ({kind(topology)})")
    if gate_input not in (None, "previous", "with_shared", "raw"):
        raise ValueError(f'gate_input: expected "previous", "with_shared", "raw" or None, got {shown(gate_input)}')
    expert_modules = _listed("experts", experts, topology.num_experts)
    gate_modules = _listed("gates", gates, topology.num_mixtures)
    expert_stacks = [parse(f"experts[{e}]", module) for e, module in enumerate(expert_modules)]
    gate_stacks = [_parse_gate(f"gates[{o}]", module, topology, o) for o, module in enumerate(gate_modules)]
    _check_experts(expert_stacks)
    _check_tensors([*expert_stacks, *gate_stacks])
    gated = [gate_stacks[o] for o in topology.gated_mixtures]
    in_features = expert_stacks[0].layers[0].linear.in_features
    gate_features = gated[0].layers[0].linear.in_features if gated else in_features
    if gate_features != in_features and gate_input in ("previous", "with_shared"):
        raise ValueError(
            f'gate_input: expected "raw", because the gates read {gate_features} features and the experts {in_features}'
        )
    if gate_input is None:
        gate_input = "previous" if gate_features == in_features else "raw"
    weight = expert_stacks[0].layers[0].linear.weight
    settings = [[_settings(layer) for layer in stack.layers] for stack in expert_stacks]
    # On the meta device nothing is drawn from the random stream; every element is written below.
    level = ExtractionNetwork(
        in_features,
        topology,
        experts=[_mlp_spec(stack.layers) for stack in expert_stacks],
        gate=_gate_spec(gated, gate_input),
        gate_features=gate_features,
        device="meta",
        dtype=weight.dtype,
        _splits={e for e in range(1, topology.num_experts) if e in splits or settings[e] != settings[e - 1]},
    ).to_empty(device=weight.device)
    # Of the layers, and not of the containers around them, which a caller may just have made.
    level.train(any(layer.training for stack in [*expert_stacks, *gate_stacks] for layer in stack.layers))
    for block in level.blocks:
        assert isinstance(block, ExpertBlock)
        block.train(any(layer.training for layer in expert_stacks[block.experts[0]].layers))
    if gated:
        level.gate.train(gated[0].layers[-1].training)
    offsets = {o: stack.offset for o, stack in enumerate(gate_stacks) if stack.offset is not None}
    made = Packed(level, [*_placed(level, expert_stacks, gate_stacks)], offsets)
    with torch.no_grad():
        _fill(made)
    return made


def _listed(name: str, modules: Any, count: int) -> list[Any]:
    if not isinstance(modules, (list, tuple, nn.ModuleList)):
        raise TypeError(f"{name}: expected a list of modules, got {kind(modules)}")
    if len(modules) != count:
        raise ValueError(f"{name}: expected {count}, as the topology says, got {len(modules)}")
    return list(modules)


def _parse_gate(path: str, module: Any, topology: Topology, o: int) -> PlainStack:
    """The gate of mixture ``o``; of a static mixture an empty one, or its offsets."""
    assert topology.mixture_kind is not None and topology.mixture_offset is not None
    stack = PlainStack(path) if module is None else parse(path, module, gate=True)
    gated = o in topology.gated_mixtures
    if stack.offset is not None and stack.offset.columns != topology.mixture_offset[o]:
        raise ValueError(
            f"{path}: expected offsets at {topology.mixture_offset[o]}, as topology.mixture_offset says, got "
            f"{stack.offset.columns}"
        )
    if not gated and (stack.layers or stack.softmax):
        raise ValueError(f"{path}: expected None, because mixture {o} is static, got {kind(module)}")
    if not gated:
        return stack
    if not stack.layers:
        raise ValueError(
            f"{path}: expected a gate with a Linear, because mixture {o} is a {topology.mixture_kind[o]}, got "
            f"{kind(module)}"
        )
    if topology.mixture_kind[o] == "sigmoid":
        if stack.softmax:
            raise ValueError(
                f"{path}: expected a gate that ends in its logits or their Sigmoid, because mixture {o} is one, got a "
                "Softmax"
            )
        last = stack.layers[-1]
        if type(last.activation) is nn.Sigmoid:
            last.activation = None
            last.paths = {role: own for role, own in last.paths.items() if role not in ("activation", "dice_norm")}
    _check_gate_layers(stack, len(topology.mixture_experts[o]))
    return stack


def _check_gate_layers(stack: PlainStack, logits: int) -> None:
    for layer in stack.layers[:-1]:
        if layer.linear.bias is None:
            refuse(layer.path, layer.linear, "a hidden layer of a gate has a bias; give it one of 0, frozen")
        if layer.norm_after:
            refuse(layer.paths["norm"], layer.norm, "a hidden layer of a gate has its norm before the activation")
    last = stack.layers[-1]
    if last.linear.out_features != logits:
        refuse(
            last.path,
            last.linear,
            f"expected out_features={logits}, the experts of this mixture, got {last.linear.out_features}",
        )
    for role, module in (("activation", last.activation), ("dropout", last.dropout)):
        if module is not None:
            why = "follows the last Linear, after which a gate has BatchNorm1d and Softmax alone"
            refuse(last.paths[role], module, why)
    if isinstance(last.norm, nn.LayerNorm):
        refuse(last.paths["norm"], last.norm, "follows the last Linear, and logits have BatchNorm1d or no norm")


def _check_experts(stacks: list[PlainStack]) -> None:
    for stack in stacks:
        if not stack.layers:
            raise ValueError(f"{stack.path}: expected an expert with at least one Linear, got none")
        for end, name, width in ((0, "in_features", "input"), (-1, "out_features", "output")):
            layer, first = stack.layers[end], stacks[0].layers[end]
            expected, got = getattr(first.linear, name), getattr(layer.linear, name)
            if expected != got:
                refuse(
                    layer.path, layer.linear, f"expected {name}={expected}, the {width} width of {stacks[0].path}, "
                    f"got {got}: all experts of a level have one",
                )  # fmt: skip


def _tensors(stacks: list[PlainStack]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Path, module, name and value of every parameter and buffer."""
    for stack in stacks:
        for layer in stack.layers:
            for role, module in layer.modules.items():
                for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    yield layer.paths[role], module, name, tensor
        if stack.offset is not None:
            yield stack.path, stack.offset, "weight", stack.offset.weight


def _check_tensors(stacks: list[PlainStack]) -> None:
    """One dtype, one device, and no tensor that stands at two places."""
    first: Tensor | None = None
    owners: dict[tuple[str, int], str] = {}
    for path, module, name, tensor in _tensors(stacks):
        for key in (("object", id(tensor)), ("memory", tensor.data_ptr() if tensor.numel() else 0)):
            if key[1] and key in owners:
                refuse(
                    path, module, f"{name} is also that of {owners[key]}: a level has weights of its own for each, so "
                    "they would no longer be tied; give each its own copy (copy.deepcopy)",
                )  # fmt: skip
            owners[key] = path
        if first is None:
            first = tensor
        elif tensor.device != first.device:
            refuse(path, module, f"expected {name} on {first.device}, as in {stacks[0].path}, got {tensor.device}")
        elif tensor.is_floating_point() and tensor.dtype != first.dtype:
            refuse(path, module, f"expected {name} of {first.dtype}, as in {stacks[0].path}, got {tensor.dtype}")


def _settings(layer: PlainLayer) -> dict[str, Any]:
    """What experts of one block, and all gates, have in common besides their make-up."""
    found: dict[str, Any] = {"training": layer.training}
    for role, module in layer.modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{role}.{name}.requires_grad"] = parameter.requires_grad
        if isinstance(module, nn.LayerNorm):
            found[f"{role}.eps"] = module.eps
        if isinstance(module, nn.BatchNorm1d):
            tracked = module.num_batches_tracked
            assert tracked is not None
            for name in ("eps", "momentum", "training", "track_running_stats"):
                found[f"{role}.{name}"] = getattr(module, name)
            found[f"{role}.num_batches_tracked"] = 0 if tracked.is_meta else int(tracked)
    return found


def _mlp_spec(layers: list[PlainLayer]) -> MLPSpec:
    units, activation, norm, position, bias, dropout = zip(*(layer.spec for layer in layers), strict=True)
    return MLPSpec(units, activation, norm=norm, norm_position=position, bias=bias, dropout=dropout)


def _gate_spec(gates: list[PlainStack], gate_input: Literal["previous", "with_shared", "raw"]) -> GateSpec:
    """The one make-up of all gates of a level."""
    if not gates:
        return GateSpec(input=gate_input)
    first = gates[0]
    for stack in gates[1:]:
        _check_like(stack, first)
    hidden, last = [layer.spec for layer in first.layers[:-1]], first.layers[-1]
    return GateSpec(
        tuple(spec.units for spec in hidden),
        tuple(spec.activation for spec in hidden),
        tuple(spec.norm for spec in hidden),
        tuple(spec.dropout for spec in hidden),
        bias=last.linear.bias is not None,
        logits_norm=None if last.norm is None else "batch",
        temperature=first.temperature,
        top_k=first.top_k,
        input=gate_input,
    )


def _check_like(stack: PlainStack, first: PlainStack) -> None:
    """A gate is made like the first one: the gates of a level share their parameters' tensors."""

    def differs(where: str, what: str, expected: Any, got: Any) -> None:
        if expected != got:
            raise ValueError(
                f"{where}: expected {what}={expected}, as in {first.path}, because the gates of a level are made "
                f"alike; got {got}"
            )

    differs(stack.path, "number of Linear layers", len(first.layers), len(stack.layers))
    differs(stack.path, "temperature", first.temperature, stack.temperature)
    differs(stack.path, "top_k", first.top_k, stack.top_k)
    for i, (layer, own) in enumerate(zip(stack.layers, first.layers, strict=True)):
        differs(layer.path, "in_features", own.linear.in_features, layer.linear.in_features)
        is_last = i == len(first.layers) - 1
        for name, expected, got in zip(own.spec._fields, own.spec, layer.spec, strict=True):
            if not (is_last and name == "units"):
                differs(layer.path, name, expected, got)
        expected_settings, settings = _settings(own), _settings(layer)
        for name in {**expected_settings, **settings}:  # a weight that is a buffer has no requires_grad
            differs(layer.path, name, expected_settings.get(name), settings.get(name))


def _placed(level: ExtractionNetwork, experts: list[PlainStack], gates: list[PlainStack]) -> Iterator[Placed]:
    """Every ordinary layer, with its place."""
    for block in level.blocks:
        assert isinstance(block, ExpertBlock)
        start, stop = block.experts
        for e in range(start, stop):
            yield from _rows(block.layers, e - start, experts[e].layers)
    topology, gate = level.topology, level.gate
    assert isinstance(gate, Gate)
    for row, o in enumerate(topology.gated_mixtures):
        yield from _rows(gate.layers, row, gates[o].layers[:-1])
        first = topology.logit_offset[o]
        rows = slice(first, first + len(topology.mixture_experts[o]))
        yield Placed(gates[o].layers[-1], gate, [*gate_moves(gate, rows)])


def _rows(stacked: nn.ModuleList, row: int, layers: list[PlainLayer]) -> Iterator[Placed]:
    for layer, plain in zip(stacked, layers, strict=True):
        assert isinstance(layer, StackedLayer)
        yield Placed(plain, layer, [*layer_moves(layer, row)])


def _fill(made: Packed) -> None:
    """Modes, settings of norms, and every tensor."""
    for placed in made.layers:
        plain, modules = placed.plain, placed.plain.modules
        placed.stacked.training = plain.training
        if plain.activation is not None and placed.holder("activation") is not placed.stacked:
            placed.holder("activation").training = plain.activation.training
        _fill_norm(placed.holder("norm"), plain.norm)
        _fill_norm(placed.holder("dice_norm"), plain.dice_norm)
        for move in placed.moves:
            _copy(modules, placed.stacked, move)
    level, gate = made.level, made.level.gate
    if gate.offset is None:
        return
    gate.offset.zero_()  # where the gates bring none
    if len({own.weight.requires_grad for own in made.offsets.values()}) > 1:
        raise ValueError("gates: expected requires_grad of all WeightOffset to agree: a level has one such parameter")
    for o, own in made.offsets.items():
        offset = offset_move(level, o)
        assert offset is not None
        _copy({"offset": own}, gate, offset)


def _fill_norm(norm: Any, plain: nn.BatchNorm1d | nn.LayerNorm | None) -> None:
    """The settings of a norm."""
    if plain is not None:
        norm.eps, norm.training = float(plain.eps), plain.training  # NumPy's is none that an operator takes
        if isinstance(plain, nn.BatchNorm1d):
            norm.momentum = None if plain.momentum is None else float(plain.momentum)
            norm.track_running_stats = plain.track_running_stats


def _copy(modules: Mapping[str, nn.Module], stacked: nn.Module, move: Move[str]) -> None:
    """Write one tensor of the modules, which are by role, to its place."""
    role, _, name = move.old.partition(".")
    source, whole = getattr(modules[role], name), tensor_named(stacked, move.new)
    whole.detach()[move.new_place].copy_(source)
    if isinstance(whole, nn.Parameter):
        whole.requires_grad_(source.requires_grad)
