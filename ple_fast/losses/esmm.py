"""ESMM's pair over the entire space."""

from __future__ import annotations

import torch
from torch import Tensor

from .task_loss import check_tensor, wide


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
        check_tensor(name, logit)
        if not logit.is_floating_point():
            raise TypeError(f"{name}: expected floating logits, got {logit.dtype}")
    if ctr_logit.shape != cvr_logit.shape:
        raise ValueError(f"expected logits of one shape, got {tuple(ctr_logit.shape)} and {tuple(cvr_logit.shape)}")
    a, b = wide(ctr_logit), wide(cvr_logit)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    # The largest term goes out of the sum: exp(-low) where high >= 0, exp(-low - high) elsewhere. Both cases are one
    # formula in min(high, 0), so that all its uses take the derivative of the same side at 0. A logsumexp would not do:
    # its derivative exp(term - result) is off by the rounding of large logits.
    negative = high.clamp(max=0)
    return low + negative - torch.log1p(torch.exp(low - high + negative) + torch.exp(2 * negative - high))
