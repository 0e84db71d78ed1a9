"""The joint loss of the PLE paper (section 4.3, eq. 8-10): each task averaged over its own sample space.

A task's *sample space* is the set of samples that it learns from: those with a label, or what a mask says. ESMM's pair
over the entire space is a composition: :func:`entire_space` gives the logit of pCTCVR = pCTR * pCVR, for a binary task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .scalars import check_count, check_number, own_scalar, shown

__all__ = ["MISSING_CLASS", "JointLoss", "JointLossResult", "TaskLoss", "entire_space"]

Kind = Literal["binary", "regression", "multiclass"]
MISSING_CLASS = -1
"""The class label that takes a sample out of the sample space of a multi-class task."""


@dataclass(frozen=True)
class TaskLoss:
    """The loss of one task: binary (cross-entropy on logits), regression (squared error) or multiclass (cross-entropy).

    Args:
        name: the key of the task in predictions, labels and masks.
        num_classes: C, at least 2, for a multi-class task; None otherwise.
        weight: the loss weight w_k,0 at epoch 0, above 0.
        gamma: the ratio gamma_k, above 0, by which the weight changes per epoch (eq. 10).

    Numbers may be NumPy's; they are kept as int and float.

    Raises:
        TypeError: the name is no string, the classes are no int, or a weight or ratio is no number.
        ValueError: an unknown kind, classes that do not fit it, or a weight or ratio that is not above 0 and finite.
    """

    name: str
    kind: Kind = "binary"
    num_classes: int | None = None
    weight: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_scalar(self.name))
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {shown(self.name)}")
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"task {self.name!r}: expected a kind of {', '.join(get_args(Kind))}, got {shown(self.kind)}"
            )
        if self.kind == "multiclass":
            where = f"task {self.name!r}: num_classes of kind='multiclass'"
            if self.num_classes is None:
                raise ValueError(f"{where}: expected 2 or more, got None")
            object.__setattr__(self, "num_classes", check_count(where, self.num_classes, least=2))
        elif self.num_classes is not None:
            raise ValueError(
                f"task {self.name!r}: num_classes={self.num_classes!r} is for kind='multiclass'; "
                f"leave it out for {self.kind!r}"
            )
        for field in ("weight", "gamma"):
            value = check_number(f"task {self.name!r}: {field}", getattr(self, field))
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"task {self.name!r}: expected a finite {field} above 0, got {value!r}")
            object.__setattr__(self, field, value)

    @property
    def num_outputs(self) -> int:
        """Width of the tower's output: one logit or value, or C logits."""
        return self.num_classes or 1


