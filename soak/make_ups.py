"""Random levels and trunks from one number: any wiring, any make-up, any input, and a way to run it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology
from ple_fast.model.trunks import TRUNKS
from ple_fast.modules.norms import StackedLayerNorm
from ple_fast.specs import ACTIVATIONS, Activation, LayerSpec
from tests.helpers import FORMS, draw, randomise

T = TypeVar("T")

WAYS = {
    "step": 12,
    "twice": 1,
    "checkpoint": 1,
    "inference": 3,
    "served": 1,
    "operator": 2,
    "functional": 1,
    "batched": 1,
    "double": 2,
    "compile": 0.1,
}
"""How a trial runs, and how often: see ``soak.ways``."""
LOW_WAYS = ("step", "twice", "checkpoint", "inference", "served", "operator", "compile")
"""Which may also run in low precision."""
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 95, 96, 97, 128, 257, 512, 700)
"""Around the bounds of the path for few rows, and beyond a block of rows."""
ONE_FOR_ALL = ("one", "every-second-row", "transposed", "expanded")
"""Forms of an input that all slots read."""


@dataclass(frozen=True)
class Level:
    """One extraction network, without its weights."""

    topology: Topology
    experts: tuple[MLPSpec, ...]
    gate: GateSpec
    recompute: bool


@dataclass(frozen=True)
class Trial:
    """Everything about one trial; its seed gives it again."""

    seed: int
    levels: tuple[Level, ...]
    trunk: tuple[str, dict[str, Any]] | None
    """Name and options of a named trunk, in the place of ``levels``."""
    num_tasks: int | None
    """Of a stack; None for one level alone, which has a ``gate_input`` of its own."""
    in_features: int
    gate_features: int | None
    rows: int
    form: str
    gate_form: str
    way: str
    train: bool
    ask_gates: bool
    gates_enter_loss: bool
    input_grad: bool
    frozen: bool
    """Some parameters require no gradient."""
    strided_weights: bool
    """Weights lie transposed in memory."""
    strided_cotangents: bool
    row_blocks: bool
    """Blocks of 4 rows instead of 512 and more."""
    backward_inside: bool
    """Under autocast: ``backward()`` within the region."""
    dtype: torch.dtype
    """Of the parameters."""
    autocast: torch.dtype | None

    @property
    def num_slots(self) -> int:
        """Of the input."""
        slots = self.levels[0].topology.num_slots if self.levels else 1
        assert slots is not None
        return slots

    def module(self, device: torch.device | str = "cpu") -> nn.Module:
        """The level or trunk with its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = self._made()
        randomise(calm(made), self.seed)
        dice = random.Random(f"frozen {self.seed}")
        for parameter in made.parameters():
            parameter.requires_grad_(not self.frozen or dice.random() < 0.7)
            if self.strided_weights and parameter.dim() > 1:
                parameter.data = parameter.data.transpose(-1, -2).contiguous().transpose(-1, -2)
        return made.to(device).train(self.train)

    def _made(self) -> nn.Module:
        if self.trunk is not None:
            name, options = self.trunk
            return TRUNKS[name](self.in_features, self.num_tasks, **options, dtype=self.dtype)
        levels, width = [], self.in_features
        for level in self.levels:
            gate_features = self.gate_features if self.num_tasks is None else None
            if self.num_tasks is not None and level.gate.input == "raw":
                gate_features = self.in_features
            one = level.experts[0] if len(set(level.experts)) == 1 else level.experts
            levels.append(
                ExtractionNetwork(
                    width,
                    level.topology,
                    experts=one,
                    gate=level.gate,
                    gate_features=gate_features,
                    recompute=level.recompute,
                    dtype=self.dtype,
                )
            )
            width = levels[-1].out_features
        return levels[0] if self.num_tasks is None else PLE.from_levels(levels, num_tasks=self.num_tasks)

    def leaves(self) -> list[Tensor]:
        """What the input is made of, in float64: see ``tests.helpers.FORMS``."""
        return draw(self.form, self.rows, self.num_slots, self.in_features, seed=self.seed + 1)

    def gate_leaves(self) -> list[Tensor] | None:
        """The same for an input of the gates' own."""
        if self.gate_features is None:
            return None
        return draw(self.gate_form, self.rows, self.num_slots, self.gate_features, seed=self.seed + 2)

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


