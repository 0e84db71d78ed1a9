"""What ours is held against: the loop under the compiler, naive stacking, and the levels of other libraries."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import partial
from threading import Thread
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.configs import TrunkConfig
from benchmarks.loop import Levels, LoopLevel, LoopPLE


def compiled(config: TrunkConfig, loop: LoopPLE, **options: Any) -> nn.Module:
    """The loop under ``torch.compile``."""
    return cast(nn.Module, torch.compile(loop, dynamic=False, **options))


def batch_linear(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    """The loop with Inductor's fusion of linear layers into batched products."""
    for module in loop.modules():  # the fusion makes views, which must not be changed in place
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return compiled(config, loop, options={"pre_grad_fusion_options": {"batch_linear": {"min_fuse_set_size": 2}}})


def stacked_layers(modules: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Weights ``(n, out, in)`` and biases ``(n, out)`` of the linear layers of n modules that are alike, by depth."""
    rows = [[layer for layer in module.modules() if isinstance(layer, nn.Linear)] for module in modules]
    return [
        (torch.stack([one.weight.detach() for one in layer]), torch.stack([one.bias.detach() for one in layer]))
        for layer in zip(*rows, strict=True)
    ]


class BmmLevel(nn.Module):
    """The obvious vectorisation: gather the slots, one ``baddbmm`` per layer, a masked softmax, one product to mix."""

    mask: Tensor
    expert_slot: Tensor

    def __init__(self, loop: LoopLevel, tasks: int) -> None:
        super().__init__()
        layers = stacked_layers(loop.experts)
        self.weights = nn.ParameterList(weight.mT.contiguous() for weight, _ in layers)
        self.biases = nn.ParameterList(bias.unsqueeze(1) for _, bias in layers)
        m, s, experts = loop.task_experts, loop.shared_experts, len(loop.experts)
        own = [[*range(t * m, (t + 1) * m), *range(tasks * m, experts)] for t in range(tasks)] + [list(range(experts))]
        gates = [gate[0] for gate in loop.gates]  # type: ignore[index]  # nn.Sequential, typed as Module by ModuleList
        first, _ = layers[0]
        weight = first.new_zeros(len(gates), first.shape[2], experts)
        bias = first.new_zeros(len(gates), 1, experts)
        mask = torch.full_like(bias, -torch.inf)
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

    def __init__(self, config: TrunkConfig, loop: LoopPLE) -> None:
        super().__init__()
        self.slots = loop.tasks + 1
        self.levels = nn.ModuleList(BmmLevel(level, loop.tasks) for level in loop.levels)  # type: ignore[arg-type]  # LoopLevel

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = x.expand(self.slots, *x.shape)
        for level in self.levels:
            h = level(h)
        return h.unbind(0)


def _copy_weights(loop: LoopPLE, levels: Iterable[tuple[list[Any], list[Any]]]) -> None:
    """Into the experts and gates of each level, in our order, from the loop's: the same layers in the same order."""
    kinds = (nn.Linear, nn.BatchNorm1d)
    level: Any  # LoopLevel
    for level, (experts, gates) in zip(loop.levels, levels, strict=True):
        pairs = [*zip(experts, level.experts, strict=True), *zip(gates, level.gates, strict=False)]
        for target, source in pairs:
            layers = ([layer for layer in module.modules() if isinstance(layer, kinds)] for module in (target, source))
            for theirs, given in zip(*layers, strict=True):
                theirs.load_state_dict(given.state_dict())


def rechub_modules(cgc: Any) -> tuple[list[Any], list[Any]]:
    """Experts and gates of a CGC layer of torch-rechub's, in our order."""
    gates = [*cgc.gates_specific, *([cgc.gate_shared] if hasattr(cgc, "gate_shared") else [])]
    return [*cgc.experts_specific, *cgc.experts_shared], gates


class RechubTrunk(Levels):
    """torch-rechub's own CGC layers without embedding and towers; its batch norm cannot be turned off."""

    levels: nn.ModuleList

    def __init__(self, config: TrunkConfig, loop: LoopPLE) -> None:
        cgc = importlib.import_module("torch_rechub.models.multi_task.ple").CGC
        counts = (config.num_tasks, config.task_experts, config.shared_experts)
        params = {"dims": list(config.units), "activation": "relu", "dropout": 0.0}
        layers = [cgc(n + 1, config.num_levels, *counts, config.in_features, params) for n in range(config.num_levels)]
        super().__init__(config.num_tasks, nn.ModuleList(layers))
        _copy_weights(loop, map(rechub_modules, layers))


def import_deepctr() -> Any:
    """deepctr-torch's PLE, imported without its thread that asks the package index for a newer version."""
    start = Thread.start

    def quiet_start(thread: Thread) -> None:
        target = getattr(thread, "_target", None)
        if getattr(target, "__module__", "") != "deepctr_torch.utils":
            start(thread)

    with mock.patch.object(Thread, "start", quiet_start):
        return importlib.import_module("deepctr_torch.models.multitask.ple").PLE


class DeepctrTrunk(Levels):
    """deepctr-torch's own levels without embedding and towers: gates of one linear layer, which has no bias there.

    Its last level computes a shared mixture that nothing reads; that is left as it is.
    """

    def __init__(self, config: TrunkConfig, loop: LoopPLE) -> None:
        ple = import_deepctr()
        if config.task_experts != config.shared_experts:
            raise ValueError(
                "deepctr-torch 0.3.0 builds as many shared experts as a task has of its own; "
                f"expected equal counts, got {config.task_experts} and {config.shared_experts}"
            )
        model = ple(
            [importlib.import_module("deepctr_torch.inputs").DenseFeat("x", config.in_features)],
            shared_expert_num=config.shared_experts, specific_expert_num=config.task_experts,
            num_levels=config.num_levels, expert_dnn_hidden_units=tuple(config.units), gate_dnn_hidden_units=(),
            tower_dnn_hidden_units=(), task_types=("binary",) * config.num_tasks,
            task_names=tuple(f"task{t}" for t in range(config.num_tasks)),
        )  # fmt: skip
        del model.tower_dnn_final_layer, model.out
        super().__init__(config.num_tasks, [partial(model.cgc_net, level_num=n) for n in range(config.num_levels)])
        self.model = model
        levels = []
        for n in range(config.num_levels):
            own = [expert for group in model.specific_experts[n] for expert in group]
            gates = [*model.specific_gate_dnn_final_layer[n], model.shared_gate_dnn_final_layer[n]]
            levels.append(([*own, *model.shared_experts[n][0]], gates))
        _copy_weights(loop, levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x)[: self.tasks]
