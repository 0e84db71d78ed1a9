"""What one call of fit hands on to the next: the order of the rows, the optimizer and the schedule of its rate."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scalars import check_number, check_seed, shown
from .embedding import sparse_tables
from .optimizers import Optimizers

MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], Any]
"""Gives a scheduler of ``torch.optim.lr_scheduler``, or what has its ``step``."""


class Run:
    """A training that may take several calls of ``fit``: the generator of its order, its optimizer and schedule.

    It is over, and the next call begins another one, when ``seed``, ``lr``, an optimizer, the schedule (or after what
    it is stepped) or the trainable parameters (which, on which device, of which dtype, which of them with sparse
    gradients) are others.
    """

    def __init__(
        self,
        seed: int,
        lr: float | Tensor,
        optimizer: MakeOptimizer,
        parameters: Sequence[nn.Parameter],
        schedule: MakeSchedule | None,
        tables: Sequence[nn.Parameter] = (),
        embedding_optimizer: MakeOptimizer | None = None,
        schedule_every: str = "epoch",
    ) -> None:
        self.seed, self.lr, self.make, self.parameters = seed, lr, optimizer, list(parameters)
        self.schedule, self.schedule_every = schedule, schedule_every
        self.tables, self.make_for_tables = list(tables), embedding_optimizer
        """Parameters with sparse gradients, of ``parameters``, and the function that makes an optimizer of them."""
        self.places = _places(parameters)
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self.epochs = 0
        """That it has trained, in all calls."""
        self._kept: torch.optim.Optimizer | None = None
        self._kept_scheduler: Any = None

    def goes_on_with(self, fresh: Run) -> bool:
        """Whether a call that would begin ``fresh`` continues this run."""
        own, others = self.parameters, fresh.parameters
        return (
            len(own) == len(others)
            and all(map(operator.is_, own, others))
            and self.places == fresh.places
            and self.seed == fresh.seed
            and (type(self.lr), float(self.lr)) == (type(fresh.lr), float(fresh.lr))
            and _are_equal(self.make, fresh.make)
            and _are_equal(self.make_for_tables, fresh.make_for_tables)
            and _are_equal(self.schedule, fresh.schedule)
            and self.schedule_every == fresh.schedule_every
        )

    def take_optimizer(self) -> torch.optim.Optimizer:
        """That of the last call, or a new one. Until ``keep`` gives it back the run has none, whatever happens.

        Raises:
            TypeError: a function returned something else.
        """
        kept, self._kept = self._kept, None
        if kept is not None:
            return kept
        if self.make_for_tables is None:
            made = self.make(list(self.parameters), lr=self.lr)
            if not callable(getattr(made, "step", None)) or not callable(getattr(made, "zero_grad", None)):
                raise TypeError(f"optimizer: expected the function to return an optimizer, got {shown(made)}")
            return made
        own = set(map(id, self.tables))
        rest = [parameter for parameter in self.parameters if id(parameter) not in own]
        parts: dict[str, Any] = {"embedding_optimizer": self.make_for_tables(list(self.tables), lr=self.lr)}
        return Optimizers({**parts, "optimizer": self.make(rest, lr=self.lr)} if rest else parts)

    def take_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """That of the last call if it is this optimizer's and has steps left, or a new one; None without a schedule.

        Raises:
            TypeError: the function returned something else.
        """
        kept, self._kept_scheduler = self._kept_scheduler, None
        if self.schedule is None:
            return None
        if kept is not None and getattr(kept, "optimizer", None) is optimizer and steps_left(kept) != 0:
            return kept
        made = self.schedule(optimizer)
        if not callable(getattr(made, "step", None)):
            raise TypeError(f"schedule: expected the function to return a scheduler, got {shown(made)}")
        return made

    def keep(self, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
        """For the next call: the weights are those that its last step left."""
        self._kept, self._kept_scheduler = optimizer, scheduler


def run_for(
    last: Run | None,
    model: nn.Module,
    optimizer: Any,
    embedding_optimizer: Any = None,
    *,
    seed: Any,
    lr: Any,
    schedule: Any = None,
    schedule_every: Any = "epoch",
) -> Run:
    """The run that a call of ``fit`` with these arguments belongs to.

    Args:
        embedding_optimizer: of the tables with sparse gradients; None: SparseAdam, where there are any.

    Raises:
        TypeError: an argument of another type.
        ValueError: every parameter is frozen, there is an ``embedding_optimizer`` and no such table, or
            ``schedule_every`` is neither ``"epoch"`` nor ``"batch"``.
    """
    if not callable(optimizer):
        raise TypeError(
            "optimizer: expected a class or function that is called as optimizer(parameters, lr=lr), such as "
            f"torch.optim.Adam, got {shown(optimizer)}"
        )
    if not (embedding_optimizer is None or callable(embedding_optimizer)):
        raise TypeError(
            "embedding_optimizer: expected a class or function that is called as embedding_optimizer(tables, lr=lr), "
            f"such as torch.optim.SparseAdam, got {shown(embedding_optimizer)}"
        )
    tables = sparse_tables(model)
    if embedding_optimizer is not None and not tables:
        raise ValueError(
            "embedding_optimizer: expected a model with sparse_embeddings=True with it, whose tables are trained, got "
            "no table with sparse gradients; optimizer= is for all other parameters"
        )
    if not (schedule is None or callable(schedule)):
        raise TypeError(
            "schedule: expected a function of the optimizer that returns a scheduler, such as functools.partial("
            f"torch.optim.lr_scheduler.StepLR, step_size=2), got {shown(schedule)}"
        )
    if schedule_every not in ("epoch", "batch"):
        raise ValueError(f"schedule_every: expected 'epoch' or 'batch', got {shown(schedule_every)}")
    seed = check_seed(seed)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise TypeError(f"lr: expected a number, got {shown(lr)}")
    lr = lr if isinstance(lr, Tensor) else check_number("lr", lr)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("fit: expected parameters that require a gradient, got a model whose parameters are frozen")
    if tables and embedding_optimizer is None:
        embedding_optimizer = torch.optim.SparseAdam
    fresh = Run(seed, lr, optimizer, trained, schedule, tables, embedding_optimizer, schedule_every)
    return last if last is not None and last.goes_on_with(fresh) else fresh


def steps_left(scheduler: Any, state: Mapping[str, Any] | None = None) -> int | None:
    """How often a scheduler of a fixed number of steps may still be stepped; None of one without an end.

    Args:
        state: of a checkpoint, which it is to be loaded with.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR):
        return None
    held = {**vars(scheduler), **(state or {})}
    return int(held["total_steps"] - held["last_epoch"])


def _places(parameters: Sequence[nn.Parameter]) -> list[tuple[torch.device, torch.dtype]]:
    return [(parameter.device, parameter.dtype) for parameter in parameters]


def _are_equal(first: Any, second: Any) -> bool:
    """Two optimizers as ``fit`` is given them; partials by their parts."""
    if isinstance(first, functools.partial) and isinstance(second, functools.partial):
        return _are_equal((first.func, *first.args, first.keywords), (second.func, *second.args, second.keywords))
    try:
        return bool(first == second)
    except (RuntimeError, TypeError, ValueError):  # arrays or tensors among the arguments: nobody says whether they are
        return False
