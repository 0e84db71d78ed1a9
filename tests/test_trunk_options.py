"""Trunks' keywords: which each takes, what they are without, and what help, editors and errors say of them."""

from __future__ import annotations

import inspect
import pydoc
import typing
from typing import Any

import pytest
import torch

import ple_fast
from ple_fast import PLE, HardSharing
from ple_fast.model.trunks import TRUNKS
from ple_fast.modules.stack import Stack

REQUIRED = inspect.Parameter.empty
UNGATED = {
    "expert_units": (256, 128),
    "activation": "relu",
    "norm": None,
    "dropout": 0.0,
    "recompute": False,
    "device": None,
    "dtype": None,
}
GATED = {**UNGATED, "gate_units": (), "gate_bias": True, "gate_top_k": None, "gate_joint_k": 0}
# Every keyword of every trunk with its default, as written out one by one before they stood in one place.
KEYWORDS: dict[str, dict[str, Any]] = {
    "PLE": {
        "num_levels": 2,
        "task_experts": 2,
        "shared_experts": 2,
        "shared_expert_units": None,
        "shared_gate_scope": "all",
        "last_shared": False,
        **GATED,
    },
    "CGC": {
        "task_experts": 2,
        "shared_experts": 2,
        "shared_expert_units": None,
        "shared_gate_scope": "all",
        "last_shared": False,
        **GATED,
    },
    "MMoE": {"experts": 8, **GATED},
    "MLMMoE": {"num_levels": 2, "experts": 8, **GATED},
    "AdaTT": {"num_levels": 2, "task_experts": 2, "shared_experts": 0, **GATED},
    "STEM": {"num_levels": 1, "task_experts": 2, "shared_experts": 2, **GATED},
    "HoME": {
        "groups": REQUIRED,
        "task_experts": 2,
        "group_experts": 2,
        "shared_experts": 2,
        "self_gates": True,
        "feature_gate_experts": 2,
        "feature_gate_rank": 32,
        "feature_gate_scope": "owner",
        **GATED,
        "activation": "silu",
        "norm": "batch",
    },
    "CrossStitch": {"num_levels": 2, "own_weight": 0.9, **UNGATED},
    "HardSharing": UNGATED,
    "CustomizedSharing": UNGATED,
    "AsymmetricSharing": {"sources": REQUIRED, **UNGATED},
    "SingleTask": UNGATED,
}
# A value of each keyword that is no trunk's default.
OTHER: dict[str, Any] = {
    "num_levels": 3,
    "task_experts": 3,
    "shared_experts": 1,
    "shared_expert_units": (9, 4),
    "shared_gate_scope": "shared",
    "last_shared": True,
    "experts": 5,
    "own_weight": 0.5,
    "groups": [[0, 1]],
    "group_experts": 1,
    "self_gates": False,
    "feature_gate_experts": 1,
    "feature_gate_rank": 3,
    "feature_gate_scope": "expert",
    "sources": [(0,), (1,)],
    "expert_units": (7, 4),
    "activation": "prelu",
    "norm": "layer",
    "dropout": 0.25,
    "recompute": True,
    "device": "meta",
    "dtype": torch.float64,
    "gate_units": (3,),
    "gate_bias": False,
}
TYPES = {
    "expert_units": "int | collections.abc.Sequence[int] | collections.abc.Sequence[collections.abc.Sequence[int]]",
    "gate_units": "collections.abc.Sequence[int]",
    "gate_bias": "bool",
    "activation": "Any",
    "norm": "Any",
    "dropout": "Any",
    "recompute": "bool",
    "device": "torch.device | str | None",
    "dtype": "torch.dtype | None",
}


def _trunk(name: str) -> Any:
    return getattr(ple_fast, name)


def _build(name: str, **options: Any) -> Stack:
    needs: dict[str, dict[str, Any]] = {
        "AsymmetricSharing": {"sources": [(0,), (0, 1)]},
        "HoME": {"groups": [[0], [1]]},
    }
    needed = needs.get(name, {})
    trunk: Stack = _trunk(name)(5, 2, **{**needed, **options})
    return trunk


def _make_up(trunk: Stack) -> tuple[Any, ...]:
    tensors = [(name, t.shape, t.dtype, t.device) for name, t in trunk.state_dict().items()]
    levels: list[Any] = list(trunk.levels)
    return repr(trunk), tensors, [(level.topology, level.gate.offset_start) for level in levels]


