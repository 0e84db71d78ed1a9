"""Gates that choose: the logits that are not among the largest of a row become minus infinity."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, next_power, prepare
from ._tiles import TOP_K_TILE
from .tables import Mixtures


@triton.jit(do_not_specialize=["B"])
def _keep_top_k_kernel(
    Logits, Out, B, LOGITS: tl.constexpr, LOGIT_FIRST: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Minus infinity for all but the K largest logits of each mixture in a row; of equal ones the first stay.

    Logits, Out ``(B, LOGITS)``. NaN is larger than any number.
    """
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_g = tl.arange(0, WIDTH)
    m_m = o_m < B
    for o in tl.static_range(len(SIZES)):
        if LOGIT_FIRST[o] >= 0:
            first = o_m * LOGITS + LOGIT_FIRST[o]
            o_l = first[:, None] + o_g[None, :]
            m_l = m_m[:, None] & (o_g < SIZES[o])[None, :]
            logit = tl.load(Logits + o_l, mask=m_l, other=0.0)
            if SIZES[o] > K:
                above = tl.zeros((BLOCK_M, WIDTH), tl.int32)
                for e in tl.static_range(tl.constexpr(SIZES[o])):
                    other = tl.load(Logits + first + e, mask=m_m, other=0.0)[:, None]
                    # Of two NaN the first is above, as of two that are equal.
                    same = (other == logit) | ((other != other) & (logit != logit))
                    more = (other > logit) | ((other != other) & (logit == logit))
                    above += (more | (same & (e < o_g)[None, :])).to(tl.int32)
                logit = tl.where(above < K, logit, float("-inf"))
            tl.store(Out + o_l, logit, mask=m_l)


@lru_cache(maxsize=CACHED)
def _prepared(mixtures: Mixtures, k: int) -> Prepared:
    return prepare(
        _keep_top_k_kernel,
        TOP_K_TILE,
        LOGITS=mixtures.logits,
        LOGIT_FIRST=mixtures.logit_first,
        SIZES=mixtures.sizes,
        WIDTH=next_power(max(mixtures.sizes)),
        K=k,
        BLOCK_M=TOP_K_TILE.rows,
    )


def keep_top_k(logits: Tensor, mixtures: Mixtures, k: int) -> Tensor:
    """The logits with minus infinity in the place of those that a gate does not choose.

    Args:
        logits: ``(B, G)`` in float32 or float64, contiguous. B at least 1.
        k: how many of each gated mixture stay.
    """
    out = torch.empty_like(logits)
    grid = (cdiv(logits.shape[0], TOP_K_TILE.rows),)
    _prepared(mixtures, k)(grid, logits.device, Logits=logits, Out=out, B=logits.shape[0])
    return out
