"""Named sizes: every shape, batch and budget that a benchmark uses is written here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Mode = Literal["forward", "train", "inference"]
"""``forward``: a graph is recorded; ``train``: reset of the gradients, forward, backward; ``inference``: eval mode."""
MODES: tuple[Mode, ...] = ("forward", "train", "inference")

THREADS = 2
ROUNDS = 15
"""Paired rounds per head-to-head and per grid point; the issue asks for at least 15."""
QUICK_ROUNDS = 3
WARMUP_ROUNDS = 2
MIN_SAMPLE_S = 0.02
"""A sample repeats its call until it lasts at least this long, so that the clock and the call loop do not count."""
SEED = 20


@dataclass(frozen=True)
class TrunkConfig:
    """One PLE trunk and its batch: input ``(batch, in_features)``, T outputs ``(batch, units[-1])``.

    ``units`` are the widths of each expert's layers, at every level unless ``later_units`` says that the levels after
    the first have others; gates are one linear layer and a softmax.
    """

    name: str
    batch: int
    in_features: int
    num_tasks: int
    task_experts: int = 2
    shared_experts: int = 2
    units: tuple[int, ...] = (256, 128)
    num_levels: int = 2
    dtype: str = "float32"
    later_units: tuple[int, ...] = ()
    norm: Literal["batch", "layer"] | None = None
    """Of the experts' layers, and of the gates' one hidden layer (``gate_units``): for the compiler, never timed."""
    dropout: float = 0.0
    activation: str = "relu"
    """Of the experts' layers."""
    gate_units: tuple[int, ...] = ()
    logits_norm: Literal["batch"] | None = None
    gate_top_k: int | None = None
    gate_joint_k: int = 0
    groups: int = 0
    """HoME in the place of PLE, with its tasks dealt out to so many groups."""
    scaled_slots: int = 0
    """In the place of the trunk its input scaled for so many slots: for the compiler."""
    has_stacked_towers: bool = False
    """In the place of the trunk towers of ``units``, one for each task: for the compiler."""
    is_stem: bool = False
    """STEM in the place of PLE, with a slot for each task and a shared one: for the compiler."""
    autocast: str = ""
    """The dtype of the region of autocast that it is called in, with float32 parameters; empty: none."""

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def num_experts(self) -> int:
        return self.num_tasks * self.task_experts + self.shared_experts

    def level_units(self) -> tuple[tuple[int, ...], ...]:
        """Widths of an expert's layers at each level."""
        return (self.units,) + (self.later_units or self.units,) * (self.num_levels - 1)

    @property
    def out_features(self) -> int:
        """Width of each task's output."""
        return self.level_units()[-1][-1]

    def level_inputs(self) -> tuple[int, ...]:
        """Input width of each level."""
        return (self.in_features, *(units[-1] for units in self.level_units()[:-1]))

    def gate_sizes(self, level: int) -> tuple[int, ...]:
        """Experts that each mixture of a level weighs: the tasks', then (unless last) the shared mixture's."""
        own = (self.task_experts + self.shared_experts,) * self.num_tasks
        return own if level == self.num_levels - 1 else (*own, self.num_experts)

    def with_dtype(self, dtype: str) -> TrunkConfig:
        """The same trunk in another dtype."""
        return replace(self, dtype=dtype)

    def under_autocast(self, dtype: str) -> TrunkConfig:
        """The same trunk called under autocast to a dtype; empty: without."""
        return replace(self, autocast=dtype)

    def at(self, batch: int) -> TrunkConfig:
        """The same trunk at another batch."""
        return replace(self, batch=batch)


