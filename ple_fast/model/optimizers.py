"""What is done where some gradients are sparse: two optimizers in the place of one, and a norm over both kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scalars import shown

TAKE_SPARSE = "torch.optim.SparseAdam, Adagrad or SGD (the last two without weight_decay)"


class Optimizers(torch.optim.Optimizer):
    """An optimizer of tables with sparse gradients and one of all other parameters, where there are any, as one.

    Its groups are those of both, the tables' last, so that a schedule changes the rates of all; its defaults are the
    options that both have.

    Args:
        parts: ``"embedding_optimizer"``, and behind it ``"optimizer"``, as the arguments of ``fit`` are called.

    Raises:
        TypeError: one of them is no ``torch.optim.Optimizer``; at a step: that of the tables takes no sparse gradients.
            No parameter has moved then.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        for name, made in parts.items():
            if not isinstance(made, torch.optim.Optimizer):
                raise TypeError(
                    f"{name}: expected the function to return a torch.optim.Optimizer, which sparse_embeddings=True "
                    f"needs, got {shown(made)}"
                )
        self.parts: dict[str, torch.optim.Optimizer] = dict(parts)
        super().__init__(self._groups(), {})
        first, *others = self.parts.values()
        self.defaults = {key: own for key, own in first.defaults.items() if all(key in o.defaults for o in others)}

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in reversed(self.parts.values()) for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The tables, then the rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self.parts.items():
            try:
                part.step()
            except (RuntimeError, ValueError) as error:
                if name == "optimizer" or "sparse" not in str(error).lower():  # it has another reason
                    raise
                raise TypeError(
                    f"{name}: expected one that takes sparse gradients, such as {TAKE_SPARSE}, got "
                    f"{type(part).__name__}, which says: {error}"
                ) from error
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of the two, by the name of the argument."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = self._groups()  # loading made new ones


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``, which takes no sparse gradients; returns the norm of all, before.

    That of a sparse gradient is the norm of the dense one: its values are summed by row first.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(gradient.is_sparse for gradient in gradients):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    norm: Tensor = nn.utils.get_total_norm(values)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(coefficient.to(value.device))
    return norm
