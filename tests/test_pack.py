"""pack and unpack: levels out of ordinary modules and back, held to those modules run one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology, pack
from ple_fast.convert import Dice, Temperature, TopK, WeightOffset
from ple_fast.reference import ExtractionNetworkReference, correspondence
from tests.documents import run_document
from tests.helpers import (
    EXPERTS,
    GATES,
    TOPOLOGIES,
    assert_close,
    assert_covers_all,
    draw,
    has_dropout,
    level,
    randomise,
    results,
    run,
)

PLE_LEVEL = TOPOLOGIES["ple"]
LAST_LEVEL = Topology.ple(2, 1, 1, last=True)
FEW = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])


def _plain(
    topology: Topology, experts: Any, gate: GateSpec, *, in_features: int = 7, dtype: torch.dtype = torch.float64
) -> ExtractionNetworkReference:
    """Ordinary modules with randomised weights, in the reference, which runs them by the paper's formula."""
    plain = ExtractionNetworkReference(in_features, topology, experts, gate).to(dtype)
    randomise(plain)
    return plain


def _gates(plain: ExtractionNetworkReference) -> list[nn.Module | None]:
    """The gates of ``plain`` as ``pack`` takes them: with temperature and offsets, which the reference holds apart."""
    topology = plain.topology
    gates: list[nn.Module | None] = []
    assert topology.mixture_offset is not None
    start = 0
    for o, (gate, marks) in enumerate(zip(plain.gates, topology.mixture_offset, strict=True)):
        modules = [gate] if o in topology.gated_mixtures else []
        if modules and plain.gate_spec.temperature != 1:
            modules.append(Temperature(plain.gate_spec.temperature))
        if modules and plain.gate_spec.top_k is not None:
            modules.append(TopK(plain.gate_spec.top_k))
        if any(marks):
            if modules:
                assert topology.mixture_kind is not None
                modules.append(nn.Sigmoid() if topology.mixture_kind[o] == "sigmoid" else nn.Softmax(dim=-1))
            assert plain.offset is not None
            offset = WeightOffset(marks, dtype=torch.float64)
            offset.weight.data.copy_(plain.offset[start : start + sum(marks)])
            offset.weight.requires_grad_(plain.offset.requires_grad)
            modules.append(offset)
        start += sum(marks)
        gates.append(nn.Sequential(*modules) if modules else None)
    return gates


def _hold(
    packed: ExtractionNetwork, plain: ExtractionNetworkReference, *, form: str = "stacked", batch: int = 9
) -> None:
    """Output, weights, every gradient and every buffer of ``packed`` are those of the ordinary modules."""
    slots = plain.topology.num_slots
    assert slots is not None
    pairs = list(correspondence(packed, plain))
    assert_covers_all(packed, pairs)
    for pair in pairs:
        assert pair.fused.requires_grad == pair.reference.requires_grad, pair.name
        assert torch.equal(pair.fused[pair.part], pair.reference), pair.name
    leaves = draw(form, batch, slots, packed.in_features)
    ours, theirs = (run(module, leaves, form=form, slots=slots) for module in (packed, plain))
    for name, a, b in results(packed, ours, plain, theirs):
        assert_close(name, a, b, 1e-10)


def _check(topology: Topology, experts: Any, gate: GateSpec, *, train: bool) -> None:
    plain = _plain(topology, experts, gate).train(train and not has_dropout(experts, gate))
    packed = pack(plain.experts, _gates(plain), topology, gate_input=gate.input)
    assert packed.training == plain.training
    _hold(packed, plain)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, train: bool) -> None:
    _check(PLE_LEVEL, EXPERTS[name], GATES["plain"], train=train)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_gates(name: str, train: bool) -> None:
    _check(TOPOLOGIES["mixed-kinds"], EXPERTS["2-layers"], GATES[name], train=train)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies(name: str) -> None:
    _check(TOPOLOGIES[name], EXPERTS["batch-norm"], GATES["temperature"], train=True)


