"""What the tests of the kernels share: operands among NaN, mixtures in plain PyTorch, the bound on errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ple_fast import Topology
from ple_fast_kernels import Mixtures, Tile
from tests.helpers import assert_close

aten = torch.ops.aten

ACTIVATIONS: tuple[tuple[str, float], ...] = (
    ("identity", 0.0),
    ("relu", 0.0),
    ("leaky_relu", 0.01),
    ("leaky_relu", -0.5),
    ("gelu", 0.0),
    ("gelu_tanh", 0.0),
    ("silu", 0.0),
    ("tanh", 0.0),
    ("sigmoid", 0.0),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TILES: tuple[Tile | None, ...] = (None, Tile(16, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2, 2), Tile(32, 16, 32, 4, 2, 1))
"""Of products: the one that the library takes, and small ones, so that small sizes have several tiles and steps."""
ALIGNED, UNALIGNED = 64, 5
"""Elements before an operand: its address is a multiple of 16 bytes, as in a user's program, so that it is loaded by
wide copies and launched out of the cache of compiled kernels; or of nothing, so that neither is done."""
front = ALIGNED
"""Which of them ``guarded`` takes; the fixture ``alignment`` sets it."""


def values(
    *shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """Normal numbers that are the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def guarded(tensor: Tensor, gap: int = 0) -> Tensor:
    """The same numbers in a buffer of NaN: before them, after them and, with a ``gap``, between rows."""
    rows, inner = tensor.shape[0], tensor[0].numel()
    buffer = tensor.new_full((front + rows * (inner + gap) + 64,), float("nan"))
    strides = [1] * tensor.dim()
    for i in range(tensor.dim() - 2, -1, -1):
        strides[i] = strides[i + 1] * tensor.shape[i + 1]
    strides[0] = inner + gap
    view = buffer.as_strided(tensor.shape, strides, front)
    view.copy_(tensor)
    return view


def slots_first(tensor: Tensor) -> Tensor:
    """The same numbers ``(B, S, K)`` in memory ``(S, B, K)``, among NaN."""
    return guarded(tensor.transpose(0, 1).contiguous()).transpose(0, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: guarded(t),
    "gaps-between-rows": lambda t: guarded(t, 3),
    "slots-first": slots_first,
    "equal-rows": lambda t: guarded(t[:1]).expand(t.shape),
    "columns-of-a-wider-one": lambda t: torch.nn.functional.pad(t, (2, 3), value=float("nan"))[..., 2:-3],
}
"""Memory of an input ``(B, S, K)``; ``equal-rows`` has other numbers."""


