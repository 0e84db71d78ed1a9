"""Slots scaled element by element: both backends against float64, shapes, layouts, dtypes, transforms, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import last_backend, use_backend
from ple_fast.functional import scaled

FORMS = ("shared x", "x per slot", "shared scale", "one slot", "neither has slots")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operands(
    form: str, rows: int, slots: int, units: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``x`` and ``scale``."""
    generator = torch.Generator().manual_seed(rows + slots + units)
    slots = 1 if form == "one slot" else slots
    x_shape = (rows, units) if form in ("shared x", "neither has slots") else (rows, slots, units)
    s_shape = (rows, units) if form in ("shared scale", "neither has slots") else (rows, slots, units)
    x, scale = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (x_shape, s_shape))
    return x.to(device, dtype).requires_grad_(), scale.to(device, dtype).requires_grad_()


def truth(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """Row by row, slot by slot."""
    if x.dim() == scale.dim() == 2:
        return torch.stack([factor * a * s for a, s in zip(x, scale, strict=True)]) if len(x) else x * scale
    slots = x.shape[1] if x.dim() == 3 else scale.shape[1]
    parts = [
        factor * (x[:, j] if x.dim() == 3 else x) * (scale[:, j] if scale.dim() == 3 else scale) for j in range(slots)
    ]
    return torch.stack(parts, 1)


def held(name: str, found: Tensor, expected: Tensor, sums: int) -> None:
    """Rounded once: half a unit of the result, and of what float32 loses in sums."""
    unit = torch.finfo(found.dtype).eps
    assert found.shape == expected.shape, name
    wide = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
    bound = expected.abs() * unit * 0.51 + wide * 4 * sums + (1e-7 if found.dtype == torch.float16 else 0.0)
    assert bool(((found.double() - expected).abs() <= bound).all()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "slots", "units"), [(1, 3, 5), (7, 2, 1), (70, 3, 33), (3, 4, 300), (0, 2, 4)])