@FEW
@given(data=st.data())
def test_drawn_levels_and_their_way_back(data: st.DataObject) -> None:
    """Specs that change between experts, parameters frozen anywhere, norms in modes and settings of their own."""
    topology = TOPOLOGIES[data.draw(st.sampled_from(sorted(TOPOLOGIES)))]
    names = [name for name, spec in EXPERTS.items() if spec.units[-1] == 4]
    few = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
    experts = [EXPERTS[data.draw(st.sampled_from(few))] for _ in range(topology.num_experts)]
    gate = GATES[data.draw(st.sampled_from(sorted(GATES)))]
    train = data.draw(st.booleans()) and not has_dropout(experts, gate)
    plain = _plain(topology, experts, gate).train(train)
    for expert in plain.experts:
        if data.draw(st.booleans()):
            parameter = data.draw(st.sampled_from(list(expert.parameters())))
            parameter.requires_grad_(False)
        for module in expert.modules():
            if isinstance(module, nn.BatchNorm1d) and data.draw(st.booleans()):
                module.train(data.draw(st.booleans()))
                module.eps = data.draw(st.sampled_from([1e-5, 1e-3])) if module.affine else module.eps
                module.momentum = data.draw(st.sampled_from([0.1, 0.4, None]))
                assert module.num_batches_tracked is not None
                module.num_batches_tracked.fill_(data.draw(st.integers(0, 2)))
    if data.draw(st.booleans()):
        plain.gates.requires_grad_(False)
        if plain.offset is not None:
            plain.offset.requires_grad_(False)
    packed = pack(plain.experts, _gates(plain), topology, gate_input=gate.input)
    before = copy.deepcopy(packed)
    _hold(packed, plain)
    again = pack(*before.unpack(), topology, gate_input=gate.input)
    _assert_same(again, before)


def _flags(module: nn.Module) -> dict[str, Any]:
    flags: dict[str, Any] = {f"{name}.training": m.training for name, m in module.named_modules()}
    for name, m in module.named_modules():
        flags |= {f"{name}.{key}": getattr(m, key) for key in ("eps", "momentum") if hasattr(m, key)}
    return flags | {f"{name}.requires_grad": p.requires_grad for name, p in module.named_parameters()}


def _assert_same(a: nn.Module, b: nn.Module) -> None:
    """Equal state, settings, modes, and no memory in common."""
    state, other = a.state_dict(), b.state_dict()
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
        assert tensor.data_ptr() != other[name].data_ptr(), f"{name}: a view, not a copy"
        assert tensor.is_contiguous(), name
    assert _flags(a) == _flags(b)


