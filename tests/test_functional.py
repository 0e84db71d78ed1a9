"""The operators for direct use, and the short path that few rows without gradients take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ple_fast.functional
from ple_fast import PLE, GateSpec, MLPSpec
from ple_fast.functional import gate_combine, grouped_linear
from ple_fast.reference import ExtractionNetworkReference
from ple_fast.torch_backend.few_rows import few_rows_forward, serves
from ple_fast.torch_backend.product_table import Limits
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, level, randomise


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["one", "stacked", "list", "list-of-one"])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_grouped_linear(batch: int, form: str, bias: bool) -> None:
    weight = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 4, dtype=torch.float64, requires_grad=True) if bias else None
    x = torch.randn(batch, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs: dict[str, Any] = {
        "one": x[:, 0],
        "stacked": x,
        "list": list(x.unbind(1)),
        "list-of-one": [x[:, 0]] * 3,
    }
    shared = form in ("one", "list-of-one")
    expected = torch.stack([
        torch.nn.functional.linear(x[:, 0 if shared else m], weight[m], None if b is None else b[m]) for m in range(3)
    ], dim=1)  # fmt: skip
    result = grouped_linear(inputs[form], weight, b)
    cotangent = torch.randn_like(expected)
    leaves = [t for t in (x, weight, b) if t is not None]
    assert_close("y", result, expected, 1e-12)
    ours = torch.autograd.grad(result, leaves, cotangent)
    for i, (a, e) in enumerate(zip(ours, torch.autograd.grad(expected, leaves, cotangent), strict=True)):
        assert_close(f"gradient {i}", a, e, 1e-12)


def test_grouped_linear_under_autocast() -> None:
    x, weight, bias = torch.randn(6, 5), torch.randn(3, 4, 5), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((6, 5), (4, 5), None), "weight.*(n, H, K)"),
        (((6, 4), (3, 4, 5), None), "x.*5.*4"),
        (((6, 2, 5), (3, 4, 5), None), "x.*3.*2"),
        (((6, 5), (3, 4, 5), (4,)), "bias.*3, 4"),
    ],
)
def test_grouped_linear_names_what_does_not_fit(shapes: tuple[Any, ...], words: str) -> None:
    x, weight, bias = (None if s is None else torch.randn(s) for s in shapes)
    assert x is not None and weight is not None
    with pytest.raises(ValueError, match=words.replace("(n, H, K)", r"\(n, H, K\)")):
        grouped_linear(x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gate_combine(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    h, weights = torch.randn(6, 3, 4).to(dtype), torch.randn(6, 2, 3).softmax(2).to(wide)
    result = gate_combine(h, weights)
    assert result.dtype == dtype
    expected = torch.einsum("boe,beh->boh", weights.double(), h.double())
    torch.testing.assert_close(result.double(), expected, atol=torch.finfo(dtype).eps * 8, rtol=torch.finfo(dtype).eps)


def test_gate_combine_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(6, 3, 4\).*\(6, 2, 5\)"):
        gate_combine(torch.randn(6, 3, 4), torch.randn(6, 2, 5))
    with pytest.raises(ValueError, match=r"\(B, E, H\)"):
        gate_combine(torch.randn(6, 3), torch.randn(6, 2, 3))


@pytest.fixture
def short_path(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call that took the short path."""
    calls: list[int] = []
    original = few_rows_forward

    def counting(plan: Any, layers: Any, gate: Any, x: torch.Tensor, state: Any) -> torch.Tensor:
        calls.append(x.shape[0])
        return original(plan, layers, gate, x, state)

    monkeypatch.setattr(ple_fast.functional, "few_rows_forward", counting)
    return calls


@pytest.mark.parametrize("gate", ["plain", "no-bias", "hidden", "temperature", "logits-norm"])
@pytest.mark.parametrize("experts", ["1-layer", "3-layers", "no-bias", "gelu", "negative-leaky", "prelu", "batch-norm"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_few_rows_equal_the_reference(topology: str, experts: str, gate: str, short_path: list[int]) -> None:
    wiring = TOPOLOGIES[topology]
    module = level(wiring, EXPERTS[experts], GATES[gate]).eval()
    reference = ExtractionNetworkReference.like(module)
    slots, expected_calls = wiring.num_slots or 1, []
    for shape in [(1, 7), (1, slots, 7), (Limits().few_rows - 1, 7), (3, slots, 7), (Limits().few_rows, 7)]:
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            assert_close(f"y of {shape}", module(x), reference(x), 1e-12)
        if shape[0] < Limits().few_rows and serves(module._plan, len(shape) == 3, trains=False):
            expected_calls.append(shape[0])
    assert short_path == expected_calls
    if topology in ("ple", "mmoe") and experts in ("1-layer", "gelu") and gate in ("plain", "no-bias"):
        assert expected_calls, "the usual make-up takes the short path"


def test_the_short_path_is_for_calls_without_gradients(short_path: list[int]) -> None:
    module = PLE(5, 2, expert_units=(6, 4))
    randomise(module)
    x = torch.randn(2, 5)
    assert module(x).requires_grad
    with torch.no_grad():
        y, gates = module(x, return_gates=True)
    assert short_path == []
    with torch.inference_mode():
        assert torch.allclose(module(x), y, atol=1e-6)
    assert short_path == [2, 2] and len(gates) == 2
    assert torch.equal(torch.func.functional_call(module, {}, (x,)).detach(), module(x).detach())


def test_the_short_path_reads_parameters_as_they_are() -> None:
    """Nothing derived from a weight is kept: not after a step, not after ``.data``, not after a conversion."""
    module = level(TOPOLOGIES["ple-even"], MLPSpec((6, 4)), GateSpec()).eval()
    x = torch.randn(1, 7, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        for parameter in module.parameters():
            parameter.data = parameter.data * 1.5
        changed = module(x)
        assert_close("y", changed, ExtractionNetworkReference.like(module)(x), 1e-12)
        assert not torch.equal(before, changed)
        assert module.float()(x.float()).dtype == torch.float32