def calm(module: nn.Module) -> nn.Module:
    """Norms whose eps keeps features without variance (one unit, dead ones) from amplifying rounding 300 times each."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | StackedLayerNorm):
            child.eps = 0.01
    return module


def draw_topology(dice: random.Random, slots: int | None = None, at_least: int = 1) -> Topology:
    """Any wiring of up to 4 slots (or as many as ``slots``), 6 experts and 4 mixtures."""
    slots = dice.randint(1, 4) if slots is None else slots
    expert_slot = sorted(dice.randrange(slots) for _ in range(dice.randint(1, 6)))
    count = len(expert_slot)
    mixture_slot = tuple(dice.randrange(slots) for _ in range(dice.randint(at_least, 4)))
    if dice.random() < 0.3:  # gates read the slots in order, and all of the same number of experts
        mixture_slot = tuple(range(min(slots, 4)))
    size = dice.choice((None, None, count))
    mixed = [dice.sample(range(count), dice.randint(1, count) if size is None else size) for _ in mixture_slot]
    for expert in sorted(set(range(count)) - {e for row in mixed for e in row}):
        mixed[dice.randrange(len(mixed))].append(expert)
    drawn = ("softmax", "softmax", "static", "sigmoid")
    kinds: Any = tuple(dice.choice(drawn) for _ in mixed) if dice.random() < 0.4 else None
    offsets = tuple(tuple(dice.random() < 0.5 for _ in row) for row in mixed) if dice.random() < 0.3 else None
    stops = outputs = None
    if dice.random() < 0.3:  # each expert is open to the first mixture that weighs it
        first = {e: next(o for o, row in enumerate(mixed) if e in row) for e in range(count)}
        stops = tuple(tuple(dice.random() < 0.5 and first[e] != o for e in row) for o, row in enumerate(mixed))
    elif len(mixed) > at_least and dice.random() < 0.4:
        ends = sorted(dice.sample(range(1, len(mixed)), dice.randint(at_least, len(mixed) - 1) - 1))
        outputs = tuple(sum(end <= o for end in ends) for o in range(len(mixed)))
    return Topology(
        tuple(expert_slot),
        mixture_slot,
        tuple(map(tuple, mixed)),
        kinds,
        offsets,
        num_slots=slots,
        mixture_stop=stops,
        mixture_output=outputs,
    )


def _activation(dice: random.Random) -> Activation | str:
    return (
        Activation("leaky_relu", round(dice.uniform(-1.0, 1.5), 3)) if dice.random() < 0.1 else dice.choice(ACTIVATIONS)
    )


def _per_layer(dice: random.Random, layers: int, value: Callable[[], T]) -> tuple[T, ...]:
    """One for all layers, or one for each."""
    return (value(),) * layers if dice.random() < 0.5 else tuple(value() for _ in range(layers))


def _norm(dice: random.Random) -> str | None:
    return dice.choice((None, None, None, "batch", "layer"))


def _rate(dice: random.Random) -> float:
    return dice.choice((0.0, 0.0, 0.0, 0.1, 0.5))


def draw_expert(dice: random.Random, out_features: int) -> MLPSpec:
    """Any make-up of an expert of up to 4 layers."""
    n = dice.randint(1, 4)
    units = (*(dice.randint(1, 9) for _ in range(n - 1)), out_features)
    return MLPSpec(
        units,
        activation=_per_layer(dice, n, lambda: _activation(dice)),
        norm=_per_layer(dice, n, lambda: _norm(dice)),
        norm_position=_per_layer(dice, n, lambda: dice.choice(("before", "after"))),
        bias=_per_layer(dice, n, lambda: dice.random() < 0.7),
        dropout=_per_layer(dice, n, lambda: _rate(dice)),
    )


def draw_gate(dice: random.Random, reads: str | None = None) -> GateSpec:
    """Any gate of up to 2 hidden layers, half of them without one."""
    n = dice.choice((0, 0, 1, 2))
    source: Any = dice.choice(("previous", "with_shared", "raw")) if reads is None else reads
    return GateSpec(
        tuple(dice.randint(1, 5) for _ in range(n)),
        activation=_per_layer(dice, n, lambda: _activation(dice)),
        norm=_per_layer(dice, n, lambda: _norm(dice)),
        dropout=_per_layer(dice, n, lambda: _rate(dice)),
        bias=dice.random() < 0.7,
        logits_norm=dice.choice((None, None, None, "batch")),
        temperature=dice.choice((1.0, 1.0, 0.5, 2.0)),
        input=source,
    )


def _level(dice: random.Random, topology: Topology, reads: str | None) -> Level:
    out = dice.randint(1, 8)
    one = draw_expert(dice, out)
    experts = (one,) * topology.num_experts
    if dice.random() < 0.3:  # several blocks
        others = [one, draw_expert(dice, out), draw_expert(dice, out)]
        experts = tuple(dice.choice(others) for _ in experts)
    if dice.random() < 0.2:  # what the path for few rows serves
        one = MLPSpec(one.units, one.activation, bias=one.bias)
        return Level(topology, (one,) * topology.num_experts, GateSpec(bias=dice.random() < 0.7), False)
    return Level(topology, experts, draw_gate(dice, reads), dice.random() < 0.25)


def _trunk(dice: random.Random) -> tuple[int, tuple[str, dict[str, Any]]]:
    """Number of tasks, name and options of a named trunk."""
    name, tasks = dice.choice(sorted(TRUNKS)), dice.randint(1, 4)
    options: dict[str, Any] = {
        "expert_units": tuple(dice.randint(1, 9) for _ in range(dice.randint(1, 3))),
        "activation": _activation(dice),
        "norm": _norm(dice),
        "dropout": _rate(dice),
        "recompute": dice.random() < 0.25,
    }
    if name in ("ple", "ml_mmoe", "adatt", "stem", "cross_stitch"):
        options["num_levels"] = dice.randint(1, 3)
    if name in ("ple", "cgc", "adatt", "stem"):
        options |= {"task_experts": dice.randint(1, 3), "shared_experts": dice.randint(0 if name == "adatt" else 1, 2)}
    if name in ("ple", "cgc"):
        options["last_shared"] = dice.random() < 0.3
    if name in ("mmoe", "ml_mmoe"):
        options["experts"] = dice.randint(1, 4)
    if name == "home":
        first = sorted(dice.sample(range(tasks), dice.randint(1, tasks)))
        others = [task for task in range(tasks) if task not in first]
        options |= {
            "groups": [first, others] if others else [first],
            "task_experts": dice.randint(1, 2),
            "group_experts": dice.randint(1, 2),
            "shared_experts": dice.randint(1, 2),
            "self_gates": dice.random() < 0.7,
            "feature_gate_experts": dice.randint(0, 2),
            "feature_gate_rank": dice.randint(1, 4),
            "feature_gate_scope": dice.choice(("owner", "expert")),
        }
    if name in ("ple", "cgc", "mmoe", "ml_mmoe", "adatt", "stem", "home"):
        options |= {"gate_units": (dice.randint(1, 5),) * dice.randint(0, 1), "gate_bias": dice.random() < 0.7}
    if name == "asymmetric_sharing":
        options["sources"] = [(k, *(t for t in range(tasks) if t != k and dice.random() < 0.5)) for k in range(tasks)]
    return tasks, (name, options)


def _levels(dice: random.Random, form: str, count: int) -> tuple[Level, ...]:
    """Levels on top of each other; gates above the first may read the raw input."""
    topologies = [draw_topology(dice)]
    for _ in range(count - 1):
        topologies.append(draw_topology(dice, topologies[-1].num_outputs))
    levels = []
    for i, topology in enumerate(topologies):
        # The raw input has a slot for each of the level's, or one for all.
        fits = topologies[0].num_slots in (1, topology.num_slots) or form in ONE_FOR_ALL
        levels.append(_level(dice, topology, None if i and fits else "previous"))
    return tuple(levels)


def _layers(levels: Sequence[Level]) -> list[LayerSpec]:
    of_experts = [layer for level in levels for spec in level.experts for layer in spec.layers]
    return of_experts + [layer for level in levels for layer in level.gate.layers]


def reads_the_batch(levels: Sequence[Level], trunk: tuple[str, dict[str, Any]] | None) -> bool:
    """Whether a row's result in train mode depends on the other rows."""
    if trunk is not None:
        return trunk[1]["norm"] == "batch" or "dice" in str(trunk[1]["activation"])
    return any(level.gate.logits_norm for level in levels) or any(
        layer.norm == "batch" or layer.activation.name == "dice" for layer in _layers(levels)
    )


