"""The fastest PLE (Progressive Layered Extraction) in PyTorch, that anyone can swap in."""

from .backend import last_backend, set_backend, use_backend
from .convert import Report, accelerate, pack, restore
from .explain import LevelReport, explain
from .modules import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    AsymmetricSharing,
    CrossStitch,
    CustomizedSharing,
    EPNet,
    ExtractionNetwork,
    GateNU,
    HardSharing,
    HoME,
    MLMMoE,
    MMoE,
    PPNet,
    SingleTask,
)
from .specs import GateSpec, MLPSpec
from .topology import Topology
from .warmup import warm_up

__version__ = "0.1.0"
__all__ = [
    "CGC",
    "PLE",
    "STEM",
    "AdaTT",
    "AsymmetricSharing",
    "CrossStitch",
    "CustomizedSharing",
    "EPNet",
    "ExtractionNetwork",
    "GateNU",
    "GateSpec",
    "HardSharing",
    "HoME",
    "LevelReport",
    "MLMMoE",
    "MLPSpec",
    "MMoE",
    "PPNet",
    "Report",
    "SingleTask",
    "Topology",
    "accelerate",
    "explain",
    "last_backend",
    "pack",
    "restore",
    "set_backend",
    "use_backend",
    "warm_up",
]
