"""Checks of what users pass at each call: errors that say what was expected, what came, and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(tensor: Tensor) -> str:
    """``(8, 5)``."""
    return str(tuple(tensor.shape))


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """A floating dtype of parameters, or None.

    Raises:
        TypeError: anything else.
    """
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, FLOATING))}, got {dtype}")


def check_slot_tensor(name: str, tensor: object, features: int, like: Tensor, autocast: torch.dtype | None) -> None:
    """One tensor of an input: its kind, dtype and device fit the parameter ``like``, and its last axis ``features``.

    Raises:
        TypeError: no tensor, or another dtype than the parameters' (under autocast any floating dtype will do).
        ValueError: another device, layout or width.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout sparse ({tensor.layout}); call to_dense()")
    if tensor.dtype != like.dtype and (autocast is None or not tensor.is_floating_point()):
        mend = "x.to(dtype), or run under torch.autocast" if tensor.is_floating_point() else "convert it, or embed ids"
        raise TypeError(f"{name}: expected dtype {like.dtype} like the parameters, got {tensor.dtype}; {mend}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} like the parameters, got {tensor.device}; move one of them"
        )
    if tensor.dim() and tensor.shape[-1] != features:
        raise ValueError(
            f"{name}: expected last size {features} (the features the module was built for), got {tensor.shape[-1]} "
            f"in shape {shape_of(tensor)}"
        )


def check_input(
    name: str, x: Tensor | Sequence[Tensor], features: int, slots: int, like: Tensor, autocast: torch.dtype | None
) -> None:
    """An input of a level: ``(B, D)``, ``(B, S, D)`` or S tensors ``(B, D)``.

    Raises:
        TypeError, ValueError: see ``check_slot_tensor``; also another number of axes, slots or rows.
    """
    if isinstance(x, Tensor):
        if x.dim() not in (2, 3):
            raise ValueError(
                f"{name}: expected shape (B, {features}), (B, {slots}, {features}) or a list of {slots} tensors "
                f"(B, {features}), got shape {shape_of(x)}"
            )
        check_slot_tensor(name, x, features, like, autocast)
        if x.dim() == 3 and x.shape[1] != slots:
            raise ValueError(f"{name}: expected {slots} slots, got {x.shape[1]} in shape {shape_of(x)}")
        return
    if not isinstance(x, (list, tuple)):
        raise TypeError(
            f"{name}: expected a tensor (B, {features}) or (B, {slots}, {features}), or a list of {slots} tensors, "
            f"got {type(x).__name__}"
        )
    if len(x) != slots:
        raise ValueError(f"{name}: expected a list of {slots} tensors, one per slot, got {len(x)}")
    for s, tensor in enumerate(x):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{s}]: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2 or tensor.shape != x[0].shape:
            raise ValueError(
                f"{name}[{s}]: expected shape (B, {features}) like the other slots, got shape {shape_of(tensor)} "
                f"beside {shape_of(x[0])}"
            )
        check_slot_tensor(f"{name}[{s}]", tensor, features, like, autocast)


def check_scaled(x: object, scale: object, factor: float) -> None:
    """The operands of ``functional.scaled``.

    Raises:
        TypeError, ValueError: see there.
    """
    for name, tensor in (("x", x), ("scale", scale)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name}: expected a dense floating tensor, got {tensor.dtype} of layout {tensor.layout}; convert it"
            )
    assert isinstance(x, Tensor) and isinstance(scale, Tensor)
    if not math.isfinite(factor):
        raise ValueError(f"factor: expected a finite number, got {factor}")
    if x.device != scale.device:
        raise ValueError(f"scale: expected device {x.device} like x, got {scale.device}; move one of them")
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace, to whom shapes are values
        return
    both, last = x.dim() == scale.dim() == 3, x.dim() in (2, 3) and scale.dim() in (2, 3)
    fits = last and x.shape[0] == scale.shape[0] and x.shape[-1] == scale.shape[-1]
    if not fits or (both and x.shape[1] != scale.shape[1]):
        raise ValueError(
            "scale: expected x and scale of shape (B, S, D), or one of them (B, D) for all slots, got "
            f"{shape_of(x)} and {shape_of(scale)}"
        )


def check_more_than_one(batch: int, features: int) -> None:
    """Batch norm in training needs two rows, as in PyTorch (an empty batch is let through).

    Raises:
        ValueError: one row.
    """
    if batch == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size (1, {features}); batch norm needs a "
            "batch of 2 or more in train mode: call eval(), or leave out a last batch of one sample (drop_last=True)"
        )
