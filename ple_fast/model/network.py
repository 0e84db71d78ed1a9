"""Columns of a table in, raw outputs per task out: embeddings, trunk and towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ple_fast_encoder import Column, Encoder
from ple_fast_encoder.tables import Table

from ..functional import GateShares
from ..losses import Balance, JointLoss, TaskLoss, entire_space
from ..scalars import check_flag
from ..topology import Topology
from .arguments import check_columns, check_given, has_no_names, kind_of, mapping
from .assigned import check_same_tasks, same_features
from .columns import Encoded, encoded
from .embedding import FeatureEmbedding
from .priors import PriorOptions, Priors
from .task_columns import SlotInputs, check_task_columns, hidden_features
from .tower_stack import run_towers
from .towers import build_tower, tower_options
from .trunks import (
    CUSTOM,
    Trunk,
    check_balanced,
    known_slots,
    make_trunk,
    number_tasks,
    plain,
    trunk_slots,
    trunk_width,
)


class TaskNetwork(nn.Module):
    """What ``MultiTaskModel`` computes, before it is trained, scored, saved or read; the arguments are its."""

    def __init__(
        self,
        columns: Sequence[Column],
        tasks: Sequence[TaskLoss],
        *,
        trunk: Trunk = "ple",
        trunk_options: Mapping[str, Any] | None = None,
        tower_units: Sequence[int] = (64,),
        tower_activation: str = "relu",
        tower_dropout: float = 0.0,
        given: Mapping[str, str] | None = None,
        task_columns: Mapping[str, Sequence[str]] | None = None,
        domain_columns: Sequence[str] | None = None,
        personal_columns: Sequence[str] | None = None,
        prior_gate_units: int | None = None,
        sparse_embeddings: bool = False,
        task_embeddings: bool = False,
        balance: Balance | None = None,
        balance_weight: float = 0.01,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.columns = check_columns(columns)
        self.joint_loss = JointLoss(tasks, process_group=process_group, balance=balance, balance_weight=balance_weight)
        self._given = dict(mapping("given", given))
        check_given(self._given, self.tasks)
        names = [column.name for column in self.columns]
        self._task_columns = check_task_columns(mapping("task_columns", task_columns), self.task_names, names)
        priors = PriorOptions(domain_columns, personal_columns, prior_gate_units, names)
        if priors and self._task_columns:
            raise ValueError(
                "domain_columns, personal_columns: expected no task_columns with them, because the gates read every "
                f"column, those hidden from a task among them, got task_columns={dict(self._task_columns)}"
            )
        if priors and task_embeddings:
            raise ValueError(
                "domain_columns, personal_columns: expected no task_embeddings with them, because the gates read one "
                "embedding of each column, got task_embeddings=True"
            )
        units, dropout = tower_options(tower_units, tower_activation, tower_dropout)
        sparse, own = check_flag("sparse_embeddings", sparse_embeddings), check_flag("task_embeddings", task_embeddings)
        if own:  # for as many slots as the trunk has, which needs to know how wide one is
            with torch.device("meta"):
                width = FeatureEmbedding(self.columns).out_features
        else:
            self.embedding = FeatureEmbedding(self.columns, sparse=sparse)
            width = self.embedding.out_features
        options = dict(plain("trunk_options", dict(mapping("trunk_options", trunk_options))))
        options = number_tasks(trunk, options, [task.name for task in self.tasks])
        self.trunk = make_trunk(trunk, width, len(self.tasks), options)
        if own:
            slots = trunk_slots(self.trunk, len(self.tasks))
            self.embedding = FeatureEmbedding(self.columns, sparse=sparse, slots=slots)
        defaults: dict[str, Any] = {"device": torch.get_default_device(), "dtype": torch.get_default_dtype()}
        like = next(self.trunk.parameters(), torch.empty(0, **defaults))
        self.slot_inputs = self._slot_inputs(self.trunk) if self._task_columns else None
        hidden = trunk_width(self.trunk, width, len(self.tasks), like)
        if balance is not None:
            check_balanced(self.trunk, width, like)
        self.towers = nn.ModuleList(
            build_tower([hidden, *units], task.num_outputs, tower_activation, dropout) for task in self.tasks
        )
        self.priors: Priors | None = None
        if priors:
            features = self.embedding.feature_columns
            self.priors = Priors(features, priors, len(self.tasks), (hidden, *units))
        self._config: dict[str, Any] = {
            "trunk": {"kind": trunk, "options": options}
            if isinstance(trunk, str)
            else {"kind": CUSTOM, "class": type(self.trunk).__qualname__},
            "tower_units": list(units),
            "tower_activation": tower_activation,
            "tower_dropout": dropout,
            "given": dict(self._given),
            **({"task_columns": dict(self._task_columns)} if self._task_columns else {}),
            **({} if balance is None else {"balance": balance, "balance_weight": self.joint_loss.balance_weight}),
            **({"task_embeddings": self.embedding.slots} if own else {}),
            **priors.to_config(),
        }

    def _slot_inputs(self, trunk: nn.Module) -> SlotInputs:
        """What each slot of this trunk may see; refuses one through which a column leaks."""
        features = self.embedding.feature_columns
        hidden = hidden_features(trunk, self.task_names, features, self._task_columns, self._given)
        like = self.embedding.get_buffer("owner")
        return SlotInputs(hidden).to(like.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in PyTorch; a pickle from before there were priors has none."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        if "priors" not in self._modules:
            self.__dict__.setdefault("priors", None)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in PyTorch; another trunk must not leak either, other columns must be what the embedding reads, and
        another joint loss must be of the tasks that the towers are of.

        Raises:
            TypeError, ValueError: ``columns`` whose embedding would be another one: names, order, widths, sizes,
                ``share``, ``pooling``, ``max_length`` and ``missing="indicator"`` are as the model was built.
        """
        if name == "columns" and "embedding" in self._modules:
            value = same_features(self.columns, value)
        if name == "joint_loss" and name in self._modules:
            check_same_tasks(self.tasks, getattr(value, "tasks", None), "joint_loss: expected a JointLoss of")
        if name == "trunk" and "embedding" in self._modules:
            self._check_slots(value)
        if name == "trunk" and self._modules.get("slot_inputs") is not None:
            self.slot_inputs = self._slot_inputs(value)
        super().__setattr__(name, value)

    def _check_slots(self, trunk: Any) -> None:
        """Of a trunk that is assigned; one whose slots nobody knows (wrapped, say) finds out when it runs."""
        slots, found = getattr(self.embedding, "slots", None), known_slots(trunk)
        if slots is not None and found not in (None, slots):
            raise ValueError(
                f"trunk: expected one of {slots} slots, for each of which there are embeddings, got "
                f"{type(trunk).__name__}, which has {found}; build another model"
            )

    @property
    def tasks(self) -> tuple[TaskLoss, ...]:
        """Those of ``joint_loss``. Others may be assigned, of the same names, kinds and classes in the same order.

        Raises:
            TypeError: other than a sequence of ``TaskLoss``.
            ValueError: tasks that the towers are not of.
        """
        return self.joint_loss.tasks

    @tasks.setter
    def tasks(self, tasks: Sequence[TaskLoss]) -> None:
        check_same_tasks(self.tasks, tasks, "tasks: expected")
        self.joint_loss.tasks = tuple(tasks)

    @property
    def given(self) -> Mapping[str, str]:
        """The condition of each task whose output is a product, as the model was built; not to be changed."""
        return MappingProxyType(self._given)

    @property
    def task_columns(self) -> Mapping[str, tuple[str, ...]]:
        """Columns by the task that reads no others, as the model was built; not to be changed."""
        return MappingProxyType(self._task_columns)

    @property
    def task_names(self) -> list[str]:
        """In the order of ``tasks``."""
        return [task.name for task in self.tasks]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.towers.parameters()).device

    @property
    def topologies(self) -> list[Topology]:
        """The wiring of each level of the trunk, for ``ple_fast.viz.gate_use``.

        Raises:
            TypeError: the trunk is a module of the user's without topologies.
        """
        levels = getattr(self.trunk, "levels", [self.trunk])
        found = [getattr(level, "topology", None) for level in levels]
        if not all(isinstance(topology, Topology) for topology in found):
            raise TypeError(f"trunk: expected levels with a topology, got {type(self.trunk).__name__}, which has none")
        return [topology for topology in found if isinstance(topology, Topology)]

    def encode(self, data: Table | Encoded) -> Encoded:
        """Raw columns as codes and numbers (on the CPU). Do it once for data that is read several times.

        Raises:
            TypeError, ValueError: no columns by name, or a column is missing or holds what it was not declared to.
        """
        if isinstance(data, Encoded):
            return data
        if has_no_names(data):
            raise TypeError(
                "data: expected columns by name, a mapping of arrays or a data frame with "
                f"{[column.name for column in self.columns][:60]}, or what encode made of one, got {kind_of(data)}"
            )
        return encoded(self.encoder(), data)

    def encoder(self) -> Encoder:
        """What encodes tables for this model, with NumPy alone; ``save`` keeps it for a process without torch."""
        found: Encoder | None = self.__dict__.get("_encoder")
        if found is None or found.columns is not self.columns:  # assigned anew
            found = self.__dict__["_encoder"] = Encoder(self.columns)
        return found

    @overload
    def forward(self, batch: Table | Encoded) -> dict[str, Tensor]: ...
    @overload
    def forward(
        self, batch: Table | Encoded, *, return_gates: Literal["shares"]
    ) -> tuple[dict[str, Tensor], list[GateShares]]: ...
    def forward(
        self, batch: Table | Encoded, return_gates: Literal["shares"] | None = None
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], list[GateShares]]:
        """Raw outputs by task: ``(B,)`` logits (binary) or values (regression), ``(B, C)`` logits (multiclass).

        ``return_gates="shares"``: also what ``joint_loss`` takes as ``gates`` where the model has a ``balance``.
        """
        features, scales = self._inputs(batch)
        if return_gates is None:
            return self._outputs(self.trunk(features), scales)
        mixtures, gates = self.trunk(features, return_gates=return_gates)
        return self._outputs(mixtures, scales), gates

    def _features(self, batch: Table | Encoded) -> Tensor | list[Tensor]:
        """What the trunk reads: ``(B, F)``; one for each slot where some columns are not for all tasks; ``(B, S, F)``
        where slots have embeddings of their own."""
        return self._inputs(batch)[0]

    def _inputs(self, batch: Table | Encoded) -> tuple[Tensor | list[Tensor], list[Tensor]]:
        """What the trunk reads, and what scales the layers of the towers, or nothing."""
        rows = batch if isinstance(batch, Encoded) else self.encode(batch).to(self.device)
        features: Tensor = self.embedding(rows)
        features = features.to(next(self.towers.parameters()).dtype)
        if self.priors is not None:
            prepared: tuple[Tensor, list[Tensor]] = self.priors(features)
            return prepared
        if self.slot_inputs is None:
            return features, []
        inputs: Tensor | list[Tensor] = self.slot_inputs(features)
        return inputs, []

    def _outputs(self, mixtures: Tensor, scales: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        factor = 2.0 if self.priors is None else self.priors.factor
        for task, output in zip(self.tasks, run_towers(self.towers, mixtures, scales, factor), strict=True):
            outputs[task.name] = output if task.kind == "multiclass" else output.squeeze(1)
            if task.name in self._given:
                outputs[task.name] = entire_space(outputs[self._given[task.name]], outputs[task.name])
        return outputs

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch; a state of another number of tasks is refused before anything is loaded.

        Raises:
            ValueError: ``strict``, and the state has more or fewer towers.
        """
        saved = {name.split(".")[1] for name in state_dict if name.startswith("towers.")}
        if strict and saved and len(saved) != len(self.tasks):
            raise ValueError(
                f"load_state_dict: expected the state of a model of {len(self.tasks)} tasks, {self.task_names}, got "
                f"one of {len(saved)}; build the model with the tasks that were saved, in their order"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
