"""The fastest PLE (Progressive Layered Extraction) in PyTorch, that anyone can swap in."""

from .backend import last_backend, set_backend, use_backend
from .convert import Report, accelerate, pack, restore
from .modules import CGC, PLE, ExtractionNetwork, MMoE
from .specs import GateSpec, MLPSpec
from .topology import Topology

__version__ = "0.1.0"
__all__ = [
    "CGC",
    "PLE",
    "ExtractionNetwork",
    "GateSpec",
    "MLPSpec",
    "MMoE",
    "Report",
    "Topology",
    "accelerate",
    "last_backend",
    "pack",
    "restore",
    "set_backend",
    "use_backend",
]
