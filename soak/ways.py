"""The ways to run a trial, each of which leaves outputs and gradients as an ordinary step does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ple_fast.torch_backend import prepared
from ple_fast.torch_backend.dropout import keep_mask
from ple_fast.torch_backend.table_in_use import limited
from soak.make_ups import Trial
from tests.helpers import FORMS, Run, by_route

SEED = 5
"""Of every mask of dropout."""
PLAIN = {"operator": "step", "functional": "step", "batched": "step", "compile": "step", "served": "inference"}
"""What the reference does where the fused module goes a way that must not change a result."""


class Step:
    """One run of one module: its own copies of the inputs, and what it is asked for."""

    def __init__(
        self, trial: Trial, module: nn.Module, leaves: Sequence[Tensor], gate_leaves: Sequence[Tensor] | None
    ) -> None:
        self.trial, self.module = trial, module
        self.own = [leaf.detach().clone().requires_grad_(trial.input_grad) for leaf in leaves]
        self.extra = [leaf.detach().clone().requires_grad_(trial.input_grad) for leaf in gate_leaves or ()]

    def outputs(self, call: Any = None, own: Sequence[Tensor] | None = None, extra: Sequence[Tensor] = ()) -> Any:
        """``y`` and all gates of one forward, through ``call`` and of other inputs where they are given."""
        trial = self.trial
        if own is None:
            own, extra = self.own, self.extra
        arguments = [FORMS[trial.form].build(list(own), trial.num_slots)]
        if extra:
            arguments.append(FORMS[trial.gate_form].build(list(extra), trial.num_slots))
        call = self.module if call is None else call
        with self.region():
            if not trial.ask_gates:
                return (call(*arguments),)
            y, gates = call(*arguments, return_gates=True)
        return y, *(gates if not gates or isinstance(gates[0], Tensor) else [g for row in gates for g in row])

    def region(self) -> AbstractContextManager[Any]:
        """Of autocast, if the trial has one."""
        trial = self.trial
        return nullcontext() if trial.autocast is None else torch.autocast(self.own[0].device.type, trial.autocast)

    def run(self, way: str) -> Run:
        """The trial by one of ``soak.make_ups.WAYS``; gradients of parameters land in ``.grad``."""
        if way in ("inference", "served"):
            no_grad = torch.inference_mode if self.trial.seed % 2 else torch.no_grad
            with no_grad():
                outs = self.outputs(self.module.for_inference() if way == "served" else None)  # type: ignore[operator]
        else:
            outs = getattr(self, f"_{way}")()
        return Run(outs[0], list(outs[1:]), [t.grad for t in self.own], [t.grad for t in self.extra])

    def _asked(self, outs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Outputs that a gradient comes from, each with its gradient."""
        generator = torch.Generator().manual_seed(2)
        pairs = []
        for place, out in enumerate(outs):
            d = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
            if self.trial.strided_cotangents:
                d = d.transpose(0, -1).contiguous().transpose(0, -1)
            if out.requires_grad and (place == 0 or self.trial.gates_enter_loss):
                pairs.append((out, d))
        return pairs

    def _wanted(self) -> list[Tensor]:
        return [t for t in (*self.own, *self.extra, *self.module.parameters()) if t.requires_grad]

    def _backward(self, outs: Sequence[Tensor], **how: Any) -> None:
        pairs = self._asked(outs)
        with self.region() if self.trial.backward_inside else nullcontext():
            torch.autograd.backward([out for out, _ in pairs], [d for _, d in pairs], **how)

    def _step(self) -> Any:
        outs = self.outputs()
        self._backward(outs)
        return outs

    def _twice(self) -> Any:
        outs = self.outputs()
        self._backward(outs, retain_graph=True)
        self._backward(outs)
        return outs

    def _checkpoint(self) -> Any:
        outs = checkpoint(self.outputs, use_reentrant=False)
        self._backward(outs)
        return outs

    def _operator(self) -> Any:
        with by_route("operator"):
            outs = self.outputs()
        self._backward(outs)
        return outs

    def _compile(self) -> Any:
        torch._dynamo.reset()
        outs = self.outputs(torch.compile(self.module, backend="eager"))
        self._backward(outs)
        torch._dynamo.reset()
        return outs

    def _double(self) -> Any:
        """Gradients of the sum of squares of all gradients."""
        outs, wanted = self.outputs(), self._wanted()
        pairs = self._asked(outs)
        if not pairs:
            return outs
        grads: Any = torch.autograd.grad(
            [out for out, _ in pairs], wanted, [d for _, d in pairs], create_graph=True, allow_unused=True
        )
        squares = [grad.square().sum() for grad in grads if grad is not None and grad.requires_grad]
        if squares:
            torch.stack(squares).sum().backward()
        return outs

    def _batched(self) -> Any:
        """Three gradients at once, which add up to the one that is asked for."""
        outs, wanted = self.outputs(), self._wanted()
        pairs = self._asked(outs)
        if pairs:
            parts = [torch.stack([2 * d, d * d.cos(), -d - d * d.cos()]) for _, d in pairs]
            grads: Any = torch.autograd.grad(
                [out for out, _ in pairs], wanted, parts, is_grads_batched=True, allow_unused=True
            )
            for tensor, grad in zip(wanted, grads, strict=True):
                tensor.grad = None if grad is None else grad.sum(0)
        return outs

    def _functional(self) -> Any:
        """``torch.func.vjp`` of the parameters and the inputs."""
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}

        def call(weights: dict[str, Tensor], own: list[Tensor], extra: list[Tensor]) -> tuple[Tensor, ...]:
            def module(*arguments: Any, **keywords: Any) -> Any:
                return torch.func.functional_call(self.module, weights, arguments, keywords)

            outs: tuple[Tensor, ...] = self.outputs(module, own, extra)
            return outs

        weights = {name: p.detach() for name, p in parameters.items()}
        vjp: Any = torch.func.vjp
        outs, pull = vjp(call, weights, [t.detach() for t in self.own], [t.detach() for t in self.extra])
        alike = [out.detach().requires_grad_() for out in outs]
        asked = {id(out): d for out, d in self._asked(alike)}
        grads, dx, dgate = pull(tuple(asked.get(id(out), torch.zeros_like(out)) for out in alike))
        for name, parameter in parameters.items():
            parameter.grad = grads[name]
        if self.trial.input_grad:
            for tensor, grad in zip((*self.own, *self.extra), (*dx, *dgate), strict=True):
                tensor.grad = grad
        return outs


