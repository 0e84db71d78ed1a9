"""Tasks that read columns of their own: what each slot of a trunk reads, and that nothing hidden reaches a task.

A video's number of comments may be read by the task "comment rate", and would give the click away. Task ``t`` owns slot
``t`` of the first level, where the trunk has a slot for each task; the other slots are shared, and read what every task
may read. Which slot reaches which task follows from the topologies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..modules import ExtractionNetwork, HoME
from ..modules.stack import Stack
from ..scalars import own_scalar, shown
from .saved_state import uncompiled

if TYPE_CHECKING:
    from typing_extensions import Self

Hidden = tuple[tuple[bool, ...], ...]
"""Per slot of the trunk, of each feature whether the slot must not see it."""
Path = tuple[str, ...]
MEND = (
    'PLE with shared_gate_scope="shared", one level without a shared mixture (trunk="cgc"), or columns that both tasks '
    "may read, would do"
)


def check_task_columns(task_columns: Any, tasks: Sequence[str], columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of columns by the task that reads no others.

    Raises:
        TypeError: no mapping to sequences of names.
        ValueError: a task or a column that there is not, a column twice, or no column.
    """
    found: dict[str, tuple[str, ...]] = {}
    for task, names in task_columns.items():
        if task not in tasks:
            raise ValueError(f"task_columns: expected some of the tasks {list(tasks)}, got {shown(task)}")
        if isinstance(names, (str, Mapping)) or not isinstance(names, Iterable):
            raise TypeError(f"task_columns[{task!r}]: expected a list of names of columns, got {shown(names)}")
        found[task] = tuple(map(own_scalar, names))
        unknown = [name for name in found[task] if name not in columns]
        if unknown:
            known = list(columns)[:60]
            raise ValueError(f"task_columns[{task!r}]: expected some of the columns {known}, got {shown(unknown[0])}")
        if not found[task] or len(set(found[task])) < len(found[task]):
            raise ValueError(f"task_columns[{task!r}]: expected at least one column, each once, got {shown(names)}")
    return found


def hidden_features(
    trunk: nn.Module,
    tasks: Sequence[str],
    features: Sequence[str],
    task_columns: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
) -> Hidden:
    """What each slot of the trunk must not see.

    Args:
        trunk: levels of the library's own; its first ``T`` mixtures (or pairs of them) are the tasks'.
        tasks: names, in order.
        features: of each feature the name of its column.
        task_columns: names of columns by task; a task that is not in it reads all.
        given: the condition of each task whose output is a product.

    Raises:
        TypeError: a trunk whose wiring is not known.
        ValueError: a column reaches a task that must not read it, by which path, and what would mend it; or a column
            that a task may read is read by no slot that reaches it.
    """
    columns = tuple(dict.fromkeys(features))
    may = [frozenset(task_columns.get(task, columns)) for task in tasks]
    for task, condition in given.items():
        leaked = may[tasks.index(condition)] - may[tasks.index(task)]
        product = f"the output of {condition!r}", f"given={{{task!r}: {condition!r}}}"
        _refuse(leaked, columns, task, product, "columns that both tasks may read would do")
    paths, slots = _paths(trunk, tasks), 1 if _is_home(trunk) else _levels(trunk)[0].topology.num_slots
    assert slots is not None
    owns = slots >= len(tasks)
    every = frozenset(columns).intersection(*may)
    reads = [may[slot] if owns and slot < len(tasks) else every for slot in range(slots)]
    for (slot, t), path in paths.items():
        start = f"the slot of {tasks[slot]!r}" if owns and slot < len(tasks) else "the shared slot"
        _refuse(reads[slot] - may[t], columns, tasks[t], (start, *path), MEND)
    for t, task in enumerate(tasks):
        reached = frozenset[str]().union(*(reads[slot] for slot, end in paths if end == t))
        unread = [column for column in columns if column in may[t] - reached]
        if unread:
            raise ValueError(
                f"task_columns: {task!r} may read {unread[0]!r}, but the trunk ({type(trunk).__name__}) has no slot of "
                "its own for each task, and a shared one reads what every task may read; a trunk with slots for tasks "
                '("cgc"; "ple" with shared_gate_scope="shared"), or columns for all tasks, would do'
            )
    return tuple(tuple(name not in names for name in features) for names in reads)


