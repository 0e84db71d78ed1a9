"""What one call of fit hands on to the next: the order of the rows, and the optimizer with its state."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scalars import check_number, check_seed, shown

MakeOptimizer = Callable[..., torch.optim.Optimizer]


class Run:
    """A training that may take several calls of ``fit``: the generator of its order, and its optimizer.

    It is over, and the next call begins another one, when ``seed``, ``lr``, the optimizer or the trainable parameters
    (which, on which device, of which dtype) are others.
    """

    def __init__(
        self, seed: int, lr: float | Tensor, optimizer: MakeOptimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.seed, self.lr, self.make, self.parameters = seed, lr, optimizer, list(parameters)
        self.places = _places(parameters)
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self._kept: torch.optim.Optimizer | None = None

    def goes_on_with(
        self, seed: int, lr: float | Tensor, optimizer: MakeOptimizer, parameters: Sequence[nn.Parameter]
    ) -> bool:
        """Whether a call with these arguments continues this run."""
        same = len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))
        return (
            same
            and self.places == _places(parameters)
            and self.seed == seed
            and (type(self.lr), float(self.lr)) == (type(lr), float(lr))
            and _are_equal(self.make, optimizer)
        )

    def take_optimizer(self) -> torch.optim.Optimizer:
        """That of the last call, or a new one. Until ``keep`` gives it back the run has none, whatever happens.

        Raises:
            TypeError: the function returned something else.
        """
        kept, self._kept = self._kept, None
        if kept is not None:
            return kept
        made = self.make(list(self.parameters), lr=self.lr)
        if not callable(getattr(made, "step", None)) or not callable(getattr(made, "zero_grad", None)):
            raise TypeError(f"optimizer: expected the function to return an optimizer, got {shown(made)}")
        return made

    def keep(self, optimizer: torch.optim.Optimizer) -> None:
        """For the next call: the weights are those that its last step left."""
        self._kept = optimizer


def run_for(
    last: Run | None,
    *,
    seed: Any,
    lr: Any,
    optimizer: Any,
    parameters: Iterable[nn.Parameter],
) -> Run:
    """The run that a call of ``fit`` with these arguments belongs to.

    Raises:
        TypeError: an argument of another type.
        ValueError: every parameter is frozen.
    """
    if not callable(optimizer):
        raise TypeError(
            "optimizer: expected a class or function that is called as optimizer(parameters, lr=lr), such as "
            f"torch.optim.Adam, got {shown(optimizer)}"
        )
    seed = check_seed(seed)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise TypeError(f"lr: expected a number, got {shown(lr)}")
    lr = lr if isinstance(lr, Tensor) else check_number("lr", lr)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("fit: expected parameters that require a gradient, got a model whose parameters are frozen")
    if last is not None and last.goes_on_with(seed, lr, optimizer, trained):
        return last
    return Run(seed, lr, optimizer, trained)


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