@pytest.mark.parametrize("gate", ["plain", "everything", "two-hidden"])
@pytest.mark.parametrize("name", ["ple", "mixed-kinds", "adatt", "static-offsets", "hard-sharing", "unordered"])
def test_packing_what_unpack_gives_is_the_same_level(name: str, gate: str) -> None:
    topology = TOPOLOGIES[name]
    specs = [
        EXPERTS[key] for key in ("per-layer", "batch-norm-after", "prelu-norms", "dice", "row-dice", "dropout-in-eval")
    ]
    original = level(topology, [specs[e // 2 % 5] for e in range(topology.num_experts)], GATES[gate])
    original.eval()
    experts, gates = original.unpack()
    again = pack(experts, gates, topology)
    _assert_same(again, original)
    assert again.expert_specs == original.expert_specs
    assert again.gate_spec == original.gate_spec or not topology.gated_mixtures
    for stack, other in zip([*experts, *gates], [*again.unpack()[0], *again.unpack()[1]], strict=True):
        assert (stack is None) == (other is None)
        if stack is not None and other is not None:
            assert repr(stack) == repr(other)
            _assert_same(stack, other)


def _by_hand(experts: Any, gates: Any, topology: Topology, x: Tensor) -> Tensor:
    """Equations 2 to 4 with any modules, one after the other."""
    slots = x.unbind(1)
    hidden = [expert(slots[s]) for expert, s in zip(experts, topology.expert_slot, strict=True)]
    mixtures = []
    for gate, slot, mixed in zip(gates, topology.mixture_slot, topology.mixture_experts, strict=True):
        ends_in_weights = gate is not None and isinstance(gate[-1], WeightOffset)
        if gate is None or (len(gate) == 1 and ends_in_weights):
            weights = x.new_ones(x.shape[0], len(mixed))
            weights = weights if gate is None else gate(weights)
        else:
            weights = gate(slots[slot]) if ends_in_weights else gate(slots[slot]).softmax(1)
        mixtures.append(sum(weights[:, i, None] * hidden[e] for i, e in enumerate(mixed)))
    return torch.stack([torch.as_tensor(y) for y in mixtures], 1)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["ple", "adatt", "static-offsets", "unordered", "mixed-kinds"])
def test_unpacked_modules_compute_what_the_level_computes(name: str, train: bool) -> None:
    topology = TOPOLOGIES[name]
    for spec in ("per-layer", "prelu-norms", "gelu-tanh", "negative-leaky", "batch-norm-after"):
        original = level(topology, EXPERTS[spec], GATES["everything"]).train(train)
        (x,) = draw("stacked", 9, topology.num_slots or 0, original.in_features)
        experts, gates = original.unpack()
        y = original(x)
        assert_close(spec, _by_hand(experts, gates, topology, x), y, 1e-10)
        moved, statistics = pack(experts, gates, topology).state_dict(), original.state_dict()
        for key in statistics:
            assert_close(key, moved[key], statistics[key], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_carried_over_bit_for_bit(dtype: torch.dtype) -> None:
    original = level(PLE_LEVEL, EXPERTS["per-layer"], GATES["everything"], dtype=dtype)
    again = pack(*original.unpack(), PLE_LEVEL)
    _assert_same(again, original)
    x = torch.randn(6, 7).to(dtype)
    assert torch.equal(again(x), original(x))


def test_the_device_is_carried_over() -> None:
    original = ExtractionNetwork(5, LAST_LEVEL, experts=EXPERTS["per-layer"], gate=GATES["everything"], device="meta")
    again = pack(*original.unpack(), LAST_LEVEL)
    assert all(t.is_meta for t in again.state_dict().values())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}


def test_packing_draws_nothing_and_shares_nothing() -> None:
    plain = _plain(PLE_LEVEL, EXPERTS["per-layer"], GATES["everything"])
    gates = _gates(plain)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in plain.state_dict().items()}
    packed = pack(plain.experts, gates, PLE_LEVEL)
    packed.unpack()
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        for tensor in packed.state_dict().values():
            tensor.zero_()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def _blocks(packed: ExtractionNetwork) -> list[tuple[int, int]]:
    blocks: Any = packed.blocks
    return [block.experts for block in blocks]


def test_a_frozen_expert_is_a_block_of_its_own() -> None:
    plain = _plain(PLE_LEVEL, EXPERTS["batch-norm"], GATES["plain"])
    assert _blocks(pack(plain.experts, _gates(plain), PLE_LEVEL)) == [(0, 8)]
    for name, parameter in plain.experts[3].named_parameters():
        parameter.requires_grad_("0.weight" not in name)
    for expert in (plain.experts[6], plain.experts[7]):
        expert.requires_grad_(False)
    packed = pack(plain.experts, _gates(plain), PLE_LEVEL)
    assert _blocks(packed) == [(0, 3), (3, 4), (4, 6), (6, 8)]
    _hold(packed, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: setattr(norm, "eps", 1e-3),
        lambda norm: setattr(norm, "momentum", 0.5),
        lambda norm: setattr(norm, "momentum", None),
        lambda norm: norm.eval(),
        lambda norm: norm.num_batches_tracked.add_(1),
    ],
    ids=["eps", "momentum", "no momentum", "eval", "num_batches_tracked"],
)
def test_a_norm_with_settings_of_its_own_is_a_block_of_its_own(change: Callable[[Any], Any]) -> None:
    plain = _plain(PLE_LEVEL, EXPERTS["batch-norm"], GATES["plain"])
    expert: Any = plain.experts[1]
    change(expert[0].norm)
    packed = pack(plain.experts, _gates(plain), PLE_LEVEL)
    assert _blocks(packed) == [(0, 1), (1, 2), (2, 8)]
    _hold(packed, plain)


def test_dropout_in_train_mode_keeps_its_mode_and_rate() -> None:
    def expert() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 64), nn.Identity(), nn.Dropout(0.5))

    with torch.no_grad():
        experts = [expert() for _ in range(3)]
        for own in experts:
            nn.init.zeros_(own.get_parameter("0.weight"))
            nn.init.ones_(own.get_parameter("0.bias"))
    experts[1].eval()
    topology = Topology.single_task(3)
    packed = pack(experts, [None] * 3, topology)
    assert packed.training and _blocks(packed) == [(0, 1), (1, 2), (2, 3)]
    y = packed(torch.randn(200, 3))
    assert set(y[:, 0].flatten().tolist()) == {0.0, 2.0}
    assert set(y[:, 1].flatten().tolist()) == {1.0}
    assert abs(y[:, 2].mean().item() - 1) < 0.05


def _linear(a: int, b: int, **kwargs: Any) -> nn.Linear:
    return nn.Linear(a, b, dtype=torch.float64, **kwargs)


