"""Every architecture against the formula of its paper, written out in plain PyTorch, once more and not by topology."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ple_fast import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    AsymmetricSharing,
    CrossStitch,
    CustomizedSharing,
    GateSpec,
    HardSharing,
    MLMMoE,
    MLPSpec,
    MMoE,
    SingleTask,
    Topology,
    last_backend,
    pack,
    use_backend,
)
from ple_fast.backend import BackendName
from ple_fast.model.trunks import TRUNKS
from ple_fast.modules.stack import Stack
from tests.conftest import HAS_TRITON
from tests.documents import ROOT, run_document
from tests.helpers import assert_close, compare, distance, draw, level, randomise

D, T = 7, 3
SOURCES = ((0,), (2, 1), (0, 1, 2))
State = dict[str, Tensor]
Slots = Sequence[Tensor]


def mlp(p: State, prefix: str, row: int, x: Tensor) -> Tensor:
    """MLP ``row`` of stacked layers, relu behind every one."""
    i = 0
    while f"{prefix}.layers.{i}.weight" in p:
        x = torch.relu(F.linear(x, p[f"{prefix}.layers.{i}.weight"][row], p[f"{prefix}.layers.{i}.bias"][row]))
        i += 1
    return x


def expert(p: State, number: int, e: int, x: Tensor) -> Tensor:
    """Expert ``e`` of level ``number``."""
    return mlp(p, f"levels.{number}.blocks.0", e, x)


def gate(p: State, number: int, o: int, counts: Sequence[int], x: Tensor) -> Tensor:
    """Softmax weights ``(B, counts[o])`` of gate ``o`` of a level whose gates have ``counts`` logits."""
    name = f"levels.{number}.gate"
    rows = slice(sum(counts[:o]), sum(counts[: o + 1]))
    return F.linear(mlp(p, name, o, x), p[f"{name}.weight"][rows], p[f"{name}.bias"][rows]).softmax(1)


def weighted(weights: Tensor, outputs: Slots) -> Tensor:
    return sum((w[:, None] * h for w, h in zip(weights.unbind(1), outputs, strict=True)), torch.zeros(()))


def hard_sharing(p: State, x: Slots) -> list[Tensor]:
    """Every task gets what the one bottom gives."""
    return [expert(p, 0, 0, x[0])] * T


def single_task(p: State, x: Slots) -> list[Tensor]:
    """A network per task."""
    return [expert(p, 0, k, x[0]) for k in range(T)]


def customized_sharing(p: State, x: Slots) -> list[Tensor]:
    """Concatenation of the task's own bottom and the shared one."""
    return [torch.cat([expert(p, 0, k, x[0]), expert(p, 0, T, x[0])], 1) for k in range(T)]


def asymmetric_sharing(p: State, x: Slots) -> list[Tensor]:
    """Sum pooling of the bottoms that the task reads."""
    h = single_task(p, x)
    return [h[0], h[1] + h[2], h[0] + h[1] + h[2]]


def cross_stitch(p: State, x: Slots) -> list[Tensor]:
    """Misra et al., eq. 1: ``x_k = sum_t a_kt h_t`` behind every level; here ``a = 1 + offset``."""
    for number in range(2):
        a = 1 + p[f"levels.{number}.gate.offset"].reshape(T, T)
        h = torch.stack([expert(p, number, k, x[k]) for k in range(T)])
        x = torch.einsum("kt,tbh->kbh", a, h).unbind(0)
    return list(x)


def mmoe(p: State, x: Slots) -> list[Tensor]:
    """Ma et al., eq. 6 and 7."""
    h = [expert(p, 0, e, x[0]) for e in range(4)]
    return [weighted(gate(p, 0, k, [4] * T, x[0]), h) for k in range(T)]


def ml_mmoe(p: State, x: Slots) -> list[Tensor]:
    """Higher experts take gated lower ones; the gates of all levels read the input."""
    raw, inputs = x[0], list(x) * 4
    for number, outputs in enumerate([4, 4, T]):
        h = [expert(p, number, e, inputs[e]) for e in range(4)]
        inputs = [weighted(gate(p, number, o, [4] * outputs, raw), h) for o in range(outputs)]
    return inputs