class SeededDropout(nn.Module):
    """The dropout of one layer of the reference, with the mask that the fused layer draws."""

    def __init__(self, position: int, row: int, count: int, rate: float) -> None:
        super().__init__()
        self.position, self.row, self.count, self.rate = position, row, count, rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        whole = x.new_empty((x.shape[0], self.count, x.shape[1]))
        return x * keep_mask(SEED, self.position, 0, whole, self.rate)[:, self.row] / (1.0 - self.rate)


def drop_alike(fused: nn.Module, reference: nn.Module) -> None:
    """Gives the reference the masks of the fused module under ``settings_of``."""
    levels: Any = [(fused, reference)]
    if hasattr(fused, "levels"):
        levels = zip(fused.levels, reference.levels, strict=True)  # type: ignore[arg-type]
    for level, own in levels:
        plan = level._plan
        for mlp, block in zip(plan.blocks, level.blocks, strict=True):
            start, stop = block.experts
            for e in range(start, stop):
                _drop_alike(own.experts[e], mlp.position, e - start, stop - start)
        gated = level.topology.gated_mixtures
        for row, o in enumerate(gated):
            _drop_alike(own.gates[o][: len(plan.gate.layers)], plan.gate.position, row, len(gated))


def _drop_alike(layers: Any, position: int, row: int, count: int) -> None:
    for i, layer in enumerate(layers):
        if layer.spec.dropout:
            layer[-1] = SeededDropout(position + i, row, count, layer.spec.dropout).train(layer.training)


@contextmanager
def settings_of(trial: Trial) -> Iterator[None]:
    """One seed for all dropout, and the row blocks that the trial asks for."""
    step, limits = (4, {"block_values": 1}) if trial.row_blocks else (prepared.ROW_STEP, {})
    seed = torch.tensor(SEED)
    with (
        mock.patch.object(prepared, "ROW_STEP", step),
        limited(**limits),
        mock.patch("ple_fast.modules.network.draw_seed", return_value=seed),
        mock.patch("ple_fast.ops.operators.draw_seed", return_value=seed),
    ):
        yield
