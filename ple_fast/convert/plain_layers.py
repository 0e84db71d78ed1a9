"""Reads ordinary stacks of ``torch.nn`` modules as layers of an expert or a gate, or says which one it cannot read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..modules.plain import Temperature, TopK, WeightOffset
from ..specs import Activation, LayerSpec, parse_activation
from .dices import dice_fault, dice_norm, is_dice, row_dice_eps

PACKABLE = (
    "pack takes Linear, BatchNorm1d, LayerNorm, Dropout, Identity and the activations ReLU, LeakyReLU, PReLU, GELU, "
    "SiLU, Tanh, Sigmoid, Dice and RowDice, nested in Sequential, ModuleList or lists"
)
ORDER = "each layer is Linear, then [norm], activation, [norm] (one norm at most), then Dropout"
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
HINTS: dict[type, str] = {
    nn.SyncBatchNorm: "pack with BatchNorm1d, and call convert_sync_batchnorm on the packed level",
}


def kind(module: Any) -> str:
    """Name of a module's class."""
    return type(module).__name__


@dataclass
class PlainLayer:
    """One layer of an ordinary stack: its modules, and its make-up."""

    linear: nn.Linear
    paths: dict[str, str]
    """Of the modules, by role."""
    norm: nn.BatchNorm1d | nn.LayerNorm | None = None
    activation: nn.Module | None = None
    dropout: nn.Dropout | None = None
    norm_after: bool = False
    identity: bool = False
    """An Identity stands in the place of the activation."""

    @property
    def path(self) -> str:
        """Of the linear layer."""
        return self.paths["linear"]

    @property
    def dice_norm(self) -> nn.BatchNorm1d | None:
        """The batch norm of a dice."""
        return None if self.activation is None else dice_norm(self.activation)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold tensors, by the roles of ``modules.unpack.Part``."""
        found = {"linear": self.linear, "norm": self.norm, "activation": self.activation, "dice_norm": self.dice_norm}
        return {role: module for role, module in found.items() if module is not None}

    @property
    def training(self) -> bool:
        """The mode that the stacked layer takes: dropout's, which alone reads it."""
        return self.linear.training if self.dropout is None else self.dropout.training

    @property
    def spec(self) -> LayerSpec:
        """The make-up."""
        activation = Activation("identity")
        if self.dice_norm is not None:
            activation = Activation("dice", self.dice_norm.eps)
        elif self.activation is not None:
            eps = row_dice_eps(self.activation)
            activation = parse_activation(self.activation) if eps is None else Activation("row_dice", eps)
        return LayerSpec(
            self.linear.out_features,
            activation,
            None if self.norm is None else "layer" if isinstance(self.norm, nn.LayerNorm) else "batch",
            "after" if self.norm_after else "before",
            self.linear.bias is not None,
            0.0 if self.dropout is None else self.dropout.p,
        )


@dataclass
class PlainStack:
    """An expert, or a gate with what may follow its last linear layer."""

    path: str
    layers: list[PlainLayer] = field(default_factory=list)
    temperature: float = 1.0
    top_k: int | None = None
    softmax: bool = False
    offset: WeightOffset | None = None

    @property
    def ends_plainly(self) -> bool:
        """Whether nothing stands between the logits and their softmax."""
        return self.temperature == 1.0 and self.top_k is None


def refuse(path: str, module: Any, why: str) -> NoReturn:
    """Raise the error that names a module."""
    raise ValueError(f"{path}: {kind(module)}: {why}")


