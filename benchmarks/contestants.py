"""The trunks that are timed: one factory per name, all doing the same work with the same weights.

A contestant maps ``x (B, D)`` to T tensors ``(B, H)``, as towers read them. Ours returns ``(B, T, H)`` and is read
through ``unbind(1)``, so the stacking of the T incoming gradients counts against it.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.configs import SEED, Mode, TrunkConfig

# The plain loop ------------------------------------------------------------------------------------


Norm = Literal["batch", "layer"]


def _mlp(in_features: int, units: Sequence[int], norm: Norm | None, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in units:
        layers.append(nn.Linear(in_features, width))
        if norm is not None:
            layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
        layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_features = width
    return nn.Sequential(*layers)


def _gate(in_features: int, experts: int, norm: bool, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(in_features, experts, bias=bias)]
    if norm:
        layers.append(nn.BatchNorm1d(experts))
    return nn.Sequential(*layers, nn.Softmax(dim=1))


def _mix(weights: Tensor, experts: list[Tensor]) -> Tensor:
    """``sum_e weights[:, e] * experts[e]``: (B, A) and A times (B, H) to (B, H).

    Stack and batched product: measured level with stack + mul + sum and einsum, and the better of them more often.
    """
    return torch.bmm(weights.unsqueeze(1), torch.stack(experts, dim=1)).squeeze(1)


class LoopLevel(nn.Module):
    """One extraction network as public code writes it: a module per expert and per gate, called one after the other."""

    def __init__(
        self,
        config: TrunkConfig,
        level: int,
        *,
        norm: Norm | None = None,
        gate_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.task_experts, self.shared_experts = config.task_experts, config.shared_experts
        width = config.level_inputs()[level]
        units = config.level_units()[level]
        self.experts = nn.ModuleList(_mlp(width, units, norm, dropout) for _ in range(config.num_experts))
        self.gates = nn.ModuleList(_gate(width, size, norm == "batch", gate_bias) for size in config.gate_sizes(level))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """T + 1 tensors (B, D), tasks first, to T + 1 (T at the last level) tensors (B, H)."""
        tasks = len(inputs) - 1
        slots = [x for x in inputs[:-1] for _ in range(self.task_experts)] + [inputs[-1]] * self.shared_experts
        experts = [expert(x) for expert, x in zip(self.experts, slots, strict=True)]
        shared = experts[tasks * self.task_experts :]
        read = [experts[t * self.task_experts : (t + 1) * self.task_experts] + shared for t in range(tasks)] + [experts]
        return [_mix(gate(x), hs) for gate, x, hs in zip(self.gates, inputs, read, strict=False)]


class LoopPLE(nn.Module):
    """The baseline: a plain per-expert PLE. Batch norm is where torch-rechub forces it, layer norm in the experts."""

    def __init__(
        self, config: TrunkConfig, *, norm: Norm | None = None, gate_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tasks = config.num_tasks
        self.levels = nn.ModuleList(
            LoopLevel(config, level, norm=norm, gate_bias=gate_bias, dropout=dropout)
            for level in range(config.num_levels)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = [x] * (self.tasks + 1)
        for level in self.levels:
            inputs = level(inputs)
        return inputs


# Weights -------------------------------------------------------------------------------------------


def baseline(config: TrunkConfig, *, norm: Norm | None = None, gate_bias: bool = True, dropout: float = 0.0) -> LoopPLE:
    """The seeded loop whose weights every contestant takes over."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LoopPLE(config, norm=norm, gate_bias=gate_bias, dropout=dropout).to(config.torch_dtype)


def _stacks(modules: nn.ModuleList) -> list[list[nn.Linear]]:
    """Linear layers by depth: ``[i][e]`` is layer i of module e."""
    rows = [[layer for layer in module.modules() if isinstance(layer, nn.Linear)] for module in modules]
    return [list(column) for column in zip(*rows, strict=True)]


def _weight(linears: Sequence[nn.Linear]) -> Tensor:
    return torch.stack([linear.weight.detach() for linear in linears])