class JointLossResult(NamedTuple):
    """What :class:`JointLoss` returns; every tensor is 0-dimensional and on the device of the predictions."""

    total: Tensor
    """Eq. 8: the sum of the weighted losses; call ``backward`` on it."""
    per_task: dict[str, Tensor]
    """Eq. 9: each task's loss without its weight, differentiable (``detach`` what you keep)."""
    counts: dict[str, Tensor]
    """Size of each sample space, int64; summed over ranks where a process group is given."""


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

    Raises:
        TypeError: an entry of ``tasks`` is no ``TaskLoss``.
        ValueError: no task, or two of one name.
    """

    epoch: Tensor

    def __init__(self, tasks: Sequence[TaskLoss], *, process_group: dist.ProcessGroup | None = None) -> None:
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
    ) -> JointLossResult:
        """The joint loss of a batch.

        Args:
            predictions: raw tower outputs by task, floating: ``(B,)`` or ``(B, 1)`` logits or values, ``(B, C)`` logits
                of a multi-class task. NaN outside the sample space does not reach the loss or its gradients.
            labels: by task, ``(B,)`` or ``(B, 1)``, of any real dtype; more names than tasks are allowed. NaN takes a
                sample out of the sample space; so does ``MISSING_CLASS`` (-1) in a multi-class task. Values are not
                checked here, where this would wait for the device: :meth:`check_labels` does it, once per data set.
            masks: by task, bool, ``(B,)`` or ``(B, 1)``; False takes a sample out as well. Tasks may be absent.

        Raises:
            TypeError: not tensors by task, a prediction that is not floating, a complex label, a mask that is not bool.
            ValueError: a missing or unknown task, or shapes or devices that do not agree.
        """
        masks = {} if masks is None else masks
        names = [task.name for task in self.tasks]
        for source, given in (("predictions", predictions), ("labels", labels), ("masks", masks)):
            _check_named(source, given, names[0])
        for source, given in (("predictions", predictions), ("masks", masks)):
            for name in given:
                if name not in names:
                    raise ValueError(f"{source}: there is no task {name!r}, the tasks are {names}; leave it out")
        sums, counts = [], []
        for task in self.tasks:
            name = task.name
            if name not in predictions or name not in labels:
                absent = "predictions" if name not in predictions else "labels"
                given = predictions if name not in predictions else labels
                raise ValueError(f"{absent}: expected an entry for task {name!r}, got {sorted(given)}")
            total, count = _task_sum(task, predictions[name], labels[name], masks.get(name))
            sums.append(total)
            counts.append(count)
        count_of = torch.stack(counts)
        ranks = 1
        if self.process_group is not None:
            dist.all_reduce(count_of, group=self.process_group)
            ranks = dist.get_world_size(self.process_group)
        losses = [ranks * total / count for total, count in zip(sums, count_of.clamp(min=1).unbind(), strict=True)]
        terms = [self._weight(task, loss.dtype) * loss for task, loss in zip(self.tasks, losses, strict=True)]
        return JointLossResult(
            total=torch.stack(terms).sum(),
            per_task=dict(zip(names, losses, strict=True)),
            counts=dict(zip(names, count_of.unbind(), strict=True)),
        )

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
            _check_tensor(f"labels[{task.name!r}]", labels[task.name])
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
        return "\n".join(map(repr, self.tasks))

    def _weight(self, task: TaskLoss, dtype: torch.dtype) -> Tensor | float:
        """In the dtype of the loss: two tensors of one element each are multiplied in the wider of theirs."""
        return task.weight if task.gamma == 1 else task.weight * task.gamma ** self.epoch.to(dtype)


def entire_space(ctr_logit: Tensor, cvr_logit: Tensor) -> Tensor:
    """The logit of pCTCVR = pCTR * pCVR (ESMM), from the logits of the two towers.

    With ``p = sigmoid(a) sigmoid(b)``: ``1 / p - 1 = exp(-a) + exp(-b) + exp(-a - b)``, and ``logit(p)`` is minus its
    logarithm, taken so that values and gradients are exact to rounding however large the logits are. Give it to a
    binary task over all impressions, beside that of the click: ``{"ctr": a, "ctcvr": entire_space(a, b)}``; its
    sigmoid is the probability.

    Args:
        ctr_logit, cvr_logit: floating, of one shape and device.

    Returns:
        The same shape; float32, or float64 where an argument is.

    Raises:
        TypeError: an argument is no tensor, or not floating.
        ValueError: the shapes differ: ``(B,)`` and ``(B, 1)`` would silently become ``(B, B)``.
    """
    for name, logit in (("ctr_logit", ctr_logit), ("cvr_logit", cvr_logit)):
        _check_tensor(name, logit)
        if not logit.is_floating_point():
            raise TypeError(f"{name}: expected floating logits, got {logit.dtype}")
    if ctr_logit.shape != cvr_logit.shape:
        raise ValueError(f"expected logits of one shape, got {tuple(ctr_logit.shape)} and {tuple(cvr_logit.shape)}")
    a, b = _wide(ctr_logit), _wide(cvr_logit)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    # The largest term goes out of the sum: exp(-low) where high >= 0, exp(-low - high) elsewhere. Both cases are one
    # formula in min(high, 0), so that all its uses take the derivative of the same side at 0. A logsumexp would not do:
    # its derivative exp(term - result) is off by the rounding of large logits.
    negative = high.clamp(max=0)
    return low + negative - torch.log1p(torch.exp(low - high + negative) + torch.exp(2 * negative - high))


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: bfloat16 has 8 bits for a probability near 1."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _task_sum(task: TaskLoss, prediction: Tensor, label: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of a task's losses over its sample space, and the size of the space (int64)."""
    where = f"[{task.name!r}]"
    _check_tensor("predictions" + where, prediction)
    _check_tensor("labels" + where, label)
    if not prediction.is_floating_point():
        raise TypeError(f"predictions{where}: expected floating {task.kind} outputs, got {prediction.dtype}")
    if label.is_complex():
        raise TypeError(f"labels{where}: expected a real dtype, got {label.dtype}")
    if task.kind == "multiclass":
        if prediction.ndim != 2 or prediction.shape[1] != task.num_classes:
            raise ValueError(
                f"predictions{where}: expected logits (B, {task.num_classes}), got shape {tuple(prediction.shape)}"
            )
    else:
        prediction = _column("predictions" + where, prediction)
    label = _column("labels" + where, label)
    valid = ~label.isnan()
    if task.kind == "multiclass":
        if not label.is_floating_point():
            label = label.to(torch.int64)  # in uint8, -1 is 255
        valid = valid & (label != MISSING_CLASS)
    rows = {f"predictions{where}": prediction, f"labels{where}": label}
    if mask is not None:
        _check_tensor("masks" + where, mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"masks{where}: expected bool, got {mask.dtype}; say `mask.bool()`")
        rows[f"masks{where}"] = mask = _column("masks" + where, mask)
    for name, given in rows.items():
        if given.shape[0] != prediction.shape[0]:
            raise ValueError(
                f"{name}: expected as many samples as predictions ({prediction.shape[0]}), got {given.shape[0]}"
            )
        if given.device != prediction.device:
            raise ValueError(f"{name}: expected the device of the predictions, {prediction.device}, got {given.device}")
    if mask is not None:
        valid = valid & mask
    # Predictions and labels are replaced before the loss: afterwards 0 * NaN would still be NaN in the gradients.
    prediction = _wide(prediction)
    if task.kind == "multiclass":
        target = torch.where(valid, label, 0).to(torch.int64)
        loss = F.cross_entropy(torch.where(valid.unsqueeze(1), prediction, 0.0), target, reduction="none")
    else:
        prediction = torch.where(valid, prediction, 0.0)
        target = torch.where(valid, label.to(prediction.dtype), 0.0)
        per_sample = F.binary_cross_entropy_with_logits if task.kind == "binary" else F.mse_loss
        loss = per_sample(prediction, target, reduction="none")
    return torch.where(valid, loss, 0.0).sum(), valid.sum()


def _check_named(source: str, given: object, task: str) -> None:
    if isinstance(given, (Tensor, list, tuple)):
        raise TypeError(f"{source}: expected tensors by task, such as {{{task!r}: tensor}}, got {type(given).__name__}")


def _check_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}; torch.as_tensor makes one")


def _column(name: str, x: Tensor) -> Tensor:
    """``(B,)`` from ``(B,)`` or ``(B, 1)``: both together would silently broadcast to ``(B, B)``."""
    if x.ndim == 2 and x.shape[1] == 1:
        return x.squeeze(1)
    if x.ndim != 1:
        raise ValueError(f"{name}: expected shape (B,) or (B, 1), got {tuple(x.shape)}")
    return x
