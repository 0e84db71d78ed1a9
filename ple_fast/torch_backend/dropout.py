"""Dropout from a seed: the same mask again in backward, in a second forward, and in every implementation.

The bits are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in tensor operators, 16 for each element. They depend on
the element's row and column alone, not on how the batch is cut, and take a tenth of the time of ``bernoulli_`` on a
CPU. The kernels draw the same bits (``kernels/ple_fast_kernels/_dropout.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Of SplitMix64's output function: shift, then factor."""
_LEVELS = 1 << 16
_SEEDS = 2**31 - 1


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _mix(word: int) -> int:
    """SplitMix64's output function."""
    for shift, factor in _ROUNDS:
        word = (word ^ word >> shift) * factor & _WORD
    return word


def _mix_(bits: Tensor) -> Tensor:
    """``_mix`` of every element, in place: int64 arithmetic wraps round, as the generator's does."""
    for shift, factor in _ROUNDS:
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 64 - shift) - 1))  # >> repeats the sign
        if factor != 1:
            bits.mul_(_signed(factor))
    return bits


def draw_seed(device: torch.device) -> Tensor:
    """A seed out of PyTorch's generator, on its device: a program that draws it draws it anew at every run."""
    return torch.randint(_SEEDS, (), device=device)


def keep_mask(seed: int | Tensor, position: int, start: int, like: Tensor, p: float) -> Tensor:
    """1 where an element is kept, else 0, int16 in the shape of ``like``: rows ``start``... of layer ``position``.

    The rate is ``p`` rounded to a multiple of 2**-16, but neither 0 nor 1.
    """
    if isinstance(seed, int) and like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("dropout: a CUDA graph would drop the same elements at every replay; capture without it")
    rows, width, device = like.shape[0], math.prod(like.shape[1:]), like.device
    if rows == 0:  # a sum without rows may have strides that no view by another dtype takes
        return torch.empty(like.shape, dtype=torch.int16, device=device)
    words = (width + 3) // 4
    keeps = min(max(round((1.0 - p) * _LEVELS), 1), _LEVELS - 1)  # of the values of 16 bits
    key: int | Tensor
    if isinstance(seed, int):
        key = _signed(_mix(_mix(seed + _GOLDEN) + position * _GOLDEN & _WORD))
    else:
        key = _mix_(_mix_(seed + _signed(_GOLDEN)).add_(_signed(position * _GOLDEN)))
    of_row = torch.arange(start, start + rows, device=device).mul_(_signed(words * _GOLDEN)).add_(key)
    of_word = torch.arange(1, words + 1, device=device).mul_(_signed(_GOLDEN))
    bits = _mix_(of_row.unsqueeze(1) + of_word)
    kept = bits.view(torch.int16).ge_(_LEVELS // 2 - keeps)
    return kept[:, :width].view(like.shape) if kept.shape[1] == width else kept[:, :width].reshape(like.shape)