def cgc(own: int, shared: int, scope: str | None) -> Callable[[State, Slots], list[Tensor]]:
    """PLE paper, eq. 2-4; with a scope, the shared mixture of an inner level too (eq. 5-7)."""

    def formula(p: State, x: Slots) -> list[Tensor]:
        mine = [[expert(p, 0, k * own + i, x[k]) for i in range(own)] for k in range(T)]
        common = [expert(p, 0, T * own + i, x[T]) for i in range(shared)]
        every = [*(h for row in mine for h in row), *common]
        last = {None: [], "all": every, "shared": common}[scope]
        counts = [own + shared] * T + [len(last)] * bool(last)
        y = [weighted(gate(p, 0, k, counts, x[k]), [*mine[k], *common]) for k in range(T)]
        return [*y, weighted(gate(p, 0, T, counts, x[T]), last)] if last else y

    return formula


def stem(counts: Sequence[int], shared: int, levels: int) -> Callable[[State, Slots], list[Tensor]]:
    """All experts forward, and of the other tasks' no gradient; gates read their slot plus the shared one."""
    units = [*counts, shared]

    def formula(p: State, x: Slots) -> list[Tensor]:
        for number in range(levels):
            h = [[expert(p, number, sum(units[:u]) + i, x[u]) for i in range(n)] for u, n in enumerate(units)]
            present = T if number == levels - 1 else T + 1
            y = []
            for u in range(present):
                read = [[out if v in (u, T) or u == T else out.detach() for out in row] for v, row in enumerate(h)]
                selector = x[T] if u == T else x[u] + x[T]
                weights = gate(p, number, u, [sum(units)] * present, selector)
                y.append(weighted(weights, [out for row in read for out in row]))
            x = y
        return list(x)

    return formula


def adatt(counts: Sequence[int], shared: int) -> Callable[[State, Slots], list[Tensor]]:
    """Gates see all experts, and each unit adds a linear combination of its own: learned, or, of one expert, itself."""
    units = [*counts, shared] if shared else list(counts)
    total = sum(units)

    def formula(p: State, x: Slots) -> list[Tensor]:
        for number in range(2):
            h = [[expert(p, number, sum(units[:u]) + i, x[u]) for i in range(n)] for u, n in enumerate(units)]
            every = [output for row in h for output in row]
            present = units if number == 0 else units[:T]  # the last level has no shared output
            y = []
            for u, n in enumerate(present):
                fused = weighted(gate(p, number, u, [total] * len(present), x[u]), every)
                if set(units) == {1}:
                    residual = h[u][0]
                else:
                    v = p[f"levels.{number}.gate.offset"][sum(units[:u]) : sum(units[:u]) + n]
                    residual = torch.einsum("e,ebh->bh", v, torch.stack(h[u]))
                y.append(fused + residual)
            x = y
        return list(x)

    return formula


@dataclass(frozen=True)
class Case:
    """A trunk, the formula of its paper, and the slots of its input."""

    build: Callable[..., Stack]
    formula: Callable[[State, Slots], list[Tensor]]
    slots: int = 1
    gate_units: bool = True


def _options(trunk: Callable[..., Stack], **options: Any) -> Callable[..., Stack]:
    return lambda **kw: trunk(D, T, **{"expert_units": (6, 4), **options, **kw})


CASES: dict[str, Case] = {
    "hard sharing": Case(_options(HardSharing), hard_sharing, gate_units=False),
    "single task": Case(_options(SingleTask), single_task, gate_units=False),
    "customized sharing": Case(_options(CustomizedSharing), customized_sharing, gate_units=False),
    "asymmetric sharing": Case(_options(AsymmetricSharing, sources=SOURCES), asymmetric_sharing, gate_units=False),
    "cross-stitch": Case(_options(CrossStitch, expert_units=[(6,), (4,)]), cross_stitch, slots=T, gate_units=False),
    "MMoE": Case(_options(MMoE, experts=4), mmoe),
    "ML-MMoE": Case(_options(MLMMoE, num_levels=3, experts=4, expert_units=[(6, 4), (5,), (4,)]), ml_mmoe),
    "CGC": Case(_options(CGC, shared_experts=1), cgc(2, 1, None), slots=T + 1),
    "CGC, inner": Case(_options(CGC, task_experts=1, last_shared=True), cgc(1, 2, "all"), slots=T + 1),
    "CGC, inner, shared scope": Case(
        _options(CGC, last_shared=True, shared_gate_scope="shared"), cgc(2, 2, "shared"), slots=T + 1
    ),
    "AdaTT-sp": Case(_options(AdaTT, task_experts=[2, 1, 3]), adatt([2, 1, 3], 0), slots=T),
    "AdaTT-sp, one expert each": Case(_options(AdaTT, task_experts=1), adatt([1, 1, 1], 0), slots=T),
    "AdaTT-general": Case(_options(AdaTT, shared_experts=2), adatt([2, 2, 2], 2), slots=T + 1),
    "AdaTT-general, one task expert": Case(
        _options(AdaTT, task_experts=1, shared_experts=2), adatt([1, 1, 1], 2), slots=T + 1
    ),
    "AdaTT-general, one expert each": Case(
        _options(AdaTT, task_experts=1, shared_experts=1), adatt([1, 1, 1], 1), slots=T + 1
    ),
    "STEM": Case(_options(STEM, task_experts=[2, 1, 3], shared_experts=2), stem([2, 1, 3], 2, 1), slots=T + 1),
    "STEM in levels": Case(_options(STEM, num_levels=2, shared_experts=1), stem([2, 2, 2], 1, 2), slots=T + 1),
}

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no triton")