def test_the_trunks_here_are_all_trunks() -> None:
    assert sorted(KEYWORDS) == sorted(trunk.__name__ for trunk in TRUNKS.values())


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_signature_names_every_keyword_with_its_default(name: str) -> None:
    signature = inspect.signature(_trunk(name))
    first, second, *keywords = signature.parameters.values()
    assert [(p.name, p.kind, p.default) for p in (first, second)] == [
        ("in_features", inspect.Parameter.POSITIONAL_OR_KEYWORD, REQUIRED),
        ("num_tasks", inspect.Parameter.POSITIONAL_OR_KEYWORD, REQUIRED),
    ]
    assert {p.name: p.default for p in keywords} == KEYWORDS[name]
    assert {p.kind for p in keywords} == {inspect.Parameter.KEYWORD_ONLY}
    assert next(iter(inspect.signature(_trunk(name).__init__).parameters)) == "self"


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_signature_names_the_type_of_every_keyword(name: str) -> None:
    parameters = inspect.signature(_trunk(name)).parameters
    hints = typing.get_type_hints(_trunk(name).__init__)
    assert hints.keys() == {*parameters, "return"}
    for key, parameter in parameters.items():
        assert parameter.annotation == hints[key] != REQUIRED
        if key in TYPES:
            assert inspect.formatannotation(parameter.annotation).removeprefix("typing.") == TYPES[key]


@pytest.mark.parametrize("name", KEYWORDS)
def test_help_says_what_every_keyword_is(name: str) -> None:
    text = pydoc.plain(pydoc.render_doc(_trunk(name)))
    for key in KEYWORDS[name]:
        assert f"{key}: " in text.partition(" -> None")[0], f"{key} is not in the signature"
    assert "**options" not in text
    assert "``LevelOptions``" not in text and "``UngatedOptions``" not in text
    doc = inspect.getdoc(_trunk(name)) or ""
    assert max(map(len, doc.splitlines())) <= 120
    if "Args:" in doc:  # others say whose arguments theirs are
        named = [line.partition(":")[0].strip() for line in doc.partition("Args:")[2].splitlines()]
        assert [key for key in KEYWORDS[name] if named.count(key) != 1] == []


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_trunk_takes_its_keywords_and_no_others(name: str) -> None:
    for key, value in OTHER.items():
        options: dict[str, Any] = {"expert_units": (6, 4)}
        if (name, key) == ("CGC", "shared_gate_scope"):
            options["last_shared"] = True
        if key not in KEYWORDS[name]:
            with pytest.raises(TypeError, match=rf"^{name}.__init__\(\) got an unexpected keyword argument '{key}'"):
                _build(name, **options, **{key: value})
            continue
        changed = _build(name, **{**options, key: value})
        assert _make_up(changed) != _make_up(_build(name, **options)), f"{key} does nothing"


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_default_is_what_a_keyword_is_without(name: str) -> None:
    defaults = {key: value for key, value in KEYWORDS[name].items() if value is not REQUIRED}
    assert _make_up(_build(name, **defaults)) == _make_up(_build(name))


@pytest.mark.parametrize(
    ("keyword", "near"),
    [
        ("expert_unit", "expert_units"),
        ("num_level", "num_levels"),
        ("drop_out", "dropout"),
        ("shared_units", "shared_expert_units"),
        ("in_feature", "in_features"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest_name(keyword: str, near: str) -> None:
    with pytest.raises(TypeError) as error:
        PLE(5, 2, **{keyword: 3})  # type: ignore[arg-type]  # that is the test
    assert str(error.value) == (
        f"PLE.__init__() got an unexpected keyword argument {keyword!r}. Did you mean {near!r}?"
    )


def test_an_unknown_keyword_far_from_all_names_is_refused_without_a_guess() -> None:
    with pytest.raises(TypeError) as error:
        HardSharing(5, 2, gate_units=(3,))  # type: ignore[call-arg]  # that is the test
    assert str(error.value) == "HardSharing.__init__() got an unexpected keyword argument 'gate_units'"


def test_what_is_no_keyword_is_refused_as_by_any_function() -> None:
    with pytest.raises(TypeError, match=r"^PLE.__init__\(\) missing 1 required positional argument: 'num_tasks'$"):
        PLE(5)  # type: ignore[call-arg]  # that is the test
    with pytest.raises(TypeError, match=r"^HardSharing.__init__\(\) takes 3 positional arguments but 4 were given$"):
        HardSharing(5, 2, (4,))  # type: ignore[call-arg]  # that is the test
    with pytest.raises(TypeError, match=r"^AsymmetricSharing.__init__\(\) missing .* keyword-only .* 'sources'$"):
        ple_fast.AsymmetricSharing(5, 2)  # type: ignore[call-arg]  # that is the test


def test_a_class_of_a_user_has_its_own_keywords_and_passes_the_others_on() -> None:
    class Mine(PLE):
        def __init__(self, in_features: int, *, wide: bool, **options: Any) -> None:
            super().__init__(in_features, 2, expert_units=(8 if wide else 4,), **options)

    assert list(inspect.signature(Mine).parameters) == ["in_features", "wide", "options"]
    assert Mine(5, wide=True, norm="layer").out_features == 8
    with pytest.raises(TypeError, match=r"PLE.__init__\(\) got an unexpected keyword argument 'norms'.*'norm'"):
        Mine(5, wide=True, norms="layer")
