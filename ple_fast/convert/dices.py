"""Which dice a module computes, of whatever library: its attributes say so, and a trial run on a copy confirms it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.plain import Dice, RowDice
from ..scalars import check_number


def dice_norm(module: nn.Module) -> nn.BatchNorm1d | None:
    """The batch norm of a dice over the batch: ``bn`` or ``norm`` of a class ``Dice`` that also has ``alpha``."""
    if type(module).__name__ != "Dice" or not isinstance(getattr(module, "alpha", None), Tensor):
        return None
    norm = getattr(module, "bn", getattr(module, "norm", None))
    return norm if type(norm) is nn.BatchNorm1d else None


def row_dice_eps(module: nn.Module) -> float | None:
    """The epsilon of a dice over rows: of ``RowDice``, or of a class ``Dice`` with one alpha and without norm."""
    alpha = getattr(module, "alpha", None)
    if type(module).__name__ not in ("Dice", "RowDice") or dice_norm(module) is not None:
        return None
    if not isinstance(alpha, nn.Parameter) or alpha.shape != (1,):
        return None
    eps = getattr(module, "eps", getattr(module, "epsilon", None))
    try:
        return None if isinstance(eps, Tensor) else check_number("eps", eps)
    except TypeError:
        return None


def is_dice(module: nn.Module) -> bool:
    """Whether it looks like one of the two."""
    return dice_norm(module) is not None or row_dice_eps(module) is not None


def dice_fault(dice: Any, units: int) -> str | None:
    """Why a dice of ``units`` features cannot be packed, or None."""
    norm, eps = dice_norm(dice), row_dice_eps(dice)
    if type(dice) is RowDice:
        return None
    if norm is None:
        assert eps is not None
        if any(True for _ in dice.children()) or [*dice.state_dict()] != ["alpha"]:
            return "has more than its alpha"
        return _difference(dice, RowDice(eps=eps, device="cpu"), units, "with p of each row's own mean")
    if not isinstance(dice.alpha, nn.Parameter) or dice.alpha.shape != (units,) or norm.num_features != units:
        return f"expected a learned alpha and a batch norm of {units} features, the width before it"
    if norm.affine or norm.running_mean is None:
        return "its batch norm has weight and bias or no statistics; only affine=False can be packed"
    if type(dice) is Dice:
        return None
    if {id(t) for t in [*dice.parameters(), *dice.buffers()]} != {id(dice.alpha), *map(id, norm.buffers())}:
        return "has more tensors than alpha and the statistics of its batch norm"
    ours = Dice(units, eps=norm.eps, momentum=norm.momentum, device="cpu")
    ours.bn.track_running_stats = norm.track_running_stats
    return _difference(dice, ours, units, "with p = sigmoid(batch_norm(z))")


@torch.no_grad()
def _difference(dice: nn.Module, ours: Any, units: int, what: str) -> str | None:
    """What to say where a copy of a dice does not give what ours gives, in train and in eval mode."""
    like: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}
    theirs: Any = copy.deepcopy(dice).to_empty(device="cpu").double()
    ours = ours.double()
    for own in (theirs, ours):
        own.alpha.copy_(torch.linspace(-0.5, 1.5, own.alpha.numel(), **like))
        norm = dice_norm(own)
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            assert norm.num_batches_tracked is not None
            norm.running_mean.fill_(0.25)
            norm.running_var.fill_(2.0)
            norm.num_batches_tracked.zero_()
    steps = torch.linspace(-2.0, 1.0, 5 * units, **like).view(5, units)
    for train in (True, False):
        for z in (steps, 0.01 * steps.square()):  # the epsilon shows in small numbers
            if not torch.allclose(theirs.train(train)(z), ours.train(train)(z), rtol=1e-9, atol=1e-12):
                return f"computes something else than p z + (1 - p) alpha z {what}"
    return None