SIZES: dict[str, TrunkConfig] = {
    c.name: c
    for c in (
        # The size of the head-to-head; its batches are below.
        TrunkConfig("cpu", 4096, 512, 3),
        # A small, a medium and a large trunk: on a GPU bound by calls, by memory traffic and by products.
        TrunkConfig("small", 4096, 256, 2, units=(128, 64)),
        TrunkConfig("medium", 16384, 512, 3),
        TrunkConfig("large", 65536, 1024, 4, task_experts=4, shared_experts=4, units=(512, 256)),
        # After Tang et al., RecSys 2020, section 5: one-layer experts, two levels; the input is 40 categorical columns,
        # 4 wide each, the batch a usual one (the paper prints neither width nor batch).
        TrunkConfig("paper", 1024, 160, 2, task_experts=1, shared_experts=1, units=(256,)),
        # The same kind of network as wide as a GPU wants it: one-layer experts, each level narrower than the one below.
        TrunkConfig("paper_gpu", 8192, 512, 2, task_experts=4, shared_experts=4, units=(256,), later_units=(128,)),
        # For the compiler: 36 experts and 9 mixtures; widths that no tile divides.
        TrunkConfig("many_tasks", 4096, 256, 8, task_experts=4, shared_experts=4, units=(128, 64)),
        TrunkConfig("odd", 1000, 100, 3, units=(72, 200)),
        # All of a level in one program: few experts, narrow ones.
        TrunkConfig("tiny", 1024, 64, 2, task_experts=1, shared_experts=1, units=(64, 32)),
        # Norms and dropout: hidden layers of the gates, a norm of the logits; layers that no tile of a product covers.
        TrunkConfig("batch_norm", 16384, 512, 3, norm="batch", dropout=0.1, logits_norm="batch", num_levels=1),
        TrunkConfig("batch_norm_small", 4096, 256, 2, units=(128, 64), norm="batch", logits_norm="batch", num_levels=1),
        TrunkConfig(
            "layer_norm", 16384, 512, 3, units=(300, 128), norm="layer", dropout=0.1, gate_units=(64,), num_levels=1
        ),
        TrunkConfig("dropout", 16384, 512, 3, dropout=0.1, num_levels=1),
        # Gates that choose two of eight experts.
        TrunkConfig("top_k", 16384, 512, 3, units=(128,), gate_top_k=2, num_levels=1),
        TrunkConfig("joint_k", 16384, 512, 3, units=(128,), gate_top_k=2, gate_joint_k=1, num_levels=1),
        # Sigmoids, sums of mixtures, and the projections of feature gates, whose rank is a width of 32.
        TrunkConfig("home", 16384, 512, 3, units=(128,), groups=2, norm="batch", activation="silu"),
        # Slots scaled element by element: of an input that all of them read, and of one for each.
        TrunkConfig("scale", 16384, 512, 3, scaled_slots=8),
        # Towers of all tasks as one level, of which one output is left.
        TrunkConfig("towers", 16384, 128, 6, units=(64, 1), has_stacked_towers=True),
        # Gradients that stop, and gates with an input of their own, between two levels.
        TrunkConfig("stem", 16384, 512, 3, units=(128,), is_stem=True),
        # Activations whose formulas take registers; dice has statistics and parameters of its own.
        *(TrunkConfig(name, 16384, 512, 3, activation=name, num_levels=1) for name in ("silu", "gelu", "tanh", "dice")),
    )
}

HEAD_TO_HEAD: tuple[tuple[Mode, int], ...] = (
    ("train", 4096),
    ("train", 256),
    ("inference", 4096),
    ("inference", 256),
    ("inference", 1),
)
"""(mode, batch) of the head-to-head on the size ``cpu``."""

SUITE_SIZES: tuple[str, ...] = ("cpu", "cpu-256", "small", "paper")
"""Sizes of the pytest-benchmark suite on a CPU: ``medium`` and ``large`` take minutes a step there."""
QUICK_SUITE_SIZES: tuple[str, ...] = ("paper",)


def suite_config(name: str) -> TrunkConfig:
    """``NAME`` or ``NAME-BATCH``: a named size, or that size at another batch."""
    base, _, batch = name.partition("-")
    if base not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, or one with -BATCH appended, got {name!r}")
    return SIZES[base].at(int(batch)) if batch else SIZES[base]


