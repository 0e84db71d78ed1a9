"""The weighted sum of the tasks' losses (eq. 8-10)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import GateShares
from ..scalars import check_number, shown
from .balance import BALANCES, Balance, balance_loss
from .task_loss import MISSING_CLASS, TaskLoss, TaskSum, check_tensor, task_sum


class JointLossResult(NamedTuple):
    """What :class:`JointLoss` returns; every tensor is 0-dimensional and on the device of the predictions."""

    total: Tensor
    """Eq. 8: the sum of the weighted losses; call ``backward`` on it."""
    per_task: dict[str, Tensor]
    """Eq. 9: each task's loss without its weight, differentiable (``detach`` what you keep)."""
    counts: dict[str, Tensor]
    """Size of each sample space, int64; summed over ranks where a process group is given."""
    sample_weights: dict[str, Tensor]
    """What each task's losses were divided by: the sum of the weights in its sample space, or its count."""
    balance: Tensor | None = None
    """How far from balanced the gates are (1: they are), differentiable, without its weight; None where none is asked
    for."""


class JointLoss(nn.Module):
    """The weighted sum of the tasks' losses, each over its own sample space (PLE paper, section 4.3).

    ``total = sum_k w_k * gamma_k ** t * L_k`` with ``L_k`` the mean of task k's loss over its sample space (eq. 8-10)
    and the epoch ``t`` in the buffer ``epoch``, which :meth:`step_epoch` advances. An empty space contributes exactly
    0, also to the gradients. Computed in float32 (in float64 where predictions are), also under autocast.

    **Distributed.** With a process group the counts of eq. 9 are summed over its ranks, and each rank's sums are
    multiplied by the number of ranks: the *mean* of the losses over ranks, and of the gradients, which is what
    DistributedDataParallel takes, is then that of the union of all batches, however unevenly labels are spread. A
    rank's own result is its share. Every rank of the group must call the loss. Initialise ``torch.distributed`` first:
    ``dist.group.WORLD`` is None before, and None counts locally.

    Args:
        tasks: at least one, names unique.
        process_group: the ranks that share a batch; None for one process.
        balance: adds ``balance_weight`` times a loss that is 1 where the experts are used alike: ``"gate"`` by each
            gate, ``"level"`` by all gates of a level together (see ``losses/balance.py``). :meth:`forward` then takes
            ``gates``. Each rank balances its own batch.
        balance_weight: above 0 and finite.

    Raises:
        TypeError: an entry of ``tasks`` is no ``TaskLoss``, or the weight is no number.
        ValueError: no task, or two of one name; an unknown ``balance``, or a weight that is not above 0 and finite.
    """

    epoch: Tensor
    balance: Balance | None = None  # of losses that were pickled before there was one
    balance_weight: float = 0.01

    def __init__(
        self,
        tasks: Sequence[TaskLoss],
        *,
        process_group: dist.ProcessGroup | None = None,
        balance: Balance | None = None,
        balance_weight: float = 0.01,
    ) -> None:
        super().__init__()
        if isinstance(tasks, TaskLoss):
            raise TypeError(f"tasks: expected a sequence of TaskLoss, got one: [{tasks!r}] is one")
        self.tasks = tuple(tasks)
        if not self.tasks:
            raise ValueError("tasks: expected at least one TaskLoss, got none")
        for task in self.tasks:
            if not isinstance(task, TaskLoss):
                raise TypeError(f"tasks: expected TaskLoss, got {shown(task)}")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: expected unique names, got {names}")
        self.process_group = process_group
        if balance is not None and balance not in BALANCES:
            raise ValueError(f'balance: expected "gate", "level" or None, got {shown(balance)}')
        self.balance = balance
        self.balance_weight = check_number("balance_weight", balance_weight)
        if not 0 < self.balance_weight < math.inf:
            raise ValueError(f"balance_weight: expected a finite number above 0, got {self.balance_weight}")
        # An integer buffer: .half() leaves it alone, and a compiled loss need not be compiled anew per epoch.
        self.register_buffer("epoch", torch.zeros((), device=torch.get_default_device(), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Back to epoch 0 (also after ``to_empty`` from the meta device)."""
        self.epoch.zero_()

    @torch.no_grad()
    def step_epoch(self) -> None:
        """One epoch is over: each weight is multiplied by its gamma (eq. 10)."""
        self.epoch.add_(1)

    def weights(self) -> dict[str, float]:
        """The loss weights of the present epoch, eq. 10."""
        epoch = int(self.epoch)
        return {task.name: float(task.weight * task.gamma**epoch) for task in self.tasks}

    def forward(
        self,
        predictions: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        sample_weight: Mapping[str, Tensor] | None = None,
        gates: Sequence[GateShares] | None = None,
    ) -> JointLossResult:
        """The joint loss of a batch.

        Args:
            predictions: raw tower outputs by task, floating: ``(B,)`` or ``(B, 1)`` logits or values, ``(B, C)`` logits
                of a multi-class task. NaN outside the sample space does not reach the loss or its gradients.
            labels: by task, ``(B,)`` or ``(B, 1)``, of any real dtype; more names than tasks are allowed. NaN takes a
                sample out of the sample space; so does ``MISSING_CLASS`` (-1) in a multi-class task. Values are not
                checked here, where this would wait for the device: :meth:`check_labels` does it, once per data set.
            masks: by task, bool, ``(B,)`` or ``(B, 1)``; False takes a sample out as well. Tasks may be absent.
            sample_weight: by task, floating, ``(B,)`` or ``(B, 1)``, 0 or more: L_k is then the weighted mean,
                ``sum w l / sum w``, so a weight of 0 takes a sample out, and equal weights change nothing. Tasks may be
                absent. With a process group either all ranks give weights, of the same tasks, or none does.
            gates: with ``balance``, what the trunk returned with ``return_gates="shares"``; without it None.

        Raises:
            TypeError: not tensors by task, a prediction or weight that is not floating, a complex label, a mask that is
                not bool.
            ValueError: a missing or unknown task, shapes or devices that do not agree, or a task whose
                ``standardise=True`` has not been measured; ``gates`` without ``balance``, or the other way round.
        """
        masks = {} if masks is None else masks
        sample_weight = {} if sample_weight is None else sample_weight
        names = [task.name for task in self.tasks]
        given_by_task = {"predictions": predictions, "labels": labels, "masks": masks, "sample_weight": sample_weight}
        for source, given in given_by_task.items():
            _check_named(source, given, names[0])
        for source, given in (("predictions", predictions), ("masks", masks), ("sample_weight", sample_weight)):
            for name in given:
                if name not in names:
                    raise ValueError(f"{source}: there is no task {name!r}, the tasks are {names}; leave it out")
        parts: list[TaskSum] = []
        for task in self.tasks:
            name = task.name
            if name not in predictions or name not in labels:
                absent = "predictions" if name not in predictions else "labels"
                given = predictions if name not in predictions else labels
                raise ValueError(f"{absent}: expected an entry for task {name!r}, got {sorted(given)}")
            parts.append(task_sum(task, predictions[name], labels[name], masks.get(name), sample_weight.get(name)))
        count_of = torch.stack([part.size for part in parts])
        ranks = 1
        if self.process_group is not None:
            dist.all_reduce(count_of, group=self.process_group)
            ranks = dist.get_world_size(self.process_group)
        count_by_task = dict(zip(names, count_of.unbind(), strict=True))
        if sample_weight:
            weight_of = torch.stack([part.weight.to(part.total.dtype) for part in parts])
            if self.process_group is not None:
                dist.all_reduce(weight_of, group=self.process_group)
            weight_by_task = dict(zip(names, weight_of.unbind(), strict=True))
            divisors = torch.where(weight_of > 0, weight_of, 1.0)
        else:
            weight_by_task, divisors = count_by_task, count_of.clamp(min=1)
        losses = [ranks * part.total / divisor for part, divisor in zip(parts, divisors.unbind(), strict=True)]
        terms = [self._weight(task, loss.dtype) * loss for task, loss in zip(self.tasks, losses, strict=True)]
        balance = self._balance(gates)
        if balance is not None:
            terms.append(self.balance_weight * balance.to(terms[0].dtype))
        return JointLossResult(
            total=torch.stack(terms).sum(),
            per_task=dict(zip(names, losses, strict=True)),
            counts=count_by_task,
            sample_weights=weight_by_task,
            balance=balance,
        )

    def _balance(self, gates: Sequence[GateShares] | None) -> Tensor | None:
        if (gates is None) != (self.balance is None):
            if gates is None:
                raise ValueError(
                    f'gates: balance={self.balance!r} needs what the trunk returns with return_gates="shares", got None'
                )
            raise ValueError('gates: expected None without balance; JointLoss(tasks, balance="gate") reads them')
        return None if gates is None or self.balance is None else balance_loss(gates, self.balance)

    def check_labels(self, labels: Mapping[str, Tensor]) -> None:
        """Looks at the values of whole label columns, which ``forward`` does not (it would wait for the device).

        Raises:
            TypeError: not tensors by task.
            ValueError: a task without labels, a binary label outside [0, 1], a class that is none of 0 to C - 1
                (or -1: missing), an infinite regression label; NaN (missing) is fine everywhere.
        """
        _check_named("labels", labels, self.tasks[0].name)
        for task in self.tasks:
            if task.name not in labels:
                raise ValueError(f"labels: expected an entry for task {task.name!r}, got {sorted(labels)}")
            check_tensor(f"labels[{task.name!r}]", labels[task.name])
            label = labels[task.name].to(torch.float64)  # in uint8, -1 is 255
            label = label[~label.isnan()]
            if task.kind == "binary":
                wrong, expected = (
                    (label < 0) | (label > 1),
                    "labels from 0 to 1, and NaN or a mask where one is missing",
                )
            elif task.kind == "regression":
                wrong, expected = label.isinf(), "finite labels, and NaN or a mask where one is missing"
            else:
                assert task.num_classes is not None
                wrong = (label < MISSING_CLASS) | (label >= task.num_classes) | (label != label.floor())
                expected = (
                    f"classes 0 to {task.num_classes - 1}, and {MISSING_CLASS}, NaN or a mask where one is missing"
                )
            if bool(wrong.any()):
                some = label[wrong].unique()[:5].tolist()
                raise ValueError(
                    f"labels[{task.name!r}]: expected {expected}; got {int(wrong.sum())} others, such as {some}"
                )

    def unlabelled(self, labels: Mapping[str, Tensor]) -> list[str]:
        """Names of the tasks that have no label at all in whole label columns (``MISSING_CLASS`` and NaN are none)."""
        found = []
        for task in self.tasks:
            missing = labels[task.name].isnan()
            if task.kind == "multiclass":
                missing = missing | (labels[task.name].to(torch.float64) == MISSING_CLASS)  # in uint8, -1 is 255
            if bool(missing.all()):
                found.append(task.name)
        return found

    def extra_repr(self) -> str:
        balance = [] if self.balance is None else [f"balance={self.balance!r}, balance_weight={self.balance_weight}"]
        return "\n".join([*map(repr, self.tasks), *balance])

    def _weight(self, task: TaskLoss, dtype: torch.dtype) -> Tensor | float:
        """In the dtype of the loss: two tensors of one element each are multiplied in the wider of theirs."""
        return task.weight if task.gamma == 1 else task.weight * task.gamma ** self.epoch.to(dtype)


def _check_named(source: str, given: object, task: str) -> None:
    if isinstance(given, (Tensor, list, tuple)):
        raise TypeError(f"{source}: expected tensors by task, such as {{{task!r}: tensor}}, got {type(given).__name__}")