class SlotInputs(nn.Module):
    """Features ``(B, F)`` as each slot reads them: S tensors ``(B, F)``, 0 where they are hidden.

    Slots that read the same share one tensor. Features of each slot's own, ``(B, S, F)``, stay one tensor.
    """

    def __init__(self, hidden: Hidden) -> None:
        super().__init__()
        self._rows = tuple(dict.fromkeys(hidden))
        self._slots = tuple(self._rows.index(row) for row in hidden)
        self._hides = tuple(any(row) for row in self._rows)
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        """Make anew what follows from the columns, and is in no state dict."""
        with torch.inference_mode(False):
            masks = torch.tensor(self._rows, dtype=torch.bool, device=device)
        self.register_buffer("masks", masks, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As in PyTorch; after ``to_empty`` nobody else would write the masks."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self._fill(self.get_buffer("masks").device)
        return self

    def forward(self, features: Tensor) -> Tensor | list[Tensor]:
        if self.get_buffer("masks").device != features.device:  # parameters were assigned
            self._fill(features.device)
        masks = self.get_buffer("masks").unbind(0)
        if features.dim() == 3:
            return features.masked_fill(torch.stack([masks[row] for row in self._slots]), 0.0)
        views = [
            features.masked_fill(mask, 0.0) if hides else features
            for mask, hides in zip(masks, self._hides, strict=True)
        ]
        return [views[row] for row in self._slots]

    def digest(self) -> str:
        """Tells what is hidden from what is hidden elsewhere."""
        return hashlib.sha256(repr((self._rows, self._slots)).encode()).hexdigest()


def _refuse(leaked: frozenset[str], columns: Sequence[str], task: str, path: Path, mend: str) -> None:
    if leaked:
        column = next(name for name in columns if name in leaked)
        raise ValueError(
            f"task_columns: expected that {task!r} cannot see {column!r}, which it must not read, but it can: "
            f"{' -> '.join((*path, repr(task)))}; {mend}"
        )


def _levels(trunk: nn.Module) -> list[ExtractionNetwork]:
    """Of a trunk that computes what its wiring says, and nothing else."""
    trunk = uncompiled(trunk)
    levels: list[Any] = list(map(uncompiled, trunk.levels)) if isinstance(trunk, Stack) else [trunk]
    known = {Stack.forward, HoME.forward, ExtractionNetwork.forward}
    does_no_more = all(
        getattr(module.forward, "__func__", None) in known
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in (trunk, *levels)
    )
    if not does_no_more or not levels or not all(isinstance(level, ExtractionNetwork) for level in levels):
        raise TypeError(
            "task_columns: expected a trunk whose wiring is known, of ExtractionNetworks without hooks or a forward of "
            f"your own, got {type(trunk).__name__}; hide the columns in it yourself"
        )
    return levels


def _is_home(trunk: nn.Module) -> bool:
    """HoME reads one slot, whatever its wiring says: all experts of its first level see the same, scaled or not."""
    return isinstance(uncompiled(trunk), HoME)


def _edges(level: ExtractionNetwork, is_first: bool, slot: int, is_raw: bool) -> Iterator[tuple[int, str]]:
    """The mixtures that read a slot, each with what reads it. ``is_raw``: a slot of the first level, not of this one,
    which gates on the raw input read."""
    topology = level.topology
    assert topology.mixture_kind is not None
    pairs = zip(topology.mixture_kind, topology.mixture_experts, strict=True)
    chooses = [kind == "sigmoid" or (kind == "softmax" and len(experts) > 1) for kind, experts in pairs]
    reads_raw = level.gate_spec.input == "raw" and not is_first
    reads, added = topology.mixture_slot, None
    if level.gate_spec.input == "with_shared":
        added = (topology.num_slots or 0) - 1
    for mixture, experts in enumerate(topology.mixture_experts):
        found = [e for e in experts if topology.expert_slot[e] == slot]
        if found and not is_raw:
            yield mixture, f"expert {found[0]}"
        # A softmax over one expert gives it weight 1, whatever it reads.
        elif chooses[mixture] and reads_raw == is_raw and slot in (reads[mixture], added):
            yield mixture, "gate"


def _paths(trunk: nn.Module, tasks: Sequence[str]) -> dict[tuple[int, int], Path]:
    """By slot of the first level and number of a task that it reaches: a shortest way there, for people to read."""
    levels, parts = _levels(trunk), getattr(trunk, "parts", 1)
    if _is_home(trunk):
        return {(0, t): ("expert 0 of level 0", "what all groups share") for t in range(len(tasks))}
    slots = levels[0].topology.num_slots
    assert slots is not None
    found: dict[tuple[int, int], Path] = {}
    for start in range(slots):
        at: dict[int, Path] = {start: ()}
        for number, level in enumerate(levels):
            # The only slot of a first level is what all gates on the raw input read.
            raw = range(level.topology.num_slots or 0) if slots == 1 else (start,)
            sources = [(slot, path, False) for slot, path in at.items()]
            sources += [(slot, (), True) for slot in raw] if number else []
            after: dict[int, Path] = {}
            outputs = level.topology.mixture_output
            for slot, path, is_raw in sources:
                for mixture, what in _edges(level, number == 0, slot, is_raw):
                    steps = f"{what} of level {number}", f"mixture {mixture} of level {number}"
                    output = mixture if outputs is None else outputs[mixture]
                    after.setdefault(output, (*path, *steps))
            at = after
        for mixture, path in at.items():
            if mixture < len(tasks) * parts:
                found.setdefault((start, mixture // parts), path)
    return found