def leaves(path: str, module: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a stack in the order in which they run, each with its path.

    Raises:
        TypeError: something is no module.
        ValueError: a module has hooks, parametrizations or a forward that cannot be looked into.
    """
    if isinstance(module, (list, tuple)):
        for i, child in enumerate(module):
            yield from leaves(f"{path}[{i}]", child)
        return
    if not isinstance(module, nn.Module):
        raise TypeError(f"{path}: expected a torch.nn.Module or a list of them, got {kind(module)}")
    check_bare(path, module)
    if type(module).forward in (nn.Sequential.forward, nn.Module.forward):
        if module._parameters or module._buffers:
            names = [*module._parameters, *module._buffers]
            refuse(path, module, f"has tensors of its own ({', '.join(names)}), which its children cannot read")
        # Not named_children: it leaves out a module that stands in the stack for a second time.
        for name, child in module._modules.items():
            if child is not None:
                yield from leaves(f"{path}.{name}", child)
        return
    yield path, module


def check_bare(path: str, module: nn.Module) -> None:
    """No hook, no parametrization and no replaced forward, which the packed level would silently lose."""
    if is_parametrized(module):
        refuse(path, module, "is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        refuse(path, module, "has no weights yet; run the model once, so that it becomes an ordinary layer")
    hooks = [name for name in HOOKS if getattr(module, name, None)]
    if hooks:
        names = ", ".join(name.strip("_") for name in hooks)
        refuse(path, module, f"has hooks ({names}) that would no longer be called; remove them (and weight_norm) first")
    if "forward" in vars(module):
        refuse(path, module, "its forward was replaced on the instance; restore it first")
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)):
            refuse(path, module, f"{name} has gradient hooks that would no longer be called; remove them first")
        if isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter:
            refuse(path, module, f"{name} is a {kind(tensor)}, and only a plain Parameter can be stacked")


def parse(path: str, module: Any, *, gate: bool = False) -> PlainStack:
    """The layers of a stack, checked for what a fused level can represent.

    Raises:
        TypeError: something is no module.
        ValueError: a module cannot be packed; the message has its path, and says what can.
    """
    stack, reader = PlainStack(path), _Reader(gate)
    for where, leaf in leaves(path, module):
        reader.read(stack, where, leaf)
    return stack


class _Reader:
    """Appends one module after the other to a stack."""

    def __init__(self, gate: bool) -> None:
        self.gate = gate

    def read(self, stack: PlainStack, path: str, module: nn.Module) -> None:
        if type(module) is nn.Dropout and module.p == 0:
            return
        if type(module) is nn.Identity:
            if stack.layers and stack.layers[-1].norm is None:
                stack.layers[-1].identity = True
            return
        if type(module) is WeightOffset:
            self._offset(stack, path, module)
            return
        layer = stack.layers[-1] if stack.layers else None
        if stack.offset is not None or stack.softmax:
            refuse(path, module, "stands after the softmax of the gate, where only WeightOffset can")
        if type(module) is nn.Linear:
            self._linear(stack, path, module)
        elif layer is None and isinstance(module, (*ACTIVATIONS, nn.BatchNorm1d, nn.LayerNorm, nn.Dropout)):
            refuse(path, module, f"stands before the first Linear; {ORDER}")
        elif layer is not None and type(module) in (nn.BatchNorm1d, nn.LayerNorm):
            self._norm(layer, path, module)  # type: ignore[arg-type]  # one of the two
        elif layer is not None and type(module) is nn.Dropout:
            self._dropout(layer, path, module)
        elif layer is not None and type(module) in ACTIVATIONS:
            self._activation(layer, path, module)
        elif layer is not None and is_dice(module):
            self._dice(layer, path, module)
        elif layer is not None and self.gate and type(module) in (nn.Softmax, Temperature, TopK):
            self._end(stack, path, module)
        else:
            _refuse_unknown(path, module, self.gate)

    def _linear(self, stack: PlainStack, path: str, linear: nn.Linear) -> None:
        if not stack.ends_plainly:
            refuse(path, linear, f"stands after the {'temperature' if stack.top_k is None else 'choice'} of the gate")
        if stack.layers and stack.layers[-1].linear.out_features != linear.in_features:
            width = stack.layers[-1].linear.out_features
            refuse(path, linear, f"expected in_features={width}, the width before it, got {linear.in_features}")
        stack.layers.append(PlainLayer(linear, {"linear": path}))

    def _norm(self, layer: PlainLayer, path: str, norm: nn.BatchNorm1d | nn.LayerNorm) -> None:
        units = layer.linear.out_features
        if layer.norm is not None or layer.dropout is not None:
            refuse(path, norm, f"{ORDER}; a {'norm' if layer.norm is not None else 'Dropout'} stands before it")
        if isinstance(norm, nn.BatchNorm1d):
            if norm.num_features != units:
                refuse(path, norm, f"expected num_features={units}, the width before it, got {norm.num_features}")
            if norm.running_mean is None:
                refuse(path, norm, "has no running statistics; build it with track_running_stats=True")
        elif tuple(norm.normalized_shape) != (units,):
            refuse(path, norm, f"expected normalized_shape=({units},), the last axis, got {norm.normalized_shape}")
        if any(tensor is None for tensor in (norm.weight, norm.bias)):
            refuse(path, norm, "has no weight or bias; give it weight 1 and bias 0, frozen, which compute the same")
        layer.norm, layer.paths["norm"] = norm, path
        layer.norm_after = layer.activation is not None or layer.identity

    def _activation(self, layer: PlainLayer, path: str, activation: nn.Module) -> None:
        if layer.activation is not None or layer.dropout is not None:
            before = kind(layer.activation if layer.activation is not None else layer.dropout)
            refuse(path, activation, f"{ORDER}; a {before} stands before it")
        if isinstance(activation, nn.PReLU) and activation.num_parameters != 1:
            refuse(path, activation, f"expected one slope, got num_parameters={activation.num_parameters}")
        layer.activation, layer.paths["activation"], layer.paths["dice_norm"] = activation, path, path
        # What an Identity seemed to say is void: the norm stands before a real activation.
        layer.norm_after = False

    def _dice(self, layer: PlainLayer, path: str, dice: nn.Module) -> None:
        for name, child in dice.named_children():
            check_bare(f"{path}.{name}", child)
        why = dice_fault(dice, layer.linear.out_features)
        if why is not None:
            refuse(path, dice, why)
        self._activation(layer, path, dice)

    def _dropout(self, layer: PlainLayer, path: str, dropout: nn.Dropout) -> None:
        if layer.dropout is not None:
            refuse(path, dropout, f"{ORDER}; a Dropout stands before it")
        if dropout.p >= 1.0:
            refuse(path, dropout, "expected a probability below 1, got 1: nothing would pass")
        layer.dropout, layer.paths["dropout"] = dropout, path

    def _end(self, stack: PlainStack, path: str, module: nn.Module) -> None:
        if type(stack.layers[-1].activation) is nn.Sigmoid:
            refuse(path, module, "stands after the Sigmoid of the gate, where only WeightOffset can")
        if isinstance(module, Temperature):
            stack.temperature *= module.value
        elif isinstance(module, TopK):
            if stack.top_k is not None:
                refuse(path, module, "expected once in a gate")
            stack.top_k = module.k
        else:
            assert isinstance(module, nn.Softmax)
            if module.dim not in (1, -1):
                refuse(path, module, f"expected dim=1 or dim=-1, the experts' axis, got dim={module.dim}")
            stack.softmax = True

    def _offset(self, stack: PlainStack, path: str, offset: WeightOffset) -> None:
        ended = not stack.layers or stack.softmax or type(stack.layers[-1].activation) is nn.Sigmoid
        if not self.gate or stack.offset is not None or not ended:
            refuse(path, offset, "expected once, at the end of a gate, after its Softmax")
        stack.offset = offset


def _refuse_unknown(path: str, module: nn.Module, gate: bool) -> NoReturn:
    for known in (nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.Dropout, *ACTIVATIONS):
        if isinstance(module, known):
            refuse(
                path, module, f"is a subclass of {known.__name__}, whose forward may compute something else; use "
                f"{known.__name__} itself",
            )  # fmt: skip
    if type(module) in HINTS:
        refuse(path, module, HINTS[type(module)])
    if isinstance(module, nn.Softmax) and not gate:
        refuse(path, module, f"only a gate ends in a softmax; {PACKABLE}")
    if any(True for _ in module.children()):
        refuse(path, module, f"has a forward of its own, which pack cannot look into; pass the stack in it. {PACKABLE}")
    refuse(path, module, f"cannot be packed; {PACKABLE}")
