"""The exporters of old: traces and the older export to ONNX are PyTorch's operators for any batch, scripts refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import PLE
from ple_fast.torch_backend.mix import _cached_index
from tests.test_serving import TRUNKS, Model, assert_equal_to_pytorch, build, some

# Of checks of shapes, which are no part of the program, and of what PyTorch no longer recommends.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

QUICK = {("plain", True), ("batch-norm", False), ("layer-norm", False), ("dice", True)}


def alone(name: str, served: bool) -> nn.Module:
    module = build(name).trunk
    assert isinstance(module, nn.Module)
    return module.for_inference() if served else module  # type: ignore[operator]  # a trunk's method


@pytest.mark.parametrize(("name", "served"), some(QUICK, TRUNKS, (False, True)))
def test_a_traced_module_is_of_pytorchs_operators_for_any_batch(name: str, served: bool, tmp_path: Path) -> None:
    """Also the first trace of a process, when no table of the wiring is known yet."""
    for module in (alone(name, served), Model(alone(name, served), 4).eval()):
        _cached_index.cache_clear()
        traced: Any = torch.jit.trace(module, (torch.randn(5, 7),))
        kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
        assert kinds <= {"aten", "prim"}
        traced.save(tmp_path / "model.pt")
        assert_equal_to_pytorch(torch.jit.load(tmp_path / "model.pt"), module)
        assert_equal_to_pytorch(torch.jit.script(nn.Sequential(traced)), module)
        assert_equal_to_pytorch(torch.jit.freeze(traced), module)


@pytest.mark.parametrize(("name", "served"), some(QUICK, TRUNKS, (False, True)))
def test_the_older_export_to_onnx_serves_any_batch(name: str, served: bool) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    for module in (alone(name, served), Model(alone(name, served), 4).eval()):
        session = onnxruntime.InferenceSession(_exported(module, (torch.randn(5, 7),)))

        def run(x: Tensor, session: Any = session) -> Tensor:
            return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

        assert_equal_to_pytorch(run, module)


def _exported(module: nn.Module, arguments: tuple[Any, ...]) -> bytes:
    pytest.importorskip("onnx")
    file: Any = io.BytesIO()  # which the older exporter takes
    torch.onnx.export(module, arguments, file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    content: bytes = file.getvalue()
    return content


def test_the_older_export_to_onnx_takes_the_flag_for_gates() -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    ple = PLE(7, 2, expert_units=(6, 4), num_levels=1).eval()
    session = onnxruntime.InferenceSession(_exported(ple, (torch.randn(5, 7), {"return_gates": True})))
    x = torch.randn(9, 7)
    y, gates = ple(x, return_gates=True)
    found = session.run(None, {"x": x.numpy()})
    for own, expected in zip(found, [y, *gates[0]], strict=True):
        torch.testing.assert_close(torch.from_numpy(own), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrap", [lambda trunk: trunk, lambda trunk: trunk.levels[0], lambda trunk: Model(trunk, 4), nn.Sequential]
)
def test_a_script_is_refused_with_the_way_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = wrap(PLE(7, 2, expert_units=(6, 4)))
    with pytest.raises(
        TypeError, match=r"TorchScript can compile, got (PLE|ExtractionNetwork),.*use torch\.jit\.trace"
    ):
        torch.jit.script(module)


@pytest.mark.parametrize("flag", [torch.ones(3), torch.tensor(True)], ids=str)
def test_a_tensor_in_the_place_of_a_flag_is_refused(flag: Tensor) -> None:
    """What is meant for ``gate_input``, say."""
    ple = PLE(7, 2, expert_units=(6, 4))
    for module in (ple, ple.levels[0]):
        with pytest.raises(TypeError, match="return_gates: expected True or False, got a tensor of shape"):
            module(torch.randn(5, 7), return_gates=flag)
