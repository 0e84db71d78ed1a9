"""The modules as PyTorch users hold them: names, shapes, initialisation, copies, files, compilation, transforms."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import CGC, PLE, ExtractionNetwork, GateSpec, MLPSpec, MMoE, Topology
from ple_fast.modules.activations import StackedDice, StackedPReLU
from ple_fast.modules.norms import StackedBatchNorm, StackedLayerNorm
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, compare, draw, level, randomise

LEVEL = TOPOLOGIES["ple"]
SPECS: dict[str, tuple[MLPSpec, GateSpec]] = {
    "plain": (EXPERTS["2-layers"], GATES["plain"]),
    "per-layer": (EXPERTS["per-layer"], GATES["everything"]),
    "layer-norm": (EXPERTS["layer-norm-after"], GATES["hidden-layer-norm"]),
    "prelu-norms": (EXPERTS["prelu-norms"], GATES["hidden-prelu-dice"]),
}


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _double(trunk: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    module = trunk(*args, **kwargs).double()
    randomise(module)
    return module


def test_names_and_shapes_are_those_of_the_design() -> None:
    ple = PLE(7, 3, task_experts=[2, 1, 3], shared_experts=2, expert_units=(6, 4), gate_units=(5,))
    assert _shapes(ple) == {
        "levels.0.blocks.0.layers.0.weight": (8, 6, 7),
        "levels.0.blocks.0.layers.0.bias": (8, 6),
        "levels.0.blocks.0.layers.1.weight": (8, 4, 6),
        "levels.0.blocks.0.layers.1.bias": (8, 4),
        "levels.0.gate.layers.0.weight": (4, 5, 7),
        "levels.0.gate.layers.0.bias": (4, 5),
        "levels.0.gate.weight": (20, 5),  # (2+2) + (1+2) + (3+2) + 8
        "levels.0.gate.bias": (20,),
        "levels.1.blocks.0.layers.0.weight": (8, 6, 4),
        "levels.1.blocks.0.layers.0.bias": (8, 6),
        "levels.1.blocks.0.layers.1.weight": (8, 4, 6),
        "levels.1.blocks.0.layers.1.bias": (8, 4),
        "levels.1.gate.layers.0.weight": (3, 5, 4),
        "levels.1.gate.layers.0.bias": (3, 5),
        "levels.1.gate.weight": (12, 5),
        "levels.1.gate.bias": (12,),
    }


def test_names_and_shapes_of_norms_and_learned_activations() -> None:
    spec = MLPSpec((6, 4, 3), ("relu", "dice", "prelu"), norm=("batch", "layer", None))
    module = ExtractionNetwork(
        7, TOPOLOGIES["adatt"], experts=spec, gate=GateSpec((5,), "prelu", "batch", logits_norm="batch", bias=False)
    )
    block, statistics = "blocks.0.layers", ("running_mean", "running_var")
    expected: dict[str, tuple[int, ...]] = {
        **{f"{block}.0.{name}": shape for name, shape in (("weight", (4, 6, 7)), ("bias", (4, 6)))},
        **{f"{block}.0.norm.{name}": (24,) for name in ("weight", "bias", *statistics)},
        f"{block}.0.norm.num_batches_tracked": (),
        **{f"{block}.1.{name}": shape for name, shape in (("weight", (4, 4, 6)), ("bias", (4, 4)))},
        **{f"{block}.1.norm.{name}": (4, 4) for name in ("weight", "bias")},
        f"{block}.1.activation.alpha": (4, 4),
        **{f"{block}.1.activation.norm.{name}": (16,) for name in statistics},
        f"{block}.1.activation.norm.num_batches_tracked": (),
        **{f"{block}.2.{name}": shape for name, shape in (("weight", (4, 3, 4)), ("bias", (4, 3)))},
        f"{block}.2.activation.weight": (4,),
        **{f"gate.layers.0.{name}": shape for name, shape in (("weight", (2, 5, 7)), ("bias", (2, 5)))},
        **{f"gate.layers.0.norm.{name}": (10,) for name in ("weight", "bias", *statistics)},
        "gate.layers.0.norm.num_batches_tracked": (),
        "gate.layers.0.activation.weight": (2,),
        "gate.weight": (8, 5),
        **{f"gate.norm.{name}": (8,) for name in ("weight", "bias", *statistics)},
        "gate.norm.num_batches_tracked": (),
        "gate.offset": (4,),
    }
    assert _shapes(module) == expected
    assert isinstance(module.get_submodule("blocks.0.layers.0.norm"), nn.BatchNorm1d)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_initialisation_is_that_of_one_linear_per_expert(device: str) -> None:
    """Bounds, moments and independence; on the meta device after ``to_empty`` and ``reset_parameters``."""
    module = PLE(100, 2, num_levels=1, expert_units=(300, 64), gate_units=(50,), norm="batch", device=device)
    if device == "meta":
        with torch.no_grad():
            for tensor in module.to_empty(device="cpu").state_dict().values():
                tensor.fill_(7)
        module.reset_parameters()
    names = ("blocks.0.layers.0", "blocks.0.layers.1", "gate.layers.0", "gate")
    for name, fan_in in zip(names, (100, 300, 100, 50), strict=True):
        weight, bias = (module.levels[0].get_parameter(f"{name}.{part}").detach() for part in ("weight", "bias"))
        bound = fan_in**-0.5
        for tensor in (weight, bias):
            assert tensor.abs().max() <= bound
            rows = tensor.flatten()[None] if name == "gate" else tensor.flatten(1)  # one per expert, or per gate
            if rows.shape[1] >= 50:
                assert bool((rows.abs().max(1).values > 0.85 * bound).all()), name
            if rows.shape[1] >= 500:
                error = bound * 6 / rows.shape[1] ** 0.5
                assert bool((rows.mean(1).abs() < error).all()), name
                assert bool(((rows.std(1) - bound / 3**0.5).abs() < error).all()), name
        assert weight.unique(dim=0).shape[0] == weight.shape[0], "two experts start alike"
    norm = module.get_submodule("levels.0.blocks.0.layers.0.norm")
    assert isinstance(norm, StackedBatchNorm)
    assert bool((norm.weight == 1).all()) and not norm.bias.any()
    assert norm.running_var is not None and bool((norm.running_var == 1).all()) and norm.num_batches_tracked == 0


def test_learned_activations_and_layer_norms_start_as_in_pytorch() -> None:
    module = ExtractionNetwork(
        5, LEVEL, experts=MLPSpec((6, 5, 4), ("dice", nn.PReLU(init=0.1), "relu"), norm=(None, None, "layer")),
        gate=GateSpec(), device="meta",
    ).to_empty(device="cpu")  # fmt: skip
    module.reset_parameters()
    dice, prelu, norm = (
        module.get_submodule(f"blocks.0.layers.{n}") for n in ("0.activation", "1.activation", "2.norm")
    )
    assert isinstance(dice, StackedDice) and not dice.alpha.any() and dice.norm.eps == 1e-8
    assert isinstance(prelu, StackedPReLU) and bool((prelu.weight == 0.1).all())
    assert isinstance(norm, StackedLayerNorm) and bool((norm.weight == 1).all()) and not norm.bias.any()


def test_widths_and_counts_per_level() -> None:
    ple = PLE(7, 2, num_levels=3, task_experts=[[1, 2], [2, 2], [3, 1]], shared_experts=[1, 2, 3],
              expert_units=[(6, 5), (4,), (3, 3, 2)])  # fmt: skip
    shapes = _shapes(ple)
    assert [shapes[f"levels.{i}.blocks.0.layers.0.weight"] for i in range(3)] == [(4, 6, 7), (6, 4, 5), (7, 3, 4)]
    assert (ple.in_features, ple.out_features, ple.num_levels, ple.num_tasks) == (7, 2, 3, 2)
    compare(_double(PLE, 7, 2, num_levels=2, task_experts=[1, 2], expert_units=[(6, 5), (4,)]), draw("one", 9, 1, 7))


def test_shared_experts_of_other_widths_are_a_second_block() -> None:
    ple = _double(PLE, 7, 2, task_experts=2, shared_experts=1, expert_units=(6, 4), shared_expert_units=(9, 8, 4))
    shapes = _shapes(ple)
    assert shapes["levels.0.blocks.0.layers.0.weight"] == (4, 6, 7)
    assert shapes["levels.1.blocks.1.layers.1.weight"] == (1, 8, 9)
    compare(ple, draw("one", 9, 1, 7))


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_a_last_shared_mixture_and_its_scope(scope: str) -> None:
    ple = _double(PLE, 7, 2, expert_units=(6, 4), last_shared=True, shared_gate_scope=scope)
    x = torch.randn(9, 7, dtype=torch.float64)
    y, gates = ple(x, return_gates=True)
    assert y.shape == (9, 3, 4)
    sizes = [4, 4, 6 if scope == "all" else 2]
    assert [[g.shape[1] for g in weights] for weights in gates] == [sizes, sizes]
    compare(ple, draw("one", 9, 1, 7))


@pytest.mark.parametrize(
    "trunk",
    [
        lambda **kw: CGC(7, 3, task_experts=[1, 2, 0], expert_units=(6, 4), **kw),
        lambda **kw: MMoE(7, 3, experts=4, expert_units=(6, 4), **kw),
        lambda **kw: PLE(7, 3, shared_experts=0, expert_units=(6, 4), **kw),
    ],
    ids=["cgc", "mmoe", "ple without shared experts"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu", "gate_units": (5,), "gate_bias": False},
        {"activation": nn.LeakyReLU(0.3), "norm": "layer", "gate_units": (5, 4)},
        {"activation": nn.PReLU, "norm": "batch", "recompute": True},
    ],
)
def test_trunks_equal_the_paper(trunk: Callable[..., Any], options: dict[str, Any]) -> None:
    compare(_double(trunk, **options), draw("one", 9, 1, 7))


@pytest.mark.parametrize(
    "activation",
    ["gelu_tanh", nn.SiLU, nn.SiLU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.3), nn.Identity, "DICE", "swish"],
)
def test_an_activation_by_name_class_or_instance(activation: Any) -> None:
    compare(_double(PLE, 7, 2, expert_units=(6, 4), activation=activation), draw("one", 9, 1, 7))


def test_repr_tells_the_make_up() -> None:
    text = repr(PLE(7, 3, task_experts=[2, 1, 3], expert_units=(6, 4), norm="batch", dropout=0.1, last_shared=True))
    for words in (
        "in_features=7, num_tasks=3, last_shared=True",
        "in_features=7, slots=4, experts=8, mixtures=4",
        "experts 0 to 7",
        "8 x 7 -> 6, relu, dropout=0.1",
        "StackedBatchNorm(48,",
        "7 -> 20 logits",
    ):
        assert words in text, f"{words!r} is missing in\n{text}"
    spec = MLPSpec(
        (6, 4), (nn.LeakyReLU(0.3), "prelu"), norm=("layer", None), norm_position="after", bias=(False, True)
    )
    module = ExtractionNetwork(
        7, TOPOLOGIES["mixed-kinds"], experts=spec, gate=GateSpec(bias=False), gate_features=3, recompute=True
    )
    text = repr(module)
    for words in (
        "gate_features=3, recompute=True",
        "4 x 7 -> 6, bias=False, leaky_relu(0.3), norm after activation",
        "StackedPReLU(4, init=0.25)",
        "StackedLayerNorm((4, 6), eps=1e-05)",
        "logits, bias=False",
    ):
        assert words in text, f"{words!r} is missing in\n{text}"
    assert "Gate(\n    static" in repr(ExtractionNetwork(7, Topology.single_task(2), experts=spec, gate=GateSpec()))


def _same(a: nn.Module, b: nn.Module) -> None:
    state = b.state_dict()
    assert list(a.state_dict()) == list(state)
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def _saved(module: ExtractionNetwork) -> ExtractionNetwork:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = ExtractionNetwork(
        module.in_features, LEVEL, experts=module.expert_specs, gate=module.gate_spec, dtype=torch.float64
    )
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved],
                         ids=["deepcopy", "pickle", "state_dict file"])  # fmt: skip
@pytest.mark.parametrize("case", SPECS)
def test_copies_are_equal_and_share_nothing(case: str, how: Callable[[nn.Module], Any]) -> None:
    module = level(LEVEL, *SPECS[case])
    (x,) = draw("stacked", 9, 4, 7)
    module(x).sum().backward()
    other = how(module)
    _same(other, module)
    assert torch.equal(other.eval()(x), module.eval()(x))
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert all(p.any() for p in module.parameters())


def test_assigning_a_state_keeps_the_tensors() -> None:
    module, source = level(LEVEL, *SPECS["per-layer"]), level(LEVEL, *SPECS["per-layer"], seed=1)
    module.load_state_dict(source.state_dict(), assign=True)
    assert module.gate.weight is not None and source.gate.weight is not None
    assert module.gate.weight.data_ptr() == source.gate.weight.data_ptr()
    (x,) = draw("stacked", 9, 4, 7)
    assert torch.equal(module(x), source(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype(dtype: torch.dtype) -> None:
    module = PLE(7, 2, expert_units=(6, 4), norm="batch", activation="dice").to(dtype)
    assert {t.dtype for n, t in module.state_dict().items() if "num_batches" not in n} == {dtype}
    y, gates = module(torch.randn(9, 7, dtype=dtype), return_gates=True)
    assert y.dtype == dtype and y.isfinite().all()
    assert gates[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in module.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"norm": "batch", "activation": "dice", "gate_units": (5,)}, {"norm": "layer", "dropout": 0.5}]
)
def test_a_meta_module_gives_shapes(options: dict[str, Any]) -> None:
    module = PLE(7, 2, expert_units=(6, 4), device="meta", **options)
    y, gates = module(torch.empty(9, 7, device="meta"), return_gates=True)
    assert y.is_meta and y.shape == (9, 2, 4)
    assert [g.shape for g in gates[1]] == [(9, 4), (9, 4)]
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_a_norm_frozen_alone_reads_its_running_statistics(train: bool) -> None:
    """Train mode of the level does not matter to a norm in eval mode, and the other way round."""
    module = level(LEVEL, EXPERTS["batch-norm"], GATES["everything"])
    (x,) = draw("stacked", 9, 4, 7)
    for name, child in module.named_modules():
        if isinstance(child, nn.BatchNorm1d):
            child.train(train) if name == "blocks.0.layers.0.norm" else child.train(not train)
    before = copy.deepcopy(module.state_dict())
    module(x)
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            moved = train if name.startswith("blocks.0.layers.0.") else not train
            assert torch.equal(tensor, before[name]) is not moved, name
    whole = module.train(train)(x)
    assert not torch.equal(whole, module.train(not train)(x))


def test_dropout_of_a_layer_in_train_mode_alone() -> None:
    """Monte Carlo dropout: everything in eval mode but the layers that drop."""
    module = ExtractionNetwork(3, Topology.single_task(2), experts=MLPSpec((50,), "identity", dropout=0.5),
                               gate=GateSpec()).eval()  # fmt: skip
    x = torch.randn(40, 3)
    assert torch.equal(module(x), module(x))
    module.get_submodule("blocks.0.layers.0").train()
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    assert abs((first == 0).double().mean().item() - 0.5) < 0.05


def test_zero_grad() -> None:
    module = level(LEVEL, *SPECS["per-layer"])
    (x,) = draw("stacked", 9, 4, 7)
    module(x).sum().backward()
    first = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    module.eval()
    module.zero_grad()
    assert all(p.grad is None for p in module.parameters())
    module.train()(x).sum().backward()
    for grad, parameter in zip(first, module.parameters(), strict=True):
        assert_close("grad", parameter.grad, grad, 1e-12)


def test_from_levels_holds_the_levels_it_is_given() -> None:
    first, second = (
        level(Topology.ple(2, 1, 1, last=False), MLPSpec((4,))),
        level(Topology.ple(2, 1, 1, last=True), MLPSpec((4,)), in_features=4, seed=1),
    )
    ple = PLE.from_levels([first, second])
    assert ple.levels[0] is first and ple.levels[1] is second
    assert {id(p) for p in ple.parameters()} == {id(p) for lvl in (first, second) for p in lvl.parameters()}
    x = torch.randn(9, 7, dtype=torch.float64)
    assert torch.equal(ple(x), second(first(x)))


@pytest.mark.parametrize(
    ("experts", "gate"),
    [
        ("2-layers", "plain"),
        ("layer-norm-after", "hidden-layer-norm"),
        ("prelu", "hidden-prelu-dice"),
        ("dice", "temperature"),
        ("batch-norm", "everything"),
    ],
)
def test_parameters_that_are_not_contiguous(experts: str, gate: str) -> None:
    module = level(LEVEL, EXPERTS[experts], GATES[gate])
    for parameter in module.parameters():
        wide = torch.full((*parameter.shape[:-1], 2 * parameter.shape[-1]), 9.0, dtype=parameter.dtype)
        parameter.data = wide[..., ::2].copy_(parameter.data)
        if parameter.dim() == 3:
            parameter.data = parameter.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert not parameter.is_contiguous()
    compare(module, draw("stacked", 9, 4, 7), form="stacked", slots=4)


def test_inside_a_model() -> None:
    """Names are prefixed, an optimizer sees every parameter, a checkpoint restores the model."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 7)
            self.trunk = PLE(7, 2, expert_units=(6, 4), norm="batch")
            self.towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            ys = self.trunk(self.embedding(ids)).unbind(1)
            return torch.cat([tower(y) for tower, y in zip(self.towers, ys, strict=True)], 1)

    model, ids = Model(), torch.randint(10, (16,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model(ids) - ids[:, None]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert "trunk.levels.1.gate.weight" in model.state_dict()
    other = Model()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(ids), model.eval()(ids))
