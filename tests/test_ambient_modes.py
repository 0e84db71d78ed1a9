"""Whatever is set around a call, conversions, training and data come out as without it."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models import multi_task as rechub

import ple_fast
from ple_fast import Topology, accelerate, pack, restore
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric
from ple_fast.synthetic import synthetic_tasks
from tests import test_convert_deepctr_torch as deepctr
from tests.swap_proof import assert_same_state, shaken


@contextlib.contextmanager
def flag(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """A setting of the process, for a while."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def set_product_precision(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value  # type: ignore[attr-defined]  # torch's stubs lack it


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "default device": lambda: flag(lambda: None, torch.set_default_device, "meta"),
    "default dtype float64": lambda: flag(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype bfloat16": lambda: flag(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no grad": torch.no_grad,
    "matmul precision": lambda: flag(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "bfloat16 products": lambda: flag(
        lambda: torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        set_product_precision,
        "bf16",
    ),
    "swapping conversions": lambda: flag(
        torch.__future__.get_swap_module_params_on_conversion,
        torch.__future__.set_swap_module_params_on_conversion,
        True,
    ),
    "deterministic": lambda: flag(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
}
every_mode = pytest.mark.parametrize("mode", MODES)

FEATURES = [SparseFeature("item", vocab_size=9, embed_dim=3), DenseFeature("age"), DenseFeature("price")]
EXPERTS = {"dims": [7, 6], "activation": "dice"}
TOWERS = [{"dims": [4]}, {"dims": [3]}]
BATCH = {"item": torch.tensor([1, 3, 8, 0, 4]), "age": torch.randn(5), "price": torch.randn(5)}
PEERS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "torch-rechub PLE": (lambda: rechub.PLE(FEATURES, ["classification"] * 2, 2, 2, 1, EXPERTS, TOWERS), (BATCH,)),
    "torch-rechub MMOE": (
        lambda: rechub.MMOE(FEATURES[1:], ["classification"] * 2, 3, {"dims": [6]}, TOWERS),  # which casts to float32
        (BATCH,),
    ),
    "DeepCTR-Torch PLE": (deepctr.CASES[0].make, (deepctr.rows(5),)),
    "DeepCTR-Torch MMOE": (deepctr.MMOES[0].make, (deepctr.rows(5),)),
}


def assert_trains(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Every parameter is an ordinary one, and a step changes it, unless the library reads it nowhere."""
    model.train()(*arguments).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert not parameter.is_inference() and parameter.dtype == torch.float32, name
        assert parameter.grad is not None or "shared_" in name, name


@every_mode
@pytest.mark.parametrize("peer", PEERS)
def test_a_swap_is_the_same_in_every_ambient_mode(peer: str, mode: str) -> None:
    make, arguments = PEERS[peer]
    original = shaken(make())
    model = copy.deepcopy(original)
    with MODES[mode]():
        report = accelerate(model)
    assert report.replaced and not report.left, str(report)
    torch.testing.assert_close(model.eval()(*arguments), original.eval()(*arguments), rtol=1e-4, atol=1e-5)
    assert_trains(copy.deepcopy(model), arguments)
    with MODES[mode]():
        restore(model)
    assert_same_state(model, original)
    assert_trains(model, arguments)


@every_mode
def test_pack_unpack_and_inference_are_the_same_in_every_ambient_mode(mode: str) -> None:
    torch.manual_seed(0)
    experts = [
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), ple_fast.convert.Dice(4), nn.Linear(4, 3), nn.PReLU())
        for _ in range(3)
    ]
    gates = [nn.Sequential(nn.Linear(5, 3), nn.Softmax(dim=1)) for _ in range(2)]
    stacks = nn.ModuleList([*experts, *gates])
    shaken(stacks)
    with MODES[mode]():
        level = pack(experts, gates, Topology.mmoe(2, 3))
        back_experts, back_gates = level.unpack()
        frozen = level.eval().for_inference()
    x = torch.randn(6, 5)
    torch.testing.assert_close(frozen(x), level(x), rtol=1e-4, atol=1e-5)
    assert_same_state(nn.ModuleList([*back_experts, *[gate for gate in back_gates if gate is not None]]), stacks)
    for module in (level, *back_experts):
        assert_trains(module.train(), (x,))
    frozen(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@every_mode
def test_synthetic_tasks_are_the_same_in_every_ambient_mode(mode: str) -> None:
    expected = synthetic_tasks(40, 5, 3, correlation=0.4)
    with MODES[mode]():
        found = synthetic_tasks(40, 5, 3, correlation=0.4)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)
        assert not ours.is_inference()


def model_and_data() -> tuple[MultiTaskModel, dict[str, Any], dict[str, Any]]:
    torch.manual_seed(0)
    columns: list[Categorical | Numeric] = [
        Categorical("country", values=("de", "fr")),
        Numeric("age", mean=40.0, std=10.0, width=2),
    ]
    model = MultiTaskModel(columns, [TaskLoss("click"), TaskLoss("watch", "regression")], trunk_options={
        "expert_units": (8,), "num_levels": 1, "dropout": 0.2
    })  # fmt: skip
    rng = np.random.default_rng(0)
    data = {"country": rng.choice(["de", "fr", "it"], 60), "age": rng.uniform(20, 60, 60)}
    return model, data, {"click": rng.integers(0, 2, 60), "watch": rng.random(60)}


@every_mode
def test_fit_and_predict_are_the_same_in_every_ambient_mode(mode: str) -> None:
    model, data, labels = model_and_data()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = [result.loss for result in model.fit(data, labels, epochs=2, batch_size=16, lr=0.01)]
    torch.manual_seed(1)
    with MODES[mode]():
        results = other.fit(data, labels, epochs=2, batch_size=16, lr=0.01)
        predictions = other.predict(data)
    rounds = "precision" in mode or mode in ("bfloat16 products", "autocast")
    torch.testing.assert_close([result.loss for result in results], expected, rtol=0.05 if rounds else 1e-6, atol=0)
    for task, values in model.predict(data).items():
        np.testing.assert_allclose(predictions[task], values, atol=0.1 if rounds else 1e-6)
    assert not any(parameter.is_inference() for parameter in other.parameters())


@every_mode
def test_save_and_load_are_the_same_in_every_ambient_mode(mode: str, tmp_path: Path) -> None:
    model, data, labels = model_and_data()
    model.eval()
    with MODES[mode]():
        model.save(tmp_path)
        again = MultiTaskModel.load(tmp_path)
    for task, values in model.predict(data).items():
        np.testing.assert_array_equal(again.predict(data)[task], values)
    again.train().fit(data, labels)
    assert {(p.device.type, p.dtype, p.is_inference()) for p in again.parameters()} == {("cpu", torch.float32, False)}


@pytest.mark.parametrize("train", [True, False])
def test_a_trial_run_leaves_nothing_that_can_be_observed(train: bool) -> None:
    class Counting(nn.Linear):
        """A tower that draws, counts and remembers."""

        def __init__(self) -> None:
            super().__init__(4, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            """``(B, 4)`` to ``(B, 1)``."""
            assert isinstance(self.calls, Tensor)
            self.calls.add_(1)
            self.seen.append(x)
            return super().forward(x + 0 * torch.rand(x.shape, dtype=x.dtype))

    torch.manual_seed(0)
    features = [SparseFeature("item", vocab_size=9, embed_dim=3), DenseFeature("age")]
    model: Any = rechub.MMOE(
        features, ["classification"] * 2, 3, {"dims": [6], "dropout": 0.5}, [{"dims": [4]}, {"dims": [4]}]
    )
    model.towers[0].mlp[-1] = Counting()
    model.towers[1].mlp[1].train(not train)
    model.embedding.embed_dict["item"].max_norm = 0.1  # its look-up writes to the table
    model.train(train)
    called: list[str] = []
    for name in ("embedding", "towers.1", ""):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: called.append("any"))
    kept = [*model.embedding.parameters(), *model.towers.parameters(), *model.buffers()]
    before = [(tensor.clone(), tensor._version, tensor.grad) for tensor in kept]
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    try:
        report = accelerate(model)
    finally:
        everywhere.remove()
    assert report.replaced, str(report)
    assert not called
    assert not model.towers[0].mlp[-1].seen
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) and a._version == v for a, (b, v, _) in zip(kept, before, strict=True))
    assert all(tensor.grad is grad for tensor, (_, _, grad) in zip(kept, before, strict=True))
    assert {name: m.training for name, m in model.named_modules() if name in modes}.items() <= modes.items()


@pytest.mark.parametrize("held", ["by a graph", "by weak references"])
@pytest.mark.parametrize("mode", [None, "swapping conversions"])
def test_parameters_that_are_held_elsewhere_do_not_stop_a_swap_half_way(mode: str | None, held: str) -> None:
    model = shaken(PEERS["torch-rechub PLE"][0]())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for swap in (accelerate, restore):
        holds = model(BATCH) if held == "by a graph" else [weakref.ref(p) for p in model.parameters()]
        with MODES[mode]() if mode else contextlib.nullcontext():
            swap(model, optimizers=[optimizer])
        held_now = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held_now == {id(p) for p in model.parameters()}
        assert_trains(model, (BATCH,))
        del holds


def test_weights_that_have_diverged_are_replaced_like_others() -> None:
    model: Any = shaken(PEERS["torch-rechub PLE"][0]())
    with torch.no_grad():
        model.cgc_layers[0].experts_shared[0].mlp[0].weight[1] = torch.nan
        model.cgc_layers[1].gates_specific[0].mlp[0].bias[0] = torch.inf
    report = accelerate(model)
    assert len(report.replaced) == 2, str(report)
