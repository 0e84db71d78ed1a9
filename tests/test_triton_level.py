"""Whole levels in Triton kernels against the float64 reference, under Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from ple_fast import last_backend, use_backend
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, compare, draw, has_dropout, level

pytest.importorskip("triton")

CASES = [
    *((topology, experts, "plain") for topology in TOPOLOGIES for experts in ("1-layer", "2-layers")),
    *(("ple", experts, "plain") for experts in EXPERTS if experts not in ("1-layer", "2-layers")),
    *((topology, "2-layers", gate) for topology in ("ple", "mixed-kinds") for gate in GATES if gate != "plain"),
]


@pytest.mark.parametrize(("topology", "experts", "gate"), CASES)
@pytest.mark.parametrize("form", ["stacked", "list"])
def test_a_level_equals_the_reference(topology: str, experts: str, gate: str, form: str, device: torch.device) -> None:
    module = level(TOPOLOGIES[topology], EXPERTS[experts], GATES[gate]).to(device)
    slots = module.topology.num_slots
    assert slots is not None
    leaves = [leaf.to(device) for leaf in draw(form, 5, slots, 7)]
    with use_backend("triton"):
        compare(module, leaves, form=form, slots=slots, train=not has_dropout(EXPERTS[experts], GATES[gate]))
    choice = last_backend()
    assert choice is not None
    assert choice.name == "triton"