def drops(levels: Sequence[Level], trunk: tuple[str, dict[str, Any]] | None) -> bool:
    """Whether results in train mode are random."""
    return bool(trunk[1]["dropout"]) if trunk is not None else any(layer.dropout for layer in _layers(levels))


def draw_trial(seed: int) -> Trial:
    """The trial of a seed."""
    dice = random.Random(seed)
    form = dice.choice(sorted(FORMS))
    kind = dice.choice(("level", "level", "stack", "trunk"))
    num_tasks, trunk, gate_features = None, None, None
    levels: tuple[Level, ...] = ()
    if kind == "trunk":
        num_tasks, trunk = _trunk(dice)
        form = dice.choice(ONE_FOR_ALL)
    elif kind == "stack":
        levels = _levels(dice, form, dice.randint(1, 3))
        num_tasks = dice.randint(1, levels[-1].topology.num_outputs)
    else:
        levels = (_level(dice, draw_topology(dice), None),)
        gate_features = dice.randint(1, 7) if dice.random() < 0.3 else None
    way = dice.choices(list(WAYS), list(WAYS.values()))[0]
    rows = 5 if form == "expanded" else dice.choice(ROWS) if dice.random() < 0.7 else dice.randint(2, 12)
    train = way != "served" and dice.random() < 0.7
    if reads_the_batch(levels, trunk) and (rows == 1 or way == "functional"):
        train = False  # PyTorch refuses one row, and under a transform to change statistics in place
    if drops(levels, trunk) and way in ("functional", "compile"):
        train = False  # there PyTorch's own generator drops
    ask_gates = dice.random() < 0.5
    dtype, autocast = torch.float64, None
    if way in LOW_WAYS and dice.random() < 0.2:
        dtype = dice.choice((torch.float32, torch.bfloat16, torch.float16))
        if dice.random() < 0.4:
            dtype, autocast = torch.float32, dice.choice((torch.bfloat16, torch.float16))
    return Trial(
        seed=seed,
        levels=levels,
        trunk=trunk,
        num_tasks=num_tasks,
        in_features=dice.randint(1, 9),
        gate_features=gate_features,
        rows=rows,
        form=form,
        gate_form=dice.choice(sorted(set(FORMS) - {"expanded"})),
        way=way,
        train=train,
        ask_gates=ask_gates,
        gates_enter_loss=ask_gates and dice.random() < 0.7,
        input_grad=dice.random() < 0.8,
        frozen=dice.random() < 0.25,
        strided_weights=dice.random() < 0.1,
        strided_cotangents=dice.random() < 0.25,
        row_blocks=dice.random() < 0.25,
        backward_inside=dice.random() < 0.5,
        dtype=dtype,
        autocast=autocast,
    )
