"""Training in mixed precision: autocast, GradScaler, float32 master weights, casts once per region, loss curves."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ple_fast import PLE
from ple_fast.reference import PLEReference
from tests.helpers import assert_close, randomise

LOW = [torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"norm": "batch", "activation": "prelu", "gate_units": (5,)},
    "recompute": {"recompute": True, "norm": "layer"},
}


def build(**options: Any) -> PLE:
    ple = PLE(7, 2, expert_units=(6, 4), **options)
    randomise(ple)
    return ple


class Casts(TorchDispatchMode):
    """Counts casts of the parameters of a module to a lower precision."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.places = {p.data_ptr() for p in module.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in LOW:
            self.count += args[0].data_ptr() in self.places
        return func(*args, **kwargs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_weight_is_cast_once_per_region(options: dict[str, Any]) -> None:
    """Two forward passes and their backward take one cast per weight, as PyTorch's own operators do."""
    ple = build(**options)
    norms = sum("norm" in name for name, _ in ple.named_parameters())
    weights = sum(1 for _ in ple.parameters()) - norms
    x = torch.randn(40, 7)
    with Casts(ple) as casts:
        for _ in range(2):  # the second step casts again
            with torch.autocast("cpu", torch.bfloat16):
                loss = ple(x).float().square().mean() + ple(-x).float().square().mean()
            loss.backward()
        assert casts.count == 2 * weights
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = ple(x).float().square().mean() + ple(-x).float().square().mean()
        assert casts.count == 4 * weights
        loss.backward()
        assert casts.count == 4 * weights


def test_a_shared_cast_gives_the_gradients_of_two_casts() -> None:
    ple = build()
    x = torch.randn(2, 40, 7)
    grads = []
    for shares in (True, False):
        ple.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=shares):
            loss = sum(ple(part).float().square().mean() for part in x)
        assert isinstance(loss, Tensor)
        loss.backward()
        grads.append([p.grad for p in ple.parameters()])
    for name, ours, expected in zip(dict(ple.named_parameters()), *grads, strict=True):
        assert_close(name, ours, expected, 1e-2)


def _outputs(ple: PLE, x: Tensor, change: Any, *, backward: bool) -> tuple[Tensor, Tensor]:
    """The output after a change of the weights while an older graph is alive, and that of a fresh copy."""
    with torch.autocast("cpu", torch.bfloat16):
        before = ple(x)
        if backward:
            before.float().square().mean().backward(retain_graph=True)
        change()
        after = ple(x)
        return after, copy.deepcopy(ple)(x)


@pytest.mark.parametrize(("through_data", "backward"), [(False, False), (False, True), (True, True)])
def test_changed_weights_are_cast_again(through_data: bool, backward: bool) -> None:
    ple, x = build(), torch.randn(40, 7)

    @torch.no_grad()
    def change() -> None:
        for parameter in ple.parameters():
            (parameter.data if through_data else parameter).mul_(1.5)

    after, expected = _outputs(ple, x, change, backward=backward)
    assert torch.equal(after, expected)


def test_casts_are_not_kept() -> None:
    """Nothing stays in memory between steps, nor where no gradient is taken."""
    ple, x = build(), torch.randn(40, 7)

    def low() -> int:
        gc.collect()
        own = [o for o in gc.get_objects() if isinstance(o, Tensor) and o.dtype == torch.bfloat16]
        return len(own)

    before = low()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            ple(x)
        assert low() == before
        ple(x).float().sum().backward()
    assert low() == before


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_with_a_scaler(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Master weights, their gradients and the gates' softmax are float32; the scaled step is the unscaled one."""
    ple = build(**options)
    other = copy.deepcopy(ple)
    x, target = torch.randn(40, 7), torch.randn(40, 2, 4)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ple, other)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        for module in (ple, other):
            with torch.autocast("cpu", dtype):
                y, gates = module(x, return_gates=True)
                loss = (y.float() - target).square().mean()
            assert y.dtype == dtype
            assert {g.dtype for level in gates for g in level} == {torch.float32}
            assert all(bool(((g.sum(1) - 1).abs() < 1e-6).all()) for level in gates for g in level)
            (scaler.scale(loss) if module is ple else loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        for (name, p), q in zip(ple.named_parameters(), other.parameters(), strict=True):
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32
            assert_close(name, p, q, 2e-3)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**10


def test_a_scaler_skips_a_step_that_overflows() -> None:
    ple = build()
    before = copy.deepcopy(ple.state_dict())
    optimizer = torch.optim.SGD(ple.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        loss = ple(torch.randn(40, 7)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    for name, tensor in ple.state_dict().items():
        assert torch.equal(tensor, before[name]), name


STEPS, WINDOW = 500, 20


def _curve(module: nn.Module, dtype: torch.dtype | None, seed: int) -> Tensor:
    """The losses of a run of 500 steps, averaged over windows of 20."""
    generator = torch.Generator().manual_seed(100 + seed)
    teacher = torch.randn(16, 2, generator=generator)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(128, 16, generator=generator)
        target = torch.tanh(x @ teacher)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = module(x)
            loss = (y.float().mean(2) - target).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).view(-1, WINDOW).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_loss_curve_stays_within_the_spread_of_pytorch(dtype: torch.dtype) -> None:
    """How far autocast leads a run of 500 steps away from the float32 run: ours no further than plain PyTorch."""
    gaps: dict[str, list[Tensor]] = {"ours": [], "plain": []}
    for seed in range(4):
        torch.manual_seed(seed)
        ple = PLE(16, 2, expert_units=(32, 16), activation="gelu")
        for name, module in (("ours", ple), ("plain", PLEReference.like(ple))):
            exact = _curve(copy.deepcopy(module), None, seed)
            assert exact[-1] < 0.5 * exact[0]  # it learns
            gaps[name].append((_curve(copy.deepcopy(module), dtype, seed) - exact) / exact)
    ours, plain = (torch.stack(gaps[name]) for name in ("ours", "plain"))
    assert bool(plain.any())
    spread = plain.square().mean().sqrt()
    assert ours.square().mean().sqrt() <= 1.5 * spread
    assert ours.abs().max() <= 2 * plain.abs().max()
