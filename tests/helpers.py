"""What several tests share: named wirings and specs, inputs in every accepted form, comparison with the reference.

``compare`` holds a fused module to the float64 reference: output, gates, every gradient and every buffer.
``compare_low_precision`` holds it to the error that plain PyTorch makes in the same dtype.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ple_fast import ExtractionNetwork, GateSpec, HoME, MLPSpec, Topology
from ple_fast.reference import ExtractionNetworkReference, Pair, PLEReference, correspondence
from ple_fast.reference_home import HoMEReference
from ple_fast.routes import ROUTES

TOPOLOGIES: dict[str, Topology] = {
    "ple": Topology.ple(3, [2, 1, 3], 2, last=False),
    "ple-last": Topology.ple(3, [2, 1, 3], 2, last=True),
    "ple-even": Topology.ple(2, 2, 2, last=False),
    "no-own-expert": Topology.ple(2, [2, 0], 1, last=False),
    "shared-scope": Topology.ple(2, 2, 2, last=False, shared_gate_scope="shared"),
    "no-shared": Topology.ple(3, [2, 1, 2], 0, last=False),
    "mmoe": Topology.mmoe(3, 4),
    "one-expert": Topology.mmoe(1, 1),
    "one-task": Topology.ple(1, 2, 1, last=False),
    "hard-sharing": Topology.hard_sharing(3),
    "single-task": Topology.single_task(3),
    "customized-sharing": Topology.customized_sharing(2),
    "asymmetric-sharing": Topology.asymmetric_sharing(3, [(0,), (2, 1), (0, 1, 2)]),
    "cross-stitch": Topology.cross_stitch(3),
    "ml-mmoe-inner": Topology.ml_mmoe(3, 4, first=False, last=False),
    "mixed-kinds": Topology(
        (0, 0, 1, 2), (0, 2, 1), ((2, 0, 3), (1, 3), (3, 2, 1, 0)), mixture_kind=("softmax", "static", "softmax")
    ),
    "adatt": Topology.adatt(2, 2, last=True),
    "adatt-general": Topology.adatt(2, [2, 1], 1, last=False),
    "stem": Topology.stem(2, [2, 1], 1, last=False),
    "static-offsets": Topology(
        (0, 0, 1),
        (0, 1),
        ((0, 1, 2), (2, 0)),
        mixture_kind=("static", "softmax"),
        mixture_offset=((True, False, True), (False, True)),
    ),
    "stops": Topology(
        (0, 0, 1, 2),
        (0, 1, 2),
        ((0, 1, 2, 3), (0, 1, 2, 3), (3, 0, 1, 2)),
        mixture_stop=((False, False, True, False), (True, True, False, False), (False, False, True, True)),
    ),
    "ragged-stops": Topology(
        (0, 0, 1, 1),
        (0, 1, 0),
        ((1, 0, 2), (3, 2), (0, 3)),
        mixture_kind=("softmax", "softmax", "static"),
        mixture_offset=((True, False, True), (False, True), (True, False)),
        mixture_stop=((False, False, True), (False, False), (True, True)),
    ),
    "home-meta": Topology.home([[0, 2], [1]], [2, 1], 2),
    "home-task": Topology.home([[0, 2], [1]], 1, 2, task_experts=[1, 2, 1]),
    "sigmoids-and-sums": Topology(
        (0, 0, 1, 2),
        (0, 2, 1, 1),
        ((2, 0, 3), (1, 3), (3, 2), (0, 1)),
        mixture_kind=("sigmoid", "softmax", "sigmoid", "static"),
        mixture_offset=((False,) * 3, (False,) * 2, (True, False), (False, True)),
        mixture_output=(0, 0, 0, 1),
    ),
    "unordered": Topology((0, 1, 1, 3), (3, 0, 2), ((3, 0, 1), (2, 1), (0, 2, 3, 1)), num_slots=5),
}
"""Every kind of wiring: families of models, uneven counts, unread slots, columns out of order, static, with offsets or
stops."""

EXPERTS: dict[str, MLPSpec] = {
    "1-layer": MLPSpec((4,)),
    "2-layers": MLPSpec((6, 4)),
    "3-layers": MLPSpec((5, 3, 4)),
    "4-layers": MLPSpec((6, 2, 5, 4)),
    "width-1": MLPSpec((1, 1)),
    "identity": MLPSpec((5, 4), "identity"),
    "leaky": MLPSpec((5, 4), "leaky_relu"),
    "negative-leaky": MLPSpec((5, 4), nn.LeakyReLU(-0.5)),
    "prelu": MLPSpec((5, 4), "prelu"),
    "gelu": MLPSpec((5, 4), "gelu"),
    "gelu-tanh": MLPSpec((5, 4), "gelu_tanh"),
    "silu": MLPSpec((5, 4), "silu"),
    "tanh": MLPSpec((5, 4), "tanh"),
    "sigmoid": MLPSpec((5, 4), "sigmoid"),
    "dice": MLPSpec((5, 4), "dice"),
    "row-dice": MLPSpec((5, 4), "row_dice"),
    "no-last-activation": MLPSpec((5, 4), "relu", last_activation="identity"),
    "no-bias": MLPSpec((5, 4), bias=False),
    "no-bias-one-layer": MLPSpec((4,), "silu", bias=False),
    "batch-norm": MLPSpec((5, 4), norm="batch"),
    "batch-norm-after": MLPSpec((5, 4), "silu", norm="batch", norm_position="after"),
    "batch-norm-no-bias": MLPSpec((5, 4), norm="batch", bias=False),
    "layer-norm": MLPSpec((5, 4), norm="layer"),
    "layer-norm-after": MLPSpec((5, 4), "gelu", norm="layer", norm_position="after"),
    "per-layer": MLPSpec((6, 5, 4), ("relu", "dice", "prelu"), norm=("batch", "layer", None), bias=(False, True, True)),
    "prelu-norms": MLPSpec((5, 4), "prelu", norm=("layer", "batch"), norm_position=("before", "after")),
    "dropout-in-eval": MLPSpec((5, 4), dropout=0.5),
}
"""Every make-up of an expert. Where dropout is set the comparison is made in eval mode."""

GATES: dict[str, GateSpec] = {
    "plain": GateSpec(),
    "no-bias": GateSpec(bias=False),
    "hidden": GateSpec((5,)),
    "two-hidden": GateSpec((5, 3), activation=("tanh", "gelu"), bias=False),
    "hidden-batch-norm": GateSpec((5,), norm="batch"),
    "hidden-layer-norm": GateSpec((5, 4), activation="silu", norm=("layer", None)),
    "hidden-prelu-dice": GateSpec((5, 4), activation=("prelu", "dice")),
    "hidden-row-dice": GateSpec((5, 4), activation=("row_dice", "relu")),
    "temperature": GateSpec(temperature=0.25),
    "logits-norm": GateSpec(logits_norm="batch", bias=False),
    "everything": GateSpec((5,), "prelu", "batch", logits_norm="batch", temperature=3.0),
    "dropout-in-eval": GateSpec((5,), dropout=0.5),
    "top-1": GateSpec(top_k=1),
    "with-shared": GateSpec(input="with_shared"),
    "hidden-with-shared": GateSpec((5,), input="with_shared"),
    "top-2": GateSpec((5,), logits_norm="batch", temperature=0.5, top_k=2),
}
"""Every make-up of a gate that reads the level's own input."""