AOT_SIZES: tuple[str, ...] = (
    "small", "medium", "large", "paper", "paper_gpu", "many_tasks", "odd", "tiny",
    "batch_norm", "batch_norm_small", "layer_norm", "dropout", "top_k", "joint_k", "scale", "towers", "home",
    "stem", "silu", "gelu", "tanh", "dice",
)  # fmt: skip
AOT_DTYPES: dict[str, tuple[str, ...]] = {
    "small": ("bfloat16", "float16", "float32/tf32", "float32/ieee", "float64"),
    "medium": ("bfloat16", "float32/tf32"),
    "large": ("bfloat16", "float32/tf32"),
    "paper": ("bfloat16", "float32/tf32"),
    "paper_gpu": ("bfloat16", "float32/tf32"),
    "many_tasks": ("bfloat16", "float32/tf32"),
    "odd": ("bfloat16", "float32/tf32", "float32/ieee"),
    "tiny": ("bfloat16", "float32/tf32", "float32/ieee"),
    "batch_norm": ("bfloat16", "float32/tf32"),
    "batch_norm_small": ("bfloat16", "float32/ieee", "float64"),
    "layer_norm": ("bfloat16", "float32/tf32"),
    "dropout": ("bfloat16", "float32/tf32"),
    "top_k": ("bfloat16", "float64"),
    "joint_k": ("bfloat16", "float64"),
    "scale": ("bfloat16", "float32/ieee", "float64"),
    "towers": ("bfloat16", "float32/tf32"),
    "home": ("bfloat16", "float32/tf32"),
    "stem": ("bfloat16", "float32/tf32"),
    "silu": ("bfloat16", "float32/tf32"),
    "gelu": ("bfloat16", "float32/tf32"),
    "tanh": ("bfloat16",),
    "dice": ("bfloat16",),
}
"""What ``aot.py`` compiles ahead of time for sm_90: dtypes and float32 precisions per size."""
AOT_DTYPES_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "small": ("bfloat16", "float32/tf32"),
    "medium": ("bfloat16",),
    "large": ("bfloat16",),
    "odd": ("bfloat16", "float32/ieee"),
    "tiny": ("bfloat16",),
    "batch_norm": ("bfloat16",),
    "batch_norm_small": ("float64",),
    "layer_norm": ("bfloat16",),
    "dropout": ("bfloat16",),
    "top_k": ("bfloat16",),
    "joint_k": ("bfloat16",),
    "scale": ("bfloat16",),
    "towers": ("bfloat16",),
    "stem": ("bfloat16",),
    "silu": ("bfloat16",),
}
"""For other architectures: every kernel, in fewer sizes."""


def aot_dtypes(architecture: str) -> dict[str, tuple[str, ...]]:
    """What ``aot.py`` compiles for an architecture."""
    return AOT_DTYPES if architecture == "sm_90" else AOT_DTYPES_ELSEWHERE


HOST = TrunkConfig("host", 1024, 64, 2, units=(64, 32), dtype="bfloat16")
"""What ``host_time.py`` runs, on a driver whose launches do nothing: two levels of six experts of two layers."""
HOST_ROUNDS = 201
"""Many and short: what else runs on the machine disturbs some of them."""

GPU_SIZES: tuple[str, ...] = ("small", "medium", "large", "paper_gpu")
GPU_DTYPES: dict[str, tuple[str, str]] = {"bfloat16": ("bfloat16", "highest"), "tf32": ("float32", "high")}
"""What ``run_gpu.py`` measures: dtype of the trunk and precision of float32 products."""
GPU_MODES: tuple[Mode, ...] = ("train", "inference", "forward")
GPU_ROUNDS = 15


