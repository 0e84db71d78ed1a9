"""Deployment: export, save and load, ONNX, AOTInductor from Python and from C++; every result is that of PyTorch."""

from __future__ import annotations

import itertools
import operator
import os
import subprocess
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import include_paths

from ple_fast import PLE, STEM, ExtractionNetwork, GateSpec, HoME, MLPSpec, Topology
from tests.helpers import GATES, TOPOLOGIES, assert_close, level, randomise

ROOT = Path(__file__).parents[1]
ROWS = (1, 7, 4096)


class Model(nn.Module):
    """A trunk and towers."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.towers = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([tower(y) for tower, y in zip(self.towers, self.trunk(x).unbind(1), strict=True)], 1)


def _trunk(topology: str, experts: MLPSpec, gate: str) -> PLE:
    return PLE.from_levels([level(TOPOLOGIES[topology], experts, GATES[gate], dtype=torch.float32)], num_tasks=2)


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: PLE(7, 2, expert_units=(6, 4)),
    "batch-norm": lambda: PLE(7, 2, expert_units=(6, 4), norm="batch", activation="gelu", gate_units=(5,)),
    "dice": lambda: _trunk("ple-even", MLPSpec((6, 4), "dice", norm="layer"), "hidden-prelu-dice"),
    "prelu": lambda: _trunk("ple-even", MLPSpec((6, 4), "prelu", norm="batch", norm_position="after"), "everything"),
    "layer-norm": lambda: PLE(7, 2, expert_units=(6, 4), norm="layer", activation="silu", shared_gate_scope="shared"),
    "static": lambda: ExtractionNetwork(7, Topology.single_task(2), experts=MLPSpec((6, 4)), gate=GateSpec()),
    "home": lambda: HoME(7, 2, groups=[[0], [1]], task_experts=[1, 2], expert_units=(6, 4), feature_gate_rank=3),
    "stem": lambda: STEM(7, 2, num_levels=2, task_experts=[1, 2], expert_units=(6, 4), gate_units=(5,)),
    "offsets": lambda: _trunk("adatt", MLPSpec((6, 4), "leaky_relu"), "temperature"),
}


def build(name: str) -> Model:
    torch.manual_seed(0)
    model = Model(TRUNKS[name](), 4)
    randomise(model)
    return model.eval()


def exported(model: nn.Module, *, strict: bool = False) -> torch.export.ExportedProgram:
    """A program for any number of rows."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (torch.randn(5, 7),), dynamic_shapes=({0: batch},), strict=strict)


def assert_equal_to_pytorch(run: Callable[[Tensor], Tensor], model: nn.Module) -> None:
    for rows in ROWS:
        x = torch.randn(rows, 7)
        with torch.no_grad():
            assert_close(f"{rows} rows", run(x), model(x), 1e-5)


def some(quick: Collection[Any], *axes: Iterable[Any]) -> list[Any]:
    """Every combination; those that are not in ``quick`` are slow."""
    return [
        pytest.param(*row, marks=() if row in quick else pytest.mark.slow, id="-".join(map(str, row)))
        for row in itertools.product(*axes)
    ]


@pytest.mark.parametrize(
    ("name", "strict"), some({("plain", False), ("dice", False), ("batch-norm", True)}, TRUNKS, (False, True))
)
def test_export_save_and_load(name: str, strict: bool, tmp_path: Path) -> None:
    model = build(name)
    program = exported(model, strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(t is operator.getitem or str(t).startswith("aten.") for t in targets)
    assert_equal_to_pytorch(program.module(), model)
    torch.export.save(program, tmp_path / "model.pt2")
    assert_equal_to_pytorch(torch.export.load(tmp_path / "model.pt2").module(), model)


def test_an_export_in_train_mode_trains(tmp_path: Path) -> None:
    """Gradients flow through a program that is loaded, and batch norm moves its statistics."""
    model = build("batch-norm").train()
    torch.export.save(exported(model), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(9, 7)
    for module in (loaded, model):
        module(x).square().sum().backward()
    own, state = dict(loaded.named_parameters()), loaded.state_dict()
    for name, parameter in model.named_parameters():
        assert_close(name, own[name].grad, parameter.grad, 1e-4)
    for name, buffer in model.named_buffers():
        assert_close(name, state[name], buffer, 1e-5)


@pytest.mark.parametrize(
    ("name", "folded"), some({("prelu", False), ("dice", False), ("batch-norm", True)}, TRUNKS, (False, True))
)
def test_onnx(name: str, folded: bool, tmp_path: Path) -> None:
    """By the dynamo exporter, run in onnxruntime."""
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(name)
    served = Model(model.trunk.for_inference(), 4) if folded else model  # type: ignore[operator]  # a trunk's method
    served.towers = model.towers
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        served.eval(), (torch.randn(5, 7),), file, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False,
        input_names=["x"],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert_equal_to_pytorch(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A package of AOTInductor, and the module that it was made of."""
    torch.manual_seed(0)
    model = PLE(7, 2, expert_units=(6, 4), norm="batch", gate_units=(5,), activation="prelu")
    randomise(model)
    file = tmp_path_factory.mktemp("aoti") / "model.pt2"
    program = exported(model.for_inference(plain=True))
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return file, model.eval()


@pytest.mark.slow
def test_aot_inductor_from_python(package: tuple[Path, nn.Module]) -> None:
    file, model = package
    loaded = torch._inductor.aoti_load_package(str(file))
    assert_equal_to_pytorch(loaded, model)


def compile_cpp(program: Path) -> None:
    """The example as a program, by the compiler that inductor needs too."""
    lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        [
            os.environ.get("CXX", "g++"),
            "-std=c++20",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-isystem{folder}" for folder in include_paths()),
            str(ROOT / "examples" / "serving" / "serve.cpp"),
            *(
                "-o",
                str(program),
                f"-L{lib}",
                f"-Wl,-rpath,{lib}",
                "-Wl,--no-as-needed",
                "-ltorch",
                "-ltorch_cpu",
                "-lc10",
            ),
        ],
        check=True,
    )


@pytest.mark.slow
def test_aot_inductor_from_cpp(package: tuple[Path, nn.Module], tmp_path: Path) -> None:
    file, model = package
    program, given, found = tmp_path / "serve", tmp_path / "input.f32", tmp_path / "output.f32"
    compile_cpp(program)

    def run(x: Tensor) -> Tensor:
        x.numpy().tofile(given)
        subprocess.run([program, file, "7", given, found], check=True)
        return torch.from_file(str(found), size=x.shape[0] * 8).view(-1, 2, 4)

    assert_equal_to_pytorch(run, model)
    given.write_bytes(b"not rows")
    done = subprocess.run([program, file, "7", given, found], capture_output=True, text=True)
    assert done.returncode == 1
    assert "input.f32: expected rows of 7 float32 values" in done.stderr