def test_results_and_gradients_are_rounded_once(
    rows: int, slots: int, units: int, form: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x, scale = operands(form, rows, slots, units, dtype, device)
    wide = x.detach().cpu().double().requires_grad_(), scale.detach().cpu().double().requires_grad_()
    y, expected = scaled(x, scale, factor=0.7), truth(*wide, 0.7)
    chosen = last_backend()
    assert chosen is not None and chosen.name == (backend if rows else "torch")
    held("y", y.cpu(), expected.detach(), 1)
    # Of the dtype's numbers, so that both get the same.
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(y, [x, scale], dy.to(device))
    for name, own, other in zip(("dx", "dscale"), found, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        held(name, own.cpu(), other, slots * 4)


@pytest.mark.parametrize("layout", ["columns", "slots first", "strided", "equal rows", "equal slots"])
def test_any_layout_is_read(layout: str, backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, 20, generator=generator, dtype=torch.float64).to(device)
    x: Any = {
        "columns": lambda: base[:, :, 3:10],
        "slots first": lambda: base[:, :, :7].transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda: base[:, :, ::2],
        "equal rows": lambda: base[:1].expand(6, 4, 20),
        "equal slots": lambda: base[:, :1].expand(6, 4, 20),
    }[layout]()
    scale = torch.rand(6, 4, x.shape[2], generator=generator, dtype=torch.float64).to(device)
    for first, second in ((x, scale), (scale, x)):
        leaves = first.clone().requires_grad_(), second.clone().requires_grad_()
        views = first.detach().requires_grad_(), second.detach().requires_grad_()
        y = scaled(*views)
        torch.testing.assert_close(y, truth(*leaves, 2.0), rtol=1e-15, atol=0)
        dy = torch.randn(4, 6, x.shape[2], generator=generator, dtype=torch.float64).to(device).transpose(0, 1)
        expected = torch.autograd.grad(truth(*leaves, 2.0), leaves, dy)
        for own, other in zip(torch.autograd.grad(y, views, dy), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-15, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_derivatives_and_batches_of_gradients(form: str, backend: str, device: torch.device) -> None:
    x, scale = operands(form, 3, 2, 4, torch.float64, device)
    assert torch.autograd.gradcheck(scaled, (x, scale), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(scaled, (x, scale), check_batched_grad=True)
    y = scaled(x, scale)
    rows = torch.eye(y.numel(), dtype=torch.float64, device=device).view(-1, *y.shape)
    batched = torch.autograd.grad(y, x, rows, is_grads_batched=True)[0]
    one = torch.stack([torch.autograd.grad(scaled(x, scale), x, row)[0] for row in rows])
    torch.testing.assert_close(batched, one, rtol=1e-15, atol=0)
    per_row = torch.func.vmap(lambda a, s: scaled(a.unsqueeze(0), s.unsqueeze(0)).squeeze(0))(x, scale)
    torch.testing.assert_close(per_row, y, rtol=1e-15, atol=0)
    tangent = torch.func.jvp(scaled, (x, scale), (x, scale))[1]
    torch.testing.assert_close(tangent, 2 * y, rtol=1e-15, atol=0)


def test_only_wanted_gradients_are_computed(backend: str, device: torch.device) -> None:
    x, scale = operands("shared x", 5, 3, 4, torch.float32, device)
    y = scaled(x, scale.detach())
    y.sum().backward()
    assert x.grad is not None and scale.grad is None
    torch.testing.assert_close(x.grad, 2 * scale.detach().sum(1))
    y = scaled(x.detach(), scale)
    y.sum().backward()
    torch.testing.assert_close(scale.grad, 2 * x.detach().unsqueeze(1).expand(5, 3, 4))
    with torch.inference_mode():
        assert not scaled(x, scale).requires_grad


def test_other_slots_never_see_what_is_not_finite(backend: str, device: torch.device) -> None:
    x, scale = operands("x per slot", 40, 3, 5, torch.float32, device)
    with torch.no_grad():
        scale[:, 1] = float("inf")
        x[:, 1] = 0.0
        scale[7] = float("nan")
    y = scaled(x, scale)
    assert bool(y[:, 1].isnan().all()) and bool(y[7].isnan().all())
    rest = torch.cat([y[:7], y[8:]])[:, [0, 2]]
    assert bool(rest.isfinite().all())


def test_dtypes_are_promoted_as_in_pytorch(backend: str, device: torch.device) -> None:
    x = torch.randn(4, 3, device=device, requires_grad=True)
    scale = torch.rand(4, 2, 3, device=device).bfloat16().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = scaled(x, scale)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, truth(x, scale.float(), 2.0))
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert scale.grad is not None and scale.grad.dtype == torch.bfloat16


def test_compiled_and_exported_it_is_operators_of_pytorch() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return scaled(x, scale)

    x, scale = operands("shared x", 6, 3, 4, torch.float32, torch.device("cpu"))
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        program = torch.export.export(Scaled(), (x, scale), dynamic_shapes=({0: rows}, {0: rows}))
        assert torch.equal(program.module()(x[:2], scale[:2]), scaled(x[:2], scale[:2]))
    assert all("ple_fast" not in str(node.target) for node in program.graph.nodes)
    compiled = torch.compile(Scaled(), backend="aot_eager", fullgraph=True)
    y = compiled(x, scale)
    torch.testing.assert_close(y, scaled(x, scale))
    for own, other in zip(
        torch.autograd.grad(y.sum(), [x, scale]), torch.autograd.grad(scaled(x, scale).sum(), [x, scale]), strict=True
    ):
        torch.testing.assert_close(own, other)
    traced = torch.jit.trace(Scaled(), (x, scale))
    torch.testing.assert_close(traced(x[:3], scale[:3]), scaled(x[:3], scale[:3]))


def test_each_pass_is_one_launch(device: torch.device) -> None:
    pytest.importorskip("triton")
    from ple_fast_kernels import launches

    x, scale = operands("shared x", 6, 3, 4, torch.float32, device)
    with use_backend("triton"):
        before = launches()
        y = scaled(x, scale)
        assert launches() == before + 1
        y.sum().backward()
        assert launches() == before + 2


@pytest.mark.parametrize(
    ("x", "scale", "factor", "words"),
    [
        (torch.ones(3, 4), torch.ones(3, 2, 5), 2.0, r"\(3, 4\) and \(3, 2, 5\)"),
        (torch.ones(3, 2, 4), torch.ones(3, 1, 4), 2.0, r"\(3, 2, 4\) and \(3, 1, 4\)"),
        (torch.ones(2, 4), torch.ones(3, 4), 2.0, r"\(2, 4\) and \(3, 4\)"),
        (torch.ones(4), torch.ones(4), 2.0, r"\(B, D\)"),
        (torch.ones(3, 4), torch.ones(3, 4), float("inf"), "factor: expected a finite number, got inf"),
        (torch.ones(3, 4), torch.ones(3, 4).to("meta"), 2.0, "expected device cpu like x, got meta"),
    ],
)
def test_what_does_not_fit_is_named(x: Tensor, scale: Tensor, factor: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scaled(x, scale, factor=factor)


@pytest.mark.parametrize(
    ("x", "factor", "words"),
    [
        (torch.ones(3, 4).long(), 2.0, "x: expected a dense floating tensor, got torch.int64"),
        (torch.ones(3, 4).to_sparse(), 2.0, "layout torch.sparse_coo"),
        ([[1.0]], 2.0, "x: expected a tensor, got list"),
        (torch.ones(3, 4), "2", "factor: expected a number, got '2'"),
    ],
)
def test_what_is_of_another_type_is_named(x: Any, factor: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        scaled(x, torch.ones(3, 4), factor=factor)