def _bias(linears: Sequence[nn.Linear]) -> Tensor:
    return torch.stack([linear.bias.detach() for linear in linears])


def _copy_layers(target: nn.Module, source: nn.Module) -> None:
    """Copy the linear layers and norms of one MLP into another with the same layers in the same order."""
    kinds = (nn.Linear, nn.BatchNorm1d)
    pairs = zip(
        (m for m in target.modules() if isinstance(m, kinds)),
        (m for m in source.modules() if isinstance(m, kinds)),
        strict=True,
    )
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())


# Naive stacking ------------------------------------------------------------------------------------


class BmmLevel(nn.Module):
    """The obvious vectorisation: gather the slots, one ``baddbmm`` per layer, a masked softmax, one product to mix."""

    mask: Tensor
    expert_slot: Tensor

    def __init__(self, loop: LoopLevel, tasks: int) -> None:
        super().__init__()
        layers = _stacks(loop.experts)
        self.weights = nn.ParameterList(_weight(linears).mT.contiguous() for linears in layers)
        self.biases = nn.ParameterList(_bias(linears).unsqueeze(1) for linears in layers)
        m, s, experts = loop.task_experts, loop.shared_experts, len(loop.experts)
        own = [[*range(t * m, (t + 1) * m), *range(tasks * m, experts)] for t in range(tasks)] + [list(range(experts))]
        gates = [gate[0] for gate in loop.gates]  # type: ignore[index]  # nn.Sequential, typed as Module by ModuleList
        width, dtype = layers[0][0].in_features, layers[0][0].weight.dtype
        weight = torch.zeros(len(gates), width, experts, dtype=dtype)
        bias = torch.zeros(len(gates), 1, experts, dtype=dtype)
        mask = torch.full((len(gates), 1, experts), -torch.inf, dtype=dtype)
        for o, gate in enumerate(gates):
            weight[o][:, own[o]] = gate.weight.detach().mT
            bias[o, 0, own[o]] = gate.bias.detach()
            mask[o, 0, own[o]] = 0
        self.gate_weight, self.gate_bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("mask", mask)
        self.register_buffer("expert_slot", torch.tensor([t for t in range(tasks) for _ in range(m)] + [tasks] * s))

    def forward(self, x: Tensor) -> Tensor:
        """(S, B, D) to (O, B, H)."""
        h = x[self.expert_slot]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = torch.baddbmm(bias, h, weight).relu()
        gates = len(self.gate_weight)
        p = (torch.baddbmm(self.gate_bias, x[:gates], self.gate_weight) + self.mask).softmax(-1)  # (O, B, E)
        return torch.bmm(p.permute(1, 0, 2), h.permute(1, 0, 2)).permute(1, 0, 2)


class BmmPLE(nn.Module):
    """A stack of ``BmmLevel``."""

    def __init__(self, loop: LoopPLE) -> None:
        super().__init__()
        self.slots = loop.tasks + 1
        self.levels = nn.ModuleList(BmmLevel(level, loop.tasks) for level in loop.levels)  # type: ignore[arg-type]  # LoopLevel

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = x.expand(self.slots, *x.shape)
        for level in self.levels:
            h = level(h)
        return h.unbind(0)


# Peers ---------------------------------------------------------------------------------------------


def rechub_modules(cgc: Any) -> tuple[list[Any], list[Any]]:
    """Experts and gates of a CGC layer of torch-rechub's, in our order."""
    gates = [*cgc.gates_specific, *([cgc.gate_shared] if hasattr(cgc, "gate_shared") else [])]
    return [*cgc.experts_specific, *cgc.experts_shared], gates


