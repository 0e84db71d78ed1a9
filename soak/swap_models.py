"""Random small models of the libraries that ``accelerate`` knows: their own classes, or the stand-ins of the tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.models import MMOE as DeepCTRMMoE
from deepctr_torch.models import PLE as DeepCTRPLE
from torch import Tensor, nn
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE, PLE

from tests.peers import adatt, fuxictr, libmtl, mtreclib, torcheasyrec

WIDTH = 6
"""Of what the first level reads, and often of what a level gives, so that parts of one level fit into another."""
Batch = Callable[[int, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Model:
    """A model of a library, without its weights."""

    name: str
    make: Callable[[], nn.Module]
    batch: Batch
    """Arguments of its forward, of so many rows."""
    stale: tuple[str, ...] = ()
    """Starts of the names of what no output depends on: the library moves statistics there, or leaves gradients None
    where ours are 0, so that weight decay shrinks them (docs/accelerate.md)."""


def _units(dice: random.Random) -> list[int]:
    return [*(dice.randint(2, 8) for _ in range(dice.randint(0, 1))), dice.choice((WIDTH, WIDTH, dice.randint(1, 7)))]


def _numbers(rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn(rows, WIDTH, dtype=dtype),)


def _rechub(dice: random.Random) -> Model:
    tasks, own, shared = dice.randint(1, 3), dice.randint(1, 3), dice.randint(0, 2)
    levels, experts, is_mmoe = dice.randint(1, 3), dice.randint(1, 4), dice.random() < 0.4
    kind = dice.choice(("relu", "relu", "sigmoid", "prelu", "dice", "leakyrelu"))
    expert = {"dims": _units(dice), "activation": kind, "dropout": dice.choice((0.0, 0.0, 0.3))}

    def make() -> nn.Module:
        features = [DenseFeature("age"), DenseFeature("place", 2), SparseFeature("item", vocab_size=11, embed_dim=3)]
        types, towers = ["classification"] * tasks, [{"dims": [4]}] * tasks
        given = (experts,) if is_mmoe else (levels, own, shared)
        model: nn.Module = (MMOE if is_mmoe else PLE)(features, types, *given, dict(expert), towers)
        return model

    def batch(rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
        numbers = {"age": torch.randn(rows, dtype=dtype), "place": torch.randn(rows, 2, dtype=dtype)}
        return (numbers | {"item": torch.randint(0, 11, (rows,))},)

    stale = () if shared or is_mmoe else tuple(f"cgc_layers.{i}.gate_shared." for i in range(levels - 1))
    return Model(f"torch-rechub {'MMOE' if is_mmoe else 'PLE'}", make, batch, stale)


def _deepctr(dice: random.Random) -> Model:
    is_mmoe, tasks, own = dice.random() < 0.4, dice.randint(2, 3), dice.randint(1, 3)
    given = (dice.randint(2, 4),) if is_mmoe else (dice.randint(0, own), own, dice.randint(1, 3))
    options: dict[str, Any] = {
        "expert_dnn_hidden_units": tuple(_units(dice)),
        "gate_dnn_hidden_units": (4,) * dice.randint(0, 1),
        "tower_dnn_hidden_units": (5,) * dice.randint(0, 1),
        "dnn_activation": dice.choice(("relu", "relu", "prelu", "sigmoid", "linear")),
        "dnn_use_bn": dice.random() < 0.4,
        "dnn_dropout": dice.choice((0.0, 0.0, 0.3)),
        "l2_reg_dnn": dice.choice((0.0, 0.0, 0.01)),
        "task_types": ["binary", *["regression"] * (tasks - 1)],
        "task_names": [f"task{t}" for t in range(tasks)],
    }

    def make() -> nn.Module:
        tags = VarLenSparseFeat(SparseFeat("tags", 7, embedding_dim=2), maxlen=3, combiner="mean", length_name="count")
        columns = [SparseFeat("item", 11, embedding_dim=3), DenseFeat("age", 1), tags]
        model: nn.Module = (DeepCTRMMoE if is_mmoe else DeepCTRPLE)(columns, *given, init_std=0.3, **options)
        return model

    def batch(rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
        ids = [torch.randint(0, 11, (rows, 1)), torch.randn(rows, 1), torch.randint(0, 7, (rows, 3))]
        return (torch.cat([*ids, torch.randint(1, 4, (rows, 1))], 1).to(dtype),)

    # The shared gate of the last level runs, and nothing reads what it gives.
    last = f"shared_gate_dnn.{given[-1] - 1}.bn."
    stale = () if is_mmoe else (last,) if given[0] else ("shared_gate_dnn",)
    return Model(f"DeepCTR-Torch {'MMOE' if is_mmoe else 'PLE'}", make, batch, stale)


def _torcheasyrec(dice: random.Random) -> Model:
    tasks, levels, shared, out = dice.randint(1, 3), dice.randint(1, 3), dice.randint(0, 2), _units(dice)[-1]
    norm: dict[str, Any] = dice.choice(({}, {}, {"use_bn": True}, {"use_ln": True}))
    kind = dice.choice(("nn.ReLU", "nn.ReLU", "nn.SiLU", "Dice", "nn.PReLU"))
    net = {"hidden_units": [*_units(dice)[:-1], out], "activation": kind, **norm}
    wide = {**net, "hidden_units": [7, out]} if dice.random() < 0.3 else net
    options = {"share_num": shared, "expert_num_per_task": dice.randint(1, 3)}
    level = {**options, "task_expert_net": net, "share_expert_net": wide}
    stale = () if shared else tuple(f"_extraction_nets.{i}._shared_gate." for i in range(levels - 1))
    return Model(
        "TorchEasyRec ExtractionNet", lambda: torcheasyrec.PLE(WIDTH, tasks, [level] * levels), _numbers, stale
    )


def _torcheasyrec_mmoe(dice: random.Random) -> Model:
    norm: dict[str, Any] = dice.choice(({}, {}, {"use_bn": True}, {"use_ln": True}))
    kind: Any = dice.choice((torcheasyrec.MMoEModel, torcheasyrec.DBMTL))
    tasks, options = dice.randint(1, 3), {"num_expert": dice.randint(1, 4)}
    expert = {"hidden_units": _units(dice), "activation": dice.choice(("nn.ReLU", "nn.SiLU", "Dice")), **norm}
    gate = dice.choice((None, None, {"hidden_units": [4]}, {"hidden_units": [4], "use_ln": True}))
    return Model(
        f"TorchEasyRec {kind.__name__}",
        lambda: kind(WIDTH, tasks, expert_mlp=expert, gate_mlp=gate, **options),
        _numbers,
    )


def _fuxictr(dice: random.Random) -> Model:
    levels, tasks, units = dice.randint(1, 3), dice.randint(1, 3), _units(dice)
    options: dict[str, Any] = {
        "num_specific_experts": dice.randint(1, 3),
        "num_shared_experts": dice.randint(1, 2),
        "expert_hidden_units": units,
        "gate_hidden_units": [4] * dice.randint(0, 1),
        "hidden_activations": dice.choice(("ReLU", "ReLU", "Tanh")),
        "batch_norm": dice.random() < 0.4,
    }
    stale = (f"cgc_layers.{levels - 1}.gate.{tasks}.",)
    return Model("FuxiCTR CGC_Layer", lambda: fuxictr.PLE(levels, tasks, WIDTH, units[-1], **options), _numbers, stale)


def _fuxictr_mmoe(dice: random.Random) -> Model:
    tasks, units = dice.randint(1, 3), _units(dice)
    options: dict[str, Any] = {
        "num_experts": dice.randint(1, 4),
        "expert_hidden_units": units,
        "gate_hidden_units": [4] * dice.randint(0, 1),
        "hidden_activations": dice.choice(("ReLU", "ReLU", "Tanh")),
        "net_dropout": dice.choice((0.0, 0.0, 0.3)),
        "batch_norm": dice.random() < 0.4,
    }
    return Model("FuxiCTR MMoE_Layer", lambda: fuxictr.MMoE(tasks, WIDTH, units[-1], **options), _numbers)


def _fields(rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.stack([torch.randint(0, size, (rows,)) for size in (5, 7)], 1), torch.randn(rows, 4, dtype=dtype)


def _mtreclib(dice: random.Random) -> Model:
    units = [dice.choice((WIDTH, dice.randint(2, 7))) for _ in range(dice.randint(1, 3))]
    counts = dice.randint(1, 3), dice.randint(0, 2), dice.randint(1, 3)
    stale = () if counts[1] else ("share_gates.",)
    return Model("MTReclib PLEModel", lambda: mtreclib.PLEModel([5, 7], 4, 2, units, [4], *counts, 0.0), _fields, stale)


def _mtreclib_mixture(dice: random.Random) -> Model:
    kind: Any = dice.choice((mtreclib.MMoEModel, mtreclib.OMoEModel))
    units, counts = _units(dice), (dice.randint(1, 3), dice.randint(1, 4))
    return Model(f"MTReclib {kind.__name__}", lambda: kind([5, 7], 4, 2, units, [4], *counts, 0.0), _fields)


def _libmtl(dice: random.Random) -> Model:
    kind: Any = dice.choice((libmtl.EqualMMoE, libmtl.EqualCGC))
    tasks, units, is_wrapped = [f"t{t}" for t in range(dice.randint(1, 3))], _units(dice), dice.random() < 0.5
    counts = [dice.randint(1, 3), *(dice.randint(1, 2) for _ in tasks)]
    options: dict[str, Any] = {"norm": dice.random() < 0.4, "dropout": dice.choice((0.0, 0.0, 0.3)), "width": WIDTH}
    build = libmtl.Encoder if is_wrapped else nn.Sequential

    def make() -> nn.Module:
        made: nn.Module = libmtl.model(
            kind, counts, lambda: build(*libmtl.layers(*units, **options)), units[-1], tasks, img_size=[WIDTH]
        )
        vars(made)["encoder_class"] = build
        return made

    return Model(f"LibMTL {kind.__name__}", make, _numbers)


def _adatt(dice: random.Random) -> Model:
    kind: Any = dice.choice((adatt.PLE, adatt.AdaTTSp, adatt.AdaTTWSharedExps, adatt.MLMMoE, adatt.CrossStitch))
    tasks, dims = dice.randint(1, 3), [_units(dice) for _ in range(dice.randint(1, 3))]
    slots: int | None = tasks + 1
    options: dict[str, Any] = {"num_task_experts": dice.randint(1, 3), "num_shared_experts": dice.randint(1, 2)}
    if kind is adatt.AdaTTSp:
        slots, options = tasks, {"num_task_experts": dice.randint(1, 3), "self_exp_res_connect": dice.random() < 0.7}
    if kind is adatt.CrossStitch:
        slots, options = tasks, {}
    if kind is adatt.MLMMoE:
        slots, options = None, {"num_experts": dice.randint(1, 4), "gate_archs": [[4] * dice.randint(0, 1)] * len(dims)}

    def make() -> nn.Module:
        first = "expert_archs" if kind in (adatt.MLMMoE, adatt.CrossStitch) else "expert_out_dims"
        trunk = kind(WIDTH, **{first: dims}, num_tasks=tasks, **options)
        return adatt.CentralTaskArch(trunk, dims[-1][-1], tasks)

    shape = () if slots is None else (slots,)
    return Model(f"AdaTT {kind.__name__}", make, lambda rows, dtype: (torch.randn(rows, *shape, WIDTH, dtype=dtype),))


LIBRARIES: dict[Callable[[random.Random], Model], int] = {
    _rechub: 4,
    _deepctr: 4,
    _torcheasyrec: 2,
    _torcheasyrec_mmoe: 2,
    _fuxictr: 2,
    _fuxictr_mmoe: 1,
    _mtreclib: 2,
    _mtreclib_mixture: 2,
    _libmtl: 2,
    _adatt: 3,
}


class Two(nn.Module):
    """Two models side by side, with trunks that may share."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, one: tuple[Any, ...], other: tuple[Any, ...]) -> list[Any]:
        """What each gives of its arguments."""
        return [self.first(*one), self.second(*other)]


def draw_model(dice: random.Random) -> Model:
    """A model of any library; sometimes one of two trunks."""
    first = dice.choices(list(LIBRARIES), list(LIBRARIES.values()))[0](dice)
    if dice.random() > 0.15:
        return first
    twin = dice.random() < 0.5
    second = first if twin else dice.choice(list(LIBRARIES))(dice)
    return Model(
        f"{first.name} and {second.name}",
        lambda: Two(first.make(), second.make()),
        lambda rows, dtype: (first.batch(rows, dtype), second.batch(rows, dtype)),
        (*(f"first.{name}" for name in first.stale), *(f"second.{name}" for name in second.stale)),
    )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value or () for tensor in tensors_in(item)]
