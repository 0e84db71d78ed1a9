"""Rows with their labels: whole, or read part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from ple_fast_encoder.tables import Table, column_of

from ..losses import TaskLoss
from .arguments import has_no_names, kind_of
from .columns import Encoded
from .labels import Labelled, LabelMoments, joined, labelled
from .network import TaskNetwork
from .parts import Part, Parts, is_parts, is_read_once, parts_of, set_epoch


class Rows(NamedTuple):
    """Rows in memory."""

    data: Encoded
    labels: Labelled
    given: Table
    """The labels as the user's ``score`` reads them."""

    def weighed(self) -> Any:
        """What decides the weights of rows, for a checkpoint."""
        return list(self.labels.weights)

    def blocks(self, rows: int) -> Iterator[tuple[Encoded, Labelled]]:
        """All of them in order, so many at once."""
        for start in range(0, len(self.data), rows):
            part = slice(start, start + rows)
            yield self.data.rows(part), self.labels.rows(part)


class RowParts:
    """Rows that are read part by part, each time anew; at most one part is in memory.

    Raises:
        TypeError, ValueError: while a part is read, see ``MultiTaskModel.fit``.
    """

    def __init__(self, model: TaskNetwork, source: Parts, labels: Any, sample_weight: Any, what: str) -> None:
        if labels is not None:
            raise ValueError(
                f"{what}: expected none beside data that comes in parts, whose labels are columns of each part by the "
                f"names of the tasks, or the second of (table, labels), got {kind_of(labels)}"
            )
        if sample_weight is not None and not _is_named(sample_weight):
            raise TypeError(
                "sample_weight: expected the name of a column, or names by task, of data that comes in parts, got "
                f"{kind_of(sample_weight)}; or parts (table, labels, sample_weight)"
            )
        self.model, self.source, self.sample_weight, self.what = model, source, sample_weight, what
        self.is_read = False

    def check_times(self, times: int) -> None:
        """ValueError where it would be read more often than it can be."""
        if times > 1 and is_read_once(self.source):
            self._refuse()

    def _refuse(self) -> NoReturn:
        what = "data" if self.what == "labels" else "validation"
        raise ValueError(
            f"{what}: expected parts that can be read again, for each epoch and for what is measured before it, got "
            f"{type(self.source).__name__}, which is read once; give a list, a DataLoader, ParquetTables, or an object "
            "whose __iter__ begins anew"
        )

    def weighed(self) -> Any:
        """What decides the weights of rows, for a checkpoint."""
        return dict(self.sample_weight) if isinstance(self.sample_weight, Mapping) else self.sample_weight

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch, 0 the first."""
        set_epoch(self.source, epoch)

    def _tables(self) -> Iterator[Part]:
        if self.is_read and is_read_once(self.source):
            self._refuse()
        self.is_read = True
        return parts_of("data", self.source)

    def _labelled(self, part: Part, rows: int) -> Labelled:
        """The labels of a part that has rows."""
        labels = part.data if part.labels is None else part.labels
        if isinstance(labels, Encoded):
            raise TypeError(f"{self.what}: expected (encoded rows, labels) as a part, got encoded rows alone")
        if labels is part.data:
            _check_labelled(self.model, labels, self.what)
        weight = part.sample_weight
        if weight is not None and self.sample_weight is not None:
            raise ValueError("sample_weight: expected it as an argument or in each part, got both")
        if self.sample_weight is not None:
            weight = _weights_in(part.data, self.sample_weight)
        return labelled(labels, weight, rows, self.model.joint_loss, self.what)

    def __iter__(self) -> Iterator[tuple[Encoded, Labelled]]:
        """The parts that have rows."""
        weighed = None
        for place, part in enumerate(self._tables(), 1):
            try:
                data = self.model.encode(part.data)
                if not len(data):
                    continue
                labels = self._labelled(part, len(data))
            except (TypeError, ValueError) as error:
                raise type(error)(f"part {place}: {error}") from error
            if weighed is None:
                weighed = list(labels.weights)
            if list(labels.weights) != weighed:
                raise ValueError(
                    f"sample_weight: expected every part to have weights of the tasks {weighed}, as the first one, got "
                    f"{list(labels.weights)}"
                )
            yield data, labels
        if weighed is None:
            raise ValueError(f"{self.what}: expected data of at least one row, got none")

    def blocks(self, rows: int) -> Iterator[tuple[Encoded, Labelled]]:
        """All rows in the order of the parts, so many at once or fewer."""
        for data, labels in self:
            for start in range(0, len(data), rows):
                part = slice(start, start + rows)
                yield data.rows(part), labels.rows(part)

    def only_labels(self) -> Iterator[Labelled]:
        """The labels of each part, its columns left as they are."""
        for part in self._tables():
            labels = part.data if part.labels is None else part.labels
            name = self.model.task_names[0]
            first = None if has_no_names(labels) else column_of(labels, name, self.what)
            rows = 1 if first is None else len(first)
            if rows:
                yield self._labelled(part, rows)

    def all_labels(self) -> Labelled:
        """Of every row, in one reading: a few bytes each."""
        found = list(self.only_labels())
        if not found:
            raise ValueError(f"{self.what}: expected data of at least one row, got none")
        return joined(found)

    def measured_tasks(self) -> tuple[TaskLoss, ...]:
        """The tasks, those that are to be standardised with the mean and deviation of their labels: one reading."""
        tasks = self.model.tasks
        moments = {task.name: LabelMoments(task) for task in tasks if task.standardise}
        if moments:
            for labels in self.only_labels():
                for name, found in moments.items():
                    found.add(labels.targets[name])
        return tuple(moments[task.name].measured() if task.name in moments else task for task in tasks)


def _is_named(sample_weight: Any) -> bool:
    """Whether weights are given as the name of a column, or names by task."""
    names = list(sample_weight.values()) if isinstance(sample_weight, Mapping) else [sample_weight]
    return bool(names) and all(isinstance(name, str) for name in names)


def _weights_in(data: Table, names: Any) -> Any:
    """The weights that stand in the data itself."""
    if isinstance(names, str):
        return column_of(data, names)
    return {task: column_of(data, name) for task, name in names.items()}


def _check_labelled(model: TaskNetwork, data: Table, what: str) -> None:
    """ValueError where a table has no labels beside its columns."""
    for name in model.task_names:
        try:
            column_of(data, name, what)
        except ValueError as error:
            raise ValueError(
                f"{what}: expected labels by task beside the data, or, without them, columns of the data by the names "
                f"of the tasks, {model.task_names}, got neither for {name!r}"
            ) from error


def rows_of(model: TaskNetwork, data: Any, labels: Any, sample_weight: Any, what: str) -> Rows | RowParts:
    """Data of a user, checked; encoded where it is one table. TypeError, ValueError: see ``MultiTaskModel.fit``."""
    if is_parts(data):
        return RowParts(model, data, labels, sample_weight, what)
    if labels is None:
        if isinstance(data, Encoded):
            raise TypeError(f"{what}: expected labels by task with encoded rows, got none")
        labels = data
    encoded = model.encode(data)
    if labels is data:
        _check_labelled(model, data, what)
    if sample_weight is not None and _is_named(sample_weight):
        if isinstance(data, Encoded):
            raise TypeError(
                "sample_weight: expected weights with encoded rows, which have no columns by name, got a name"
            )
        sample_weight = _weights_in(data, sample_weight)
    return Rows(encoded, labelled(labels, sample_weight, len(encoded), model.joint_loss, what), labels)
