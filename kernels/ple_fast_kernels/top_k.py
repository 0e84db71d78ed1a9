"""Gates that choose: the logits that are not among the largest of a row become minus infinity."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, next_power, prepare
from ._matmul import add_at
from ._tiles import TOP_K_TILE
from .tables import Mixtures


@triton.jit
def _is_above(other, own, is_before):
    """Whether ``other`` is chosen ahead of ``own``: NaN is larger than any number, and of equal ones the first is."""
    # Of two NaN the first is above, as of two that are equal.
    same = (other == own) | ((other != other) & (own != own))
    more = (other > own) | ((other != other) & (own == own))
    return more | (same & is_before)


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
                    above += _is_above(other, logit, (e < o_g)[None, :]).to(tl.int32)
                logit = tl.where(above < K, logit, float("-inf"))
            tl.store(Out + o_l, logit, mask=m_l)


@triton.jit(do_not_specialize=["B"])
def _keep_joint_kernel(
    Logits, Out, B, LOGITS: tl.constexpr, LOGIT_FIRST: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr,
    TEMPERATURE: tl.constexpr, JOINT: tl.constexpr, JOINT_PLACE: tl.constexpr, JOINT_K: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """As ``_keep_top_k_kernel``, but JOINT_K of the K are the same for all mixtures of a row: of JOINT experts those of
    the largest ``sum_o softmax(Logits[:, o] / T)``. ``JOINT_PLACE[o * JOINT + c]``: place of the c-th in mixture o.

    Logits, Out ``(B, LOGITS)``.
    """
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_g = tl.arange(0, WIDTH)
    m_m = o_m < B
    sums = ()
    for _ in tl.static_range(JOINT):
        sums = sums + (tl.zeros((BLOCK_M,), Logits.dtype.element_ty),)
    for o in tl.static_range(len(SIZES)):
        if LOGIT_FIRST[o] >= 0:
            first = o_m * LOGITS + LOGIT_FIRST[o]
            m_g = (o_g < SIZES[o])[None, :]
            logit = tl.load(Logits + first[:, None] + o_g[None, :], mask=m_m[:, None] & m_g, other=0.0) / TEMPERATURE
            top = tl.max(tl.where(m_g, logit, float("-inf")), 1)
            total = tl.sum(tl.where(m_g, tl.exp(logit - top[:, None]), 0.0), 1)
            for c in tl.static_range(JOINT):
                own = tl.load(Logits + first + JOINT_PLACE[o * JOINT + c], mask=m_m, other=0.0) / TEMPERATURE
                sums = add_at(sums, c, tl.exp(own - top) / total)
    together = ()
    for c in tl.static_range(JOINT):
        above = tl.zeros((BLOCK_M,), tl.int32)
        for d in tl.static_range(JOINT):
            above += _is_above(sums[d], sums[c], d < c).to(tl.int32)
        together = together + (above < JOINT_K,)
    for o in tl.static_range(len(SIZES)):
        if LOGIT_FIRST[o] >= 0:
            first = o_m * LOGITS + LOGIT_FIRST[o]
            o_l = first[:, None] + o_g[None, :]
            m_l = m_m[:, None] & (o_g < SIZES[o])[None, :]
            logit = tl.load(Logits + o_l, mask=m_l, other=0.0)
            if SIZES[o] > K:
                before = logit
                for c in tl.static_range(JOINT):
                    is_here = together[c][:, None] & (o_g == JOINT_PLACE[o * JOINT + c])[None, :]
                    before = tl.where(is_here, float("inf"), before)
                above = tl.zeros((BLOCK_M, WIDTH), tl.int32)
                for e in tl.static_range(tl.constexpr(SIZES[o])):
                    other = tl.load(Logits + first + e, mask=m_m, other=0.0)
                    for c in tl.static_range(JOINT):
                        if JOINT_PLACE[o * JOINT + c] == e:
                            other = tl.where(together[c], float("inf"), other)
                    above += _is_above(other[:, None], before, (e < o_g)[None, :]).to(tl.int32)
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


@lru_cache(maxsize=CACHED)
def _prepared_joint(mixtures: Mixtures, k: int, joint_k: int, experts: tuple[int, ...], temperature: float) -> Prepared:
    _, column, _ = mixtures.dense()
    places = [
        column[o * mixtures.experts + e] - first if first >= 0 else -1
        for o, first in enumerate(mixtures.logit_first)
        for e in experts
    ]
    return prepare(
        _keep_joint_kernel,
        TOP_K_TILE,
        LOGITS=mixtures.logits,
        LOGIT_FIRST=mixtures.logit_first,
        SIZES=mixtures.sizes,
        WIDTH=next_power(max(mixtures.sizes)),
        TEMPERATURE=temperature,
        JOINT=len(experts),
        JOINT_PLACE=tuple(places),
        JOINT_K=joint_k,
        K=k,
        BLOCK_M=TOP_K_TILE.rows,
    )


def keep_joint(
    logits: Tensor, mixtures: Mixtures, k: int, joint_k: int, experts: tuple[int, ...], *, temperature: float = 1.0
) -> Tensor:
    """``keep_top_k``, where ``joint_k`` of the ``k`` are the same for all gated mixtures of a row.

    Args:
        logits: ``(B, G)`` in float32 or float64, contiguous. B at least 1.
        k, joint_k: how many of each gated mixture stay, and how many of these are chosen together.
        experts: those that are chosen from together; every gated mixture weighs each of them.
        temperature: of the softmax whose sum over mixtures decides.
    """
    out = torch.empty_like(logits)
    grid = (cdiv(logits.shape[0], TOP_K_TILE.rows),)
    run = _prepared_joint(mixtures, k, joint_k, experts, temperature)
    run(grid, logits.device, Logits=logits, Out=out, B=logits.shape[0])
    return out


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
