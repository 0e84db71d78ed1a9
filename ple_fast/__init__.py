"""The fastest PLE (Progressive Layered Extraction) in PyTorch, that anyone can swap in."""

from .specs import GateSpec, MLPSpec
from .topology import Topology

__version__ = "0.1.0"
__all__ = ["GateSpec", "MLPSpec", "Topology"]
