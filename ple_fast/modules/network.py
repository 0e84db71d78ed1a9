"""One extraction network: parameters in blocks, and a forward that is one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor, nn

from ..checks import check_dtype
from ..functional import GateShares, Input, extraction_level, gate_shares
from ..plan import LevelPlan, joint_experts
from ..routes import must_see_operators
from ..scalars import as_tuple, check_count, check_flag, is_sequence, shown
from ..specs import GateSpec, MLPSpec
from ..state import NO_STATE, LevelState
from ..topology import Topology
from ..torch_backend.dropout import draw_seed
from .inference import for_inference
from .layers import ExpertBlock, Gate, LevelParts, OffsetStart, StackedLayer
from .norms import norm_state
from .symbolic import call_module, fixed, is_symbolic
from .uncalled import StackedModules
from .unpack import unpack


class CheckedModule(nn.Module):
    """A module that refuses the state of another configuration before it overwrites anything, and TorchScript."""

    def __prepare_scriptable__(self) -> NoReturn:
        """``torch.jit.script`` calls this on each module before it compiles any.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"torch.jit.script: expected modules that TorchScript can compile, got {type(self).__name__}, which runs "
            "as one call that TorchScript cannot read; use torch.jit.trace(module.for_inference(), (x,)), whose result "
            "is scripted like any other module, or torch.export (docs/serving.md)"
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch, but nothing is loaded where anything does not fit.

        Hooks of loading may rename entries or forgive missing ones: with such hooks PyTorch's own check is the only
        one, an error after what fits has been loaded.

        Raises:
            ValueError: entries of other shapes or, if ``strict``, missing or unexpected ones; every one is named.
        """
        if any(m._load_state_dict_pre_hooks or m._load_state_dict_post_hooks for m in self.modules()):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        own = self.state_dict()
        differences = [
            f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
            for name, value in state_dict.items()
            if name in own
            and isinstance(value, Tensor)
            and isinstance(own[name], Tensor)
            and value.shape != own[name].shape
        ]
        if strict:
            differences += [f"{name}: missing" for name in own if name not in state_dict]
            differences += [f"{name}: unexpected" for name in state_dict if name not in own]
        if differences:
            raise ValueError(
                f"load_state_dict: the state is that of another configuration than this {type(self).__name__}; nothing "
                "was loaded. Build the module with the configuration that was saved. Differences:\n  "
                + "\n  ".join(differences)
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _expert_specs(topology: Topology, experts: MLPSpec | Sequence[MLPSpec]) -> tuple[MLPSpec, ...]:
    """One spec per expert."""
    if isinstance(experts, MLPSpec):
        return (experts,) * topology.num_experts
    specs = as_tuple(experts) if is_sequence(experts) else ()
    if not is_sequence(experts) or not all(isinstance(spec, MLPSpec) for spec in specs):
        raise TypeError(
            f"experts: expected an MLPSpec, or one per expert, got {shown(experts)} ({type(experts).__name__})"
        )
    if len(specs) != topology.num_experts:
        raise ValueError(f"experts: expected one MLPSpec or {topology.num_experts}, one per expert, got {len(specs)}")
    widths = [spec.units[-1] for spec in specs]
    if len(set(widths)) > 1:
        raise ValueError(f"experts: expected one output width, because mixtures add them up; got {widths}")
    return specs


def _check_joint(topology: Topology, gate: GateSpec) -> None:
    """The gates can choose so many experts together."""
    common = len(joint_experts(topology))
    if gate.joint_k > common:
        raise ValueError(
            f"joint_k: expected at most {common}, the experts that every gate of the level weighs, got {gate.joint_k}"
        )


class ExtractionNetwork(CheckedModule, LevelParts):
    """One level (Tang et al., RecSys 2020, eq. 2-4): ``y_o = sum_{e in A(o)} softmax(gate_o(x_t(o)))_e MLP_e(x_s(e))``.

    Args:
        in_features: input width ``D``.
        topology: the wiring: which slot every expert and gate reads, which experts every mixture weighs.
        experts: one spec for all experts, or one per expert; all with the same last width ``H``.
        gate: spec of the gates.
        gate_features: width of what the gates read; default ``in_features``. Another width needs ``gate_input``.
        recompute: save inputs only, and run the forward again in backward: less memory, more time.
        device, dtype: of the parameters; float64, float32, bfloat16 or float16.

    Experts of equal spec that follow each other are one block: ``blocks.{j}.layers.{i}.weight (E_j, H_out, H_in)``,
    ``.bias (E_j, H_out)``. The gates end in one ``gate.weight (G, K)`` and ``gate.bias (G,)``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        topology: Topology,
        *,
        experts: MLPSpec | Sequence[MLPSpec],
        gate: GateSpec,
        gate_features: int | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _splits: Collection[int] = (),
        _offset: OffsetStart | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features = check_count("in_features", in_features)
        if not isinstance(topology, Topology):
            raise TypeError(f"topology: expected a Topology, got {shown(topology)} ({type(topology).__name__})")
        if not isinstance(gate, GateSpec):
            raise TypeError(f"gate: expected a GateSpec, got {shown(gate)} ({type(gate).__name__})")
        self.gate_features = in_features if gate_features is None else check_count("gate_features", gate_features)
        check_dtype("dtype", dtype)
        self.topology, self.gate_spec, self.recompute = topology, gate, check_flag("recompute", recompute)
        self.expert_specs = _expert_specs(topology, experts)
        _check_joint(topology, gate)
        where: dict[str, Any] = {"device": device, "dtype": dtype}

        # ``_splits``: experts that must begin a block although their spec equals that of the one before (see ``pack``).
        starts = [
            e for e, spec in enumerate(self.expert_specs) if e == 0 or e in _splits or spec != self.expert_specs[e - 1]
        ]
        ranges = list(zip(starts, [*starts[1:], topology.num_experts], strict=True))
        self.blocks = StackedModules(
            ExpertBlock((start, stop), in_features, self.expert_specs[start].layers, **where) for start, stop in ranges
        )
        assert topology.mixture_offset is not None
        zeros = (0.0,) * sum(map(sum, topology.mixture_offset))
        self.gate = Gate(
            len(topology.gated_mixtures),
            self.gate_features,
            topology.num_logits,
            gate,
            offset=OffsetStart(zeros, zeros) if _offset is None else _offset,
            **where,
        )
        self._plan = LevelPlan.build(
            topology, [(start, stop, self.expert_specs[start]) for start, stop in ranges], gate
        )
        self._backend: Literal["torch"] | None = None
        self._drops = any(any(spec.dropout) for spec in self.expert_specs) or any(gate.dropout)

    @property
    def out_features(self) -> int:
        """Output width ``H``."""
        return self.expert_specs[0].units[-1]

    def reset_parameters(self) -> None:
        """Initialise everything anew: experts and gates within the bounds of ``nn.Linear``, norms and slopes as new."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    def _stacked_layers(self) -> list[StackedLayer]:
        """Every layer in the order of the plan."""
        # Straight from the dicts: this runs at every call, and a small batch waits for it.
        modules: list[Any] = []
        for block in self.blocks._modules.values():
            modules += block._modules["layers"]._modules.values()  # type: ignore[union-attr]  # never None
        modules += self.gate._modules["layers"]._modules.values()  # type: ignore[union-attr]
        return modules

    @staticmethod
    def _seed(device: torch.device) -> Tensor:
        return draw_seed(device)

    def _state(self, stacked: list[StackedLayer], batch: int, backend: str) -> LevelState:
        """What one call on ``batch`` rows reads besides parameters; draws the dropout seed, for ``backend``."""
        layers = tuple([layer.state(batch) for layer in stacked])
        seed: int | Tensor | None = None
        # The layers' mode decides, not the level's: one may be in train mode alone (Monte Carlo dropout).
        drops = self._drops and any(layer.dropout for layer in layers)
        if drops and not must_see_operators(stacked[0].weight):
            on_device = backend == "triton"  # where a CUDA graph draws it anew, and nobody waits for it
            seed = self._seed(stacked[0].weight.device) if on_device else int(self._seed(torch.device("cpu")))
        return LevelState(layers, norm_state(self.gate.norm, batch), seed)

    @overload
    def forward(self, x: Input, gate_input: Input | None = None, *, return_gates: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Input, gate_input: Input | None = None, *, return_gates: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...
    @overload
    def forward(
        self, x: Input, gate_input: Input | None = None, *, return_gates: Literal["shares"]
    ) -> tuple[Tensor, GateShares]: ...
    def forward(
        self, x: Input, gate_input: Input | None = None, return_gates: bool | Literal["shares"] = False
    ) -> Tensor | tuple[Tensor, list[Tensor]] | tuple[Tensor, GateShares]:
        """Run the level.

        Args:
            x: ``(B, D)`` for all slots, ``(B, S, D)``, or a list of S tensors ``(B, D)``.
            gate_input: what the gates read, in the same forms and with its own width; default ``x``.
            return_gates: also return the weights of every mixture, ``(B, |A(o)|)`` float32, differentiable; or with
                ``"shares"`` the :class:`GateShares` that ``JointLoss(balance=...)`` reads, for which gates run twice.

        Returns:
            ``(B, O, H)``, and the list of weights (the shares) on request.

        Raises:
            TypeError, ValueError: an input does not fit, or batch norm in train mode got one row.
        """
        if isinstance(return_gates, str):
            return self._with_shares(x, gate_input, return_gates)
        if return_gates is not False:
            return_gates = fixed("return_gates", return_gates, False)
        if is_symbolic(x) or is_symbolic(gate_input):
            traced: Tensor = call_module(self, x, gate_input, **({"return_gates": True} if return_gates else {}))
            return traced
        stacked = self._stacked_layers()
        y, gates = extraction_level(
            x,
            gate_input,
            self._plan,
            [layer.tensors() for layer in stacked],
            self.gate.tensors(),
            partial(self._state, stacked),
            in_features=self.in_features,
            gate_features=self.gate_features,
            return_gates=return_gates,
            recompute=self.recompute,
            backend=self._backend,
        )
        if gates is None:
            return y
        return y, gates

    def _with_shares(self, x: Input, gate_input: Input | None, asked: str) -> tuple[Tensor, GateShares]:
        """The output, and the shares that gates take in the same state."""
        if asked != "shares":
            raise ValueError(f'return_gates: expected True, False or "shares", got {asked!r}')
        if is_symbolic(x) or is_symbolic(gate_input):
            raise TypeError('return_gates="shares": expected tensors, got the stand-ins of torch.fx')
        stacked = self._stacked_layers()
        tensors, gate = [layer.tensors() for layer in stacked], self.gate.tensors()
        states = [LevelState((NO_STATE,) * self._plan.num_layers, None, None)]

        def state(batch: int, backend: str) -> LevelState:
            states.append(self._state(stacked, batch, backend))
            return states[-1]

        y, _ = extraction_level(
            x,
            gate_input,
            self._plan,
            tensors,
            gate,
            state,
            in_features=self.in_features,
            gate_features=self.gate_features,
            recompute=self.recompute,
            backend=self._backend,
        )
        return y, gate_shares(x, gate_input, self._plan, tensors, gate, states[-1])

    @torch.inference_mode(False)  # what passes gradients on to its input could not be saved
    def for_inference(self, *, plain: bool = False) -> ExtractionNetwork:
        """A new level for deployment, in eval mode: same results as this one in eval mode, up to rounding.

        Batch norm becomes part of a linear layer: of its own where it stands before the activation, of the following
        one where it stands after. Behind the last activation of an expert, and inside dice, it stays. Nothing requires
        a gradient, drops or recomputes, and experts that only differed in such things are one block again. Tensors are
        copies.

        Args:
            plain: run, trace and export PyTorch's own operators, on a GPU too, whatever ``use_backend`` says.

        Raises:
            TypeError: somebody put a norm that is no batch norm in the place of ours.
            ValueError: a batch norm keeps no running statistics.
        """
        arguments, fill = for_inference(self)
        weight = self._stacked_layers()[0].tensors().weight
        level = ExtractionNetwork(
            self.in_features,
            self.topology,
            gate_features=self.gate_features,
            device="meta",  # nothing is drawn from the random stream; every element is written below
            dtype=weight.dtype,
            **arguments,
        ).to_empty(device=weight.device)
        fill(level)
        level._backend = "torch" if plain else self._backend
        return level.requires_grad_(False).eval()

    def unpack(self) -> tuple[list[nn.Sequential], list[nn.Sequential | None]]:
        """Ordinary modules that compute what this level computes: the experts, and the gate of every mixture.

        Weights and buffers are copies, bit for bit, with dtype, device, ``requires_grad`` and mode carried over; the
        gradients are not. A gate ends in its logits, in the order of ``topology.mixture_experts``; where the topology
        marks offsets it ends in the weights (softmax or sigmoid, then ``WeightOffset``). A static mixture has None, or
        its ``WeightOffset``, which adds to weights of 1. Which mixtures are sigmoids, and which are added into one
        output, the topology says; where it stops gradients, who adds up the experts has to detach them. ``pack`` is the
        way back.

        Raises:
            TypeError: somebody put another batch norm in the place of ours.
            ValueError: a part is parametrised, or the gates choose together (``joint_k``).
        """
        return unpack(self)

    def extra_repr(self) -> str:
        t = self.topology
        parts = [f"in_features={self.in_features}", f"slots={t.num_slots}", f"experts={t.num_experts}"]
        parts.append(f"mixtures={t.num_mixtures}")
        if t.mixture_output is not None:
            parts.append(f"outputs={t.num_outputs}")
        if self.gate_features != self.in_features:
            parts.append(f"gate_features={self.gate_features}")
        if self.recompute:
            parts.append("recompute=True")
        if self._backend is not None:
            parts.append("plain=True")
        return ", ".join(parts)
