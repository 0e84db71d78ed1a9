"""The fastest PLE (Progressive Layered Extraction) in PyTorch, that anyone can swap in."""

from .backend import last_backend, set_backend, use_backend
from .convert import pack
from .modules import (
    CGC,
    PLE,
    AdaTT,
    AsymmetricSharing,
    CrossStitch,
    CustomizedSharing,
    ExtractionNetwork,
    HardSharing,
    MLMMoE,
    MMoE,
    SingleTask,
)
from .specs import GateSpec, MLPSpec
from .topology import Topology

__version__ = "0.1.0"
__all__ = [
    "CGC",
    "PLE",
    "AdaTT",
    "AsymmetricSharing",
    "CrossStitch",
    "CustomizedSharing",
    "ExtractionNetwork",
    "GateSpec",
    "HardSharing",
    "MLMMoE",
    "MLPSpec",
    "MMoE",
    "SingleTask",
    "Topology",
    "last_backend",
    "pack",
    "set_backend",
    "use_backend",
]