def _step(network: Callable[[Tensor], Tensor], parameters: State, x: Tensor) -> dict[str, Tensor | None]:
    """Output, gradient of the input, gradient of every parameter."""
    leaf = x.clone().requires_grad_()
    y = network(leaf)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(cotangent.to(y))
    return {"y": y, "x.grad": leaf.grad, **{f"{name}.grad": p.grad for name, p in parameters.items()}}


def _fused(module: Stack, x: Tensor, backend: BackendName) -> dict[str, Tensor | None]:
    """A step of the trunk itself, on that backend."""
    with use_backend(backend):
        step = _step(module, dict(module.named_parameters()), x)
    choice = last_backend()
    assert choice is not None and choice.name == backend
    return step


def _textbook(case: Case, module: Stack, x: Tensor) -> dict[str, Tensor | None]:
    """A step of the formula, in the dtype of ``x``, with the weights of ``module``."""
    state = {name: t.detach().to(x.dtype, copy=True) for name, t in module.state_dict().items()}
    parameters = {name: state[name].requires_grad_() for name, _ in module.named_parameters()}

    def network(leaf: Tensor) -> Tensor:
        slots = [leaf] * case.slots if leaf.dim() == 2 else list(leaf.unbind(1))
        return torch.stack(case.formula(state, slots), 1)

    return _step(network, parameters, x)


def _module(case: Case, device: torch.device, **options: Any) -> Stack:
    module = case.build(device=device, **{"dtype": torch.float64, **options})
    randomise(module)
    return module


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", CASES)
def test_a_trunk_equals_the_formula_of_its_paper(name: str, backend: BackendName, device: torch.device) -> None:
    """Output and every gradient, with one input for all slots and with one for each."""
    case = CASES[name]
    hidden: dict[str, Any] = {"gate_units": (5,)} if case.gate_units else {}
    runs = [({}, "one", 5), (hidden, "stacked", 5)]
    if backend == "torch":  # few rows and many take different ways
        runs += [({}, "stacked", 130), (hidden, "one", 130)]
    for options, form, batch in runs:
        module = _module(case, device, **options)
        (x,) = (leaf.to(device) for leaf in draw(form, batch, case.slots, D))
        ours = _fused(module, x, backend)
        theirs = _textbook(case, module, x)
        assert ours.keys() == theirs.keys()
        for quantity, expected in theirs.items():
            assert expected is not None, f"{quantity}: the formula does not use it"
            assert_close(quantity, ours[quantity], expected, 1e-11)


@pytest.mark.parametrize(
    ("backend", "batch"), [("torch", 9), ("torch", 130), pytest.param("triton", 9, marks=needs_triton)]
)
@pytest.mark.parametrize("name", CASES)
def test_a_trunk_in_float32_is_as_near_as_its_formula(
    name: str, backend: BackendName, batch: int, device: torch.device
) -> None:
    case = CASES[name]
    module = _module(case, device, dtype=torch.float32)
    x = draw("one", batch, 1, D, dtype=torch.float32)[0].to(device)
    ours = _fused(module, x, backend)
    plain, truth = _textbook(case, module, x), _textbook(case, module, x.double())
    for quantity, expected in truth.items():
        a, b = ours[quantity], plain[quantity]
        assert a is not None and b is not None and expected is not None and bool(a.isfinite().all())
        tiny = 4 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
        for own, peer in zip(distance(a, expected), distance(b, expected), strict=True):
            assert own <= 2 * peer + tiny, f"{quantity}: error {own:.3g}, of the formula {peer:.3g}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu", "norm": "layer", "recompute": True},
        {"activation": nn.PReLU, "norm": "batch"},
    ],
)
def test_a_trunk_takes_the_options_of_all_trunks(name: str, options: dict[str, Any]) -> None:
    """Weights of all mixtures, statistics of norms and the rest, against the reference."""
    case = CASES[name]
    compare(_module(case, torch.device("cpu"), **options), draw("stacked", 9, case.slots, D),
            form="stacked", slots=case.slots)  # fmt: skip