class RechubTrunk(nn.Module):
    """torch-rechub's own CGC layers without embedding and towers; its batch norm cannot be turned off."""

    def __init__(self, config: TrunkConfig, loop: LoopPLE) -> None:
        super().__init__()
        cgc = importlib.import_module("torch_rechub.models.multi_task.ple").CGC
        counts = (config.num_tasks, config.task_experts, config.shared_experts)
        params = {"dims": list(config.units), "activation": "relu", "dropout": 0.0}
        self.tasks = config.num_tasks
        self.cgc_layers = nn.ModuleList(
            cgc(level + 1, config.num_levels, *counts, config.in_features, params) for level in range(config.num_levels)
        )
        layer: Any  # torch-rechub's CGC
        level: Any  # LoopLevel
        for layer, level in zip(self.cgc_layers, loop.levels, strict=True):
            experts, gates = rechub_modules(layer)
            theirs = [*experts, *gates]
            for target, source in zip(theirs, [*level.experts, *level.gates], strict=True):
                _copy_layers(target, source)

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = [x] * (self.tasks + 1)
        for layer in self.cgc_layers:
            inputs = layer(inputs)
        return inputs


def import_deepctr() -> Any:
    """deepctr-torch's PLE, imported without its thread that asks the package index for a newer version."""
    start = Thread.start

    def quiet_start(thread: Thread) -> None:
        target = getattr(thread, "_target", None)
        if getattr(target, "__module__", "") != "deepctr_torch.utils":
            start(thread)

    with mock.patch.object(Thread, "start", quiet_start):
        return importlib.import_module("deepctr_torch.models.multitask.ple").PLE


class DeepctrTrunk(nn.Module):
    """deepctr-torch's own levels without embedding and towers: gates of one linear layer, which has no bias there.

    Its last level computes a shared mixture that nothing reads; that is left as it is.
    """

    def __init__(self, config: TrunkConfig, loop: LoopPLE) -> None:
        super().__init__()
        ple = import_deepctr()
        if config.task_experts != config.shared_experts:
            raise ValueError(
                "deepctr-torch 0.3.0 builds as many shared experts as a task has of its own; "
                f"expected equal counts, got {config.task_experts} and {config.shared_experts}"
            )
        column = importlib.import_module("deepctr_torch.inputs").DenseFeat("x", config.in_features)
        model = ple(
            [column],
            shared_expert_num=config.shared_experts,
            specific_expert_num=config.task_experts,
            num_levels=config.num_levels,
            expert_dnn_hidden_units=tuple(config.units),
            gate_dnn_hidden_units=(),
            tower_dnn_hidden_units=(),
            task_types=("binary",) * config.num_tasks,
            task_names=tuple(f"task{t}" for t in range(config.num_tasks)),
        )
        del model.tower_dnn_final_layer, model.out
        self.model, self.tasks = model, config.num_tasks
        for index, level in enumerate(loop.levels):
            own = [expert for group in model.specific_experts[index] for expert in group]
            experts = [*own, *model.shared_experts[index][0]]
            for target, source in zip(experts, level.experts, strict=True):  # type: ignore[arg-type]  # ModuleList
                _copy_layers(target, source)
            gates = [*model.specific_gate_dnn_final_layer[index], model.shared_gate_dnn_final_layer[index]]
            for target, source in zip(gates, level.gates, strict=False):  # type: ignore[arg-type]  # ModuleList
                _copy_layers(target, source)

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = [x] * (self.tasks + 1)
        for index in range(self.model.num_levels):
            inputs = self.model.cgc_net(inputs=inputs, level_num=index)
        return inputs[: self.tasks]


# Ours ----------------------------------------------------------------------------------------------


def _fused(config: TrunkConfig, loop: LoopPLE, *, recompute: bool = False) -> nn.Module:
    """``ple_fast.PLE`` with the loop's weights, through the names that its state dict documents."""
    ple = importlib.import_module("ple_fast").PLE(
        config.in_features,
        config.num_tasks,
        num_levels=config.num_levels,
        task_experts=config.task_experts,
        shared_experts=config.shared_experts,
        expert_units=config.level_units(),
        recompute=recompute,
        dtype=config.torch_dtype,
    )
    assert isinstance(ple, nn.Module)
    state: dict[str, Tensor] = {}
    for index, level in enumerate(loop.levels):
        for i, linears in enumerate(_stacks(level.experts)):  # type: ignore[arg-type]  # ModuleList
            state[f"levels.{index}.blocks.0.layers.{i}.weight"] = _weight(linears)
            state[f"levels.{index}.blocks.0.layers.{i}.bias"] = _bias(linears)
        gates = [gate[0] for gate in level.gates]  # type: ignore[union-attr]  # Sequential
        state[f"levels.{index}.gate.weight"] = torch.cat([gate.weight.detach() for gate in gates])
        state[f"levels.{index}.gate.bias"] = torch.cat([gate.bias.detach() for gate in gates])
    ple.load_state_dict(state)
    return ple