def has_dropout(experts: MLPSpec | Sequence[MLPSpec], gate: GateSpec) -> bool:
    """Whether the output is random in train mode."""
    specs = [experts] if isinstance(experts, MLPSpec) else list(experts)
    return any(gate.dropout) or any(any(spec.dropout) for spec in specs)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Nothing stays at a value that hides a mistake: norms off (1, 0), offsets, slopes and alphas off their start."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {id(p) for child in module.modules() for n, p in child.named_parameters(recurse=False) if n == "weight"}
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if id(parameter) in matrices and parameter.dim() >= 2:
            noise *= parameter.shape[-1] ** -0.5  # keeps pre-activations of order 1 at any width
        else:
            noise *= 0.3
        parameter.add_(noise.to(parameter))
    for name, buffer in module.named_buffers():
        uniform = torch.rand(buffer.shape, generator=generator, dtype=torch.float64).to(buffer)
        if name.endswith("running_mean"):
            buffer.copy_(uniform - 0.5)
        elif name.endswith("running_var"):
            buffer.copy_(uniform + 0.5)


def level(
    topology: Topology,
    experts: MLPSpec | Sequence[MLPSpec],
    gate: GateSpec | None = None,
    *,
    in_features: int = 7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **kwargs: Any,
) -> ExtractionNetwork:
    """A fused level with randomised weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # two levels of one seed are equal
        module = ExtractionNetwork(
            in_features, topology, experts=experts, gate=gate if gate is not None else GateSpec(), dtype=dtype, **kwargs
        )
    randomise(module, seed)
    return module


@dataclass(frozen=True)
class Form:
    """A form of the input: the leaves that hold its data, and how ``x`` is made of them."""

    shapes: Callable[[int, int, int], list[tuple[int, ...]]]
    build: Callable[[list[Tensor], int], Any]


FORMS: dict[str, Form] = {
    "one": Form(lambda b, s, d: [(b, d)], lambda leaves, s: leaves[0]),
    "stacked": Form(lambda b, s, d: [(b, s, d)], lambda leaves, s: leaves[0]),
    "list": Form(lambda b, s, d: [(b, d)] * s, lambda leaves, s: list(leaves)),
    "list-of-one": Form(lambda b, s, d: [(b, d)], lambda leaves, s: [leaves[0]] * s),
    "list-of-views": Form(lambda b, s, d: [(b, s, d)], lambda leaves, s: list(leaves[0].unbind(1))),
    "list-reversed": Form(lambda b, s, d: [(b, s, d)], lambda leaves, s: list(leaves[0].unbind(1))[::-1]),
    "every-second-row": Form(lambda b, s, d: [(2 * b, d)], lambda leaves, s: leaves[0][::2]),
    "transposed": Form(lambda b, s, d: [(d, b)], lambda leaves, s: leaves[0].t()),
    "expanded": Form(lambda b, s, d: [(1, d)], lambda leaves, s: leaves[0].expand(5, -1)),
    "expanded-slots": Form(lambda b, s, d: [(b, 1, d)], lambda leaves, s: leaves[0].expand(-1, s, -1)),
    "slots-first": Form(lambda b, s, d: [(s, b, d)], lambda leaves, s: leaves[0].transpose(0, 1)),
    "column-slice": Form(lambda b, s, d: [(b, s, d + 3)], lambda leaves, s: leaves[0][..., 2:-1]),
}
"""Forms of ``x``; the last six are not contiguous. ``expanded`` always has 5 rows."""


def draw(
    form: str, batch: int, slots: int, width: int, *, dtype: torch.dtype = torch.float64, seed: int = 1
) -> list[Tensor]:
    """Leaves of an input of the given form."""
    generator = torch.Generator().manual_seed(seed)
    shapes = FORMS[form].shapes(batch, slots, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def reference_of(module: nn.Module) -> ExtractionNetworkReference | PLEReference:
    """The reference with the weights of ``module``."""
    if isinstance(module, HoME):
        return HoMEReference.like(module)
    return PLEReference.like(module) if hasattr(module, "levels") else ExtractionNetworkReference.like(module)


@dataclass
class Run:
    """Output, flattened gates and input gradients of one forward and backward pass."""

    y: Tensor
    gates: list[Tensor]
    x_grads: list[Tensor | None]
    gate_input_grads: list[Tensor | None]


def _cotangents(y: Tensor, gates: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, *gates)]


def run(
    module: nn.Module,
    leaves: Sequence[Tensor],
    *,
    form: str = "one",
    slots: int = 1,
    gate_leaves: Sequence[Tensor] | None = None,
    gate_form: str = "one",
    gates_enter_loss: bool = True,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    input_grad: bool = True,
    ask_gates: bool = True,
    cotangents: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = _cotangents,
) -> Run:
    """One forward and backward pass with fixed cotangents of the output (and the gates); grads land in ``.grad``.

    ``ask_gates``: call with ``return_gates=True``, which few rows have no short path for.
    """
    own = [leaf.detach().clone().requires_grad_(input_grad) for leaf in leaves]
    extra = None if gate_leaves is None else [leaf.detach().clone().requires_grad_(input_grad) for leaf in gate_leaves]
    arguments = [FORMS[form].build(own, slots)]
    if extra is not None:
        arguments.append(FORMS[gate_form].build(extra, slots))
    with context():
        y, gates = module(*arguments, return_gates=True) if ask_gates else (module(*arguments), [])
    flat = [g for per_level in gates for g in per_level] if gates and not isinstance(gates[0], Tensor) else list(gates)
    outputs = [y, *flat] if gates_enter_loss else [y]
    pairs = [(o, c.to(o)) for o, c in zip(outputs, cotangents(y, flat), strict=False) if o.requires_grad]
    torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
    return Run(y, flat, [leaf.grad for leaf in own], [leaf.grad for leaf in extra or []])


def _grad(tensor: Tensor, part: Any) -> Tensor | None:
    return None if tensor.grad is None else tensor.grad[part]


def results(
    fused: nn.Module, ours: Run, reference: ExtractionNetworkReference | PLEReference, theirs: Run
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Name, ours and theirs of everything that a step yields: output, gates, every gradient, every buffer."""
    yield "y", ours.y, theirs.y
    assert len(ours.gates) == len(theirs.gates)
    for o, (a, b) in enumerate(zip(ours.gates, theirs.gates, strict=True)):
        yield f"gates[{o}]", a, b
    for i, (p, q) in enumerate(zip(ours.x_grads, theirs.x_grads, strict=True)):
        yield f"x[{i}].grad", p, q
    for i, (p, q) in enumerate(zip(ours.gate_input_grads, theirs.gate_input_grads, strict=True)):
        yield f"gate_input[{i}].grad", p, q
    for pair in correspondence(fused, reference):
        if isinstance(pair.reference, nn.Parameter):
            yield f"{pair.name}.grad", _grad(pair.fused, pair.part), pair.reference.grad
        else:
            yield pair.name, pair.fused[pair.part], pair.reference