@pytest.mark.parametrize("name", ["customized sharing", "ML-MMoE", "STEM in levels", "AdaTT-general, one expert each"])
def test_a_trunk_compiles_and_exports(name: str) -> None:
    """With a view of the output, gates on the raw input, and constants among the weights."""
    module = _module(CASES[name], torch.device("cpu"))
    x = torch.randn(9, D, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters: State = dict(module.named_parameters())
    outcomes = []
    for network in (compiled, module):
        module.zero_grad(set_to_none=True)
        outcomes.append(_step(network, parameters, x))
    for quantity, expected in outcomes[1].items():
        assert_close(quantity, outcomes[0][quantity], expected, 1e-11)
    exported = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert_close("exported", exported.module()(x[:4]), module(x[:4]), 1e-11)


def test_ml_mmoe_of_one_level_is_mmoe() -> None:
    many, one = MLMMoE(D, T, num_levels=1, expert_units=(6, 4)), MMoE(D, T, expert_units=(6, 4))
    one.load_state_dict(many.state_dict())
    x = torch.randn(9, D)
    assert torch.equal(many(x), one(x))


def test_ml_mmoe_takes_its_one_slot_in_every_form() -> None:
    module, x = MLMMoE(D, T, experts=4, expert_units=(6, 4)), torch.randn(9, D)
    for form in ([x], x[:, None]):
        assert_close("y", module(form), module(x), 1e-6)
    for wrong in ([], [x, x], torch.randn(9, 2, D)):
        with pytest.raises(ValueError, match=r"^x: expected"):
            module(wrong)


def test_an_inner_cgc_is_a_level_of_ple() -> None:
    inner, last = CGC(D, T, expert_units=4, last_shared=True), CGC(4, T, expert_units=4)
    ple = PLE(D, T, expert_units=4)
    for own, given in zip(ple.levels, (inner, last), strict=True):
        own.load_state_dict(given.levels[0].state_dict())
    x = torch.randn(9, D)
    assert_close("y", last(inner(x)), ple(x), 1e-6)


@pytest.mark.parametrize("how", ["new", "meta", "module by module"])
def test_scalars_of_adatt_start_within_their_bounds(how: str) -> None:
    """1 / sqrt(native experts) per unit, filled evenly; also where every module is reset, parents first."""
    counts = [400, 100, 25]
    device = "cpu" if how == "new" else "meta"
    module = AdaTT(2, T, task_experts=counts, shared_experts=4, expert_units=1, device=device)
    if how != "new":
        module.to_empty(device="cpu")
    if how == "meta":
        module.reset_parameters()
    elif how == "module by module":
        for child in module.modules():
            reset: Any = getattr(child, "reset_parameters", None)
            if reset is not None:
                reset()
    for number, units in enumerate([[*counts, 4], counts]):
        offset = module.get_parameter(f"levels.{number}.gate.offset").detach()
        assert offset.shape == (sum(units),)
        for n, scalars in zip(units, offset.split(units), strict=True):
            assert scalars.abs().max() <= n**-0.5
            if n > 4:
                assert scalars.max() > 0.8 * n**-0.5 and scalars.min() < -0.8 * n**-0.5
                assert scalars.mean().abs() < 0.5 * n**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [0, 1])
