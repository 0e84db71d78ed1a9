"""A model from its configuration and its state, and, before that, whether there will be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..scalars import shown
from ..topology import Topology
from . import configuration
from .configuration import columns_of, read_from, tasks_of
from .embedding import FeatureEmbedding
from .network import TaskNetwork
from .saved_state import Sources, class_name, fill, plain_name, select, shapes_of, state_of, uncompiled
from .trunks import CUSTOM

Network = TypeVar("Network", bound=TaskNetwork)

TRUNK, FIRST = "trunk.", "towers.0.0.weight"
OPTIONS = ("tower_units", "tower_activation", "tower_dropout", "given")

LATER_OPTIONS = (
    "sparse_embeddings", "balance", "balance_weight", "domain_columns", "personal_columns", "prior_gate_units"
)  # fmt: skip
"""In the configuration where they were given."""


class _Hidden(nn.Module):
    """In the place of a trunk that nobody has described: ``(B, T, H)``."""

    def __init__(self, num_tasks: int, width: int, slots: int) -> None:
        super().__init__()
        self.shape = (num_tasks, width)
        self.topology = Topology((0,), (0,), ((0,),), num_slots=slots)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], *self.shape)


def saved_form(model: TaskNetwork, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The entries and the configuration that a model is built of again.

    Raises:
        ValueError: it could not be, because it was changed since it was built, or holds what no file can.
    """
    own = dict(config)
    if own["trunk"]["kind"] == CUSTOM:
        own["trunk"] = {"kind": CUSTOM, "class": class_name(model.trunk)}
    configuration.check("save", own)
    try:
        state, sources = state_of(model)
        blank = _blank(type(model), "configuration", own, state)
        _check_parts(model, blank, own)
        chosen = _select_described(state, sources, blank, own)
    except ValueError as error:
        raise ValueError(
            f"save: the model has been changed so that load could not give it back ({error}); undo the change (take "
            "the module out of its wrapper, build the model with the columns, towers and trunk that it has now), or "
            "save model.state_dict() with torch.save"
        ) from error
    if own["trunk"]["kind"] == CUSTOM:
        # The trunk that load is given may compute these values, or hold them as parameters.
        chosen |= {name: value for name, value in state.items() if name.startswith(TRUNK)}
        if computed := {name: entries for name, entries in sources.items() if name.startswith(TRUNK)}:
            own["derived"] = computed
    return chosen, own


def rebuilt(
    cls: type[Network],
    where: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    trunk: nn.Module | Callable[[int], nn.Module] | None,
) -> Network:
    """The model, in the mode that it is built in.

    Raises:
        ValueError: something in the file at ``where``, or a trunk that is missing, not wanted or another one.
    """
    configuration.check(where, config)
    saved = config["trunk"]
    if (saved["kind"] == CUSTOM) != (trunk is not None):
        expected = f"the trunk, of class {saved['class']}" if trunk is None else f"none: it is {saved['kind']!r}"
        raise ValueError(f"trunk: expected {expected}, got {shown(trunk)}")
    sources: Sources = config.get("derived", {})
    with read_from(where):  # before there is memory for what a damaged file asks for
        _select_described(state, sources, _blank(cls, where, config, state), config)
    on_cpu = torch.device("cpu")  # a user's default device may be meta, which has no weights to load into
    if trunk is None:
        with read_from(where), on_cpu:
            model = _built(cls, where, config, saved["kind"])
    else:
        with on_cpu:
            model = _built(cls, where, config, trunk)
        if saved["class"] not in (class_name(model.trunk), type(model.trunk).__qualname__):
            raise ValueError(
                f"trunk: expected one of class {saved['class']}, which was saved, got {class_name(model.trunk)}"
            )
    model.to(dtype=configuration.DTYPES[config["dtype"]])
    try:
        fill(model, state, sources)
    except ValueError as error:
        raise ValueError(
            f"{where}: the weights are not those of this model ({error}); a trunk of your own has to be built as it was"
        ) from error
    return model


def _built(cls: type[Network], where: str | Path, config: Mapping[str, Any], trunk: Any) -> Network:
    options = {name: config[name] for name in OPTIONS}
    options["task_columns"] = config.get("task_columns")
    options |= {name: config[name] for name in LATER_OPTIONS if name in config}
    if "task_embeddings" in config:
        options["task_embeddings"] = True
    if isinstance(trunk, str):
        options["trunk_options"] = config["trunk"]["options"]
    return cls(columns_of(where, config), tasks_of(where, config), trunk=trunk, **options)


def _blank(cls: type[Network], where: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Network:
    """The model that ``load`` would build, without memory; without a trunk where it is the user's."""
    trunk: Any = config["trunk"]["kind"]
    if trunk == CUSTOM:
        # What is hidden depends on its wiring, and what is balanced on its gates.
        config = {**config, "task_columns": None}
        config.pop("balance", None)
        if FIRST not in state or state[FIRST].dim() != 2:
            raise ValueError(f"missing: {FIRST}, unexpected: none")
        trunk = _Hidden(len(config["tasks"]), state[FIRST].shape[1], config.get("task_embeddings", 1))
    with torch.device("meta"):
        return _built(cls, where, config, trunk)


def _select_described(
    state: Mapping[str, Tensor], sources: Sources, blank: nn.Module, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The entries of all that the configuration describes: not of a trunk of the user's own."""
    if config["trunk"]["kind"] == CUSTOM:
        state = {name: value for name, value in state.items() if not name.startswith(TRUNK)}
    return select(state, sources, shapes_of(blank))


def _check_parts(model: TaskNetwork, blank: TaskNetwork, config: Mapping[str, Any]) -> None:
    """ValueError where a part has another class, and computes something else although its entries fit."""
    trunk = uncompiled(model.trunk)
    if config["trunk"]["kind"] != CUSTOM and not isinstance(trunk, type(blank.trunk)):
        raise ValueError(f"trunk: {type(trunk).__name__}, expected {type(blank.trunk).__name__}")
    embedding = uncompiled(model.embedding)
    if not isinstance(embedding, FeatureEmbedding):
        raise ValueError(f"embedding: {type(embedding).__name__}, expected FeatureEmbedding")
    if embedding.layout != blank.embedding.layout:
        raise ValueError("embedding: one of other columns, widths or pooling, expected that of model.columns")
    ours, expected = _layers(model.towers), _layers(blank.towers)
    for name in dict.fromkeys([*expected, *ours]):
        found, kind = ours.get(name), expected.get(name)
        if found is None or kind is None or not isinstance(found, type(kind)):
            names = [type(layer).__name__ if layer is not None else "none" for layer in (found, kind)]
            raise ValueError(f"towers.{name}: {names[0]}, expected {names[1]}")


def _layers(towers: nn.Module) -> dict[str, nn.Module]:
    """Every module by name, without what parametrises it."""
    named = towers.named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in named if "parametrizations" not in name.split(".")}