def assert_covers_all(fused: nn.Module, pairs: Sequence[Pair]) -> None:
    """Every element of every parameter and buffer of ``fused`` stands opposite exactly one element of the reference."""
    seen: dict[int, Tensor] = {}
    for pair in pairs:
        seen.setdefault(id(pair.fused), torch.zeros(pair.fused.shape, dtype=torch.int64))[pair.part] += 1
    for name, tensor in [*fused.named_parameters(), *fused.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            assert id(tensor) in seen, f"{name} has no counterpart in the reference"
            continue
        assert id(tensor) in seen, f"{name} has no counterpart in the reference"
        counts = seen[id(tensor)]
        assert bool((counts == 1).all()), f"{name}: some elements have no counterpart, or several: {counts}"


def assert_close(
    name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float, scale: float = 0.0
) -> None:
    """Same shape, all finite, and within ``tolerance`` of the largest magnitude (at least 1, at least ``scale``)."""
    if expected is None or actual is None:
        # A backend may leave None or zeros where no gradient flows; anything else is a mistake.
        present = actual if actual is not None else expected
        assert present is None or not present.any(), f"{name}: expected {expected}, got {actual}"
        return
    assert actual.shape == expected.shape, f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    assert bool(torch.isfinite(expected).all()), f"{name}: the reference itself is not finite"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite: {actual}"
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().max().item()
    bound = tolerance * max(1.0, scale, expected.abs().max().item())
    assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}\nexpected {expected}\ngot {actual}"


