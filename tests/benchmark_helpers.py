"""What the tests of the benchmarks share."""

from __future__ import annotations

import pytest
from torch import nn

from benchmarks.configs import (
    TrunkConfig,
)
from benchmarks.contestants import CONTESTANTS, build


def trunk_of(name: str, config: TrunkConfig) -> nn.Module:
    if requires := CONTESTANTS[name].requires:
        pytest.importorskip(requires)
    return build(name, config)
