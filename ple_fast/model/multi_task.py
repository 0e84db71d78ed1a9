"""Columns of a table in, one prediction per task out: embeddings, trunk, towers and the joint loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..losses import JointLoss, TaskLoss, entire_space
from ..scalars import check_count
from ..topology import Topology
from . import storage
from .columns import Column, Encoded, encode, from_json, to_json
from .embedding import FeatureEmbedding
from .tables import Array, Table, check_names, column_of, label_values
from .training import EpochResult, Labels, Progress, mean_loss, modes_kept, progress_bar, train
from .trunks import CUSTOM, build_trunk, plain, trunk_width

TOWER_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
Trunk = str | nn.Module | Callable[[int], nn.Module]


class MultiTaskModel(nn.Module):
    """Embeddings of a table's columns, a trunk, one tower (MLP) per task, and their joint loss.

    Initial weights come from PyTorch's global generator: call ``torch.manual_seed`` before.

    Args:
        columns: :class:`Categorical` and :class:`Numeric`; :func:`columns_from` makes them of training data.
        tasks: :class:`~ple_fast.losses.TaskLoss`, names unique.
        trunk: ``"ple"``, ``"cgc"``, ``"mmoe"``, ``"ml_mmoe"``, ``"adatt"``, ``"cross_stitch"``, ``"hard_sharing"``,
            ``"customized_sharing"``, ``"asymmetric_sharing"`` or ``"single_task"``; a module, or a function that takes
            ``in_features`` and returns one, from ``(B, in_features)`` to ``(B, T, H)``.
        trunk_options: keywords of the named trunk's class (``PLE``, ``CGC``, ...), of values that JSON can hold.
        tower_units: widths of each tower's hidden layers, in front of its output.
        tower_activation: one of relu, leaky_relu, prelu, gelu, silu, tanh, sigmoid.
        tower_dropout: behind each hidden layer of the towers.
        given: for events in a chain (ESMM): ``{"purchase": "click"}`` says that the tower of "purchase" predicts the
            probability given a click, and that the task's output is the product with that of "click". Both are binary,
            and the condition stands before in ``tasks``.
        process_group: see :class:`~ple_fast.losses.JointLoss`.

    Raises:
        TypeError: an argument of another type, or an option that the trunk does not have.
        ValueError: a column or task twice, an unknown trunk or activation, a trunk that does not return ``(B, T, H)``.
    """

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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.columns = tuple(columns)
        check_names([column.name for column in self.columns])
        self.joint_loss = JointLoss(tasks, process_group=process_group)
        self.tasks = self.joint_loss.tasks
        self.given = dict(given or {})
        _check_given(self.given, self.tasks)
        if tower_activation not in TOWER_ACTIVATIONS:
            known = ", ".join(TOWER_ACTIVATIONS)
            raise ValueError(f"tower_activation: expected one of {known}, got {tower_activation!r}")
        self.embedding = FeatureEmbedding(self.columns)
        width, options = self.embedding.out_features, dict(plain("trunk_options", dict(trunk_options or {})))
        if not isinstance(trunk, str) and options:
            raise ValueError(f"trunk_options: expected none with a trunk of your own, got {sorted(options)}")
        if isinstance(trunk, str):
            self.trunk = build_trunk(trunk, width, len(self.tasks), options)
        else:
            self.trunk = trunk if isinstance(trunk, nn.Module) else trunk(width)
            if not isinstance(self.trunk, nn.Module):
                raise TypeError(f"trunk: expected the function to return a module, got {self.trunk!r}")
        like = next(self.trunk.parameters(), torch.empty(0))
        hidden = trunk_width(self.trunk, width, len(self.tasks), like)
        self.towers = nn.ModuleList(
            _tower([hidden, *tower_units], task.num_outputs, tower_activation, tower_dropout) for task in self.tasks
        )
        self._config: dict[str, Any] = {
            "trunk": {"kind": trunk, "options": options}
            if isinstance(trunk, str)
            else {"kind": CUSTOM, "class": type(self.trunk).__qualname__},
            "tower_units": list(tower_units),
            "tower_activation": tower_activation,
            "tower_dropout": tower_dropout,
            "given": self.given,
        }

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
            TypeError, ValueError: a column is missing or holds what it was not declared to.
        """
        return data if isinstance(data, Encoded) else encode(data, self.columns)

    def forward(self, batch: Table | Encoded) -> dict[str, Tensor]:
        """Raw outputs by task: ``(B,)`` logits (binary) or values (regression), ``(B, C)`` logits (multiclass)."""
        return self._outputs(self.trunk(self._features(batch)))

    def _features(self, batch: Table | Encoded) -> Tensor:
        rows = batch if isinstance(batch, Encoded) else self.encode(batch).to(self.device)
        features: Tensor = self.embedding(rows)
        return features.to(next(self.towers.parameters()).dtype)

    def _outputs(self, mixtures: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        # unbind, not y[:, k]: the backward of each index would fill a tensor as large as y with zeros.
        for task, tower, mixture in zip(self.tasks, self.towers, mixtures.unbind(1), strict=True):
            output = tower(mixture)
            outputs[task.name] = output if task.kind == "multiclass" else output.squeeze(1)
            if task.name in self.given:
                outputs[task.name] = entire_space(outputs[self.given[task.name]], outputs[task.name])
        return outputs

    def fit(
        self,
        data: Table | Encoded,
        labels: Table,
        *,
        epochs: int = 1,
        batch_size: int = 1024,
        lr: float = 1e-3,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        validation: tuple[Table | Encoded, Table] | None = None,
        score: Callable[[dict[str, Array], Table], float] | None = None,
        patience: int | None = None,
        seed: int = 0,
        progress: bool | Progress | None = None,
    ) -> list[EpochResult]:
        """Trains on all rows of ``data``, in an order of its own generator.

        Args:
            data: columns by name, or what :meth:`encode` made of them.
            labels: by task, ``(N,)``; NaN where a label is missing (multiclass: also -1).
            epochs, batch_size, lr: the last batch is smaller; a single row left over joins the batch before.
            optimizer: called as ``optimizer(parameters, lr=lr)``; ``functools.partial`` sets more.
            validation: data and labels that are scored after each epoch. The weights of the best epoch are restored at
                the end, also when training is interrupted.
            score: of the predictions (see :meth:`predict`) and the validation labels, higher is better; default: minus
                the joint loss.
            patience: stop after so many epochs without a better score.
            seed: of the order of the rows.
            progress: True for a progress bar (needs rich), or a function that is called with a ``Step`` after each
                batch.

        Returns:
            One result per epoch that ran.

        Raises:
            ValueError: no rows, labels that are missing, of another length or out of range, or options that need
                ``validation`` without it.
            FloatingPointError: the loss or the score is not finite.
        """
        for name, count in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
            if count is not None:
                check_count(name, count)
        if validation is None and (score is not None or patience is not None):
            raise ValueError("score, patience: expected validation=(data, labels) with them, got none")
        rows = self.encode(data)
        targets = self._labels(labels, len(rows), "labels")
        scorer = None if validation is None else self._scorer(*validation, score, batch_size)
        generator = torch.Generator().manual_seed(seed)
        steps = optimizer([parameter for parameter in self.parameters() if parameter.requires_grad], lr=lr)
        with modes_kept(self), progress_bar(progress) as report:
            return train(
                self,
                self.joint_loss,
                rows,
                targets,
                optimizer=steps,
                epochs=epochs,
                batch_size=batch_size,
                generator=generator,
                score=scorer,
                patience=patience,
                progress=report,
            )

    def _scorer(
        self,
        data: Table | Encoded,
        labels: Table,
        score: Callable[[dict[str, Array], Table], float] | None,
        batch_size: int,
    ) -> Callable[[], float]:
        rows = self.encode(data)
        targets = self._labels(labels, len(rows), "validation labels")
        if score is not None:
            return lambda: score(self.predict(rows, batch_size=max(batch_size, 8192)), labels)

        def minus_loss() -> float:
            with modes_kept(self):
                self.eval()
                return -mean_loss(self, self.joint_loss, rows, targets, max(batch_size, 8192))

        return minus_loss

    def _labels(self, labels: Table, rows: int, what: str) -> Labels:
        """Labels as float32 tensors, one per task, checked."""
        if rows == 0:
            raise ValueError(f"{what}: expected data of at least one row, got none")
        targets = {}
        for name in self.task_names:
            label = label_values(f"{what}[{name!r}]", column_of(labels, name, what))
            if label.shape != (rows,):
                raise ValueError(f"{what}[{name!r}]: expected one label per row, ({rows},), got shape {label.shape}")
            targets[name] = torch.from_numpy(label)
        self.joint_loss.check_labels(targets)
        return targets

    def predict(self, data: Table | Encoded, *, batch_size: int = 8192) -> dict[str, Array]:
        """Predictions by task, float32: probabilities ``(N,)``, values ``(N,)``, or class probabilities ``(N, C)``.

        In eval mode and without autograd; every module has its own mode back afterwards.
        """
        check_count("batch_size", batch_size)
        parts: dict[str, list[Array]] = {name: [] for name in self.task_names}
        for _, outputs in self._evaluate(data, batch_size, gates=False):
            for task in self.tasks:
                output = outputs[task.name].float()
                if task.kind != "regression":
                    output = output.softmax(1) if task.kind == "multiclass" else output.sigmoid()
                parts[task.name].append(output.cpu().numpy())
        return {name: np.concatenate(part) for name, part in parts.items()}

    def gate_weights(self, data: Table | Encoded, *, batch_size: int = 8192) -> list[list[Tensor]]:
        """The weights of every gate, per level and mixture ``(N, |A(o)|)``, on the CPU.

        ``ple_fast.viz.gate_use(model.gate_weights(data), model.topologies, model.task_names)`` sums them up.

        Raises:
            TypeError: the trunk is a module of the user's without ``return_gates``.
        """
        check_count("batch_size", batch_size)
        _ = self.topologies  # says what is wrong with a trunk that has no gates
        batches = [gates for gates, _ in self._evaluate(data, batch_size, gates=True)]
        levels = zip(*batches, strict=True)
        return [[torch.cat(weights) for weights in zip(*level, strict=True)] for level in levels]

    def _evaluate(
        self, data: Table | Encoded, batch_size: int, *, gates: bool
    ) -> list[tuple[list[list[Tensor]], dict[str, Tensor]]]:
        """Per batch the gates (or nothing) and the raw outputs; one empty batch where there are no rows."""
        rows, found = self.encode(data), []
        with modes_kept(self), torch.inference_mode():
            self.eval()
            for start in range(0, max(len(rows), 1), batch_size):
                features = self._features(rows.rows(slice(start, start + batch_size)).to(self.device))
                weights: list[list[Tensor]] = []
                if gates:
                    mixtures, per_level = self.trunk(features, return_gates=True)
                    if per_level and isinstance(per_level[0], Tensor):  # one level, not a stack
                        per_level = [per_level]
                    weights = [[weight.cpu() for weight in level] for level in per_level]
                else:
                    mixtures = self.trunk(features)
                found.append((weights, self._outputs(mixtures)))
        return found

    def save(self, directory: str | Path) -> None:
        """Writes ``model.safetensors`` and ``config.json`` into a directory, each file at once.

        A trunk of the user's own is not described in the configuration: :meth:`load` then wants it.
        """
        storage.write(
            self,
            {
                "dtype": str(next(self.towers.parameters()).dtype).removeprefix("torch."),
                "columns": [to_json(column) for column in self.columns],
                "tasks": [asdict(task) for task in self.tasks],
                **self._config,
            },
            directory,
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        trunk: nn.Module | Callable[[int], nn.Module] | None = None,
        device: torch.device | str = "cpu",
    ) -> MultiTaskModel:
        """The model that :meth:`save` wrote, in eval mode. Nothing is unpickled.

        Args:
            trunk: for a model with a trunk of the user's own, and only then: such a module, or a function that makes
                it.
            device: where the model goes.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a configuration of another kind or version, or not that of the weights; a trunk that is missing
                or not wanted.
        """
        config = storage.read_config(directory)
        saved = config["trunk"]
        if (saved["kind"] == CUSTOM) != (trunk is not None):
            expected = f"the trunk, of class {saved['class']}" if trunk is None else f"none: it is {saved['kind']!r}"
            raise ValueError(f"trunk: expected {expected}, got {trunk!r}")
        model = cls(
            [from_json(column) for column in config["columns"]],
            [TaskLoss(**task) for task in config["tasks"]],
            trunk=saved["kind"] if trunk is None else trunk,
            trunk_options=saved.get("options"),
            **{key: config[key] for key in ("tower_units", "tower_activation", "tower_dropout", "given")},
        )
        model.to(dtype=getattr(torch, config["dtype"]))
        storage.read_weights(model, directory)
        return model.to(device).eval()


def _tower(widths: Sequence[int], outputs: int, activation: str, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second), TOWER_ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _check_given(given: Mapping[str, str], tasks: Sequence[TaskLoss]) -> None:
    kinds = {task.name: task.kind for task in tasks}
    names = list(kinds)
    for name, condition in given.items():
        if name not in names or condition not in names[: names.index(name)]:
            raise ValueError(
                f"given: expected two of the tasks {names}, the condition first, got {name!r} given {condition!r}"
            )
        if kinds[name] != "binary" or kinds[condition] != "binary":
            raise ValueError(f"given: expected binary tasks, got {name!r} ({kinds[name]}) given {condition!r}")