@dataclass(frozen=True)
class GpuPhase:
    """A part of the GPU benchmark, by what it leaves out; nothing: all of it."""

    sizes_without: tuple[str, ...] = ()
    dtypes_without: tuple[str, ...] = ()
    modes_without: tuple[str, ...] = ()
    contestants: tuple[str, ...] | None = None
    """Only these; None: all."""

    def has(self, size: str, dtype: str, mode: str, contestant: str) -> bool:
        """Whether a case is part of it."""
        if size in self.sizes_without or dtype in self.dtypes_without or mode in self.modes_without:
            return False
        return self.contestants is None or contestant in self.contestants


_MAIN = ("fast", "fast_recompute", "loop", "loop_compiled")
_PEERS = ("rechub", "deepctr", "bmm")
GPU_PHASES: tuple[GpuPhase, ...] = (
    GpuPhase(("paper_gpu",), ("tf32",), ("forward",), _MAIN),
    GpuPhase(("paper_gpu",), ("tf32",), ("forward",), _PEERS),
    GpuPhase(("paper_gpu",), (), ("forward",), (*_MAIN, *_PEERS)),
)
"""What is measured first, because time on a GPU may end: bfloat16, training and inference, ours and the loop; the
peers; the same in TF32. The rest comes last."""
COPY_BYTES = 1 << 30
"""Of the copy whose speed is the ceiling for memory traffic."""


@dataclass(frozen=True)
class GpuTarget:
    """What a training step in bfloat16 shall reach at a size; None: no target."""

    eager_over_eager: float
    """Speed of ours, eager, over the best eager peer;"""
    graph_over_eager: float | None
    """of ours in a CUDA graph over the best eager peer;"""
    graph_over_compiled: float
    """and over the best compiled peer, in a CUDA graph or not."""
    roofline: float | None = None
    """Share of the speed that the measured ceilings allow."""


GPU_TARGETS: dict[str, GpuTarget] = {
    "small": GpuTarget(4.0, 10.0, 2.5),
    "medium": GpuTarget(3.0, None, 1.7),
    "large": GpuTarget(2.0, None, 1.3, 0.7),
}
SAVED_TARGETS: dict[str, float] = {"fast": 0.65, "fast_recompute": 0.1}
"""Bytes saved for backward in units of the eager loop's, at most."""

