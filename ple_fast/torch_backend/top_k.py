"""Gates that choose: the logits of the experts that a row does not choose become minus infinity, and weigh 0."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int, *, is_traced: bool = False) -> Tensor:
    """``(rows, O, E)`` with minus infinity in place of all but the ``k`` largest along E; of equal ones the first stay.

    NaN is larger than any number, so that it is seen. The gradient is that of what stays.

    ``is_traced``: by operators that every exporter knows, with ``E`` times the memory; ONNX has no stable sort.
    """
    if is_traced:
        own, other = logits.unsqueeze(3), logits.unsqueeze(2)
        own_nan, other_nan = own != own, other != other
        place = torch.arange(logits.shape[2], device=logits.device)
        is_before = place.unsqueeze(0) < place.unsqueeze(1)
        is_more = (other > own) | (other_nan & ~own_nan)
        is_same = (other == own) | (other_nan & own_nan)
        kept = (is_more | (is_same & is_before)).sum(3) < k
    else:
        chosen = logits.sort(dim=2, descending=True, stable=True).indices[:, :, :k]
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, chosen, 1)
    return logits.masked_fill(~kept, -torch.inf)