class UnboundTrunk(nn.Module):
    """A trunk that returns (B, T, H), read as towers read it."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y: Tensor = self.trunk(x)
        return y.unbind(1)


def _packed(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    """``ple_fast.pack`` of the loop's own modules: whatever norms and dropout they have."""
    return _packed_levels(config, [(list(level.experts), list(level.gates)) for level in loop.levels])  # type: ignore[arg-type]  # ModuleList


def _packed_rechub(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    """``ple_fast.pack`` of torch-rechub's own modules."""
    layer: Any  # torch-rechub's CGC
    levels = []
    for layer in RechubTrunk(config, loop).cgc_layers:
        experts, gates = rechub_modules(layer)
        levels.append(([expert.mlp for expert in experts], [gate.mlp for gate in gates]))
    return _packed_levels(config, levels)


def _packed_levels(config: TrunkConfig, levels: Sequence[tuple[list[nn.Module], list[nn.Module]]]) -> nn.Module:
    ours = importlib.import_module("ple_fast")
    packed = []
    for index, (experts, gates) in enumerate(levels):
        last = index == len(levels) - 1
        topology = ours.Topology.ple(config.num_tasks, config.task_experts, config.shared_experts, last=last)
        packed.append(ours.pack(experts, [_before_softmax(gate) for gate in gates], topology))
    return UnboundTrunk(ours.PLE.from_levels(packed))


def _before_softmax(gate: nn.Module) -> nn.Sequential:
    return nn.Sequential(*itertools.takewhile(lambda layer: not isinstance(layer, nn.Softmax), gate.children()))


def _reference(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    like = importlib.import_module("ple_fast.reference").PLEReference.like
    return UnboundTrunk(like(_fused(config, loop)))


# The list ------------------------------------------------------------------------------------------


def _as_it_is(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def _without_onednn(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` with PyTorch's switch of oneDNN off, which leaves ``mm`` and ``bmm``. By the setter that the public
    context manager calls, because that one takes as long as a tenth of a call on one row."""

    def wrapped() -> Any:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return run()
        finally:
            torch._C._set_mkldnn_enabled(before)

    return wrapped


@dataclass(frozen=True)
class Contestant:
    """One way to compute the trunk.

    ``norm``, ``gate_bias`` and ``dropout`` describe the baseline that it must agree with; ``same_widths``: it knows no
    widths that change from level to level; ``compiled``: under ``torch.compile``; ``requires`` is the package that it
    needs; ``modes`` restricts it; ``build`` takes the configuration and the baseline whose weights it shall have;
    ``wrap`` makes the step that is run out of the plain one.
    """

    name: str
    build: Callable[[TrunkConfig, LoopPLE], nn.Module]
    note: str
    norm: Norm | None = None
    gate_bias: bool = True
    dropout: float = 0.0
    same_widths: bool = False
    compiled: bool = False
    requires: str | None = None
    modes: tuple[Mode, ...] = ("forward", "train", "inference")
    wrap: Callable[[Callable[[], Any]], Callable[[], Any]] = _as_it_is

    def available(self) -> bool:
        """Whether the package that it needs is installed."""
        return self.requires is None or importlib.util.find_spec(self.requires) is not None

    def supports(self, config: TrunkConfig) -> bool:
        """Whether it can be built at this size."""
        return not (self.same_widths and len(set(config.level_units())) > 1)


def _compiled(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    compiled = torch.compile(loop, dynamic=False)
    assert isinstance(compiled, nn.Module)
    return compiled


def _max_autotune(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    compiled = torch.compile(loop, dynamic=False, mode="max-autotune")
    assert isinstance(compiled, nn.Module)
    return compiled


def _batch_linear(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    for module in loop.modules():  # the fusion makes views, which must not be changed in place
        if isinstance(module, nn.ReLU):
            module.inplace = False
    fusions: Any = {"batch_linear": {"min_fuse_set_size": 2}}  # an option whose value torch types too narrowly
    compiled = torch.compile(loop, dynamic=False, options={"pre_grad_fusion_options": fusions})
    assert isinstance(compiled, nn.Module)
    return compiled


def _frozen(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    compiled = torch.compile(loop, dynamic=False, options={"freezing": True})
    assert isinstance(compiled, nn.Module)
    return compiled


CONTESTANTS: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("loop", lambda config, loop: loop, "plain per-expert loop, eager"),
        Contestant("loop_compiled", _compiled, "the same loop under torch.compile", compiled=True),
        Contestant(
            "loop_max_autotune",
            _max_autotune,
            "the same loop under torch.compile(mode='max-autotune'), which times products and uses CUDA graphs",
            compiled=True,
        ),
        Contestant(
            "loop_batch_linear",
            _batch_linear,
            "the same loop under torch.compile with Inductor's pre-grad fusion of linear layers into batched products",
            compiled=True,
        ),
        Contestant(
            "loop_frozen",
            _frozen,
            "the same loop under torch.compile with constant (frozen) weights",
            compiled=True,
            modes=("inference",),
        ),
        Contestant("bmm", lambda config, loop: BmmPLE(loop), "naive stacking: one batched product per layer"),
        Contestant(
            "rechub",
            RechubTrunk,
            "torch-rechub 0.9.0, its CGC layers (batch norm in experts and gates, cannot be turned off)",
            norm="batch",
            same_widths=True,
            requires="torch_rechub",
        ),
        Contestant(
            "deepctr",
            DeepctrTrunk,
            "DeepCTR-Torch 0.3.0, its levels (gates without bias; computes an unread last shared mixture)",
            gate_bias=False,
            same_widths=True,
            requires="deepctr_torch",
        ),
        Contestant("reference", _reference, "ple_fast.reference, the oracle of the tests"),
        Contestant("fast", lambda config, loop: UnboundTrunk(_fused(config, loop)), "ple_fast.PLE"),
        Contestant(
            "fast_recompute",
            lambda config, loop: UnboundTrunk(_fused(config, loop, recompute=True)),
            "ple_fast.PLE(recompute=True)",
            modes=("forward", "train"),
        ),
        Contestant(
            "fast_mm",
            lambda config, loop: UnboundTrunk(_fused(config, loop)),
            "ple_fast.PLE with oneDNN switched off: every product is PyTorch's `mm` or `bmm`, as the peers' are",
            wrap=_without_onednn,
        ),
        Contestant(
            "fast_rechub",
            _packed_rechub,
            "`pack` of torch-rechub's own CGC layers",
            norm="batch",
            same_widths=True,
            requires="torch_rechub",
        ),
        Contestant("loop_layer_norm", lambda config, loop: loop, "`loop` with layer norm in the experts", norm="layer"),
        Contestant("fast_layer_norm", _packed, "`pack` of `loop_layer_norm`", norm="layer"),
        Contestant("loop_dropout", lambda config, loop: loop, "`loop` with dropout 0.1 in the experts", dropout=0.1),
        Contestant("fast_dropout", _packed, "`pack` of `loop_dropout`", dropout=0.1),
    )
}
BASELINE = "loop"
OURS = ("fast", "fast_recompute", "fast_mm")
PEERS = ("loop", "loop_compiled", "loop_frozen", "rechub", "deepctr", "bmm")
"""Those that ``fast`` is held against: every contestant of the head to head that is not ours."""


NORM_PAIRS = (("rechub", "fast_rechub"), ("loop_layer_norm", "fast_layer_norm"), ("loop_dropout", "fast_dropout"))
"""A peer with norms or dropout, and ours of the same modules."""

GPU_CONTESTANTS = (
    "fast",
    "fast_recompute",
    "loop",
    "loop_compiled",
    "loop_max_autotune",
    "loop_batch_linear",
    "bmm",
    "rechub",
    "deepctr",
)
GPU_EAGER_PEERS = ("loop", "rechub", "deepctr")
"""Per-expert code, which the targets on a GPU are about, as agreed; the report has lines of their own for ``bmm``."""


def build(name: str, config: TrunkConfig, device: torch.device | str = "cpu") -> nn.Module:
    """A contestant with the baseline's seeded weights."""
    contestant = CONTESTANTS[name]
    if not contestant.supports(config):
        raise ValueError(f"{name}: gives every level the same widths, and {config.name} has {config.level_units()}")
    with torch.random.fork_rng(devices=[]):  # deepctr-torch seeds the global generator
        loop = baseline(config, norm=contestant.norm, gate_bias=contestant.gate_bias, dropout=contestant.dropout)
        return contestant.build(config, loop).to(device, config.torch_dtype)


# The floor -----------------------------------------------------------------------------------------


class BareGemm:
    """The matrix products of a step alone, by ``torch.mm`` into buffers that exist: the floor of whoever calls that.

    Experts that share an input are one wide product, which measures fastest; biases, activations, softmax, mixing, and
    the sums over experts are left out. Numbers are random: only time and FLOPs mean anything.
    """

    def __init__(self, config: TrunkConfig, *, input_grad: bool = True, device: torch.device | str = "cpu") -> None:
        self.forward_products: list[tuple[Tensor, Tensor, Tensor]] = []
        self.backward_products: list[tuple[Tensor, Tensor, Tensor]] = []
        self._generator = torch.Generator(device).manual_seed(SEED)
        self._device, self._dtype = device, config.torch_dtype
        for level, width in enumerate(config.level_inputs()):
            sizes = config.gate_sizes(level)
            if level == 0:
                slots = [(config.num_experts, sum(sizes))]
            else:
                slots = [(config.task_experts, size) for size in sizes[: config.num_tasks]]
                slots.append((config.shared_experts, sum(sizes[config.num_tasks :])))
            units = config.level_units()[level]
            for experts, logits in slots:
                self._slot(config.batch, width, units, experts, logits, input_grad or level > 0)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=self._dtype, device=self._device)

    def _linear(self, x: Tensor, dx: Tensor | None, out: Tensor, dout: Tensor) -> None:
        """Register ``out = x W^T``, ``dW = dout^T x`` and, unless dx is None, ``dx = dout W``."""
        weight = self._random(out.shape[1], x.shape[1])
        self.forward_products.append((x, weight.mT, out))
        self.backward_products.append((dout.mT, x, torch.empty_like(weight)))
        if dx is not None:
            self.backward_products.append((dout, weight, dx))

    def _slot(
        self, batch: int, width: int, widths: tuple[int, ...], experts: int, logits: int, input_grad: bool
    ) -> None:
        first, *rest = widths
        x = self._random(batch, width)
        dx = torch.empty_like(x) if input_grad else None
        h, dh = self._random(batch, experts * first), self._random(batch, experts * first)
        self._linear(x, dx, h, dh)
        if logits:
            self._linear(x, dx, self._random(batch, logits), self._random(batch, logits))
        for e in range(experts):
            below, dbelow = h[:, e * first : (e + 1) * first], dh[:, e * first : (e + 1) * first]
            for units in rest:
                above, dabove = self._random(batch, units), self._random(batch, units)
                self._linear(below, dbelow, above, dabove)
                below, dbelow = above, dabove

    def products(self, mode: Mode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(a, b, out) of every product of a step."""
        yield from self.forward_products
        if mode == "train":
            yield from self.backward_products

    def step(self, mode: Mode) -> Callable[[], None]:
        """A callable that runs them."""
        products = list(self.products(mode))

        def run() -> None:
            for a, b, out in products:
                torch.mm(a, b, out=out)

        return run


FLOOR = "bare_gemm"