# The grid: batch 1 to 65,536, 2 to 8 tasks, 1 to 4 expert layers. Every batch sees the two corners (few tasks with one
# layer, many tasks with four) and two points between them; the largest batches have narrow layers, so that no point
# needs more than 8 GB or about a minute.
_GRID_UNITS: dict[str, dict[int, tuple[int, ...]]] = {
    "wide": {1: (128,), 2: (256, 128), 3: (256, 128, 64), 4: (256, 128, 128, 64)},
    "narrow": {1: (32,), 2: (64, 32), 3: (64, 64, 32), 4: (64, 64, 32, 32)},
}
_GRID_FEATURES = {"wide": 256, "narrow": 64}
_GRID_POINTS: dict[int, tuple[str, tuple[tuple[int, int], ...]]] = {  # batch: widths, (tasks, layers)
    1: ("wide", ((2, 1), (3, 2), (4, 3), (8, 4))),
    16: ("wide", ((2, 1), (2, 4), (8, 1), (8, 4))),
    128: ("wide", ((2, 1), (3, 2), (4, 3), (8, 4))),
    512: ("wide", ((2, 1), (2, 4), (8, 1), (8, 4))),
    2048: ("wide", ((2, 1), (3, 2), (4, 3), (8, 4))),
    16384: ("narrow", ((2, 1), (2, 4), (8, 1), (8, 4))),
    65536: ("narrow", ((2, 1), (3, 2), (4, 3), (8, 4))),
}
GRID: tuple[TrunkConfig, ...] = tuple(
    TrunkConfig(
        f"b{batch}-t{tasks}-l{layers}",
        batch,
        _GRID_FEATURES[widths],
        tasks,
        units=_GRID_UNITS[widths][layers],
    )
    for batch, (widths, points) in _GRID_POINTS.items()
    for tasks, layers in points
)
GRID_MODES: tuple[Mode, ...] = ("train", "inference")
QUICK_GRID: tuple[str, ...] = ("b1-t2-l1", "b128-t3-l2")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: embeddings of one width for every categorical field, a PLE trunk, a tower per task."""

    fields: tuple[tuple[str, int], ...]
    """Name and vocabulary."""
    width: int
    num_tasks: int
    task_experts: int
    shared_experts: int
    units: tuple[int, ...]
    num_levels: int
    tower_units: tuple[int, ...]


# The fields of KuaiRand-Pure's log (Gao et al., CIKM 2022) with about as many values as it has; ids are random.
KUAIRAND = ModelConfig(
    fields=(
        *(("user_id", 25_200), ("video_id", 6_400), ("author_id", 5_700), ("music_id", 6_100), ("tag", 110)),
        *(("tab", 15), ("hour", 24), ("upload_type", 12), ("video_type", 3), ("music_type", 6)),
        *(("user_active_degree", 9), ("follow_range", 8), ("fans_range", 9), ("friend_range", 7)),
        *(("register_range", 8), ("is_live_streamer", 2), ("is_video_author", 2)),
        *(
            (f"onehot_feat{i}", size)
            for i, size in enumerate((2, 7, 49, 1421, 16, 34, 3, 115, 449, 7, 5, 5, 3, 3, 3, 3, 3, 3))
        ),
    ),
    width=16,
    num_tasks=3,
    task_experts=2,
    shared_experts=2,
    units=(256, 128),
    num_levels=2,
    tower_units=(64,),
)
WHOLE_MODEL: tuple[tuple[Mode, int], ...] = (("train", 4096), ("train", 256), ("inference", 512))
"""(mode, batch) of the whole models."""
QUICK_WHOLE_MODEL: tuple[tuple[Mode, int], ...] = (("train", 256),)
SCALING_BATCHES: tuple[int, ...] = (4096, 1024)
"""Rows on each rank."""
QUICK_SCALING_BATCHES: tuple[int, ...] = (64,)
SCALING_RANKS: tuple[int, ...] = (1, 2)


EMBEDDINGS = ModelConfig(
    fields=(("id", 20_000), ("hour", 24), ("device", 8)), width=16, num_tasks=2, task_experts=2, shared_experts=1,
    units=(128, 64), num_levels=2, tower_units=(32,),
)  # fmt: skip
"""A small model, so that what its largest table costs is no small part of a step."""
EMBEDDING_ROWS: tuple[int, ...] = (20_000, 200_000, 2_000_000)
"""Ids of its first field."""
EMBEDDING_BATCH = 1024
EMBEDDING_GROWTH = 1.3
"""Of a step with sparse gradients, from the least of ``EMBEDDING_ROWS`` to the most, at most."""


@dataclass(frozen=True)
class RoutingConfig:
    """A level whose gates choose: what skipping experts is measured on."""

    batch: int
    in_features: int
    num_tasks: int
    units: tuple[int, ...]
    top_k: int
    joint_k: int


ROUTING = RoutingConfig(batch=4096, in_features=512, num_tasks=4, units=(256, 128), top_k=2, joint_k=1)
ROUTING_EXPERTS: tuple[int, ...] = (8, 32, 128)


@dataclass(frozen=True)
class TowerConfig:
    """What a tower reads, and its hidden layers; it has one output."""

    in_features: int
    units: tuple[int, ...]


TOWERS: tuple[TowerConfig, ...] = (TowerConfig(128, (64,)), TowerConfig(256, (128, 64)))
TOWER_TASKS: tuple[int, ...] = (2, 6, 12)
TOWER_BATCHES: tuple[int, ...] = (64, 256, 1024, 4096)

MODEL_STEPS: tuple[tuple[Mode, int], ...] = (("train", 4096), ("train", 256), ("inference", 4096), ("inference", 64))
"""(mode, batch) of the steps of whole models of ours."""
