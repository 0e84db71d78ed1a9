"""``torch.compile`` of whole trunks on both backends: results of eager, one graph for every batch, in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ple_fast import PLE, use_backend
from ple_fast.backend import BackendName
from tests.helpers import assert_close, randomise

MAKE_UPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"norm": "batch", "activation": "dice", "gate_units": (5,)},
    "recompute": {"norm": "layer", "activation": "prelu", "recompute": True},
}
BATCHES = (8, 5, 31, 100, 3)


class Model(nn.Module):
    """A trunk and towers, of two outputs each: of one, the inductor guards whether the batch is below 32 on a CPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.trunk = PLE(7, 2, expert_units=(6, 4), **options)
        self.towers = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([tower(y) for tower, y in zip(self.towers, self.trunk(x).unbind(1), strict=True)], 1)


def assert_every_batch_equals_eager(
    model: nn.Module,
    *,
    train: bool,
    backend: BackendName = "torch",
    compiler: str = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
) -> None:
    """Batches of several sizes by one compiled graph, which no batch makes again; then the optimizer has its turn."""
    torch.compiler.reset()
    counters.clear()
    # The templates of max-autotune are for float32; rounding is no matter where nothing but the graph is asked about.
    dtype, tolerance = (torch.float32, 1e-4) if compiler == "inductor" else (torch.float64, 1e-10)
    randomise(model)
    model.to(dtype).train(train)
    compiled_model, eager = copy.deepcopy(model), model
    compiled = torch.compile(compiled_model, fullgraph=True, dynamic=dynamic, backend=compiler, mode=mode)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (compiled_model, eager)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in BATCHES:
            x = torch.randn(rows, 7, dtype=dtype)
            if dynamic is None:
                torch._dynamo.mark_dynamic(x, 0)
            with torch.set_grad_enabled(train):
                with use_backend(backend):
                    y = compiled(x)
                expected = eager(x)
            assert_close(f"y of {rows} rows", y, expected, tolerance)
            if not train:
                continue
            for out in (y, expected):
                out.square().mean().backward()
            for (name, p), q in zip(compiled_model.named_parameters(), eager.parameters(), strict=True):
                assert_close(f"{name} of {rows} rows", p.grad, q.grad, tolerance)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for (name, b), c in zip(compiled_model.named_buffers(), eager.buffers(), strict=True):
        assert_close(name, b, c, tolerance)
    # What ran was compiled: one graph, without a break.
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("make_up", "train"),
    [
        ("norms", True),
        ("recompute", True),
        ("plain", False),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (("plain", True), ("norms", False), ("recompute", False))
        ),
    ],
)
def test_one_graph_for_every_batch(make_up: str, train: bool) -> None:
    assert_every_batch_equals_eager(Model(**MAKE_UPS[make_up]), train=train, compiler="aot_eager")


@pytest.mark.slow
def test_everything_dynamic() -> None:
    """``dynamic=True`` makes inputs of the numbers in specs too: they must not become conditions of the graph."""
    assert_every_batch_equals_eager(Model(**MAKE_UPS["norms"]), train=True, compiler="aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("make_up", MAKE_UPS)
@pytest.mark.parametrize("train", [True, False])
def test_modes_of_the_inductor(mode: str, make_up: str, train: bool) -> None:
    assert_every_batch_equals_eager(Model(**MAKE_UPS[make_up]), train=train, mode=mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("train", [True, False])
def test_modes_around_the_kernels(mode: str, train: bool) -> None:
    """The Triton backend: the level is one operator to the inductor, and the towers are its own work."""
    pytest.importorskip("triton")
    assert_every_batch_equals_eager(Model(), train=train, mode=mode, backend="triton")
