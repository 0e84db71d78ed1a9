"""Owners of the stacked parameters: layers of a block of experts, and the gates' end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..specs import GateSpec, LayerSpec, MLPSpec
from ..state import NO_STATE, LayerState
from ..tensors import GateTensors, LayerTensors
from ..topology import Topology
from .activations import StackedDice, StackedPReLU, StackedRowDice
from .norms import StackedBatchNorm, StackedLayerNorm, norm_state
from .uncalled import Holder, StackedModules, Uncalled, computed_tensor


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter as it is now: from the dict of parameters, or, where it is parametrised, as the attribute."""
    parameters = module._parameters
    if name in parameters:
        return parameters[name]
    for hook in module._forward_pre_hooks.values():
        if computed_tensor(hook) == name:
            hook(module, ())
    tensor: Tensor | None = getattr(module, name)
    return tensor


@torch.no_grad()
def init_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Uniform within ``1 / sqrt(fan_in)``, as ``nn.Linear`` does per expert; the fan-in is the last size."""
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound)
    if bias is not None:
        bias.uniform_(-bound, bound)


class StackedLayer(Uncalled):
    """One layer of ``n`` stacked MLPs: ``weight (n, H_out, H_in)``, ``bias (n, H_out)``, ``norm``, ``activation``.

    ``norm`` and ``activation`` are modules where they have parameters or buffers, else None. There is no forward: a
    level runs as a whole.
    """

    def __init__(
        self,
        count: int,
        in_features: int,
        spec: LayerSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(count, spec.units, in_features, **where))
        self.bias = nn.Parameter(torch.empty(count, spec.units, **where)) if spec.bias else None
        self.norm: nn.Module | None = None
        if spec.norm == "batch":
            self.norm = StackedBatchNorm(count * spec.units, **where)
        elif spec.norm == "layer":
            self.norm = StackedLayerNorm(count, spec.units, **where)
        self.activation: nn.Module | None = None
        if spec.activation.name == "prelu":
            self.activation = StackedPReLU(count, init=spec.activation.value, **where)
        elif spec.activation.name == "dice":
            self.activation = StackedDice(count, spec.units, eps=spec.activation.value, **where)
        elif spec.activation.name == "row_dice":
            self.activation = StackedRowDice(count, eps=spec.activation.value, **where)
        self._is_bare = self.norm is None and self.activation is None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the linear layer per expert, within the bounds of ``nn.Linear``."""
        init_linear(self.weight, self.bias)

    def tensors(self) -> LayerTensors:
        """The differentiable tensors as they are now."""
        weight = tensor_of(self, "weight")
        assert weight is not None
        if self._is_bare:
            return LayerTensors(weight, tensor_of(self, "bias"), None, None, None)
        norm_weight = norm_bias = slope = None
        if self.norm is not None and not isinstance(self.norm, nn.Identity):  # in its place once it has been folded
            norm_weight, norm_bias = tensor_of(self.norm, "weight"), tensor_of(self.norm, "bias")
        if self.activation is not None:
            slope = tensor_of(self.activation, "weight" if isinstance(self.activation, StackedPReLU) else "alpha")
        return LayerTensors(weight, tensor_of(self, "bias"), norm_weight, norm_bias, slope)

    def state(self, batch: int) -> LayerState:
        """Settings and buffers at one call on ``batch`` rows."""
        dropout = self.spec.dropout if self.training else 0.0
        if self._is_bare:
            return LayerState(None, None, dropout) if dropout else NO_STATE
        dice = norm_state(self.activation.norm, batch) if isinstance(self.activation, StackedDice) else None
        return LayerState(norm_state(self.norm, batch), dice, dropout)

    def extra_repr(self) -> str:
        count, units, width = self.weight.shape
        spec = self.spec
        parts = [f"{count} x {width} -> {units}"]
        if not spec.bias:
            parts.append("bias=False")
        if self.activation is None and spec.activation.name != "identity":
            name, value = spec.activation
            parts.append(name if name != "leaky_relu" else f"{name}({value})")
        if spec.norm is not None and spec.norm_position == "after":
            parts.append("norm after activation")
        if spec.dropout:
            parts.append(f"dropout={spec.dropout}")
        return ", ".join(parts)


class ExpertBlock(Uncalled):
    """A run of experts of equal make-up, stacked: ``layers``. ``experts`` is their range ``(start, stop)``."""

    def __init__(
        self,
        experts: tuple[int, int],
        in_features: int,
        layers: tuple[LayerSpec, ...],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self.layers = stacked_layers(experts[1] - experts[0], in_features, layers, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"experts {self.experts[0]} to {self.experts[1] - 1}"


def stacked_layers(
    count: int,
    in_features: int,
    layers: tuple[LayerSpec, ...],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ModuleList:
    """The layers of ``count`` stacked MLPs."""
    modules = StackedModules()
    for spec in layers:
        modules.append(StackedLayer(count, in_features, spec, device=device, dtype=dtype))
        in_features = spec.units
    return modules


class OffsetStart(NamedTuple):
    """How the scalars that are added to weights begin: each uniform from ``low`` to ``high`` (equal: that value).

    Those that are not ``learned`` are constants: a buffer instead of a parameter.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    learned: bool = True


class Gate(Uncalled):
    """All gates of a level: hidden ``layers`` stacked over gated mixtures, one ``weight (G, K)`` and ``bias (G,)`` in
    the order of the mixtures, batch norm ``norm`` over the G logits, and ``offset``, one scalar per marked weight."""

    offset: Tensor | None

    def __init__(
        self,
        count: int,
        in_features: int,
        logits: int,
        spec: GateSpec,
        *,
        offset: OffsetStart,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = stacked_layers(count, in_features, spec.layers if count else (), **where)
        width = spec.units[-1] if spec.units else in_features
        self.weight = nn.Parameter(torch.empty(logits, width, **where)) if logits else None
        self.bias = nn.Parameter(torch.empty(logits, **where)) if logits and spec.bias else None
        self.norm: nn.Module | None = StackedBatchNorm(logits, **where) if logits and spec.logits_norm else None
        self.offset_start = offset
        if not offset.low:
            self.register_parameter("offset", None)
        elif offset.learned:
            self.offset = nn.Parameter(torch.empty(len(offset.low), **where))
        else:
            self.register_buffer("offset", torch.empty(len(offset.low), **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the last linear layer within the bounds of ``nn.Linear``, offsets as ``offset_start`` says."""
        if self.weight is not None:
            init_linear(self.weight, self.bias)
        if self.offset is not None:
            for place, (low, high) in enumerate(zip(*self.offset_start[:2], strict=True)):
                nn.init.uniform_(self.offset.detach()[place], low, high)

    def tensors(self) -> GateTensors:
        """The differentiable tensors of the gates' end as they are now."""
        norm_weight = norm_bias = None
        if self.norm is not None and not isinstance(self.norm, nn.Identity):
            norm_weight, norm_bias = tensor_of(self.norm, "weight"), tensor_of(self.norm, "bias")
        return GateTensors(
            tensor_of(self, "weight"), tensor_of(self, "bias"), norm_weight, norm_bias, tensor_of(self, "offset")
        )

    def extra_repr(self) -> str:
        if self.weight is None:
            return "static"
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]} logits" + (
            "" if self.bias is not None else ", bias=False"
        )


class LevelParts(Holder):
    """What a level holds: its make-up and its tensors, without the call."""

    topology: Topology
    expert_specs: tuple[MLPSpec, ...]
    gate_spec: GateSpec
    blocks: StackedModules
    gate: Gate
