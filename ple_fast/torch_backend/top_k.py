"""Gates that choose: the logits of the experts that a row does not choose become minus infinity, and weigh 0."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(values: Tensor, k: int, *, is_traced: bool = False) -> Tensor:
    """Whether each of ``(..., n)`` is among the ``k`` largest of its row; of equal ones the first are.

    NaN is larger than any number, so that it is seen.

    ``is_traced``: by operators that every exporter knows, with ``n`` times the memory; ONNX has no stable sort.
    """
    if is_traced:
        own, other = values.unsqueeze(-1), values.unsqueeze(-2)
        own_nan, other_nan = own != own, other != other
        place = torch.arange(values.shape[-1], device=values.device)
        is_before = place.unsqueeze(0) < place.unsqueeze(1)
        is_more = (other > own) | (other_nan & ~own_nan)
        is_same = (other == own) | (other_nan & own_nan)
        return (is_more | (is_same & is_before)).sum(-1) < k
    chosen = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, chosen, 1)


def keep_top_k(logits: Tensor, k: int, *, is_traced: bool = False) -> Tensor:
    """``(rows, O, E)`` with minus infinity in place of all but the ``k`` largest along E, as in ``largest``.

    The gradient is that of what stays.
    """
    return logits.masked_fill(~largest(logits, k, is_traced=is_traced), -torch.inf)


def keep_joint(logits: Tensor, k: int, joint_k: int, experts: Tensor | None, *, is_traced: bool = False) -> Tensor:
    """``keep_top_k``, where ``joint_k`` of the ``k`` are the same for all O: those of the largest sums of softmaxes.

    Args:
        logits: ``(rows, O, E)``, minus infinity where a gate has no such expert.
        experts: numbers ``(n,)`` of the experts that are chosen from together; None: all.
    """
    with torch.no_grad():
        sums = torch.softmax(logits, dim=2).sum(1)
        if experts is None:
            together = largest(sums, joint_k, is_traced=is_traced)
        else:
            chosen = largest(sums.index_select(1, experts), joint_k, is_traced=is_traced)
            together = torch.zeros_like(sums, dtype=torch.bool).index_copy(1, experts, chosen)
        before = logits.masked_fill(together.unsqueeze(1), torch.inf)
        kept = largest(before, k, is_traced=is_traced)
    return logits.masked_fill(~kept, -torch.inf)
