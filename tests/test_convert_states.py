"""State dicts of accelerated models: to and from the library's names, on the meta device, through hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ple_fast import accelerate
from tests import test_convert_deepctr_torch as deepctr
from tests import test_convert_torch_rechub as rechub
from tests.peers import adatt
from tests.swap_proof import Case, assert_same_state, flat, shaken

ONE_EACH = next(case for case in adatt.CASES if case.name == "AdaTT, AdaTTSp, one expert per task")
CASES = [rechub.CASES[0], deepctr.CASES[0], deepctr.MMOES[1], adatt.CASES[0], ONE_EACH]


def originals(case: Case) -> tuple[Any, Any]:
    """A model, and one of the same class on the meta device that has been accelerated."""
    torch.manual_seed(0)
    original = shaken(case.make())
    empty = copy.deepcopy(original).to("meta")
    assert accelerate(empty, strict=True).replaced
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    return original, empty


def assert_equal_results(case: Case, model: nn.Module, original: nn.Module) -> None:
    arguments = case.arguments(torch.float32)
    for ours, theirs in zip(flat(model.eval()(*arguments)), flat(original.eval()(*arguments)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same_state(model, original)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_is_assigned_to_an_accelerated_model_on_meta(case: Case) -> None:
    original, empty = originals(case)
    empty.load_state_dict(original.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    assert_equal_results(case, empty, original)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_fills_an_accelerated_model_that_left_the_meta_device(case: Case) -> None:
    original, empty = originals(case)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*empty.parameters(), *empty.buffers()]:
            tensor.fill_(77)  # what memory may hold
    empty.load_state_dict(original.state_dict())
    assert_equal_results(case, empty, original)


def test_a_part_of_a_stacked_tensor_cannot_leave_the_meta_device_alone() -> None:
    case = CASES[0]
    original, empty = originals(case)
    state = original.state_dict()
    name = next(name for name in state if name.endswith("experts_shared.0.mlp.0.weight"))
    with pytest.raises(RuntimeError, match=rf"{name}: missing; the rest of the stacked tensor cannot leave the meta"):
        empty.load_state_dict({k: v for k, v in state.items() if k != name}, assign=True, strict=False)
    without = {k: v for k, v in state.items() if not k.startswith(name.partition(".experts")[0])}
    missing = empty.load_state_dict(without, assign=True, strict=False).missing_keys
    assert sorted(missing) == sorted(k for k in state if k not in without)


def with_hooks(model: nn.Module) -> None:
    """Hooks of a checkpoint format of one's own: every name with a version in front, at every module that a site is."""

    def saved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and "expert" in name]:
            state[prefix + "v2_" + name.removeprefix(prefix)] = state.pop(name)

    def loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in [name for name in state if name.startswith(prefix + "v2_")]:
            state[prefix + name.removeprefix(prefix + "v2_")] = state.pop(name)

    sites = [m for m in model.modules() if type(m).__name__ in ("CGC", "MMOE")] or [model]
    for site in sites:
        site.register_state_dict_post_hook(saved)
        site.register_load_state_dict_pre_hook(loaded)


@pytest.mark.parametrize("case", [rechub.CASES[0], deepctr.CASES[0], deepctr.MMOES[1]], ids=str)
def test_hooks_that_rename_entries_see_the_librarys_names(case: Case) -> None:
    torch.manual_seed(0)
    original, other = shaken(case.make()), case.make()
    for model in (original, other):
        with_hooks(model)
    saved = original.state_dict()
    assert any("v2_" in name for name in saved)
    assert accelerate(other).replaced
    other.load_state_dict(saved)
    assert_equal_results(case, other, original)
    original.load_state_dict(other.state_dict())
    twin = copy.deepcopy(other)
    twin.load_state_dict(other.state_dict(), assign=True)
    assert_same_state(twin, original)


class Renaming(nn.Module):
    """What a library does that has renamed its tensors: old checkpoints load."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(f"{prefix}old_")]:
            state_dict[prefix + name.removeprefix(f"{prefix}old_")] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_class_that_renames_entries_sees_the_librarys_names() -> None:
    case = rechub.CASES[0]
    torch.manual_seed(0)
    original, other = shaken(case.make()), case.make()
    for site in [m for m in other.modules() if type(m).__name__ == "CGC"]:
        site.__class__ = type("CGC", (Renaming, type(site)), {"__module__": type(site).__module__})
    assert accelerate(other).replaced
    old = {name.replace(".experts_", ".old_experts_"): value for name, value in original.state_dict().items()}
    other.load_state_dict(old)
    assert_same_state(other, original)