def compare(
    fused: nn.Module,
    leaves: Sequence[Tensor],
    *,
    tolerance: float = 1e-10,
    common_scale: bool = False,
    train: bool = True,
    **how: Any,
) -> tuple[Run, Run]:
    """Hold ``fused`` (float64) to the reference with its weights: output, gates, every gradient, every buffer.

    ``common_scale`` measures every error against the largest magnitude of the whole step, for drawn configurations
    whose norms may amplify rounding at will.
    """
    fused.train(train)
    fused.zero_grad(set_to_none=True)
    reference = reference_of(fused)
    for pair in correspondence(fused, reference):
        pair.reference.requires_grad_(pair.fused.requires_grad)
    assert_covers_all(fused, list(correspondence(fused, reference)))
    ours = run(fused, leaves, **how)
    theirs = run(reference, leaves, **how)
    assert ours.y.dtype == theirs.y.dtype
    assert [g.dtype for g in ours.gates] == [g.dtype for g in theirs.gates]
    rows = list(results(fused, ours, reference, theirs))
    scale = 0.0
    if common_scale:
        scale = max(b.abs().max().item() for _, _, b in rows if b is not None and b.numel())
    for name, a, b in rows:
        assert_close(name, a, b, tolerance, scale)
    return ours, theirs


@contextmanager
def by_route(name: str) -> Iterator[None]:
    """Eager calls take this route, whichever they would take."""
    (route,) = (route for route in ROUTES if route.name == name)
    with mock.patch("ple_fast.functional.route_of", return_value=route):
        yield


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """The tensors that are saved for backward within the block."""
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield tensors


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a forward pass saves, each once, without parameters and input."""
    known = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers(), x]}
    with saved() as tensors:
        y = module(x)
    y = y if isinstance(y, Tensor) else y[0]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert y.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in known)


def distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference."""
    gap = a.detach().double() - b.detach().double()
    return gap.abs().max().item(), gap.square().mean().sqrt().item()