def test_one_native_expert_each_is_added_with_a_constant_1(shared: int, dtype: torch.dtype) -> None:
    """No training moves it, and copies and initialisation keep it."""
    options: dict[str, Any] = {"task_experts": 1, "shared_experts": shared, "expert_units": 4, "dtype": dtype}
    module = AdaTT(D, T, **options, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert not any("offset" in name for name, _ in module.named_parameters())
    module.requires_grad_(True)
    module(torch.randn(9, D, dtype=dtype)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0, weight_decay=0.1).step()
    other = AdaTT(D, T, **options)
    other.load_state_dict(module.state_dict())
    for trunk in (module, other):
        for number, units in enumerate([T + shared, T]):
            assert torch.equal(trunk.get_buffer(f"levels.{number}.gate.offset"), torch.ones(units, dtype=dtype))
    # Some levels may learn their scalars, and others have constants.
    mixed = AdaTT(D, T, task_experts=[[1, 1, 1], [1, 2, 1]], expert_units=4)
    assert [name for name, _ in mixed.named_parameters() if "offset" in name] == ["levels.1.gate.offset"]


def test_levels_of_adatt_and_cross_stitch_unpack_and_pack() -> None:
    x = torch.randn(9, D, dtype=torch.float64)
    for name in ("cross-stitch", "AdaTT-sp", "AdaTT-general, one expert each"):
        first: Any = _module(CASES[name], torch.device("cpu")).levels[0]
        experts, gates = first.unpack()
        again = pack(experts, gates, first.topology)
        assert_close(name, again(x), first(x), 1e-12)
        learned = isinstance(first.gate.offset, nn.Parameter)
        assert again.gate.offset is not None and again.gate.offset.requires_grad == learned


@pytest.mark.parametrize(("tasks", "own", "other"), [(3, 0.9, 0.05), (2, 0.5, 0.5), (4, 1.0, 0.0), (1, 1.0, 0.0)])
def test_cross_stitch_starts_with_weights_that_sum_to_1(tasks: int, own: float, other: float) -> None:
    module = CrossStitch(D, tasks, expert_units=4, own_weight=0.3 if tasks == 1 else own)
    _, gates = module(torch.randn(2, D), return_gates=True)
    expected = torch.full((tasks, tasks), other).fill_diagonal_(own)
    for weights in gates:
        assert_close("weights", torch.stack(weights, 1)[0], expected, 1e-6)
    assert [name for name, _ in module.named_parameters() if ".gate." in name] == [
        "levels.0.gate.offset",
        "levels.1.gate.offset",
    ]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CrossStitch(D, T, own_weight=1.5), ValueError, r"own_weight: expected a weight in \[0, 1\], got 1.5"),
        (lambda: CrossStitch(D, T, own_weight=True), TypeError, "own_weight: expected a number, got True"),
        (lambda: AdaTT(D, T, shared_experts=[1, 0]), ValueError, "some at every level or none at any"),
        (lambda: AdaTT(D, T, num_levels=0), ValueError, "num_levels: expected 1 or more"),
        (lambda: STEM(D, T, shared_experts=0), ValueError, "shared_experts: expected 1 or more"),
        (
            lambda: STEM(D, T, num_levels=2, task_experts=[[1, 1, 1]]),
            ValueError,
            "task_experts: expected one per level",
        ),
        (lambda: MLMMoE(D, T, expert_units=[(4,)]), ValueError, r"expert_units: expected one per level \(2\), got 1"),
        (lambda: MLMMoE(D, T, num_levels=0), ValueError, "num_levels: expected 1 or more"),
        (lambda: CGC(D, T, shared_gate_scope="shared"), ValueError, "shared_gate_scope: only a shared mixture"),
        (lambda: CGC(D, T, shared_experts=0, last_shared=True), ValueError, "last_shared: needs shared experts"),
        (lambda: HardSharing(D, 0), ValueError, "num_tasks: expected 1 or more"),
        (lambda: AsymmetricSharing(D, 2, sources=[(0,)]), ValueError, "sources: expected one tuple of tasks per task"),
    ],
)
def test_a_trunk_that_cannot_be_is_refused(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_level_by_hand_has_offsets_of_0() -> None:
    """The wiring alone brings no start: that is what ``AdaTT`` and ``CrossStitch`` add."""
    topology = Topology.adatt(2, 2, last=True)
    module = level(topology, MLPSpec((4,)), GateSpec())
    module.reset_parameters()
    assert module.gate.offset is not None and not module.gate.offset.any()


def test_the_document_is_true() -> None:
    """Every snippet of docs/architectures.md, one after the other; every trunk of a model is in its table."""
    run_document("docs/architectures.md")
    lines = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if " | `Topology." in line]
    named = {row[2].strip("`"): row[1].strip("`") for row in rows}
    assert named == {name: trunk.__name__ for name, trunk in TRUNKS.items()}