def hold(
    name: str,
    actual: Tensor | None,
    expression: Callable[..., Any],
    *operands: Any,
    read: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """``err(actual) <= 2 err(expression in the dtype of the operands) + one unit`` against float64; float64: 1e-10.

    Operands may be tensors, sequences of tensors, or anything else, which goes as it is. ``read``: what the kernel is
    free to make of an operand as it reads it, such as ``tf32``.
    """
    assert actual is not None, name
    truth = expression(*(_double(operand) for operand in operands))
    if actual.dtype == torch.float64:
        assert_close(name, actual, truth, 1e-10)
        return
    plain = expression(*(_each(operand, read) for operand in operands) if read is not None else operands)
    assert actual.shape == truth.shape, f"{name}: expected {tuple(truth.shape)}, got {tuple(actual.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite: {actual}"
    low = next(o.dtype for o in operands if isinstance(o, Tensor))
    unit = torch.finfo(low).eps * (4 if low == torch.float32 else 1)  # the order of a float32 sum is free
    ours, theirs = actual.double() - truth, plain.double() - truth
    for kind, own, peer, size in zip(("max", "rms"), _sizes(ours), _sizes(theirs), _sizes(truth), strict=True):
        bound = 2 * peer + unit * size
        assert own <= bound, f"{name}: {kind} error {own:.3g}, plain PyTorch {peer:.3g}, bound {bound:.3g}"


def _sizes(t: Tensor) -> tuple[float, float]:
    return t.abs().max().item(), t.square().mean().sqrt().item()


def _each(operand: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(operand, Tensor):
        return change(operand) if operand.is_floating_point() else operand
    if isinstance(operand, list | tuple) and any(isinstance(o, Tensor) for o in operand):
        return [_each(o, change) for o in operand]
    return operand


def _double(operand: Any) -> Any:
    return _each(operand, Tensor.double)


def tf32(tensor: Tensor) -> Tensor:
    """A float32 tensor as TF32 holds it at the least: 10 bits of fraction, the others cut off."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32) if tensor.dtype == torch.float32 else tensor


def apply(z: Tensor, activation: tuple[str, float]) -> Tensor:
    """The activation in PyTorch."""
    name, value = activation
    if name == "leaky_relu":
        return F.leaky_relu(z, value)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda t: t,
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return functions[name](z)


def kept_of(z: Tensor, activation: tuple[str, float]) -> Tensor | None:
    """What backward reads of an activation with input ``z``: its output where that is enough."""
    name, value = activation
    if name == "identity":
        return None
    by_output = name in ("relu", "tanh", "sigmoid") or (name == "leaky_relu" and value > 0)
    return apply(z, activation) if by_output else z


def chain(d: Tensor, kept: Tensor | None, activation: tuple[str, float]) -> Tensor:
    """PyTorch's own backward of the activation."""
    name, value = activation
    if kept is None:
        return d
    if name == "leaky_relu":
        return aten.leaky_relu_backward(d, kept, value, value > 0)  # type: ignore[no-any-return]
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(d, kept, approximate="tanh" if name == "gelu_tanh" else "none")  # type: ignore[no-any-return]
    if name == "relu":
        return aten.threshold_backward(d, kept, 0)  # type: ignore[no-any-return]
    return getattr(aten, f"{name}_backward")(d, kept)  # type: ignore[no-any-return]


def linears(
    a: Tensor, weight: Tensor, bias: Tensor | None, slots: Sequence[int], activation: tuple[str, float]
) -> Tensor:
    """``f(a[:, slots[m]] @ weight[m].T + bias[m])`` for every member, ``(B, n, H)``."""
    outs = [F.linear(a[:, s], weight[m], None if bias is None else bias[m]) for m, s in enumerate(slots)]
    return apply(torch.stack(outs, 1), activation)


def mixtures_of(t: Topology) -> Mixtures:
    """The kernels' tables of a topology."""
    assert t.mixture_offset is not None
    sigmoid = tuple(kind == "sigmoid" for kind in t.mixture_kind or ())
    return Mixtures.build(
        t.num_experts, t.mixture_experts, t.logit_offset, t.mixture_offset, t.mixture_stop, t.mixture_output, sigmoid
    )


def num_offsets(t: Topology) -> int:
    """Learned scalars of a topology."""
    assert t.mixture_offset is not None
    return sum(map(sum, t.mixture_offset))


def softmaxes(t: Topology, logits: Tensor, temperature: float) -> Tensor:
    """Weights of all mixtures side by side, ``(B, W)``: softmaxes, sigmoids, 1 where a mixture is static."""
    assert t.mixture_kind is not None
    parts = []
    for o, mixed in enumerate(t.mixture_experts):
        first = t.logit_offset[o]
        own = logits[:, first : first + len(mixed)] if first >= 0 else logits.new_zeros(logits.shape[0], len(mixed))
        if t.mixture_kind[o] == "sigmoid":
            parts.append((own / temperature).sigmoid())
        else:
            parts.append((own / temperature).softmax(1) if first >= 0 else own + 1.0)
    return torch.cat(parts, 1)


def mix(t: Topology, p: Tensor, offset: Tensor | None, h: Tensor) -> Tensor:
    """``y_o = sum_i (p_oi + offset_oi) h_e``, e the i-th expert of o: summed in the dtype of ``p``, then as ``h``."""
    assert t.mixture_offset is not None
    column = scalar = 0
    ys = []
    for o, (mixed, marked) in enumerate(zip(t.mixture_experts, t.mixture_offset, strict=True)):
        y: Tensor | float = 0.0
        for i, (e, is_marked) in enumerate(zip(mixed, marked, strict=True)):
            weight = p[:, column]
            if is_marked:
                assert offset is not None
                weight = weight + offset[scalar].to(p.dtype)
                scalar += 1
            column += 1
            stops = t.mixture_stop is not None and t.mixture_stop[o][i]
            y = y + weight[:, None] * (h[:, e].detach() if stops else h[:, e]).to(p.dtype)
        assert isinstance(y, Tensor)
        ys.append(y)
    outputs = t.mixture_output or range(len(ys))
    sums = [torch.stack([y for y, own in zip(ys, outputs, strict=True) if own == o]).sum(0) for o in {*outputs}]
    return torch.stack(sums, 1).to(h.dtype)