def test_any_nesting_is_run_in_order() -> None:
    relu = nn.ReLU(inplace=True)  # one module without state may stand at many places

    class Block(nn.Sequential):
        """A Sequential by another name."""

    a, b, c = ([_linear(5, 6), _linear(6, 4)] for _ in range(3))
    stacks = [
        nn.Sequential(a[0], relu, a[1], relu),
        nn.ModuleList([nn.Sequential(b[0], nn.Identity()), nn.ModuleList([relu]), Block(nn.Dropout(0.0), b[1]), relu]),
        [nn.ModuleDict({"linear": c[0], "act": relu}), [c[1], (relu,)]],
    ]
    gates = [nn.Sequential(_linear(5, 2), nn.Softmax(dim=1), nn.Dropout(0.0)), _linear(5, 2)]
    packed = pack(stacks, gates, LAST_LEVEL)
    assert len(packed.blocks) == 1
    x = torch.randn(9, 3, 5, dtype=torch.float64)
    flat = [nn.Sequential(p, nn.ReLU(), q, nn.ReLU()) for p, q in (a, b, c)]
    logits = [nn.Sequential(gates[0].get_submodule("0")), nn.Sequential(gates[1])]
    assert_close("y", packed(x), _by_hand(flat, logits, LAST_LEVEL, x), 1e-12)


def test_an_identity_tells_nothing_where_an_activation_follows() -> None:
    experts = [nn.Sequential(_linear(5, 4), nn.Identity(), nn.BatchNorm1d(4).double(), nn.ReLU()) for _ in range(3)]
    gates = [nn.Sequential(_linear(5, 2)) for _ in range(2)]
    packed = pack(experts, gates, LAST_LEVEL)
    assert packed.expert_specs[0].norm_position == ("before",)
    x = torch.randn(9, 3, 5, dtype=torch.float64)
    assert_close("y", packed(x), _by_hand(experts, gates, LAST_LEVEL, x), 1e-12)


def test_a_norm_after_no_activation_keeps_its_place() -> None:
    spec = MLPSpec((4,), "identity", norm="batch", norm_position="after")
    original = level(LAST_LEVEL, spec)
    again = pack(*original.unpack(), LAST_LEVEL)
    assert again.expert_specs == original.expert_specs


def test_the_mode_of_each_dropout_is_its_own() -> None:
    topology = Topology.single_task(2)
    experts = [nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 4), nn.Dropout(0.5)) for _ in range(2)]
    for own in experts:
        own.get_submodule("1").eval()
    packed = pack(experts, [None, None], topology)
    modes = [packed.get_submodule(f"blocks.0.layers.{i}").training for i in range(2)]
    assert modes == [False, True]
    back = packed.unpack()[0][1]
    assert [back.get_submodule(str(i)).training for i in (1, 3)] == [False, True]


def test_offsets_start_at_zero_where_the_gates_bring_none() -> None:
    topology = TOPOLOGIES["adatt"]
    packed = pack([_linear(5, 4) for _ in range(4)], [_linear(5, 4) for _ in range(2)], topology)
    assert packed.gate.offset is not None
    assert packed.gate.offset.shape == (4,) and not packed.gate.offset.any()


def test_gates_that_read_another_input() -> None:
    experts = [nn.Sequential(_linear(5, 4), nn.Tanh()) for _ in range(3)]
    packed = pack(experts, [_linear(3, 2), _linear(3, 2)], LAST_LEVEL)
    assert packed.gate_spec.input == "raw" and packed.gate_features == 3
    assert pack(experts, [_linear(5, 2), _linear(5, 2)], LAST_LEVEL).gate_spec.input == "previous"
    raw = pack(experts, [_linear(5, 2), _linear(5, 2)], LAST_LEVEL, gate_input="raw")
    assert raw.gate_spec.input == "raw"
    with pytest.raises(ValueError, match=r"gate_input.*raw.*3.*5"):
        pack(experts, [_linear(3, 2), _linear(3, 2)], LAST_LEVEL, gate_input="previous")
    with pytest.raises(ValueError, match=r"gate_input.*raw.*3.*5"):
        pack(experts, [_linear(3, 2), _linear(3, 2)], LAST_LEVEL, gate_input="with_shared")
    with pytest.raises(ValueError, match=r"gate_input.*sideways"):
        pack(experts, [_linear(5, 2), _linear(5, 2)], LAST_LEVEL, gate_input="sideways")  # type: ignore[arg-type]  # that is the test