def compare_low_precision(
    fused: nn.Module,
    leaves: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    autocast: bool = False,
    train: bool = True,
    **how: Any,
) -> None:
    """``err(ours) <= 2 err(plain PyTorch in that dtype) + tiny`` against float64, in maximum and in root mean square.

    With ``autocast`` the parameters stay float32 and the step runs under autocast to ``dtype``. ``tiny`` is one
    unit of rounding of the quantity, for what plain PyTorch happens to round without error.
    """
    stored = torch.float32 if autocast else dtype
    low = copy.deepcopy(fused).to(stored).train(train)
    exact = copy.deepcopy(low).double()
    plain, oracle = reference_of(low), reference_of(exact)
    leaves = [leaf.to(stored) for leaf in leaves]
    if how.get("gate_leaves") is not None:
        how["gate_leaves"] = [leaf.to(stored) for leaf in how["gate_leaves"]]
    doubled: dict[str, Any] = {
        k: [t.double() for t in v] if k == "gate_leaves" and v is not None else v for k, v in how.items()
    }
    where = leaves[0].device.type
    context = (lambda: torch.autocast(where, dtype)) if autocast else nullcontext
    ours = run(low, leaves, context=context, **how)
    theirs = run(plain, leaves, context=context, **how)
    truth = run(oracle, [leaf.double() for leaf in leaves], **doubled)
    assert all(g.dtype == torch.float32 for g in ours.gates)
    assert ours.y.dtype == theirs.y.dtype
    ours_rows = results(low, ours, plain, theirs)
    truth_rows = results(exact, truth, oracle, truth)
    assert_two_sided([(n, a, [b], t) for (n, a, b), (_, _, t) in zip(ours_rows, truth_rows, strict=True)], dtype)


def assert_two_sided(
    rows: Sequence[tuple[str, Tensor | None, Sequence[Tensor | None], Tensor | None]], dtype: torch.dtype
) -> None:
    """``err(ours) <= 2 err(plain PyTorch) + tiny`` of names, ours, what plain PyTorch gave (in several runs, of which
    the largest error counts), and the truth."""
    # Pooled over experts, mixtures and layers: of a single slope or bias, plain PyTorch may be right by luck.
    pools: dict[str, list[list[Tensor]]] = {}
    for name, a, peers, t in rows:
        known = [b for b in peers if b is not None]
        if t is None or a is None or len(known) < len(peers):
            present = known if a is None else [a, *known]
            assert not any(b.any() for b in present), f"{name}: expected {t}, got {a}"
            continue
        assert a.shape == t.shape, f"{name}: expected shape {tuple(t.shape)}, got {tuple(a.shape)}"
        assert bool(torch.isfinite(a).all()), f"{name}: not finite"
        pools.setdefault(re.sub(r"\d+", "#", name), []).append([x.detach().double().flatten() for x in (t, a, *known)])
    # In float32 the order in which a library's product adds up decides, and libraries differ in it.
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name, pool in pools.items():
        t, a, *peers = (torch.cat(column) for column in zip(*pool, strict=True))
        if t.numel() == 0:
            continue
        sizes = t.abs().max().item(), t.square().mean().sqrt().item()
        errors = zip(*(distance(b, t) for b in peers), strict=True)
        for kind, own, of_peers, size in zip(("max", "rms"), distance(a, t), errors, sizes, strict=True):
            peer = max(of_peers)
            bound = 2 * peer + unit * size
            assert own <= bound, f"{name}: {kind} error {own:.3g}, plain PyTorch {peer:.3g}, bound {bound:.3g}"


def assert_derivatives_agree(module: nn.Module, x: Tensor, tolerance: float) -> None:
    """Gradients by hand are those of the composed level, which takes over where they are derived once more."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    dy = torch.randn_like(y)
    leaves = [leaf, *module.parameters()]
    by_hand = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    composed = torch.autograd.grad(y, leaves, dy, create_graph=True)
    for a, b in zip(by_hand, composed, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
