"""Columns of a table and their encoding, as codes and numbers: NumPy and the standard library alone, no torch.

``ple_fast.model`` encodes by it, and a process in front of a served model can have it alone: this folder is complete.
"""

from .categorical import Categorical
from .columns import Column
from .encoder import Encoder
from .hashed import Hashed
from .numeric import Numeric

__all__ = ["Categorical", "Column", "Encoder", "Hashed", "Numeric"]