def test_packed_levels_are_a_trunk() -> None:
    original = PLE(5, 2, expert_units=(6, 4), norm="batch", activation="prelu").double()
    randomise(original)
    levels: Any = original.levels
    packed = []
    for own in levels:
        experts, gates = own.unpack()
        packed.append(pack(experts, gates, own.topology))
    again = PLE.from_levels(packed)
    _assert_same(again, original)
    x = torch.randn(8, 5, dtype=torch.float64)
    assert torch.equal(again(x), original(x))


def test_a_trained_level_goes_back_with_its_training() -> None:
    original = level(PLE_LEVEL, EXPERTS["batch-norm"])
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    (x,) = draw("stacked", 9, 4, 7)
    for _ in range(3):
        optimizer.zero_grad()
        original(x).square().sum().backward()
        optimizer.step()
    experts, gates = original.unpack()
    norm = experts[0][1]
    assert isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked == 3
    assert all(p.grad is None for e in experts for p in e.parameters())
    original.eval()
    for stack in [*experts, *gates]:
        if stack is not None:
            stack.eval()
    assert_close("y", _by_hand(experts, gates, PLE_LEVEL, x), original(x), 1e-12)


def test_unpack_names_what_it_cannot_give_back() -> None:
    original = level(PLE_LEVEL, EXPERTS["batch-norm"])
    parametrizations.weight_norm(original.get_submodule("blocks.0.layers.1"))
    with pytest.raises(ValueError, match=r"blocks\.0\.layers\.1.*remove_parametrizations"):
        original.unpack()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(level(PLE_LEVEL, EXPERTS["batch-norm"]))
    with pytest.raises(TypeError, match=r"blocks\.0\.layers\.0\.norm.*SyncBatchNorm"):
        synced.unpack()


class FuxiDice(nn.Module):
    """Dice as other libraries write it: attributes ``bn`` and ``alpha``, and settings of their own."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(units, affine=False, eps=1e-9, momentum=0.01)
        self.alpha = nn.Parameter(torch.randn(units))

    def forward(self, x: Tensor) -> Tensor:
        p: Tensor = self.bn(x).sigmoid()
        return p * x + self.alpha * (1 - p) * x


FuxiDice.__name__ = "Dice"


class OtherDice(FuxiDice):
    """The same attributes, another formula."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.alpha


OtherDice.__name__ = "Dice"


@pytest.mark.parametrize("train", [True, False])
def test_the_dice_of_another_library(train: bool) -> None:
    experts = [nn.Sequential(nn.Linear(5, 4), FuxiDice(4)).double().train(train) for _ in range(3)]
    gates = [nn.Sequential(_linear(5, 2)).train(train) for _ in range(2)]
    packed = pack(experts, gates, LAST_LEVEL)
    x = torch.randn(9, 3, 5, dtype=torch.float64)
    assert_close("y", packed(x), _by_hand(experts, gates, LAST_LEVEL, x), 1e-12)
    back = packed.unpack()[0][1]
    assert isinstance(back[1], Dice)
    for name, tensor in experts[1].state_dict().items():
        assert_close(name, back.state_dict()[name], tensor, 1e-12)
    assert (back[1].bn.eps, back[1].bn.momentum) == (1e-9, 0.01)


def test_the_snippets_of_the_document_run() -> None:
    """Every snippet of docs/pack.md, one after the other; the comments tell the truth."""
    scope, lines = run_document("docs/pack.md")
    assert lines[0] == "((0, 2), (1, 2), (0, 1, 2))"
    assert lines[1].startswith("experts[0].1: Softplus: cannot be packed; pack takes Linear, BatchNorm1d, ")
    assert scope["y"].shape == (64, 2, 16)
    assert pack(scope["experts"], scope["gates"], scope["shared_first"]).topology.mixture_experts[0] == (2, 0)


def test_statistics_that_stand_still_do_so_in_a_packed_level_and_after_unpack() -> None:
    from ple_fast.convert import Dice

    experts = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Dice(4)) for _ in range(3)]
    for norm in (experts[1][1], experts[1][2].bn):
        norm.track_running_stats = False  # type: ignore[union-attr]  # of both
    gates = [nn.Linear(5, 3)]
    level = pack(experts, gates, Topology.mmoe(1, 3))
    level(torch.randn(6, 5))
    back, _ = level.unpack()
    for e, expert in enumerate(back):
        for norm in (expert[1], expert[2].bn):
            assert isinstance(norm, nn.BatchNorm1d)
            assert norm.track_running_stats == (e != 1)
            assert norm.running_mean is not None
            assert (not norm.running_mean.any()) == (e == 1)
